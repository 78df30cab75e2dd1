"""Read text and JSON strictly, and write JSON. Errors of reading are ValueErrors of one sentence that names the file."""

import json
import math
from pathlib import Path


def loads(text):
    """Parse JSON as its standard defines it: no NaN, and no key twice. Raises ValueError, RecursionError."""
    def unique(pairs):
        if len({name for name, _ in pairs}) < len(pairs):
            raise ValueError("a key occurs twice")
        return dict(pairs)

    def refuse(name):
        raise ValueError(f"{name} is not JSON")
    return json.loads(text, object_pairs_hook=unique, parse_constant=refuse)


def read_text(path, absent=None):
    """The text of a UTF-8 file. absent: the sentence to raise where there is no such file."""
    try:
        return Path(path).read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise ValueError(absent or f"{path}: no such file") from None
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path}: is not UTF-8 text") from None


def read_object(path, absent=None):
    """The JSON object in a file. absent: the sentence to raise where there is no such file."""
    text = read_text(path, absent)
    try:
        value = loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: is no JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: is no JSON object")
    return value


def to_json(record, indent=None):
    """JSON text; numbers that JSON does not have become the strings "inf", "-inf" and "nan", and paths their names."""
    def plain(value):
        if isinstance(value, dict):
            return {str(key): plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        if isinstance(value, float) and not math.isfinite(value):
            return str(float(value))
        return str(value) if isinstance(value, Path) else value
    return json.dumps(plain(record), indent=indent)
