"""Questions with pictures to a vision model over plain REST: Gemini's generateContent, and the OpenAI-compatible form.

    spec = Spec.from_json({"provider": "gemini", "model": "gemini-2.5-pro"})     # one judge of a panel
    client = Client(spec, budget=Budget(max_cost=5))                             # finds the key; one client per model
    answer = client.ask(Request(system, ["IMAGE 1:", image, "..."], schema))     # an Answer, or Stop is raised
    for which, index, answer in ask_many([(client, requests)], concurrency=16):  # as they come

An Answer has a `status` of STATUSES; only "ok" carries `data`, the object that the schema asked for, so that a call that
failed can never be read as a verdict. Stop ends a model's run (REASONS): the key is refused, the day's quota is spent,
another model answers. Both can be written down as they are: no picture, no key, valid UTF-8.

The same request is repeated where the service stumbles, and where an answer is unusable (REASKS); only one that was cut
off is repeated with twice the room. All calls are listed in `attempts`. The key goes into one header, to one host:
redirects are not followed. What is said and how it is read is in wire.py.
"""

import base64
import io
import json
import math
import os
import queue
import random
import re
import ssl
import stat
import threading
import time
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import replace
from datetime import datetime, timezone
from functools import lru_cache
from urllib.parse import quote

import requests
from PIL import Image

from . import wire
from .wire import REASONS, STATUSES, Answer, Outcome, Request, Spec, Stop

__all__ = ["REASONS", "STATUSES", "Answer", "Budget", "Client", "Key", "Request", "Spec", "Stop", "ask_many"]

BACKOFF, BACKOFF_CAP = 1.0, 60.0                             # seconds: full jitter below 1, 2, 4, ... 60
FIRST_PATIENCE = 120                                         # seconds that a quota is waited for before the first answer
BREAKER = 10                                                 # failures in a row, per call in flight, that end the run
CONNECT = 10                                                 # seconds to connect
BODY_CAP = 4 * 2**20                                         # bytes of an answer, which has about 3,000
REASKS = {"invalid_verdict": 1, "refused_text": 1, "truncated": 1, "empty": 2, "no_candidate": 2, "bad_encoding": 1}


# ------------------------------------------------------------------------------------------------------ key and budget

class Key:
    """A credential that does not show itself. It comes from the environment or a file of its owner, never from a flag."""

    __slots__ = ("_value", "source")

    def __init__(self, value, source):
        value = value.strip()
        if not value or not re.fullmatch(r"[!-~]+", value):
            raise ValueError(f"the key from {source} is empty, or has characters that no key has; copy it again")
        self._value, self.source = value, source

    @classmethod
    def find(cls, spec):
        """The key for a spec's host, or None for a local server that was given none; raises ValueError."""
        default = {wire.BASE["gemini"]: ["GEMINI_API_KEY", "GOOGLE_API_KEY"], wire.BASE["openai"]: ["OPENAI_API_KEY"]}
        names = [spec.key_env] if spec.key_env else default.get(spec.base_url, [])
        for name in names:
            if os.environ.get(name, "").strip():
                return cls(os.environ[name], name)
            if path := os.environ.get(f"{name}_FILE"):
                return cls(_private_text(path), path)
        if spec.local:
            return None
        if not names:
            raise ValueError(f"{spec.host}: name the environment variable with its key as key_env in the panel")
        raise ValueError(f"no key for {spec.host}: set {' or '.join(names)}, or {names[0]}_FILE to a file with mode 600")

    def redact(self, text):
        """The text without the key, by exact value, also where it was escaped for a URL.

        A word of less than eight letters, such as local servers are given, is no secret and stays.
        """
        if len(self._value) < 8:
            return text
        for shape in {self._value, quote(self._value, safe=""), quote(self._value)}:
            text = text.replace(shape, "[key]")
        return text

    def headers(self, spec):
        """The one header with the credential. Vertex takes OAuth tokens, as the OpenAI form does."""
        if spec.provider == "gemini" and not spec.host.endswith("aiplatform.googleapis.com"):
            return {"x-goog-api-key": self._value}
        return {"Authorization": f"Bearer {self._value}"}

    def __repr__(self):
        return f"Key(from {self.source})"

    def __reduce__(self):
        raise TypeError("a key is not written down")


