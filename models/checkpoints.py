"""Checkpoints: find the files of an editor (shipped, a folder, or the hub) and load their tensors exactly.

Reads the published (diffusers) layout: one folder per component, each network with a `config.json` and safetensors in
one file or in shards with an index. Pickles are never opened. From the hub come only the files that are needed, at one
revision, into the standard cache (`HF_HOME`); what is complete there is used without a request. Loading is all or
nothing: every tensor's name and shape is compared before the first one is read.

`EDITORS` is the table of the editors known by name.
"""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path, PurePosixPath

from huggingface_hub import HfApi, constants, get_token, hf_hub_download, try_to_load_from_cache
from huggingface_hub.utils import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError, safe_open


class Unavailable(RuntimeError):
    """Weights cannot be had or used; the message is one sentence that says what is wrong and what to do."""


class Unfit(Unavailable, ValueError):
    """The files are there, and are not what the network needs: damaged, of another network, or unsafe to read."""


# ------------------------------------------------------------------------------------------------------ known editors

INSTRUCT_PIX2PIX = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where an editor known by name comes from: `folder` is set for a shipped one, `hub_id` for the others."""

    name: str
    licence: str
    components: tuple[str, ...] = INSTRUCT_PIX2PIX
    folder: Path | None = None
    hub_id: str | None = None
    revision: str | None = None                     # a commit; None: `main` is resolved once and then kept
    gated: bool = False                             # the hub hands it out only to accounts that accepted the licence
    size: int | None = None                         # bytes to fetch, to two digits; None: the files say
    files: Mapping[str, str] = field(default_factory=dict)      # weight file -> its published SHA-256


_HERE = Path(__file__).resolve().parent

EDITORS: dict[str, Source] = {source.name: source for source in (
    Source(name="miniature", licence="Apache-2.0", folder=_HERE / "miniature"),
    Source(name="miniature-plain", licence="Apache-2.0", folder=_HERE / "miniature-plain"),
    Source(
        name="instruct-pix2pix",
        licence="MIT; derived from Stable Diffusion 1.5 (CreativeML OpenRAIL-M)",
        hub_id="timbrooks/instruct-pix2pix",
        revision="31519b5cb02a7fd89b906d88731cd4d6a7bbf88d",
        size=2_100_000_000,
        files={
            "unet/diffusion_pytorch_model.fp16.safetensors":
                "0d6bbc0a95dd125196d327a660b43d24c56f433eb30d2776f1327fb86bd38f78",
            "vae/diffusion_pytorch_model.fp16.safetensors":
                "4fbcf0ebe55a0984f5a5e00d8c4521d52359af7229bb4d81890039d2aa16dd7c",
            "text_encoder/model.fp16.safetensors":
                "77795e2023adcf39bc29a884661950380bd093cf0750a966d473d1718dc9ef4e",
        },
    ),
    Source(
        name="hq-edit",
        licence="CC BY-NC 4.0 (non-commercial)",
        hub_id="MudeHui/HQ-Edit",
        size=4_300_000_000,                         # expected: float32 files only, of the shapes of instruct-pix2pix
    ),
)}

# ------------------------------------------------------------------------------------------------- what a layout needs

BASES = ("diffusion_pytorch_model", "model")                    # as diffusers and as transformers name their weights
WEIGHTS = tuple(                                                # best first: half the bytes, then one file, then shards
    base + end
    for ends in ((".fp16.safetensors", ".safetensors.index.fp16.json"), (".safetensors", ".safetensors.index.json"))
    for base in BASES
    for end in ends
)
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".msgpack", ".h5")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
REVISION = re.compile(r"(?!.*\.\.)[A-Za-z0-9][\w./-]*")
MAIN = "model_index.json"                                       # the one file that every published pipeline has


def needed(names, component, read, where):
    """The files of one component, in the order in which they are to be fetched, chosen from `names`.

    names: what exists, as paths relative to the checkpoint; read: such a path -> its text (an index of shards is read);
    where: the checkpoint in words, for errors. What must be there comes last, weights after everything: so a download
    that stopped anywhere is seen to be incomplete by its last file alone.
    """
    here = f"{component}/"
    if component.startswith("tokenizer"):
        extra = [f for f in (here + "tokenizer_config.json", here + "special_tokens_map.json") if f in names]
        for group in ([here + "vocab.json", here + "merges.txt"], [here + "tokenizer.json"]):
            if names >= set(group):
                return extra + group
        raise Unavailable(f"{where} has no tokenizer: {here} needs vocab.json and merges.txt, or tokenizer.json")
    if component == "scheduler":
        if here + "scheduler_config.json" in names:
            return [here + "scheduler_config.json"]
        raise Unavailable(f"{where} has no {here}scheduler_config.json; a folder written by save_pretrained has one")
    if here + "config.json" not in names:
        raise Unavailable(f"{where} has no {here}config.json; expected is the layout that diffusers' save_pretrained "
                          "writes, with a folder per network")
    found = next((here + name for name in WEIGHTS if here + name in names), None)
    if found is None:
        if pickle := next((name for name in sorted(names) if name.startswith(here) and name.endswith(PICKLES)), None):
            raise Unfit(
                f"{where} has its {component} only as a pickle ({pickle}), which could run code on being opened and is "
                "refused; if you trust it, convert it where diffusers is installed: python -c \"from diffusers import "
                f"DiffusionPipeline as P; P.from_pretrained('{where}').save_pretrained('converted')\"")
        raise Unavailable(f"{where} has no weights in {here}: expected is {WEIGHTS[0]}, {BASES[0]}.safetensors, "
                          f"{BASES[1]}.safetensors, or shards with an index")
    if not found.endswith(".json"):
        return [here + "config.json", found]
    shards = _shards(read(found), f"{where}/{found}")
    if absent := [shard for shard in shards if here + shard not in names]:
        raise Unavailable(f"{where}/{found} lists the shard {absent[0]}, which is not there; fetch it again")
    return [here + "config.json", found, *(here + shard for shard in shards)]


def is_weights(file):
    return file.endswith(".safetensors")


def _shards(text, where):
    """The file names in an index, sorted. They lie beside the index: anything that looks like a path is refused."""
    table = _json(text, where).get("weight_map")
    if not isinstance(table, dict) or not table or not all(isinstance(shard, str) for shard in table.values()):
        raise Unfit(f"{where} is not an index of shards: it has no weight_map from tensor names to file names")
    for shard in table.values():
        if re.fullmatch(r"[\w][\w.-]*\.safetensors", shard) is None:
            raise Unfit(f"{where} points to {shard!r}; a shard is a safetensors file beside its index")
    return sorted(set(table.values()))


def _json(text, where):
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Unfit(f"{where} is not valid JSON ({error}); fetch it again") from None
    if not isinstance(found, dict):
        raise Unfit(f"{where} holds a JSON {type(found).__name__}, expected is an object")
    return found


def _in_folder(folder, components, where):
    """The files that `components` need of a folder on this disk."""
    files = []
    for component in components:
        try:                                        # a dangling link does not exist: its blob left the cache
            names = {f"{component}/{path.name}" for path in (folder / component).iterdir() if path.exists()}
        except FileNotFoundError:
            names = set()
        except OSError as error:
            raise Unavailable(f"{folder / component} cannot be read: {error.strerror}") from None
        files += needed(names, component, lambda name: _read(folder / name), where)
    return files


def _read(path):
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise Unavailable(f"{path} is missing") from None
    except IsADirectoryError:
        raise Unavailable(f"{path} is a folder where a file is expected") from None
    except OSError as error:
        raise Unavailable(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise Unfit(f"{path} is not text in UTF-8; fetch it again") from None


# --------------------------------------------------------------------------------------------------------- finding it


def find(source):
    """The `Source` of a name in `EDITORS`, a folder, or a hub id `owner/name`; ValueError if it is none of these."""
    name = os.fspath(source)
    if name in EDITORS:
        return EDITORS[name]
    folder = Path(os.path.expanduser(name))
    if name and folder.is_dir():
        return Source(name=name, licence="not stated", folder=folder)
    if name and folder.exists():
        raise ValueError(f"{name} is a file; give the folder that holds unet/, vae/ and the other components")
    if HUB_ID.fullmatch(name) is None:
        raise ValueError(f"{name!r} is neither a known editor ({', '.join(EDITORS)}), nor a folder that exists, nor a "
                         "hub id (owner/name)")
    known = next((editor for editor in EDITORS.values() if editor.hub_id == name), None)        # with its pin
    return known or Source(name=name, licence="the one on its card", hub_id=name)


def open_checkpoint(source, components, *, revision=None, offline=None):
    """The `Checkpoint` of `source` (see `find`), with the files of `components` at hand, fetched if need be.

    components: folder names such as "unet", "vae", "text_encoder", "tokenizer", "scheduler"; revision: commit, tag or
    branch of a hub id (default: the pinned commit, else `main`, resolved at the first download and then kept); offline:
    True makes no request (default: `HF_HUB_OFFLINE`). Raises `Unavailable`, and ValueError for a senseless argument.
    """
    found = find(source)
    if found.folder:
        if revision is not None:
            raise ValueError(f"revision {revision} is for a hub id; {found.name} is a folder, which has only one")
        if not found.folder.is_dir():
            raise Unavailable(f"the shipped editor {found.name} lacks its weights in {found.folder}; install sifm_min "
                              "again, or make them with tools/train_miniature.py")
        return Checkpoint(found.folder, str(found.folder), None, _in_folder(found.folder, components, found.folder))
    if revision is not None and REVISION.fullmatch(revision) is None:
        raise ValueError(f"revision {revision!r} is not a commit, tag or branch")
    hub_id, command = found.hub_id, f"download {found.name}{f' --revision {revision}' if revision else ''}"
    revision = revision or found.revision or "main"
    folder, missing = cached(hub_id, revision, components)
    if missing and (constants.HF_HUB_OFFLINE if offline is None else offline):
        raise Unavailable(f"{missing}, and offline nothing is fetched: run `python -m sifm_min.weights {command}` once "
                          "while online, without HF_HUB_OFFLINE")
    if missing:
        folder = _fetch(hub_id, revision, components)
    return Checkpoint(folder, hub_id, folder.name, _in_folder(folder, components, hub_id))


def cached(hub_id, revision, components):
    """(snapshot folder in the cache or None, why it is not complete or None), without any request."""
    try:
        found = try_to_load_from_cache(hub_id, MAIN, revision=revision or "main")
    except OSError as error:
        return None, Unavailable(f"{hub_id} in the cache {constants.HF_HUB_CACHE} cannot be read: {error.strerror}")
    if not isinstance(found, str):                  # None, or a mark that says that the repository has no such file
        return None, Unavailable(f"{hub_id} is not in the cache {constants.HF_HUB_CACHE}")
    folder = Path(found).parent
    try:
        _in_folder(folder, components, hub_id)
    except Unavailable as missing:
        return folder, Unavailable(f"{hub_id} is not complete in the cache {constants.HF_HUB_CACHE} ({missing})")
    return folder, None


def _fetch(hub_id, revision, components):
    """Fetch what is missing of a hub repository into the standard cache; its snapshot folder.

    One listing, then file by file. Files that are complete are never fetched again; a connection that breaks is taken
    up where it broke, by huggingface_hub.
    """
    def listed(revision):
        timeout = constants.HF_HUB_ETAG_TIMEOUT
        found = HfApi().model_info(hub_id, revision=revision, files_metadata=True, timeout=timeout)
        return found.sha, {file.rfilename: file.size or 0 for file in found.siblings}

    def fetch(name, revision):
        return Path(hf_hub_download(hub_id, name, revision=revision))

    try:
        commit, sizes = listed(revision)            # first, as it fails at once where a download retries for long
        if MAIN not in sizes:
            raise Unavailable(f"{hub_id} has no {MAIN}: it is not a pipeline in the diffusers layout; give one that is")
        folder = fetch(MAIN, revision).parent       # writes down, in the cache, which commit a branch stands for
        if folder.name != commit:                   # it moved between the two requests
            commit, sizes = listed(folder.name)
        files = []
        for component in components:
            files += needed(sizes.keys(), component, lambda name: _read(fetch(name, commit)), hub_id)
        size = sum(sizes[file] for file in files if not (folder / file).exists())
        if (free := shutil.disk_usage(folder).free) < size:
            raise Unavailable(f"{hub_id} takes {size / 1e9:.1f} GB more, and {constants.HF_HUB_CACHE} has "
                              f"{free / 1e9:.1f} GB left; make room, or point HF_HOME to another disk")
        for file in sorted(files, key=is_weights):  # weights last: see `needed`
            fetch(file, commit)
    except Unavailable:
        raise
    except HUB_FAULTS as error:
        raise Unavailable(_explained(error, hub_id, revision)) from error
    return folder


# The HTTP library under huggingface_hub differs by version: its errors are known by the base of the hub's own. Then
# ValueError, KeyError, TypeError: an answer that is not the hub's (a login page); RuntimeError: hf_xet, a downloader.
HUB_FAULTS = (*HfHubHTTPError.__bases__, EntryNotFoundError, OSError, ValueError, KeyError, TypeError, RuntimeError)


def _explained(error, hub_id, revision):
    """A fault of the hub, the network or the disk as one sentence that says what to do."""
    if isinstance(error, LocalEntryNotFoundError) and error.__cause__:
        error = error.__cause__                     # "not in the cache", which is only why the real one was raised
    hub, cache, kept = constants.ENDPOINT, constants.HF_HUB_CACHE, "what is complete is kept"
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
        return f"the disk of {cache} is full: make room, or point HF_HOME to another disk; {kept}"
    if code is not None and not isinstance(error, ConnectionError):
        return (f"{error.filename or cache} cannot be written ({error.strerror}): make it writable, or point HF_HOME "
                "to a folder that is")
    reason = f"{type(error).__name__} {error}".strip().splitlines()[0].split(". ")[0][:200]
    return (f"{hub_id} cannot be fetched from {hub} ({reason}): check the connection and the proxy and run this again, "
            f"{kept}; or give a folder that has the files")


# --------------------------------------------------------------------------------------------------------- loading it


RENEWAL = 16 << 20                                  # bytes to read before a file is mapped anew: that takes a millisecond


class Checkpoint:
    """An editor's files. `folder`: where they lie; `source`: hub id, or the folder; `revision`: commit, or None;
    `files`: those that were asked for, as paths relative to the folder."""

    def __init__(self, folder, source, revision, files):
        self.folder, self.source, self.revision, self.files = folder, source, revision, tuple(files)
        self._hashes = {}                           # weight file that `load` has read -> its SHA-256, once asked for

    def has(self, relative):
        """Whether the checkpoint holds this file; a path such as "vae/config.json"."""
        return self._path(relative).is_file()

    def text(self, relative):
        """The text of a small file."""
        return _read(self._path(relative))

    def _path(self, relative):
        path = PurePosixPath(relative)
        if path.is_absolute() or ".." in path.parts or "\\" in str(relative):
            raise ValueError(f"{relative!r} leads out of the checkpoint")
        return self.folder / path

    def load(self, network_class, component, *, device="cpu", dtype=None):
        """The network of `component` (a folder name), its config and weights read, in eval mode and frozen.

        dtype None keeps what the file has. Tensors go from the mapped file to `device` and `dtype` one at a time: the
        peak is the network plus one tensor, within `RENEWAL`. What needs no conversion stays mapped on the CPU, which
        takes no memory of its own and wants the file left alone. Raises `Unfit` with the first differences in name,
        shape or kind, before anything is read, where file and config disagree.
        """
        import torch  # not at the top: `weights list` need not wait for it

        path = self._path(f"{component}/config.json")
        text = _read(path)
        _json(text, path)
        try:
            config = network_class.Config.from_json(text)
            with torch.device("meta"):
                network = network_class(config)
        except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RuntimeError) as error:
            raise Unfit(f"{path} does not describe a {network_class.__name__}: {error}") from error
        files = [self.folder / file for file in _in_folder(self.folder, [component], self.source)
                 if is_weights(file)]
        places = _match(network, {file: header(file) for file in files}, f"{self.source}/{component}")
        shapes, state = {name: tensor.shape for name, tensor in network.state_dict().items()}, {}
        for file in files:
            mapped, read = None, 0
            for name, stored in places[file].items():
                mapped = mapped or safe_open(file, framework="pt")
                original = mapped.get_tensor(stored)
                tensor = original.to(device)        # first to the device, which converts faster than the CPU
                if dtype is not None and tensor.is_floating_point():
                    tensor = tensor.to(dtype)
                state[name] = tensor.reshape(shapes[name])
                read += original.nbytes
                if tensor is not original and read > RENEWAL:
                    mapped, read = None, 0          # copied: with the mapping go the file's pages that were read
            self._hashes.setdefault(file.relative_to(self.folder).as_posix(), None)
        network.load_state_dict(state, strict=True, assign=True)
        return network.eval().requires_grad_(False)

    def hashes(self):
        """SHA-256 of every weight file that was loaded, {relative path: hexadecimal}, computed from what is on disk."""
        for name, known in self._hashes.items():
            if known is None:
                self._hashes[name] = sha256(self.folder / name)
        return dict(sorted(self._hashes.items()))


def header(file):
    """{tensor name: (shape, dtype as the format spells it)} of a safetensors file; reads no tensor."""
    try:
        with safe_open(file, framework="pt") as opened:
            parts = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (it is no dict)
            return {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in parts.items()}
    except SafetensorError as error:
        with file.open("rb") as opened:
            start = opened.read(64).lstrip()
        if start.startswith(b"version https://git-lfs"):
            raise Unfit(f"{file} is a Git LFS pointer, not the weights; run `git lfs pull` in its folder") from None
        what = "a web page saved under this name" if start.startswith(b"<") else f"cut short or damaged ({error})"
        raise Unfit(f"{file} is {what}, not weights; fetch it again") from None
    except OSError as error:
        if file.is_dir():
            raise Unavailable(f"{file} is a folder where a file of weights is expected") from None
        raise Unavailable(f"{file} cannot be read: {error.strerror or error}") from None


def _match(network, headers, where):
    """{file: {name in the network: name in the file}}, or `Unfit` with what is missing, unexpected and wrong."""
    rename = getattr(network, "rename", None) or (lambda name: name)
    expected = network.state_dict()
    places, origin, unexpected, wrong = {file: {} for file in headers}, {}, [], []
    for file, header in headers.items():
        for stored, (shape, kind) in header.items():
            if (name := rename(stored)) is None:
                continue                            # known, and dropped on purpose
            if name not in expected:
                unexpected.append(f"unexpected {stored}")
                continue
            want, is_float = tuple(expected[name].shape), expected[name].is_floating_point()
            if name in origin:
                wrong.append(f"{stored} and {origin[name]} both stand for {name}")
            elif shape != want and not (len(want) == 2 and shape == (*want, 1, 1)):     # 1x1 convolution for linear
                wrong.append(f"{stored} is {list(shape)}, expected {list(want)}")
            elif is_float != kind.startswith(("F", "BF")):
                wrong.append(f"{stored} holds {kind}, expected {'a float type' if is_float else 'whole numbers'}")
            origin[name] = places[file][name] = stored
    missing = [f"missing {name}" for name in expected if name not in origin]
    if missing or unexpected or wrong:
        # One of each kind in turn: five missing names would hide the misspelt ones that explain them.
        first = [item for row in zip_longest(missing, unexpected, wrong) for item in row if item][:5]
        rest = len(missing) + len(unexpected) + len(wrong) - len(first)
        raise Unfit(f"{where} does not fit {type(network).__name__} ({len(missing)} missing, {len(unexpected)} "
                    f"unexpected, {len(wrong)} wrong): {'; '.join(first)}{f'; and {rest} more' if rest else ''}")
    return places


def sha256(path):
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as opened:
        while block := opened.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
