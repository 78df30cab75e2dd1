"""The package finds its own networks in every place it is put; and the files of a wheel.

The real project is built and laid out as people do: installed, editable, a bare checkout, vendored in three ways, in a
zip; each read from a folder whose own models/ must stay untouched. Every probe is a fresh Python in an environment that
has no dependency at all: importing the package, and its tokenizer, must not need one.
"""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = ("sifm_min", "models", "setup.cfg", "pyproject.toml", "LICENSE", "README.md")
LITTER = shutil.ignore_patterns("__pycache__", "*.egg-info", ".*")
FOREIGN = "raise SystemExit('a foreign models/ was imported')"

PROBE = """
import json, sys
import {package} as package
from {package}.models import clip_tokenizer
print(json.dumps([package.__file__, clip_tokenizer.__file__, package.__version__, list(package.__path__)]))
assert "models" not in sys.modules, "the networks are known under two names"
assert not any(name.partition(".")[0] == "torch" for name in sys.modules)
"""


@pytest.fixture(scope="session")
def project(tmp_path_factory):
    """A copy of what the packages are built from, so that building leaves nothing in the checkout."""
    folder = tmp_path_factory.mktemp("project")
    for name in PROJECT:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=LITTER)
        elif (ROOT / name).exists():
            shutil.copy(ROOT / name, folder)
    (folder / "tools").mkdir()                               # beside the package, never a part of it
    (folder / "tools" / "__init__.py").write_text(FOREIGN)
    return folder


