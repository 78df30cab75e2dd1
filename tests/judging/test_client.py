"""The client: answers, refusals and empty replies of a service (scenarios 1 to 12)."""

import json
import re

import pytest
from client_bench import FINDINGS, GOOD, MODELS, SCHEMA, ask, both, picture
from fake_gemini import blocked, says, sends, verdict

# ----------------------------------------------------------------------------------------- scenarios 1 to 5: an answer

@both
def test_01_a_verdict(bench, provider):
    exif = picture(1)
    exif.info["icc_profile"], exif.info["exif"] = b"profile", b"Exif\0\0place"
    request = ask("IMAGE 1:", exif, "IMAGE 2:", picture(2).convert("RGBA"), "?")
    answer, calls = bench.ask([verdict(True, False)], provider, request)
    assert (answer.status, calls, answer.parse_mode, answer.extra_keys) == ("ok", 1, "whole", ())
    assert [answer.data[name] for name in FINDINGS] == [True, False]
    assert answer.tokens == {"prompt": 2710, "cached": 0, "output": 96, "thoughts": 611, "total": 3417}
    assert answer.cost == pytest.approx((2710 * 1.25 + (96 + 611) * 10) / 1e6)
    assert (answer.unknown, answer.http_status, answer.model_version) == (0, 200, MODELS[provider])
    (call,) = bench.server.calls
    assert [part if isinstance(part, str) else "png" for part in call.parts] == ["IMAGE 1:", "png", "IMAGE 2:", "png", "?"]
    assert [image.getpixel((0, 0)) for image in call.pictures] == [(1, 10, 200), (2, 10, 200)]
    for png in [part for part in call.parts if isinstance(part, bytes)]:
        assert re.findall(rb"IHDR|IDAT|IEND|eXIf|iCCP|tEXt|iTXt|pHYs", png) == [b"IHDR", b"IDAT", b"IEND"]


def test_01_the_request_of_a_family_on_the_wire(bench):
    bench.ask([verdict(False, False)])
    body = bench.server.calls[0].body
    assert bench.server.calls[0].path == "/v1beta/models/gemini-2.5-pro:generateContent"
    assert body["systemInstruction"] == {"parts": [{"text": "rules"}]} and body["contents"][0]["role"] == "user"
    assert body["generationConfig"] == {
        "maxOutputTokens": 8192, "temperature": 0, "seed": 7, "thinkingConfig": {"thinkingBudget": -1},
        "responseMimeType": "application/json", "responseJsonSchema": SCHEMA}
    assert {(s["category"], s["threshold"]) for s in body["safetySettings"]} == {
        (f"HARM_CATEGORY_{harm}", "BLOCK_NONE")
        for harm in ("HARASSMENT", "HATE_SPEECH", "SEXUALLY_EXPLICIT", "DANGEROUS_CONTENT")}
    bench.ask([verdict(False, False)], model="gemini-3.8-flash", generation={"thinkingLevel": "LOW"})
    assert bench.server.calls[1].body["generationConfig"] == {
        "maxOutputTokens": 8192, "seed": 7, "thinkingConfig": {"thinkingLevel": "LOW"},
        "responseMimeType": "application/json", "responseJsonSchema": SCHEMA}
    bench.ask([verdict(False, False)], model="gemini-9-xenon")              # an unknown family: the fewest fields
    assert bench.server.calls[2].body["generationConfig"] == {"maxOutputTokens": 8192, "responseMimeType": "application/json"}


def test_01_the_request_of_the_openai_form_on_the_wire(bench):
    bench.ask([verdict(False, False)], "openai")
    body = bench.server.calls[0].body
    content = body.pop("messages")[1]["content"]
    assert [part["type"] for part in content] == ["text", "image_url", "text", "image_url", "text"]
    assert content[1]["image_url"]["url"].startswith("data:image/png;base64,")
    assert body == {"model": "qwen3-vl:8b", "temperature": 0, "seed": 7, "max_tokens": 2048, "stream": False,
                    "response_format": {"type": "json_schema",
                                        "json_schema": {"name": "verdict", "strict": True, "schema": SCHEMA}}}
    bench.ask([verdict(False, False)], "openai", system_in_user=True, structured="none",
              max_tokens_field="max_completion_tokens")
    body = bench.server.calls[1].body
    assert [message["role"] for message in body["messages"]] == ["user"] and bench.server.calls[1].parts[0] == "rules"
    assert "response_format" not in body and body["max_completion_tokens"] == 2048 and "max_tokens" not in body


def test_02_a_thought_is_no_answer(bench):
    other = json.dumps({**json.loads(GOOD), "semantic_mismatch": False})
    answer, calls = bench.ask([says(GOOD, thought=other)])
    assert (answer.ok, calls, answer.data["semantic_mismatch"], answer.text) == (True, 1, True, GOOD)


@pytest.mark.parametrize("text", [f"```json\n{GOOD}\n```", f"Here it is: {GOOD} I hope {{it}} helps.", f"{GOOD}\n\n{GOOD}"])
def test_03_an_object_in_a_fence_or_in_prose(bench, text):
    answer, calls = bench.ask([says(text)])
    assert (answer.status, calls, answer.parse_mode, answer.data) == ("ok", 1, "extracted", json.loads(GOOD))


