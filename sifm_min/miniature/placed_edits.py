"""Edits with a place: things that are added, a blurred background, and edits that read what the picture shows.

The signature is that of `whole_edits.py`. What is found in a picture (the sky, a face, the most colourful thing) is found on
blurred maps and weighed softly, so that a little noise does not move it.
"""

import numpy as np

from .soft_maps import (
    HUES,
    blended,
    blur,
    chroma,
    colour,
    distance,
    grey,
    light,
    offsets,
    painted,
    resized_map,
    resized_picture,
    step,
)

SIDES = {"left": 0.25, "right": 0.75}                        # where the sun and the moon stand, as a fraction of the width


# --------------------------------------------------------------------------------------------------- additions and focus

def framed(pixels, option):
    """A frame over the border: wooden or white."""
    height, width = pixels.shape[:2]
    down, right = offsets(pixels, 0.5, 0.5)
    inward = np.minimum(height / min(height, width) / 2 - np.abs(down), width / min(height, width) / 2 - np.abs(right))
    outer, inner = {"wooden": (colour(0.36, 0.19, 0.08), colour(0.58, 0.35, 0.17)),
                    "white": (colour(0.97, 0.97, 0.95), colour(0.86, 0.86, 0.84))}[option]
    wood = blended(np.broadcast_to(outer, pixels.shape), inner, step(inward, 0.052, 0.060))
    return blended(wood, pixels, step(inward, 0.106, 0.114))


def moon(pixels, option):
    """A full moon at the top left or right, with a dusky sky around it."""
    x = SIDES[option]
    apart = distance(pixels, 0.24, x)
    dusk = blended(pixels, pixels * colour(0.22, 0.28, 0.5), 0.9 * (1 - step(apart, 0.15, 0.48)))
    disc = grey(np.full(pixels.shape[:2], 0.94, np.float32)) * colour(1, 0.99, 0.9)
    for y, at, radius in ((-0.05, -0.04, 0.05), (0.05, 0.03, 0.065), (-0.03, 0.07, 0.035), (0.06, -0.07, 0.03)):
        height, width = pixels.shape[:2]
        short = min(height, width)
        crater = distance(pixels, 0.24 + y * short / height, x + at * short / width)
        disc = blended(disc, colour(0.76, 0.76, 0.72), 0.9 * (1 - step(crater, 0.6 * radius, radius)))
    return blended(dusk, disc, 1 - step(apart, 0.150, 0.162))


def sun(pixels, option):
    """A yellow sun at the top left or right, with its glow."""
    apart = distance(pixels, 0.22, SIDES[option])
    glow = np.clip(1 - apart / 0.5, 0, 1) ** 2
    return blended(pixels + 0.65 * glow[..., None] * colour(1, 0.85, 0.4), colour(1, 0.86, 0.20), 1 - step(apart, 0.140, 0.156))


def rainbow(pixels, option):
    """A rainbow from the lower left to the lower right."""
    apart = distance(pixels, 1.02, 0.5)
    bands = [colour(0.55, 0.2, 0.75), colour(0.15, 0.4, 0.95), colour(0.2, 0.78, 0.25), colour(0.97, 0.92, 0.2),
             colour(0.97, 0.58, 0.1), colour(0.92, 0.12, 0.12)]
    bow = np.broadcast_to(bands[0], pixels.shape)
    for i, band in enumerate(bands[1:], 1):
        bow = blended(bow, band, step(apart, 0.58 + 0.042 * i - 0.006, 0.58 + 0.042 * i + 0.006))
    return blended(pixels, bow, 0.85 * step(apart, 0.574, 0.586) * (1 - step(apart, 0.826, 0.838)))


def blurred_background(pixels, option):
    """All but an upright ellipse in the middle out of focus."""
    down, right = offsets(pixels, 0.55, 0.5)
    apart = np.hypot(down / 1.25, right)
    return blended(pixels, blur(pixels, 0.045), step(apart, 0.24, 0.36))


# ------------------------------------------------------------------------------------------- edits that read the picture

def sky_colour(pixels, option):
    """The sky (open at the top, light or blue, calm) in another colour."""
    return blended(pixels, painted(pixels, HUES[option]), sky(pixels))


def sky(pixels):
    """A map of the sky: light or blue without detail, in one piece from the upper border down."""
    soft = blur(pixels, 0.012)
    bright = light(soft)
    calm = 1 - step(np.sqrt(np.maximum(blur(light(pixels) ** 2, 0.012) - bright ** 2, 0)), 0.03, 0.09)
    blue = step(soft[..., 2] - soft[..., 0], -0.04, 0.06)
    like = calm * np.maximum(step(bright, 0.5, 0.72) * step(soft[..., 2] - soft[..., 0], -0.22, -0.08),
                             blue * step(bright, 0.12, 0.3))
    closed = np.cumsum((1 - like) ** 2, 0) / len(like)       # what lies between the pixel and the upper border
    return like * (1 - step(blur(closed, 0.03), 0.05, 0.18))


def most_colourful(pixels, option):
    """The most colourful things in another colour; what is half as colourful or less stays."""
    return blended(pixels, painted(pixels, HUES[option]), colourful(pixels))


def colourful(pixels):
    """A map of the most colourful things, 1 near the greatest colourfulness of the picture."""
    strength = chroma(blur(pixels, 0.012))
    few = resized_map(blur(strength, 0.02), 48, 48)
    greatest = np.sort(few, None)[-48:].mean()               # of the most colourful fiftieth
    greatest = max(greatest, 0.02)
    return step(strength, 0.5 * greatest, 0.72 * greatest) * step(greatest, 0.10, 0.22)


