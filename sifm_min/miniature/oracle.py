"""The pixel oracle: the judge that compares an edit with the exact target. `consensus.py` has its thresholds in words."""

import random
from dataclasses import replace

import numpy as np
import torch
from PIL import Image

from .. import metrics
from . import drawing, world
from .verdict import Verdict

UNNAMED = {"portrait": {"skin"}, "landscape": set(), "artwork": set()}        # attributes that `world.caption` does not name
PROGRESS, RESIDUAL = 0.5, 0.6
TARGET_PSNR, OUTSIDE_PSNR, OUTSIDE_PIXELS, TARGET_SSIM = 18.0, 19.0, 200, 0.60


def pixel_oracle(sample, edited):
    """Judge an edit by an instruction: compare it with the exact target."""
    return _compared(edited, sample.image, sample.target, sample.mask, unchanged=sample.image)


def posed_oracle(sample, edited):
    """Judge an img2img edit: draw source and target in the pose of the edit, then compare with that target."""
    instruction = sample.instruction
    jitter, open_values = pose(instruction.target, edited)
    source, target = (drawing.render(replace(scene, jitter=jitter).changed(open_values))
                      for scene in (instruction.scene, instruction.target))
    mask = drawing.changed_share(source, target)[1]
    return _compared(edited, source, target, mask if mask.any() else sample.mask, unchanged=target)


def _compared(edited, source, target, mask, unchanged):
    """The oracle's Verdict. `unchanged`: the picture that the edit should equal outside the mask."""
    output, source, target, unchanged = (pixels_of(picture) for picture in (edited, source, target, unchanged))
    inside = torch.from_numpy(mask)
    wanted, done = (target - source)[0, :, inside], (output - source)[0, :, inside]
    progress = (done * wanted).sum() / wanted.square().sum()
    residual = (done - wanted).norm() / wanted.norm()
    outside = (output - unchanged)[0, :, ~inside]
    spoiled = (~inside).sum() >= OUTSIDE_PIXELS and _psnr(outside) < OUTSIDE_PSNR
    degraded = bool(spoiled) or _psnr(output - target) < TARGET_PSNR or metrics.ssim(output, target).item() < TARGET_SSIM
    return Verdict.of(progress < PROGRESS or residual > RESIDUAL, degraded)


def pose(scene, edited):
    """(jitter, {attribute: value}) of the rendering of `scene` that is nearest to `edited`.

    The search goes over the jitter and over the attribute that a caption does not name. It is seeded, so it is
    deterministic: forty random draws, then steps along each number of the jitter, halved twice.
    """
    rng, wanted = random.Random(0), pixels_of(edited)[0].permute(1, 2, 0).numpy()
    name = next(iter(UNNAMED[scene.category] & world.visible_attributes(scene)), None)
    choices = [{name: value} for value in world.ATTRIBUTES[scene.category][name]] if name else [{}]

    def cost(jitter, values):
        drawn = np.asarray(drawing.render(replace(scene, jitter=jitter).changed(values)), np.float32) / 255
        return float(np.square(drawn - wanted).mean())

    values = min(choices, key=lambda values: cost(scene.jitter, values))
    best, least = scene.jitter, cost(scene.jitter, values)

    def attempt(jitter):
        nonlocal best, least
        if (error := cost(jitter, values)) < least:
            best, least = jitter, error

    for _ in range(40):
        attempt(tuple(rng.uniform(-1, 1) for _ in best))
    for step in (0.35, 0.175, 0.0875):
        for axis in range(len(best)):
            for move in (-step, step):
                attempt(tuple(max(-1, min(1, j + move * (i == axis))) for i, j in enumerate(best)))
    return best, min(choices, key=lambda values: cost(best, values))


def pixels_of(picture):
    """The picture at 64x64 as (1,3,64,64) in [0,1]."""
    picture = picture.convert("RGB")
    if picture.size != (world.SCENE_SIZE, world.SCENE_SIZE):
        picture = picture.resize((world.SCENE_SIZE, world.SCENE_SIZE), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255


def _psnr(difference):
    """The PSNR in dB of a difference of pixels in [0,1], at most 120."""
    return (-10 * torch.log10(difference.square().mean().clamp(min=1e-12))).item()
