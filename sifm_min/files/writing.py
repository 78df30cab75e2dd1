"""Write files whole or not at all.

The content goes to a hidden file beside the target, reaches the disk, and then takes the target's name. A reader sees the
old file or the new one, never a part. After a kill -9 a hidden `.*.part` may stay; it is safe to delete.
"""

import contextlib
import os
import secrets
import tempfile
from pathlib import Path


def make_folder(path):
    """Make a folder for results and try to write to it. An error here costs nothing; after the work it costs minutes."""
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"{path} is a file; results need a folder")
    path.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def write(path, content, *, overwrite=False, check=None):
    """Write bytes or text (UTF-8) to a file, whole or not at all.

    check: a function of the hidden file's path. It runs after the content was written and before the file gets its name;
    if it raises, nothing is written. Its result is returned. Raises FileExistsError where the file exists and `overwrite`
    is not set, and OSError that names `path` (disk full, folder gone, read-only), with nothing left behind.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists; --overwrite replaces it")
    with _part(path) as part:
        with part.open("xb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        result = check(part) if check else None
        part.replace(path)
    return result


@contextlib.contextmanager
def _part(path):
    """Yield a new file name beside `path` and remove that file at the end, unless it was renamed. Errors name `path`."""
    part = path.with_name(f".{secrets.token_hex(8)}.part")
    try:
        yield part
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink()
