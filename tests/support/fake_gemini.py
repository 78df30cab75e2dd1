"""A vision service of our own on the loopback interface: generateContent and chat/completions, and faults on request.

    with FakeGemini() as server:
        server.script("gemini-2.5-pro", [quota("2s"), verdict(True, False)])     # call by call; the last one repeats
        spec = Spec.from_json({"provider": "gemini", "model": "gemini-2.5-pro", "base_url": server.base_url("gemini")})

A step is a function of (handler, call); those below speak the wire that they are called on. Without a script every call
is answered by verdict(False, False). A script may also be a function of the call that returns a step.
`server.calls` lists what came in, `server.seen(model)` that of one model.
"""

import base64
import hashlib
import io
import json
import threading
import time
import zlib
from dataclasses import dataclass, field
from pathlib import Path

from local_server import Answers, LocalServer
from PIL import Image

from sifm_min.judging import canaries

USAGE = {"promptTokenCount": 2710, "candidatesTokenCount": 96, "thoughtsTokenCount": 611, "totalTokenCount": 3417}
CREDENTIALS = ("x-goog-api-key", "authorization", "cookie", "proxy-authorization", "x-api-key", "api-key")


@dataclass
class Call:
    """One request as it came in."""

    path: str
    headers: dict
    raw: bytes
    at: float
    body: dict = field(default_factory=dict)

    @property
    def openai(self):
        return self.path.endswith("/chat/completions")

    @property
    def model(self):
        return self.body.get("model", "") if self.openai else self.path.rpartition("/")[2].partition(":")[0]

    @property
    def parts(self):
        """The parts of the user's message in order: texts, and PNG bytes for pictures."""
        found = []
        if self.openai:
            for part in self.body["messages"][-1]["content"]:
                url = part.get("image_url", {}).get("url", "")
                found.append(base64.b64decode(url.partition(",")[2], validate=True) if url else part["text"])
            return found
        for part in self.body["contents"][0]["parts"]:
            data = part.get("inlineData", {}).get("data")
            found.append(base64.b64decode(data, validate=True) if data else part["text"])
        return found

    @property
    def pictures(self):
        return [Image.open(io.BytesIO(part)) for part in self.parts if isinstance(part, bytes)]

    @property
    def credentials(self):
        return sorted(name for name in self.headers if name.lower() in CREDENTIALS)

    def digest(self):
        """Of the pictures, by their pixels."""
        return hashlib.sha256(b"".join(picture.tobytes() for picture in self.pictures)).hexdigest()


# ----------------------------------------------------------------------------------------------- steps: whole answers

def verdict(mismatch, degradation, **rest):
    """An answer as the judge's schema wants it; `rest` as for `says`."""
    return says(json.dumps({"semantic_evidence": "seen", "semantic_mismatch": mismatch, "degradation_evidence": "none",
                            "perceptual_degradation": degradation}), **rest)


def says(text, *, finish="STOP", usage=USAGE, version=None, thought=None, refusal=None, thoughts=None, extra=None):
    """A 200 with this text; text None: a content without parts. finish None: no reason is given.

    thought: the text of a part marked as thought (Gemini); thoughts: fields of the message (the OpenAI form).
    """
    def step(handler, call):
        model = version or call.model
        if call.openai:
            message = {"role": "assistant", "content": text} | ({"refusal": refusal} if refusal else {}) | (thoughts or {})
            reasons = {"STOP": "stop", "MAX_TOKENS": "length", "SAFETY": "content_filter"}
            counts = {"prompt_tokens": 2710, "completion_tokens": 707, "total_tokens": 3417,
                      "completion_tokens_details": {"reasoning_tokens": 611}} if usage is USAGE else usage
            body = {"id": "x1", "object": "chat.completion", "model": model, "usage": counts, "choices": [
                {"index": 0, "message": message, **({"finish_reason": reasons.get(finish, finish)} if finish else {})}]}
        else:
            parts = [{"text": thought, "thought": True}] if thought else []
            content = {"role": "model"} if text is None else {"role": "model", "parts": [*parts, {"text": text}]}
            body = {"candidates": [{"content": content, "index": 0, **({"finishReason": finish} if finish else {})}],
                    "usageMetadata": usage, "modelVersion": model, "responseId": "x1"}
        handler.reply(200, json.dumps({name: value for name, value in {**body, **(extra or {})}.items() if value is not None}))
    return step


def blocked(reason, **rest):
    """A 200 without candidates: the prompt was blocked. The OpenAI form has a 400 for it."""
    def step(handler, call):
        if call.openai:
            return handler.reply(400, json.dumps({"error": {"message": f"blocked: {reason}", "code": "content_filter"}}))
        usage = {"promptTokenCount": 2700, "totalTokenCount": 2700}
        return handler.reply(200, json.dumps({"promptFeedback": {"blockReason": reason}, "usageMetadata": usage,
                                              "modelVersion": call.model, **rest}))
    return step


def sends(body, status=200, kind="application/json", **headers):
    """These bytes, this text, or this object as JSON."""
    def step(handler, call):
        content = body if isinstance(body, str | bytes) else json.dumps(body)
        handler.reply(status, content, Content_Type=kind, **headers)
    return step


def error(code, status="", message="no", details=(), **headers):
    """An error as each service tells it."""
    def step(handler, call):
        told = {"message": message, "type": status, "code": code} if call.openai else {
            "code": code, "status": status, "message": message, "details": list(details)}
        handler.reply(code, json.dumps({"error": told}), **headers)
    return step


