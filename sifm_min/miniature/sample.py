"""Samples of the miniature's world: a picture, an instruction, the exact target, and five unseen instructions."""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from . import drawing, wording, world


@dataclass(frozen=True)
class Sample:
    """One picture of the world with an instruction and its exact result.

    image, target: 64x64 RGB PIL pictures. mask: (64,64) bool, the pixels that the instruction changes. unseen: the same
    picture with five other instructions, each a Sample of its own (without further unseen ones).
    """

    image: Image.Image
    instruction: wording.WordedEdit
    target: Image.Image
    mask: np.ndarray
    unseen: tuple = ()

    @property
    def prompt(self):
        return self.instruction.prompt

    @property
    def kind(self):
        return self.instruction.kind

    @property
    def category(self):
        return self.instruction.scene.category

    @property
    def target_caption(self):
        return world.caption(self.instruction.target)

    @property
    def unseen_prompts(self):
        return [sample.prompt for sample in self.unseen]

    @property
    def unseen_captions(self):
        return [sample.target_caption for sample in self.unseen]


def samples(n, seed=0, *, split="held-out"):
    """`n` samples, every kind of instruction equally likely, each with five unseen prompts of other kinds.

    split: "held-out" for scenes and phrases that are never used in training, "train" for the others.
    """
    if split not in ("held-out", "train"):
        raise ValueError(f"split {split!r}: choose held-out or train")
    held_out, rng, drawn = split == "held-out", world.generator(seed, split + " samples"), []
    while len(drawn) < n:
        kind, scene = rng.choice(wording.INSTRUCTION_KINDS), world.draw_scene(rng, held_out)
        while not (kind.applies(scene) and kind.colours(scene)):
            scene = world.draw_scene(rng, held_out)
        others = {instruction.kind: instruction for instruction in wording.instructions(scene, rng, held_out)}
        first = others.pop(kind.name)
        image = drawing.render(scene)
        drawn.append(_sample(image, first, tuple(_sample(image, other) for other in list(others.values())[:5])))
    return drawn


def _sample(image, instruction, unseen=()):
    target = drawing.render(instruction.target)
    return Sample(image, instruction, target, drawing.changed_share(image, target)[1], unseen)


def prompt_of(sample, editor):
    """The prompt for an editor: the instruction, or for img2img the caption of the target."""
    return sample.target_caption if editor.kind == "img2img" else sample.prompt
