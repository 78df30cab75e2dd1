"""Canaries: ten edits with a known verdict, drawn here. A judge that misjudges two of them is not used.

For a few cents, and before the samples are paid for, they detect a model that was replaced under its name, one that cannot
see or compare two pictures, a context that is cut, and a broken answer format.
"""

from dataclasses import dataclass

PASS = 9                                                     # of the ten; one may be a matter of opinion
SIZE = 384                                                   # no service scales this down


@dataclass(frozen=True)
class Canary:
    """A pair of PIL pictures, the instruction, and the right findings."""

    name: str
    original: object
    edited: object
    prompt: str
    semantic_mismatch: bool
    perceptual_degradation: bool


def canaries():
    """The ten canaries, the same each time."""
    from PIL import Image
    ground, red, blue, green, black = (214, 208, 196), (200, 40, 40), (40, 70, 200), (40, 150, 60), (16, 16, 16)
    disc = _scene(ground, red)
    pixels = disc.resize((24, 24), Image.Resampling.BOX).resize(disc.size, Image.Resampling.NEAREST)
    make_blue = "make the disc blue"
    return [
        Canary("done", disc, _scene(ground, blue), make_blue, False, False),
        Canary("unchanged", disc, disc, make_blue, True, False),
        Canary("done, in noise", disc, _noisy(_scene(ground, blue), 1), make_blue, False, True),
        Canary("noise alone", disc, _noise(2), make_blue, True, True),
        Canary("pixel art", disc, pixels, "turn it into pixel art", False, False),
        Canary("wrong colour", disc, _scene(ground, green), make_blue, True, False),
        Canary("removed", disc, _scene(ground, ground), "remove the disc", False, False),
        Canary("wrong shape", disc, _scene(ground, red, square=True), make_blue, True, False),
        Canary("unchanged, in noise", disc, _noisy(disc, 3), make_blue, True, True),
        Canary("done, torn", disc, _torn(_scene(black, red), 4), "make the background black", False, True),
    ]


def _scene(ground, colour, square=False):
    from PIL import Image, ImageDraw
    image = Image.new("RGB", (SIZE, SIZE), ground)
    draw = ImageDraw.Draw(image)
    (draw.rectangle if square else draw.ellipse)((SIZE // 4, SIZE // 4, 3 * SIZE // 4, 3 * SIZE // 4), fill=colour)
    return image


def _noise(seed):
    import numpy as np
    from PIL import Image
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8))


def _noisy(image, seed):
    from PIL import Image
    return Image.blend(image, _noise(seed), 0.5)


def _torn(image, seed):
    """Bands of random colours across the picture, and its rows displaced."""
    import numpy as np
    from PIL import Image
    rng, pixels = np.random.default_rng(seed), np.array(image)
    for top in range(0, SIZE, 16):
        pixels[top:top + 16] = np.roll(pixels[top:top + 16], rng.integers(-40, 41), axis=1)
        if top % 64 == 0:
            pixels[top:top + 16] = rng.integers(0, 256, (16, SIZE, 3), dtype=np.uint8)
    return Image.fromarray(pixels)
