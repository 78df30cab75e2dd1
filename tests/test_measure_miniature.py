"""tools/measure_miniature.py: the table of readings, on an editor that obeys unless the picture was immunized."""

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
import measure_miniature as tool  # noqa: E402

from sifm_min import miniature  # noqa: E402

COUNT = 2


class Obedient:
    """Gives exact results for the pictures of the samples, and any other picture back as it is."""

    tap_names, defaults = ("first", "out"), "its defaults"

    def __init__(self):
        self.exact = {(one.image.tobytes(), one.prompt): one.target for sample in miniature.samples(COUNT, 0)
                      for one in (sample, *sample.unseen)}
        self.edits = 0

    def provenance(self):
        return {"weights": "its weights", "defaults": "its defaults"}

    def edit(self, pictures, prompts, *, seed):
        self.edits += 1
        return [self.exact.get((picture.tobytes(), prompt), picture)
                for picture, prompt in zip(pictures, prompts, strict=True)]


@pytest.fixture
def editor(monkeypatch):
    made, asked = Obedient(), []

    def immunize(image, editor, prompt, *, method, steps, **options):
        asked.append((method, steps, options))
        return SimpleNamespace(image=image.point(lambda value: value ^ 1) if method == "sifm" else image)

    made.asked = asked
    monkeypatch.setattr(tool, "READINGS", {"noise": ("noise", {}), "output": ("sifm", {"taps": "last", "lam": 2})})
    monkeypatch.setattr(tool, "hash_weights", lambda *_: None)
    monkeypatch.setattr(tool.torch, "set_num_threads", lambda threads: None)         # the other tests keep theirs
    monkeypatch.setattr(tool.sifm_min, "load_editor", lambda name: made)
    monkeypatch.setattr(tool.sifm_min, "immunize", immunize)
    return made


def test_readings_count_what_fails_beyond_clean_and_resume(editor, tmp_path, capsys):
    def table(*more):
        tool.main(["readings", "--samples", str(COUNT), "--steps", "3", "--work", str(tmp_path), *more])
        return capsys.readouterr().out

    text = table()
    (working,) = re.findall(rf"miniature: {COUNT} pictures, (\d+) edits", text)
    assert int(working) >= 5 * COUNT                         # exact results are accepted
    rows = {line.split(" | ")[0][2:]: line for line in text.splitlines() if line.startswith("| ")}
    assert rows["noise"].startswith(f"| noise | 0/{working} = 0 %") and f"| output | {working}/{working} = 100 %" in text
    assert ("sifm", 3, {"taps": ["out"], "lam": 2}) in editor.asked
    edits = editor.edits
    assert table() == text and editor.edits == edits         # nothing is done twice
    table("--edit-seed", "2")
    assert editor.edits == edits + 3 * COUNT                 # another question
