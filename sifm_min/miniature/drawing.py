"""The pictures of the miniature's world: render a scene from its attributes and its jitter at 64x64 pixels."""

import numpy as np
from PIL import Image, ImageDraw

from .world import COLOURS, GROUND, HAIR, SKIN, SKY
from .world import SCENE_SIZE as SIZE

SUPERSAMPLING = 3                                            # drawn larger, then box-averaged: antialiased edges
BEING_SKIN = {"alien": (120, 204, 110), "zombie": (142, 158, 140), "clown": (250, 248, 244)}
FOLIAGE = {"grass": (36, 112, 56), "desert": (84, 132, 60), "snow": (206, 222, 226), "autumn": (216, 96, 30)}
LIGHT = {"day": 1.0, "sunset": 0.82, "night": 0.42}          # brightness factor of the ground and of objects


def render(scene):
    """Draw the scene: a 64x64 RGB PIL image."""
    canvas = Image.new("RGB", (SIZE * SUPERSAMPLING,) * 2)
    pen = _Pen(ImageDraw.Draw(canvas))
    {"portrait": _portrait, "landscape": _landscape, "artwork": _artwork}[scene.category](pen, scene.values,
                                                                                          scene.jitter)
    return _styled(canvas.reduce(SUPERSAMPLING), scene.values["style"])


def changed_share(source, target):
    """The share of pixels that differ visibly (more than 0.06 of the range in a channel), and their mask (64,64)."""
    difference = np.abs(np.asarray(source, np.float32) - np.asarray(target, np.float32)).max(2) / 255
    mask = difference > 0.06
    return float(mask.mean()), mask


class _Pen:
    """ImageDraw in units of the final picture."""

    def __init__(self, draw):
        self.draw = draw

    def __getattr__(self, shape):                            # ellipse, rectangle, polygon, pieslice, chord, arc, line
        def stroke(points, colour, *angles, width=0):
            points = [SUPERSAMPLING * p for p in points]
            ink = tuple(round(max(0, min(255, c))) for c in colour)
            if shape in ("line", "arc"):
                return getattr(self.draw, shape)(points, *angles, fill=ink, width=round(SUPERSAMPLING * width))
            return getattr(self.draw, shape)(points, *angles, fill=ink)
        return stroke

    def gradient(self, top, bottom, upper, lower):
        """Fill the rows from `upper` to `lower` with a vertical gradient of two colours."""
        for y in range(round(upper), round(lower) + 1):
            share = (y - upper) / max(1, lower - upper)
            self.rectangle([0, y, SIZE, y + 1], [a + (b - a) * share for a, b in zip(top, bottom, strict=True)])


def _shade(colour, factor):
    """The colour, darker or brighter by a factor."""
    return tuple(c * factor for c in colour)


