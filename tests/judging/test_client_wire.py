"""The client: deadlines, broken connections, redirects and bodies of any kind (scenarios 21 to 26)."""

import gzip
import json
import time
import tracemalloc

import pytest
from client_bench import GOOD, ask, both, whole
from fake_gemini import (
    FakeGemini,
    announced,
    bomb,
    cut_chunks,
    drip,
    endless,
    hang_up_after,
    redirect,
    reset,
    says,
    sends,
    short_body,
    silence,
    verdict,
)

from sifm_min.judging import transport


@pytest.mark.slow
@pytest.mark.parametrize("step", [silence, drip(), drip(head="HTTP/1.1 200 OK\r\nX-Slow: ")], ids=["silence", "body", "header"])
def test_21_the_deadline_is_for_all_of_a_call(bench, step):
    started = time.monotonic()
    answer, calls = bench.ask([step], timeout=0.2)
    assert (answer.status, calls, answer.unknown) == ("timeout", 3, 3)
    assert time.monotonic() - started < 5


@both
@pytest.mark.parametrize("step", [reset, short_body, cut_chunks])
def test_22_a_broken_connection(bench, provider, step):
    answer, calls = bench.ask([step, step, verdict(True, True)], provider)
    assert answer.ok and calls == 3
    assert [attempt["status"] for attempt in answer.attempts] == ["http_error", "http_error", "ok"]
    assert (answer.unknown, answer.cost) == (2, pytest.approx(0.0104575))


def test_22_a_connection_that_is_closed_between_calls(bench):
    bench.server.script("gemini-2.5-pro", [hang_up_after(verdict(True, True))])
    client = bench.client()
    for _ in range(4):
        assert client.ask(ask()).ok


def test_22_an_untrusted_connection_is_fatal(bench):
    stop, _ = bench.stop([verdict(True, True)], base_url=bench.server.base_url().replace("http:", "https:"))
    assert stop.reason == "tls" and bench.server.calls == []


@both
@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_23_redirects_are_not_followed(bench, provider, code):
    with FakeGemini() as second:
        stop, calls = bench.stop([redirect(code, second.base_url() + "/models/x:generateContent")], provider)
        assert (stop.reason, calls, second.calls) == ("redirect", 1, [])
        assert "127.0.0.1" in str(stop)
    assert bench.stop([redirect(code, bench.server.base_url(provider))], provider)[1] == 1


@pytest.mark.slow
def test_24_bodies_without_measure(bench):
    steps = endless, announced, bomb(100), sends(" " * (transport.BODY_CAP + 1))
    tracemalloc.start()
    try:
        for step in steps:
            answer, calls = bench.ask([step])
            assert (answer.status, calls) == ("too_large", 1), step
        assert tracemalloc.get_traced_memory()[1] < 30 * 2**20, "what the server holds is in it, too"
    finally:
        tracemalloc.stop()
    assert bench.server.poured < 4 * transport.BODY_CAP
    answer, calls = bench.ask([sends("[" * 200_000)])
    assert (answer.status, calls) == ("too_large", 1)


def test_24_compressed_answers_are_read_unknown_kinds_not(bench):
    assert bench.ask([sends(gzip.compress(whole(GOOD).encode()), Content_Encoding="gzip")])[0].ok
    assert bench.ask([sends(b"x", Content_Encoding="br"), verdict(True, True)])[0].attempts[0]["status"] == "http_error"


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "utf-16-le"])
def test_25_other_encodings_are_not_guessed(bench, encoding):
    answer, calls = bench.ask([sends(whole("é" + GOOD).encode(encoding))])
    assert (answer.status, calls, answer.text) == ("bad_encoding", 2, "")


def test_25_a_mark_is_accepted_and_odd_characters_replaced(bench):
    assert bench.ask([sends(whole(GOOD).encode("utf-8-sig"))])[0].ok
    odd = json.dumps(json.loads(GOOD) | {"semantic_evidence": "\ud800 and \0 and é"})
    answer, _ = bench.ask([says(odd)])
    assert answer.data["semantic_evidence"] == "\ufffd and \ufffd and é"
    assert bench.ask([says("no \ud800\0")])[0].text == "no \ufffd\ufffd"


def test_26_a_page_of_the_network_is_no_answer(bench):
    page = sends("<html>Welcome to the hotel</html>", kind="text/html")
    assert bench.ask([page, verdict(True, True)])[0].ok
    answer, calls = bench.ask([page])
    assert (answer.status, calls) == ("http_error", 3) and "not JSON" in answer.message
    assert bench.ask([sends(whole(GOOD), kind="text/plain")])[0].ok
    answer, calls = bench.ask([sends(whole(GOOD, x=[1]).replace("[1]", "NaN")), verdict(True, True)])
    assert answer.ok and calls == 2
