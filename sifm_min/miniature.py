"""The miniature: samples of the procedural world with their ground truth, and the two judges that know it.

The miniature editors (`load_editor("miniature")`, `"miniature-plain"`, `"miniature-sd3"`) are for learning, testing and
benchmarking. What is measured with them says nothing about protection against real editors.

`judge(sample, edited)` is the strict consensus of two independent judges, each an OR of two findings as in the paper.
`judges` holds both, callables like any other judges, so that `isr.ask` turns them into records:

pixel oracle: compares the edit O with the exact target T and the source S. With M the pixels that the instruction
  changes (more than 0.06 of the range), progress p = <O-S, T-S>_M / |T-S|^2_M and residual r = |O-T|_M / |T-S|_M.
  Semantic mismatch: p < 0.5 or r > 0.6. Perceptual degradation: PSNR(O, T) < 18 dB, or PSNR(O, S) outside M < 19 dB
  (where at least 200 pixels are outside), or SSIM(O, T) < 0.60.
attribute classifier: a small network trained on renderings, never on edits. Semantic mismatch: an attribute that the
  instruction changes is not read as asked for. Perceptual degradation: its damage head, trained on synthetic damage,
  says damaged, or fewer than 70 % of the attributes that the instruction leaves alone are still read as they were.

Img2img repaints the whole picture from a caption, so its edits may stand a little elsewhere and look as they like where the
caption says nothing (the skin). `caption_judges` are the same two with the same thresholds, which allow for just that: the
oracle draws source and target in the pose that is nearest to the edit, and compares with that target outside M; the
classifier asks only for attributes that the caption names.

`tools/measure_miniature.py judges` prints how the thresholds sit: what share of autoencoded targets, of untouched sources
and of wrong-prompt edits each judge calls obeyed. They were set on clean pictures and never moved for a method.
"""

import random
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from . import metrics, models, world
from .isr import Verdict

NOTICE = "The miniature is for learning, testing and benchmarking; it protects nothing against real editors."


@dataclass(frozen=True)
class Sample:
    """One picture of the world with an instruction and what it should look like afterwards.

    image, target: 64x64 RGB PIL pictures. mask: (64,64) bool, the pixels that the instruction changes. unseen: the same
    picture with five other instructions, each a Sample of its own (without further unseen ones).
    """

    image: Image.Image
    instruction: world.Instruction
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

    split "held-out": scenes and wordings that training never shows; "train": those that it may. The two never overlap.
    """
    if split not in ("held-out", "train"):
        raise ValueError(f"split {split!r}: choose held-out or train")
    held_out, rng, found = split == "held-out", world.generator(seed, split + " samples"), []
    while len(found) < n:
        kind, scene = rng.choice(world.KINDS), world.draw(rng, held_out)
        while not (kind.applies(scene) and kind.colours(scene)):
            scene = world.draw(rng, held_out)
        asked = {instruction.kind: instruction for instruction in world.instructions(scene, rng, held_out)}
        first = asked.pop(kind.name)
        image = world.render(scene)
        found.append(_sample(image, first, tuple(_sample(image, other) for other in list(asked.values())[:5])))
    return found


def _sample(image, instruction, unseen=()):
    target = world.render(instruction.target)
    return Sample(image, instruction, target, world.changed_share(image, target)[1], unseen)


# -- judges --------------------------------------------------------------------------------------------------------------

UNNAMED = {"portrait": {"skin"}, "landscape": set(), "artwork": set()}            # what `world.caption` leaves open
PROGRESS, RESIDUAL = 0.5, 0.6
TARGET_PSNR, OUTSIDE_PSNR, OUTSIDE_PIXELS, TARGET_SSIM = 18.0, 19.0, 200, 0.60
DAMAGED, KEPT = 0.5, 0.7


def pixel_oracle(sample, edited):
    """The judge that compares with the exact target; see the module's docstring."""
    return _compared(edited, sample.image, sample.target, sample.mask, unchanged=sample.image)


def posed_oracle(sample, edited):
    """The same judge for img2img: the exact target is drawn where the edit stands; see the module's docstring."""
    asked = sample.instruction
    jitter, open_values = pose(asked.target, edited)
    source, target = (world.render(replace(scene, jitter=jitter).changed(open_values)) for scene in (asked.scene, asked.target))
    mask = world.changed_share(source, target)[1]
    return _compared(edited, source, target, mask if mask.any() else sample.mask, unchanged=target)


def _compared(edited, source, target, mask, unchanged):
    """The oracles' verdict; `unchanged` is what the edit should look like outside the mask."""
    output, source, target, unchanged = (_pixels(picture) for picture in (edited, source, target, unchanged))
    inside = torch.from_numpy(mask)
    asked, done = (target - source)[0, :, inside], (output - source)[0, :, inside]
    progress = (done * asked).sum() / asked.square().sum()
    residual = (done - asked).norm() / asked.norm()
    outside = (output - unchanged)[0, :, ~inside]
    spoiled = (~inside).sum() >= OUTSIDE_PIXELS and _psnr(outside) < OUTSIDE_PSNR
    degraded = bool(spoiled) or _psnr(output - target) < TARGET_PSNR or metrics.ssim(output, target).item() < TARGET_SSIM
    return Verdict.of(progress < PROGRESS or residual > RESIDUAL, degraded)


