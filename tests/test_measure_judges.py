"""tools/measure_judges.py on small pictures: the arms, the measures that are kept, and the thresholds applied to them."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from photographs import smooth

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
import measure_judges as tool  # noqa: E402

from sifm_min import images  # noqa: E402
from sifm_min.miniature import deciding, fidelity, recogniser, thresholds  # noqa: E402
from sifm_min.miniature.recogniser import classes  # noqa: E402


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Run the tool on two pictures of 64 pixels, with a recogniser that finds every edit of the kind asked, undamaged."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(4):
        smooth(80, 80, seed=i).save(folder / f"{i}.png")
    (folder / "LICENSES.jsonl").write_text("".join(
        json.dumps({"id": f"p{i}", "file": f"{i}.png", "category": "people", "use": use}) + "\n"
        for i, use in enumerate(("train", "evaluate", "train", "evaluate"))))
    monkeypatch.setattr(recogniser, "read_edit", lambda source, edited: (dict.fromkeys(classes(), 0.3), 0.2))

    def run(what, *options):
        tool.main([what, "--photos", str(folder), "--samples", "2", "--size", "64", "--work", str(tmp_path / "work"), *options])
        return capsys.readouterr().out
    run.work = tmp_path / "work"
    return run


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_judges_measures_every_arm_and_goes_on(command, monkeypatch):
    out = command("judges")
    kept = rows(command.work / "judges-train-64.jsonl")
    assert [row["photograph"] for row in kept] == ["p0", "p2"]
    arms = kept[0]["arms"]
    damaged = {f"{name} x {times}" for name in ("blur", "blocks", "noise", "washed out", "texture", "stains", "latent noise",
                                                "smooth latent noise") for times in (0.5, 1, 2)}
    assert set(arms) == damaged | {"exact target", "autoencoded target", "untouched source", "autoencoded source",
                                   "target of another edit", "target of a third edit"}
    assert arms["exact target"]["oracle"]["progress"] == pytest.approx(1)
    assert arms["untouched source"]["oracle"]["progress"] == 0
    section = out.split("untouched source:")[1].splitlines()
    assert "exact oracle  mismatch 100 [34, 100]" in section[1] and "recogniser    mismatch 0 [0, 66]" in section[2]
    monkeypatch.setattr(tool, "arms", None)                  # everything is there already
    assert command("judges") == out
    assert not (command.work / "judges-evaluate-64.jsonl").exists()


def test_a_later_run_applies_the_thresholds_of_the_day(command, monkeypatch):
    assert "recogniser    mismatch 0 [0, 66], degraded 0 [0, 66], obeyed 100" in command("judges")
    monkeypatch.setattr(thresholds, "ASKED", 0.4)
    monkeypatch.setattr(thresholds, "DAMAGED", 0.1)
    assert "recogniser    mismatch 100 [34, 100], degraded 100 [34, 100], obeyed 0" in command("judges")


def test_a_list_says_which_photographs(command, tmp_path):
    (tmp_path / "list.jsonl").write_text("".join(
        json.dumps({"id": f"p{i}", "file": f"{i}.png", "category": "people"}) + "\n" for i in (3, 0)))
    command("judges", "--list", str(tmp_path / "list.jsonl"))
    assert [row["photograph"] for row in rows(command.work / "judges-train-64.jsonl")] == ["p3", "p0"]


def test_rows_of_another_run_and_cut_lines_are_passed_over(command, monkeypatch, tiny_folder):
    command("judges", "--samples", "1")
    path = command.work / "judges-train-64.jsonl"
    assert "2 samples" in command("judges") and "1 samples" in command("judges", "--samples", "1")
    path.write_bytes(path.read_bytes()[:-20])
    assert "2 samples" in command("judges") and len(rows(path)) == 2
    assert "1 samples" in command("judges", "--samples", "1", "--skip", "1") and len(rows(path)) == 3
    for seed in ("1", "1", "2"):
        command("edits", "--samples", "1", "--editor", str(tiny_folder), "--edit-seed", seed)
    assert len(rows(command.work / f"edits-{tiny_folder.name}-train-64.jsonl")) == 2


def test_verdicts_of_kept_measures_are_the_judges_own(command):
    sample = tool.pictures.draw_sample(smooth(90, 90, seed=8), 1, size=64)
    for edited in (sample.target, sample.image, images.to_image(fidelity.autoencoded(sample.target))):
        found = tool.verdicts(json.loads(json.dumps(tool.measured(sample, edited))))
        assert found == {name: judge(sample, edited) for name, judge in deciding.judges.items()}


def test_damage_in_an_arm_grows_with_its_strength():
    sample = tool.pictures.draw_sample(smooth(90, 90, seed=8), 1, size=64)
    found = tool.arms(sample, 0)
    lost = np.asarray(found["autoencoded target"], np.float32)
    for name in ("noise", "texture", "latent noise", "smooth latent noise"):
        changes = [np.square(np.asarray(found[f"{name} x {times}"], np.float32) - lost).mean() for times in (0.5, 1, 2)]
        assert 0 < changes[0] < changes[1] < changes[2], name
    assert np.array_equal(found["target of another edit"], sample.unseen[0].target)


def test_edits_are_of_the_clean_and_the_noisy_picture(command, tiny, monkeypatch):
    edited, edit = [], tiny.edit
    monkeypatch.setattr(tool.sifm_min, "load_editor", lambda name: tiny)
    monkeypatch.setattr(tiny, "edit", lambda pictures, prompts, **options: edited.append((pictures, prompts))
                        or edit(pictures, prompts, **options), raising=False)
    out = command("edits", "--use", "evaluate", "--editor", "any/tiny", "--sheets")
    kept = rows(command.work / "edits-tiny-evaluate-64.jsonl")
    assert [row["photograph"] for row in kept] == ["p1", "p3"] and set(kept[0]["arms"]) == {"clean", "noise"}
    (clean, noisy), prompts = edited[0]
    apart = np.abs(np.asarray(clean, int) - np.asarray(noisy, int))
    assert prompts == [kept[0]["prompt"]] * 2 and 0 < apart.max() <= 7
    assert (command.work / "edits-tiny-evaluate-64-001.png").exists() and "clean: oracle M" in out
