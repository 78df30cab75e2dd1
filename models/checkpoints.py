"""Checkpoints: find the files of an editor (shipped, a folder, one file, or the hub) and load their tensors exactly.

Reads the published (diffusers) layout, see layout.py, and the single files of Stable Diffusion 3, see single_files.py.
Pickles are never opened. Only the files that are needed are fetched from the hub, at one revision, into the standard cache.
Loading is all or nothing: the name and shape of every tensor are compared before the first one is read.

`EDITORS`, the table of the editors known by name, is in sources.py.
"""

import hashlib
import json
import os
import re
from functools import cached_property
from itertools import zip_longest
from pathlib import Path, PurePosixPath

from safetensors import SafetensorError, safe_open

from .. import PROGRAM
from . import first_use, hub, layout, single_files
from .config import shown
from .hub import MAIN, Unavailable
from .layout import Unfit, is_weights, needed, pipeline_components
from .places import Place
from .sources import EDITORS, PIPELINES, T5, Source, by_hub_id, recognised

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
REVISION = re.compile(r"(?!.*\.\.)[A-Za-z0-9][\w./-]*")


# --------------------------------------------------------------------------------------------------------- finding it


def find(source):
    """The `Source` of a name in `EDITORS`, a folder, a single file, or a hub id `owner/name`; else ValueError."""
    name = os.fspath(source)
    if name in EDITORS:
        return EDITORS[name]
    folder = Path(os.path.expanduser(name))
    if name and folder.is_dir():
        return Source(name=name, licence="not stated", folder=folder)
    if name and folder.exists() and is_weights(name):
        return Source(name=name, licence="not stated", file=folder)
    if name and folder.exists():
        raise ValueError(f"{name} is a file; give the folder that holds unet/, vae/ and the other components, or a single "
                         "file of Stable Diffusion 3, which ends in .safetensors")
    if HUB_ID.fullmatch(name) is None:
        raise ValueError(f"{name!r} is neither a known editor ({', '.join(EDITORS)}), nor a folder that exists, nor a "
                         "hub id (owner/name)")
    return by_hub_id(name) or Source(name=name, licence="the one on its card", hub_id=name)      # known ones with their pin


def open_checkpoint(source, components=None, *, t5=True, revision=None, offline=None, rest=None):
    """The `Checkpoint` of `source` (see `find`); missing files of `components` are fetched.

    components: folder names such as "unet", "vae", "tokenizer". None means those of the pipeline in model_index.json, which
    is read first, so that nothing is fetched of a pipeline that is not implemented; t5 False then leaves out T5, which is
    most of Stable Diffusion 3. revision: commit, tag or branch of a hub id (default: the pinned commit, else `main`,
    resolved at the first download and then kept). offline: True makes no request (default: `HF_HUB_OFFLINE`).
    rest: the source of the components that a single file lacks: a folder, a known name or a hub id (default: the file's own
    folder). Raises `Unavailable`, and ValueError for an argument that makes no sense.
    """
    found = find(source)
    if found.hub_id is None and revision is not None:
        raise ValueError(f"revision {revision} is for a hub id; {found.name} is on this disk, which has only one")
    if found.file:
        return _open_single_file(found.file, components, t5, rest, offline)
    if rest is not None:
        raise ValueError(f"components from {rest} are for a single file that lacks them; {found.name} has its own")
    if found.folder:
        if not found.folder.is_dir():
            raise Unavailable(f"the shipped editor {found.name} lacks its weights in {found.folder}; install sifm_min "
                              "again, or make them with tools/train_miniature.py")
        files = layout.in_folder(found.folder, components, found.folder, t5)
        return Checkpoint(found.folder, str(found.folder), None, files, known=recognised(found.folder))
    if revision is not None and REVISION.fullmatch(revision) is None:
        raise ValueError(f"revision {revision!r} is not a commit, tag or branch")
    command = f"download {found.name}{f' --revision {revision}' if revision else ''}{'' if t5 else ' --no-t5'}"
    hub_id, revision = found.hub_id, revision or found.revision or "main"
    folder, missing = cached(hub_id, revision, components, t5=t5)
    if missing and (hub.is_offline() if offline is None else offline):
        if isinstance(missing, Unfit):
            raise missing                           # no download would help
        raise Unavailable(f"{missing}, and offline nothing is fetched: run `{PROGRAM}.weights {command}` once "
                          "while online, without HF_HUB_OFFLINE")
    if missing:
        def choose(names, get):
            chosen = components
            if chosen is None:
                chosen = pipeline_components(layout.parse(layout.read(get(MAIN)), f"{hub_id}/{MAIN}"), hub_id, t5=t5)
            return [file for part in chosen for file in needed(names, part, lambda name: layout.read(get(name)), hub_id)]

        folder = hub.fetch(hub_id, revision, choose, last=is_weights)           # weights last: see `needed`
    files = layout.in_folder(folder, components, hub_id, t5)
    return Checkpoint(folder, hub_id, folder.name, files, known=by_hub_id(hub_id))


