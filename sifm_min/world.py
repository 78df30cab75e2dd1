"""The miniature's procedural world: scenes, their pictures, and instructions with an exact ground truth.

A scene is a category (portrait, landscape or artwork: the paper's three) with named attributes and a little jitter.
`render` draws it at 64x64. An instruction changes attributes, so the picture it asks for is the changed scene rendered
with the same jitter: exact, unique, and inferable from the picture (whatever can be added stands where the scene says).
Colours and positions were chosen so that every instruction changes at least 3 % of the picture.
"""

import hashlib
import random
from dataclasses import dataclass, field, replace

import numpy as np
from PIL import Image, ImageDraw

SIZE = 64
SUPERSAMPLING = 3                                            # drawn larger and box-averaged: antialiased edges

COLOURS = {
    "red": (214, 48, 44), "yellow": (244, 208, 63), "green": (60, 160, 80),
    "blue": (58, 104, 214), "purple": (140, 70, 180), "white": (238, 238, 234),
}
HAIR = {"black": (36, 32, 34), "brown": (112, 72, 44), **COLOURS}
SKIN = {"fair": (242, 206, 180), "tan": (210, 160, 120), "dark": (128, 86, 62)}
BEING_SKIN = {"alien": (120, 204, 110), "zombie": (142, 158, 140), "clown": (250, 248, 244)}
GROUND = {"grass": (96, 170, 84), "desert": (226, 196, 130), "snow": (240, 244, 250), "autumn": (186, 110, 48)}
FOLIAGE = {"grass": (36, 112, 56), "desert": (84, 132, 60), "snow": (206, 222, 226), "autumn": (216, 96, 30)}
SKY = {"day": ((120, 180, 240), (196, 224, 250)), "sunset": ((222, 96, 84), (252, 190, 108)),
       "night": ((14, 16, 48), (40, 44, 92))}
LIGHT = {"day": 1.0, "sunset": 0.82, "night": 0.42}          # how much of their colour the ground and objects keep

FLAG = ("no", "yes")
STYLES = ("plain", "black and white", "sepia", "negative", "mosaic")
ATTRIBUTES = {                                               # category -> attribute -> values; `style` is common to all
    "portrait": {
        "being": ("human", "alien", "zombie", "clown"), "background": tuple(COLOURS), "clothes": tuple(COLOURS),
        "hair": tuple(HAIR), "haircut": ("short", "long", "bald"), "hat": ("none", "top hat", "crown"),
        "sunglasses": FLAG, "beard": FLAG, "skin": tuple(SKIN), "person": ("man", "woman"),
    },
    "landscape": {
        "time": tuple(SKY), "sky": ("natural", *COLOURS), "ground": tuple(GROUND), "mountains": FLAG, "river": FLAG,
        "house": FLAG, "trees": FLAG, "rainbow": FLAG,
    },
    "artwork": {
        "subject": ("still life", "abstract"), "backdrop": tuple(COLOURS), "table": tuple(COLOURS),
        "vase": tuple(COLOURS), "flowers": ("none", *COLOURS), "shapes": tuple(COLOURS), "frame": FLAG,
    },
}
CATEGORIES = tuple(ATTRIBUTES)
for _values in ATTRIBUTES.values():
    _values["style"] = STYLES
INVISIBLE = {"person"}                                       # decides the pronoun, never a pixel


@dataclass(frozen=True)
class Scene:
    """One scene: `values` maps each attribute of the category to one of its values; `jitter` holds five numbers in [-1,1]."""

    category: str
    values: dict = field(hash=False)
    jitter: tuple

    def changed(self, changes):
        return replace(self, values={**self.values, **changes})

    @property
    def held_out(self):
        """A tenth of all attribute combinations never occurs in training, whatever the jitter."""
        text = repr((self.category, sorted(self.values.items())))
        return hashlib.sha256(text.encode()).digest()[0] < 26


