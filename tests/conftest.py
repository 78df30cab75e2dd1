"""Fixtures for all tests."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference data beside the repository; tests that need it are skipped where it is absent."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip(f"the reference data is not here: {folder}")
    return folder


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    """The folder of an editor with random weights that takes milliseconds: see tiny_editor.py."""
    import tiny_editor
    return tiny_editor.write(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def tiny(tiny_folder):
    """The editor of tiny_folder, loaded once for the tests of a file."""
    import sifm_min
    return sifm_min.load_editor(tiny_folder, device="cpu")


@pytest.fixture
def loaded_once(tiny, tiny_folder, tmp_path, monkeypatch) -> Path:
    """tmp_path as the working folder, where the commands get `tiny` for --editor "tiny" and for tiny_folder."""
    from sifm_min import editors
    load, names = editors.load_editor, ("tiny", str(tiny_folder))
    monkeypatch.setattr(editors, "load_editor",
                        lambda source, **options: tiny if source in names else load(source, **options))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def forked():
    """Run Python commands in processes of their own that have torch already: see forked_python.py."""
    from forked_python import ForkedPython
    with ForkedPython() as python:
        yield python


@pytest.fixture
def in_process(capfd):
    """Run the main function of a command in this process: (exit code, stdout, stderr)."""
    def call(main, *argv):
        code = main([str(word) for word in argv])
        return code, *capfd.readouterr()
    return call
