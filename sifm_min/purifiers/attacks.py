"""Attacks on a protection: recompress, rescale, blur, clean a picture, or pass it through an autoencoder, before the edit.

    attacked = attacks.apply("jpeg-75", image, seed=0)                     # PIL in, PIL out, same size and mode
    for name, attack in attacks.ATTACKS.items():
        attack.needs                                         # "", "own" (the editor under attack) or "other" (another one)
        attack.refusal(editor)                               # None, or why it does not apply to this editor

All attacks are published transforms, each with its source. They measure how much of a protection is left. A clean and a
noised picture belong beside the protected one, and the damage by the attack itself beside all three. An attack changes
the colours; transparency, ICC profile and greyness stay. The result has 8 bits, as a file has. Random numbers come from a
generator of the seed: the same call gives the same picture (JPEG: with the same version of Pillow and its codec).

Filters work on 0 to 255, as their sources do. `moves` is True for the one attack after which the picture shows less of its
scene: its edits are compared with edits of a clean picture after the same attack.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import torch
from PIL import Image

from .. import images
from .filters import Guide, bilateral

BICUBIC, LANCZOS = Image.Resampling.BICUBIC, Image.Resampling.LANCZOS


@dataclass(frozen=True)
class Attack:
    """One row of the table. function(image, editor=, seed=, **parameters): an "RGB" or "L" image -> the same mode and size.

    needs: "" for nothing, "own" for the editor that will edit the picture, "other" for a different one. kinds: the editor
    kinds (`editor.kind`) it applies to; empty for all. moves: True if the picture is shifted or scaled. source: the
    publication, and the source of the parameters.
    """

    name: str
    function: Callable
    parameters: dict
    source: str
    needs: str = ""
    kinds: tuple = ()
    moves: bool = False

    def refusal(self, editor=None):
        """None if the attack can be carried out, else the reason in one sentence."""
        if not self.needs:
            return None
        if editor is None:
            which = "the editor under attack" if self.needs == "own" else "another editor than the one under attack"
            return f"{self.name} needs {which}: pass it as editor="
        if self.kinds and editor.kind not in self.kinds:
            return (f"{self.name} does not apply to {editor.name}: it is an {editor.kind} editor, and only "
                    f"{' and '.join(self.kinds)} editors can paint a picture again at a low strength")
        return None

    def __call__(self, image, *, editor=None, seed=0):
        """Attack a picture; see `apply`."""
        if why := self.refusal(editor):
            raise ValueError(why)
        picture = images.picture(image)
        colours = picture.image.convert("L") if picture.channels == 1 else picture.image     # the pixels decide, not the mode
        attacked = self.function(colours, editor=editor, seed=seed, **self.parameters)
        return picture.put_together(attacked)


def apply(name, image, *, editor=None, seed=0):
    """Attack a picture: return a PIL image of the same size, and of the mode that `images.read` gives.

    editor: for attacks that need one (`ATTACKS[name].needs`). Raises ValueError for an unknown name, a missing editor, and an
    editor that the attack does not apply to.
    """
    if name not in ATTACKS:
        raise ValueError(f"unknown attack {name!r}: choose from {', '.join(ATTACKS)}")
    return ATTACKS[name](image, editor=editor, seed=seed)


# ----------------------------------------------------------------------------------------------------- files and sizes

def jpeg(image, *, quality, editor=None, seed=0):
    """Save as JPEG of this quality, with halved colour resolution (4:2:0) as platforms do, and open it again."""
    file = io.BytesIO()
    more = {} if image.mode == "L" else {"subsampling": "4:2:0"}
    image.save(file, "JPEG", quality=quality, **more)
    with Image.open(file, formats=["JPEG"]) as decoded:
        return decoded.convert(image.mode)


def rescale(image, *, factor, editor=None, seed=0):
    """Scale by `factor` (each side rounded, at least 1) and back, both times with Pillow's antialiased Lanczos."""
    small = tuple(max(1, round(side * factor)) for side in image.size)
    return image.resize(small, LANCZOS).resize(image.size, LANCZOS)


def crop(image, *, share, editor=None, seed=0):
    """Cut out the middle `share` of both sides and scale it to the whole size with the bicubic filter."""
    width, height = (max(1, round(side * share)) for side in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height)).resize(image.size, BICUBIC)


def depth(image, *, bits, editor=None, seed=0):
    """Round every channel to 2**bits evenly spaced levels, from 0 to 255."""
    steps = 2 ** bits - 1
    return image.point([round(round(value * steps / 255) * 255 / steps) for value in range(256)] * len(image.getbands()))


# ------------------------------------------------------------------------------------------------------ noise and filters

def gaussian_noise(image, *, sigma, editor=None, seed=0):
    """Add Gaussian noise of this standard deviation (in [0,1]), drawn from the seed, to every value; clip to the range."""
    values = _values(image)
    drawn = torch.randn(values.shape, generator=torch.Generator().manual_seed(seed))
    return _image(values + 255 * sigma * drawn, image.mode)


def gaussian_blur(image, *, sigma, taps, editor=None, seed=0):
    """Blur by a Gaussian of this standard deviation in pixels, cut to `taps` and normalised; edges are mirrored."""
    place = torch.arange(taps) - (taps - 1) / 2
    weights = torch.exp(-place.square() / (2 * sigma ** 2))
    weights = weights / weights.sum()
    values = _values(image)
    for axis in (1, 2):
        values = _along(values, weights, axis)
    return _image(values, image.mode)


