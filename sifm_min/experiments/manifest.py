"""A manifest: the pictures of an experiment with their categories and prompts, one JSON object a line.

    {"id": "portrait-001", "image": "images/portrait-001.jpg", "category": "portrait", "prompt": "make her a witch",
     "unseen_prompts": ["add glasses", ...], "sha256": "..."}

    for item in manifest.read("set/manifest.jsonl"):
        item.picture()                                       # an images.Picture whose bytes are those of sha256
        item.prompts()                                       # the original prompt, then the unseen ones

`image` is relative to the manifest's folder and does not leave it, so that a folder is a whole set and can be moved. Also
allowed: `caption` and `unseen_captions`, descriptions of what an edit should look like, which img2img editors are told in
place of the instructions; and `origin`, an object that says where a picture comes from. {"world": {"seed": 0,
"split": "held-out", "index": 3}} is a picture of the miniature world, whose ground truth `item.sample()` gives.
A line that is not like this is an error that names it. `tools/make_manifest.py` writes manifests.
"""

import hashlib
import json
import re
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path, PurePosixPath

from .. import images
from ..files import writing

NAME = "manifest.jsonl"
TEXTS = ("id", "image", "category", "prompt", "sha256")
LISTS = ("unseen_prompts", "unseen_captions")
REQUIRED = (*TEXTS[:4], "unseen_prompts", "sha256")
KEYS = (*REQUIRED, "caption", "unseen_captions", "origin")


@dataclass(frozen=True)
class Item:
    """One picture of a manifest. sha256 is that of the file's bytes; path is where the file is, once it was read."""

    id: str
    image: str
    category: str
    prompt: str
    unseen_prompts: tuple
    sha256: str
    caption: str | None = None
    unseen_captions: tuple = ()
    origin: dict = field(default_factory=dict)
    path: Path | None = None

    @classmethod
    def from_json(cls, given, folder):
        """The object of a line, checked; raises ValueError with a sentence that begins in the middle."""
        if not isinstance(given, dict):
            raise ValueError("is no JSON object")
        if missing := [key for key in REQUIRED if key not in given]:
            raise ValueError(f"has no {missing[0]}")
        if extra := [key for key in given if key not in KEYS]:
            raise ValueError(f"has {extra[0]!r}, which no manifest has; its keys are {', '.join(KEYS)}")
        for key in (*TEXTS, *(("caption",) if "caption" in given else ())):
            if not _is_text(given[key]):
                raise ValueError(f"has a {key} that is no text")
        for key in LISTS:
            if not (isinstance(given.get(key, []), list) and all(map(_is_text, given.get(key, [])))):
                raise ValueError(f"has {key} that are no list of texts")
        if not re.fullmatch(r"\w[\w.-]{0,99}", given["id"]):
            raise ValueError(f"has the id {given['id']!r}; letters, digits, dot, dash and underscore make one, up to 100")
        parts = PurePosixPath(given["image"])
        if parts.is_absolute() or ".." in parts.parts or re.search(r"[\\:\0]", given["image"]):
            raise ValueError(f"has the image {given['image']!r}; give a path inside the manifest's folder, with slashes")
        if not re.fullmatch("[0-9a-f]{64}", given["sha256"]):
            raise ValueError("has a sha256 that is not 64 digits of 0-9 and a-f")
        if len({given["prompt"], *given["unseen_prompts"]}) <= len(given["unseen_prompts"]):
            raise ValueError("has the same prompt twice; unseen prompts differ from the original and from each other")
        if given.get("unseen_captions") and len(given["unseen_captions"]) != len(given["unseen_prompts"]):
            raise ValueError(f"has {len(given['unseen_captions'])} unseen_captions for {len(given['unseen_prompts'])} "
                             "unseen_prompts; give as many, or none")
        if given.get("unseen_captions") and "caption" not in given:
            raise ValueError("has unseen_captions and no caption")
        if not isinstance(given.get("origin", {}), dict):
            raise ValueError("has an origin that is no object")
        return cls(**{key: tuple(value) if key in LISTS else value for key, value in given.items()},
                   path=Path(folder, *parts.parts))

    def to_json(self):
        """The object of a line; what is empty and may be left out is."""
        record = {key: getattr(self, key) for key in KEYS}
        record |= {key: list(record[key]) for key in LISTS}
        return {key: value for key, value in record.items() if key in REQUIRED or value}

    def prompts(self, kind="instruct"):
        """What an editor of this kind (`editor.kind`) is told: for the original prompt, then for each unseen one."""
        if kind != "img2img":
            return [self.prompt, *self.unseen_prompts]
        if self.caption is None or len(self.unseen_captions) != len(self.unseen_prompts):
            raise ValueError(f"{self.id} has no captions, and img2img editors are told what the result looks like; "
                             "add caption and unseen_captions to the manifest")
        return [self.caption, *self.unseen_captions]

    def picture(self):
        """The picture as `images.read` gives it; raises ValueError where the file is gone, damaged or another one."""
        try:
            content = self.path.read_bytes()
        except OSError as error:
            raise ValueError(f"{self.path}: {(error.strerror or str(error)).lower()}") from None
        if hashlib.sha256(content).hexdigest() != self.sha256:
            raise ValueError(f"{self.path} is not the file of the manifest (its sha256 differs); restore it, or make the "
                             "manifest anew")
        return images.read(self.path)

    def sample(self):
        """The miniature.Sample, with its ground truth, that this picture shows; raises ValueError where there is none."""
        world = self.origin.get("world")
        if not (isinstance(world, dict) and {"seed", "split", "index"} == world.keys() and _is_text(world["split"])
                and all(type(world[key]) is int and world[key] >= 0 for key in ("seed", "index"))):
            raise ValueError(f"{self.id} is no picture of the miniature world: its origin does not say which")
        found = _sample(world["seed"], world["split"], world["index"])
        if found.image.tobytes() != self.picture().image.tobytes():
            raise ValueError(f"{self.id}: the miniature world now renders another picture; make the manifest anew")
        if [found.prompt, *found.unseen_prompts][:1 + len(self.unseen_prompts)] != self.prompts():
            raise ValueError(f"{self.id}: its prompts are not those of the miniature world, whose ground truth would not fit")
        return found


