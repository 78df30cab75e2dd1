"""The client: quotas, errors and waits of a service that refuses or fails (scenarios 13 to 20)."""

import email.utils
import json
import os

import pytest
from client_bench import GOOD, MODELS, SENTINEL, ask, both
from fake_gemini import BAD_KEY, error, quota, redirect, says, sends, verdict
from PIL import Image

from sifm_min.gemini import ask_many
from sifm_min.judging import client as client_file
from sifm_min.judging import outcomes
from sifm_min.judging.outcomes import requested_wait


@both
def test_13_a_quota_per_minute_is_waited_for(bench, provider):
    steps = [quota("2s")] if provider == "gemini" else [quota(Retry_After="2")]
    answer, calls = bench.ask([*steps, verdict(True, False)], provider)
    assert answer.ok and calls == 2
    assert bench.time.slept == [3.0], "two seconds and a jitter of up to one"
    assert bench.notices == [f"{MODELS[provider]}: waiting 3 s for its quota"], "a wait is told"
    assert [a["status"] for a in answer.attempts] == ["http_error", "ok"] and answer.unknown == 0


def test_13_all_calls_of_the_model_wait(bench):
    """Six at once; the fourth answer is a 429. None of the six may start before the pause is over."""
    client, other = bench.client(), bench.client(model="gemini-2.5-flash")
    client.ask(ask())
    count = iter(range(100))
    bench.server.script("gemini-2.5-pro", lambda call: quota("30s") if next(count) == 3 else verdict(True, True))
    started, wait = [], client._wait_for_turn

    def waited():
        wait()
        started.append(bench.time.now)
    client._wait_for_turn = waited
    answers = [answer for *_, answer in ask_many([(client, [ask()] * 12)], concurrency=6)]
    assert len(answers) == 12 and all(answer.ok for answer in answers)
    late = [moment for moment in started if moment > 1000]
    assert len(started) == 13 and late and all(moment >= 1030 for moment in late)
    assert other.ask(ask()).ok


def test_13_a_paused_model_starts_nothing(bench):
    client = bench.client()
    client.ask(ask())
    client._paused_until = bench.time.now + 40
    client.ask(ask())
    assert bench.time.slept == [40]


@pytest.mark.parametrize("step, waited", [
    (quota(Retry_After="7"), 8), (quota("2s", Retry_After="7"), 8), (quota("9.5s", Retry_After="7"), 10.5),
    (quota("0.000000001s"), 2), (quota(Retry_After="-1"), 1), (quota(Retry_After="abc"), 1), (quota(Retry_After="12.5"), 13.5),
    (quota(Retry_After="99999999"), 1), (quota("99999999s"), 1), (quota(Retry_After="7.25s"), 8.25), (quota("soon"), 1),
    (error(503, Retry_After="2.5"), 3.5), (error(429), 1), (sends("", 429), 1), (quota(Retry_After="1" * 400), 1),
    (error(503, "RESOURCE_EXHAUSTED", details=[{"retryDelay": "4s"}]), 5)])
def test_14_sane_waits_are_honoured(bench, step, waited):
    assert bench.ask([step, verdict(True, True)])[0].ok
    assert bench.time.slept == [pytest.approx(waited)]


def test_14_a_date_is_read_against_the_clock_of_the_server():
    now, later = (email.utils.formatdate(1_800_000_000 + seconds, usegmt=True) for seconds in (0, 20))
    assert requested_wait({"Retry-After": later, "Date": now}, []) == 20
    assert requested_wait({"Retry-After": now, "Date": later}, []) == requested_wait({"Retry-After": later}, []) == 0


@pytest.mark.parametrize("step, reason, words, calls", [
    (quota(per="Day"), "quota_day", "midnight Pacific time", 1), (quota("30s", per="Day"), "quota_day", "today's quota", 1),
    (quota("30s", value="0"), "quota", "is not in the plan of this key", 1), (quota(), "quota", "it never answered", 6),
    (quota("1800s"), "quota", "it never answered", 1), (quota("7200s"), "quota", "asks to wait 2.0 hours", 1),
    (quota(Retry_After="260000"), "quota", "asks to wait 3.0 days", 1),
    (error(503, "UNAVAILABLE", Retry_After="5400"), "unreachable", "asks to wait 1.5 hours", 1)])
