"""A question to a vision model, its answer, and the reasons to stop.

A Request is a question, an Answer is its outcome after all calls, and Stop ends a model's run. All three can be written
down as they are: no key, valid UTF-8.
"""

from dataclasses import asdict, dataclass, field

STATUSES = ("ok", "blocked_prompt", "blocked_output", "refused_text", "truncated", "empty", "no_candidate",
            "abnormal_finish", "invalid_verdict", "model_mismatch", "http_error", "timeout", "too_large", "bad_encoding",
            "bad_input")
REASONS = ("credential", "request", "model", "quota_day", "quota", "breaker", "budget", "model_mismatch", "unreachable",
           "tls", "redirect", "interrupted")


@dataclass(frozen=True)
class Request:
    """A question. parts: texts and PIL pictures in order.

    schema: JSON Schema of the answer, a flat object, or None for plain text. Its required properties are checked by type,
    others are ignored. seed: sent where the family takes one; the service does not guarantee to follow it. name: of the
    question in a journal; it is not sent.
    """

    system: str
    parts: list
    schema: dict | None = None
    seed: int | None = None
    name: str = ""


@dataclass(frozen=True)
class Answer:
    """The outcome of a request after all its calls. status: one of STATUSES; only "ok" carries `data`.

    tokens: sums over the answered calls, None where not stated. cost: USD of the answered calls, None if one of them is
    not known. unknown: how many calls have a cost that is not known. attempts: each call as {"call" (its number in the
    journal), "status", "http_status", "tokens", "cost", "seconds", "answered"}.
    """

    status: str
    data: dict | None = None
    text: str = ""
    message: str = ""
    parse_mode: str | None = None                            # "whole", or "extracted" from a fence or from prose
    extra_keys: tuple = ()
    finish_reason: str | None = None
    block_reason: str | None = None
    model_requested: str = ""
    model_version: str | None = None
    model_status: dict | None = None
    response_id: str | None = None
    fingerprint: str | None = None
    http_status: int | None = None
    tokens: dict = field(default_factory=dict)
    cost: float | None = None
    unknown: int = 0
    latency_s: float = 0.0
    attempts: tuple = ()
    fields: dict = field(default_factory=dict)

    @property
    def ok(self):
        return self.status == "ok"

    def record(self):
        """The answer as a JSON-ready dict."""
        return {**asdict(self), "attempts": list(self.attempts), "extra_keys": list(self.extra_keys)}


class Stop(Exception):
    """The end of the run with this model. reason: one of REASONS; text: one sentence with what to do."""

    def __init__(self, reason, text):
        super().__init__(reason, text)
        self.reason, self.text = reason, text

    def __str__(self):
        return self.text