def pose(scene, edited):
    """(jitter, {attribute: value}) of the rendering of `scene` that is nearest to `edited`, over the jitter and over what a
    caption leaves open. A seeded search, the same for everybody: forty draws, then steps along each number, halved twice."""
    rng, wanted = random.Random(0), _pixels(edited)[0].permute(1, 2, 0).numpy()
    name = next(iter(UNNAMED[scene.category] & visible_attributes(scene)), None)
    choices = [{name: value} for value in world.ATTRIBUTES[scene.category][name]] if name else [{}]

    def cost(jitter, values):
        drawn = np.asarray(world.render(replace(scene, jitter=jitter).changed(values)), np.float32) / 255
        return float(np.square(drawn - wanted).mean())

    values = min(choices, key=lambda values: cost(scene.jitter, values))
    best, least = scene.jitter, cost(scene.jitter, values)

    def attempt(jitter):
        nonlocal best, least
        if (found := cost(jitter, values)) < least:
            best, least = jitter, found

    for _ in range(40):
        attempt(tuple(rng.uniform(-1, 1) for _ in best))
    for step in (0.35, 0.175, 0.0875):
        for axis in range(len(best)):
            for move in (-step, step):
                attempt(tuple(max(-1, min(1, j + move * (i == axis))) for i, j in enumerate(best)))
    return best, min(choices, key=lambda values: cost(best, values))


def attribute_classifier(sample, edited, unnamed=None):
    """The judge that reads attributes; see the module's docstring. Raises FileNotFoundError without its shipped weights."""
    network = load_classifier()
    with torch.no_grad():
        scores, damage = network(_pixels(edited))
    wanted = sample.instruction.target
    read = {name: options[scores[f"{wanted.category}.{name}"].argmax(1).item()] for name,
            options in world.ATTRIBUTES[wanted.category].items()}
    visible = visible_attributes(wanted) - (unnamed or {}).get(wanted.category, set())
    changed = [name for name in sample.instruction.changed if name in visible]
    kept = [name for name in visible if name not in sample.instruction.changed]
    still = sum(read[name] == wanted.values[name] for name in kept) / len(kept) if kept else 1.0      # a style hides them all
    degraded = damage.sigmoid().item() > DAMAGED or still < KEPT
    return Verdict.of(any(read[name] != wanted.values[name] for name in changed), degraded)


def caption_classifier(sample, edited):
    """The same judge for img2img: of what should stay, only what the caption names."""
    return attribute_classifier(sample, edited, UNNAMED)


judges = {"pixel oracle": pixel_oracle, "attribute classifier": attribute_classifier}
caption_judges = {"pixel oracle": posed_oracle, "attribute classifier": caption_classifier}


def judges_of(editor):
    """The two judges for an editor's kind of edit: by an instruction, or img2img by a caption of the result."""
    return caption_judges if editor.kind == "img2img" else judges


def prompt_of(sample, editor):
    """What an editor is told: the instruction, or for img2img the caption of the picture asked for."""
    return sample.target_caption if editor.kind == "img2img" else sample.prompt


def judge(sample, edited, editor=None):
    """The strict consensus of both judges on `edited`, a picture of any size (it is judged at 64x64). editor: whose edit it
    is, where that may be img2img; without it, an edit by an instruction."""
    asked = judges_of(editor) if editor else judges
    return Verdict.consensus(one(sample, edited) for one in asked.values())


def _pixels(picture):
    picture = picture.convert("RGB")
    if picture.size != (world.SIZE, world.SIZE):
        picture = picture.resize((world.SIZE, world.SIZE), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255


def _psnr(difference):
    return (-10 * torch.log10(difference.square().mean().clamp(min=1e-12))).item()


def visible_attributes(scene):
    """The attributes that the scene's picture shows: what a hat, a style or another being hides is not asked about."""
    v, shown = scene.values, set(world.ATTRIBUTES[scene.category]) - world.INVISIBLE
    if v["style"] != "plain":
        return {"style"}
    if scene.category == "portrait":
        if v["being"] != "human":
            shown -= {"skin", "hair", "haircut"}
        if v["being"] == "alien":
            shown -= {"beard"}
        if v["being"] == "zombie":
            shown -= {"clothes"}
        if v["haircut"] == "bald":
            shown -= {"hair"}
        if v["hat"] != "none":
            shown -= {"haircut", "hair"}
    elif scene.category == "landscape":
        if v["sky"] != "natural":
            shown -= {"time"}
    else:
        shown -= {"shapes"} if v["subject"] == "still life" else {"table", "vase", "flowers"}
    return shown


class Classifier(nn.Module):
    """Pictures (B,3,64,64) in [0,1] -> scores per attribute, "category.attribute" -> (B, values), and damage (B,)."""

    WIDTHS = (24, 48, 64, 96)

    def __init__(self):
        super().__init__()
        widths = (3, *self.WIDTHS)
        self.stages = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1) for a,
                                    b in zip(widths, widths[1:], strict=False))
        self.norms = nn.ModuleList(nn.GroupNorm(8, width) for width in self.WIDTHS)
        features = self.WIDTHS[-1] * (world.SIZE // 16) ** 2
        self.heads = nn.ModuleDict({f"{category}_{name}": nn.Linear(features, len(options))
                                    for category, attributes in world.ATTRIBUTES.items() for name,
                                    options in attributes.items()})
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