def cached(hub_id, revision, components=None, *, t5=True):
    """(snapshot folder in the cache or None, why it is not complete or None), without any request."""
    folder = None
    try:
        folder = hub.snapshot(hub_id, revision or "main")
        if folder is None:
            return None, Unavailable(hub.absence(hub_id, revision or "main"))
        layout.in_folder(folder, components, hub_id, t5)
    except Unavailable as missing:
        if folder is None or isinstance(missing, Unfit):
            return folder, missing
        return folder, Unavailable(f"{hub_id} is not complete in the cache {hub.cache()} ({missing})")
    return folder, None


def _open_single_file(file, components, t5, rest, offline):
    """The `SingleFile`. Its missing components come from `rest`: from a pipeline, or from a folder that may also hold text
    encoders as single files."""
    family, parts = _parts(file)
    layout.check_declined(family.pipeline, t5, file)
    whole = PIPELINES[family.pipeline]
    beside = find(file.absolute().parent if rest is None else rest)
    if beside.file:
        raise ValueError(f"components cannot come from {rest}, which is a file; give a folder, a known editor or a hub id")
    if beside.folder:
        offered = {part for part in whole if (beside.folder / part).is_dir()}
        for part, names in single_files.STANDALONE.items() if family is single_files.SD3 else ():
            found = [path for name in names for path in (beside.folder / name, beside.folder / "text_encoders" / name)
                     if path.exists()]
            if part not in offered | parts.keys() and found:
                parts[part] = (found[0], "", header(found[0]))
    else:
        offered = set(pipeline_components(open_checkpoint(rest, (), offline=offline).index, beside.name))
    if components is None:
        has_t5 = t5 and T5[0] in offered | parts.keys()
        components = [part for part in whole if has_t5 or part not in T5]
    lacking = [part for part in components if part not in parts and (part != "scheduler" or part in offered)]
    if absent := [part for part in lacking if part not in offered]:
        clips = family is single_files.SD3 and any(part.startswith("text_encoder") for part in absent)
        more = "; the text encoders are also in the file sd3_medium_incl_clips.safetensors" if clips else ""
        more += "; or decline T5" if set(absent) <= set(T5) else ""
        raise Unavailable(f"neither {file} nor {beside.name} has {', '.join(absent)}: give components, a folder that has "
                          f"them as a diffusers pipeline does, or {family.known}, from which they are fetched{more}")
    others = open_checkpoint(beside.name, lacking, offline=offline) if lacking else None
    return SingleFile(file, family, parts, others, components)


