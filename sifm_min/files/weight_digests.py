"""SHA-256 of large files, kept beside the results of a run: gigabytes of weights are hashed once.

The first process that needs a digest computes it; others (torchrun starts one for each GPU) wait for it and read it, and so do
later runs into the same folder. A file that was changed has another size or time, and is hashed anew.
"""

import json
import os
from pathlib import Path

from ..models.checkpoints import sha256
from . import writing

try:
    import fcntl
except ImportError:                                          # Windows: each process hashes for itself
    fcntl = None

NAME = ".weights.json"
LARGE = 64 << 20                                             # smaller files take less than a second


def hash_weights(editor, folder):
    """Compute the hashes of an editor's weights, which its `provenance` states; `folder` keeps those of large files."""
    checkpoint = getattr(editor, "checkpoint", None)
    if checkpoint:
        checkpoint.hashes(Digests(folder))


class Digests:
    """A function file -> SHA-256 that keeps the digests of large files in a folder."""

    def __init__(self, folder):
        self.path = Path(folder) / NAME

    def __call__(self, file):
        status = os.stat(file)
        if status.st_size < LARGE:
            return sha256(file)
        writing.make_folder(self.path.parent)
        try:
            return self._kept(file, os.path.realpath(file), [status.st_size, status.st_mtime_ns])
        except OSError:                                      # no lock here, or a file of another user: it only saves time
            return sha256(file)

    def _kept(self, file, name, state):
        with self.path.open("a+", encoding="utf-8") as kept:
            if fcntl:
                fcntl.flock(kept, fcntl.LOCK_EX)             # released when the file is closed
            known = self._read(kept)
            entry = known.get(name)
            if not isinstance(entry, dict) or entry.get("state") != state:
                entry = known[name] = {"state": state, "sha256": sha256(file)}
                kept.seek(0)
                kept.truncate()
                json.dump(known, kept)
            return entry["sha256"]

    @staticmethod
    def _read(kept):
        kept.seek(0)
        try:
            found = json.load(kept)
        except ValueError:                                   # new, or written in part by a killed run
            return {}
        return found if isinstance(found, dict) else {}
