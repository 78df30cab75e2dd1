"""Fixtures of the judging tests: the bench of the client, and the fake service of a panel."""

import pytest
from client_bench import SENTINEL, Bench, texts
from fake_gemini import FakeGemini
from judged_edits import FLASH, PRO, SECRET, SMALL, knowing

from sifm_min.gemini import STATUSES, Answer
from sifm_min.judging import canaries as canary_file


@pytest.fixture
def bench(capfd, caplog):
    caplog.set_level("DEBUG")                                # what urllib3 would log
    with FakeGemini() as server:
        bench = Bench(server)
        yield bench
    told = [*texts(bench.said), *bench.notices, caplog.text, *capfd.readouterr()]
    told += [call.path + call.raw.decode("utf-8", "replace") for call in server.calls]
    for text in told:
        assert SENTINEL not in text and "sentinel" not in text
    for answer in [thing for thing in bench.said if isinstance(thing, Answer)]:
        assert answer.status in STATUSES
        assert answer.ok or (answer.message and answer.data is None)
    for call in server.calls:
        assert call.credentials == ["Authorization" if call.openai else "x-goog-api-key"]


@pytest.fixture
def small_canaries(monkeypatch):
    """Canaries of 48 pixels, no key of the machine, and the key of the panel in JUDGE_KEY."""
    monkeypatch.setattr(canary_file, "SIZE", SMALL)
    for name in ("GEMINI_API_KEY", "GOOGLE_API_KEY", "GEMINI_API_KEY_FILE", "GOOGLE_API_KEY_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("JUDGE_KEY", SECRET)


@pytest.fixture
def server(small_canaries):
    """A fake service whose two models know the findings of every edit and canary."""
    with FakeGemini() as server:
        for model in (PRO, FLASH):
            server.script(model, knowing)
        yield server
