"""Pictures for the wire: PNGs in base64, made from the pixels alone."""

import base64
import io
import math
import threading
from functools import lru_cache

from PIL import Image

ENCODING = [threading.Lock() for _ in range(16)]


def encoded(parts):
    """Parts for the wire: ("text", text) and ("image", base64 of a PNG)."""
    pairs = []
    for part in parts:
        if isinstance(part, str):
            pairs.append(("text", part))
            continue
        pixels = part.convert("RGB")
        size, content = pixels.size, pixels.tobytes()
        with ENCODING[hash(content) % len(ENCODING)]:        # a picture is encoded once, also for several threads
            pairs.append(("image", _png(size, content)))
    return pairs


@lru_cache(maxsize=16)                                       # an original is sent with each of its edits, to every judge
def _png(size, pixels):
    """base64 of the PNG of RGB pixels: without EXIF, without a profile."""
    file = io.BytesIO()
    Image.frombytes("RGB", size, pixels).save(file, "PNG", compress_level=1)
    return base64.b64encode(file.getvalue()).decode("ascii")


def picture_tokens(image):
    """An upper bound on a picture's tokens under each of the published tilings."""
    unit = min(768, max(256, min(image.size) / 1.5))
    return max(1120, 258 * math.ceil(image.width / unit) * math.ceil(image.height / unit))
