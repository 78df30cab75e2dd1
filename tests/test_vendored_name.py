"""Commands and messages of a copy of the package under another name: they name themselves as they can be run."""

import os
import shutil
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = [path.stem for path in sorted((ROOT / "sifm_min").glob("*.py"))
            if "\nif __name__ ==" in path.read_text(encoding="utf-8")]
NAME = "app.vendor.guard"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder from which the package is app.vendor.guard, its networks inside it, without weights."""
    folder = tmp_path_factory.mktemp("vendored")
    leave_out = shutil.ignore_patterns("*.safetensors", "__pycache__")
    shutil.copytree(ROOT / "sifm_min", folder / "app" / "vendor" / "guard", ignore=leave_out)
    shutil.copytree(ROOT / "models", folder / "app" / "vendor" / "guard" / "models", ignore=leave_out)
    for name in ("a.png", "b.png"):
        Image.new("RGB", (32, 32), "grey").save(folder / name)
    return folder


@pytest.fixture
def vendored(forked, place):
    """Run a command of the vendored package, offline and with an empty cache."""
    settings = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "HF_"))}
    settings |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(place / "cache"), "PYTHONDONTWRITEBYTECODE": "1"}
    return lambda command, *words: forked("-m", f"{NAME}.{command}", *words, cwd=place, env=settings)


def test_there_are_six_commands():
    assert COMMANDS == ["compare", "edit", "evaluate", "immunize", "judge", "weights"]


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_the_vendored_command(command, vendored):
    done = vendored(command, "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"python -m {NAME}.{command}") >= 2 and "-m sifm_min" not in done.stdout


ADVICE = {
    "weights of an editor": (("edit", "a.png", "--prompt", "x", "--editor", "instruct-pix2pix", "-o", "out"), 3,
                             f"run `python -m {NAME}.weights download instruct-pix2pix` once"),
    "weights of LPIPS": (("compare", "a.png", "b.png", "--metrics", "lpips"), 3,
                         f"run `python -m {NAME}.weights download lpips-alex` once"),
    "usage": (("compare", "--no-such-option"), 2, f"python -m {NAME}.compare: "),
    "usage below an action": (("judge", "run", "--no-such-option"), 2, f"python -m {NAME}.judge run: "),
    "an editor of its own": (("edit", "a.png", "--prompt", "x", "--editor", "mine:make", "-o", "out"), 2,
                             f"derive it from {NAME}.editors.base.Editor"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", ADVICE)
def test_advice_names_the_vendored_command(case, place, vendored):
    words, code, advice = ADVICE[case]
    (place / "mine.py").write_text("def make():\n    return 3\n")
    done = vendored(*words)
    assert done.returncode == code and advice in done.stderr, done.stderr
    assert "-m sifm_min" not in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_no_message_spells_the_name_out():
    """A text in the code that names a command starts with PROGRAM; docstrings may show the usual name."""
    import ast
    for path in [*(ROOT / "sifm_min").rglob("*.py"), *(ROOT / "models").rglob("*.py")]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        documented = {id(node.body[0].value) for node in ast.walk(tree)
                      if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documented:
                assert "-m sifm_min" not in node.value, f"{path}:{node.lineno}"
