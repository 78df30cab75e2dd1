"""Read-ahead: while one part of a network computes, the system fetches from the disk the weights of the next parts.

A mapped file is read piece by piece, each when the computation already waits for it. A thread here requests the pieces earlier,
into the system's page cache, which takes no memory of this process. Where the system has no such call, nothing happens.
"""

import contextlib
import json
import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from functools import cache

WINDOW = 256 << 20                                  # bytes ahead of what was read last
PIECE = 1 << 20                                     # a system takes no more at once than it reads ahead by itself
_beginnings = deque()                               # what networks begin with, until one of them runs


def spans(file):
    """{tensor name: (first byte, end)} of a safetensors file that was opened before; {} where it cannot be read any more."""
    with contextlib.suppress(OSError, ValueError), open(file, "rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        table = json.loads(opened.read(length))
        return {name: tuple(8 + length + end for end in entry["data_offsets"])
                for name, entry in table.items() if name != "__metadata__"}
    return {}


class ReadAhead:
    """Follows a network that is read in a certain order.

    wanted: (name in the network, file, first byte, end) of each tensor, in that order.
    """

    def __init__(self, wanted):
        self.wanted = list(wanted)
        self.places = {name: i for i, (name, *_) in enumerate(self.wanted)}
        self.asked = 0                              # the number of tensors requested so far

    def begin(self):
        """Queue a prefetch of the first tensors; it starts when a network first runs, so that loading does not wait for it."""
        _beginnings.append(self)

    def reached(self, names):
        """After these were read: prefetch what follows, and the queued beginnings of other networks."""
        self._fetch(max((self.places[name] + 1 for name in names if name in self.places), default=0))
        while _beginnings:
            _beginnings.popleft()._fetch(0)

    def _fetch(self, place):
        """Request the tensors from that place on that were not requested yet, at most `WINDOW` bytes."""
        start = end = max(self.asked, place)
        size = sum(last - first for _, _, first, last in self.wanted[place:end])
        while end < len(self.wanted) and (size := size + self.wanted[end][3] - self.wanted[end][2]) <= WINDOW:
            end += 1
        if end > start and hasattr(os, "posix_fadvise"):
            self.asked = end
            _thread().submit(_fetch, [one[1:] for one in self.wanted[start:end]])


def _fetch(places):
    for file, first, end in places:
        with contextlib.suppress(OSError), open(file, "rb") as opened:          # the reader of the file reports the error
            for start in range(first, end, PIECE):
                os.posix_fadvise(opened.fileno(), start, min(PIECE, end - start), os.POSIX_FADV_WILLNEED)


@cache
def _thread():
    return ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
