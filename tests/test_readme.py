"""The README's code blocks do what they say: those that need nothing run, those that need weights are parsed."""

import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = [(marker or "", language, body) for marker, language, body in
          re.findall(r"(?:<!-- ([^\n]*) -->\n)?```(\w*)\n(.*?)```", README, re.DOTALL)]


def command_lines(marked):
    return [line for marker, language, body in BLOCKS if language == "bash" and marker == marked
            for line in body.splitlines() if line.startswith("python -m sifm_min")]


def test_the_blocks_that_ci_runs_are_there():
    markers = [marker for marker, _, _ in BLOCKS]
    assert markers.count("ci:main-job") == markers.count("ci:tests") == 1
    assert all(marker in ("", "ci:main-job", "ci:tests", "needs: weights") for marker in markers)
    assert len(README.splitlines()) <= 270


@pytest.mark.parametrize("line", command_lines("ci:main-job") + command_lines(""))
def test_a_command_runs(line, tmp_path):
    words = shlex.split(line)[1:]
    if "-o" in words:
        words[words.index("-o") + 1] = str(tmp_path)
    found = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip()


@pytest.mark.parametrize("line", command_lines("needs: weights"))
def test_a_command_that_needs_weights_is_parsed(line):
    _, _, module, *words = shlex.split(line)
    command = importlib.import_module(module)
    command._parser().parse_args(words)
    with pytest.raises(SystemExit):
        command._parser().parse_args([*words, "--no-such-option"])


def test_the_python_block_runs(monkeypatch):
    monkeypatch.chdir(ROOT)
    (block,) = [body for _, language, body in BLOCKS if language == "python"]
    names = {}
    exec(compile(block, "README.md", "exec"), names)
    assert names["result"].report["linf_steps"] <= 7
    assert names["edited"].size == names["image"].size


def test_every_file_that_the_readme_names_exists():
    for path in re.findall(r"(?:models|sifm_min|tools)/[\w./]+\.(?:py|png|md)", README):
        assert (ROOT / path).exists(), path
