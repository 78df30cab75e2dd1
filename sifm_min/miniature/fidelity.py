"""The exact oracle of photographs: the judge that compares an edit with the exact target.

An autoencoder gives no picture back exactly, so an editor cannot reach the target. What it loses is measured on the target
itself: T is the target, A the target after the autoencoder, S the source, O the edit.

Obedience, at half resolution. M holds the pixels where T differs visibly from S (`kinds.changed`).
  progress p = <O-S, T-S>_M / |T-S|^2_M
  residual r = sqrt(max(0, |O-T|^2_M - |A-T|^2_M)) / |T-S|_M     the distance from the target beyond the autoencoder's own
  outside  o = the RMS of O-S outside M, beyond that of A-S in the same way
Semantic mismatch: p, r or o beyond its threshold. Where source and target are close, as in black and white, the
autoencoder's error is a large part of |T-S|; that is why r leaves it out.

Damage, compared with T at the picture's full resolution.
  structure d = SSIM(A,T) - SSIM(O,T), one part at full and two parts at half resolution: false texture, noise, blocks.
    (Fine grain costs much SSIM at full resolution, and is hardly seen.)
  contrast  c = the share that O lacks of the local contrast (a window's standard deviation) that A and T both have: blur,
    washed-out detail
Perceptual degradation: d or c beyond its threshold. A picture that was left as it was is not followed, but it is not damaged
either: after a mismatch d and c are those towards the source where these are smaller.

**The autoencoder is always the shipped copy of the latent space of Stable Diffusion 1.x**, not the editor's own. So a verdict
depends on the pictures alone: the same edit has the same verdict on every machine, whichever editor made it, and recorded
edits can be judged without their editor. An editor with a better autoencoder is judged a little too leniently by this, in all
its arms alike.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from PIL import Image

from .. import images, metrics
from ..metrics.pixels import gaussian, luma, reduced, window_mean
from ..metrics.structure import SIGMA, WINDOW
from ..models import latent_spaces
from . import thresholds
from .kinds import changed
from .verdict import Verdict


@dataclass(frozen=True)
class Measures:
    """The oracle's measures of one edit: see the head of this file."""

    progress: float
    residual: float
    outside: float
    structure: float
    contrast: float

    @property
    def followed(self):
        return (self.progress >= thresholds.PROGRESS and self.residual <= thresholds.RESIDUAL
                and self.outside <= thresholds.OUTSIDE)

    @property
    def damaged(self):
        return self.structure > thresholds.STRUCTURE or self.contrast > thresholds.CONTRAST

    @property
    def verdict(self):
        return Verdict.of(not self.followed, self.damaged)


def exact_oracle(sample, edited):
    """Judge an edit, a PIL picture of any size, by comparing it with the sample's exact target."""
    return measures_of(sample, edited).verdict


@torch.no_grad()
def measures_of(sample, edited):
    """The `Measures` of an edit; a picture of another size than the target is scaled to the target's."""
    source, target = images.to_pixels(sample.image), images.to_pixels(sample.target)
    edit = images.resize(images.to_pixels(edited.convert("RGB")), *target.shape[2:])
    lost = autoencoded(sample.target)
    inside = torch.from_numpy(changed(*(np.asarray(p, np.float32) / 255 for p in (sample.image, sample.target))))
    s, t, o, a = (reduced(pixels, 2) for pixels in (source, target, edit, lost))
    way = (t - s)[..., inside]
    length = way.square().sum().clamp(min=1e-12)
    progress = ((o - s)[..., inside] * way).sum() / length
    residual = _beyond((o - t)[..., inside].square().sum(), (a - t)[..., inside].square().sum()) / length.sqrt()
    outside = torch.zeros(())
    if (~inside).float().mean() >= thresholds.OUTSIDE_SHARE:
        outside = _beyond((o - s)[..., ~inside].square().mean(), (a - s)[..., ~inside].square().mean())
    measures = Measures(progress.item(), residual.item(), outside.item(), *_damage(edit, target, lost))
    if measures.followed:
        return measures
    towards_source = _damage(edit, source, autoencoded(sample.image))
    return Measures(progress.item(), residual.item(), outside.item(),
                    *min((measures.structure, measures.contrast), towards_source))


def _beyond(square, of_autoencoder):
    """The root of a sum or mean of squares less the autoencoder's own, at least 0."""
    return (square - of_autoencoder).clamp(min=0).sqrt()


def _damage(edit, wanted, lost):
    """(structure, contrast) of an edit towards the picture `wanted`, which the autoencoder gives back as `lost`."""
    structure = 0
    for n in (1, 2):                                         # full and half resolution; also the number of parts
        at_best, found = (metrics.ssim(reduced(pixels, n), reduced(wanted, n)) for pixels in (lost, edit))
        structure = structure + n / 3 * (at_best - found)
    expected = torch.minimum(_contrast(wanted), _contrast(lost))
    contrast = (expected - _contrast(edit)).clamp(min=0).sum() / expected.sum().clamp(min=1e-12)
    return structure.item(), contrast.item()


def _contrast(pixels):
    """The standard deviation of the luma in every window of SSIM's shape: (1,3,H,W) -> (1,H-10,W-10)."""
    plane, window = luma(pixels), gaussian(WINDOW, SIGMA)
    mean = window_mean(plane, window)
    return (window_mean(plane * plane, window) - mean * mean).clamp(min=0).sqrt()


def autoencoded(image):
    """The pixels (1,3,H,W) in [0,1] that the reference autoencoder makes of a PIL picture, sides multiples of 8."""
    return _autoencoded(image.convert("RGB").tobytes(), image.size)


@lru_cache(maxsize=64)
def _autoencoded(content, size):
    pixels = images.to_pixels(Image.frombytes("RGB", size, content))
    network = reference()
    with torch.no_grad():
        return (network.decode(network.encode(2 * pixels - 1)[0]) / 2 + 0.5).clamp(0, 1)


@lru_cache(maxsize=1)
def reference():
    """The autoencoder that the oracle measures losses by: the shipped copy of the space "sd1", in float32."""
    checkpoint = latent_spaces.copy_of(latent_spaces.SPACES["sd1"])
    if checkpoint is None:
        raise FileNotFoundError(f"{latent_spaces.COPIES / 'sd1'} is missing: the oracle measures losses by this autoencoder")
    return checkpoint.network(dtype=torch.float32).eval()