def random_scene(rng, category=None):
    """A scene drawn attribute by attribute; rare things are rare, so that they can be added."""
    category = category or rng.choice(CATEGORIES)
    values = {name: rng.choice(options) for name, options in ATTRIBUTES[category].items()}
    values["style"] = "plain"
    if category == "portrait":
        values |= {"being": "human", "hair": rng.choice(["black", "brown", "red", "yellow", "white"]),
                   "haircut": rng.choice(["short", "short", "long", "bald"]) if values["person"] == "man"
                   else rng.choice(["short", "long"]),
                   "hat": rng.choice(["none", "none", "none", "top hat", "crown"]),
                   "sunglasses": rng.choice(["no", "no", "no", "yes"])}
        values["beard"] = rng.choice(FLAG) if values["person"] == "man" and values["haircut"] != "bald" else "no"
        if values["haircut"] == "bald":
            values["hair"] = "black"                         # nothing shows it
        while values["hair"] == values["background"] or values["clothes"] == values["background"]:
            values |= {name: rng.choice(tuple(COLOURS)) for name in ("background", "clothes")}
    elif category == "landscape":
        values |= {"time": rng.choice(["day", "day", "sunset", "night"]), "sky": "natural",
                   "rainbow": rng.choice(["no", "no", "no", "yes"])}
        if values["time"] == "night":
            values["rainbow"] = "no"
    else:
        unused = ("shapes",) if values["subject"] == "still life" else ("table", "vase", "flowers")
        values |= {name: "none" if name == "flowers" else "red" for name in unused}
        if values["subject"] == "still life":
            while values["vase"] in (values["backdrop"], values["table"]) or values["table"] == values["backdrop"]:
                values |= {name: rng.choice(tuple(COLOURS)) for name in ("vase", "backdrop", "table")}
            while values["flowers"] == values["backdrop"]:
                values["flowers"] = rng.choice(ATTRIBUTES["artwork"]["flowers"])
        else:
            while values["shapes"] == values["backdrop"]:
                values["shapes"] = rng.choice(tuple(COLOURS))
    return Scene(category, values, tuple(round(rng.uniform(-1, 1), 3) for _ in range(5)))


# -- pictures -----------------------------------------------------------------------------------------------------------

def render(scene):
    """The scene's picture, a 64x64 RGB PIL image."""
    canvas = Image.new("RGB", (SIZE * SUPERSAMPLING,) * 2)
    pen = _Pen(ImageDraw.Draw(canvas))
    {"portrait": _portrait, "landscape": _landscape, "artwork": _artwork}[scene.category](pen, scene.values,
                                                                                          scene.jitter)
    return _styled(canvas.reduce(SUPERSAMPLING), scene.values["style"])


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
        for y in range(round(upper), round(lower) + 1):
            share = (y - upper) / max(1, lower - upper)
            self.rectangle([0, y, SIZE, y + 1], [a + (b - a) * share for a, b in zip(top, bottom, strict=True)])


def _shade(colour, factor):
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


# -- instructions -------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Kind:
    """A kind of instruction. `changes` are attribute values ("*" stands for the colour); `needs` must hold in the scene.

    `phrases` are used in training, `held_out` only in evaluation; {c} is the colour;
    {p}, {o} and {s} are pronouns (her, she, her), and a phrase with {s} is said of women only:
    the shipped editors never read `his`.
    """

    name: str
    category: str | None                                     # None: any category
    changes: dict = field(hash=False)
    phrases: tuple
    held_out: tuple
    needs: dict = field(default_factory=dict, hash=False)    # attribute -> the values it may have

    def applies(self, scene):
        return self.category in (None, scene.category) and all(scene.values[name] in allowed for name,
                                                               allowed in self.needs.items())

    def colours(self, scene):
        """The colours that this kind may ask for in this scene; [None] where it asks for none."""
        if "*" not in self.changes.values():
            return [None] if any(scene.values[name] != value for name, value in self.changes.items()) else []
        (name,) = [name for name, value in self.changes.items() if value == "*"]
        touching = {"background": ("clothes", "hair"), "clothes": ("background",), "hair": ("background",),
                    "backdrop": ("table", "vase", "flowers", "shapes"),
                    "table": ("backdrop", "vase"), "vase": ("backdrop", "table"), "flowers": ("backdrop",),
                    "shapes": ("backdrop",)}.get(name, ())
        taken = {scene.values[name]} | {scene.values[other]
                                        for other in touching}      # an object never vanishes into its neighbour
        return [colour for colour in COLOURS if colour not in taken]

    def target(self, scene, colour):
        return scene.changed({name: colour if value == "*" else value for name, value in self.changes.items()})