def _parts(file):
    """(its family, {component: (file, prefix, {name without prefix: (shape, kind)})}) of a single file, known as a whole."""
    found = header(file)
    family, (split, unknown) = single_files.family(found), single_files.split(found)
    if family is None:
        raise Unfit(f"{file} is not a single file of Stable Diffusion 3 or FLUX: it has no "
                    f"{single_files.PREFIXES['transformer']}joint_blocks and no double_blocks; give sd3_medium.safetensors or "
                    "its like, or the folder of a whole pipeline")
    parts = {}
    for part, names in split.items():
        name, stored = next(iter(names.items()))
        parts[part] = file, stored.removesuffix(name), {name: found[stored] for name, stored in names.items()}
    for part, (_, prefix, held) in parts.items():
        known = single_files.places(part, {name: shape for name, (shape, _) in held.items()})
        unknown += [prefix + name for name in held if name not in known]
    if unknown:
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        raise Unfit(f"{file} holds tensors that {family.title} does not have: {', '.join(unknown[:3])}{more}; give a file "
                    "whose weights are float32, float16, bfloat16, float8 or scaled float8, such as "
                    f"{family.example}, or the folder of a whole pipeline")
    return family, parts


# --------------------------------------------------------------------------------------------------------- loading it


RENEWAL = 16 << 20                                  # bytes to read before a file is mapped anew: that takes a millisecond


