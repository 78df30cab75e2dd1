"""Files are written whole or not at all, and errors name them."""

import errno
import os

import pytest

from sifm_min.files import writing


def test_write_whole_files(tmp_path):
    writing.write(tmp_path / "a.txt", "caf\u00e9\n")
    writing.write(tmp_path / "a.bin", b"\0\1")
    assert (tmp_path / "a.txt").read_bytes() == b"caf\xc3\xa9\n" and (tmp_path / "a.bin").read_bytes() == b"\0\1"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.bin", "a.txt"]
    before = os.umask(0)
    os.umask(before)
    assert (tmp_path / "a.txt").stat().st_mode & 0o777 == 0o666 & ~before    # not the 0600 of a temporary file


def test_files_are_overwritten_on_request_only(tmp_path):
    target = tmp_path / "a.txt"
    writing.write(target, "old")
    with pytest.raises(FileExistsError, match="a.txt exists; --overwrite replaces it"):
        writing.write(target, "new")
    assert target.read_text() == "old"
    writing.write(target, "new", overwrite=True)
    assert target.read_text() == "new"


@pytest.mark.parametrize("stage", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, stage, error):
    target = tmp_path / "a.txt"
    writing.write(target, "old")

    def failing(*args, **options):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(*((os, "fsync") if stage == "fsync" else (type(target), "replace")), failing)
        with pytest.raises(type(error)) as raised:
            writing.write(target, "new", overwrite=True)
    if isinstance(error, OSError):
        assert raised.value.errno == errno.ENOSPC and raised.value.filename == str(target)
    assert target.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_an_oserror_names_the_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "gone" / "a.txt", tmp_path / "file" / "a.txt"):
        with pytest.raises(OSError) as raised:
            writing.write(path, "new")
        assert raised.value.filename == str(path)


def test_make_folder(tmp_path, monkeypatch):
    writing.make_folder(tmp_path / "a" / "b")
    writing.make_folder(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="file is a file; results need a folder"):
        writing.make_folder(tmp_path / "file")

    def failing(*args, **options):
        raise OSError(errno.EROFS, "Read-only file system", "/somewhere/tmpx3")

    monkeypatch.setattr("tempfile.TemporaryFile", failing)
    with pytest.raises(OSError) as raised:
        writing.make_folder(tmp_path / "a")
    assert (raised.value.errno, raised.value.filename) == (errno.EROFS, str(tmp_path / "a"))
