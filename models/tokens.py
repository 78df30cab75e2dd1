"""Shared by the tokenizers: reading their files, cutting special tokens out of a text, and the kinds of characters.

Standard library only.
"""

import json
import re
import unicodedata

# Unicode White_Space. str.isspace would add U+001C to U+001F, which the published pattern takes for symbols.
WHITE_SPACE = frozenset("\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000") | {chr(c) for c in range(8192, 8203)}


def read(path):
    """The text of a file; a ValueError names it."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from None


def read_bytes(path):
    """The bytes of a file; a ValueError names it."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None


def read_json(path):
    """The JSON object in a file; a ValueError names it."""
    text = read(path)
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no JSON object")
    return found


def check_unicode(text):
    """A ValueError where a text has a lone surrogate."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the prompt is not valid Unicode: a lone surrogate U+{ord(text[error.start]):04X} at {error.start}"
        ) from None


def splitter(texts):
    """A pattern that splits at any of `texts`, the longest first, and keeps them; one that never matches for none."""
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile(f"({'|'.join(re.escape(text) for text in longest_first) or '(?!)'})")


def alternate(splitter, text):
    """The parts of `text` with True for those that the splitter matched."""
    return [(part, index % 2 == 1) for index, part in enumerate(splitter.split(text))]


def kind(character):
    """"L" for a letter, "N" for a number, " " for white space and "S", symbol, for all else, by Python's Unicode tables."""
    if character in WHITE_SPACE:
        return " "
    major = unicodedata.category(character)[0]
    return major if major in "LN" else "S"
