"""A bench for the client of vision services: a server, clients with a sentinel key, and all that they said."""

import json
import threading
import traceback

import pytest
from PIL import Image

from sifm_min.gemini import REASONS, Answer, Client, Key, Request, Spec, Stop

SENTINEL = "AQ.sentinel~Key+/0123456789"
FINDINGS = ("semantic_mismatch", "perceptual_degradation")
SCHEMA = {"type": "object", "properties": {
    "semantic_evidence": {"type": "string"}, "semantic_mismatch": {"type": "boolean"},
    "degradation_evidence": {"type": "string"}, "perceptual_degradation": {"type": "boolean"}}}
SCHEMA["required"] = list(SCHEMA["properties"])
PRICE = {"input": 1.25, "cached": 0.31, "output": 10.0, "date": "2026-11-21"}
MODELS = {"gemini": "gemini-2.5-pro", "openai": "qwen3-vl:8b"}
GOOD = json.dumps({"semantic_evidence": "a", "semantic_mismatch": True, "degradation_evidence": "b",
                   "perceptual_degradation": False})
both = pytest.mark.parametrize("provider", MODELS)


class Time:
    """A clock that only sleeping moves."""

    def __init__(self):
        self.now, self.slept, self.lock = 1000.0, [], threading.Lock()

    def clock(self):
        return self.now

    def sleep(self, seconds):
        with self.lock:
            self.now += seconds
            self.slept.append(seconds)


class Bench:
    """A server, clients that have the sentinel key, and everything that they said."""

    def __init__(self, server):
        self.server, self.time, self.said, self.notices = server, Time(), [], []

    def client(self, provider="gemini", *, budget=None, **settings):
        given = {"provider": provider, "model": MODELS[provider], "base_url": self.server.base_url(provider), "price": PRICE}
        client = Client(Spec.from_json({**given, **settings}), Key(SENTINEL, "JUDGE_KEY"), budget=budget,
                        notify=self.notices.append, clock=self.time.clock, sleep=self.time.sleep,
                        jitter=lambda low, high: high)
        self.said.append(client)
        return client

    def ask(self, steps, provider="gemini", request=None, **settings):
        """(Answer, calls made) of one request, the service following `steps`."""
        client = self.client(provider, **settings)
        self.server.script(client.spec.model, steps)
        before = len(self.server.calls)
        answer = client.ask(request or ask())
        self.said += [answer, client.stopped]
        return answer, len(self.server.calls) - before

    def stop(self, steps, provider="gemini", **settings):
        """(Stop, calls made) of one request."""
        before = len(self.server.calls)
        with pytest.raises(Stop) as caught:
            self.ask(steps, provider, **settings)
        self.said.append(caught.value)
        assert caught.value.reason in REASONS and "\n" not in str(caught.value)
        return caught.value, len(self.server.calls) - before


def texts(said):
    """All that can be got out of what a client hands out."""
    for thing in said:
        yield from (repr(thing), str(thing))
        if isinstance(thing, Answer):
            record = json.dumps(thing.record(), ensure_ascii=False)
            record.encode("utf-8")
            yield record
        inner = thing if isinstance(thing, BaseException) else None
        while inner:
            yield "".join(traceback.format_exception(inner))
            yield from map(repr, inner.args)
            inner = inner.__context__


def picture(shade=0, size=(8, 8)):
    return Image.new("RGB", size, (shade, 10, 200))


def ask(*parts, seed=7):
    parts = parts or ("IMAGE 1: the original.", picture(1), "IMAGE 2: the edited image.", picture(2), "Answer.")
    return Request("rules", list(parts), SCHEMA, seed)


def whole(text, **rest):
    candidate = {"content": {"parts": [{"text": text}]}, "finishReason": "STOP"}
    return json.dumps({"candidates": [candidate], "modelVersion": "gemini-2.5-pro", **rest}, ensure_ascii=False)