_HUMAN = {"being": ("human",)}
_STILL, _ABSTRACT = {"subject": ("still life",)}, {"subject": ("abstract",)}
KINDS = (
    Kind("background", "portrait", {"background": "*"},
         ("make the background {c}", "change the background to {c}", "turn the background {c}",
          "give it a {c} background", "paint the wall behind {p} {c}"),
         ("turn the wall behind {p} {c}", "set the background to {c}")),
    Kind("clothes", "portrait", {"clothes": "*"},
         ("make the clothes {c}", "change the clothes to {c}", "turn the shirt {c}", "give {p} a {c} shirt",
          "dress {p} in {c}", "make {p} wear a {c} shirt"),
         ("change the shirt to {c}", "give {p} {c} clothes")),
    Kind("hair", "portrait", {"hair": "*"},
         ("make the hair {c}", "change the hair to {c}", "turn the hair {c}", "give {p} {c} hair", "dye {s} hair {c}",
          "paint the hair {c}"),
         ("make {s} hair {c}", "dye the hair {c}"), {"haircut": ("short", "long"), "hat": ("none",)}),
    Kind("bald", "portrait", {"haircut": "bald", "hair": "black", "beard": "no"},
         ("make {p} bald", "shave {s} head", "remove the hair", "turn {p} bald", "take the hair away"),
         ("shave the head", "take away {s} hair"), {"haircut": ("short", "long"), "hat": ("none",)}),
    Kind("top hat", "portrait", {"hat": "top hat"},
         ("add a top hat", "give {p} a top hat", "put a top hat on {p}", "make {p} wear a top hat", "add a black hat",
          "put a black hat on {s} head"),
         ("give {p} a black hat", "put a top hat on {s} head")),
    Kind("crown", "portrait", {"hat": "crown"},
         ("add a crown", "give {p} a crown", "put a crown on {p}", "make {p} wear a crown", "crown {p}",
          "put a gold crown on {s} head"),
         ("add a gold crown", "put a crown on {s} head")),
    Kind("no hat", "portrait", {"hat": "none"},
         ("remove the hat", "take the hat off", "remove what {o} wears on {s} head", "take off the hat",
          "make {p} wear no hat"),
         ("take {s} hat off", "take away the hat"), {"hat": ("top hat", "crown")}),
    Kind("sunglasses", "portrait", {"sunglasses": "yes"},
         ("add sunglasses", "give {p} sunglasses", "put sunglasses on {p}", "make {p} wear sunglasses",
          "add dark glasses"),
         ("give {p} dark glasses", "put dark glasses on {p}")),
    Kind("beard", "portrait", {"beard": "yes"},
         ("add a beard", "give {p} a beard", "make {p} grow a beard", "let {p} have a beard", "put a beard on {p}"),
         ("make {p} have a beard", "add a beard to the face"), {"haircut": ("short", "long"), "person": ("man",)}),
    Kind("alien", "portrait", {"being": "alien", "haircut": "bald", "hair": "black", "beard": "no"},
         ("turn {p} into an alien", "make {p} an alien", "change {p} into an alien", "{o} should be an alien",
          "what if {o} were an alien"),
         ("make {p} into an alien", "{o} is now an alien"), _HUMAN),
    Kind("zombie", "portrait", {"being": "zombie"},
         ("turn {p} into a zombie", "make {p} a zombie", "change {p} into a zombie", "{o} should be a zombie",
          "what if {o} were a zombie"),
         ("make {p} into a zombie", "{o} is now a zombie"), _HUMAN),
    Kind("clown", "portrait", {"being": "clown"},
         ("turn {p} into a clown", "make {p} a clown", "change {p} into a clown", "{o} should be a clown",
          "what if {o} were a clown"),
         ("make {p} into a clown", "{o} is now a clown"), _HUMAN),
    Kind("sky", "landscape", {"sky": "*"},
         ("make the sky {c}", "change the sky to {c}", "turn the sky {c}", "give it a {c} sky", "paint the sky {c}"),
         ("set the sky to {c}", "let the sky be {c}")),
    Kind("night", "landscape", {"time": "night", "sky": "natural", "rainbow": "no"},
         ("make it night", "turn it into night", "change the time to night", "make it a night scene",
          "turn day into night", "add the moon and stars"),
         ("set it at night", "change it to night"), {"time": ("day", "sunset")}),
    Kind("sunset", "landscape", {"time": "sunset", "sky": "natural"},
         ("make it sunset", "turn it into a sunset", "change the time to sunset", "make it a sunset scene",
          "let the sun go down"),
         ("set it at sunset", "change it to a sunset"), {"time": ("day", "night")}),
    Kind("snow", "landscape", {"ground": "snow"},
         ("make it winter", "cover the ground with snow", "add snow", "turn the ground into snow", "let it snow",
          "make it a winter scene"),
         ("change it to winter", "cover it with snow")),
    Kind("desert", "landscape", {"ground": "desert"},
         ("make it a desert", "turn the ground into sand", "turn it into a desert", "cover the ground with sand",
          "change the ground to desert"),
         ("change it to a desert", "make the ground a desert")),
    Kind("autumn", "landscape", {"ground": "autumn"},
         ("make it autumn", "turn it into autumn", "make it an autumn scene", "change the season to autumn",
          "cover the ground with autumn leaves"),
         ("change it to autumn", "set the season to autumn")),
    Kind("mountains", "landscape", {"mountains": "yes"},
         ("add mountains", "put mountains in the background", "add some mountains", "place mountains behind",
          "give it mountains"),
         ("put mountains behind", "add mountains in the background")),
    Kind("no mountains", "landscape", {"mountains": "no"},
         ("remove the mountains", "take the mountains away", "delete the mountains", "make the mountains disappear",
          "get rid of the mountains"),
         ("take away the mountains", "make the mountains go away")),
    Kind("river", "landscape", {"river": "yes"},
         ("add a river", "put a river in the middle", "let a river run through it", "give it a river",
          "place a river there"),
         ("put a river there", "add a river in the middle")),
    Kind("no river", "landscape", {"river": "no"},
         ("remove the river", "take the river away", "delete the river", "make the river disappear",
          "get rid of the river"),
         ("take away the river", "make the river go away")),
    Kind("house", "landscape", {"house": "yes"},
         ("add a house", "put a house there", "build a house", "place a house on the ground", "give it a house"),
         ("place a house there", "put a house on the ground")),
    Kind("rainbow", "landscape", {"rainbow": "yes"},
         ("add a rainbow", "put a rainbow in the sky", "let a rainbow appear", "give it a rainbow",
          "place a rainbow in the sky"),
         ("put a rainbow there", "add a rainbow in the sky"), {"time": ("day", "sunset"), "mountains": ("no",)}),
    Kind("wall", "artwork", {"backdrop": "*"},
         ("make the wall {c}", "change the wall to {c}", "turn the wall {c}", "paint the wall {c}",
          "give it a {c} wall"),
         ("set the wall to {c}", "let the wall be {c}"), _STILL),
    Kind("table", "artwork", {"table": "*"},
         ("make the table {c}", "change the table to {c}", "turn the table {c}", "paint the table {c}",
          "give it a {c} table"),
         ("set the table to {c}", "let the table be {c}"), _STILL),
    Kind("vase", "artwork", {"vase": "*"},
         ("make the vase {c}", "change the vase to {c}", "turn the vase {c}", "paint the vase {c}",
          "give it a {c} vase"),
         ("set the vase to {c}", "let the vase be {c}"), _STILL),
    Kind("flowers", "artwork", {"flowers": "*"},
         ("add {c} flowers", "put {c} flowers in the vase", "give it {c} flowers", "make the flowers {c}",
          "place {c} flowers in the vase"),
         ("let the flowers be {c}", "place {c} flowers there"), _STILL),
    Kind("no flowers", "artwork", {"flowers": "none"},
         ("remove the flowers", "take the flowers away", "delete the flowers", "make the flowers disappear",
          "get rid of the flowers"),
         ("take away the flowers", "make the flowers go away"), {**_STILL, "flowers": tuple(COLOURS)}),
    Kind("canvas", "artwork", {"backdrop": "*"},
         ("make the background {c}", "change the background to {c}", "turn the background {c}",
          "give it a {c} background", "paint the background {c}"),
         ("set the background to {c}", "let the background be {c}"), _ABSTRACT),
    Kind("shapes", "artwork", {"shapes": "*"},
         ("make the shapes {c}", "change the shapes to {c}", "turn the shapes {c}", "paint the shapes {c}",
          "make all shapes {c}"),
         ("set the shapes to {c}", "let the shapes be {c}"), _ABSTRACT),
    Kind("frame", "artwork", {"frame": "yes"},
         ("add a frame", "put it in a frame", "give it a gold frame", "place a frame around it", "frame the picture"),
         ("put a gold frame around it", "add a gold frame")),
    Kind("no frame", "artwork", {"frame": "no"},
         ("remove the frame", "take the frame away", "delete the frame", "make the frame disappear",
          "get rid of the frame"),
         ("take away the frame", "make the frame go away")),
    Kind("black and white", None, {"style": "black and white"},
         ("make it black and white", "turn it into a black and white photo", "remove all colour",
          "convert it to black and white", "change it to grey"),
         ("make it grey", "change it to black and white")),
    Kind("sepia", None, {"style": "sepia"},
         ("make it sepia", "turn it into an old photo", "convert it to sepia", "make it look like an old photo",
          "give it a sepia tone"),
         ("change it to sepia", "make it an old photo")),
    Kind("negative", None, {"style": "negative"},
         ("make it a negative", "invert the colours", "turn it into a negative", "convert it to a negative",
          "swap light and dark"),
         ("change it to a negative", "invert all colours")),
    Kind("mosaic", None, {"style": "mosaic"},
         ("make it a mosaic", "turn it into a mosaic", "convert it to a mosaic", "make it look like a mosaic",
          "turn it into big pixels"),
         ("change it to a mosaic", "make it big pixels")),
)


