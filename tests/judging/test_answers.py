"""Answers of a panel, found by their question in the ledgers of several runs."""

import json

import pytest

from sifm_min.judging.answers import Answers

PANEL = {"id": "test", "votes": 1, "judges": {"one": {}, "two": {}}}


def answer(judge, mismatch, status="ok", *, time="2026-11-21T10:00:00+00:00", vote=0, edited="e", kind="verdict"):
    return {"kind": kind, "image_sha256": ["o", edited], "instruction": "night", "judge": judge, "vote": vote, "status": status,
            "semantic_mismatch": mismatch, "perceptual_degradation": None if mismatch is None else False, "time_utc": time}


@pytest.fixture
def run_folder(tmp_path):
    def write(name, *rows, panel=PANEL):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "run.json").write_text(json.dumps({"panel": panel}))
        (folder / "ledger.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return folder
    return write


def test_the_newest_verdict_counts_whatever_the_order(run_folder):
    later = "2026-11-22T10:00:00+00:00"
    one = run_folder("a", answer("one", True, time=later), answer("two", None, "timeout", time=later))
    two = run_folder("b", answer("one", False), answer("two", True), answer("two", True, kind="canary", edited="x"))
    for folders in ((one, two), (two, one)):
        answers = Answers(PANEL, folders)
        assert answers.findings("o", "e", "night") == {"one": [True, False, "ok"], "two": [True, False, "ok"]}
        assert answers.complete("o", "e", "night")
        for other in (("o", "x", "night"), ("x", "e", "night"), ("o", "e", "day")):
            assert answers.findings(*other) is None and not answers.complete(*other)


def test_answers_of_other_panels_are_left_out(run_folder):
    folder = run_folder("a", answer("one", True), panel={**PANEL, "seed": 1})
    assert Answers(PANEL, [folder]).findings("o", "e", "night") is None


def test_votes_without_an_answer_are_not_complete(run_folder):
    panel = {**PANEL, "votes": 3}
    rows = [answer("one", said, vote=vote) for vote, said in enumerate((True, False, True))]
    folder = run_folder("a", *rows, answer("two", True, vote=1), panel=panel)
    answers = Answers(panel, [folder])
    assert answers.findings("o", "e", "night") == {"one": [True, False, "ok"], "two": [None, None, "not_asked"]}
    assert not answers.complete("o", "e", "night")


def test_a_damaged_ledger_is_told_and_not_passed_over(run_folder):
    folder = run_folder("a", answer("one", True))
    (folder / "ledger.jsonl").write_text("{\n" + (folder / "ledger.jsonl").read_text())
    with pytest.raises(ValueError, match="line 1: is damaged"):
        Answers(PANEL, [folder])