def test_15_a_quota_that_no_wait_helps(bench, step, reason, words, calls):
    stop, made = bench.stop([step])
    assert (stop.reason, made) == (reason, calls) and words in str(stop)


NO_PLAN = (
    "You exceeded your current quota, please check your plan and billing details. For more information on this error, head to: "
    "https://ai.google.dev/gemini-api/docs/rate-limits. To monitor your current usage, head to: https://ai.dev/usage?tab=rate-"
    "limit. \n* Quota exceeded for metric: generativelanguage.googleapis.com/generate_content_free_tier_{}, limit: {}, model: "
    "gemini-2.5-pro\n* Quota exceeded for metric: generativelanguage.googleapis.com/generate_content_free_tier_requests, "
    "limit: {}, model: gemini-2.5-pro\nPlease retry in 21.5s.")
PER_DAY = [{"@type": "type.googleapis.com/google.rpc.QuotaFailure", "violations": [
    {"quotaMetric": "generativelanguage.googleapis.com/generate_content_free_tier_requests", "quotaId": f"{name}-FreeTier",
     "quotaDimensions": {"location": "global", "model": "gemini-2.5-pro"}} for name in (
        "GenerateRequestsPerDayPerProjectPerModel", "GenerateRequestsPerMinutePerProjectPerModel")]},
    {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "21s"}]


@both
def test_15_quota_of_zero_is_no_quota_of_today(bench, provider):
    """The limit is only in the message, far behind its start, and the per-day id is among the violations."""
    step = error(429, "RESOURCE_EXHAUSTED", NO_PLAN.format("input_token_count", 0, 0), PER_DAY)
    stop, made = bench.stop([step], provider)
    assert (stop.reason, made) == ("quota", 1)
    assert str(stop).startswith(f"{MODELS[provider]} is not in the plan of this key: its quota is 0, so that no waiting helps")


@pytest.mark.parametrize("limits", [(250000, 100), ("0.5", "05"), ("0,5", "10")])
def test_15_quota_above_zero_is_spent_for_today(bench, limits):
    stop, _ = bench.stop([error(429, "RESOURCE_EXHAUSTED", NO_PLAN.format("requests", *limits), PER_DAY)])
    assert stop.reason == "quota_day" and "today's quota" in str(stop)


def test_15_credit_that_is_used_up(bench):
    stop, calls = bench.stop([error(429, "insufficient_quota")], "openai")
    assert (stop.reason, calls) == ("quota", 1) and "add credit" in str(stop)


def test_15_the_day_ends_in_the_middle(bench):
    client = bench.client()
    bench.server.script("gemini-2.5-pro", [*[verdict(True, True)] * 5, quota(per="Day")])
    answers = list(ask_many([(client, [ask()] * 20)], concurrency=2))
    assert len(answers) == 5 and all(answer.ok for *_, answer in answers)
    assert client.stopped.reason == "quota_day" and len(bench.server.calls) <= 7


@pytest.mark.parametrize("code", [500, 502, 503, 504, 408, 529, 425])
def test_16_a_service_that_stumbles(bench, code):
    answer, calls = bench.ask([error(code, "UNAVAILABLE"), error(code), verdict(True, True)])
    assert answer.ok and calls == 3
    assert bench.time.slept == [1, 2], "full jitter below 1, 2, 4, ... seconds"


def test_16_the_jitter_is_drawn_and_the_wait_is_bounded(bench):
    drawn, client = [], bench.client()
    client._jitter = lambda low, high: drawn.append((low, high)) or 0.0
    for failures in (1, 2, 3, 7, 50):
        client._back_off(outcomes.Outcome("again"), failures)
    assert drawn == [(0, 1), (0, 2), (0, 4), (0, 60), (0, 60)] and bench.time.slept == [0] * 5


def test_17_a_service_that_is_down(bench):
    dead, alive = bench.client(), bench.client(model="gemini-2.5-flash")
    bench.server.script("gemini-2.5-pro", [error(503, "UNAVAILABLE", "overloaded")])
    answers = list(ask_many([(dead, [ask()] * 50), (alive, [ask()] * 9)], concurrency=1))
    mine = [answer for which, _, answer in answers if which == 0]
    assert [answer.status for answer in mine] == ["http_error"] * 2 and len(bench.server.seen("gemini-2.5-pro")) == 10
    assert dead.stopped.reason == "breaker" and "503" in str(dead.stopped)
    assert [answer.ok for which, _, answer in answers if which == 1] == [True] * 9 and alive.stopped is None


