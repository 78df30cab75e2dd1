"""Photographs to draw samples from: those that ship with the package, and those of a folder of your own.

    from sifm_min.miniature import photographs
    photographs.shipped()                                    # people, landscapes and artworks, each with a free licence
    photographs.of_folder("photos")                          # as the LICENSES.jsonl in the folder lists them, or all of it

`models/miniature/photographs/ATTRIBUTIONS.jsonl` has author, source, licence and change of each picture that ships. None of
them was used in training.
"""

from dataclasses import dataclass
from pathlib import Path

from .. import images, models
from ..files import json_text
from ..files.listing import list_pictures

CATEGORIES = ("people", "landscapes", "artworks")
SHIPPED = Path(models.__file__).parent / "miniature" / "photographs"
LICENCES = "LICENSES.jsonl"


@dataclass(frozen=True)
class Photograph:
    """A picture's file and its origin.

    name: the file's path inside its collection, such as "people/person-0001.jpg". category: one of CATEGORIES, or
    "photograph". title, author, source (a place that holds many), place (the path there), licence, sha256 (of the file): text,
    or None where the collection does not say.
    """

    name: str
    path: Path
    category: str = "photograph"
    title: str | None = None
    author: str | None = None
    source: str | None = None
    place: str | None = None
    licence: str | None = None
    sha256: str | None = None

    def read(self):
        """The picture, PIL RGB, upright; raises ValueError, one sentence that names the file."""
        return images.read(self.path).image


def shipped():
    """The photographs that ship, at most 640 pixels on the long side, as a list of `Photograph`."""
    return _listed(SHIPPED, SHIPPED / "ATTRIBUTIONS.jsonl")


def of_folder(folder, use="evaluate", notes=None):
    """The photographs of a folder, as a list of `Photograph`.

    A LICENSES.jsonl in the folder has one JSON object a line: "file" (a path in the folder), "category", and optionally
    "title", "author", "source", "path", "licence", "sha256" and "use" ("train" or "evaluate"; without it, "evaluate"). Only the
    lines for this use are taken; use=None takes all. notes: another file of such lines to read in its place, as
    tools/evaluation.jsonl. Without any, these are the pictures directly in the folder, by name, of the category
    "photograph".

    Raises ValueError, one sentence, for a folder without pictures, a line that is not such an object, or a missing file.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder of photographs")
    if notes is None and not (folder / LICENCES).is_file():
        return [Photograph(path.name, path) for path in list_pictures([folder]).pictures]
    notes = Path(notes or folder / LICENCES)
    found = _listed(folder, notes, use)
    if not found:
        raise ValueError(f"{notes} lists no photograph for the use {use!r}")
    return found


def _listed(folder, notes, use=None):
    """The photographs on the lines of a notes file, of one use or of all."""
    found = {}
    for number, line in enumerate(json_text.read_text(notes).splitlines(), 1):
        if not line.strip():
            continue
        photograph, its_use = _of_line(folder, line, f"{notes}, line {number}")
        if found.setdefault(photograph.name, (photograph, its_use))[0] is not photograph:
            raise ValueError(f"{notes}, line {number}: {photograph.name} is listed twice")
    return [photograph for photograph, its_use in found.values() if use in (None, its_use)]


def _of_line(folder, line, where):
    """(photograph, use) of a line of notes; `where` names it in errors."""
    try:
        row = json_text.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: is no JSON ({error})") from None
    if not isinstance(row, dict) or not isinstance(row.get("file"), str):
        raise ValueError(f'{where}: needs an object with "file"')
    name, category = row["file"], row.get("category", "photograph")
    if category not in (*CATEGORIES, "photograph"):
        raise ValueError(f"{where}: the category {category!r} is none of {', '.join(CATEGORIES)}")
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{where}: {name} is outside the folder")
    if not path.is_file():
        raise ValueError(f"{where}: there is no file {path}")
    told = {key: row.get(key) for key in ("title", "author", "source", "licence", "sha256")}
    return Photograph(name, path, category, place=row.get("path"), **told), row.get("use", "evaluate")