class Checkpoint:
    """An editor's files.

    `folder`: on this disk; `source`: hub id, or the folder; `revision`: commit, or None; `files`: the chosen ones, as paths
    relative to the folder; `components`: their folders; `known`: the name of the published editor that this is, or is a copy
    of, or None.
    """

    def __init__(self, folder, source, revision, files, known=None):
        self.folder, self.source, self.revision, self.files = folder, source, revision, tuple(files)
        self.known = known and known.name
        self.components = tuple(dict.fromkeys(file.split("/")[0] for file in self.files))
        self._hashes = {}                           # weight file of a checked network -> its SHA-256, None until computed

    @cached_property
    def configuration(self):
        """One SHA-256 of all files that are not weights, such as configs and tokenizers."""
        small = {file for file in (MAIN, *self.files) if not is_weights(file) and self.path(file).is_file()}
        told = "".join(f"{sha256(self.path(file))}  {file}\n" for file in sorted(small))
        return hashlib.sha256(told.encode()).hexdigest()

    @property
    def index(self):
        """The model_index.json as a dict, {} where there is none."""
        return layout.parse(self.text(MAIN), f"{self.source}/{MAIN}") if self.has(MAIN) else {}

    @property
    def settings(self):
        """(defaults, notice) of the `_sifm_min` in model_index.json: an object of an edit's defaults, and a sentence."""
        where, own = f"{self.source}/{MAIN}", self.index.get("_sifm_min", {})
        if not isinstance(own, dict) or not isinstance(own.get("notice", ""), str):
            raise Unfit(f"{where} sets _sifm_min to {shown(own)}, not to an object with defaults and a notice")
        return own.get("defaults", {}), own.get("notice", "")

    def parsed(self, relative, reader):
        """reader(text) of a small file; its ValueError, which begins with the file's name, becomes an `Unfit` with the path."""
        try:
            return reader(self.text(relative))
        except ValueError as error:
            raise Unfit(f"{PurePosixPath(self.source, relative).parent}/{error}") from None

    def has(self, relative):
        """True if the checkpoint holds this file; a path such as "vae/config.json"."""
        return self.path(relative).is_file()

    def text(self, relative):
        """The text of a small file."""
        return layout.read(self.path(relative))

    def path(self, relative):
        """The path of a file or a folder of the checkpoint, such as "tokenizer"."""
        path = PurePosixPath(relative)
        if path.is_absolute() or ".." in path.parts or "\\" in str(relative):
            raise ValueError(f"{relative!r} leads out of the checkpoint")
        return self.folder / path

    def check(self, network_class, component):
        """The config of `component` (a folder name), for a network that is loaded later.

        All checks of `load` are made; no tensor is read.
        """
        return self._matched(network_class, component)[0].config

    def _matched(self, network_class, component):
        """(network on the meta device, {file: {name in the network: (name in the file, its place)}})."""
        import torch  # here, so that `weights list` starts without it

        text, where = self.text(f"{component}/config.json"), self._where(f"{component}/config.json")
        layout.parse(text, where)
        try:
            config = network_class.Config.from_json(text)
            with torch.device("meta"):
                network = network_class(config)
        except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RuntimeError) as error:
            raise Unfit(f"{where} does not describe a {network_class.__name__}: {error}") from error
        headers, places = self._stored(component)
        found = _match(network, headers, places, self._label(component))
        for file in headers:
            self._hashes.setdefault(file, None)
        return network, found

    def load(self, network_class, component, *, device="cpu", dtype=None, lazily=False):
        """The network of `component` (a folder name) with its config and weights, in eval mode and frozen.

        dtype None keeps the file's dtype. (float8 becomes bfloat16, which holds its values: no layer computes in float8.)
        Tensors are converted one at a time from the mapped file to `device` and `dtype`; on a CPU, weights of convolutions
        become channels-last, which is faster there. Peak memory is the network plus one tensor, within `RENEWAL`. Tensors
        that need no conversion stay mapped on the CPU and take no memory of their own; the file must not change meanwhile.
        lazily: each part stays on torch's meta device until it first runs, and is read then; parts that never run are never
        read. The system prefetches the next parts from the disk, see readahead.py. Where file and config disagree, raises
        `Unfit` with the first differences in name, shape or kind, before anything is read.
        """
        network, found = self._matched(network_class, component)
        shapes = {name: tensor.shape for name, tensor in network.state_dict().items()}
        network.eval().requires_grad_(False)
        if dtype:
            network.to(dtype)                       # the placeholders, so that network.dtype is right before it is read

        def read(wanted):
            return self._read(found, {name: shapes[name] for name in wanted}, device, dtype)

        if lazily:
            first_use.load_in_parts(network, read, first_use.ahead_of(network, found))
        else:
            network.load_state_dict(read(shapes), strict=True, assign=True)
        return network

    def _read(self, found, shapes, device, dtype):
        """{name: tensor} of those in `shapes`."""
        import torch

        state = {}
        for file, tensors in found.items():
            mapped = original = staying = None      # unmap the previous file
            read = 0

            def take(opened, stored, name, place):
                original = opened.get_tensor(stored)
                tensor = place.take(original).to(device)        # the device first: it converts faster than the CPU
                if place.scale:
                    tensor = tensor.float() * opened.get_tensor(place.scale).to(device).float()
                if tensor.is_floating_point() and (dtype or original.itemsize == 1):
                    tensor = tensor.to(dtype or torch.bfloat16)
                tensor = tensor.reshape(shapes[name])
                if tensor.dim() == 4 and tensor.device.type == "cpu":         # faster there; not measured on a GPU
                    tensor = tensor.contiguous(memory_format=torch.channels_last)
                return original, tensor

            for name, (stored, place) in tensors.items():
                if name not in shapes:
                    continue
                mapped = mapped or _opened(file)
                original, state[name] = take(mapped, stored, name, place)
                if state[name].untyped_storage().data_ptr() == original.untyped_storage().data_ptr():
                    # Not a copy: take it from a second mapping, or it would keep every page of the first one in memory.
                    staying = staying or _opened(file)
                    _, state[name] = take(staying, stored, name, place)
                else:
                    read += original.nbytes
                    if read > RENEWAL:
                        mapped, read = None, 0      # all copied: unmapping frees the pages that were read
        return state

    def _where(self, relative):
        """The name of a small file in errors."""
        return self.path(relative)

    def _label(self, component):
        """The name of a component's weights in errors."""
        return f"{self.source}/{component}"

    def _stored(self, component):
        """({file: its header}, {file: {name in it: its places}}) of a component's weights."""
        files = [self.folder / file for file in layout.in_folder(self.folder, [component], self.source) if is_weights(file)]
        headers = {file: header(file) for file in files}
        return headers, {file: {name: (Place(name),) for name in found} for file, found in headers.items()}

    def hashes(self, digest=None):
        """SHA-256 of every weight file that was loaded, {relative path: hexadecimal}, each computed once.

        digest: a function of a file to use in place of `sha256`, such as one that keeps digests on the disk.
        """
        for file, known in self._hashes.items():
            if known is None:
                self._hashes[file] = (digest or sha256)(file)
        return dict(sorted((self._relative(file), digest) for file, digest in self._hashes.items()))

    def _relative(self, file):
        return file.relative_to(self.folder).as_posix()