def read(path):
    """The items of a manifest file, or of the folder that holds one. Raises ValueError; the pictures are not opened."""
    path = Path(path)
    if path.is_dir():
        path /= NAME
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")             # other line ends may be in texts
    except OSError as error:
        raise ValueError(f"{path}: {(error.strerror or str(error)).lower()}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text, so it is no manifest") from None
    items, seen = [], {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            item = Item.from_json(_loads(line), path.parent)
            if item.id in seen:
                raise ValueError(f"has the id {item.id} of line {seen[item.id]}")
        except (ValueError, RecursionError) as error:
            why = "is no JSON" if isinstance(error, (json.JSONDecodeError, RecursionError)) else str(error)
            raise ValueError(f"{path}, line {number}: {why}") from None
        seen[item.id] = number
        items.append(item)
    if not items:
        raise ValueError(f"{path} lists no pictures")
    return items


def text(items, path=NAME):
    """Items as the text of a manifest file; what `read` would refuse is refused here. Raises ValueError, naming the path."""
    lines, seen = [], set()
    for item in items:
        try:
            Item.from_json(item.to_json(), Path())
        except ValueError as error:
            raise ValueError(f"{path}: {item.id} {error}") from None
        if item.id in seen:
            raise ValueError(f"{path}: two pictures have the id {item.id}")
        seen.add(item.id)
        lines.append(json.dumps(item.to_json(), ensure_ascii=False, allow_nan=False) + "\n")
    return "".join(lines)


def write(path, items, *, overwrite=False):
    """Write items as a manifest file, whole or not at all. Raises ValueError and OSError."""
    writing.write(path, text(items, path), overwrite=overwrite)


def _loads(line):
    def once(pairs):
        if len(dict(pairs)) < len(pairs):
            raise ValueError("has a key twice")
        return dict(pairs)

    def number(text):
        raise ValueError(f"has the number {text}, which JSON does not have")
    return json.loads(line, object_pairs_hook=once, parse_constant=number)


def _is_text(value):
    return isinstance(value, str) and bool(value.strip()) and not re.search("[\0\ud800-\udfff]", value)


@lru_cache(maxsize=8)
def _samples(seed, split, count):
    from .. import miniature
    return miniature.samples(count, seed, split=split)


def _sample(seed, split, index):
    """The index-th sample. The earlier ones are drawn too, so the lists that are kept double in length."""
    return _samples(seed, split, max(8, 1 << index.bit_length()))[index]