@dataclass(frozen=True)
class Instruction:
    """One instruction for one scene: its words, what it asks for, and which attributes that changes."""

    kind: str
    prompt: str
    scene: Scene
    target: Scene

    @property
    def changed(self):
        return tuple(name for name, value in self.target.values.items() if value != self.scene.values[name])


def instructions(scene, rng, held_out):
    """Every kind that applies to the scene once, in random order, each with a random colour and phrase of its split."""
    kinds = [kind for kind in KINDS if kind.applies(scene) and kind.colours(scene)]
    for kind in rng.sample(kinds, len(kinds)):
        colour = rng.choice(kind.colours(scene))
        man = scene.values.get("person") == "man"
        phrases = kind.held_out if held_out else kind.phrases
        phrase = rng.choice([phrase for phrase in phrases if not (man and "{s}" in phrase)])
        him, he = ("him", "he") if man else ("her", "she")
        yield Instruction(kind.name, phrase.format(c=colour, p=him, o=he, s="her"), scene, kind.target(scene, colour))


def corpus():
    """Every training phrase once (the tokenizer is trained on these)."""
    for kind in KINDS:
        for phrase in kind.phrases:
            pronouns = (("him", "he"), ("her", "she")) if "{p}" in phrase or "{o}" in phrase else ((None, None),)
            for colour in COLOURS if "{c}" in phrase else (None,):
                for him, he in pronouns[-1:] if "{s}" in phrase else pronouns:
                    yield phrase.format(c=colour, p=him, o=he, s="her")


