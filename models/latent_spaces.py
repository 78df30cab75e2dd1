"""The latent spaces of five families of editors, each by its published tiny autoencoder: find the files, load the network.

The files lie in any of three layouts: diffusers' (config.json and diffusion_pytorch_model.safetensors), one file with
diffusers' names and no config (taef2.safetensors), or the author's two files (taesd_encoder.safetensors,
taesd_decoder.safetensors). They are looked for in the folder that `weights download --weights` fills, then in the cache of the
hub. All are by Ollin Boer Bohan, under the MIT licence; none of them ships with this package.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import constants
from safetensors import safe_open

from .. import PROGRAM
from . import hub
from .checkpoints import Checkpoint, header
from .hub import Unavailable
from .layout import Unfit, is_weights
from .places import Place

LICENCE = "MIT (Ollin Boer Bohan)"
CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
HALVES = ("encoder", "decoder")
COPIES = Path(__file__).parent / "latents"                   # copies that this project trained: see the README there


@dataclass(frozen=True, kw_only=True)
class Space:
    """A latent space and the tiny autoencoder that stands for it.

    marks: {half: the first biases of its last layer}; they identify the space among files of equal shapes.
    files: {file to fetch: its published SHA-256, or None where none is published}.
    """

    name: str
    title: str
    stem: str                                       # the author's name of the autoencoder
    channels: int
    revision: str
    size: int                                       # bytes to fetch, the config aside
    files: Mapping[str, str | None]
    marks: Mapping[str, tuple[float, ...]]

    @property
    def hub_id(self):
        return f"madebyollin/{self.stem}"

    @property
    def main(self):
        """The first file to fetch; if the cache holds it, the autoencoder counts as cached."""
        return next(iter(self.files))

    @property
    def command(self):
        return f"latents-{self.name}"

    @property
    def kept(self):
        """The folder of files that were fetched by other means: beside the hub's cache, so HF_HOME moves both."""
        return Path(constants.HF_HOME) / "sifm_min" / "latents" / self.stem


def _diffusers(sha256=None):
    return {CONFIG: None, WEIGHTS: sha256}


SPACES = {space.name: space for space in (
    Space(name="sd1", title="Stable Diffusion 1.x and 2.x, InstructPix2Pix, HQ-Edit", stem="taesd", channels=4,
          revision="931366cc24b8bc15d6f682fa2e0352f1deec397b", size=9_793_292,
          files=_diffusers("d7956d561b1efbd861ad9b03fd8f01510f9e87eddc07bdfd20837009433f6ee5"),
          marks={"encoder": (0.1074, 0.0193, 0.0240, -0.0150), "decoder": (0.2617, 0.2598, 0.2598)}),
    Space(name="sdxl", title="Stable Diffusion XL", stem="taesdxl", channels=4,
          revision="a496ca9481f06f84a0399a38c3b6e683fa02da01", size=9_793_292, files=_diffusers(),
          marks={"encoder": (-0.1113, 0.0486, -0.0605, -0.0417), "decoder": (0.4219, 0.4219, 0.4219)}),
    Space(name="sd3", title="Stable Diffusion 3 and 3.5, UltraEdit", stem="taesd3", channels=16,
          revision="d58dcaccd2b36fcb7a6b9e93c1cc507acab5a778", size=9_848_636,
          files=_diffusers("6f79c1397cb9ce1dac363722dbe70147aee0ccca75e28338f8482fe515891399"),
          marks={"encoder": (0.0042, -0.0315, -0.0308, -0.0184), "decoder": (0.4316, 0.4297, 0.4160)}),
    Space(name="flux1", title="FLUX.1 and FLUX.1 Kontext", stem="taef1", channels=16,
          revision="b1b2d00e9e440cfbf3dedb34266864da86016ceb", size=9_848_636,
          files=_diffusers("47a6c2bff850da04b267cab70fe3553fef57255eb9a8e76852baa0a87850e54d"),
          marks={"encoder": (0.0219, 0.0061, -0.0309, -0.0211), "decoder": (0.3145, 0.3164, 0.3125)}),
    Space(name="flux2", title="FLUX.2", stem="taef2", channels=32,
          revision="bd244ebfe4398c84fbf312a2f1c868c676b500e3", size=10_700_000, files={"taef2.safetensors": None},
          marks={"encoder": (0.0791, 0.0410, 0.0014, 0.0291), "decoder": (0.3496, 0.3340, 0.3203)}),
)}


