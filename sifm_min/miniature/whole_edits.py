"""Edits of the whole picture: light, weather, materials and colours.

Each is a function of a picture, (H,W,3) float32 in [0,1], of 64 pixels or more on each side, and gives one of the same
shape; `kinds.py` clips it to [0,1]. All sizes are fractions of the shorter side, and all steps are smooth.
"""

import numpy as np
import torch
from torch.nn import functional

from .soft_maps import HUES, blended, blur, colour, distance, grey, has_hue, light, ramp, rows, step

# --------------------------------------------------------------------------------------------------- light and weather

def night(pixels, option):
    """Dark and blue."""
    return pixels ** 1.3 * colour(0.26, 0.34, 0.62)


def sunset(pixels, option):
    """Warm light, strongest at the top."""
    return pixels * colour(1, 0.70, 0.48) + (0.36 * (1 - rows(pixels)) + 0.05)[..., None] * colour(1, 0.42, 0.10)


def fog(pixels, option):
    """White mist, denser at the top."""
    return blended(blur(pixels, 0.008), colour(0.82, 0.84, 0.87), np.broadcast_to(0.85 - 0.35 * rows(pixels), pixels.shape[:2]))


def snow(pixels, option):
    """White on what is light, and more towards the bottom; cold shadows."""
    bright = light(blur(pixels, 0.006))
    cover = np.clip(0.25 + 0.60 * rows(pixels), 0, 1) * np.clip(0.25 + 1.5 * bright, 0, 1.3)
    cold = grey(light(pixels)) * colour(0.86, 0.94, 1.08)
    cold = pixels + 0.7 * (cold - pixels)
    return blended(cold, colour(0.95, 0.97, 1.0), np.minimum(cover, 1))


def underwater(pixels, option):
    """Blue-green and a little blurred, with light from above."""
    return blur(pixels, 0.008) * colour(0.25, 0.66, 0.72) + (0.16 + 0.12 * (1 - rows(pixels)))[..., None] * colour(0, 0.7, 1)


def spotlight(pixels, option):
    """Dark but for a disc in the middle."""
    return pixels * (0.06 + 0.94 * (1 - step(distance(pixels, 0.5, 0.5), 0.30, 0.46)))[..., None]


# ----------------------------------------------------------------------------------------------------------- materials

def sketch(pixels, option):
    """Grey pencil strokes on white paper: where the picture is darker than its surroundings."""
    fine = light(blur(pixels, 0.004))
    lines = np.clip((fine + 0.08) / (blur(fine, 0.025) + 0.08), 0, 1)
    return grey(np.clip(1.04 * lines ** 2.6 - 0.16 * (1 - fine), 0, 1))


def oil(pixels, option):
    """Flat strokes with sharp borders and strong colours: the mean of the calmest of eight neighbouring areas.

    Soft choice among eight (the filter of Kuwahara, Hachimura, Eiho and Kinoshita, 1976, with weights in place of the
    minimum).
    """
    far = max(round(0.015 * min(pixels.shape[:2])), 1)
    near = max(round(0.0106 * min(pixels.shape[:2])), 1)
    means = blur(pixels, 0.010)
    spread = np.maximum(blur((pixels * pixels).sum(2), 0.010) - (means * means).sum(2), 0)
    calm = (0.002 / (spread + 0.002)) ** 2
    both = np.concatenate([means * calm[..., None], calm[..., None]], 2)
    total = sum(moved(both, *by) for by in ((far, 0), (-far, 0), (0, far), (0, -far),
                                            (near, near), (near, -near), (-near, near), (-near, -near)))
    strokes = total[..., :3] / total[..., 3:]
    middle = grey(light(strokes))
    return 1.12 * np.clip(middle + 1.5 * (strokes - middle), 0, 1) - 0.06


def moved(values, down, right):
    """A picture moved by whole pixels; the border continues outwards."""
    height, width = values.shape[:2]
    wide = np.pad(values, ((max(down, 0), max(-down, 0)), (max(right, 0), max(-right, 0)), (0, 0)), mode="edge")
    return wide[max(-down, 0):, max(-right, 0):][:height, :width]


def mosaic(pixels, option):
    """Square tiles of one colour, sixteen along the shorter side."""
    height, width = pixels.shape[:2]
    tiles = [round(16 * side / min(height, width)) for side in (height, width)]
    planes = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))[None]
    planes = functional.interpolate(functional.adaptive_avg_pool2d(planes, tiles), (height, width), mode="nearest-exact")
    return planes[0].numpy().transpose(1, 2, 0)


