"""The code blocks of every README do what they say: some are run, the others are parsed by the command that they name."""

import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = "README.md"
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
         for depth in ("", "*/", "*/*/") for path in sorted(ROOT.glob(f"{depth}README.md"))
         if not any(part.startswith(".") or part in ("build", "venv") for part in path.relative_to(ROOT).parts)}
BLOCKS = [(page, marker or "", language, body) for page, text in PAGES.items() for marker, language, body in
          re.findall(r"(?:<!-- ([^\n]*) -->\n)?```(\w*)\n(.*?)```", text, re.DOTALL)]
MARKERS = r"|ci:main-job|ci:tests|needs: (weights|hours|files)|prints"     # no marker: the block is run here


def commands(marked, prefix):
    """The command lines of bash blocks whose marker matches, as parameters with readable ids."""
    lines = [(page, line) for page, marker, language, body in BLOCKS if language == "bash" and re.fullmatch(marked, marker)
             for line in body.splitlines() if line.startswith(prefix)]
    return [pytest.param(line, id=f"{page}: {line}") for page, line in lines]


def test_the_blocks_that_ci_runs_are_there():
    markers = [marker for page, marker, *_ in BLOCKS if page == README]
    assert markers.count("ci:main-job") == markers.count("ci:tests") == 1
    assert len(PAGES[README].splitlines()) <= 200


@pytest.mark.parametrize("page", PAGES)
def test_every_block_has_a_known_marker_and_known_commands(page):
    for _, marker, language, body in (block for block in BLOCKS if block[0] == page):
        assert re.fullmatch(MARKERS, marker), marker
        if language == "bash" and not marker.startswith("ci:"):
            for line in body.splitlines():
                assert line.startswith(("python -m sifm_min.", "python tools/")), line


@pytest.mark.slow
@pytest.mark.parametrize("line", commands("ci:main-job|", "python -m sifm_min"))
def test_a_command_runs(line, tmp_path):
    words = shlex.split(line, comments=True)[1:]
    if "-o" in words:
        words[words.index("-o") + 1] = str(tmp_path)
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.parametrize("line", commands("needs: .*", "python -m sifm_min"))
def test_a_command_that_is_not_run_is_parsed(line):
    _, _, module, *words = shlex.split(line, comments=True)
    command = importlib.import_module(module)
    parser = command.parser if module == "sifm_min.immunize" else command._parser    # its flags are a room of their own
    parser().parse_args(words)
    with pytest.raises(SystemExit):
        parser().parse_args([*words, "--no-such-option"])


@pytest.mark.slow
@pytest.mark.parametrize("line", commands(".*", "python tools/"))
def test_a_tool_knows_the_options_of_its_command(line, forked):
    """The tool refuses one more option, which is not there, and nothing else."""
    done = forked(*shlex.split(line, comments=True)[1:], "--no-such-option")
    assert done.returncode == 2 and done.stderr.rstrip().endswith("unrecognized arguments: --no-such-option"), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page, _, language, _ in BLOCKS if language == "python"])
def test_the_python_block_runs_and_prints_what_it_says(page, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    own, names = [block[1:] for block in BLOCKS if block[0] == page], {}
    for (_, language, body), (marker, _, printed) in zip(own, [*own[1:], ("", "", "")], strict=True):
        if language == "python":
            capsys.readouterr()
            exec(compile(body, page, "exec"), names)
            if marker == "prints":
                assert capsys.readouterr().out == printed


@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_a_readme_names_exists(page):
    for path in re.findall(r"(?<![\w/.])(?:models|sifm_min|tools|tests)/[\w./-]+\.(?:py|png|md|json)\b", PAGES[page]):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", PAGES[page]):               # links are relative to the page
        assert (ROOT / page).parent.joinpath(path).exists(), path
