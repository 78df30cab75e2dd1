"""Names by content: SHA-256 of a JSON-ready value and of a picture's pixels, and a hash of how a picture looks."""

import hashlib
import json


def digest(value):
    """The SHA-256 of a JSON-ready value in one canonical form."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def picture_sha256(image):
    """The SHA-256 of an RGB picture's size and pixels: equal for the same picture in another file."""
    return digest([*image.size, hashlib.sha256(image.tobytes()).hexdigest()])


def difference_hash(image):
    """256 bits of how a PIL picture looks, as 64 hex digits: is each of 16x17 cells brighter than the one to its left?

    Scaling, JPEG and another file format change a few bits; another picture has about half of them different, and one with
    large even areas, such as a sunset, at least 30.
    """
    from PIL import Image  # here, because a command's --help loads this file and no PIL

    grey = image.convert("L").resize((17, 16), Image.Resampling.LANCZOS).tobytes()
    bits = "".join("01"[grey[17 * row + column + 1] > grey[17 * row + column]] for row in range(16) for column in range(16))
    return f"{int(bits, 2):064x}"


def bits_apart(one, other):
    """The number of bits in which two difference hashes differ, 0 to 256."""
    return (int(one, 16) ^ int(other, 16)).bit_count()
