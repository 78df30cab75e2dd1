"""Runs that end early: kills, Ctrl-C, limits, full disks, and journals of earlier versions."""

import errno
import json
import os
import random
import signal
import time

import pytest
from fake_gemini import after, quota, verdict
from forked_python import ForkedPython
from judged_edits import PRO, answers, but, calls, canary, knowing, manifest, number, panel_file, records, truth

from sifm_min import judge
from sifm_min.files.ledger import Ledger, read_rows
from sifm_min.judging.answers import ANSWERS

pytestmark = pytest.mark.usefixtures("small_canaries")


def test_limits_hold_over_all_runs_into_a_folder(server, tmp_path, capsys):
    call = ["run", manifest(tmp_path, 10), "--panel", panel_file(tmp_path, server, [PRO]), "-o", str(tmp_path / "out")]
    assert judge.main([*call, "--max-calls", "14"]) == 1
    assert "limit of 14 calls is reached" in capsys.readouterr().err
    assert len(server.calls) == 14 and [r["status"] for r in records(tmp_path / "out")].count("not_asked") == 6
    assert judge.main([*call, "--max-calls", "14"]) == 1 and len(server.calls) == 14
    spent = json.loads((tmp_path / "out/run.json").read_text())["cost_usd"]
    assert judge.main([*call, "--max-cost", str(spent + 0.001)]) == 1 and len(server.calls) == 14
    assert judge.main([*call, "--max-calls", "20"]) == 0 and len(server.calls) == 20


def test_a_full_disk_ends_the_run_at_once(server, tmp_path, capsys, monkeypatch):
    """The run does not wait for the calls in flight, and records no verdict for them."""
    server.script(PRO, lambda call: knowing(call) if canary(call) or number(call) % 2 else after(20, knowing(call)))
    append = Ledger.append

    def full(self, row):
        if row["kind"] == "verdict":
            raise OSError(errno.ENOSPC, "No space left on device", str(self.path))
        append(self, row)
    monkeypatch.setattr(Ledger, "append", full)
    started = time.monotonic()
    call = ["run", manifest(tmp_path, 20), "--panel", panel_file(tmp_path, server, [PRO]), "-o", str(tmp_path / "out")]
    assert judge.main(call) == 1 and time.monotonic() - started < 15
    assert "no space left on device; free some space and run the same command again" in capsys.readouterr().err


def test_a_run_that_has_not_ended_is_not_shown(server, tmp_path, capsys, monkeypatch):
    call = ["run", manifest(tmp_path, 6), "--panel", panel_file(tmp_path, server, [PRO]), "-o", str(tmp_path / "out")]
    many = []

    def interrupt(row):
        many.append(row)
        if len(many) == 13:
            raise KeyboardInterrupt
    append = Ledger.append
    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "append", lambda self, row: (append(self, row), row["kind"] in ANSWERS and interrupt(row)))
        assert judge.main(call) == 130
    capsys.readouterr()
    assert judge.main(["show", str(tmp_path / "out")]) == 2 and "run the same command again" in capsys.readouterr().err
    assert judge.main(call) == 0 and len(answers(tmp_path / "out")) == 16


# --------------------------------------------------------------------------------------------------------- kill -9