class TinyCheckpoint(Checkpoint):
    """The files of one tiny autoencoder, read as if they were the `vae/` of an editor: `load(AutoencoderTiny, "vae")`.

    space: the `Space` of the files; `Unfit` if they belong to another.
    """

    def __init__(self, folder, source, revision, files, space, name=None):
        super().__init__(folder, source, revision, files)
        self.space, self.name, self.recognised = space, name or space.name, False
        self._headers = {self.folder / file: header(self.folder / file) for file in self.files if is_weights(file)}
        self._places = {file: {name: _place(file, name) for name in found} for file, found in self._headers.items()}
        self._check_marks()

    def network(self, *, device="cpu", dtype=None):
        """The network, frozen."""
        from .tiny_vae import AutoencoderTiny  # not at the top: `weights list` starts without torch
        return self.load(AutoencoderTiny, "vae", device=device, dtype=dtype)

    def fit(self):
        """Raise `Unfit` where the files do not fit the network; no tensor is read."""
        from .tiny_vae import AutoencoderTiny
        self.check(AutoencoderTiny, "vae")

    def text(self, relative):
        if relative != f"vae/{CONFIG}":
            return super().text(relative)
        if CONFIG in self.files:
            return super().text(CONFIG)
        pool = any(".pool." in name for found in self._headers.values() for name in found)
        return f'{{"latent_channels": {self.space.channels}, "use_midblock_gn": {str(pool).lower()}}}'

    def _where(self, relative):
        return self.folder / CONFIG if relative == f"vae/{CONFIG}" else super()._where(relative)

    def _label(self, component):
        return " and ".join(str(file) for file in self._headers)

    def _stored(self, component):
        return self._headers, self._places

    def _check_marks(self):
        """Raise `Unfit` if the biases in `marks` are those of another space, or the encoder's are of another number."""
        known = []
        for half in HALVES:
            file, stored = self._last_bias(half)
            if stored is None:
                continue
            with safe_open(file, framework="pt") as opened:
                found = opened.get_tensor(stored).float().flatten().tolist()
            marked = next((space for space in SPACES.values() if _is_marked(half, found, space)), None)
            known.append(marked is self.space)
            other = None if marked is self.space else marked
            if other or half == "encoder" and len(found) != self.space.channels:
                of = f"of {other.stem}, which is the latent space of {other.title}" if other else f"of {len(found)} channels"
                raise Unfit(f"{file} is the file {of}; {self.space.stem} has {self.space.channels} channels and is of "
                            f"{self.space.title}: give the right file, or fetch it with download {self.space.command}")
        self.recognised = bool(known) and all(known)

    def _last_bias(self, half):
        """(file, stored name) of the bias of a half's last layer; (None, None) where there is none."""
        found = [(int(match[1]), file, stored) for file, places in self._places.items() for stored, (place,) in places.items()
                 if (match := re.fullmatch(rf"{half}\.layers\.(\d+)\.bias", place.name))]
        return max(found)[1:] if found else (None, None)


def _is_marked(half, biases, space):
    """True if these are the biases of a half's last layer, to the precision of any 16-bit float."""
    marks = space.marks[half]
    return len(biases) == (space.channels if half == "encoder" else len(marks)) and all(
        abs(found - mark) <= 0.004 * abs(mark) + 2e-4 for found, mark in zip(biases, marks, strict=False))


def _place(file, name):
    """The place of a tensor by its name in diffusers' layout; in the author's files names lack "encoder." or "decoder."."""
    from .tiny_vae import AutoencoderTiny
    half = next((half for half in HALVES if file.name.endswith(f"_{half}.safetensors")), None)
    return (Place(AutoencoderTiny.original_name(half, name) if half else name),)


def files_in(folder, space):
    """The paths of a space's files in a folder, relative to it; None if it has them in none of the three layouts."""
    for names in ([f"{space.stem}_{half}.safetensors" for half in HALVES], [f"{space.stem}.safetensors"],
                  *([f"{inner}{name}" for name in (CONFIG, WEIGHTS)] for inner in (f"{space.stem}/", ""))):
        if all((folder / name).is_file() for name in names):
            return names
    return None


