"""FSIM: phase congruency and gradients, the features that edges have at every scale and contrast."""

import math
from functools import lru_cache

import torch
from torch.nn import functional as F

from .pixels import YIQ, checked, each_picture, luma, mix, quotient, reduced, root, tiny

# ----------------------------------------------------------------------------------------------------------------- FSIM

T1, T2, T3, T4, CHROMA_POWER = 0.85, 160, 200, 200, 0.03     # for values in 0..255
SCALES, ORIENTATIONS, WAVELENGTH, STEP, SIGMA_ON_F = 4, 4, 6, 2, 0.55
THETA_SIGMA, NOISE_K, CUTOFF, SHARPNESS = math.pi / ORIENTATIONS / 1.2, 2, 0.45, 15


def fsim(dist, ref, *, chromatic=True):
    """Feature similarity, (B,), 1 for equal pictures: FSIMc for RGB; FSIM, of the luma, for grey or not `chromatic`.

    As Zhang et al. 2011 (doi:10.1109/TIP.2011.2109730) and their `FeatureSIM.m` define it, symmetric; pictures are first
    reduced to about 256 pixels a side by the mean of blocks. Equals `FeatureSIM.m` at 512x512 to 1e-5, and piq's
    `fsim`: to 1e-5 for luma, 4e-3 for FSIMc (piq has other digits of YIQ, and takes the modulus where a negative chroma
    similarity has a complex power; the real part is meant). Two flat pictures have no features: nan, unless they are
    equal. Pictures below 8 pixels a side are refused.
    """
    dist, ref = checked(dist, ref, smallest=8)
    if (factor := int(min(dist.shape[2:]) / 256 + 0.5)) > 1:
        dist, ref = reduced(dist, factor), reduced(ref, factor)
    return each_picture(_fsimc if chromatic and dist.shape[1] == 3 else _fsim, dist, ref)


def _fsim(dist, ref, similarity=1):
    x, y = 255 * luma(dist), 255 * luma(ref)
    pc_x, pc_y = _phase_congruency(x), _phase_congruency(y)
    similarity = similarity * _alike(pc_x, pc_y, T1) * _alike(_gradient(x), _gradient(y), T2)
    pc = torch.maximum(pc_x, pc_y)
    return quotient((similarity * pc).sum((1, 2)), pc.sum((1, 2)), dist, ref)


def _fsimc(dist, ref):
    i_x, q_x, i_y, q_y = (255 * mix(pixels, weights) for pixels in (dist, ref) for weights in YIQ[1:])
    chroma = _alike(i_x, i_y, T3) * _alike(q_x, q_y, T4)
    # The real part of chroma ** 0.03, which is complex where hues are opposed.
    power = chroma.abs().clamp(min=tiny(chroma)) ** CHROMA_POWER
    return _fsim(dist, ref, torch.where(chroma < 0, math.cos(CHROMA_POWER * math.pi), 1.0) * power)


def _alike(x, y, constant):
    """The similarity of two maps, 1 where they are equal: SSIM's ratio with a constant that keeps it finite."""
    return (2 * x * y + constant) / (x * x + y * y + constant)


def _gradient(plane):
    """The magnitude of the Scharr gradient of planes (B,H,W), zero around them."""
    plane = F.pad(plane, (1, 1, 1, 1)) / 16
    across = plane[:, :, 2:] - plane[:, :, :-2]
    across = 3 * (across[:, :-2] + across[:, 2:]) + 10 * across[:, 1:-1]
    down = plane[:, 2:] - plane[:, :-2]
    down = 3 * (down[:, :, :-2] + down[:, :, 2:]) + 10 * down[:, :, 1:-1]
    return root(across * across + down * down)


def _phase_congruency(plane):
    """The agreement in phase of the frequencies of planes (B,H,W) at each pixel, 0 to 1: Kovesi's `phasecong2`."""
    low, high = plane.detach().amin((1, 2), keepdim=True), plane.detach().amax((1, 2), keepdim=True)
    spectrum = torch.fft.fft2(plane - (low + high) / 2)      # the filters ignore the mean; a flat plane is exactly 0
    energy = amplitude = 0
    for filters, noise in zip(*_filters(*plane.shape[1:], plane.dtype, plane.device), strict=True):     # orientations
        response = torch.fft.ifft2(spectrum[:, None] * filters)                                         # (B, scale, H, W)
        even, odd = response.real.contiguous(), response.imag.contiguous()
        squares = even * even + odd * odd
        sum_even, sum_odd = even.sum(1), odd.sum(1)
        squared = sum_even * sum_even + sum_odd * sum_odd
        size = root(squared) + 1e-4                         # length of the sum; its direction is the mean phase
        astray = (even * (sum_odd / size)[:, None] - odd * (sum_even / size)[:, None]).abs().sum(1)
        threshold = noise * root(_median(squares[:, 0].flatten(1)))[:, None, None]
        energy = energy + (squared / size - astray - threshold).clamp(min=0)
        amplitude = amplitude + root(squares).sum(1)
    return energy / amplitude                                # `_root` keeps the amplitude above 0


@lru_cache(maxsize=8)
def _filters(height, width, dtype, device):
    """The log-Gabor filters (orientation, scale, H, W) in the order of `fft2`, and each orientation's noise factor.

    The factor times the median response at the finest scale is the energy of noise alone: its mean plus two deviations,
    over 1.7, under the assumption that this median is that of noise with a Rayleigh distribution.
    """
    with torch.inference_mode(False), torch.device("cpu"):   # cached: later calls may need gradients
        rows, columns = (torch.fft.ifftshift((torch.arange(n, dtype=torch.float64) - n // 2) / (n - n % 2))
                         for n in (height, width))
        radius = torch.sqrt(rows[:, None] ** 2 + columns**2)
        angle = torch.atan2(-rows[:, None], columns)
        radius[0, 0] = 1
        low_pass = 1 / (1 + (radius / CUTOFF) ** (2 * SHARPNESS))
        bank, factors = [], []
        for orientation in range(ORIENTATIONS):
            towards = orientation * math.pi / ORIENTATIONS
            apart = torch.atan2(torch.sin(angle - towards), torch.cos(angle - towards)).abs()
            spread = torch.exp(-(apart**2) / (2 * THETA_SIGMA**2))
            filters = []
            for scale in range(SCALES):
                log_gabor = torch.exp(-torch.log(radius * WAVELENGTH * STEP**scale) ** 2 / (2 * math.log(SIGMA_ON_F) ** 2))
                log_gabor[0, 0] = 0
                filters.append(log_gabor * low_pass * spread)
            bank.append(torch.stack(filters))
            # White noise of power P at the finest scale sums over the scales to P * `gathered`, by Parseval's theorem, for
            # the even halves of the filters (their values at k and -k, averaged).
            together = sum(filters)
            together = (together + torch.roll(together.flip(0, 1), (1, 1), (0, 1))) / 2
            gathered = together.square().sum() / filters[0].square().sum()
            tau = math.sqrt(gathered / math.log(2))
            factors.append(tau * (math.sqrt(math.pi / 2) + NOISE_K * math.sqrt(2 - math.pi / 2)) / 1.7)
        return torch.stack(bank).to(device, dtype), factors


def _median(values):
    """The median of each row, (B,N) -> (B,); for an even N the mean of the two middle values."""
    lower = values.median(1).values
    below = values <= lower[:, None]
    above = values.masked_fill(below, math.inf).amin(1)
    return (lower + torch.where(below.sum(1) > values.shape[1] // 2, lower, above)) / 2
