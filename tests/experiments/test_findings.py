"""The table "beyond noise": which edits count, which findings, and the paired tests with their correction."""

import pytest
from results_by_hand import cell, group

from sifm_min.experiments import tables
from sifm_min.judging.intervals import wilson
from sifm_min.judging.paired import mcnemar

MISMATCH, DAMAGE, BOTH, NONE = [True, False, "ok"], [False, True, "ok"], [True, True, "ok"], [False, False, "ok"]


def edits(arm, said, **rest):
    """Cells of an arm, one a picture, each with what both judges say."""
    return [cell(arm, f"p{i}", False, **rest) | {"judges": {"one": one, "two": two}} for i, (one, two) in enumerate(said)]


def beyond(cells, **rest):
    made = {one.title.rpartition(": ")[2]: one for one in tables.tables(group(cells, **rest))}
    return made.get("beyond noise, by finding")


@pytest.fixture
def cells():
    """Ten pictures; the clean edit of the last two does not work, so what happens there does not count."""
    clean = [(NONE, NONE)] * 8 + [(MISMATCH, MISMATCH), (MISMATCH, NONE)]
    noise = [(DAMAGE, DAMAGE)] + [(NONE, NONE)] * 7 + [(BOTH, BOTH)] * 2
    # Damage on six; a mismatch on the first alone; on the 7th each judge finds another reason; on the 8th they disagree.
    method = [(BOTH, BOTH)] + [(DAMAGE, DAMAGE)] * 5 + [(MISMATCH, DAMAGE), (DAMAGE, NONE)] + [(BOTH, BOTH)] * 2
    return [*edits("control", clean), *edits("noise", noise), *edits("sifm", method)]


def test_findings_are_of_working_edits_and_against_noise(cells):
    found = {row["finding"]: row for row in beyond(cells).data}
    assert {name: (row["working"], row["pairs"], row["share"], row["noise"]) for name, row in found.items()} == {
        "thwarted": (8, 8, 7 / 8, 1 / 8), "mismatch": (8, 8, 1 / 8, 0), "damage": (8, 8, 6 / 8, 1 / 8)}
    assert found["damage"]["beyond"] == pytest.approx(5 / 8)
    assert (found["damage"]["share_low"], found["damage"]["share_high"]) == pytest.approx(wilson(6, 8))
    p = {"thwarted": mcnemar(6, 0), "mismatch": mcnemar(1, 0), "damage": mcnemar(5, 0)}
    assert {name: row["p"] for name, row in found.items()} == p
    assert found["thwarted"]["p_holm"] == pytest.approx(3 * p["thwarted"])                # Holm's, of three
    assert found["damage"]["p_holm"] == pytest.approx(max(3 * p["thwarted"], 2 * p["damage"]))
    (row,) = beyond(cells).rows
    assert row[:3] == ["SIFM", "original", "8"] and row[3].startswith("88% [") and row[7].startswith("12% [")


def test_each_attack_has_its_own_controls(cells):
    attacked = [{**one, "arm": f"{one['arm']}, jpeg-75", "attack": "jpeg-75"} for one in cells
                if not (one["arm"] == "control" and one["image_id"] in ("p0", "p1"))]
    found = {(row["method"], row["finding"]): row for row in beyond([*cells, *attacked]).data}
    assert found["sifm", "damage"]["working"] == 8 and found["sifm, jpeg-75", "damage"]["working"] == 6
    assert found["sifm, jpeg-75", "mismatch"]["share"] == 0 and found["sifm", "damage"]["comparisons"] == 6


def test_without_control_noise_or_judge_there_is_no_table(cells):
    for left in ("control", "noise"):
        assert beyond([one for one in cells if one["arm"] != left]) is None
    assert beyond([one | {"judges": None} for one in cells]) is None


def test_few_pictures_have_no_p(cells):
    few = [one for one in cells if one["image_id"] < "p5"]
    row = beyond(few).data[0]
    assert row["p"] is None and row["p_holm"] is None and beyond(few).rows[0][6] == "few (5)"


def test_an_edit_that_a_judge_did_not_decide_is_no_pair(cells):
    for one in cells:
        if one["arm"] == "sifm" and one["image_id"] == "p1":
            one["judges"] = {"one": [None, None, "blocked"], "two": DAMAGE}
    found = {row["finding"]: row for row in beyond(cells).data}
    assert (found["damage"]["pairs"], found["damage"]["working"]) == (7, 8)
    assert found["damage"]["share"] == pytest.approx(5 / 7)