RUN = """
import os, sys
from sifm_min import judge
from sifm_min.judging import canaries
canaries.SIZE = 48
os._exit(judge.main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def start():
    """A function that starts a run in a process of its own, which has its imports: what is killed is a run, not an import."""
    with ForkedPython("sifm_min.images", "sifm_min.judge", "sifm_min.judging.canaries", "sifm_min.judging.client") as python:
        yield lambda call: python.start("-c", RUN, *call)


def wait_until(condition, seconds=20):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it never happened"
        time.sleep(0.005)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked runs; this system has no fork")
@pytest.mark.parametrize("signum, code", [(signal.SIGKILL, -9), (signal.SIGINT, 130)], ids=["kill", "ctrl-c"])
def test_calls_in_flight_at_the_end_count_in_the_limits(signum, code, server, tmp_path, start, capsys):
    """Ten canaries and four samples are answered, three calls hang: with a limit of 20 calls, three are left."""
    hang, out = after(60, verdict(True, True)), tmp_path / "out"
    server.script(PRO, lambda call: knowing(call) if canary(call) or len(server.calls) <= 14 else hang)
    call = ["run", manifest(tmp_path, 12), "--panel", panel_file(tmp_path, server, [PRO]), "-o", str(out),
            "--concurrency", "3", "--max-calls", "20"]
    child = start(call)
    wait_until(lambda: len(server.calls) == 17 and len(answers(out)) == 14)
    os.kill(child.pid, signum)
    assert child.wait().returncode == code
    settled, intents = calls(out)
    assert intents == set(range(1, 18)) and len([c for c in settled.values() if c is not None]) == 14
    server.script(PRO, knowing)
    assert judge.main(call) == 1
    told = capsys.readouterr().err
    assert "limit of 20 calls is reached" in told
    if signum == signal.SIGKILL:
        assert "3 calls were in flight when the last run ended: they count as 3 calls and " in told
    assert len(server.calls) == 20 and len(answers(out)) == 17
    about = json.loads((out / "run.json").read_text())
    assert (about["calls"], about["calls_of_unknown_cost"]) == (20, 3)
    assert about["cost_usd"] == pytest.approx(17 * 0.00978) and about["their_cost_usd_at_most"] > 0.2
    assert set(calls(out)[0]) == set(range(1, 21)), "each intent is settled"
    assert judge.main(call) == 1 and "were in flight" not in capsys.readouterr().err and len(server.calls) == 20


def test_cost_of_calls_in_flight_counts_at_its_bound(server, tmp_path, capsys):
    """A journal whose last three calls have no end, as a kill leaves it, leaves less of --max-cost."""
    call = ["run", manifest(tmp_path, 6), "--panel", panel_file(tmp_path, server, [PRO]), "-o", str(tmp_path / "out")]
    assert judge.main([*call, "--max-calls", "14"]) == 1
    path = tmp_path / "out/ledger.jsonl"
    rows = read_rows(path)
    gone = [row["call"] for row in rows if row["kind"] == "intent"][-3:]
    keys = {row["question"] for row in rows if row.get("call") in gone and row["kind"] == "intent"}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows if not (
        row["kind"] == "settled" and row["call"] in gone or row["kind"] == "verdict" and row["key"] in keys)))
    bounds = sum(row["bound_usd"] for row in rows if row["kind"] == "intent" and row["call"] in gone)
    spent = sum(row["cost_usd"] for row in rows if row["kind"] == "settled" and row["call"] not in gone)
    one = bounds / 3
    assert judge.main([*call, "--max-cost", f"{spent + bounds + 0.9 * one:.6f}"]) == 1 and len(server.calls) == 14
    assert f"up to {bounds:.4f} in calls of unknown cost" in capsys.readouterr().err
    assert judge.main([*call, "--max-cost", f"{spent + bounds + 1.1 * one:.6f}"]) in (0, 1) and len(server.calls) > 14


def test_calls_before_a_stop_are_in_the_journal(server, tmp_path, capsys):
    """A call that the quota refuses has no answer; it counts as a call of no cost."""
    server.script(PRO, but(quota(per="Day"), lambda c: number(c) == 3))
    call = ["run", manifest(tmp_path, 4), "--panel", panel_file(tmp_path, server, [PRO]), "-o", str(tmp_path / "out")]
    for runs in (1, 2):
        assert judge.main(call) == 1 and "today's quota" in capsys.readouterr().err
        settled, intents = calls(tmp_path / "out")
        assert len(settled) == len(intents) == len(server.calls) and list(settled.values()).count(0.0) == runs
    about = json.loads((tmp_path / "out/run.json").read_text())
    assert about["calls"] == len(server.calls) and about["calls_of_unknown_cost"] == 0


def test_a_journal_without_intents_still_counts(server, tmp_path):
    """As it was written before calls had rows of their own."""
    path, out = manifest(tmp_path, 8), tmp_path / "out"
    call = ["run", path, "--panel", panel_file(tmp_path, server, [PRO]), "-o", str(out)]
    assert judge.main([*call, "--max-calls", "15"]) == 1
    before = json.loads((out / "run.json").read_text())
    old = answers(out)
    for row in old:
        row["bound_usd"] = 0.1
        for attempt in row["attempts"]:
            del attempt["call"]
    old[-1]["attempts"][0]["cost"], old[-1]["cost"], old[-1]["unknown"] = None, None, 1
    (out / "ledger.jsonl").write_text("".join(json.dumps(row) + "\n" for row in old))
    assert judge.main([*call, "--max-calls", "15"]) == 1 and len(server.calls) == 15
    about = json.loads((out / "run.json").read_text())
    assert (about["calls"], about["calls_of_unknown_cost"], about["their_cost_usd_at_most"]) == (15, 1, 0.1)
    assert about["cost_usd"] == pytest.approx(before["cost_usd"] * 14 / 15, abs=1e-6)
    assert judge.main([*call, "--max-calls", "18"]) == 0 and len(server.calls) == 18
    assert len(answers(out)) == 18 and judge.main(["dry-run", path, *call[2:4], "-o", str(out)]) == 0


def test_a_full_disk_sends_no_call(server, tmp_path, monkeypatch):
    append = Ledger.append

    def full(self, row):
        if row["kind"] == "intent":
            raise OSError(errno.ENOSPC, "No space left on device", str(self.path))
        append(self, row)
    monkeypatch.setattr(Ledger, "append", full)
    call = ["run", manifest(tmp_path, 3), "--panel", panel_file(tmp_path, server, [PRO]), "-o", str(tmp_path / "out")]
    assert judge.main(call) == 1 and server.calls == []


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked runs; this system has no fork")
def test_kill_9_loses_no_verdict_and_buys_none_twice(server, tmp_path, start):
    server.script(PRO, lambda call: after(0.004, knowing(call)))
    concurrency, out, rng = 4, tmp_path / "out", random.Random()
    call = ["run", manifest(tmp_path, 200), "--panel", panel_file(tmp_path, server, [PRO]), "-o", str(out),
            "--concurrency", str(concurrency)]
    kills = 0
    for reach in [*sorted(rng.sample(range(1, 200), 7)), None]:
        before = {row["sample_id"] for row in answers(out) if row["kind"] == "verdict"}
        seen = len(server.calls)
        child = start(call)
        if reach:
            wait_until(lambda enough=reach + kills * concurrency: len(server.calls) >= enough)
            time.sleep(rng.uniform(0, 0.01))
            os.kill(child.pid, signal.SIGKILL)
            kills += 1
        code = child.wait().returncode
        assert code in ((-9, 0) if reach else (0,))
        whole = [one for one in server.calls[seen:] if one.body]         # not the one whose sender died over it
        again = [f"s{number(one)}" for one in whole if canary(one) is None]
        assert not before & set(again) and len(set(again)) == len(again)
    assert len(server.calls) <= 210 + kills * concurrency
    rows = [row for row in answers(out) if row["kind"] == "verdict"]
    assert sorted(row["sample_id"] for row in rows) == sorted(f"s{i}" for i in range(200))
    assert [(r["sample_id"], r["semantic_mismatch"], r["perceptual_degradation"]) for r in records(out)] == [
        (f"s{i}", *truth(i)) for i in range(200)]