def adverse_cleaner(image, *, bilateral_times, diameter, sigma_colour, sigma_space, guided_times, radius, eps,
                    editor=None, seed=0):
    """Flatten faint structure by bilateral filters, then bring back the edges of the attacked picture by guided filters.

    The guide is the attacked picture, so it brings back some of the perturbation, as the author warns.
    """
    attacked = _values(image.convert("RGB"))
    cleaned = attacked
    for _ in range(bilateral_times):
        cleaned = bilateral(cleaned, diameter, sigma_colour, sigma_space)
    guide = Guide(attacked, radius, eps)
    for _ in range(guided_times):
        cleaned = guide.filter(cleaned)
    return _image(cleaned, "RGB").convert(image.mode)


# ------------------------------------------------------------------------------------------------------------ by an editor

@torch.no_grad()
def autoencoder(image, *, editor, seed=0):
    """Encode and decode by an editor's autoencoder at its working size: everything outside the latent space is lost."""
    pixels = editor.resize(images.to_pixels(image))
    decoded = editor.decode(editor.scaled(editor.encode(pixels)))
    if not decoded.isfinite().all():                         # in 8 bits it would look like a destroyed picture
        raise ValueError(f"the autoencoder of {editor.name} gave no finite picture; a wider dtype, such as float32, may help")
    return images.to_image(decoded).resize(image.size, LANCZOS).convert(image.mode)


def regenerate(image, *, strength, editor, seed=0):
    """Add noise and denoise without a prompt, by an img2img editor (SDEdit, Meng et al. 2022)."""
    # guidance 1: there is no prompt.
    return editor.edit(image.convert("RGB"), "", strength=strength, guidance=1.0, seed=seed).convert(image.mode)


# ---------------------------------------------------------------------------------------------------------------- the table

def _table():
    rows = []

    def row(name, function, source, *, needs="", kinds=(), moves=False, **parameters):
        rows.append(Attack(name, function, parameters, source, needs, kinds, moves))

    for quality in (95, 85, 75, 65, 50):
        row(f"jpeg-{quality}", jpeg, "BlurGuard and ImageProtectionTraceability use 75; the other qualities are ours"
            if quality == 75 else "our sweep around the 75 of BlurGuard and ImageProtectionTraceability", quality=quality)
    for factor in (0.75, 0.5):
        row(f"resize-{factor}", rescale, "as in EditShield and MetaCloak; the factors are ours", factor=factor)
    row("crop-0.75", crop, "Mist's post-processing: 384 of 512, bicubic", moves=True, share=0.75)
    row("noise-0.05", gaussian_noise, "robust-style-mimicry (ETH) and BlurGuard: 0.05 and 0.1 of the range", sigma=0.05)
    row("noise-0.1", gaussian_noise, "robust-style-mimicry (ETH) and BlurGuard: 0.05 and 0.1 of the range", sigma=0.1)
    row("blur-1", gaussian_blur, "our weaker companion of EditShield's", sigma=1.0, taps=5)
    row("blur-1.5", gaussian_blur, "EditShield: 5 taps, sigma 1.5", sigma=1.5, taps=5)
    for bits in (5, 4):
        row(f"bits-{bits}", depth, "feature squeezing (Xu, Evans and Qi 2018); the depths are ours", bits=bits)
    row("adverse-cleaner", adverse_cleaner, "lllyasviel/AdverseCleaner: 64 bilateral filters (5, 8, 8), then 4 guided filters "
        "(4, 16) by its input; it cuts off fractions where we round", bilateral_times=64, diameter=5, sigma_colour=8.0,
        sigma_space=8.0, guided_times=4, radius=4, eps=16.0)
    row("vae", autoencoder, "CopyrightMeter, and VAE-Trans in Purify Once, Edit Freely (arXiv 2603.13028): the editor's own "
        "autoencoder", needs="own")
    row("vae-other", autoencoder, "the same with another editor's autoencoder", needs="other")
    row("regenerate-0.15", regenerate, "SDEdit (Meng et al. 2022) as DiffPure uses a diffusion model; the strength is ours",
        needs="own", kinds=("img2img",), strength=0.15)
    return MappingProxyType({attack.name: attack for attack in rows})


ATTACKS = _table()


# --------------------------------------------------------------------------------------------------------------- small helpers

def _values(image):
    """An "RGB" or "L" image -> (C,H,W), float32, 0 to 255."""
    return torch.from_numpy(np.array(image)).reshape(image.height, image.width, -1).permute(2, 0, 1).float()


def _image(values, mode):
    array = values.clamp(0, 255).round().byte().permute(1, 2, 0).numpy()
    return Image.fromarray(array[:, :, 0] if mode == "L" else array)


def _along(values, weights, axis):
    """The weighted sums of (C,H,W) along one axis, centred on each pixel; the number of weights is odd, edges are mirrored."""
    side, radius = values.shape[axis], len(weights) // 2
    places = torch.from_numpy(np.pad(np.arange(side), radius, mode="reflect"))
    padded = values.index_select(axis, places)
    return sum(weight * padded.narrow(axis, i, side) for i, weight in enumerate(weights))