def quota(delay=None, per="Minute", value="10", code=429, **headers):
    """A 429 with Google's details: whose quota, and how long to wait."""
    identity = f"GenerateRequestsPer{per}PerProjectPerModel-FreeTier"
    details = [{"@type": "type.googleapis.com/google.rpc.QuotaFailure", "violations": [
        {"quotaMetric": "generativelanguage.googleapis.com/generate_content_free_tier_requests", "quotaId": identity,
         "quotaDimensions": {"location": "global", "model": "gemini-2.5-flash"}, "quotaValue": value}]}]
    if delay:
        details.append({"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": delay})
    return error(code, "RESOURCE_EXHAUSTED", "quota", details, **headers)


BAD_KEY = error(400, "INVALID_ARGUMENT", "API key not valid. Please pass a valid API key.", [
    {"@type": "type.googleapis.com/google.rpc.ErrorInfo", "reason": "API_KEY_INVALID", "domain": "googleapis.com",
     "metadata": {"service": "generativelanguage.googleapis.com"}}])


def redirect(code, url):
    return sends("", code, Location=url)


def after(seconds, step):
    """The same, later."""
    def late(handler, call):
        handler.pause(seconds)
        step(handler, call)
    return late


# --------------------------------------------------------------------------------------------------- a panel of judges

def serve_panel(server, path, rest=None):
    """Write a panel of two of the server's models, which judge canaries as they should be judged and the rest by `rest`, a
    function of the call to a step (default: semantic mismatch). The key is in JUDGE_KEY."""
    known = {(one.prompt, one.original.tobytes(), one.edited.tobytes()): one for one in canaries.canaries()}
    models = ("gemini-2.5-pro", "gemini-2.5-flash")

    def knowing(call):
        asked = json.loads(next(p for p in reversed(call.parts) if isinstance(p, str)).split("\n")[0].partition(" = ")[2])
        one = known.get((asked, *(picture.convert("RGB").tobytes() for picture in call.pictures)))
        if one is None:
            return rest(call) if rest else verdict(True, False)
        return verdict(one.semantic_mismatch, one.perceptual_degradation)
    for model in models:
        server.script(model, knowing)
    Path(path).write_text(json.dumps({"id": "test", "date": "2026-11-21", "judges": [
        {"provider": "gemini", "model": model, "base_url": server.base_url(), "key_env": "JUDGE_KEY"} for model in models]}))


# ------------------------------------------------------------------------------------------------ steps: broken wires

def silence(handler, call):
    """Take the request and never answer."""
    handler.hang()


def drip(head="HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n", each=0.05):
    """`head`, then a byte at a time."""
    def step(handler, call):
        handler.close_connection = True
        handler.write(head.encode())
        while not handler.pause(each) and handler.write(b" "):
            pass
    return step


def reset(handler, call):
    """Break the connection off before anything is said."""
    handler.hang_up(reset=True)


def hang_up_after(step):
    """Answer whole, then close the connection without a word about it."""
    def answer(handler, call):
        step(handler, call)
        handler.close_connection = True
    return answer


def short_body(handler, call):
    """Fewer bytes than announced."""
    handler.close_connection = True
    handler.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 900\r\n\r\n{\"candidates\": [")


def cut_chunks(handler, call):
    """A chunked body that ends within a chunk."""
    handler.close_connection = True
    handler.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n20\r\n{\"candidates\": [")


def endless(handler, call):
    """A body without an end."""
    handler.close_connection = True
    handler.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n")
    while not handler.server.stopping.is_set() and handler.write(b" " * 65536):
        handler.server.poured += 65536


def announced(handler, call):
    """Ten gigabytes are announced."""
    handler.close_connection = True
    handler.write(b"HTTP/1.1 200 OK\r\nContent-Length: 10000000000\r\n\r\n{")


def bomb(megabytes):
    """Megabytes in as many kilobytes."""
    press = zlib.compressobj(9, wbits=31)
    packed = b"".join([*(press.compress(bytes(2**20)) for _ in range(megabytes)), press.flush()])
    return sends(packed, Content_Encoding="gzip")


# ----------------------------------------------------------------------------------------------------------- the server

class FakeGemini(LocalServer):
    def __init__(self):
        super().__init__(Handler)
        self.calls, self.poured, self._scripts, self.lock = [], 0, {}, threading.Lock()

    def base_url(self, provider="gemini"):
        return f"{self.url}/{'v1beta' if provider == 'gemini' else 'v1'}"

    def script(self, model, steps):
        self._scripts[model] = steps if callable(steps) else list(steps)

    def seen(self, model):
        return [call for call in self.calls if call.model == model]

    def step(self, call):
        """Note the call, and say what happens to it."""
        with self.lock:
            self.calls.append(call)
            steps = self._scripts.get(call.model, [verdict(False, False)])
            if callable(steps):
                return steps(call)
            return steps.pop(0) if len(steps) > 1 else steps[0]


class Handler(Answers):
    wbufsize = -1                                            # head and body leave in one piece
    disable_nagle_algorithm = True

    def do_POST(self):
        raw = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        call = Call(self.path, dict(self.headers), raw, time.monotonic(), json.loads(raw) if raw else {})
        if self.path.endswith(":countTokens"):
            self.server.calls.append(call)
            return self.reply(200, json.dumps({"totalTokens": 1234}))
        return self.server.step(call)(self, call)

    def do_GET(self):
        """Only someone who follows a redirect comes here."""
        self.server.calls.append(Call(self.path, dict(self.headers), b"", time.monotonic()))
        self.reply(200, "{}")

    def reply(self, status, body=b"", **headers):
        body = body.encode() if isinstance(body, str) else body
        return super().reply(status, body, **{"Content_Type": "application/json", **headers})
