"""Panels of vision models against a server on the loopback interface: questions, answers, rates and messages."""

import dataclasses
import json
import random
from pathlib import Path

import pytest
from fake_gemini import after, blocked, error, says, verdict
from judged_edits import (
    FLASH,
    PRO,
    SECRET,
    answers,
    but,
    canary,
    knowing,
    manifest,
    number,
    panel_file,
    records,
    samples_asked,
    truth,
)
from PIL import Image

from sifm_min import judge
from sifm_min.files.ledger import Ledger
from sifm_min.judging import panels
from sifm_min.judging import run as run_file
from sifm_min.judging.agreement import consistency
from sifm_min.judging.answers import majority
from sifm_min.judging.client import Budget
from sifm_min.judging.edits import read_edits
from sifm_min.judging.panels import Panel, Prompt
from sifm_min.judging.rates import success_rate
from sifm_min.judging.records import Edit, Record, ask, by_arm
from sifm_min.judging.run import judges, run
from sifm_min.judging.summary import describe
from sifm_min.miniature.verdict import Verdict

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.usefixtures("small_canaries")


# --------------------------------------------------------------------------------------------------------------- a run

@pytest.mark.slow
def test_a_run_from_manifest_to_rates(server, tmp_path, capsys):
    path, out = manifest(tmp_path, 12, ("control", "sifm")), tmp_path / "out"
    call = ["run", path, "--panel", panel_file(tmp_path, server), "-o", str(out)]
    assert judge.main(call) == 0
    told = capsys.readouterr()
    rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
    expected = [(row["sample_id"], row["arm"], model, *truth(i // 2 + 100 * (i % 2)), "ok")
                for i, row in enumerate(rows) for model in (PRO, FLASH)]
    names = ("sample_id", "arm", "judge", "semantic_mismatch", "perceptual_degradation", "status")
    assert [tuple(record[name] for name in names) for record in records(out)] == expected
    assert len(server.calls) == 2 * (10 + 24) and sorted(samples_asked(server)) == sorted(
        2 * [i + 100 * a for i in range(12) for a in (0, 1)])

    arms = by_arm(Record(**record) for record in records(out))
    ledger = answers(out)
    about = json.loads((out / "run.json").read_text())
    assert about["results"]["tables"]["all prompts"]["sifm"]["rate"]["isr"]["value"] == success_rate(arms, "sifm").isr.value
    assert about["calls"] == len(ledger) == 68 and about["cost_usd"] == pytest.approx(sum(row["cost"] for row in ledger))
    assert about["panel"]["prompt_sha256"] == Prompt.load("isr-judge/1").sha256
    own = [(s.sample_id, s.arm, s.prompt) for s in read_edits(out / "manifest.jsonl")]      # it is a manifest itself
    assert own == [(row["sample_id"], row["arm"], row["prompt"]) for row in rows]
    assert about["canaries"] == {model: {"right": 10, "of": 10, "wrong": []} for model in (PRO, FLASH)}
    for row in ledger:
        assert row["evidence"]["semantic_evidence"] == "seen" and row["model_version"] == row["judge"]
        assert row["fields"]["generationConfig"]["seed"] == panels.SEED and len(row["image_sha256"]) == 2
    assert "beside the clean edits (12 pairs)" in told.out and "127.0.0.1" not in told.err

    for call_ in server.calls:                               # blind, and each sample's two pictures in their order
        body = call_.raw.decode()
        assert not any(word in body for word in ("sifm", "control", "edits.jsonl", "original0", '"s0"'))
        assert [isinstance(part, bytes) for part in call_.parts] == [False, True, False, True, False]
    for file in out.rglob("*"):
        assert SECRET.encode() not in file.read_bytes(), file
    assert SECRET not in told.out + told.err

    assert judge.main(call) == 0 and len(server.calls) == 68  # nothing is bought twice, canaries neither
    assert capsys.readouterr().out == told.out
    assert judge.main(["show", str(out)]) == 0 and capsys.readouterr().out == told.out


def test_arms_of_an_original_are_asked_together_in_any_order(server, tmp_path):
    samples = read_edits(manifest(tmp_path, 20, ("control", "sifm")))
    run(Panel.load(panel_file(tmp_path, server, [PRO])), samples, tmp_path / "out", concurrency=1)
    order = [i % 100 for i in samples_asked(server)]
    assert order[::2] == order[1::2] and order[::2] != sorted(order[::2])


def test_longer_lists_and_changed_pixels_buy_only_the_new(server, tmp_path):
    panel = Panel.load(panel_file(tmp_path, server, [PRO]))
    run(panel, read_edits(manifest(tmp_path, 4)), tmp_path / "out")
    server.calls.clear()
    found = run(panel, read_edits(manifest(tmp_path, 6)), tmp_path / "out")
    assert sorted(samples_asked(server)) == [4, 5] and len(found.records) == 6
    Image.new("RGB", (32, 32), (9, 10, 2)).save(tmp_path / "sifm2.png")
    run(panel, read_edits(manifest_again(tmp_path)), tmp_path / "out")
    assert samples_asked(server)[2:] == [2]
    edits = tmp_path / "edits.jsonl"
    edits.write_text(edits.read_text().replace("a witch", "a wizard"))
    run(panel, read_edits(edits), tmp_path / "out")
    assert len(samples_asked(server)) == 3 + 6


def manifest_again(folder):
    return str(folder / "edits.jsonl")


def test_equal_samples_are_asked_once_and_both_get_the_verdict(server, tmp_path):
    path = manifest(tmp_path, 3, ("sifm", "mist"))
    for i in range(3):                                       # the same pixels in another file, of another mode
        Image.open(tmp_path / f"sifm{i}.png").convert("RGBA").save(tmp_path / f"mist{i}.png", compress_level=1)
    found = run(Panel.load(panel_file(tmp_path, server, [PRO])), read_edits(path), tmp_path / "out")
    assert sorted(samples_asked(server)) == [0, 1, 2]
    assert [record.verdict.semantic_mismatch for record in found.records] == [truth(i)[0] for i in range(3) for _ in range(2)]


def test_answers_out_of_order_land_at_their_samples(server, tmp_path):
    rng = random.Random(0)
    server.script(PRO, lambda call: after(rng.uniform(0, 0.05), knowing(call)))
    found = run(Panel.load(panel_file(tmp_path, server, [PRO])), read_edits(manifest(tmp_path, 30)),
                      tmp_path / "out", concurrency=8)
    assert [record.sample_id for record in found.records] == [f"s{i}" for i in range(30)]
    assert [(r.semantic_mismatch, r.perceptual_degradation) for r in found.records] == [truth(i) for i in range(30)]


def test_refusals_are_kept_and_asked_again_only_on_request(server, tmp_path, capsys):
    call = ["run", manifest(tmp_path, 10), "--panel", panel_file(tmp_path, server), "-o", str(tmp_path / "out")]
    server.script(PRO, but(blocked("PROHIBITED_CONTENT"), lambda c: number(c) in (1, 2)))
    assert judge.main(call) == 1
    told = capsys.readouterr()
    assert "only 80.0 % of the samples" in told.err and "blocked_prompt 2" in told.out
    statuses = [r["status"] for r in records(tmp_path / "out") if r["judge"] == PRO]
    assert statuses == ["ok", "blocked_prompt", "blocked_prompt"] + ["ok"] * 7
    server.calls.clear()
    assert judge.main([*call, "--min-coverage", "0.7"]) == 0 and not server.calls
    server.script(PRO, knowing)
    assert judge.main([*call, "--retry"]) == 0 and sorted(samples_asked(server)) == [1, 2]
    assert {r["status"] for r in records(tmp_path / "out")} == {"ok"}
    server.script(PRO, [blocked("SAFETY")])
    server.calls.clear()
    assert judge.main([*call, "--retry"]) == 0 and not server.calls              # a verdict is never asked for again


def test_lost_answers_are_asked_for_again_by_the_next_run(server, tmp_path, capsys):
    call = ["run", manifest(tmp_path, 5), "--panel", panel_file(tmp_path, server, [PRO]), "-o", str(tmp_path / "out")]
    server.script(PRO, but(says("{}", version="gemini-3.8-flash"), lambda c: number(c) == 3))
    assert judge.main(call) == 1
    assert "gemini-3.8-flash answered" in capsys.readouterr().err
    before = len(samples_asked(server))
    server.script(PRO, knowing)
    assert judge.main(call) == 0
    asked = samples_asked(server)
    assert 3 in asked[before:] and len(set(asked[before:])) == len(asked[before:])
    assert {r["status"] for r in records(tmp_path / "out")} == {"ok"}


def test_a_judge_that_fails_the_canaries_is_not_asked_further(server, tmp_path, capsys):
    call = ["run", manifest(tmp_path, 4), "--panel", panel_file(tmp_path, server), "-o", str(tmp_path / "out")]
    server.script(FLASH, [verdict(False, False)])
    assert judge.main(call) == 1
    told = capsys.readouterr()
    assert "gemini-2.5-flash misjudged 7 of 10 pictures of known verdict (unchanged, " in told.err
    assert "MARKED: gemini-2.5-flash misjudged 7 of 10 canaries" in told.out
    assert len(server.seen(FLASH)) == 10 and len(server.seen(PRO)) == 14
    assert [r["status"] for r in records(tmp_path / "out")] == ["ok", "not_asked"] * 4
    assert judge.main([*call, "--accept-canaries"]) == 0
    assert "MARKED" in capsys.readouterr().out and len(server.seen(FLASH)) == 14


def test_a_judge_that_only_thinks_is_told_so(server, tmp_path, capsys):
    server.script("qwen", [says(None, thoughts={"reasoning_content": "{}"})])
    panel = tmp_path / "panel.json"
    panel.write_text(json.dumps({"id": "t", "date": "2026-11-21", "judges": [
        {"provider": "openai", "model": "qwen", "base_url": server.base_url("openai"), "key_env": "JUDGE_KEY"}]}))
    call = ["run", manifest(tmp_path, 2), "--panel", str(panel), "-o", str(tmp_path / "out")]
    assert judge.main(call) == 1
    told = capsys.readouterr().err
    assert "10 of these had no verdict at all (qwen: empty (stop): the text is in reasoning_content alone" in told


def test_a_model_without_eyes_ends_before_the_canaries(server, tmp_path, capsys):
    server.script(PRO, [error(400, "INVALID_ARGUMENT", "Image input modality is not enabled for models/gemini-2.5-pro")])
    call = ["run", manifest(tmp_path, 2), "--panel", panel_file(tmp_path, server, [PRO]), "-o", str(tmp_path / "out")]
    assert judge.main(call) == 3 and len(server.calls) == 1
    assert "must be able to see two pictures at once" in capsys.readouterr().err


def test_one_canary_may_be_a_matter_of_opinion_but_it_shows(server, tmp_path, capsys):
    server.script(PRO, lambda c: verdict(True, False) if canary(c) and canary(c).name == "pixel art" else knowing(c))
    call = ["run", manifest(tmp_path, 2), "--panel", panel_file(tmp_path, server, [PRO]), "-o", str(tmp_path / "out")]
    assert judge.main(call) == 0
    assert "MARKED: gemini-2.5-pro misjudged 1 of 10 canaries (pixel art)" in capsys.readouterr().out


def test_canaries_of_another_day_vouch_for_nothing(server, tmp_path, monkeypatch):
    panel, out = Panel.load(panel_file(tmp_path, server, [PRO])), tmp_path / "out"
    run(panel, read_edits(manifest(tmp_path, 2)), out)
    run(panel, read_edits(manifest(tmp_path, 3)), out)
    assert len(server.calls) == 13
    monkeypatch.setattr(run_file, "CANARY_HOURS", -1)
    run(panel, read_edits(manifest(tmp_path, 3)), out)
    assert len(server.calls) == 13                           # no question is open, so no canaries are needed
    run(panel, read_edits(manifest(tmp_path, 4)), out)
    assert len(server.calls) == 24


def test_an_unreadable_picture_is_told_and_the_others_are_judged(server, tmp_path, capsys):
    path = manifest(tmp_path, 4)
    (tmp_path / "sifm2.png").write_bytes(b"no picture")
    call = ["run", path, "--panel", panel_file(tmp_path, server), "-o", str(tmp_path / "out"), "--min-coverage", "0"]
    assert judge.main(call) == 1
    told = capsys.readouterr().err
    assert told.count("sifm2.png is not a picture") == 1
    assert [r["status"] for r in records(tmp_path / "out")] == ["ok"] * 4 + ["bad_input"] * 2 + ["ok"] * 2


def test_a_folder_belongs_to_one_panel_and_one_writer(server, tmp_path, capsys):
    call = ["run", manifest(tmp_path, 2), "--panel", panel_file(tmp_path, server, [PRO]), "-o", str(tmp_path / "out")]
    assert judge.main(call) == 0
    panel_file(tmp_path, server, [PRO, FLASH])
    assert judge.main(call) == 2 and "holds verdicts of panel test, whose settings differ" in capsys.readouterr().err
    panel_file(tmp_path, server, [PRO])
    with Ledger(tmp_path / "out/ledger.jsonl"):
        assert judge.main(call) == 2 and "another run (process" in capsys.readouterr().err
    (tmp_path / "out/run.json").unlink()
    assert judge.main(call) == 2 and "choose another folder" in capsys.readouterr().err


def test_a_price_or_timeout_may_change(server, tmp_path):
    path, out = manifest(tmp_path, 2), tmp_path / "out"
    panel = Panel.load(panel_file(tmp_path, server, [PRO]))
    run(panel, read_edits(path), out)
    spec = dataclasses.replace(panel.judges[PRO], price={"input": 5, "output": 5}, timeout=60.0, rpm=100)
    run(dataclasses.replace(panel, judges={PRO: spec}), read_edits(path), out)
    assert len(server.calls) == 12


def test_votes(server, tmp_path):
    count = {}

    def wavering(call):
        if canary(call):
            return knowing(call)
        i = number(call)
        count[i] = count.get(i, 0) + 1
        return verdict(i == 1 and count[i] != 2, i == 2 and count[i] == 2)
    server.script(PRO, wavering)
    panel = Panel.load(panel_file(tmp_path, server, [PRO], votes=3))
    found = run(panel, read_edits(manifest(tmp_path, 3)), tmp_path / "out", concurrency=1)
    assert [r.verdict.success for r in found.records] == [False, True, False]
    seeds = {call.body["generationConfig"]["seed"] for call in server.calls if canary(call) is None}
    assert seeds == {panels.SEED, panels.SEED + 1, panels.SEED + 2} and len(server.calls) == 10 + 9
    assert found.summary["self_flips"] == {PRO: pytest.approx(4 / 9)}


@pytest.mark.parametrize("votes, expected", [
    ([(True, False, "ok")], (True, False, "ok")),
    ([(None, None, "empty")], (None, None, "empty")),
    ([(True, False, "ok"), (None, None, "timeout"), (True, True, "ok")], (True, None, "ok")),
    ([(True, False, "ok"), (None, None, "timeout"), (False, True, "ok")], (None, None, "timeout")),
    ([(True, False, "ok"), (False, False, "ok"), (True, True, "ok")], (True, False, "ok")),
])
def test_a_majority_is_of_all_votes(votes, expected):
    assert majority(votes) == expected


# ------------------------------------------------------------------------------------- one interface with other judges

def test_models_and_oracles_are_one_interface(server, tmp_path):
    """ask on a panel gives what a run gives, and takes an oracle beside it."""
    server.script(FLASH, but(blocked("SAFETY"), lambda c: number(c) == 3))
    samples = read_edits(manifest(tmp_path, 5))
    panel = Panel.load(panel_file(tmp_path, server))
    edits = [Edit(s.sample_id, s.image_id, s.prompt_id, s.arm, Pair(Image.open(s.original), s.prompt),
                      Image.open(s.edited)) for s in samples]
    one_by_one = list(ask(judges(panel), edits))
    assert one_by_one == run(panel, samples, tmp_path / "out").records
    assert [r.status for r in one_by_one if r.judge == FLASH][3] == "blocked_prompt"

    def oracle(sample, edited):
        return Verdict.of(*truth(edited.getpixel((0, 0))[2]))
    both = list(ask({"oracle": oracle, **judges(panel)}, edits))
    assert success_rate(by_arm(both), "sifm").complete == 4
    agreement = consistency(both, models=["oracle", PRO])["success"]["models"]
    assert agreement.observed.value == 1 and agreement.items == 5


@dataclasses.dataclass
class Pair:
    image: object
    prompt: str


def test_the_budget_of_a_panel_is_shared(server, tmp_path):
    budget = Budget(max_calls=1)
    one, other = judges(Panel.load(panel_file(tmp_path, server)), budget=budget).values()
    assert one.client.budget is other.client.budget is budget


# ------------------------------------------------------------------------------------------------- no key, or no server

def test_a_newcomer_without_any_key(tmp_path, capsys, monkeypatch, server):
    """The local panel pointing at nothing, and the paper's without a key: one sentence each, and nothing pretended."""
    path = manifest(tmp_path, 2)
    server.server_close()                                    # its port is free: no server answers
    shipped = json.loads((ROOT / "sifm_min/judging/panels/local-ollama.json").read_text())
    for spec in shipped["judges"]:
        spec["base_url"] = server.base_url("openai")
    (tmp_path / "local.json").write_text(json.dumps(shipped))
    assert judge.main(["run", path, "--panel", str(tmp_path / "local.json"), "-o", str(tmp_path / "a")]) == 3
    told = capsys.readouterr()
    assert told.out == "" and len(told.err.splitlines()) == 1
    assert "start the server there (ollama serve, vllm serve, llama-server), or set base_url" in told.err
    assert judge.main(["run", path, "--panel", "paper-2025", "-o", str(tmp_path / "b")]) == 2
    told = capsys.readouterr()
    assert told.out == "" and len(told.err.splitlines()) == 1 and "set GEMINI_API_KEY or GOOGLE_API_KEY" in told.err


def test_a_refused_key_ends_the_run_and_leaves_no_verdict(server, tmp_path, capsys):
    server.script(PRO, [error(403, "PERMISSION_DENIED", f"key {SECRET} was reported as leaked")])
    call = ["run", manifest(tmp_path, 3), "--panel", panel_file(tmp_path, server, [PRO]), "-o", str(tmp_path / "out")]
    assert judge.main(call) == 3
    told = capsys.readouterr()
    assert len(server.calls) == 1 and "check the key" in told.err and SECRET not in told.err + told.out
    assert answers(tmp_path / "out") == []
    assert all(SECRET.encode() not in file.read_bytes() for file in (tmp_path / "out").iterdir())


def test_a_dry_run_sends_nothing(server, tmp_path, capsys, monkeypatch):
    path, panel = manifest(tmp_path, 6), panel_file(tmp_path, server)
    monkeypatch.delenv("JUDGE_KEY")
    assert judge.main(["dry-run", path, "--panel", panel, "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["calls"] for row in rows] == [6, 6] and all(row["cost_usd_at_most"] > 0 for row in rows) and not server.calls
    monkeypatch.setenv("JUDGE_KEY", SECRET)
    assert judge.main(["run", path, "--panel", panel, "-o", str(tmp_path / "out"), "--max-calls", "26"]) == 1
    actual = json.loads((tmp_path / "out/run.json").read_text())
    assert actual["tokens"]["prompt"] <= 26 / 6 * rows[0]["prompt_tokens_at_most"]
    capsys.readouterr()
    assert judge.main(["dry-run", path, "--panel", panel, "-o", str(tmp_path / "out"), "--json", "--count"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert sum(row["cached"] for row in rows) == 6 and sum(row["calls"] for row in rows) == 6
    assert rows[0]["counted_tokens"] == 1234 and rows[0]["cost_usd_per_call_so_far"] > 0


def test_own_and_unseen_prompts_have_rates_of_their_own(server, tmp_path):
    path = Path(manifest(tmp_path, 4))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for i, row in enumerate(rows):
        row["prompt_type"] = "own" if i < 2 else "unseen"
    path.write_text("\n".join(map(json.dumps, rows)))
    found = run(Panel.load(panel_file(tmp_path, server)), read_edits(path), tmp_path / "out")
    tables = found.summary["results"]["tables"]
    assert {kind: arms["sifm"]["rate"]["samples"] for kind, arms in tables.items()} == {"own": 2, "unseen": 2}
    assert "sifm, unseen: ISR" in "\n".join(describe(found.summary))


def test_refusals_that_fall_on_one_arm_are_marked(server, tmp_path):
    server.script(PRO, but(blocked("SAFETY"), lambda c: number(c) in (100, 101)))
    found = run(Panel.load(panel_file(tmp_path, server)), read_edits(manifest(tmp_path, 5, ("control", "sifm"))),
                      tmp_path / "out")
    assert "MARKED: judges refuse more often in some arms (control 0.0 %, sifm 20.0 %)" in "\n".join(
        describe(found.summary))


def test_show_names_the_panels(capsys):
    assert judge.main(["show"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in told] == panels.names()
    assert judge.main(["show", "paper-2025", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["prompt"] == "isr-judge/1"
    assert judge.main(["show", "nowhere"]) == 2


@pytest.mark.parametrize("call", [[], ["judge"], ["run"], ["run", "m", "--panel", "x"], ["run", "m", "-o", "x", "--panel", "y",
                                  "--max-cost", "-1"], ["dry-run", "absent.jsonl", "--panel", "paper-2025"],
                                  ["consistency", "absent"], ["show", ""]])
def test_usage_errors_are_one_sentence(call, capsys):
    assert judge.main(call) == 2
    told = capsys.readouterr()
    assert told.out == "" and len(told.err.splitlines()) == 1