def _portrait(pen, v, jitter):
    background, s = COLOURS[v["background"]], 1 + 0.06 * jitter[2]
    pen.gradient(_shade(background, 1.05), _shade(background, 0.84), 0, SIZE)
    cx, cy = 32 + 3 * jitter[0], 32 + 2 * jitter[1]

    def at(x0, y0, x1, y1):
        return [cx + s * x0, cy + s * y0, cx + s * x1, cy + s * y1]

    being, skin = v["being"], BEING_SKIN.get(v["being"], SKIN[v["skin"]])
    hair = {"zombie": (70, 84, 70), "clown": (244, 120, 30)}.get(being, HAIR[v["hair"]])
    clothes = (78, 70, 62) if being == "zombie" else COLOURS[v["clothes"]]
    haircut = {"alien": "bald", "clown": "afro"}.get(being, v["haircut"])
    if haircut == "afro":
        pen.ellipse(at(-21, -22, 21, 14), hair)
    if haircut == "long":
        pen.ellipse(at(-16, -17, 16, 15), hair)
        pen.rectangle(at(-16, -2, 16, 20), hair)
    pen.rectangle(at(-4, 9, 4, 20), _shade(skin, 0.86))
    pen.ellipse(at(-24, 16, 24, 64), clothes)
    pen.polygon([cx - 5 * s, cy + 16 * s, cx + 5 * s, cy + 16 * s, cx, cy + 23 * s], _shade(skin, 0.86))
    pen.ellipse(at(-12, -15, 12, 14) if being != "alien" else at(-14, -19, 14, 14), skin)
    if haircut in ("short", "long"):
        pen.chord(at(-13, -17, 13, 9), hair, 180, 360)
    if v["beard"] == "yes" and being != "alien":
        pen.chord(at(-13, -9, 13, 18), hair, 0, 180)
    if being == "alien":
        pen.ellipse(at(-10, -6, -2, 4), (10, 12, 16))
        pen.ellipse(at(2, -6, 10, 4), (10, 12, 16))
    else:
        iris = (210, 30, 30) if being == "zombie" else (30, 30, 40)
        for x in (-5, 5):
            pen.ellipse(at(x - 2.6, -3.6, x + 2.6, 0.8), (250, 250, 250))
            pen.ellipse(at(x - 1.5, -3, x + 1.5, 0.2), iris)
    pen.chord(at(-5, 3, 5, 10) if being == "clown" else at(-3.5, 5, 3.5, 9),
              (190, 60, 60) if being != "zombie" else (60, 30, 30), 0, 180)
    if being == "clown":
        pen.ellipse(at(-3.4, -1, 3.4, 5.4), (226, 30, 40))
    if v["sunglasses"] == "yes":
        pen.rectangle(at(-12, -5, -1, 2.4), (16, 16, 22))
        pen.rectangle(at(1, -5, 12, 2.4), (16, 16, 22))
        pen.rectangle(at(-12, -5, 12, -3), (16, 16, 22))
    if v["hat"] == "top hat":
        pen.rectangle(at(-18, -15, 18, -11), (30, 28, 34))
        pen.rectangle(at(-12, -29, 12, -13), (30, 28, 34))
        pen.rectangle(at(-12, -18, 12, -15), (170, 40, 46))
    elif v["hat"] == "crown":
        points = [(-13, -11), (-14, -26), (-7, -19), (0, -28), (7, -19), (14, -26), (13, -11)]
        pen.polygon([c for x, y in points for c in (cx + s * x, cy + s * y)], (246, 196, 40))
        pen.ellipse(at(-2.4, -18, 2.4, -13), (200, 30, 60))


def _landscape(pen, v, jitter):
    light, horizon = LIGHT[v["time"]], 38 + 3 * jitter[0]

    def lit(colour):
        return _shade(colour, light)

    top, low = SKY[v["time"]]
    if v["sky"] != "natural":
        top, low = _shade(COLOURS[v["sky"]], 0.9), _shade(COLOURS[v["sky"]], 1.12)
    pen.gradient(top, low, 0, horizon)
    sun = 50 + 5 * jitter[1]
    if v["time"] == "night":
        for x, y in ((6, 6), (17, 12), (27, 4), (38, 9), (60, 20), (10, 22), (31, 17)):
            pen.ellipse([x - 1, y - 1, x + 1, y + 1], (250, 250, 220))
        pen.ellipse([sun - 5, 6, sun + 5, 16], (236, 236, 214))
    else:
        height = 8 if v["time"] == "day" else horizon - 12
        pen.ellipse([sun - 6, height - 2, sun + 6, height + 10],
                    (255, 238, 120) if v["time"] == "day" else (255, 226, 150))
    if v["rainbow"] == "yes":
        for i, colour in enumerate(((226, 60, 60), (244, 208, 63), (70, 170, 90), (70, 110, 220), (140, 70, 180))):
            r = 27 - 2.4 * i
            pen.arc([30 - r, horizon - r, 30 + r, horizon + r], colour, 180, 360, width=2.6)
    if v["mountains"] == "yes":
        for x, peak, half in ((42, 15, 20), (17, 12, 19)):
            peak = horizon - 38 + peak
            pen.polygon([x - half, horizon, x, peak, x + half, horizon], lit((124, 118, 134)))
            snow, line = 0.3 * half, peak + 0.3 * (horizon - peak)
            pen.polygon([x - snow, line, x, peak, x + snow, line], lit((246, 248, 252)))
    ground = GROUND[v["ground"]]
    pen.gradient(lit(ground), lit(_shade(ground, 0.8)), horizon, SIZE)
    if v["river"] == "yes":
        pen.polygon([28, horizon, 34, horizon, 52, SIZE, 14, SIZE], lit((64, 124, 220)))
        pen.line([30.5, horizon + 6, 31, SIZE - 3], lit((150, 196, 250)), width=1.4)
    if v["trees"] == "yes":
        for x, base in ((6, horizon + 6), (18, horizon + 3)):
            pen.rectangle([x - 1.2, base - 4, x + 1.2, base + 2], lit((96, 64, 40)))
            pen.ellipse([x - 5.5, base - 14, x + 5.5, base - 2], lit(FOLIAGE[v["ground"]]))
    if v["house"] == "yes":
        base = horizon + 10
        pen.rectangle([40, base - 12, 58, base], lit((198, 92, 70)))
        pen.polygon([37, base - 12, 61, base - 12, 49, base - 21], lit((96, 50, 44)))
        pen.rectangle([46.5, base - 7, 51.5, base], lit((70, 44, 34)))
        for x in (42, 53):
            pen.rectangle([x, base - 9, x + 3, base - 6], (255, 224, 120))