def test_17_bad_moments_of_many_calls_are_no_breakdown(bench):
    client, seen = bench.client(), set()
    client.ask(ask())

    def one_bad_moment(call):                                # of each of the first 16 requests, however they interleave
        number = call.body["generationConfig"]["seed"]
        if number >= 16 or number in seen:
            return verdict(True, True)
        seen.add(number)
        return error(503)

    bench.server.script("gemini-2.5-pro", one_bad_moment)
    answers = list(ask_many([(client, [ask(seed=number) for number in range(32)])], concurrency=16))
    assert len(answers) == 32 and all(answer.ok for *_, answer in answers) and client.stopped is None
    assert len(seen) == 16


FATAL = [
    (BAD_KEY, "credential", "400 INVALID_ARGUMENT"), (error(401, "UNAUTHENTICATED"), "credential", "check the key"),
    (error(402, "RESOURCE_EXHAUSTED"), "credential", "credit"),
    (error(403, "PERMISSION_DENIED", "reported as leaked"), "credential", "leaked"),
    (error(403, "PERMISSION_DENIED", "Generative Language API has not been used in project 12345 before or it is disabled. "
           "Enable it by visiting https://console.developers.google.com/apis/api/generativelanguage.googleapis.com/overview?"
           "project=12345 then retry."), "credential", "project=12345 then retry.; the key is sound, but"),
    (error(403, "PERMISSION_DENIED", "no", [{"reason": "SERVICE_DISABLED"}]), "credential", "enable it in the project's"),
    (error(403, "PERMISSION_DENIED", "API not enabled for image-lab"), "credential", "enable it in the project's console"),
    (error(403, "PERMISSION_DENIED", "no", [{"reason": "BILLING_DISABLED"}]), "credential", "link billing"),
    (error(403, "PERMISSION_DENIED", "no", [{"reason": "API_KEY_SERVICE_BLOCKED"}]), "credential", "restricted to other APIs"),
    (error(403, "PERMISSION_DENIED", "no", [{"reason": "API_KEY_IP_ADDRESS_BLOCKED"}]), "credential", "from this machine"),
    (error(404, "NOT_FOUND", "no longer available to new users"), "model", "another panel"),
    (error(400, "FAILED_PRECONDITION", "User location is not supported"), "request", "country"),
    (error(400, "INVALID_ARGUMENT", "thinking budget (7) is invalid"), "request", "settings"),
    (error(405, message="no"), "request", "405")]


@both
@pytest.mark.parametrize("step, reason, words", FATAL)
def test_18_what_no_repetition_helps_is_asked_once(bench, provider, step, reason, words):
    client = bench.client(provider)
    bench.server.script(client.spec.model, [step])
    assert list(ask_many([(client, [ask()] * 30)], concurrency=8)) == []
    bench.said.append(client.stopped)
    assert len(bench.server.calls) == 1, "eight threads, and one call"
    assert client.stopped.reason == reason and (words in str(client.stopped) or provider == "openai")


def test_18_an_echo_of_the_key_is_blotted_out(bench):
    for text in (f"key {SENTINEL} is bad", "x" * 290 + SENTINEL):
        assert "[key]" in str(bench.stop([error(403, "PERMISSION_DENIED", text)])[0])
    told = json.loads(GOOD) | {"semantic_evidence": f"I see {SENTINEL}"}
    escaped = json.dumps(told).replace("sentinel", "\\u0073entinel")
    status = {"modelStage": "LEGACY", SENTINEL: 1, "retirementTime": SENTINEL}
    for text in (json.dumps(told), escaped):
        answer, _ = bench.ask([says(text, extra={"responseId": SENTINEL, "modelStatus": status})])
        assert answer.data["semantic_evidence"] == "I see [key]" and answer.response_id == "[key]"
        assert bench.notices[-1] == "gemini-2.5-pro is legacy, until [key]"
    assert bench.ask([says(f"I refuse {SENTINEL}")])[0].text == "I refuse [key]"
    assert "[key]" in bench.ask([says(GOOD, version=SENTINEL)])[0].message
    assert "another place" in str(bench.stop([redirect(302, f"https://{SENTINEL}/")])[0])


