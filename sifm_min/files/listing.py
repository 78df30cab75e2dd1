"""Lists of pictures from the files and folders that a command was given, with what is left out and why."""

from pathlib import Path
from typing import NamedTuple

# Suffixes of pictures, readable here or not: what cannot be read is refused by name, never passed over.
SUFFIXES = {
    ".apng", ".arw", ".avif", ".avifs", ".bmp", ".cr2", ".cr3", ".dib", ".dng", ".exr", ".gif", ".hdr", ".heic", ".heif",
    ".hif", ".ico", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".jpx", ".jxl", ".mpo", ".nef", ".orf", ".pbm", ".pgm",
    ".png", ".pnm", ".ppm", ".psd", ".raf", ".raw", ".rw2", ".svg", ".tga", ".tif", ".tiff", ".webp",
}


EARLIER = "the result of an earlier run (name it, to have it all the same)"


class Listing(NamedTuple):
    """pictures: the files to work on, each once. left_out: {reason: [path, ...]} of everything else that was seen."""

    pictures: list
    left_out: dict


def list_pictures(paths, is_result=lambda path: False):
    """The `Listing` of files as they are, and of folders with the pictures directly in them, by name.

    A file that was named is never left out. In a folder, hidden files do not count; subfolders, files without a picture's
    suffix, and those for which is_result(path) holds are left out. Raises ValueError for a folder that has no pictures.
    """
    pictures, left_out = {}, {}
    for path in map(Path, paths):
        if not path.is_dir():
            pictures[path] = None
            continue
        inside = []
        for entry in sorted(path.iterdir()):
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                reason = "a folder in a folder (name it too, to have its pictures)"
            elif is_result(entry):
                reason = EARLIER
            elif entry.suffix.lower() not in SUFFIXES:
                reason = "no picture, by its name"
            else:
                inside.append(entry)
                continue
            left_out.setdefault(reason, []).append(entry)
        if not inside:
            only = " but earlier results" if EARLIER in left_out else ""
            raise ValueError(f"{path}: {'nothing' if only else 'no pictures'} in this folder{only}")
        pictures |= dict.fromkeys(inside)
    left_out = {reason: [file for file in files if file not in pictures] for reason, files in left_out.items()}
    return Listing(list(pictures), {reason: files for reason, files in left_out.items() if files})
