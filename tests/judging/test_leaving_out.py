"""The package without the rooms judging/ and experiments/: they and their two commands are deleted, and the rest works."""

import json
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LEFT_OUT = ("judging", "experiments", "judge.py", "evaluate.py")
PROBE = """
import importlib, json, pkgutil, sifm_min
from sifm_min.miniature import judge, samples
modules = [module.name for module in pkgutil.walk_packages(sifm_min.__path__, "sifm_min.") if ".models" not in module.name]
for module in modules:
    importlib.import_module(module)
sample = samples(1, seed=3)[0]
print(json.dumps([modules, judge(sample, sample.target).obeyed, sorted(sifm_min.METHODS)[:1]]))
"""


@pytest.fixture
def python(forked):
    """Run Python in a folder and return what it prints."""
    def printed(folder, *arguments):
        done = forked(*arguments, cwd=folder)
        assert done.returncode == 0, done.stderr
        return done.stdout
    return printed


@pytest.mark.slow
def test_rooms_left_out_break_nothing_else(tmp_path, python):
    skip = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "sifm_min", tmp_path / "sifm_min", ignore=skip)
    (tmp_path / "models").symlink_to(ROOT / "models", target_is_directory=True)
    for name in LEFT_OUT:
        path = tmp_path / "sifm_min" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    modules, obeyed, methods = json.loads(python(tmp_path, "-c", PROBE))
    assert {"sifm_min.immunize", "sifm_min.miniature.deciding", "sifm_min.editors.base"} <= set(modules)
    assert obeyed is True and methods
    for command in ("immunize", "edit", "compare", "weights"):
        assert f"sifm_min.{command}" in python(tmp_path, "-m", f"sifm_min.{command}", "--help")


def test_the_client_keeps_its_old_name(python):
    """Under each form of the import it is the same file, and `import sifm_min` alone does not load it."""
    code = ("import sys, sifm_min; assert 'requests' not in sys.modules\n"
            "import sifm_min.gemini as by_path\nfrom sifm_min.gemini import Client\nfrom sifm_min import gemini\n"
            "from sifm_min.judging import client\n"
            "assert gemini is client and Client is client.Client and by_path.Stop is client.Stop is sifm_min.gemini.Stop")
    python(ROOT, "-c", code)
