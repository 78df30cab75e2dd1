"""Three hundred mutated answers of a vision service, over a real connection: each is an Answer or a Stop, never a traceback.

The whole answers below are mutated in their JSON, in their bytes, in their status and headers, or in the raw bytes of the
HTTP response. The seed is fixed; a failure names the number of its case.
"""

import copy
import json
import random
import time

import pytest
from fake_gemini import FakeGemini
from PIL import Image

from sifm_min.gemini import REASONS, STATUSES, Answer, Budget, Client, Key, Request, Spec, Stop

SEED, CASES = 20261128, 300
SECRET = "AQ.sentinel-0123456789"
SCHEMA = {"type": "object", "properties": {
    "semantic_evidence": {"type": "string"}, "semantic_mismatch": {"type": "boolean"},
    "degradation_evidence": {"type": "string"}, "perceptual_degradation": {"type": "boolean"}}}
SCHEMA["required"] = list(SCHEMA["properties"])
GOOD = json.dumps({"semantic_evidence": "seen", "semantic_mismatch": True, "degradation_evidence": "none",
                   "perceptual_degradation": False})
QUOTA = {"@type": "type.googleapis.com/google.rpc.QuotaFailure", "violations": [
    {"quotaMetric": "generate_content_free_tier_requests", "quotaId": "GenerateRequestsPerMinutePerProjectPerModel-FreeTier",
     "quotaDimensions": {"model": "gemini-2.5-pro"}, "quotaValue": "10"}]}
WHOLE = {                                                    # provider: (status, body) as the services write them
    "gemini": [
        (200, {"candidates": [{"content": {"role": "model", "parts": [{"text": "hm", "thought": True}, {"text": GOOD}]},
                               "finishReason": "STOP", "index": 0, "safetyRatings": []}],
               "usageMetadata": {"promptTokenCount": 2710, "candidatesTokenCount": 96, "thoughtsTokenCount": 611,
                                 "cachedContentTokenCount": 5, "totalTokenCount": 3417},
               "modelVersion": "gemini-2.5-pro", "responseId": "x1",
               "modelStatus": {"modelStage": "LEGACY", "retirementTime": "2026-12-01"}}),
        (200, {"promptFeedback": {"blockReason": "SAFETY", "safetyRatings": []}, "modelVersion": "gemini-2.5-pro"}),
        (429, {"error": {"code": 429, "status": "RESOURCE_EXHAUSTED", "message": "limit: 0", "details": [
            QUOTA, {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "2.5s"}]}}),
        (403, {"error": {"code": 403, "status": "PERMISSION_DENIED", "message": "no", "details": [
            {"@type": "type.googleapis.com/google.rpc.ErrorInfo", "reason": "SERVICE_DISABLED", "metadata": {"a": "b"}}]}}),
        (503, [{"error": {"code": 503, "status": "UNAVAILABLE", "message": "overloaded"}}])],
    "openai": [
        (200, {"id": "x1", "object": "chat.completion", "model": "qwen", "system_fingerprint": "f", "choices": [
            {"index": 0, "finish_reason": "stop", "message": {
                "role": "assistant", "content": f"<think>hm</think>{GOOD}", "refusal": None, "reasoning_content": "hm"}}],
            "usage": {"prompt_tokens": 2710, "completion_tokens": 707, "total_tokens": 3417,
                      "prompt_tokens_details": {"cached_tokens": 10}, "completion_tokens_details": {"reasoning_tokens": 6}}}),
        (400, {"error": {"message": "At most 1 image(s) may be provided", "type": "BadRequestError", "code": 400}}),
        (429, {"error": {"message": "Limit 0, used 0", "type": "tokens", "code": "rate_limit_exceeded"}}),
        (500, {"detail": [{"msg": "m", "loc": ["body"]}]})]}
ODD = (None, True, -1, 0, 1e308, 2**70, "", "x" * 5000, "\ud800\0", "<html>", "limit: 0", [], {}, [[]], [None], {"a": {}},
       "gemini-3.8-flash", "length", "MAX_TOKENS", GOOD, [GOOD], json.loads(GOOD))
HEADERS = (("Retry-After", "12.5"), ("Retry-After", "9" * 30), ("Retry-After", "Fri, 99 Foo 2026 25:61:00 GMT"),
           ("Retry-After", "\xe9"), ("Retry-After", "86400"), ("Date", "no"), ("Location", "http://127.0.0.1:1/"),
           ("Content-Encoding", "gzip"), ("Content-Encoding", "br, identity"), ("Transfer-Encoding", "chunked"),
           ("Content-Length", "7"), ("Content-Length", "-5"), ("Content-Length", "5, 7"),
           ("Content-Length", "abc"), ("Content-Length", "9" * 13),
           ("Content-Type", "text/html; charset=\xff"), ("Set-Cookie", "a=b; Domain=..."), ("X", "y" * 70000),
           ("Connection", "close"), ("Trailer", "x"))


def places(value, way=()):
    """Every way to a value inside a JSON value."""
    yield way
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from places(value[key], (*way, key))


