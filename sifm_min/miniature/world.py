"""The miniature's procedural world: scenes with named attributes, drawn at random from a seed.

A scene is a category (portrait, landscape or artwork: the paper's three) with named attributes and a little jitter.
`drawing.py` renders it at 64x64, `wording.py` has the instructions. An instruction changes attributes. The picture that
it asks for is the changed scene, rendered with the same jitter. That target is exact and unique, and it can be inferred
from the picture: every object that can be added has its place in the scene. Colours and positions were chosen so that
every instruction changes at least 3 % of the pixels.
"""

import hashlib
import random
from dataclasses import dataclass, field, replace

SCENE_SIZE = 64

COLOURS = {
    "red": (214, 48, 44), "yellow": (244, 208, 63), "green": (60, 160, 80),
    "blue": (58, 104, 214), "purple": (140, 70, 180), "white": (238, 238, 234),
}
HAIR = {"black": (36, 32, 34), "brown": (112, 72, 44), **COLOURS}
SKIN = {"fair": (242, 206, 180), "tan": (210, 160, 120), "dark": (128, 86, 62)}
GROUND = {"grass": (96, 170, 84), "desert": (226, 196, 130), "snow": (240, 244, 250), "autumn": (186, 110, 48)}
SKY = {"day": ((120, 180, 240), (196, 224, 250)), "sunset": ((222, 96, 84), (252, 190, 108)),
       "night": ((14, 16, 48), (40, 44, 92))}

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
INVISIBLE = {"person"}                                       # sets the pronoun, changes no pixel


@dataclass(frozen=True)
class Scene:
    """One scene. values: attribute of the category -> value; jitter: five numbers in [-1,1]."""

    category: str
    values: dict = field(hash=False)
    jitter: tuple

    def changed(self, changes):
        """The scene with these attributes changed and the same jitter."""
        return replace(self, values={**self.values, **changes})

    @property
    def held_out(self):
        """True for the tenth of all attribute combinations that never occurs in training, with any jitter."""
        text = repr((self.category, sorted(self.values.items())))
        return hashlib.sha256(text.encode()).digest()[0] < 26


def random_scene(rng, category=None):
    """A scene drawn attribute by attribute. Objects that instructions add are rare, so that they can be added."""
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
            values["hair"] = "black"                         # invisible
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


def caption(scene):
    """A description of the scene, for editors whose prompt describes the result."""
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


def visible_attributes(scene):
    """The attributes that are visible in the scene's picture; a hat, a style or another being may hide some."""
    v, shown = scene.values, set(ATTRIBUTES[scene.category]) - INVISIBLE
    if v["style"] != "plain":
        return {"style"}
    if scene.category == "portrait":
        if v["being"] != "human":
            shown -= {"skin", "hair", "haircut"}
        if v["being"] == "alien":
            shown -= {"beard"}
        if v["being"] == "zombie":
            shown -= {"clothes"}
        if v["haircut"] == "bald":
            shown -= {"hair"}
        if v["hat"] != "none":
            shown -= {"haircut", "hair"}
    elif scene.category == "landscape":
        if v["sky"] != "natural":
            shown -= {"time"}
    else:
        shown -= {"shapes"} if v["subject"] == "still life" else {"table", "vase", "flowers"}
    return shown


def generator(seed, split):
    """The random generator of a split; the two splits have different ones."""
    return random.Random(f"sifm_min miniature {split} {seed}")


def draw_scene(rng, held_out):
    """Draw a random scene of the split."""
    while True:
        scene = random_scene(rng)
        if scene.held_out == held_out:
            return scene
