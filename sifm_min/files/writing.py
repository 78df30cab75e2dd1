"""Write files whole or not at all.

The content goes to a hidden file beside the target, reaches the disk, and then takes the target's name. A reader sees the
old file or the new one, never a part. After a kill -9 a hidden `.*.part` may stay; `make_folder` of the next run removes it.
"""

import contextlib
import os
import secrets
import tempfile
import time
from pathlib import Path

try:
    import fcntl
except ImportError:                                          # Windows
    fcntl = None


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
    for part in path.glob(".*.part"):
        _remove_if_abandoned(part)


def _remove_if_abandoned(part):
    """Remove the file of a killed run. A run that is alive holds its lock; where there are no locks, an hour must pass."""
    with contextlib.suppress(OSError):
        age = time.time() - part.stat().st_mtime
        with part.open("rb") as file:
            if _lock(file) if fcntl else age > 3600:
                part.unlink()


def _lock(file):
    """Lock an open file for this process; False where another process holds it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


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
        with part.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        result = check(part) if check else None
        part.replace(path)
    return result


@contextlib.contextmanager
def _part(path):
    """Yield a new file beside `path`, locked, and remove it at the end, unless it was renamed. Errors name `path`."""
    part = path.with_name(f".{secrets.token_hex(8)}.part")
    try:
        with contextlib.ExitStack() as held:
            new = part.open("xb")
            if fcntl:
                _lock(held.enter_context(new))
            else:
                new.close()                                  # Windows renames no open file
            yield part
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink()