def test_19_one_unreadable_picture(bench):
    client = bench.client()
    steps = [verdict(True, True), error(400, "INVALID_ARGUMENT", "Unable to process input image."), verdict(True, True)]
    bench.server.script("gemini-2.5-pro", steps)
    found = [answer.status for *_, answer in ask_many([(client, [ask()] * 4)], concurrency=1)]
    assert found == ["ok", "bad_input", "ok", "ok"]


@both
@pytest.mark.parametrize("step", [
    error(400, message="At most 1 image(s) may be provided in one request."),
    error(500, message="image input is not supported - hint: you may need the mmproj"),
    error(400, "INVALID_ARGUMENT", "Image input modality is not enabled for models/gemma-3-1b-it"),
    error(404, message="No endpoints found that support image input"),
    error(400, message="Invalid content type. image_url is only supported by certain models."),
    error(422, message="messages[1]: unknown variant `image_url`, expected `text`")])
def test_19_a_model_that_cannot_see(bench, step, provider):
    client = bench.client(provider)
    bench.server.script(client.spec.model, [step])
    assert list(ask_many([(client, [ask()] * 10)], concurrency=4)) == [] and len(bench.server.calls) == 1
    assert client.stopped.reason == "model" and "two pictures" in str(client.stopped)


def test_19_a_model_with_image_in_its_name_is_unknown(bench):
    message = "models/gemini-3.1-image is not found for API version v1beta, or is not supported for generateContent."
    stop, _ = bench.stop([error(404, "NOT_FOUND", message)], model="gemini-3.1-image")
    assert stop.reason == "model" and "unknown there" in str(stop) and "two pictures" not in str(stop)


def test_19_what_is_refused_before_it_is_sent(bench, monkeypatch):
    assert client_file.INLINE_CAP == 18 * 2**20
    monkeypatch.setattr(client_file, "INLINE_CAP", 2**20)
    noise = Image.frombytes("RGB", (700, 700), os.urandom(700 * 700 * 3))
    answer, calls = bench.ask([verdict(True, True)], request=ask(noise))
    assert (answer.status, calls) == ("bad_input", 0) and "2 MiB, more than the 1 that" in answer.message
    answer, calls = bench.ask([verdict(True, True)], request=ask("\ud800"))
    assert (answer.status, calls) == ("bad_input", 0)


NESTED = json.loads("[" * 400 + "]" * 400)


@both
@pytest.mark.parametrize("body", [
    [{"error": {"code": 503, "message": "m"}}], "<html><title>502</title></html>", "", "plain", {"x": 1}, {"detail": "d"},
    {"detail": [{"msg": "d"}]}, {"object": "error", "message": "m"}, {"error": "text"}, [], "null",
    {"error": {"details": {"a": 1}, "message": ["x"], "code": None}}, b"\xff\xfe", NESTED, {"error": {"message": NESTED}},
    {"error": {"details": [{"violations": NESTED, "retryDelay": NESTED, "reason": NESTED}, 5, {"violations": 5}]}}])
def test_20_error_bodies_of_any_shape(bench, provider, body):
    answer, calls = bench.ask([sends(body, 503), verdict(True, True)], provider)
    assert answer.ok and calls == 2
    assert bench.ask([sends(body, 429), verdict(True, True)], provider)[0].ok
    stop, calls = bench.stop([sends(body, 403)], provider)
    assert (stop.reason, calls) == ("credential", 1) and "403" in str(stop) and len(str(stop)) < 500


def test_20_an_answer_that_is_odd_all_over(bench):
    odd = {"modelStatus": {"modelStage": NESTED, "message": "x" * 9999}, "responseId": NESTED, "promptFeedback": NESTED}
    answer, _ = bench.ask([says(GOOD, extra=odd)])
    assert answer.ok and answer.response_id is None and len(answer.model_status["message"]) < 400
    assert len(bench.ask([says(GOOD, finish="x" * 99999)])[0].message) < 300


def test_20_an_error_within_a_200(bench):
    answer, calls = bench.ask([sends({"error": {"code": 503, "message": "upstream"}}), verdict(True, True)], "openai")
    assert answer.ok and calls == 2
    assert bench.stop([sends({"error": {"code": 401, "message": "no"}})], "openai")[0].reason == "credential"
