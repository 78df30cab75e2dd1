"""Questions with pictures to a vision model over plain REST: Gemini's generateContent, and the OpenAI-compatible form.

    spec = Spec.from_json({"provider": "gemini", "model": "gemini-2.5-pro"})     # one judge of a panel
    client = Client(spec, budget=Budget(max_cost=5))                             # finds the key; one client per model
    answer = client.ask(Request(system, ["IMAGE 1:", image, "..."], schema))     # an Answer, or raises Stop
    for which, index, answer in ask_many([(client, requests)], concurrency=16):  # in order of arrival

An Answer has a `status` of STATUSES. Only "ok" carries `data`, the object of the schema, so a call that failed can never
be read as a verdict. Stop ends a model's run (REASONS): the key is refused, the day's quota is spent, another model answers.

The same request is repeated where the service fails for a moment, and where an answer is unusable (REASKS). If an answer
was cut off, the next call allows twice as many tokens. All calls are listed in `attempts`. The key goes into one header, to one
host, and redirects are not followed.

`sifm_min.gemini` is another name of this file.
"""

import json
import math
import random
import re
import threading
import time
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait

from ..files.json_text import loads
from . import wires
from .budget import Budget, cost, total
from .keys import Key
from .outcomes import Outcome, understand
from .payload import encoded, picture_tokens
from .question import REASONS, STATUSES, Answer, Request, Stop
from .reading import TEXT_CAP, read_verdict
from .spec import Spec
from .transport import Transport

__all__ = ["REASONS", "STATUSES", "Answer", "Budget", "Client", "Key", "Request", "Spec", "Stop", "ask_many"]

BACKOFF, BACKOFF_CAP = 1.0, 60.0                             # seconds: full jitter below 1, 2, 4, ... 60
FIRST_PATIENCE = 120                                         # seconds that a quota is waited for before the first answer
BREAKER = 10                                                 # failures in a row, per call in flight, that end the run
INLINE_CAP = 18 * 2**20                                      # bytes; the limit is 20 MB, or 100 MB since January 2026
REASKS = {"invalid_verdict": 1, "refused_text": 1, "truncated": 1, "empty": 2, "no_candidate": 2, "bad_encoding": 1}


