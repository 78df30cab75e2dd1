"""Prefetch the weights of the next parts of a network from the disk while one part computes.

The computation waits for each page of a mapped file when it first reads it. A thread here requests the pages earlier, into the
system's page cache, which takes no memory of this process. On systems without `posix_fadvise` nothing is prefetched.
"""

import contextlib
import json
import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from functools import cache

WINDOW = 256 << 20                                  # bytes to prefetch beyond the tensor that was read last
PIECE = 1 << 20                                     # bytes per request: a system may shorten longer requests
_beginnings = deque()                               # the `ReadAhead`s that start when any network first runs


def spans(file):
    """{tensor name: (first byte, end)} of a safetensors file; {} where it cannot be read any more."""
    with contextlib.suppress(OSError, ValueError), open(file, "rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        table = json.loads(opened.read(length))
        return {name: tuple(8 + length + end for end in entry["data_offsets"])
                for name, entry in table.items() if name != "__metadata__"}
    return {}


class ReadAhead:
    """Prefetching for one network, whose tensors are read in a known order.

    wanted: (name in the network, file, first byte, end) of each tensor, in that order.
    """

    def __init__(self, wanted):
        self.wanted = list(wanted)
        self.places = {name: i for i, (name, *_) in enumerate(self.wanted)}
        self.requested = 0                          # the number of tensors requested so far

    def begin(self):
        """Queue a prefetch of the first tensors; it starts when a network first runs, so that loading does not wait for it."""
        _beginnings.append(self)

    def reached(self, names):
        """After the tensors of these names were read: prefetch the next ones, and start all queued prefetches."""
        self._fetch(max((self.places[name] + 1 for name in names if name in self.places), default=0))
        while _beginnings:
            _beginnings.popleft()._fetch(0)

    def _fetch(self, place):
        """Request the next tensors that were not requested before, from that place on: at most `WINDOW` bytes."""
        start = end = max(self.requested, place)
        size = sum(last - first for _, _, first, last in self.wanted[place:end])
        while end < len(self.wanted) and (size := size + self.wanted[end][3] - self.wanted[end][2]) <= WINDOW:
            end += 1
        if end > start and hasattr(os, "posix_fadvise"):
            self.requested = end
            _thread().submit(_fetch, [one[1:] for one in self.wanted[start:end]])


def _fetch(places):
    for file, first, end in places:
        with contextlib.suppress(OSError), open(file, "rb") as opened:          # the reader of the file reports the error
            for start in range(first, end, PIECE):
                os.posix_fadvise(opened.fileno(), start, min(PIECE, end - start), os.POSIX_FADV_WILLNEED)


@cache
def _thread():
    return ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
