"""Visibility of a change: its just-noticeable size at each pixel, a budget from it, and one number for two pictures.

A short model after the literature on just-noticeable differences. The constants are ours, but where a source is named.

- Luminance: the threshold of Chou and Li 1995 (doi:10.1109/76.475889) for the mean of the surroundings. It is least at
  mid-grey and rises towards white, and faster towards black. The rise ends at `BRIGHTEST`, for it was measured on CRTs.
- Contrast: a texture hides changes in proportion to its own contrast (Legge and Foley 1980, doi:10.1364/JOSA.70.001458).
- Both: their sum without the overlap, after Yang et al. 2005 (doi:10.1109/TCSVT.2004.841690).
- Edges: a smooth area beside an edge hides nothing, and an edge hides less than a texture (Liu et al. 2010,
  doi:10.1109/TCSVT.2010.2070850). So a pixel's threshold is the least of nine windows that contain it: beside an edge,
  one of them avoids the edge.
- Chroma: a change of blue or red is seen less than one of green, in the order of the luma's weights (BT.601). A step of all
  three channels together is as visible as one threshold of the luma.
"""

import torch
from torch.nn import functional as F

from .pixels import YIQ, checked, luma

STEP = 1 / 255                                               # of an 8-bit picture
BASE = 1.5 * STEP                                            # just noticeable on flat mid-grey
SLOPE = 0.4                                                  # of the threshold, per standard deviation of the luma
OVERLAP = 0.3                                                # of the two terms (Yang et al.: 0.3)
BRIGHTEST = 1.6                                              # largest factor of the luminance
CHROMA = 0.1                                                 # power of the luma's weights
WINDOW = 5                                                   # pixels a side
FULL = 6 * STEP                                              # the threshold from which on a pixel has the whole budget
RMS = 3 ** -0.5                                              # of a perturbation over its budget, at most: as uniform noise has


def thresholds(pixels):
    """The just-noticeable change of every value: pixels (B,C,H,W) in [0,1], C 1 or 3 -> the same shape, on [0,1], above 0."""
    plane = luma(pixels)[:, None]
    mean = _window_mean(plane)
    centred = plane - 0.5                                    # small squares have more digits
    contrast = (_window_mean(centred.square()) - (mean - 0.5).square()).clamp(min=0).sqrt()
    light = mean / STEP                                      # in 8-bit steps, as Chou and Li have it
    luminance = (17 * (1 - (light / 127).clamp(max=1).sqrt()) + 3 + 3 / 128 * (light - 127).clamp(min=0)) / 3
    smooth, texture = BASE * luminance.clamp(max=BRIGHTEST), SLOPE * contrast
    threshold = _least(smooth + texture - OVERLAP * torch.minimum(smooth, texture))
    return threshold * _of_channels(threshold) if pixels.shape[1] == 3 else threshold


def texture_budget(pixels, eps):
    """A budget for every value, small where a picture is smooth: pixels as for `thresholds` -> whole 8-bit steps, on [0,1].

    eps times threshold / FULL, rounded to steps of 1/255, from one step to the whole steps in eps. The loop also bounds the
    root mean square of the perturbation over this budget, by RMS (`rms` of `pgd`): with eps 10/255 a value changes by about its
    threshold in the root mean square, and by less where the budget ends at eps. Raises ValueError for pixels out of range.

    In proportion to the threshold, and not steeper: SSIM loses about d^2 / (2 s^2 + c) where a value changes by d at a place of
    deviation s, and the loop spends a given sum of (d / budget)^2 where it moves the loss most. That costs least SSIM for a
    budget in proportion to sqrt(2 s^2 + c), which grows about as s does.
    """
    pixels, _ = checked(pixels, pixels)
    steps = (eps / STEP * thresholds(pixels) / FULL).round()
    return steps.clamp(1, max(int(eps / STEP + 1e-9), 1)) * STEP


def visibility(dist, ref):
    """The 95th percentile of |dist - ref| over the just-noticeable change of ref, (B,): up to 1, a change is hard to see.

    dist, ref: (B,C,H,W) in [0,1]. 2 says that one value in twenty differs by more than twice what is just noticeable at its
    place. Equal pictures have 0. Not symmetric: the surroundings that hide a change are those of `ref`.
    """
    dist, ref = checked(dist, ref)
    ratios = ((dist - ref).abs() / thresholds(ref)).flatten(1)
    return ratios.kthvalue(-(-ratios.shape[1] * 19 // 20), 1).values      # quantile() takes at most 16 million values


def _of_channels(like):
    """The factors of red, green and blue, (3,1,1)."""
    weights = torch.tensor(YIQ[0], dtype=like.dtype, device=like.device)
    share = weights ** -CHROMA
    return (share / (share * weights).sum())[:, None, None]


def _window_mean(plane):
    """The mean in the window around each pixel, (B,1,H,W); at the border, of the part of the window in the picture."""
    return F.avg_pool2d(plane, WINDOW, stride=1, padding=WINDOW // 2, count_include_pad=False)


def _least(plane):
    """The least value of a plane (B,1,H,W) at each pixel and at its eight neighbours half a window away."""
    aside, (height, width) = WINDOW // 2, plane.shape[2:]
    around, least = F.pad(plane, (aside,) * 4, mode="replicate"), plane
    for down in (0, aside, 2 * aside):
        for right in (0, aside, 2 * aside):
            least = torch.minimum(least, around[:, :, down:down + height, right:right + width])
    return least