def _private_text(path):
    try:
        with open(path, "rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            if not stat.S_ISREG(mode) or (os.name == "posix" and mode & 0o077):
                raise ValueError(f"{path}: others may read the key; run chmod 600 on it")
            return file.read(4096).decode("ascii")
    except OSError as error:
        problem = error.strerror
    except UnicodeDecodeError:                               # its text would show the key
        problem = "has characters that no key has"
    raise ValueError(f"{path}: {problem}")


class Budget:
    """The limits of a run on calls and cost, shared by its clients. A call is made only if its upper bound still fits.

    calls: made so far; cost: USD that the answers state; unknown: calls whose cost is not known; held: USD, the upper
    bounds of those calls, which count against max_cost.

    journal: a Ledger, or None. Each call is written there before it is sent ("intent") and after it has ended
    ("settled"), so that a call in flight when the process is killed still counts in the next run.
    """

    def __init__(self, max_cost=None, max_calls=None, journal=None):
        self.max_cost, self.max_calls, self.journal = max_cost, max_calls, journal
        self.calls, self.cost, self.unknown, self.held = 0, 0.0, 0, 0.0
        self._reserved, self._changed, self._last = {}, threading.Condition(), 0

    def resume(self, rows):
        """Count the calls in the rows of a journal. Returns (calls, USD) of those that never ended: they were in flight.

        A journal that was written before there were intents has the calls in the `attempts` of each answer.
        """
        in_flight = {}
        for row in rows:
            if row.get("kind") == "intent":
                in_flight[row["call"]] = row["bound_usd"] or 0.0
                self.calls += 1
                self._last = max(self._last, row["call"])
            elif row.get("kind") == "settled":
                self._count(row["cost_usd"], in_flight.pop(row["call"], 0.0))
            else:
                earlier = [attempt for attempt in row.get("attempts", ()) if "call" not in attempt]
                self.calls += len(earlier)
                for attempt in earlier:
                    self._count(attempt["cost"], row.get("bound_usd") or 0.0)
        for call, bound in in_flight.items():
            self._count(None, bound)
            self._write({"kind": "settled", "call": call, "status": "in_flight_at_the_end", "cost_usd": None})
        return len(in_flight), sum(in_flight.values())

    def take(self, bound, **about):
        """Reserve a call of at most `bound` USD and return its number; raises Stop where a limit is reached.

        Waits while calls in flight may turn out cheaper than their bounds. `about` is written with the intent.
        """
        with self._changed:
            while self.max_cost is not None and self.cost + self.held + sum(self._reserved.values()) + bound > self.max_cost:
                if not any(self._reserved.values()):
                    unknown = f", up to {self.held:.4f} in calls of unknown cost" if self.held else ""
                    raise Stop("budget", f"the next call could exceed the limit of {self.max_cost} USD "
                                         f"({self.cost:.4f} spent{unknown}); raise it to go on from here")
                self._changed.wait()
            if self.max_calls is not None and self.calls >= self.max_calls:
                raise Stop("budget", f"the limit of {self.max_calls} calls is reached; raise it to go on from here")
            self.calls += 1
            self._last += 1
            call = self._last
            self._reserved[call] = bound or 0.0
        try:
            self._write({"kind": "intent", "call": call, **about, "bound_usd": bound})
        except OSError:                                      # a full disk: the call is not made
            with self._changed:
                self.calls -= 1
                del self._reserved[call]
                self._changed.notify_all()
            raise
        return call

    def settle(self, call, cost, status):
        """End a call: release its reservation. cost: USD, or None where it is not known."""
        with self._changed:
            self._count(cost, self._reserved.pop(call))
            self._changed.notify_all()
        self._write({"kind": "settled", "call": call, "status": status, "cost_usd": cost})

    def _count(self, cost, bound):
        self.cost += cost or 0.0
        self.unknown += cost is None
        self.held += bound if cost is None else 0.0

    def _write(self, row):
        if self.journal is not None:
            self.journal.append({**row, "time_utc": datetime.now(timezone.utc).isoformat(timespec="seconds")})


class _TooLarge(Exception):
    pass


def _content(response, given_up):
    """The body, decoded, up to BODY_CAP; small steps, because a compressed kilobyte may unfold to a megabyte."""
    if response.headers.get("Content-Encoding", "identity").strip().lower() not in ("", "identity", "gzip", "deflate"):
        raise requests.exceptions.ContentDecodingError("an encoding that was not asked for")
    announced, body = response.headers.get("Content-Length", ""), bytearray()
    if announced.isdecimal() and (len(announced) > 12 or int(announced) > BODY_CAP):
        raise _TooLarge
    for chunk in response.iter_content(1024):
        body += chunk
        if len(body) > BODY_CAP or given_up.is_set():        # given up: nobody looks at what comes of it
            raise _TooLarge
    return bytes(body)


def _exchange(session, given_up, **call):
    """One POST without redirects and without our interpretation: (status, headers, body), or an Outcome."""
    lost = Outcome("again", billed=wire.FAILED_MAY_BE_BILLED)
    try:
        with session.post(allow_redirects=False, stream=True, **call) as response:
            return response.status_code, response.headers, _content(response, given_up)
    except _TooLarge:
        return Outcome("final", "too_large", f"the answer is larger than {BODY_CAP} bytes", billed=wire.FAILED_MAY_BE_BILLED)
    except requests.exceptions.SSLError as error:            # first: it is a ConnectionError, too
        if isinstance(_root(error), ssl.SSLEOFError | ssl.SSLZeroReturnError):
            return replace(lost, message="the connection broke off")
        return Outcome("stop", reason="tls", message=f"no trusted connection: {_cause(error)}")
    except requests.Timeout:
        return replace(lost, status="timeout", message="no answer in time", tries=wire.FEW)
    except (requests.ConnectionError, requests.exceptions.ChunkedEncodingError, requests.exceptions.InvalidHeader,
            requests.exceptions.ContentDecodingError) as error:
        cause = _cause(error)
        lost.status = "timeout" if "timed out" in cause else "http_error"
        lost.reason = "refused" if "refused" in cause else ""
        return replace(lost, message=f"the connection failed: {cause}")
    except OSError as error:                                 # a missing CA bundle, and what else requests refuses to send
        return Outcome("stop", reason="request", message=f"the request cannot be sent: {_cause(error)}")


def _root(error):
    while inner := error.__cause__ or error.__context__:
        error = inner
    return error


def _cause(error):
    """The innermost error, in its own words: the outer ones quote objects and addresses."""
    error = _root(error)
    return wire.short(getattr(error, "strerror", None) or str(error) or type(error).__name__)


# ------------------------------------------------------------------------------------------------------------- the client

class Client:
    """Asks one model. Safe to use from several threads; sessions are kept and used by one call at a time.

    notify(sentence) hears remarks, such as a wait for the quota. clock, sleep and jitter(low, high) stand for
    time.monotonic, a sleep that ends when the run does, and a uniform draw. Raises ValueError where there is no key, and
    where a limit on the cost cannot be held because the spec has no price.
    """

    def __init__(self, spec, key=None, *, budget=None, notify=None, clock=time.monotonic, sleep=None, jitter=None):
        self.spec, self._key = spec, key or Key.find(spec)
        self.budget, self.stopped = budget or Budget(), None
        if self.budget.max_cost is not None and spec.price is None:
            raise ValueError(f"a limit on the cost needs the price of {spec.model}; add it to the panel, or limit the calls")
        self._ended = threading.Event()
        self._notify, self._clock, self._sleep = notify or (lambda text: None), clock, sleep or self._ended.wait
        self._jitter = jitter or random.Random().uniform
        self._lock, self._first = threading.Lock(), threading.Lock()
        self._proven, self._warned, self._remarked, self._in_flight, self._failures = False, False, False, 0, 0
        self._paused_until = self._next_slot = -math.inf
        self._sessions = queue.LifoQueue()

    def __repr__(self):
        return f"Client({self.spec.model} at {self.spec.host})"

    def fields(self, request):
        """What shapes an answer beside texts, pictures and schema, JSON-ready: it belongs into a cache's key."""
        return {"provider": self.spec.provider, "host": self.spec.base_url, "model": self.spec.model,
                "structured": self.spec.structured, **wire.settings(self.spec, request, self.spec.max_output_tokens)}

    def estimate(self, request, room=None):
        """(prompt tokens, USD or None if the price is not known) of one call: upper bounds, nothing is sent."""
        tokens = len(request.system.encode("utf-8", "replace")) + len(json.dumps(request.schema))
        for part in request.parts:
            tokens += 16 + (len(part.encode("utf-8", "replace")) if isinstance(part, str) else _picture_tokens(part))
        if self.spec.price is None:
            return tokens, None
        room = room or self.spec.max_output_tokens
        return tokens, (tokens * self.spec.price["input"] + room * self.spec.price["output"]) / 1e6

    def count_tokens(self, request):
        """The prompt tokens as Gemini counts them, None where there is nobody to ask; raises Stop."""
        if self.spec.provider != "gemini":
            return None
        whole = wire.body(self.spec, request, _encoded(request.parts), self.spec.max_output_tokens)
        body = {"generateContentRequest": {"model": f"models/{self.spec.model}", **whole}}
        found = self._post(self.spec.url.replace(":generateContent", ":countTokens"), json.dumps(body).encode())
        outcome = self._understood(found)
        if outcome.kind != "reply":
            raise Stop(outcome.reason or "unreachable", outcome.message)
        try:
            count = wire.loads(found[2].decode("utf-8-sig"))["totalTokens"]
        except (ValueError, KeyError, TypeError):
            return None
        return count if type(count) is int and count >= 0 else None

    def ask(self, request):
        """The Answer to a request, after retries; raises Stop where the run with this model is over.

        The first call of all goes alone, so that a wrong key or model is refused once and not once per thread.
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
        room, seen, failures, attempts = self.spec.max_output_tokens, Counter(), 0, []
        answer = outcome = None
        parts = _encoded(request.parts)
        while True:
            try:
                body = json.dumps(wire.body(self.spec, request, parts, room), ensure_ascii=False).encode()
            except UnicodeEncodeError:
                return self._answer(request, attempts, status="bad_input", message="a text is no valid Unicode")
            if len(body) > wire.INLINE_CAP:
                return self._answer(request, attempts, status="bad_input", message=f"the request has {len(body) / 2**20:.0f} "
                                    f"MiB, more than the {wire.INLINE_CAP >> 20} that are taken; scale the pictures down")
            try:
                outcome = self._call(request, body, room, attempts)
            except Stop:
                if answer is None or outcome.limited:
                    raise
                return answer                                # what was paid for is told, as far as it came
            if outcome.kind == "stop":
                raise self._halt(outcome.reason, outcome.message)
            if outcome.kind == "reply":
                answer = self._answer(request, attempts, **outcome.reply)
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
        """Make one call within pause and budget, and add it to `attempts`."""
        self._wait_for_turn()
        try:
            number = self.budget.take(self.estimate(request, room)[1], model=self.spec.model, question=request.name)
        except Stop as stop:
            raise self._halt(*stop.args) from None
        started, outcome, tokens, cost, status = time.monotonic(), None, {}, None, "failed"
        try:
            outcome = self._understood(self._post(self.spec.url, body))
            if outcome.kind == "reply":
                outcome.reply = self._read(outcome.reply, request)
                tokens = outcome.reply["tokens"]
                cost = _cost(tokens, self.spec.price)
            elif not outcome.billed:
                cost = 0.0
            status = outcome.reply["status"] if outcome.kind == "reply" else outcome.status
        finally:
            self.budget.settle(number, cost, status)
        attempts.append({"call": number, "status": status, "http_status": outcome.http, "tokens": tokens, "cost": cost,
                         "seconds": round(time.monotonic() - started, 3), "answered": outcome.kind == "reply"})
        return outcome

    def _read(self, reply, request):
        """From a 200 to a status: who answered, and what. Whatever comes from outside loses the key here."""
        with self._lock:
            self._proven, self._failures = True, 0
        model, version, status = self.spec.model, reply.get("model_version"), reply["status"]
        if version is None and status is None and self.spec.provider == "gemini":
            version = "a model without a name"
        if version is not None and not self.spec.answers_as(version):
            reply |= {"status": "model_mismatch", "text": "", "message": f"{model} was asked, and {version} answered: its "
                      "verdicts would be another panel's; if it is right, list it as model_version in the panel"}
        elif status is None and request.schema:
            found = wire.read_verdict(reply["text"], request.schema)
            reply |= zip(("status", "data", "parse_mode", "extra_keys"), found, strict=True)
        elif status is None:
            reply["status"] = "ok"
        if reply["status"] not in ("ok", "model_mismatch"):
            why, remark = reply.get("block_reason") or reply.get("finish_reason"), reply["message"]
            reply["message"] = (f"{model}: {reply['status'].replace('_', ' ')}{f' ({why})' if why else ''}"
                                f"{f': {remark}' if remark else ''}")
            if remark and not self._remarked:
                self._remarked = True
                self._notify(self._clean(reply["message"]))
        told = reply.get("model_status") or {}
        if told.get("modelStage") in ("LEGACY", "DEPRECATED", "RETIRED") and not self._warned:
            self._warned = True
            until = told.get("retirementTime") or "a day not told"
            self._notify(self._clean(f"{model} is {told['modelStage'].lower()}, until {until}"))
        reply["text"] = reply["text"][:wire.TEXT_CAP]
        return {name: value if name in ("status", "tokens") else self._clean(value) for name, value in reply.items()}

    def _answer(self, request, attempts, **found):
        answered = [a for a in attempts if a["answered"]]
        names = ("prompt", "cached", "output", "thoughts", "total")
        tokens = {n: _sum(a["tokens"].get(n) for a in answered) for n in names}
        return Answer(**{"model_requested": self.spec.model, "fields": self.fields(request), **found, "tokens": tokens,
                         "cost": _sum(a["cost"] for a in answered), "unknown": sum(a["cost"] is None for a in attempts),
                         "http_status": attempts[-1]["http_status"] if attempts else None,
                         "latency_s": round(sum(a["seconds"] for a in attempts), 3), "attempts": tuple(attempts)})

    # ---- waiting and stopping

    def _wait_for_turn(self):
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
        """Count a failure that may pass; stop where it does not seem to."""
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
        """Stop this client; the first reason counts. Returns what is to be raised."""
        with self._lock:
            self.stopped = self.stopped or Stop(reason, text)
        self._ended.set()
        return Stop(reason, text)

    # ---- the wire

    def _post(self, url, body):
        """One POST in a thread of its own: only so do a name server, a slow header and a dripping body end in time."""
        try:
            session = self._sessions.get_nowait()
        except queue.Empty:
            session = requests.Session()
            session.auth = lambda prepared: prepared         # else a .netrc entry would replace the header
        found, finished, given_up = [], threading.Event(), threading.Event()

        def work():
            headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
            if self.spec.provider == "gemini":
                headers["X-Server-Timeout"] = str(max(1, int(self.spec.timeout)))
            headers |= self._key.headers(self.spec) if self._key else {"Authorization": "Bearer none"}
            direct = dict.fromkeys(("http", "https", "all")) if self.spec.local else None        # never through a proxy
            try:
                found.append(_exchange(session, given_up, url=url, data=body, headers=headers, proxies=direct,
                                       timeout=(min(CONNECT, self.spec.timeout), self.spec.timeout)))
            finally:
                finished.set()

        threading.Thread(target=work, daemon=True).start()
        until = time.monotonic() + self.spec.timeout
        while not finished.wait(max(0.0, min(0.25, until - time.monotonic()))):
            if time.monotonic() >= until or (self.stopped and self.stopped.reason == "interrupted"):
                given_up.set()
                return Outcome("again", "timeout", f"no whole answer within {self.spec.timeout:g} s", tries=wire.FEW,
                                billed=wire.FAILED_MAY_BE_BILLED)
        if isinstance(found[0], tuple):
            self._sessions.put(session)
        else:
            session.close()                                  # the next call opens a fresh connection
        return found[0]

    def _understood(self, found):
        """The Outcome of what came back. An echo of the key goes first, before anything is cut in the middle of it."""
        if isinstance(found, Outcome):
            return found
        status, headers, raw = found
        if self._key:
            raw = self._key.redact(raw.decode("latin-1")).encode("latin-1")
            headers = type(headers)({name: self._key.redact(value) for name, value in headers.items()})
        outcome = wire.understand(self.spec, status, headers, raw)
        outcome.message = self._clean(outcome.message)       # again: here it is out of JSON's escapes
        return outcome

    def _clean(self, value):
        """Without the key, and valid UTF-8 without NUL, however deep: it will be written down."""
        if isinstance(value, str):
            value = self._key.redact(value) if self._key else value
            return re.sub("[\0\ud800-\udfff]", "\ufffd", value)
        if isinstance(value, dict):
            return {self._clean(name): self._clean(item) for name, item in value.items()}
        return type(value)(map(self._clean, value)) if isinstance(value, list | tuple) else value


def ask_many(work, *, concurrency=4):
    """(which, index, Answer) of many requests as they come; work is a list of (client, iterable of Requests).

    `concurrency` calls are in flight per client. Requests are drawn in the caller's thread, and a client's next one only
    after the caller came back from an answer: who writes each down first loses none but the calls in flight. A client
    that stops ends alone; its further requests are neither asked nor yielded. Look at `client.stopped` afterwards.
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
            if running:                                      # left early, by break or Ctrl-C: wait for nobody
                for client, _ in work:
                    client._halt("interrupted", "the run was left")


# -------------------------------------------------------------------------------------------------------- small helpers

def _encoded(parts):
    """Parts for the wire: ("text", text) and ("image", base64 of a PNG made from the pixels alone)."""
    found = []
    for part in parts:
        if isinstance(part, str):
            found.append(("text", part))
            continue
        pixels = part.convert("RGB")
        size, content = pixels.size, pixels.tobytes()
        with ENCODING[hash(content) % len(ENCODING)]:        # who wants the same picture waits for it
            found.append(("image", _png(size, content)))
    return found


ENCODING = [threading.Lock() for _ in range(16)]


@lru_cache(maxsize=16)                                       # an original is sent with each of its edits, to every judge
def _png(size, pixels):
    """base64 of the PNG of RGB pixels: without EXIF, without a profile."""
    file = io.BytesIO()
    Image.frombytes("RGB", size, pixels).save(file, "PNG", compress_level=1)
    return base64.b64encode(file.getvalue()).decode("ascii")


def _picture_tokens(image):
    """An upper bound, whichever of the published tilings holds."""
    unit = min(768, max(256, min(image.size) / 1.5))
    return max(1120, 258 * math.ceil(image.width / unit) * math.ceil(image.height / unit))


def _cost(tokens, price):
    if price is None or any(tokens.get(name) is None for name in ("prompt", "cached", "output", "thoughts")):
        return None
    cached = min(tokens["cached"], tokens["prompt"])
    return ((tokens["prompt"] - cached) * price["input"] + cached * price.get("cached", price["input"])
            + (tokens["output"] + tokens["thoughts"]) * price["output"]) / 1e6


def _sum(values):
    values = list(values)
    return None if not values or None in values else sum(values)
