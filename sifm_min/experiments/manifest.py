"""A manifest: the pictures of an experiment with their categories and prompts, one JSON object a line.

    {"id": "portrait-001", "image": "images/portrait-001.jpg", "category": "portrait", "prompt": "make her a witch",
     "unseen_prompts": ["add glasses", ...], "sha256": "..."}

    for item in manifest.read_manifest("set/manifest.jsonl"):
        item.picture()                                       # an images.Picture whose bytes are those of sha256
        item.prompts()                                       # the original prompt, then the unseen ones

`image` is relative to the manifest's folder and stays inside it, so that a folder is a whole set and can be moved. Optional:
`caption` and `unseen_captions`, descriptions of the results, which img2img editors get in place of the instructions; and
`origin`, an object with the source of the picture. Where it has `edits`, the kind and the option of each prompt's instruction,
[["night", ""], ...], the exact results are known (`miniature/kinds.py`), and `item.sample()` returns them. Any other line is
an error that names the line.
`tools/make_manifest.py` writes manifests.
"""

import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from .. import images
from ..files import writing

FILE_NAME = "manifest.jsonl"
TEXTS = ("id", "image", "category", "prompt", "sha256")
LISTS = ("unseen_prompts", "unseen_captions")
REQUIRED = (*TEXTS[:4], "unseen_prompts", "sha256")
KEYS = (*REQUIRED, "caption", "unseen_captions", "origin")


@dataclass(frozen=True)
class Item:
    """One picture of a manifest. sha256: of the file's bytes. path: of the file; None before the manifest was read."""

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
    def from_json(cls, entry, folder):
        """Check the object of a line. Raises ValueError with the predicate of a sentence, such as "has no prompt"."""
        if not isinstance(entry, dict):
            raise ValueError("is no JSON object")
        if missing := [key for key in REQUIRED if key not in entry]:
            raise ValueError(f"has no {missing[0]}")
        if extra := [key for key in entry if key not in KEYS]:
            raise ValueError(f"has {extra[0]!r}, which no manifest has; its keys are {', '.join(KEYS)}")
        for key in (*TEXTS, *(("caption",) if "caption" in entry else ())):
            if not _is_text(entry[key]):
                raise ValueError(f"has a {key} that is no text")
        for key in LISTS:
            if not (isinstance(entry.get(key, []), list) and all(map(_is_text, entry.get(key, [])))):
                raise ValueError(f"has {key} that are no list of texts")
        if not re.fullmatch(r"\w[\w.-]{0,99}", entry["id"]):
            raise ValueError(f"has the id {entry['id']!r}; letters, digits, dot, dash and underscore make one, up to 100")
        parts = PurePosixPath(entry["image"])
        if parts.is_absolute() or ".." in parts.parts or re.search(r"[\\:\0]", entry["image"]):
            raise ValueError(f"has the image {entry['image']!r}; give a path inside the manifest's folder, with slashes")
        if not re.fullmatch("[0-9a-f]{64}", entry["sha256"]):
            raise ValueError("has a sha256 that is not 64 digits of 0-9 and a-f")
        if len({entry["prompt"], *entry["unseen_prompts"]}) <= len(entry["unseen_prompts"]):
            raise ValueError("has the same prompt twice; unseen prompts differ from the original and from each other")
        if entry.get("unseen_captions") and len(entry["unseen_captions"]) != len(entry["unseen_prompts"]):
            raise ValueError(f"has {len(entry['unseen_captions'])} unseen_captions for {len(entry['unseen_prompts'])} "
                             "unseen_prompts; give as many, or none")
        if entry.get("unseen_captions") and "caption" not in entry:
            raise ValueError("has unseen_captions and no caption")
        if not isinstance(entry.get("origin", {}), dict):
            raise ValueError("has an origin that is no object")
        return cls(**{key: tuple(value) if key in LISTS else value for key, value in entry.items()},
                   path=Path(folder, *parts.parts))

    def to_json(self):
        """The object of a line, without empty optional keys."""
        record = {key: getattr(self, key) for key in KEYS}
        record |= {key: list(record[key]) for key in LISTS}
        return {key: value for key, value in record.items() if key in REQUIRED or value}

    def prompts(self, kind="instruct"):
        """The words for an editor of this kind (`editor.kind`): of the original prompt, then of each unseen one."""
        if kind != "img2img":
            return [self.prompt, *self.unseen_prompts]
        if self.caption is None or len(self.unseen_captions) != len(self.unseen_prompts):
            raise ValueError(f"{self.id} has no captions, and img2img editors are told what the result looks like; "
                             "add caption and unseen_captions to the manifest")
        return [self.caption, *self.unseen_captions]

    def picture(self):
        """The picture as `images.read` returns it. Raises ValueError if the file is missing, damaged or another one."""
        try:
            content = self.path.read_bytes()
        except OSError as error:
            raise ValueError(f"{self.path}: {(error.strerror or str(error)).lower()}") from None
        if hashlib.sha256(content).hexdigest() != self.sha256:
            raise ValueError(f"{self.path} is not the file of the manifest (its sha256 differs); restore it, or make the "
                             "manifest anew")
        return images.read(self.path)

    def sample(self):
        """The miniature.Sample of this picture, with its exact results. Raises ValueError where the origin states no edits."""
        from ..miniature import pictures
        edits = self.origin.get("edits")
        if not (isinstance(edits, list) and len(edits) == 1 + len(self.unseen_prompts)
                and all(isinstance(edit, list) and len(edit) == 2 and all(isinstance(text, str) for text in edit)
                        for edit in edits)):
            raise ValueError(f"{self.id} has no exact results: its origin does not state the edit of each prompt")
        instructions = [(*edit, prompt) for edit, prompt in zip(edits, self.prompts(), strict=True)]
        image = self.picture().image
        try:
            return pictures.sample_with(image, instructions, self.category, self.id)
        except ValueError as error:
            raise ValueError(f"{self.id}: {error}") from None


def read_manifest(path):
    """Read the items of a manifest file, or of the folder that holds one. Raises ValueError. The pictures are not opened."""
    path = Path(path)
    if path.is_dir():
        path /= FILE_NAME
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")             # texts may hold other line ends
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


def text(items, path=FILE_NAME):
    """The text of a manifest file. Items that `read_manifest` would refuse raise ValueError, which names the path."""
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


def write_manifest(path, items, *, overwrite=False):
    """Write a manifest file, whole or not at all. Raises ValueError and OSError."""
    writing.write(path, text(items, path), overwrite=overwrite)


def _loads(line):
    """Parse a line as JSON; refuse double keys, and numbers such as NaN that JSON does not have."""
    def once(pairs):
        if len(dict(pairs)) < len(pairs):
            raise ValueError("has a key twice")
        return dict(pairs)

    def number(text):
        raise ValueError(f"has the number {text}, which JSON does not have")
    return json.loads(line, object_pairs_hook=once, parse_constant=number)


def _is_text(value):
    return isinstance(value, str) and bool(value.strip()) and not re.search("[\0\ud800-\udfff]", value)