def _artwork(pen, v, jitter):
    backdrop = COLOURS[v["backdrop"]]
    pen.gradient(_shade(backdrop, 1.04), _shade(backdrop, 0.86), 0, SIZE)
    if v["subject"] == "abstract":
        colour, spread = COLOURS[v["shapes"]], 3.5
        a, b, c, d, e = (spread * j for j in jitter)
        pen.ellipse([9 + a, 9 + b, 29 + a, 29 + b], colour)
        pen.rectangle([37 + c, 10 + a, 54 + c, 27 + a], _shade(colour, 0.82))
        pen.polygon([10 + d, 54 + e, 20 + d, 35 + e, 30 + d, 54 + e], _shade(colour, 0.9))
        pen.ellipse([36 + e, 36 + c, 55 + e, 55 + c], _shade(colour, 0.7))
        pen.rectangle([29 + b, 28 + d, 35 + b, 38 + d], colour)
    else:
        cx, top = 32 + 5 * jitter[0], 44 + 2 * jitter[1]
        pen.gradient(_shade(COLOURS[v["table"]], 0.92), _shade(COLOURS[v["table"]], 0.7), top, SIZE)
        pen.ellipse([cx - 12, top + 4, cx + 14, top + 11], _shade(COLOURS[v["table"]], 0.5))
        if v["flowers"] != "none":
            for dx, dy in ((-11, -38), (-5, -44), (2, -40), (9, -43), (-1, -34), (11, -36)):
                pen.line([cx, top - 14, cx + dx, top + dy + 11], (40, 110, 50), width=1.2)
                pen.ellipse([cx + dx - 5, top + dy + 5, cx + dx + 5, top + dy + 15],
                            _shade(COLOURS[v["flowers"]], 0.95))
                pen.ellipse([cx + dx - 1.6, top + dy + 8.4, cx + dx + 1.6, top + dy + 11.6], (250, 226, 130))
        vase = COLOURS[v["vase"]]
        pen.rectangle([cx - 5, top - 17, cx + 5, top - 8], _shade(vase, 0.85))
        pen.ellipse([cx - 11, top - 13, cx + 11, top + 9], vase)
        pen.ellipse([cx - 7, top - 9, cx - 3, top - 1], _shade(vase, 1.2))
    if v["frame"] == "yes":
        gold = (196, 150, 50)
        for box in ([0, 0, SIZE, 4.5], [0, SIZE - 4.5, SIZE, SIZE], [0, 0, 4.5, SIZE], [SIZE - 4.5, 0, SIZE, SIZE]):
            pen.rectangle(box, gold)
        for box in ([4, 4, 60, 5.4], [4, 58.6, 60, 60], [4, 4, 5.4, 60], [58.6, 4, 60, 60]):
            pen.rectangle(box, _shade(gold, 0.5))


def _styled(image, style):
    if style == "plain":
        return image
    if style == "mosaic":
        return image.reduce(8).resize((SIZE, SIZE), Image.Resampling.NEAREST)
    pixels = np.asarray(image, np.float32)
    if style == "negative":
        pixels = 255 - pixels
    else:
        luma = (pixels @ np.array([0.299, 0.587, 0.114], np.float32))[..., None]
        scale, lift = ((1, 1, 1), (0, 0, 0)) if style == "black and white" else ((1.0, 0.82, 0.58), (18, 8, 0))
        pixels = luma * np.array(scale, np.float32) + np.array(lift, np.float32)
    return Image.fromarray(pixels.clip(0, 255).round().astype(np.uint8))