class Client:
    """A client of one model. It may be used from several threads.

    notify(sentence): called with remarks, such as a wait for the quota. clock, sleep, jitter(low, high): time.monotonic, a
    sleep that ends with the run, and a uniform draw, unless given. Raises ValueError where there is no key, and where a
    limit on the cost needs a price that the spec lacks.
    """

    def __init__(self, spec, key=None, *, budget=None, notify=None, clock=time.monotonic, sleep=None, jitter=None):
        self.spec, self._key = spec, key or Key.find(spec)
        self._transport = Transport(spec, self._key)
        self.budget, self.stopped = budget or Budget(), None
        if self.budget.max_cost is not None and spec.price is None:
            raise ValueError(f"a limit on the cost needs the price of {spec.model}; add it to the panel, or limit the calls")
        self._ended = threading.Event()
        self._notify, self._clock, self._sleep = notify or (lambda text: None), clock, sleep or self._ended.wait
        self._jitter = jitter or random.Random().uniform
        self._lock, self._first = threading.Lock(), threading.Lock()
        self._proven, self._warned, self._remarked, self._in_flight, self._failures = False, False, False, 0, 0
        self._paused_until = self._next_slot = -math.inf

    def __repr__(self):
        return f"Client({self.spec.model} at {self.spec.host})"

    def fields(self, request):
        """All settings that shape an answer beside texts, pictures and schema, JSON-ready, for a cache's key."""
        return {"provider": self.spec.provider, "host": self.spec.base_url, "model": self.spec.model,
                "structured": self.spec.structured, **wires.request_settings(self.spec, request, self.spec.max_output_tokens)}

    def estimate(self, request, room=None):
        """Upper bounds of one call: (prompt tokens, USD or None if the price is not known). Nothing is sent."""
        tokens = len(request.system.encode("utf-8", "replace")) + len(json.dumps(request.schema))
        for part in request.parts:
            tokens += 16 + (len(part.encode("utf-8", "replace")) if isinstance(part, str) else picture_tokens(part))
        if self.spec.price is None:
            return tokens, None
        room = room or self.spec.max_output_tokens
        return tokens, (tokens * self.spec.price["input"] + room * self.spec.price["output"]) / 1e6

    def count_tokens(self, request):
        """The prompt tokens as Gemini counts them, None where the service has no such call; raises Stop."""
        if self.spec.provider != "gemini":
            return None
        whole = wires.body(self.spec, request, encoded(request.parts), self.spec.max_output_tokens)
        body = {"generateContentRequest": {"model": f"models/{self.spec.model}", **whole}}
        response = self._post(self.spec.url.replace(":generateContent", ":countTokens"), json.dumps(body).encode())
        outcome = self._understood(response)
        if outcome.kind != "reply":
            raise Stop(outcome.reason or "unreachable", outcome.message)
        try:
            count = loads(response[2].decode("utf-8-sig"))["totalTokens"]
        except (ValueError, KeyError, TypeError):
            return None
        return count if type(count) is int and count >= 0 else None

    def ask(self, request):
        """The Answer to a request, after retries; raises Stop where the run with this model is over.

        The first call goes alone, so that a wrong key or model is refused once and not once per thread.
        """
        if not self._proven:
            with self._first:
                if not self._proven:
                    return self._ask(request)
        return self._ask(request)

    def _ask(self, request):
        with self._lock:
            self._in_flight += 1
        try:
            return self._attempts(request)
        finally:
            with self._lock:
                self._in_flight -= 1

    def _attempts(self, request):
        """Call until there is an answer that no further call improves, or the tries are used up."""
        room, seen, failures, attempts = self.spec.max_output_tokens, Counter(), 0, []
        answer = outcome = None
        parts = encoded(request.parts)
        while True:
            try:
                body = json.dumps(wires.body(self.spec, request, parts, room), ensure_ascii=False).encode()
            except UnicodeEncodeError:
                return self._answer(request, attempts, status="bad_input", message="a text is no valid Unicode")
            if len(body) > INLINE_CAP:
                return self._answer(request, attempts, status="bad_input", message=f"the request has {len(body) / 2**20:.0f} "
                                    f"MiB, more than the {INLINE_CAP >> 20} that are taken; scale the pictures down")
            try:
                outcome, reply = self._call(request, body, room, attempts)
            except Stop:
                if answer is None or outcome.limited:
                    raise
                return answer                                # the calls so far were paid for
            if outcome.kind == "stop":
                raise self._halt(outcome.reason, outcome.message)
            if outcome.kind == "reply":
                answer = self._answer(request, attempts, **reply)
                seen[answer.status] += 1
                again = answer.block_reason == "OTHER" if answer.block_reason else REASKS.get(answer.status, 0)
                if answer.status == "model_mismatch":
                    self._halt("model_mismatch", answer.message)
                if answer.status in ("ok", "model_mismatch") or seen[answer.status] > again:
                    return answer
                room *= 2 if answer.status == "truncated" else 1
                continue
            answer = self._answer(request, attempts, status=outcome.status, message=outcome.message)
            failures += 1
            last = outcome.kind == "final" or failures >= outcome.tries
            if outcome.kind == "again" or not self._proven:  # a model that never answered may not take pictures at all
                self._failed(outcome, last)
            if last or self.stopped:
                return answer
            self._back_off(outcome, failures)

    def _call(self, request, body, room, attempts):
        """Make one call within pause and budget, and add it to `attempts`. Returns (Outcome, fields of a reply or None)."""
        self._wait_for_turn()
        try:
            number = self.budget.take(self.estimate(request, room)[1], model=self.spec.model, question=request.name)
        except Stop as stop:
            raise self._halt(*stop.args) from None
        started, reply, tokens, spent, status = time.monotonic(), None, {}, None, "failed"
        try:
            outcome = self._understood(self._post(self.spec.url, body))
            if outcome.kind == "reply":
                reply = self._read(outcome.answer, request)
                tokens = reply["tokens"]
                spent = cost(tokens, self.spec.price)
            elif not outcome.billed:
                spent = 0.0
            status = reply["status"] if reply else outcome.status
        finally:
            self.budget.settle(number, spent, status)
        attempts.append({"call": number, "status": status, "http_status": outcome.http, "tokens": tokens, "cost": spent,
                         "seconds": round(time.monotonic() - started, 3), "answered": reply is not None})
        return outcome, reply

    def _read(self, answer, request):
        """The fields of an Answer from the JSON of a reply: its model, status and data, without the key."""
        reply = {"status": "bad_encoding", "text": "", "tokens": {}, "message": ""} if answer is None \
            else wires.reply(self.spec, answer)
        with self._lock:
            self._proven, self._failures = True, 0
        model, version, status = self.spec.model, reply.get("model_version"), reply["status"]
        if version is None and status is None and self.spec.provider == "gemini":
            version = "a model without a name"
        if version is not None and not self.spec.answers_as(version):
            reply |= {"status": "model_mismatch", "text": "", "message": f"{model} was asked, and {version} answered: its "
                      "verdicts would be another panel's; if it is right, list it as model_version in the panel"}
        elif status is None and request.schema:
            fields = read_verdict(reply["text"], request.schema)
            reply |= zip(("status", "data", "parse_mode", "extra_keys"), fields, strict=True)
        elif status is None:
            reply["status"] = "ok"
        if reply["status"] not in ("ok", "model_mismatch"):
            why, remark = reply.get("block_reason") or reply.get("finish_reason"), reply["message"]
            reply["message"] = (f"{model}: {reply['status'].replace('_', ' ')}{f' ({why})' if why else ''}"
                                f"{f': {remark}' if remark else ''}")
            if remark and not self._remarked:
                self._remarked = True
                self._notify(self._clean(reply["message"]))
        stage = reply.get("model_status") or {}
        if stage.get("modelStage") in ("LEGACY", "DEPRECATED", "RETIRED") and not self._warned:
            self._warned = True
            until = stage.get("retirementTime") or "an unknown day"
            self._notify(self._clean(f"{model} is {stage['modelStage'].lower()}, until {until}"))
        reply["text"] = reply["text"][:TEXT_CAP]
        return {name: value if name in ("status", "tokens") else self._clean(value) for name, value in reply.items()}

    def _answer(self, request, attempts, **fields):
        """The Answer with these fields, and the sums over all attempts."""
        answered = [a for a in attempts if a["answered"]]
        names = ("prompt", "cached", "output", "thoughts", "total")
        tokens = {n: total(a["tokens"].get(n) for a in answered) for n in names}
        return Answer(**{"model_requested": self.spec.model, "fields": self.fields(request), **fields, "tokens": tokens,
                         "cost": total(a["cost"] for a in answered), "unknown": sum(a["cost"] is None for a in attempts),
                         "http_status": attempts[-1]["http_status"] if attempts else None,
                         "latency_s": round(sum(a["seconds"] for a in attempts), 3), "attempts": tuple(attempts)})

    # ---- waiting and stopping

    def _wait_for_turn(self):
        """Wait until the pause is over and the next slot of `rpm` comes; raises Stop where the run has ended."""
        while not self.stopped:
            with self._lock:
                now = self._clock()
                left = max(self._paused_until, self._next_slot) - now
                if left <= 0:
                    self._next_slot = now + 60 / self.spec.rpm if self.spec.rpm else now
                    return
            self._sleep(left)
        raise Stop(*self.stopped.args)

    def _back_off(self, outcome, failures):
        backoff = self._jitter(0, min(BACKOFF_CAP, BACKOFF * 2 ** (failures - 1)))
        seconds = max(backoff, outcome.wait) + (self._jitter(0, BACKOFF) if outcome.wait else 0.0)
        why = "for its quota" if outcome.limited else f"because {outcome.message}"
        self._notify(f"{self.spec.model}: waiting {seconds:.0f} s {why}")
        if not outcome.limited:
            self._sleep(seconds)
            return
        with self._lock:
            self._paused_until = max(self._paused_until, self._clock() + seconds)

    def _failed(self, outcome, last):
        """Count a failure that may pass; stop after too many of them."""
        with self._lock:
            self._failures += 1
            many = self._failures >= BREAKER * self._in_flight
        if outcome.limited and not self._proven and (last or outcome.wait > FIRST_PATIENCE):
            raise self._halt("quota", f"{outcome.message}; it never answered, so its quota may be 0 or the model withdrawn")
        if outcome.reason == "refused" and self.spec.local and not self._proven:
            raise self._halt("unreachable", f"nothing answers at {self.spec.base_url}: start the server there (ollama serve, "
                             "vllm serve, llama-server), or set base_url in the panel")
        if many:
            self._halt("breaker", f"{self.spec.model} failed {self._failures} times in a row, at last: {outcome.message}; "
                       "run the same command again later")

    def _halt(self, reason, text):
        """Stop this client; the first reason counts. Returns the Stop to be raised."""
        with self._lock:
            self.stopped = self.stopped or Stop(reason, text)
        self._ended.set()
        return Stop(reason, text)

    # ---- the wire

    def _post(self, url, body):
        return self._transport.post(url, body, lambda: self.stopped and self.stopped.reason == "interrupted")

    def _understood(self, response):
        """The Outcome of a response. An echo of the key is removed first, before a text is cut in the middle of it."""
        if isinstance(response, Outcome):
            return response
        status, headers, raw = response
        if self._key:
            raw = self._key.redact(raw.decode("latin-1")).encode("latin-1")
            headers = type(headers)({name: self._key.redact(value) for name, value in headers.items()})
        outcome = understand(self.spec, status, headers, raw)
        outcome.message = self._clean(outcome.message)       # again: JSON's escapes are now resolved
        return outcome

    def _clean(self, value):
        """The value without the key and as valid UTF-8 without NUL, at any depth, so that it can be written down."""
        if isinstance(value, str):
            value = self._key.redact(value) if self._key else value
            return re.sub("[\0\ud800-\udfff]", "\ufffd", value)
        if isinstance(value, dict):
            return {self._clean(name): self._clean(item) for name, item in value.items()}
        return type(value)(map(self._clean, value)) if isinstance(value, list | tuple) else value


