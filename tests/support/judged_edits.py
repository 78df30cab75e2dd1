"""Edits whose findings are known, a panel of a fake service that knows them, and readers of a run's folder."""

import json

import pytest
from fake_gemini import verdict
from PIL import Image

from sifm_min.files.ledger import read_rows
from sifm_min.judging import canaries as canary_file
from sifm_min.judging.answers import ANSWERS
from sifm_min.judging.canaries import canaries

SECRET = "AQ.sentinel-0123456789"
PRO, FLASH = "gemini-2.5-pro", "gemini-2.5-flash"
SMALL = 48                                                   # canaries are drawn so small here: few tests are about them
with pytest.MonkeyPatch.context() as _patch:
    _patch.setattr(canary_file, "SIZE", SMALL)
    CANARIES = {(c.prompt, *(i.tobytes() for i in (c.original, c.edited))): c for c in canaries()}


def instruction(call):
    return json.loads(next(part for part in reversed(call.parts) if isinstance(part, str)).split("\n")[0].partition(" = ")[2])


def canary(call):
    """The canary that a call shows, or None."""
    return CANARIES.get((instruction(call), *(picture.convert("RGB").tobytes() for picture in call.pictures)))


def number(call):
    """Which sample a call shows: the edited picture's blue and the original's red say it."""
    original, edited = (picture.getpixel((0, 0)) for picture in call.pictures)
    return edited[2] + 256 * original[0]


def truth(i):
    """The findings of every judge here about sample i."""
    return i % 3 == 0, i % 5 == 0


def knowing(call):
    known = canary(call)
    if known:
        return verdict(known.semantic_mismatch, known.perceptual_degradation)
    return verdict(*truth(number(call)))


def but(step, wrong):
    """Steps of a judge that knows, except for what `wrong(call)` says of its samples."""
    return lambda call: step if canary(call) is None and wrong(call) else knowing(call)


def panel_file(folder, server, models=(PRO, FLASH), **rest):
    listed = [{"provider": "gemini", "model": model, "base_url": server.base_url(), "key_env": "JUDGE_KEY",
               "price": {"input": 1, "output": 10, "date": "2026-11-21"}} for model in models]
    path = folder / "panel.json"
    path.write_text(json.dumps({"id": "test", "date": "2026-11-21", "judges": listed, **rest}))
    return str(path)


def manifest(folder, count, arms=("sifm",), **rest):
    """Pictures of 32x32 and the manifest over them; sample i of arm a is number i + 100 a."""
    rows = []
    for i in range(count):
        Image.new("RGB", (32, 32), (i // 256, i % 256, 7)).save(folder / f"original{i}.png")
        for a, arm in enumerate(arms):
            Image.new("RGB", (32, 32), (9, 9, (i + 100 * a) % 256)).save(folder / f"{arm}{i}.png")
            rows.append({"sample_id": f"s{i}", "original": f"original{i}.png", "edited": f"{arm}{i}.png", "arm": arm,
                         "prompt": "make her a witch", **rest})
    path = folder / "edits.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def records(folder):
    return [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]


def answers(folder):
    """The rows of a journal that are answers; the others are calls."""
    path = folder / "ledger.jsonl"
    return [row for row in read_rows(path) if row["kind"] in ANSWERS] if path.exists() else []


def calls(folder):
    """{number: USD, or None where unknown} of the settled calls of a journal, and the set of intents."""
    rows = read_rows(folder / "ledger.jsonl")
    return ({row["call"]: row["cost_usd"] for row in rows if row["kind"] == "settled"},
            {row["call"] for row in rows if row["kind"] == "intent"})


def samples_asked(server):
    return [number(call) for call in server.calls if canary(call) is None]
