"""The hub: chosen files of a repository in the standard cache (`HF_HOME`), and each of its faults as one sentence.

Files that are complete in the cache are used without a request. The meaning of the files is not known here.
"""

import errno
import re
import shutil
from pathlib import Path

from huggingface_hub import HfApi, constants, get_token, hf_hub_download
from huggingface_hub.utils import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

MAIN = "model_index.json"                           # the one file that every published pipeline has


class Unavailable(RuntimeError):
    """Weights cannot be had or used; the message is one sentence that says what is wrong and what to do."""


def cache():
    """The folder of the cache."""
    return constants.HF_HUB_CACHE


def is_offline():
    """True if `HF_HUB_OFFLINE` forbids requests."""
    return constants.HF_HUB_OFFLINE


def snapshot(hub_id, revision, main=MAIN):
    """The folder in the cache that holds a repository at this revision, or None; no request is made.

    main: the file without which the repository does not count as held.

    A cache that was filled by hand may have a newline after the commit in refs/main. A cache without refs does not say which
    snapshot is `main`: see `absence`.
    """
    place = _place(hub_id)
    try:
        ref, commit = place / "refs" / revision, revision
        if ref.is_file():
            commit = ref.read_text(encoding="utf-8", errors="replace").strip()
        folder = place / "snapshots" / commit
        return folder if re.fullmatch(r"[\w.-]+", commit) and (folder / main).is_file() else None
    except OSError as error:
        raise Unavailable(f"{hub_id} in the cache {cache()} cannot be read: {error.strerror}") from None


def snapshots(hub_id):
    """The revisions of a repository that the cache holds, as its folders are called."""
    place = _place(hub_id) / "snapshots"
    return sorted(folder.name for folder in place.iterdir() if folder.is_dir()) if place.is_dir() else []


def absence(hub_id, revision, main=MAIN):
    """A sentence that says why `snapshot` found nothing, and what the cache holds instead."""
    held, ref = snapshots(hub_id), _place(hub_id) / "refs" / revision
    if not held:
        return f"{hub_id} is not in the cache {cache()}"
    commit = ref.read_text(encoding="utf-8", errors="replace").strip() if ref.is_file() else revision
    if commit in held:
        return f"{hub_id} is not complete in the cache {cache()} ({main} is not in its snapshots/{commit})"
    wanted = f"revision {revision}" + (f", which its refs/{revision} says is {commit[:40]!r}" if ref.is_file() else "")
    return (f"{hub_id} is in the cache {cache()}, but not at {wanted}; its snapshots/ has {' and '.join(held[:3])}, which "
            f"--revision {held[0]} would use")


def _place(hub_id):
    return Path(cache()) / f"models--{hub_id.replace('/', '--')}"


def fetch(hub_id, revision, choose, last, main=MAIN):
    """Fetch the missing files of a repository into the cache; return its snapshot folder.

    choose(names, read) returns the files to fetch, out of the names in the repository; read(name) fetches one and returns its
    path. The files for which last(name) is true come last. There is one listing, then one download per file. Complete files
    are never fetched again; huggingface_hub resumes a broken download. main: a file that the right repository has.
    """
    def listed(revision):
        timeout = constants.HF_HUB_ETAG_TIMEOUT
        found = HfApi().model_info(hub_id, revision=revision, files_metadata=True, timeout=timeout)
        return found.sha, {file.rfilename: file.size or 0 for file in found.siblings}

    def get(name, revision):
        return Path(hf_hub_download(hub_id, name, revision=revision))

    try:
        commit, sizes = listed(revision)            # first: it fails at once, while a download retries for long
        if main not in sizes:
            kind = "a pipeline in the diffusers layout; give one that is" if main == MAIN else "laid out as expected"
            raise Unavailable(f"{hub_id} has no {main}: it is not {kind}")
        folder = get(main, revision).parent         # also writes the branch's commit into the cache
        if folder.name != commit:                   # the branch moved between the two requests
            commit, sizes = listed(folder.name)
        files = choose(sizes.keys(), lambda name: get(name, commit))
        size = sum(sizes[file] for file in files if not (folder / file).exists())
        if (free := shutil.disk_usage(folder).free) < size:
            raise Unavailable(f"{hub_id} takes {size / 1e9:.1f} GB more, and {cache()} has {free / 1e9:.1f} GB left; "
                              "make room, or point HF_HOME to another disk")
        for file in sorted(files, key=last):
            get(file, commit)
    except Unavailable:
        raise
    except FAULTS as error:
        raise Unavailable(_explained(error, hub_id, revision)) from error
    return folder


# The HTTP library under huggingface_hub differs by version, so its errors are caught by the base class of the hub's own.
# ValueError, KeyError, TypeError: the answer is not the hub's (a login page). RuntimeError: from hf_xet, a downloader.
FAULTS = (*HfHubHTTPError.__bases__, EntryNotFoundError, OSError, ValueError, KeyError, TypeError, RuntimeError)


def _explained(error, hub_id, revision):
    """A fault of the hub, the network or the disk as one sentence that says what to do."""
    if isinstance(error, LocalEntryNotFoundError) and error.__cause__:
        error = error.__cause__                     # the reason, where the error only says "not in the cache"
    hub, kept = constants.ENDPOINT, "what is complete is kept"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, GatedRepoError):
        token = "the token in use has no access" if get_token() else "no token is set"
        return (f"{hub_id} is gated and {token}: accept its licence at {hub}/{hub_id}, set HF_TOKEN to a token of that "
                "account, and run this again")
    if isinstance(error, RevisionNotFoundError):
        return f"{hub_id} has no revision {revision}: see {hub}/{hub_id}/commits/main, or leave the revision out"
    if isinstance(error, RepositoryNotFoundError):
        return (f"{hub} has no repository {hub_id} that this account may see: check the name (there is no folder of "
                "that name either), or set HF_TOKEN to a token that may read it")
    if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
        return f"{hub_id} lists a file that it does not hand out: give another revision, or try again later"
    if status in (401, 403):
        remedy = "the token in use: set HF_TOKEN to one that may read it" if get_token() else "access: set HF_TOKEN"
        return f"{hub} refuses for {hub_id} {remedy}, and see {hub}/{hub_id}"
    if status is not None:
        return f"{hub} answered {status} for {hub_id}: try again later; {kept}"
    if isinstance(error, OfflineModeIsEnabled):
        return f"{hub_id} is not complete in the cache, and HF_HUB_OFFLINE is set: run this once without it"
    code = error.errno if isinstance(error, OSError) else None
    if code in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk of {cache()} is full: make room, or point HF_HOME to another disk; {kept}"
    if code is not None and not isinstance(error, ConnectionError):
        return (f"{error.filename or cache()} cannot be written ({error.strerror}): make it writable, or point HF_HOME "
                "to a folder that is")
    reason = f"{type(error).__name__} {error}".strip().splitlines()[0].split(". ")[0][:200]
    return (f"{hub_id} cannot be fetched from {hub} ({reason}): check the connection and the proxy and run this again, "
            f"{kept}; or give a folder that has the files")
