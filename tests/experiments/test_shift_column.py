"""The column `shift` of evaluate: the editor's own latents, measured for each perturbation, and folders that have none."""

import json
from pathlib import Path

import pytest
import results_by_hand
from PIL import Image
from test_evaluate import calls, loaded, run, steps, table  # noqa: F401 (fixtures)

from sifm_min import cli, images
from sifm_min.experiments import plan, results, tables


@pytest.fixture
def pictures(run):  # noqa: F811
    """A run of one picture: its group, and its rows of step "shift"."""
    assert run("white-box", "--images", "1", "--seeds", "1") == cli.OK
    (group,) = results.collect("out")
    return group, steps()["shift"]


@pytest.mark.slow
def test_shift_is_of_the_editors_own_latents(pictures, loaded):  # noqa: F811
    group, rows = pictures
    editor = next(iter(loaded.values()))
    of_arms = {arm["name"]: row for arm in group["arms"] for row in arm["immunized"].values()}
    assert {*of_arms} == {"noise", "photoguard-encoder"} and len(rows) == 2
    assert {row["shift"] for row in rows} == {row["shift"] for row in of_arms.values()}
    original = {cell["original"] for cell in group["cells"]}.pop()
    for row in of_arms.values():
        before, after = (editor.encode(editor.resize(images.to_pixels(Image.open(f"out/pictures/{sha256}.png")))).double()
                         for sha256 in (original, row["sha256"]))
        by_hand = ((after - before) ** 2).mean().sqrt().item() / before.std().item()
        assert by_hand > 0 and row["shift"] == pytest.approx(by_hand, rel=1e-4)


@pytest.mark.slow
def test_folders_without_shifts_print_and_are_completed(pictures, run, calls, capsys):  # noqa: F811
    told = table(capsys)
    (journal,) = Path("out", "steps").glob("*.jsonl")
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(line for line in lines if json.loads(line)["step"] != "shift"))
    older = table(capsys)
    assert older != told and "| noise (control) | " in older
    assert run("white-box", "--images", "1", "--seeds", "1") == cli.OK and calls == []       # neither a picture nor an edit
    assert table(capsys) == told and len(steps()["shift"]) == 2


def test_the_table_has_the_mean_shift_or_a_dash():
    cells = [results_by_hand.cell(name, "x", True) for name in ("control", "noise", "sifm")]
    group = results_by_hand.group(cells)
    group["arms"][1]["immunized"] = {picture: {**row, "shift": value} for (picture, row), value in zip(
        group["arms"][1]["immunized"].items(), (0.25, 0.75, None), strict=True)}
    behind = next(table for table in tables.tables(group) if ("A picture", "shift") in table.columns)
    place = behind.columns.index(("A picture", "shift"))
    assert {row[0]: row[place] for row in behind.rows} == {"clean (control)": "-", "noise (control)": "0.50", "SIFM": "-"}
    assert any(note.endswith("the mean over pictures.") for note in behind.notes)


def test_attacked_arms_and_the_control_have_no_shift():
    editors = {"one": {"identity": {"weights": "a"}}, "two": {"identity": {"weights": "b"}}}
    of = {"version": "1", "editors": editors}
    case, arm = {"sha256": "p"}, plan.make_arm("sifm", "sifm", source="one", target="one")
    keys = [plan.shift_key(of, case, {**arm, **change}, "q") for change in (
        {}, {"target": "two"}, {"method": None}, {"attack": {"name": "jpeg-75", "editor": None}})]
    assert keys[2:] == [None, None] and len({*keys[:2], plan.shift_key(of, case, arm, "r")}) == 3