def mutated_json(rng, body):
    """The body with one to three of its values deleted, replaced, doubled or wrapped."""
    body = copy.deepcopy(body)
    for _ in range(rng.randint(1, 3)):
        way = rng.choice(list(places(body)))
        if not way:
            body = rng.choice([body, [body], [body, body], {"error": body}, rng.choice(ODD)])
            continue
        inner = body
        for key in way[:-1]:
            inner = inner[key]
        action = rng.randrange(4)
        if action == 0:
            del inner[way[-1]]
        elif action == 1:
            inner[way[-1]] = copy.deepcopy(rng.choice(ODD))
        elif action == 2 and isinstance(inner, list):
            inner.append(copy.deepcopy(inner[way[-1]]))
        else:
            inner[way[-1]] = rng.choice([[inner[way[-1]]], {"text": inner[way[-1]]}, str(inner[way[-1]])])
    return body


def mutated_bytes(rng, content):
    """The bytes with one to eight of them changed, cut off, doubled or removed."""
    content = bytearray(content)
    for _ in range(rng.randint(1, 8)):
        at = rng.randrange(len(content) + 1)
        action = rng.randrange(5)
        if action == 0:
            content[at:at + 1] = bytes([rng.randrange(256)])
        elif action == 1:
            content[at:at] = rng.choice([b"\0", b"\xff\xfe", b"{", b"]", b'"', b"\\ud800", b"\r\n\r\n", b"NaN", b"{" * 3000])
        elif action == 2:
            del content[at:at + rng.randrange(40)]
        elif action == 3:
            content[at:at] = content[at:at + rng.randrange(40)]
        elif rng.random() < 0.3:
            del content[at:]
    return bytes(content)


def raw_response(rng, status, content):
    """A whole HTTP response as bytes, with odd headers on request."""
    headers = {"Content-Type": "application/json", "Content-Length": str(len(content))}
    headers |= dict(rng.sample(HEADERS, rng.randrange(4)))
    lines = [f"HTTP/1.1 {status} x", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + content


def step(rng, provider):
    """A step of the server: one mutated response, after which the connection is closed."""
    status, body = rng.choice(WHOLE[provider])
    kind = rng.randrange(4)
    body = mutated_json(rng, body) if kind in (0, 2) else body
    content = json.dumps(body).encode()
    if kind == 1:
        content = mutated_bytes(rng, content)
    if kind in (2, 3) or rng.random() < 0.2:
        status = rng.choice([status, 200, 200, rng.choice([100, 199, 201, 204, 206, 301, 304, 400, 401, 404, 408, 413, 418,
                                                          422, 425, 429, 451, 499, 500, 502, 503, 504, 529, 599, 999])])
    whole = raw_response(rng, status, content)
    if kind == 3:
        whole = mutated_bytes(rng, whole)

    def send(handler, call):
        handler.close_connection = True
        handler.write(whole)
    return send


def asked(server, rng, provider):
    """The Answer or the Stop of one request that is answered by mutated responses alone."""
    now = [0.0]

    def sleep(seconds):
        now[0] += seconds
    model = "gemini-2.5-pro" if provider == "gemini" else "qwen"
    spec = Spec.from_json({"provider": provider, "model": model, "base_url": server.base_url(provider), "timeout": 0.5,
                           "price": {"input": 1, "output": 10}})
    notices, budget = [], Budget(max_calls=12)
    client = Client(spec, Key(SECRET, "test"), budget=budget, notify=notices.append, clock=lambda: now[0], sleep=sleep)
    server.script(model, [step(rng, provider) for _ in range(12)])
    picture = Image.new("RGB", (4, 4), (rng.randrange(256), 10, 200))
    try:
        outcome = client.ask(Request("rules", ["IMAGE 1:", picture, "IMAGE 2:", picture, "?"], SCHEMA, 7))
    except Stop as stop:
        outcome = stop
    assert 1 <= budget.calls <= 12 and not budget._reserved
    return outcome, notices


@pytest.fixture(scope="module")
def server():
    with FakeGemini() as server:
        yield server


@pytest.mark.slow
@pytest.mark.parametrize("provider", WHOLE)
def test_mutated_answers_end_in_an_answer_or_a_stop(server, provider):
    seen, started = set(), time.monotonic()
    for case in range(CASES // 2):
        rng = random.Random(f"{SEED} {provider} {case}")
        try:
            outcome, notices = asked(server, rng, provider)
            if isinstance(outcome, Answer):
                told = json.dumps(outcome.record(), ensure_ascii=False, allow_nan=False)
                assert outcome.status in STATUSES and outcome.ok == (outcome.data is not None)
                assert outcome.ok or outcome.message
                notices.append(outcome.message)
                if outcome.ok:
                    assert all(type(outcome.data[name]) is {"boolean": bool, "string": str}[kind["type"]]
                               for name, kind in SCHEMA["properties"].items())
            else:
                told = str(outcome)
                notices.append(told)
                assert outcome.reason in REASONS and len(told) < 700 and "cannot be sent" not in told
            told.encode()
            assert SECRET not in told
            for text in notices:
                assert text.isprintable(), f"{text!r} would reach a terminal"
        except Exception as error:
            raise AssertionError(f"case {case} of {provider}, seed {SEED}: {error!r}") from error
        seen.add(outcome.status if isinstance(outcome, Answer) else f"stop: {outcome.reason}")
    assert len(seen) >= 8, f"the mutations reach too little: {sorted(seen)}"
    assert time.monotonic() - started < 60
