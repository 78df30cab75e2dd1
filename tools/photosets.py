"""Photographs to train on and to measure with: the use that a folder's LICENSES.jsonl states, one line a photograph."""

import json
from itertools import zip_longest


def marked(folder, use):
    """The lines, as dicts, of the photographs for this use; without a use, one is for "evaluate". None without the file."""
    notes = folder / "LICENSES.jsonl"
    if not notes.is_file():
        return None
    rows = map(json.loads, notes.read_text(encoding="utf-8").splitlines())
    return [row for row in rows if row.get("use", "evaluate") == use]


def in_turn(rows):
    """The lines with their categories in turn, in the order in which these first stand."""
    by_category = {}
    for row in rows:
        by_category.setdefault(row["category"], []).append(row)
    return [row for together in zip_longest(*by_category.values()) for row in together if row is not None]
