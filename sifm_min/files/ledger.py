"""The journal: a file that only grows, one JSON object a line. Each line is on the disk before the next step.

    with Ledger("DIR/ledger.jsonl") as ledger:               # one writer at a time; a second one gets Busy
        ledger.rows                                          # the rows of earlier runs
        ledger.append({"key": ..., "status": "ok"})          # returns when the row is on the disk

The next opening removes a line that a kill or a full disk cut off; `repaired` has its bytes. Damage elsewhere is an error,
because the file is evidence.
"""

import contextlib
import errno
import json
import os
import threading
from pathlib import Path

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)    # of network file systems without a lock service


class Busy(ValueError):
    """Another run writes into this ledger."""


class Ledger:
    """A ledger open for writing, as a context. Its lock belongs to the system and ends with the process."""

    def __init__(self, path):
        self.path, self.rows, self.repaired = Path(path), [], 0
        self._file = self._lock = None
        self._writing = threading.Lock()

    def __enter__(self):
        self._lock = _locked(self.path.with_name(f".{self.path.name}.lock"), self.path)
        try:
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0), 0o666)
            _sync_folder(self.path.parent)
            self.rows, whole = _read(self.path)
            self.repaired = max(0, os.fstat(self._file).st_size - whole)
            if self.repaired:
                os.ftruncate(self._file, whole)
            elif os.fstat(self._file).st_size < whole:       # only the end of the last line was cut off
                os.write(self._file, b"\n")
            os.fsync(self._file)
        except (OSError, ValueError):
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        with self._writing:                                  # a row of another thread is written whole
            for file in (self._file, self._lock):
                if file is not None:
                    os.close(file)
            self._file = self._lock = None

    def append(self, row):
        """Write a JSON-ready dict and wait for the disk; raises OSError, and then no part of it is written.

        Safe to call from several threads. After the context has ended it raises OSError.
        """
        line = json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        with self._writing:
            if self._file is None:
                raise OSError(errno.EBADF, "the journal is closed", str(self.path))
            whole = os.fstat(self._file).st_size
            try:
                while line:
                    line = line[os.write(self._file, line):]
                os.fsync(self._file)
            except OSError as error:
                with contextlib.suppress(OSError):           # else the next row would follow half of this one
                    os.ftruncate(self._file, whole)
                raise OSError(error.errno, error.strerror, str(self.path)) from error
            self.rows.append(row)


def read_rows(path):
    """The rows of a ledger, all whole lines; another process may be writing it. Raises ValueError, OSError."""
    return _read(Path(path))[0]


def _read(path):
    """(rows, their bytes with line ends). The rest of the file is a line that was cut off."""
    rows, whole, lines = [], 0, path.read_bytes().split(b"\n")
    if not lines[-1]:
        lines.pop()
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line.decode())
            if not isinstance(row, dict):
                raise ValueError
        except ValueError:                                   # also UnicodeDecodeError
            if number == len(lines):                         # a system that crashed may also leave zeros and a line end
                break
            raise ValueError(f"{path}, line {number}: is damaged; it is evidence and cache, so restore the file from a copy, "
                             "or remove that line if its verdict may be asked for again") from None
        rows.append(row)
        whole += len(line) + 1
    return rows, whole


def _locked(path, shown):
    """An open lock file that no other process holds. It has this process's number in it."""
    file, holder = os.open(path, os.O_RDWR | os.O_CREAT, 0o666), ""
    try:
        _lock(file)
    except OSError as error:
        if error.errno in NO_LOCKS:
            os.close(file)
            raise ValueError(f"{shown}: this file system has no locks ({error.strerror}); choose a folder elsewhere") from None
        with contextlib.suppress(OSError):
            holder = os.read(file, 20).decode("ascii", "replace").strip()
        os.close(file)
        raise Busy(f"{shown}: another run{f' (process {holder})' if holder else ''} writes into this folder; "
                   "wait for it, or choose another folder") from None
    with contextlib.suppress(OSError):                       # on a full disk the number is missing, and the lock holds
        os.ftruncate(file, 0)
        os.write(file, f"{os.getpid()}\n".encode())
    return file


def _lock(file):
    try:
        import fcntl
    except ImportError:                                      # Windows
        import msvcrt
        os.lseek(file, 2**30, os.SEEK_SET)                   # beyond the number, which others shall read
        msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
        os.lseek(file, 0, os.SEEK_SET)
        return
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _sync_folder(path):
    """Write the folder to the disk, and with it the name of a new file. Windows has no such call."""
    with contextlib.suppress(OSError):
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
