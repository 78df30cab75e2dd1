"""Photographs to train on and to measure with: their uses, which a folder's LICENSES.jsonl states, their middle squares, and
figures over them with intervals."""

import json
from itertools import zip_longest

from PIL import Image


def marked(folder, use):
    """The lines, as dicts, of the photographs for this use; without a use, one is for "evaluate". None without the file."""
    notes = folder / "LICENSES.jsonl"
    if not notes.is_file():
        return None
    return [row for row in read_rows(notes) if row.get("use", "evaluate") == use]


def read_rows(path):
    """The lines, as dicts, of a JSONL file such as evaluation.jsonl."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def in_turn(rows):
    """The lines with their categories in turn, in the order in which these first stand."""
    by_category = {}
    for row in rows:
        by_category.setdefault(row["category"], []).append(row)
    return [row for together in zip_longest(*by_category.values()) for row in together if row is not None]


def middle_square(picture, size):
    """The middle square of a PIL picture at size x size; what is outside the square has no part in it."""
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    return picture.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.LANCZOS)


def interval(values, statistic="mean", digits=2):
    """"value [low, high]": the mean or the median over photographs, with the 95 % interval of a bootstrap over them.

    The value alone where all resamples have it, and "-" of no values.
    """
    import numpy as np

    from sifm_min.judging.intervals import bootstrap

    values = np.sort(np.asarray(values, float))

    def mean(counts):                                        # (..., n): how often each value was drawn
        return counts @ values / counts.sum(-1)

    def median(counts):
        drawn, total = counts.cumsum(-1), counts.sum(-1, keepdims=True)
        middle = [values[(drawn <= place).sum(-1)] for place in ((total - 1) // 2, total // 2)]
        return (middle[0] + middle[1]) / 2

    if not len(values):
        return "-"
    of = {"mean": mean, "median": median}[statistic]
    found = bootstrap(enumerate(np.eye(len(values))), {statistic: of})[statistic]
    bounds = "" if found.low is None else f" [{found.low:.{digits}f}, {found.high:.{digits}f}]"
    return f"{found.value:.{digits}f}{bounds}"
