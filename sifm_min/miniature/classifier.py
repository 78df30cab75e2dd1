"""The attribute classifier: a judge that reads attributes and damage off a picture with a small trained network."""

from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from .. import models
from . import world
from .oracle import UNNAMED, pixels_of
from .verdict import Verdict

DAMAGED, KEPT = 0.5, 0.7


def attribute_classifier(sample, edited, unnamed=None):
    """Judge an edit by its attributes. `unnamed`: category -> attributes to ignore.

    Raises FileNotFoundError if the shipped weights are missing.
    """
    network = load_classifier()
    with torch.no_grad():
        scores, damage = network(pixels_of(edited))
    wanted = sample.instruction.target
    read = {name: options[scores[f"{wanted.category}.{name}"].argmax(1).item()]
            for name, options in world.ATTRIBUTES[wanted.category].items()}
    visible = world.visible_attributes(wanted) - (unnamed or {}).get(wanted.category, set())
    changed = [name for name in sample.instruction.changed if name in visible]
    kept = [name for name in visible if name not in sample.instruction.changed]
    # A style hides all other attributes; then there is nothing to keep.
    still = sum(read[name] == wanted.values[name] for name in kept) / len(kept) if kept else 1.0
    degraded = damage.sigmoid().item() > DAMAGED or still < KEPT
    return Verdict.of(any(read[name] != wanted.values[name] for name in changed), degraded)


def caption_classifier(sample, edited):
    """Judge an img2img edit: like `attribute_classifier`, but only by attributes that the caption names."""
    return attribute_classifier(sample, edited, UNNAMED)


class Classifier(nn.Module):
    """A network: pictures (B,3,64,64) in [0,1] -> ({"category.attribute": scores (B, values)}, damage (B,))."""

    WIDTHS = (24, 48, 64, 96)

    def __init__(self):
        super().__init__()
        widths = (3, *self.WIDTHS)
        self.stages = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1)
                                    for a, b in zip(widths, widths[1:], strict=False))
        self.norms = nn.ModuleList(nn.GroupNorm(8, width) for width in self.WIDTHS)
        features = self.WIDTHS[-1] * (world.SCENE_SIZE // 16) ** 2
        self.heads = nn.ModuleDict({f"{category}_{name}": nn.Linear(features, len(options))
                                    for category, attributes in world.ATTRIBUTES.items()
                                    for name, options in attributes.items()})
        self.damage = nn.Linear(features, 1)

    def forward(self, pixels):
        x = 2 * pixels - 1
        for stage, norm in zip(self.stages, self.norms, strict=True):
            x = F.silu(norm(stage(x)))
        x = x.flatten(1)
        return {name.replace("_", ".", 1): head(x) for name, head in self.heads.items()}, self.damage(x)[:, 0]


@lru_cache(maxsize=1)
def load_classifier():
    """The shipped attribute classifier, frozen."""
    folder = Path(models.__file__).parent / "miniature" / "judge"
    network = Classifier()
    network.load_state_dict({name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()})
    return network.eval().requires_grad_(False)
