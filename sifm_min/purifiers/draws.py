"""Random purifiers with a gradient: what a picture is likely to meet between its protection and an edit.

    draws = Draws(True, seed=0)
    purify = draws()                                         # such as jpeg, of quality 71
    purify(pixels)                                           # (B,3,H,W) in [0,1] -> the same shape, differentiable
    str(purify)                                              # "jpeg 71"

Everything happens at the picture's own size. `attacks.py` has the transforms that attackers run on files.
"""

import random
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from .filters import Guide, bilateral
from .jpeg import jpeg


@dataclass(frozen=True)
class Purifier:
    """A kind of purifier. weight: how likely it is, against those of the others. function(pixels[, value]); the value is
    drawn uniformly from `low` to `high`, whole numbers from whole numbers. option: the name of the value, or ""."""

    name: str
    function: object
    weight: int = 1
    option: str = ""
    low: float = 0
    high: float = 0


@dataclass(frozen=True)
class Draw:
    """A kind with its value: a function of pixels that gives the same for the same pixels."""

    kind: Purifier
    value: float | None

    def __call__(self, pixels):
        return self.kind.function(pixels, *([] if self.value is None else [self.value]))

    def __str__(self):
        return self.kind.name + ("" if self.value is None else f" {self.value:.4g}")


class Draws:
    """An endless row of purifiers, drawn from a generator of its own: `Draws(...)()` is the next one.

    robust: True for none, JPEG, resize and blur, "cleaner" for AdverseCleaner among them; ValueError for anything else.
    """

    def __init__(self, robust, seed):
        self.kinds = kinds(robust)
        self._random = random.Random(seed)

    def __call__(self):
        (kind,) = self._random.choices(self.kinds, [kind.weight for kind in self.kinds])
        if not kind.option:
            return Draw(kind, None)
        uniform = self._random.randint if isinstance(kind.low, int) else self._random.uniform
        return Draw(kind, uniform(kind.low, kind.high))


def kinds(robust):
    """The kinds that are drawn: see `Draws`."""
    if robust not in (True, "cleaner"):
        raise ValueError(f"robust {robust!r}: give True, or \"cleaner\" for AdverseCleaner among the purifiers")
    return KINDS if robust == "cleaner" else KINDS[:-1]


def stated(robust):
    """The shares and ranges of the draws, as a report states them: {kind: {"share": share, the value's name: [low, high]}}."""
    among = kinds(robust)
    whole = sum(kind.weight for kind in among)
    return {kind.name: {"share": round(kind.weight / whole, 4)} | ({kind.option: [kind.low, kind.high]} if kind.option else {})
            for kind in among}


# --------------------------------------------------------------------------------------------------------- the purifiers

def unchanged(pixels):
    """The pixels themselves."""
    return pixels


def rescaled(pixels, factor):
    """Scale by `factor` (each side rounded, at least 1) and back, with the antialiased bicubic filter of Pillow, clipped.

    The products of `images.resize` would be several times the work of a step here, because both sizes are large and the
    factor is new at every step.
    """
    height, width = pixels.shape[2:]
    for rows, columns in ((max(1, round(height * factor)), max(1, round(width * factor))), (height, width)):
        pixels = _bicubic(pixels, pixels.shape[2], columns)
        if columns == 1:                                     # torch 2.13 scales the rows of a single column wrongly
            pixels = pixels.expand(-1, -1, -1, 2)
        pixels = _bicubic(pixels, rows, pixels.shape[3])[..., :columns]
    return pixels


def _bicubic(pixels, height, width):
    return F.interpolate(pixels, size=(height, width), mode="bicubic", align_corners=False, antialias=True).clamp(0, 1)


def blurred(pixels, sigma, radius=5):
    """Blur by a Gaussian of this standard deviation in pixels, cut at `radius` and normalised; edges are repeated."""
    reach = torch.arange(-radius, radius + 1, dtype=pixels.dtype, device=pixels.device)
    channels = pixels.shape[1]
    weights = (-reach.square() / (2 * sigma ** 2)).softmax(0).expand(channels, 1, 1, -1)
    pixels = F.conv2d(F.pad(pixels, (radius, radius, 0, 0), mode="replicate"), weights, groups=channels)
    return F.conv2d(F.pad(pixels, (0, 0, radius, radius), mode="replicate"), weights.transpose(2, 3), groups=channels)


def cleaned(pixels, bilateral_times=8):
    """AdverseCleaner (see `attacks.adverse_cleaner`) with 8 of its 64 bilateral filters, for time.

    The gradient holds the weights of the bilateral filters fixed. It goes through the guided filters and through their guide,
    the picture itself, which brings back most of what survives.
    """
    device = "cpu" if pixels.device.type == "mps" else pixels.device             # which has no double precision
    pictures = []
    for values in 255 * pixels.to(device):
        guide = Guide(values, 4, 16.0)
        for _ in range(bilateral_times):
            values = bilateral(values, 5, 8.0, 8.0)
        for _ in range(4):
            values = checkpoint(guide.filter, values, use_reentrant=False)       # for memory
        pictures.append(values)
    return (torch.stack(pictures).clamp(0, 255) / 255).to(pixels.device)


KINDS = (Purifier("none", unchanged), Purifier("jpeg", jpeg, 2, "quality", 50, 95),
         Purifier("resize", rescaled, 1, "factor", 0.5, 0.9), Purifier("blur", blurred, 1, "sigma", 0.5, 1.5),
         Purifier("cleaner", cleaned))
