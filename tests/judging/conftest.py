"""The bench of the client's tests; after each test it searches everything for the key."""

import pytest
from client_bench import SENTINEL, Bench, texts
from fake_gemini import FakeGemini

from sifm_min.gemini import STATUSES, Answer


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
