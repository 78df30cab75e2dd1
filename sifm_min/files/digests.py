"""Names by content: SHA-256 of a JSON-ready value, and of a picture's pixels."""

import hashlib
import json


def digest(value):
    """The SHA-256 of a JSON-ready value in one canonical form."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def picture_sha256(image):
    """The SHA-256 of an RGB picture's size and pixels: equal for the same picture in another file."""
    return digest([*image.size, hashlib.sha256(image.tobytes()).hexdigest()])
