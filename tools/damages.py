"""Synthetic damage of stated strength, for the training of the recogniser and the calibration of both judges.

Each damage has a limit: the strength from which on a person would not publish the picture, judged by eye on contact sheets of
photographs of 256 pixels (28 November 2026). `level` turns a strength into a score of damage: 0.5 at the limit. Sizes are of a
picture of 256 pixels and scale with the picture. None of these damages is an edit or was sought against a network.
"""

import math

import torch
import torch.nn.functional as F

from sifm_min.purifiers.draws import blurred


def blur(pixels, sigma, generator):
    """Blur by a Gaussian of `sigma` pixels."""
    sigma = sigma * pixels.shape[3] / 256
    return blurred(pixels, sigma, max(1, math.ceil(3 * sigma)))


def blocks(pixels, side, generator):
    """Squares of one colour, of `side` pixels."""
    count = max(1, round(256 / side))
    return F.interpolate(F.interpolate(pixels, size=(count, count), mode="area"), size=pixels.shape[2:], mode="nearest")


def noise(pixels, sigma, generator):
    """White noise of standard deviation `sigma` at 256 pixels; a smaller picture has the mean of it."""
    sigma = sigma * pixels.shape[3] / 256
    return (pixels + sigma * torch.randn(pixels.shape, generator=generator)).clamp(0, 1)


def washed_out(pixels, share, generator):
    """The contrast lowered by a share."""
    return pixels + share * (pixels.mean((2, 3), keepdim=True) - pixels)


def texture(pixels, rms, generator):
    """False texture: random curls or ridges of 6 to 20 pixels, mostly without colour, of this RMS."""
    period = 6 + 14 * torch.rand((), generator=generator).item()
    side = max(4, round(256 / period))
    field = torch.randn(len(pixels), 4, side, side, generator=generator)
    field = F.interpolate(field, size=pixels.shape[2:], mode="bicubic")
    if torch.rand((), generator=generator) < 0.5:
        field = field.abs()                                  # ridges along the zeros
    field = field - field.mean((2, 3), keepdim=True)
    pattern = field[:, :1] + 0.5 * field[:, 1:]
    pattern = pattern / pattern.square().mean((1, 2, 3), keepdim=True).sqrt()
    return (pixels + rms * pattern).clamp(0, 1)


def stains(pixels, rms, generator):
    """Smooth false colours of 32 pixels or more, of this RMS."""
    field = F.interpolate(torch.randn(len(pixels), 3, 7, 7, generator=generator), size=pixels.shape[2:], mode="bicubic")
    return (pixels + rms * field / field.square().mean((1, 2, 3), keepdim=True).sqrt()).clamp(0, 1)


def latent_noise(latent, strength, generator, smooth=False):
    """A latent with white or smooth noise of `strength` standard deviations of itself; decoded, it shows false texture."""
    drawn = torch.randn(latent.shape, generator=generator)
    if smooth:
        drawn = blur(drawn, 256 / latent.shape[3], generator)        # a sigma of one latent pixel
        drawn = drawn / drawn.std((1, 2, 3), keepdim=True)
    return latent + strength * latent.std((1, 2, 3), keepdim=True) * drawn


# name -> (function, limit)
PIXELS = {"blur": (blur, 3.0), "blocks": (blocks, 5.0), "noise": (noise, 0.08), "washed out": (washed_out, 0.5),
          "texture": (texture, 0.045), "stains": (stains, 0.07)}
LATENTS = {"latent noise": (False, 0.38), "smooth latent noise": (True, 0.33)}    # name -> (smooth, limit)


def level(strength, limit):
    """The score of damage in [0,1] of a strength: 0.5 at the limit, 1 from twice the limit on."""
    return min(1.0, 0.5 * strength / limit)
