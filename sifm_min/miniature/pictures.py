"""Samples of the miniature's world: a photograph, an instruction, its exact result, and five unseen instructions.

    from sifm_min.miniature import pictures
    sample = pictures.samples(1, seed=3)[0]                  # .image .prompt .unseen_prompts .category .target
    pictures.samples(9, pictures="my photographs")           # of your own

The world is photographs. An instruction is a function of a picture (`kinds.py`), so its result is exact for any picture.
"""

import random
from collections import Counter
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import numpy as np
from PIL import Image

from .. import images
from . import photographs
from .kinds import KINDS
from .photographs import Photograph

SIZE = 256                                                   # pixels a side
WORDINGS = ("held-out", "train")
UNSEEN = 5
SHARES = {"people": 35, "landscapes": 35, "artworks": 30}    # of the paper's pictures, in percent


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


def samples(n, seed=0, *, pictures=None, size=None, wordings="held-out"):
    """`n` samples of `size` pixels (SIZE): the photographs of each category in a random order, again and again.

    pictures: a folder (see `photographs.of_folder`), or a list of paths, PIL pictures or `Photograph`s; without it, the
    photographs that ship. wordings: "held-out" for phrases that are never used in training, "train" for the others. The
    categories have the paper's shares, the kinds that apply to a picture are equally likely. One seed gives one result.
    Raises ValueError where a picture is refused or allows too few kinds.
    """
    found, rng, turns = photographs_of(pictures), generator(seed), {}
    rng.shuffle(found)
    for category in sorted({photograph.category for photograph in found}):
        turns[category] = cycle([photograph for photograph in found if photograph.category == category])
    shares, taken, drawn = {category: SHARES.get(category, 35) for category in turns}, Counter(), []
    for i in range(n):
        category = max(turns, key=lambda category: shares[category] * (i + 1) / sum(shares.values()) - taken[category])
        taken[category] += 1
        drawn.append(draw_sample(next(turns[category]), f"{seed} {i}", size=size, wordings=wordings))
    return drawn


def draw_sample(photograph, seed, *, size=None, wordings="held-out"):
    """The sample that a seed (a number or a text) draws from one photograph: a `Photograph`, a path or a PIL picture.

    The crop is a square of seven tenths of the shorter side or more. Raises ValueError for a photograph without at least
    six kinds that apply.
    """
    if wordings not in WORDINGS:
        raise ValueError(f"wordings {wordings!r}: choose held-out or train")
    (photograph,) = photographs_of([photograph])
    rng = generator(seed)
    picture = random_square(photograph.read(), rng, size or SIZE)
    pixels = np.asarray(picture, np.float32) / 255
    kinds, drawn = list(KINDS.values()), []
    rng.shuffle(kinds)
    for kind in kinds:
        option = rng.choice([*kind.options])
        if kind.applies(pixels, option):
            phrases = kind.held_out(option) if wordings == "held-out" else kind.phrases(option)
            drawn.append((kind.name, option, rng.choice(phrases)))
        if len(drawn) == UNSEEN + 1:
            return sample_with(picture, drawn, photograph.category, photograph.name)
    raise ValueError(f"{photograph.name}: only {len(drawn)} kinds of instruction change it visibly; choose a picture that "
                     "shows more")


def sample_with(image, instructions, category, photograph):
    """The sample of a PIL picture, RGB, with stated instructions: (kind, option, prompt), the original one first.

    Raises ValueError for an instruction that there is not, and for sides that the judges' autoencoder cannot take.
    """
    if image.width % 8 or image.height % 8:
        raise ValueError(f"a sample of {image.width}x{image.height} pixels: give sides that are multiples of 8")
    pixels, made = np.asarray(image, np.float32) / 255, []
    for kind, option, prompt in instructions:
        if kind not in KINDS or option not in KINDS[kind].options:
            raise ValueError(f"there is no edit {kind!r} with the option {option!r}")
        if prompt not in (*KINDS[kind].phrases(option), *KINDS[kind].held_out(option)):
            raise ValueError(f"{prompt!r} does not ask for {' '.join(filter(None, (kind, option)))}")
        made.append((image, kind, option, prompt, as_image(KINDS[kind].target(pixels, option)), category, photograph))
    return Sample(*made[0], unseen=tuple(Sample(*other) for other in made[1:]))


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


def photographs_of(pictures):
    """The photographs that `samples` draws from, as a list of `Photograph`; a PIL picture becomes a `Given`."""
    if pictures is None:
        return photographs.shipped()
    if isinstance(pictures, str | Path):
        return photographs.of_folder(pictures)
    found = [item if isinstance(item, Photograph | Given) else Given(f"picture {i}", item) if isinstance(item, Image.Image)
             else Photograph(Path(item).name, Path(item)) for i, item in enumerate(pictures, 1)]
    if not found:
        raise ValueError("pictures: the list is empty; leave it out for the photographs that ship")
    return found


@dataclass(frozen=True, eq=False)
class Given:
    """A PIL picture of any mode in place of a `Photograph`."""

    name: str
    image: Image.Image
    category: str = "photograph"

    def read(self):
        """The picture, PIL RGB, upright."""
        return images.picture(self.image).image