@both
@pytest.mark.parametrize("text", [GOOD[:-9], GOOD.replace(":", ""), "{" + GOOD, f'{{"quoted": "{GOOD[:-20]}'])
def test_04_malformed_json(bench, provider, text):
    answer, calls = bench.ask([says(text)], provider)
    assert (answer.status, calls) == ("invalid_verdict", 2)
    assert bench.server.calls[0].raw == bench.server.calls[1].raw, "the second question must be the first"
    answer, calls = bench.ask([says(text), says(GOOD)], provider)
    assert (answer.status, calls) == ("ok", 2)
    assert [attempt["status"] for attempt in answer.attempts] == ["invalid_verdict", "ok"]
    assert answer.tokens["total"] == 2 * 3417 and answer.cost == pytest.approx(2 * 0.0104575)


@pytest.mark.parametrize("text", [
    GOOD.replace("true", '"true"'), GOOD.replace("true", "1"), GOOD.replace("true", "null"), GOOD.replace('"a"', "5"),
    '{"semantic_mismatch": true, "perceptual_degradation": true}', GOOD[:-1] + ', "semantic_mismatch": true}',
    GOOD + GOOD.replace("true", "false"), f"[{GOOD}]", f"The list: [{GOOD}]", "[1]", "true", '"{}"', GOOD.replace('"a"', "NaN"),
    f'{{"verdict": {GOOD}}}', "[" * 200_000 + "{", '{"a":' * 200_000])
def test_05_nothing_is_coerced(bench, text):
    answer, calls = bench.ask([says(text)])
    assert (answer.status, calls, answer.data) == ("invalid_verdict", 2, None)


def test_05_more_than_asked_is_flagged(bench):
    answer, _ = bench.ask([says(GOOD[:-1] + ', "score": 3}')])
    assert answer.ok and answer.extra_keys == ("score",) and "score" not in answer.data


# --------------------------------------------------------------------------------------- scenarios 6 to 12: no answer

@both
def test_06_cut_off_is_not_blocked(bench, provider):
    cap = 8192 if provider == "gemini" else 2048
    usage = {"promptTokenCount": 2700, "thoughtsTokenCount": cap - 1, "totalTokenCount": 2699 + cap}
    cut = says(None, finish="MAX_TOKENS", usage=usage)
    answer, calls = bench.ask([cut], provider)
    assert (answer.status, calls) == ("truncated", 2)
    rooms = [call.body.get("max_tokens") or call.body["generationConfig"]["maxOutputTokens"] for call in bench.server.calls]
    assert rooms == [cap, 2 * cap]
    if provider == "gemini":
        assert [answer.tokens[name] for name in ("prompt", "output", "thoughts")] == [5400, 0, 2 * (cap - 1)]
    answer, _ = bench.ask([cut, verdict(True, True)], provider)
    assert answer.ok
    answer, _ = bench.ask([says(GOOD, finish="MAX_TOKENS")], provider)
    assert answer.status == "truncated", "what was cut off is not read, whole as it looks"


@pytest.mark.parametrize("text", [None, "", " \n"])
def test_07_empty(bench, text):
    assert bench.ask([says(text)])[0].status == "empty"
    assert len(bench.server.calls) == 3
    assert bench.ask([says(text), says(text), verdict(True, True)])[0].ok


@pytest.mark.parametrize("reason, calls", [("SAFETY", 1), ("PROHIBITED_CONTENT", 1), ("BLOCKLIST", 1), ("IMAGE_SAFETY", 1),
                                           ("SOMETHING_NEW", 1), ("OTHER", 2)])
def test_08_a_blocked_prompt(bench, reason, calls):
    answer, made = bench.ask([blocked(reason)])
    assert (answer.status, answer.block_reason, made) == ("blocked_prompt", reason, calls)
    assert answer.cost == pytest.approx(calls * 2700 * 1.25e-6)


@both
@pytest.mark.parametrize("text", [None, GOOD])
@pytest.mark.parametrize("reason", ["SAFETY", "RECITATION", "SPII", "BLOCKLIST", "PROHIBITED_CONTENT", "IMAGE_SAFETY"])
def test_09_a_blocked_answer_is_not_read(bench, provider, reason, text):
    answer, calls = bench.ask([says(text, finish=reason)], provider)
    assert (answer.status, calls, answer.data) == ("blocked_output", 1, None)


@both
@pytest.mark.parametrize("body", [{"candidates": [], "choices": []}, {}, {"candidates": [None], "choices": "x"}])
def test_10_no_candidate(bench, provider, body):
    answer, calls = bench.ask([sends(body)], provider)
    assert (answer.status, calls, answer.cost, answer.unknown) == ("no_candidate", 3, None, 3)
    assert bench.ask([sends(body), verdict(True, True)], provider)[0].ok


@both
@pytest.mark.parametrize("reason", ["TOO_MANY_TOOL_CALLS", "OTHER", "FINISH_REASON_UNSPECIFIED", "SOMETHING_NEW", None, 5])
def test_11_an_unknown_end_is_no_answer(bench, provider, reason):
    answer, calls = bench.ask([says(GOOD, finish=reason)], provider)
    assert (answer.status, calls, answer.data) == ("abnormal_finish", 1, None)


@both
def test_12_a_polite_refusal(bench, provider):
    answer, calls = bench.ask([says("I am sorry, but I cannot help with this picture.")], provider)
    assert (answer.status, calls) == ("refused_text", 2)
    assert answer.text.startswith("I am sorry")
