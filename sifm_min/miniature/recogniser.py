"""The recogniser: a judge that reads off an edit, beside its source, which edit it is and how damaged it is.

A small network (`tools/train_recogniser.py`) that was trained on exact results of instructions for other photographs, before
and after the autoencoder, and on synthetic damage; never on edits or on perturbations that were sought. It sees the
edit and the source at 128 pixels, never the exact target.
"""

import json
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import nn

from .. import images, models
from . import thresholds
from .kinds import KINDS
from .verdict import Verdict

SIZE = 128                                                   # pixels a side of what the network sees
UNCHANGED = "unchanged"
BANDS, QUANTILES = 4, (0.1, 0.25, 0.5, 0.9)                  # octaves of detail, from the finest; of its strength
WEIGHTS = Path(models.__file__).parent / "miniature" / "recogniser" / "model.safetensors"


def class_of(kind, option):
    """The name of the class of a kind of instruction with an option."""
    return f"{kind}: {option}" if option else kind


def classes():
    """The names of all classes: the picture left as it was, then every kind with each of its options."""
    return [UNCHANGED, *(class_of(kind.name, option) for kind in KINDS.values() for option in kind.options)]


def recognise(sample, edited):
    """Judge an edit, a PIL picture of any size, by what the network reads off it.

    Semantic mismatch: the edit that was asked for has less than `thresholds.ASKED` of the probability. Perceptual
    degradation: the score of damage is above `thresholds.DAMAGED`. Raises FileNotFoundError if the shipped weights are
    missing.
    """
    probabilities, damage = read_edit(sample.image, edited)
    return verdict_by(probabilities[class_of(sample.kind, sample.option)], damage)


def verdict_by(asked, damage):
    """The verdict on an edit from the probability of the edit that was asked for, and the score of damage."""
    return Verdict.of(asked < thresholds.ASKED, damage > thresholds.DAMAGED)


@torch.no_grad()
def read_edit(source, edited):
    """({class: probability}, damage) of an edit of a source, both PIL pictures. The damage is in [0,1]."""
    network, names = load_recogniser()
    pixels = [images.resize(images.to_pixels(picture.convert("RGB")), SIZE, SIZE) for picture in (edited, source)]
    scores, damage = network(*pixels)
    return dict(zip(names, scores[0].softmax(0).tolist(), strict=True)), damage.sigmoid().item()


class Recogniser(nn.Module):
    """A network: edits and sources, each (B,3,128,128) in [0,1] -> (scores (B,classes), damage (B,), before a sigmoid).

    Two channels hold the place of each pixel: an edit is named by its changes and their places. Damage is scored by the
    strength of detail in both pictures (`texture`) and by the edit's name.
    """

    WIDTHS = (40, 56, 88, 104)

    def __init__(self, count):
        super().__init__()
        pairs = list(zip(self.WIDTHS, self.WIDTHS[1:], strict=False))
        self.stem = nn.Conv2d(8, self.WIDTHS[0], 4, stride=4)
        self.down = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in pairs)
        self.norms = nn.ModuleList(nn.GroupNorm(8, b) for _, b in pairs)
        self.deep = nn.ModuleList(nn.Conv2d(b, b, 3, padding=1) for _, b in pairs)
        self.edit = nn.Linear(2 * self.WIDTHS[-1], count)
        count = 2 * BANDS * 2 * (1 + len(QUANTILES)) + count
        self.damage = nn.Sequential(Standardised(count), nn.Linear(count, 48), nn.SiLU(), nn.Linear(48, 1))

    def forward(self, edit, source):
        scores = self.name(edit, source)
        return scores, self.damage(self.statistics(edit, source, scores))[:, 0]

    def statistics(self, edit, source, scores):
        """The features of the score of damage, one row a picture."""
        return torch.cat([texture(edit), texture(source), scores.softmax(1)], 1)

    def name(self, edit, source):
        """The scores (B,classes) alone."""
        down = torch.linspace(-1, 1, edit.shape[2], device=edit.device, dtype=edit.dtype).view(1, 1, -1, 1)
        places = [axis.expand(len(edit), 1, *edit.shape[2:]) for axis in (down, down.transpose(2, 3))]
        x = F.silu(self.stem(torch.cat([2 * edit - 1, 2 * source - 1, *places], 1)))
        for down, norm, deep in zip(self.down, self.norms, self.deep, strict=True):
            x = F.silu(norm(down(x)))
            x = x + F.silu(deep(x))
        return self.edit(torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1))


class Standardised(nn.Module):
    """Features (B,N) less their mean, over their standard deviation, as `set` found them."""

    def __init__(self, count):
        super().__init__()
        self.register_buffer("mean", torch.zeros(count))
        self.register_buffer("deviation", torch.ones(count))

    def set(self, features):
        """Take both from these features; a feature that never varies counts for nothing."""
        self.mean.copy_(features.mean(0))
        self.deviation.copy_(features.std(0) + 0.01)

    def forward(self, features):
        return (features - self.mean) / self.deviation


def texture(pixels):
    """Logarithms of the strength of detail, (B,BANDS*2*(1+QUANTILES)), in octaves: of light and of colour, mean and quantiles.

    False texture fills the flat parts, so it shows in the low quantiles; blur and washed-out detail show in all.
    """
    light = pixels.mean(1, keepdim=True)
    planes = torch.cat([light, (pixels - light).square().mean(1, keepdim=True).sqrt()], 1)
    found = []
    for _ in range(BANDS):
        coarse = F.avg_pool2d(planes, 2)
        band = (planes - F.interpolate(coarse, scale_factor=2)).abs().flatten(2)
        thin = band[..., ::max(1, band.shape[2] // 1021)]        # a thousand places are enough for quantiles
        found += [band.mean(2), *thin.quantile(torch.tensor(QUANTILES, dtype=band.dtype, device=band.device), 2)]
        planes = coarse
    return (torch.cat(found, 1) + 1e-3).log()


@lru_cache(maxsize=1)
def load_recogniser():
    """(the shipped network, frozen, the names of its classes); ValueError if its classes are not those of `KINDS`."""
    if not WEIGHTS.is_file():
        raise FileNotFoundError(f"{WEIGHTS} is missing: tools/train_recogniser.py makes it")
    with safe_open(WEIGHTS, framework="pt") as file:
        names = json.loads(file.metadata()["classes"])
        tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118 - not a dict
    if set(names) != set(classes()):
        raise ValueError(f"{WEIGHTS} knows other kinds of edit than kinds.py: train it anew by tools/train_recogniser.py")
    network = Recogniser(len(names))
    network.load_state_dict(tensors)
    return network.eval().requires_grad_(False), names
