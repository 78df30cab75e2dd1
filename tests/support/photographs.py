"""Pictures of random colours for the commands to work on. Sizes are (width, height)."""

from pathlib import Path

import numpy as np
from PIL import Image

FORMATS = {".jpe": "JPEG", ".mpo": "JPEG", ".apng": "PNG"}   # of the names for which Pillow writes another format, or none


def colours(size=(24, 20), bands=3, seed=0):
    """Random samples (H,W,bands) of 8 bits."""
    return np.random.default_rng(seed).integers(0, 256, (size[1], size[0], bands), np.uint8)


def photo(path, size=(24, 20), mode="RGB", seed=0, **options):
    """Write a picture of random colours, and return it."""
    bands = len(Image.new(mode, (1, 1)).getbands())
    values = colours(size, bands, seed)
    image = Image.merge(mode, [Image.fromarray(values[..., band]) for band in range(bands)])
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **{"format": FORMATS.get(path.suffix), **options})
    return image


def smooth(width, height, seed=0):
    """A picture of random colours that flow into one another: at every size there is something to resize."""
    return Image.fromarray(colours((5, 6), 3, seed)).resize((width, height), Image.Resampling.BICUBIC)
