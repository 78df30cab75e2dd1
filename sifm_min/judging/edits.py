"""Lists of edited pictures that are to be judged: JSON lines, one edited picture each.

The keys are sample_id, original, edited (files, relative to the list), prompt, arm, and image_id and prompt_id as in
records.py (default: the original's name and the prompt). Further keys are kept as `details`; category, editor, method and
prompt_type are used to draw a study from all kinds.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from ..files.json_text import loads, read_text


@dataclass(frozen=True)
class EditFile:
    """One edited picture of a list. original, edited: files; place: the list and line, for messages."""

    sample_id: str
    image_id: str
    prompt_id: str
    arm: str
    prompt: str
    original: Path
    edited: Path
    details: dict = field(default_factory=dict)
    place: str = ""

    def record(self):
        """The line of a list, as a JSON-ready dict."""
        own = ("sample_id", "image_id", "prompt_id", "arm", "prompt")
        return {**{name: getattr(self, name) for name in own}, "original": str(self.original), "edited": str(self.edited),
                **self.details}


def read_edits(path):
    """[EditFile] of a list, in its order. Raises ValueError for any fault in it, so that no call is made before."""
    path = Path(path)
    samples, seen = [], {}
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            row = loads(line)
            line.encode()
            json.dumps(row, ensure_ascii=False).encode()     # an escaped half of a character could not be written down
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{place}: is no JSON object ({error}); a list of edits has one on each line") from None
        if not isinstance(row, dict):
            raise ValueError(f"{place}: is no JSON object; a list of edits has one on each line")
        row = {"image_id": row.get("original"), "prompt_id": row.get("prompt"), **row}
        for name in ("sample_id", "original", "edited", "prompt", "arm", "image_id", "prompt_id"):
            if not isinstance(row.get(name), str) or not row[name].strip():
                raise ValueError(f"{place}: {name} is missing, or no text")
        files = [path.parent / row.pop(name) for name in ("original", "edited")]
        own = [row.pop(name) for name in ("sample_id", "image_id", "prompt_id", "arm", "prompt")]
        sample = EditFile(*own, *files, row, place)
        for file in files:
            if not file.is_file():
                raise ValueError(f"{place}: {file}: no such file")
        for kind, key in (("sample_id", sample.sample_id), ("image and prompt", (sample.image_id, sample.prompt_id))):
            other = seen.setdefault((kind, sample.arm, key), place)
            if other != place:
                raise ValueError(f"{place}: the arm {sample.arm!r} has the same {kind} in line {other.rpartition(' ')[2]}; "
                                 f"{'number the samples' if kind == 'sample_id' else 'name what else varies as prompt_id'}")
        samples.append(sample)
    if not samples:
        raise ValueError(f"{path}: has no samples; each line is a JSON object with sample_id, original, edited, prompt, arm")
    return samples