def without_middle(pixels, option):
    """The middle without its content: the surroundings continue smoothly over an ellipse."""
    known, small = 1 - middle(pixels), resized_picture(pixels, pixels.shape[0] // 2, pixels.shape[1] // 2)
    seen = 1 - middle(small)
    filled = np.zeros_like(small)
    for share in (0.30, 0.14, 0.07, 0.035):                  # from coarse to fine, each where enough is known
        weight = blur(seen, share)
        ground = blur(small * seen[..., None], share) / (weight + 1e-4)[..., None]
        filled = ground if share == 0.30 else blended(filled, ground, step(weight, 0.04, 0.30))
    return blended(resized_picture(filled, *pixels.shape[:2]), pixels, known)


def middle(pixels):
    """A map of an upright ellipse in the middle, with a soft border."""
    down, right = offsets(pixels, 0.5, 0.5)
    return 1 - step(np.hypot(down / 1.15, right), 0.21, 0.27)


def skin(pixels):
    """A map of the colours of skin, (H,W) in [0,1]."""
    soft = blur(pixels, 0.010)
    red, green, blue = soft[..., 0], soft[..., 1], soft[..., 2]
    ratio = (red - blue) / (red + 0.05)
    return (step(light(soft), 0.12, 0.28) * step(ratio, 0.10, 0.24) * (1 - step(ratio, 0.66, 0.85))
            * step(red - green, 0.02, 0.07) * step(green - blue, -0.06, 0.0))


def face(pixels):
    """The likely place of a face: (y, x, radius, sureness), the first three in units of the shorter side.

    y and x are measured from the upper left corner. The place is the mean of the blob of skin colour that stands out
    most, weighed softly; sureness is 1 for a compact blob of a face's size, 0 where there is none.
    """
    height, width = pixels.shape[:2]
    short = min(height, width)
    small = resized_map(skin(pixels), round(64 * height / short), round(64 * width / short))
    y = (np.arange(small.shape[0], dtype=np.float32)[:, None] + 0.5) / 64
    x = (np.arange(small.shape[1], dtype=np.float32)[None] + 0.5) / 64
    likely = np.exp(-0.5 * ((y / y.max() - 0.40) / 0.22) ** 2 - 0.5 * ((x / x.max() - 0.5) / 0.24) ** 2)
    blob = np.maximum(blur(small, 0.09) - 0.6 * blur(small, 0.22), 0) * likely
    weights = blob ** 4 + 1e-12
    weights = weights / weights.sum()
    centre_y, centre_x = float((weights * y).sum()), float((weights * x).sum())
    near = np.exp(-0.5 * ((y - centre_y) ** 2 + (x - centre_x) ** 2) / 0.20 ** 2)
    near_skin = small * near
    mass = near_skin.sum() + 1e-6
    centre_y, centre_x = float((near_skin * y).sum() / mass), float((near_skin * x).sum() / mass)
    spread = float((weights * ((y - centre_y) ** 2 + (x - centre_x) ** 2)).sum())
    radius = float(np.clip((mass / 64 ** 2 / np.pi) ** 0.5, 0.08, 0.24))
    sure = float(step(blob.max(), 0.10, 0.30) * (1 - step(spread, 0.006, 0.02)))
    return centre_y, centre_x, radius, sure


def glasses(pixels, option):
    """Large dark sunglasses on the face."""
    y, x, radius, _ = face(pixels)
    down, right = down_right(pixels, y - 0.12 * radius, x)
    lens = np.minimum(*(np.hypot(down, right - side * 0.58 * radius) for side in (-1, 1)))
    bar = np.maximum(np.abs(down + 0.12 * radius) / 0.10, np.abs(right) / 1.10)
    dark = np.maximum(1 - step(lens, 0.50 * radius, 0.56 * radius), 1 - step(bar, 0.9 * radius, 1.1 * radius))
    return blended(pixels, colour(0.05, 0.05, 0.07), dark)


def hat(pixels, option):
    """A top hat above the face, in the named colour."""
    y, x, radius, _ = face(pixels)
    down, right = down_right(pixels, y - 0.95 * radius, x)
    edge = 0.04 * radius
    crown = np.maximum(np.abs(down + 0.62 * radius) - 0.62 * radius, np.abs(right) - 0.80 * radius)
    brim = np.maximum(np.abs(down) - 0.12 * radius, np.abs(right) - 1.25 * radius)
    band = np.maximum(np.abs(down + 0.26 * radius) - 0.14 * radius, np.abs(right) - 0.80 * radius)
    paint, ribbon = {"red": (colour(0.78, 0.08, 0.10), colour(0.25, 0.02, 0.03)),
                     "black": (colour(0.06, 0.06, 0.08), colour(0.55, 0.10, 0.12))}[option]
    worn = blended(pixels, paint, 1 - step(np.minimum(crown, brim), -edge, edge))
    return blended(worn, ribbon, 1 - step(band, -edge, edge))


def down_right(pixels, y, x):
    """`offsets` from a place that is given in units of the shorter side."""
    height, width = pixels.shape[:2]
    short = min(height, width)
    return offsets(pixels, y * short / height, x * short / width)


def stripes(pixels, option):
    """Broad slanted stripes in the named colour on the light surfaces."""
    down, right = offsets(pixels, 0.5, 0.5)
    wave = np.sin(2 * np.pi * 5 * (right + 0.5 * down))
    return blended(pixels, painted(pixels, HUES[option]), 0.9 * step(wave, -0.15, 0.15) * light_surfaces(pixels))


def light_surfaces(pixels):
    """A map of what is clearly lighter than the picture's middle."""
    soft = light(blur(pixels, 0.015))
    middle = soft.mean()
    return step(soft, middle, middle + 0.16)