def ask_many(work, *, concurrency=4):
    """Yield (which, index, Answer) of many requests as they come. work: a list of (client, iterable of Requests).

    `concurrency` calls are in flight per client. Requests are drawn in the caller's thread, a client's next one only after
    the caller has taken an answer. A caller that writes each answer down first loses none but those in flight. A client
    that stops ends alone; its further requests are neither made nor yielded. `client.stopped` says why.
    """
    if concurrency < 1:
        raise ValueError(f"concurrency {concurrency}: at least one call must be in flight")
    upcoming, running = [enumerate(requests) for _, requests in work], {}
    with ThreadPoolExecutor(max(1, concurrency * len(work))) as pool:
        def start(which):
            client = work[which][0]
            if not client.stopped and (item := next(upcoming[which], None)):
                running[pool.submit(client.ask, item[1])] = which, item[0]
        try:
            for _ in range(concurrency):
                for which in range(len(work)):
                    start(which)
            while running:
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    which, index = running.pop(future)
                    try:
                        answer = future.result()
                    except Stop:
                        answer = None
                    if answer:
                        yield which, index, answer
                    start(which)
        finally:
            if running:                                      # left early, by break or Ctrl-C: end the calls in flight
                for client, _ in work:
                    client._halt("interrupted", "the run was left")
