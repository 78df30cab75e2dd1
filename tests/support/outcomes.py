"""The results of a command: the files of a folder, and the printed text."""

from pathlib import Path


def files(folder="out"):
    """{name: bytes} of a folder, in the order of the names; {} where there is none."""
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())} if Path(folder).exists() else {}


def told(capsys):
    """The one sentence on stderr; nothing was said on stdout."""
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.endswith("\n") and "Traceback" not in err, (out, err)
    return err