@pytest.fixture(scope="session")
def target(project, tmp_path_factory):
    """The recommended way to vendor: pip install --no-deps --target. (Without isolation, so without a network.)"""
    folder = tmp_path_factory.mktemp("target")
    shutil.copytree(project, folder / "source")
    options = ("-q", "--no-deps", "--no-build-isolation", "--no-index", "--no-compile")
    done = subprocess.run([sys.executable, "-m", "pip", "install", *options,
                           "--target", folder / "third_party", folder / "source"],
                          stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert not done.returncode, done.stdout + done.stderr
    return folder / "third_party"


@pytest.fixture(scope="session")
def empty_python(tmp_path_factory):
    """A Python without a single package: make(name) -> (its executable, its site-packages)."""
    def make(name):
        folder = tmp_path_factory.mktemp(name)
        venv.create(folder, with_pip=False, symlinks=os.name != "nt")
        executable = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
        where = [executable, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
        return executable, Path(subprocess.check_output(where, text=True).strip())
    return make


@pytest.fixture(scope="session")
def bare(empty_python):
    return empty_python("bare")[0]


@pytest.fixture
def foreign(tmp_path):
    """A working folder of other people, with a models/ of their own."""
    write(tmp_path / "foreign", {"models/__init__.py": FOREIGN, "models/unet.py": FOREIGN, "models/clip.py": FOREIGN})
    return tmp_path / "foreign"


def write(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def copy(project, folder, *names):
    for name in names:
        shutil.copytree(project / name, folder / name, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


def python(executable, code, cwd, path=None):
    settings = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    settings["PYTHONDONTWRITEBYTECODE"] = "1"
    if path:
        settings["PYTHONPATH"] = str(path)
    return subprocess.run([executable, "-W", "error", "-c", code], cwd=cwd, env=settings, stdin=subprocess.DEVNULL,
                          capture_output=True, text=True)


def probe(executable, cwd, path=None, package="sifm_min"):
    """Import the package there; returns (folder of its code, folder of its networks)."""
    done = python(executable, PROBE.format(package=package), cwd, path)
    assert not done.returncode, done.stderr
    code, networks, version, search = json.loads(done.stdout)
    assert version == "0.2.0"
    assert search == [str(Path(code).parent)], "the parent folder stayed on the package's path"
    return Path(code).parent, Path(networks).parent


# ------------------------------------------------------------------------------------------------------------ installed

@pytest.mark.slow
def test_installed(target, project, bare, foreign):
    ours = (target / "sifm_min", target / "sifm_min" / "models")
    assert probe(bare, foreign.parent, target) == ours
    assert probe(bare, foreign, target) == ours
    assert probe(bare, project, target) == (project / "sifm_min", project / "models")      # the working folder wins


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["lenient", "strict"])
def test_editable(mode, project, empty_python, foreign, tmp_path):
    """As `pip install -e .` does: build the redirecting wheel and unpack it."""
    source = copy(project, tmp_path / "source", "sifm_min", "models")
    for name in ("setup.cfg", "pyproject.toml", "LICENSE"):
        shutil.copy(project / name, source)
    build = f"from setuptools import build_meta; build_meta.build_editable('.', {{'editable_mode': '{mode}'}})"
    done = subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    executable, site_packages = empty_python(mode)
    zipfile.ZipFile(next(source.glob("*.whl"))).extractall(site_packages)

    checkout = (source / "sifm_min", source / "models")
    assert probe(executable, source) == checkout
    for folder in (tmp_path, foreign):
        code, networks = probe(executable, folder)
        if mode == "lenient":
            assert (code, networks) == checkout
        assert code.joinpath("__init__.py").samefile(source / "sifm_min/__init__.py")
        assert networks.joinpath("clip_tokenizer.py").samefile(source / "models/clip_tokenizer.py")


# -------------------------------------------------------------------------------------------------------- not installed

def test_bare_checkout(project, bare, foreign):
    checkout = (project / "sifm_min", project / "models")
    assert probe(bare, project) == checkout
    assert probe(bare, foreign, project) == checkout


def test_vendored_side_by_side(project, bare, foreign):
    vendor = copy(project, foreign / "app" / "_vendor", "sifm_min", "models")
    assert probe(bare, foreign, vendor) == (vendor / "sifm_min", vendor / "models")
    assert probe(bare, foreign, package="app._vendor.sifm_min") == (vendor / "sifm_min", vendor / "models")


def test_vendored_with_the_networks_inside(project, bare, foreign):
    """Beside somebody's models/, which stays theirs."""
    copy(project, foreign, "sifm_min")
    copy(project, foreign / "sifm_min", "models")
    assert probe(bare, foreign) == (foreign / "sifm_min", foreign / "sifm_min" / "models")


def test_vendored_without_the_networks(project, bare, foreign):
    """Beside somebody's models/ or beside none: one clear sentence, and nothing of theirs is run."""
    copy(project, foreign, "sifm_min")
    copy(project, foreign / "alone", "sifm_min")
    for folder in (foreign, foreign / "alone"):
        done = python(bare, "import sifm_min", folder)
        assert done.stderr.splitlines()[-1] == (
            "ImportError: sifm_min: its networks are missing; put the folder models/ beside sifm_min/, or inside it")


def test_in_a_zip(project, bare, foreign):
    archive = foreign / "both.zip"
    with zipfile.ZipFile(archive, "w") as packed:
        for folder in ("sifm_min", "models"):
            for path in (project / folder).rglob("*.py"):
                packed.write(path, path.relative_to(project))
    assert probe(bare, foreign, archive) == (archive / "sifm_min", archive / "models")


def test_an_empty_folder_left_inside_does_not_hide_the_networks(project, bare, tmp_path):
    copy(project, tmp_path, "sifm_min", "models")
    (tmp_path / "sifm_min" / "models" / "__pycache__").mkdir(parents=True)
    assert probe(bare, tmp_path) == (tmp_path / "sifm_min", tmp_path / "models")


def test_other_folders_beside_the_package_stay_out_of_it(project, bare):
    walk = "import pkgutil, sifm_min; print([m.name for m in pkgutil.walk_packages(sifm_min.__path__, 'sifm_min.')])"
    names = python(bare, walk, project).stdout
    assert "'sifm_min.cli'" in names and "sifm_min.sifm_min" not in names and "tools" not in names
    done = python(bare, "import sifm_min.tools", project)
    assert done.stderr.splitlines()[-1] == "ModuleNotFoundError: No module named 'sifm_min.tools'"


# ------------------------------------------------------------------------------------------------------ what is shipped

def matching(folder, *patterns):
    found = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    return {path.relative_to(folder).as_posix() for path in found}


def shipped(project):
    """The files of the project in a package, under their installed names: code, and the data that setup.cfg names."""
    networks = {f"models/{name}" for name in matching(project / "models", "README.md", "**/*.py", "miniature*/**/*",
                                                     "latents/**/*", "lpips/*")}
    data = ("README.md", "instructions/*.txt", "judging/README.md", "judging/panels/*.json", "judging/prompts/*",
            "**/pages/*.html", "**/paper/*.json")
    return matching(project / "sifm_min", "**/*.py", *data) | networks


def test_the_wheel_holds_the_two_folders_and_nothing_else(target, project):
    assert matching(target / "sifm_min", "**/*") == shipped(project)
    assert sorted(path.name for path in target.iterdir()) == ["sifm_min", "sifm_min-0.2.0.dist-info"]
    licences = list(target.glob("sifm_min-0.2.0.dist-info/**/LICENSE"))                      # where, setuptools decides
    assert [licence.read_text() for licence in licences] == [(ROOT / "LICENSE").read_text()]


def test_every_file_of_the_two_folders_is_shipped(project):
    here = matching(project / "sifm_min", "**/*") | {f"models/{name}" for name in matching(project / "models", "**/*")}
    assert here == shipped(project)


def test_the_shipped_editors_are_in_the_wheel(target):
    for name in ("miniature", "miniature-sd3"):
        assert list(target.glob(f"sifm_min/models/{name}/vae/*.safetensors")), name
    assert list(target.glob("sifm_min/models/miniature/unet/*.safetensors"))
    assert (target / "sifm_min/models/miniature/tokenizer/vocab.json").is_file()


@pytest.mark.slow
def test_the_source_archive_builds_the_same(project, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(project, source)
    done = subprocess.run([sys.executable, "-c", "from setuptools import build_meta; build_meta.build_sdist('.')"],
                          cwd=source, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    with tarfile.open(next(source.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    places = {name if name.startswith("models/") else f"sifm_min/{name}" for name in shipped(project)}
    assert places | {"LICENSE", "setup.cfg", "pyproject.toml"} <= names
    assert not any(name.startswith("tools") for name in names)


# --------------------------------------------------------------------------- sifm_min.immunize is a file and a function

ORDERS = {
    "attribute": "import sifm_min",
    "file imported first": "import sifm_min.immunize",
    "from the package": "import sifm_min\nfrom sifm_min import immunize\nassert immunize is sifm_min.immunize",
    "from the file": "from sifm_min.immunize import immunize, METHODS\nimport sifm_min",
    "under another name": "import sifm_min.immunize as m\nimport sifm_min\nassert m is sifm_min.immunize and m.main",
    "called, then imported": "import sifm_min\ncallable(sifm_min.immunize)\nimport sifm_min.immunize",
    "methods first": "import sifm_min\nlist(sifm_min.METHODS)",
    "reloaded": "import importlib, sifm_min.immunize\nimportlib.reload(sifm_min.immunize)",
    "package reloaded": "import importlib, sifm_min.immunize\nimportlib.reload(sifm_min)",
}
IT_IS_BOTH = """
import inspect, sys, types, unittest.mock
assert isinstance(sifm_min.immunize, types.ModuleType) and sifm_min.immunize.main
assert sifm_min.immunize is sys.modules["sifm_min.immunize"]
assert list(inspect.signature(sifm_min.immunize).parameters)[:3] == ["image", "editor", "prompts"]
try:
    sifm_min.immunize()
except TypeError as error:
    assert str(error).startswith("immunize() missing 2 required"), error
with unittest.mock.patch("sifm_min.immunize", return_value=7):
    assert sifm_min.immunize() == 7
assert callable(sifm_min.immunize)
assert "torch" not in sys.modules
"""


@pytest.mark.slow
@pytest.mark.parametrize("imports", ORDERS.values(), ids=ORDERS)
def test_immunize_is_module_and_function_in_any_import_order(imports):
    done = python(sys.executable, f"{imports}\n{IT_IS_BOTH}", ROOT)
    assert not done.returncode, done.stderr
