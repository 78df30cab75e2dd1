"""Draw text of any script with the fonts of this system, and write code points where no font has the letter.

Pillow's own font has little more than ASCII, and draws every other letter as the same box. No font is shipped here: for
letters that Pillow's font lacks, the usual font folders are searched for files that have them. A letter that no font has
is written as its code point, such as [U+65E5].
"""

import os
import sys
import unicodedata
from functools import lru_cache
from pathlib import Path

from PIL import ImageFont, features

SUFFIXES = (".ttf", ".otf", ".ttc", ".otc")
ABSENT = "\uffff"                                            # never a letter: what a font draws for it means "missing"
PLACEHOLDERS = ("lastresort",)                               # fonts that have a box for every code point
ODD = ("bold", "black", "heavy", "light", "thin", "italic", "oblique", "mono", "condensed", "serif", "narrow")


def system_folders(environment=os.environ, platform=sys.platform, home=None):
    """The font folders of this kind of system, as paths; they need not exist."""
    home = Path(home or Path.home())
    if platform == "win32":
        local = environment.get("LOCALAPPDATA", home / "AppData" / "Local")
        return [Path(environment.get("WINDIR", r"C:\Windows")) / "Fonts", Path(local) / "Microsoft" / "Windows" / "Fonts"]
    if platform == "darwin":
        return [Path("/System/Library/Fonts"), Path("/Library/Fonts"), home / "Library" / "Fonts"]
    shared = environment.get("XDG_DATA_DIRS") or "/usr/local/share:/usr/share"
    own = environment.get("XDG_DATA_HOME") or home / ".local" / "share"
    return [*(Path(folder) / "fonts" for folder in shared.split(":") if folder), Path(own) / "fonts", home / ".fonts"]


class Letters:
    """Fonts of one size for a set of texts. folders: where to search, as `system_folders` gives them by default.

    `legible` prepares a text; the other calls take texts that it prepared.
    """

    def __init__(self, texts, size, folders=None):
        self.plain = ImageFont.load_default(size)
        needed = {letter for text in texts for letter in _clean(text) if letter.strip()}
        found = ()
        if missing := frozenset(letter for letter in needed if not _has(self.plain, letter)):
            found = _search(missing, size, tuple(system_folders() if folders is None else folders))
        self.fonts = [self.plain, *(font for font, _ in found)]
        self.font_of = {letter: font for font, letters in reversed(found) for letter in letters}
        self.unknown = missing - self.font_of.keys()
        self.font_of.update(dict.fromkeys(needed - missing, self.plain))

    def legible(self, text):
        """The text without invisible characters, and with code points for letters that no font has."""
        return "".join(f"[U+{ord(letter):04X}]" if letter in self.unknown else letter for letter in _clean(text))

    def length(self, text):
        """The width of a line in pixels."""
        return sum(font.getlength(part) for font, part in self._runs(text))

    def draw(self, draw, left, top, text):
        """Draw one line in black on an ImageDraw, all fonts on one baseline."""
        for font, part in self._runs(text):
            if isinstance(self.plain, ImageFont.FreeTypeFont):
                draw.text((left, top + self.plain.getmetrics()[0]), part, fill="black", font=font, anchor="ls")
            else:                                            # the bitmap font of a Pillow without FreeType
                draw.text((left, top), part, fill="black", font=font)
            left += font.getlength(part)

    def _runs(self, text):
        """[(font, part)] of a line: neighbours of one font together, spaces and marks with the letter before them."""
        runs = []
        for letter in text:
            font = self.font_of.get(letter, self.plain)
            if runs and (letter.isspace() or unicodedata.category(letter)[0] == "M"):
                font = runs[-1][0]
            if runs and runs[-1][0] is font:
                runs[-1] = font, runs[-1][1] + letter
            else:
                runs.append((font, letter))
        return [(font, _in_reading_order(part)) for font, part in runs]


def _clean(text):
    """Composed letters where Unicode has them, without control, format and variation characters."""
    return "".join(letter for letter in unicodedata.normalize("NFC", text)
                   if letter.isspace() or unicodedata.category(letter) not in ("Cc", "Cf")
                   and unicodedata.name(letter, "").find("VARIATION SELECTOR") < 0)


def _has(font, letter):
    """True if the font has an own picture for this letter, rather than nothing or the sign for a missing one."""
    if unicodedata.category(letter) == "Cs":                 # half a letter, from a file name of unknown encoding
        return False
    if not isinstance(font, ImageFont.FreeTypeFont):
        return letter.isascii()
    mask = font.getmask(letter)
    return mask.getbbox() is not None and (mask.size, bytes(mask)) != _missing(font)


@lru_cache(maxsize=64)
def _missing(font):
    mask = font.getmask(ABSENT)
    return mask.size, bytes(mask)


@lru_cache(maxsize=8)
def _search(missing, size, folders):
    """((font, its letters of `missing`), ...): few files of these folders that have as many of the letters as can be."""
    offers = []
    for path in _files(folders):
        try:                                                 # the basic layout asks the font for each letter alone
            font = ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)
            letters = frozenset(letter for letter in missing if _has(font, letter))
        except (OSError, ValueError):
            continue                                         # damaged, or of pictures in fixed sizes, as emoji fonts are
        offers.append((path, letters))
        if letters == missing:
            break
    found, left = [], set(missing)
    while offers and left:
        path, letters = max(offers, key=lambda offer: len(offer[1] & left))      # the first among equals
        if not letters & left:
            break
        found.append((ImageFont.truetype(str(path), size), letters))
        left -= letters
    return tuple(found)


def _files(folders):
    """The font files of these folders and their subfolders: upright faces of usual weight first, then by name."""
    found = {}
    for folder in folders:
        for place, _, names in os.walk(folder):
            for name in names:
                if name.lower().endswith(SUFFIXES) and not name.lower().startswith(PLACEHOLDERS):
                    found[os.path.join(place, name)] = (any(word in name.lower() for word in ODD), name.lower())
    return sorted(found, key=lambda path: (*found[path], path))


def _in_reading_order(text):
    """Text as the layout needs it: without Raqm a run from right to left is turned, its marks kept behind their letters."""
    if features.check("raqm") or not any(unicodedata.bidirectional(letter) in ("R", "AL") for letter in text):
        return text
    clusters = []
    for letter in text:
        if clusters and unicodedata.category(letter)[0] == "M":
            clusters[-1] += letter
        else:
            clusters.append(letter)
    return "".join(reversed(clusters))
