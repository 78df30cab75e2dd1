"""Samples of the miniature's world: a photograph, an instruction, its exact result, and five unseen instructions.

    from sifm_min.miniature import pictures
    sample = pictures.samples(1, seed=3, pictures="photographs")[0]     # .image .prompt .unseen_prompts .category .target

The world is photographs. An instruction is a function of a picture (`kinds.py`), so its result is exact for any picture.
"""

import json
import random
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

import numpy as np
from PIL import Image

from .. import images
from .kinds import KINDS

WORDINGS = ("held-out", "train")
FORMATS = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
UNSEEN = 5


@dataclass(frozen=True)
class Sample:
    """A picture with an instruction and its exact result.

    image, target: RGB PIL pictures, square, of one size. kind, option: of the instruction (`kinds.KINDS`). unseen: the same
    picture with five instructions of other kinds, each a Sample of its own, without further ones. category: of the
    photograph. photograph: its name.
    """

    image: Image.Image
    kind: str
    option: str
    prompt: str
    target: Image.Image
    category: str
    photograph: str
    unseen: tuple = ()

    @property
    def unseen_prompts(self):
        return [sample.prompt for sample in self.unseen]


def samples(n, seed=0, *, pictures=None, size=256, wordings="held-out"):
    """`n` samples of `size` pixels: the photographs in a random order, the categories in turn, again and again.

    pictures: a folder (LICENSES.jsonl in it may state the categories), or a list of paths or PIL pictures. wordings:
    "held-out" for phrases that are never used in training, "train" for the others. The kinds that apply to a picture are
    equally likely. One seed gives one result. Raises ValueError where a picture is refused or allows too few kinds.
    """
    found = photographs_of(pictures)
    rng, by_category = generator(seed), {}
    rng.shuffle(found)
    for photograph in found:
        by_category.setdefault(photograph[1], []).append(photograph)
    turns = [cycle(of_one) for of_one in by_category.values()]
    drawn = []
    for i, turn in enumerate(islice(cycle(turns), n)):
        name, category, image = next(turn)
        drawn.append(draw_sample(image, f"{seed} {i}", name=name, category=category, size=size, wordings=wordings))
    return drawn


def draw_sample(image, seed, *, name="", category="photograph", size=256, wordings="held-out"):
    """The sample that a seed (a number or a text) draws from one photograph: a path or a PIL picture.

    The crop is a square of seven tenths of the shorter side or more. Raises ValueError for a photograph without at least
    six kinds that apply.
    """
    if wordings not in WORDINGS:
        raise ValueError(f"wordings {wordings!r}: choose held-out or train")
    rng = generator(seed)
    picture = random_square(opened(image), rng, size)
    pixels = np.asarray(picture, np.float32) / 255
    kinds, drawn = list(KINDS.values()), []
    rng.shuffle(kinds)
    for kind in kinds:
        option = rng.choice([*kind.options])
        if kind.applies(pixels, option):
            phrases = kind.held_out(option) if wordings == "held-out" else kind.phrases(option)
            drawn.append((picture, kind.name, option, rng.choice(phrases), as_image(kind.target(pixels, option)),
                          category, name))
        if len(drawn) == UNSEEN + 1:
            return Sample(*drawn[0], unseen=tuple(Sample(*other) for other in drawn[1:]))
    raise ValueError(f"{name or 'the picture'}: only {len(drawn)} kinds of instruction change it visibly; choose a picture "
                     "that shows more")


def generator(seed):
    """The random generator of a seed, the same in every process."""
    return random.Random(f"sifm_min pictures {seed}")


def random_square(image, rng, size):
    """A random square of a PIL picture, of .7 to 1 of its shorter side, scaled to `size` pixels."""
    side = rng.uniform(0.7, 1) * min(image.size)
    left, top = rng.uniform(0, image.width - side), rng.uniform(0, image.height - side)
    return image.resize((size, size), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side))


def as_image(pixels):
    """Pixels (H,W,3) in [0,1], rounded to 8 bits, as a PIL picture."""
    return Image.fromarray((pixels * 255).round().astype(np.uint8))


def opened(image):
    """A path or a PIL picture of any mode as an upright RGB picture."""
    return images.picture(image).image if isinstance(image, Image.Image) else images.read(image).image


def photographs_of(pictures):
    """The photographs, in a fixed order, as (name, category, path or PIL picture). See `samples`."""
    if pictures is None:
        raise ValueError("pictures: give a folder of photographs, or a list of paths or PIL pictures")
    if not isinstance(pictures, str | Path):
        found = [(f"picture {i}" if isinstance(item, Image.Image) else Path(item).name, "photograph", item)
                 for i, item in enumerate(pictures)]
    else:
        found = _of_folder(Path(pictures))
    if not found:
        raise ValueError(f"{pictures}: no pictures there")
    return found


def _of_folder(folder):
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    notes = folder / "LICENSES.jsonl"
    rows = map(json.loads, notes.read_text(encoding="utf-8").splitlines()) if notes.is_file() else ()
    categories = {row["file"]: row.get("category", "photograph") for row in rows}
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in FORMATS)
    names = [path.relative_to(folder).as_posix() for path in paths]
    return [(name, categories.get(name, "photograph"), path) for name, path in zip(names, paths, strict=True)]