def caption(scene):
    """The scene in words, for editors that take a description of the result instead of an instruction."""
    v = scene.values
    if scene.category == "portrait":
        who = v["person"] if v["being"] == "human" else v["being"]
        parts = [f"a portrait of a{'n' if who[0] in 'aeiou' else ''} {who}",
                 "bald" if v["haircut"] == "bald" else f"{v['haircut']} {v['hair']} hair", f"{v['clothes']} clothes"]
        parts += [text for text, shown in ((f"a {v['hat']}", v["hat"] != "none"),
                                           ("sunglasses", v["sunglasses"] == "yes"), ("a beard", v["beard"] == "yes"))
                                           if shown]
        parts.append(f"{v['background']} background")
    elif scene.category == "landscape":
        parts = [f"a landscape at {v['time']}", f"{v['ground']} ground"] + [f"{v['sky']} sky"] * (v["sky"] != "natural")
        parts += [name for name in ("mountains", "river", "house", "trees", "rainbow") if v[name] == "yes"]
    elif v["subject"] == "still life":
        parts = [f"a still life with a {v['vase']} vase"] + [f"{v['flowers']} flowers"] * (v["flowers"] != "none")
        parts += [f"{v['table']} table", f"{v['backdrop']} wall"]
    else:
        parts = [f"an abstract painting of {v['shapes']} shapes", f"{v['backdrop']} background"]
    parts += ["a gold frame"] * (v.get("frame") == "yes") + [v["style"]] * (v["style"] != "plain")
    return ", ".join(parts)


def generator(seed, split):
    """The random stream of a split; the two splits never share one."""
    return random.Random(f"sifm_min miniature {split} {seed}")


def draw(rng, held_out):
    """A random scene of the split."""
    while True:
        scene = random_scene(rng)
        if scene.held_out == held_out:
            return scene


def changed_share(source, target):
    """The share of pixels that differ visibly (more than 0.06 of the range in a channel), and their mask (64,64)."""
    difference = np.abs(np.asarray(source, np.float32) - np.asarray(target, np.float32)).max(2) / 255
    mask = difference > 0.06
    return float(mask.mean()), mask

