"""BlurGuard's blur: the perturbation is a blurred one, which purifiers remove less of than of fine noise.

    delta = clip(gain gauss(u, sigma), -eps, eps)            u is what the loop moves

arXiv 2511.00143 (NeurIPS 2025), and its released code. The original segments the picture and fits a sigma for each region to
the picture's spectrum; here the whole picture is one region, and sigma is given. The original has no bound on u. Here u is in
the loop's box and is multiplied by a gain, so that blurred noise is as strong as noise: 1 over the Euclidean norm of the
blur's weights, 3.5 at sigma 1. Start and steps are those of the loop; the original normalises the gradient in the L2 norm.
The perturbation is clipped last, to budget, range and mask, and where `pgd` has an `rms`, scaled down until it keeps that too;
the saved file is checked as for every method. Rounding to 8 bits adds an error of half a step at most, which is not blurred.
"""

import math

import torch

from ..pgd import pgd, within_rms
from ..purifiers.draws import blurred

SIGMAS = 0.3, 16.0                                           # below it is no blur, above it hardly a picture's detail


def check_sigma(sigma):
    """Raise ValueError for a standard deviation, in pixels, that this blur is not for."""
    if not SIGMAS[0] <= sigma <= SIGMAS[1]:
        raise ValueError(f"blur {sigma:g}: a standard deviation from {SIGMAS[0]:g} to {SIGMAS[1]:g} pixels")


def descend_blurred(pixels, objective, eps, *, sigma, mask=None, rms=None, **loop):
    """The perturbation, as `pgd` returns it, blurred: the arguments of `pgd`, and sigma in pixels."""
    whole = torch.as_tensor(eps, dtype=pixels.dtype, device=pixels.device).expand(pixels.shape)      # the budget of each value
    whole = whole if mask is None else whole * mask.to(pixels)

    def shaped(u):
        delta = blurred_delta(u, sigma, eps, pixels, mask)
        return delta if rms is None else within_rms(delta, whole, rms)

    # Around mid-grey the range of pixels does not end before the box of u does.
    grey = torch.full_like(pixels, 0.5)
    u = pgd(grey, lambda x, step: objective(pixels + shaped(x - 0.5), step), eps, rms=rms, **loop)
    return shaped(u).detach()


def blurred_delta(u, sigma, eps, pixels, mask=None):
    """delta (1,C,H,W) of u, shaped like `pixels`, in the budget eps, with pixels + delta in [0,1], and 0 where mask is."""
    radius = math.ceil(3 * sigma)
    impulse = torch.zeros(1, 1, 2 * radius + 1, 2 * radius + 1, dtype=u.dtype, device=u.device)
    impulse[..., radius, radius] = 1
    delta = blurred(u, sigma, radius) / blurred(impulse, sigma, radius).norm()
    eps = eps.to(pixels) if isinstance(eps, torch.Tensor) else eps
    delta = delta.clamp((-pixels).clamp(min=-eps), (1 - pixels).clamp(max=eps))
    return delta if mask is None else delta * mask.to(delta)
