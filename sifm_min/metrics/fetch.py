"""Fetch the backbones of LPIPS: download torchvision's classifier, check it, keep its convolutions.

A file is opened only after its SHA-256 matched the pinned one. A download that broke off is resumed. The kept file is
written whole or not at all. Every fault is one sentence, an `Unavailable`.
"""

import errno
import os
import secrets
import shutil
import time
from urllib.parse import urlsplit

import requests
from huggingface_hub import constants
from huggingface_hub.utils import WeakFileLock
from safetensors.torch import save

from ..models.checkpoints import Unavailable, Unfit, sha256
from . import backbones
from .convolutions import lpips_weights

BLOCK, TRIES, PAUSE = 1 << 20, 4, 2                          # bytes a read; requests without progress; seconds between them
TIMEOUT = 10, 30                                             # seconds: to connect, and to wait for the next byte


def backbone(network, *, file=None, on_bytes=lambda count: None):
    """Return the `LPIPSWeights` of a network: from the cache, else fetched, or from `file` without any request.

    file: torchvision's file, or the kept file of another machine. on_bytes(count) is called as bytes arrive. Raises
    `Unavailable`.
    """
    source = backbones.NETWORKS[network]
    try:
        if file is None and source.kept.is_file():
            return lpips_weights(network)
        if file is None and constants.HF_HUB_OFFLINE:
            raise Unavailable(f"{source.file} is not here, and HF_HUB_OFFLINE is set: run this once without it, or give the "
                              "file with --weights")
        source.kept.parent.mkdir(parents=True, exist_ok=True)
        if file is not None:
            _keep(source, file)
            return lpips_weights(network)
        part = source.kept.with_suffix(".pth.part")
        with WeakFileLock(source.kept.with_suffix(".lock")):             # a second run waits, and then finds the file
            if not source.kept.is_file():
                _fetch(source, part, on_bytes)
                _keep(source, part)
                part.unlink()
        return lpips_weights(network)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise Unavailable(_full(source.kept.parent)) from error
        raise Unavailable(f"{error.filename or source.kept.parent} cannot be written ({error.strerror or error}): make it "
                          "writable, or point HF_HOME to a folder that is") from error


def _fetch(source, part, on_bytes):
    """Download the whole file of `source` to `part` and check its hash."""
    have = part.stat().st_size if part.is_file() else 0
    if shutil.disk_usage(part.parent).free < source.size - have + source.kept_size:
        raise Unavailable(_full(part.parent, f", {source.title} needs {source.size / 1e6:.0f} MB for a while"))
    on_bytes(have)
    tries = TRIES
    while True:
        before = part.stat().st_size if part.is_file() else 0
        try:
            if (source.exact and before == source.size) or _more(source, part, before, on_bytes):
                break
            reason = "the connection was cut"
        except requests.RequestException as error:
            reason = f"{type(error).__name__} {error}".splitlines()[0].split(". ")[0][:200]
        have = part.stat().st_size if part.is_file() else 0
        tries = TRIES if have > before else tries - 1
        if not tries:
            raise Unavailable(f"{source.url} cannot be fetched ({reason}): check the connection and the proxy and run this "
                              f"again, the {have} bytes that came are kept; or fetch it elsewhere and give it with --weights")
        time.sleep(PAUSE)
    if (digest := sha256(part)) != source.sha256:
        part.unlink()
        raise Unavailable(f"{source.url} sent another file: its SHA-256 is {digest}, expected {source.sha256}; it was removed "
                          "unopened: look whether a proxy answers instead, or give the right file with --weights")


def _more(source, part, have, on_bytes):
    """Request the missing bytes of `part` once; return True if the file is complete."""
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    with requests.get(source.url, headers=headers, stream=True, timeout=TIMEOUT) as answer:
        goes_on = answer.status_code == 206 and answer.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        if have and answer.status_code in (206, 416) and not goes_on:
            part.unlink()                                    # complete already, or another file: start again
            on_bytes(-have)
            return False
        if answer.status_code != 200 and not goes_on:
            raise Unavailable(f"{urlsplit(answer.url).netloc} answered {answer.status_code} for {source.url}: try again "
                              "later, or fetch it elsewhere and give it with --weights")
        have = have if goes_on else 0
        length = answer.headers.get("Content-Length", "")
        total = have + int(length) if length.isdecimal() else None
        limit = source.size if source.exact else 2 * source.size
        if total is not None and (total > limit or (source.exact and total < limit)):
            raise Unavailable(f"{source.url} is {total} bytes there, and {source.size} are expected: it is not the pinned "
                              "file; look whether a proxy answers instead, or give the right file with --weights")
        with part.open("ab" if goes_on else "wb") as file:
            for block in answer.iter_content(BLOCK):
                file.write(block)
                on_bytes(len(block))
                have += len(block)
                if have > limit:
                    raise Unavailable(f"{source.url} sends more than the {source.size} bytes that are expected: it is not "
                                      "the pinned file; give the right file with --weights")
    return have == total if total is not None else have >= (limit if source.exact else 1)


def _keep(source, file):
    """Write the convolutions of torchvision's file, or of a kept file, to the cache as safetensors."""
    weights = lpips_weights(source.name, file)
    if not weights.pinned:
        raise Unfit(f"{file} is not known to hold {source.file}, so it is not kept as that; compare --weights takes it")
    about = {"format": "pt", "source": source.url, "source_sha256": source.sha256, "sha256": weights.sha256,
             "licence": backbones.LICENCE}
    written = source.kept.with_name(f".{secrets.token_hex(8)}.part")
    try:
        with written.open("xb") as opened:
            opened.write(save({name: weights.tensors[name] for name in source.shapes}, about))
            opened.flush()
            os.fsync(opened.fileno())
        written.replace(source.kept)
    finally:
        written.unlink(missing_ok=True)


def _full(folder, why=""):
    return f"the disk of {folder} is full{why}: make room, or point HF_HOME to another disk; what was fetched is kept"