class SingleFile(Checkpoint):
    """A single file, read like a folder; its missing components come from `others`.

    family: a `single_files.Family`; parts: {component: (file, prefix, header without prefixes)}; others: a `Checkpoint`, or
    None. A klein is distilled where the model_index.json of the others says so: the file itself does not tell.
    """

    def __init__(self, file, family, parts, others, components):
        super().__init__(file.parent, str(file), None, [file.name])
        self.components, self._parts, self._others = tuple(components), parts, others
        index = {key: value for key, value in (others.index if others else {}).items() if key == "is_distilled"}
        texts = {MAIN: {"_class_name": family.pipeline, **{part: ["file", part] for part in components}, **index}}
        if "scheduler" not in getattr(others, "components", ()):
            texts["scheduler/scheduler_config.json"] = family.scheduler
        for part, (_, prefix, held) in parts.items():
            try:
                texts[f"{part}/config.json"] = single_files.config(part, {name: shape for name, (shape, _) in held.items()})
            except KeyError as error:
                raise Unfit(f"{file} has no tensor {prefix}{error.args[0]}; fetch it again") from None
            except (ValueError, IndexError, ArithmeticError) as error:
                raise Unfit(f"{file}: the shapes under {prefix} are not those of its {part} ({error})") from None
        self._texts = {name: json.dumps(text) for name, text in texts.items()}

    def has(self, relative):
        return relative in (*self._texts, *self.files) or bool(self._others and self._others.has(relative))

    def text(self, relative):
        return self._texts[relative] if relative in self._texts else super().text(relative)

    def path(self, relative):
        return self._others.path(relative) if self._others else super().path(relative)

    def _matched(self, network_class, component):
        if component in self._parts:
            return super()._matched(network_class, component)
        if self._others is None:
            raise Unavailable(f"{self.source} has no {component}, and it was opened without")
        return self._others._matched(network_class, component)

    def _where(self, relative):
        return f"{self.source}: its {relative.split('/')[0]}"

    def _stored(self, component):
        file, prefix, held = self._parts[component]
        known = single_files.places(component, {name: shape for name, (shape, _) in held.items()})
        headers = {file: {prefix + name: found for name, found in held.items()}}
        return headers, {file: {prefix + name: tuple(place.below(prefix) for place in known[name]) for name in held}}

    def hashes(self, digest=None):
        return dict(sorted((super().hashes(digest) | (self._others.hashes(digest) if self._others else {})).items()))

    def _relative(self, file):
        return file.name


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


def _match(network, headers, places, where):
    """{file: {name in the network: (name in the file, its place)}}; raises `Unfit` with the differences."""
    rename = getattr(network, "rename", None) or (lambda name: name)
    expected = network.state_dict()
    found, origin, unexpected, wrong = {file: {} for file in headers}, {}, [], []
    entries = [(file, stored, shape, kind, place) for file, header in headers.items()
               for stored, (shape, kind) in header.items() for place in places[file][stored]]
    for file, stored, shape, kind, place in entries:
        shape = place.shape(shape)
        if (name := rename(place.name)) is None:
            continue                            # dropped on purpose
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
        origin[name], found[file][name] = stored, (stored, place)
    missing = [f"missing {name}" for name in expected if name not in origin]
    if missing or unexpected or wrong:
        # One of each kind in turn: an unexpected, misspelt name often explains a missing one.
        first = [item for row in zip_longest(missing, unexpected, wrong) for item in row if item][:5]
        rest = len(missing) + len(unexpected) + len(wrong) - len(first)
        raise Unfit(f"{where} does not fit {type(network).__name__} ({len(missing)} missing, {len(unexpected)} "
                    f"unexpected, {len(wrong)} wrong): {'; '.join(first)}{f'; and {rest} more' if rest else ''}")
    return found


def _opened(file):
    """Map the file. Its header was read before, so an error here means that the file changed."""
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise Unavailable(f"{file} can no longer be read ({error}); it changed after it was opened") from None


def sha256(path):
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as opened:
        while block := opened.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
