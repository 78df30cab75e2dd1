"""Building blocks of the edits: blur, light, hues, places and soft steps, in sizes relative to the picture.

A picture is a numpy array (H,W,3), float32 in [0,1]; a map is (H,W), float32. A size `share` is a fraction of the shorter
side. Every block is a continuous function of the picture: a little noise changes its result by little.
"""

import numpy as np
import torch
from torch.nn import functional

LIGHT = np.array([0.299, 0.587, 0.114], np.float32)          # ITU-R BT.601
HUES = {"red": 0, "orange": 30, "yellow": 57, "green": 115, "blue": 218, "purple": 280, "pink": 325}     # degrees


def light(pixels):
    """The brightness of each pixel, (H,W) in [0,1]."""
    return pixels @ LIGHT


def grey(values):
    """A map (H,W) as a picture (H,W,3) without colour."""
    return np.repeat(values[..., None], 3, 2)


def step(values, start, end):
    """0 up to `start`, 1 from `end` on, smooth between them (3t^2 - 2t^3)."""
    t = np.clip((values - start) / (end - start), 0, 1)
    return t * t * (3 - 2 * t)


def blended(one, other, weight):
    """`other` where the map `weight` (H,W) is 1, `one` where it is 0."""
    return one + weight[..., None] * (other - one)


def colour(red, green, blue):
    """A colour as an array of three float32."""
    return np.array([red, green, blue], np.float32)


def ramp(values, colours):
    """A map (H,W) in [0,1] as a picture: the colours from dark to light, evenly spaced, straight lines between them."""
    at = np.linspace(0, 1, len(colours), dtype=np.float32)
    channels = [np.interp(values, at, channel) for channel in np.asarray(colours, np.float32).T]
    return np.stack(channels, 2).astype(np.float32)


def rows(pixels):
    """The height of each row, (H,1): 0 at the top, 1 at the bottom."""
    return np.linspace(0, 1, pixels.shape[0], dtype=np.float32)[:, None]


def distance(pixels, y, x):
    """The distance of each pixel from the place (y, x), (H,W), in units of the shorter side.

    The place is a pair of fractions of the height and the width.
    """
    down, right = offsets(pixels, y, x)
    return np.sqrt(down * down + right * right)


def offsets(pixels, y, x):
    """The distance of each pixel below a place and to its right: (H,1) and (1,W), in units of the shorter side."""
    height, width = pixels.shape[:2]
    short = min(height, width)
    down = (np.arange(height, dtype=np.float32) + 0.5 - y * height) / short
    right = (np.arange(width, dtype=np.float32) + 0.5 - x * width) / short
    return down[:, None], right[None]


def blur(values, share):
    """A picture or a map, blurred by a Gaussian of standard deviation `share`; the border continues outwards.

    Wide blurs work on a smaller copy: the mean of squares of that shrinking and enlarging is part of the width.
    """
    flat = values.ndim == 2
    planes = torch.from_numpy(np.ascontiguousarray(values[None] if flat else values.transpose(2, 0, 1)))[:, None]
    height, width = values.shape[:2]
    sigma = share * min(height, width)
    shrink = max(int(sigma / 2), 1)
    if shrink > 1:
        planes = resized(planes, max(round(height / shrink), 1), max(round(width / shrink), 1))
        sigma = (sigma * sigma - shrink * shrink / 3) ** 0.5 / shrink
    reach = max(int(3 * sigma + 0.5), 1)
    weights = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / max(sigma, 1e-3)) ** 2)
    weights = weights / weights.sum()
    planes = functional.pad(planes, (reach,) * 4, mode="replicate")
    planes = functional.conv2d(functional.conv2d(planes, weights[None, None, None]), weights[None, None, :, None])
    if shrink > 1:
        planes = resized(planes, height, width)
    planes = planes[:, 0].numpy()
    return planes[0] if flat else np.ascontiguousarray(planes.transpose(1, 2, 0))


def resized(planes, height, width):
    """Planes (N,1,H,W) at another size: straight lines between pixels, means over them where it shrinks."""
    return functional.interpolate(planes, (height, width), mode="bilinear", antialias=True, align_corners=False)


def resized_map(values, height, width):
    """A map (H,W) at another size."""
    return resized(torch.from_numpy(values)[None, None], height, width)[0, 0].numpy()


def resized_picture(pixels, height, width):
    """A picture (H,W,3) at another size."""
    planes = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))[:, None]
    return resized(planes, height, width)[:, 0].numpy().transpose(1, 2, 0)


def halved(pixels):
    """A picture at half resolution, (H//2,W//2,3): means of 2x2 pixels; an odd last row or column is left out."""
    height, width = (side // 2 * 2 for side in pixels.shape[:2])
    return pixels[:height, :width].reshape(height // 2, 2, width // 2, 2, 3).mean((1, 3))


def chroma(pixels):
    """The colourfulness of each pixel, (H,W) in [0,1]: its largest channel less its smallest."""
    return pixels.max(2) - pixels.min(2)


def has_hue(pixels, hue, width=40):
    """A map that is 1 where a pixel is of about this hue and colourful, 0 where it is another or grey.

    hue, width: degrees; the map falls from 1 to 0 around `width` from the hue. Colours are read from a slightly blurred
    copy.
    """
    soft = blur(pixels, 0.008)
    red, green, blue = soft[..., 0], soft[..., 1], soft[..., 2]
    across, along = 3 ** 0.5 * (green - blue), 2 * red - green - blue        # the hue is the angle of this vector
    turn = np.radians(hue)
    near = (along * np.float32(np.cos(turn)) + across * np.float32(np.sin(turn))) / (np.hypot(along, across) + 1e-4)
    top = soft.max(2)
    return (step(near, *np.cos(np.radians([1.3 * width, 0.7 * width])).astype(np.float32))
            * step(chroma(soft) / (top + 0.05), 0.14, 0.34) * step(top, 0.06, 0.2))


def painted(pixels, hue):
    """The picture in shades of one hue: dark stays dark, light becomes a strong light shade."""
    pure = np.clip(np.abs((hue / 60 + np.array([0, 4, 2])) % 6 - 3) - 1, 0, 1).astype(np.float32)
    pure = 0.08 + 0.84 * pure
    return ramp(light(pixels), [0.12 * pure, 0.55 * pure, pure, 0.78 * pure + 0.22])