def open_folder(folder, space):
    """The `TinyCheckpoint` of a space whose files lie in a folder; `Unavailable` where they do not."""
    return _opened(_in(folder, space), space)


def _in(folder, space):
    names = files_in(folder, space)
    if names is None:
        raise Unavailable(absence(folder, space))
    inner = folder / Path(names[0]).parent
    return Checkpoint(inner, str(inner), None, [Path(name).name for name in names])


def _opened(checkpoint, space):
    return TinyCheckpoint(checkpoint.folder, checkpoint.source, checkpoint.revision, checkpoint.files, space)


def in_folder(folder):
    """The `TinyCheckpoint`s of all tiny autoencoders in a folder; [] where there is none.

    Files with the author's name are of that space. For a config.json with its weights in the folder itself, the marks tell the
    space; where they are of no known one, the folder's name stands for it.
    """
    here = [space for space in SPACES.values() if files_in(folder, space)]
    if any(files_in(folder, space) != [CONFIG, WEIGHTS] for space in here):
        return [open_folder(folder, space) for space in here]
    found, unfit = [], None
    for space in here:
        try:
            found.append(open_folder(folder, space))
        except Unfit as error:
            unfit = error
    if unfit and not found:
        raise unfit
    known = [checkpoint for checkpoint in found if checkpoint.recognised]
    if found and not known:
        name = folder.resolve().name
        found[0].name = str(folder) if name in SPACES else name
    return known or found[:1]


def open_copy(folder, space):
    """The `TinyCheckpoint` of a copy of a space that this project trained: a folder in diffusers' layout."""
    return TinyCheckpoint(folder, str(folder), None, (CONFIG, WEIGHTS), space, f"{space.name}-copy")


def copy_of(space):
    """The `TinyCheckpoint` of the copy of a space that ships with the project, or None."""
    folder = COPIES / space.name
    return open_copy(folder, space) if (folder / WEIGHTS).is_file() else None


def absence(folder, space):
    """A sentence that says which files of a space a folder lacks."""
    return (f"{folder} has no {space.stem}: neither {space.stem}_encoder.safetensors and {space.stem}_decoder.safetensors, nor "
            f"{space.stem}.safetensors, nor {CONFIG} and {WEIGHTS}")


def stored(space):
    """The files of a space on this machine as a plain `Checkpoint`, which reads none of them; `Unavailable` where it is not
    here. Sends no request."""
    if files_in(space.kept, space):
        return _in(space.kept, space)
    folder = hub.snapshot(space.hub_id, space.revision, space.main)
    if folder is None or not all((folder / file).is_file() for file in space.files):
        raise Unavailable(f"the latent space {space.name} is not on this machine: run `{PROGRAM}.weights download "
                          f"{space.command}` once, about {space.size / 1e6:.0f} MB")
    return Checkpoint(folder, space.hub_id, space.revision, space.files)


def find(space):
    """The `TinyCheckpoint` of a space on this machine; `Unavailable` where it is not here, `Unfit` where it is damaged."""
    return _opened(stored(space), space)


def find_or_copy(space):
    """The `TinyCheckpoint` of a space on this machine, else of the copy that ships; `Unavailable` where there is neither."""
    try:
        return find(space)
    except Unfit:
        raise
    except Unavailable:
        if copy := copy_of(space):
            return copy
        raise


def fetch(space):
    """As `stored`; from the hub where the files are not on this machine."""
    try:
        return stored(space)
    except Unavailable as missing:
        if hub.is_offline():
            raise Unavailable(f"{missing}; HF_HUB_OFFLINE is set, so nothing is fetched now: unset it, or give a folder with "
                              "--weights") from None

    def choose(names, get):
        if absent := [file for file in space.files if file not in names]:
            raise Unavailable(f"{space.hub_id} at {space.revision} has no {absent[0]}: try again later, or give a folder with "
                              "--weights")
        return list(space.files)

    hub.fetch(space.hub_id, space.revision, choose, last=is_weights, main=space.main)
    return stored(space)


def at_hand():
    """The spaces that are on this machine, in the order of `SPACES`."""
    return [space for space in SPACES.values() if is_here(space)]


def is_here(space):
    """True if the files of a space are on this machine, damaged ones included."""
    try:
        stored(space)
    except Unavailable:
        return False
    return True