def woodcut(pixels, option):
    """Dark brown ink on yellowish paper, nothing between: ink where it is darker than its surroundings."""
    fine = light(blur(pixels, 0.008))
    ink = 1 - step(fine - 0.55 * blur(fine, 0.10) - 0.45 * 0.42, -0.07, 0.07)
    return blended(np.broadcast_to(colour(0.93, 0.86, 0.68), pixels.shape), colour(0.16, 0.09, 0.05), ink)


def neon(pixels, option):
    """Glowing outlines in bright colours on black."""
    edges = outlines(pixels)
    hue = ramp(light(blur(pixels, 0.03)), [(0.1, 0.9, 1), (0.9, 0.2, 1), (1, 0.3, 0.5), (1, 0.9, 0.2)])
    return hue * np.clip(edges + 0.7 * blur(edges, 0.02), 0, 1)[..., None] + colour(0.02, 0.01, 0.06)


def outlines(pixels):
    """The strength of outlines, (H,W) in [0,1]: how fast the light changes across a hundredth of the shorter side."""
    soft = light(blur(pixels, 0.008))
    across, down = np.gradient(soft)[::-1]
    return step(np.hypot(across, down) * min(soft.shape) / 100, 0.012, 0.10)


def relief(pixels, option):
    """Carved in grey stone, lit from the top left."""
    soft = light(blur(pixels, 0.010))
    across, down = np.gradient(soft)[::-1]
    slope = (across + down) * min(soft.shape) / 100
    return grey(np.clip(0.52 + 0.5 * np.tanh(7 * slope) + 0.18 * (soft - 0.5), 0, 1)) * colour(1, 0.985, 0.95)


# ------------------------------------------------------------------------------------------------------------- colours

def black_and_white(pixels, option):
    """The light alone, with a little more contrast."""
    return grey(np.clip(1.15 * light(pixels) - 0.06, 0, 1))


def half_grey(pixels, option):
    """One half without colour: left, right, top or bottom."""
    down, right = offsets_of_half(pixels, option)
    return blended(pixels, black_and_white(pixels, ""), np.broadcast_to(step(down + right, -0.004, 0.004), pixels.shape[:2]))


def offsets_of_half(pixels, option):
    """Two maps whose sum is positive in the named half: (H,1) and (1,W), fractions of the picture."""
    height, width = pixels.shape[:2]
    down, right = rows(pixels) - 0.5, np.linspace(-0.5, 0.5, width, dtype=np.float32)[None]
    sign = {"top": (-1, 0), "bottom": (1, 0), "left": (0, -1), "right": (0, 1)}[option]
    return sign[0] * down, sign[1] * right


def sepia(pixels, option):
    """Brown, as an old print."""
    return ramp(light(pixels) ** 0.9, [(0.10, 0.06, 0.03), (0.62, 0.46, 0.30), (1, 0.91, 0.74)])


def duotone(pixels, option):
    """Dark blue to white, as a cyanotype."""
    return ramp(light(pixels), [(0.03, 0.09, 0.32), (0.15, 0.42, 0.76), (0.88, 0.96, 1)])


def negative(pixels, option):
    """Each channel turned round."""
    return 1 - pixels


def thermal(pixels, option):
    """The light as warmth: blue, purple, red, orange, yellow."""
    return ramp(light(blur(pixels, 0.006)),
                [(0.02, 0.02, 0.30), (0.38, 0.05, 0.62), (0.92, 0.16, 0.24), (1, 0.66, 0.06), (1, 1, 0.76)])


def gold(pixels, option):
    """Polished gold: the light with strong local contrast, in yellow metal."""
    fine = light(blur(pixels, 0.006))
    shine = np.clip(0.5 + 0.75 * (fine - 0.5) + 1.3 * (fine - blur(fine, 0.06)), 0, 1)
    return ramp(shine, [(0.12, 0.06, 0.0), (0.55, 0.34, 0.04), (0.95, 0.74, 0.18), (1, 0.97, 0.72)])


def autumn(pixels, option):
    """Orange in place of green, and everything a little warmer."""
    leaves = foliage(pixels)
    orange = np.clip(pixels.max(2, keepdims=True) * colour(1.35, 0.62, 0.10) + 0.03, 0, 1)
    return blended(pixels * colour(1.06, 0.98, 0.84), orange, leaves)


def foliage(pixels):
    """A map of what is green or yellowish green."""
    return has_hue(pixels, 95, 48)


def one_colour(pixels, option):
    """Black and white but for what has the named colour."""
    return blended(black_and_white(pixels, ""), pixels, named_colour(pixels, option))


def named_colour(pixels, option):
    """A map of what has the named colour. Red is narrow, so that skin does not count."""
    return has_hue(pixels, HUES[option], {"red": 16, "green": 45, "blue": 40}[option])


def swapped(pixels, option):
    """Red in place of blue and blue in place of red: the two channels change places."""
    return np.ascontiguousarray(pixels[..., ::-1])
