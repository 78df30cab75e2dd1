"""What is said to a vision model and what its answers mean, for two wires: Gemini's generateContent and the OpenAI form.

Nothing here opens a connection, and no key comes here: gemini.py sends what `body` builds and hands what came back to
`understand`. A request is fixed per model family (PROFILES) and never adapted between calls, because another request is
another judge. An answer is read strictly: nothing is repaired, no type is coerced, and a reason to finish that is not
known is no answer. Facts about the services are those of November 2026.
"""

import contextlib
import ipaddress
import json
import math
import re
from dataclasses import asdict, dataclass, field, fields, replace
from email.utils import parsedate_to_datetime
from urllib.parse import urlsplit

STATUSES = ("ok", "blocked_prompt", "blocked_output", "refused_text", "truncated", "empty", "no_candidate",
            "abnormal_finish", "invalid_verdict", "model_mismatch", "http_error", "timeout", "too_large", "bad_encoding",
            "bad_input")
REASONS = ("credential", "request", "model", "quota_day", "quota", "breaker", "budget", "model_mismatch", "unreachable",
           "tls", "redirect", "interrupted")

TRIES, FEW = 6, 3                                            # calls for one answer, and where another seldom helps
PATIENCE = 3600                                              # seconds: the longest wait within a run; a longer one ends it
LONGEST = 31 * 86400                                         # seconds: a wait beyond this is a mistake, and is ignored
SECONDS = r"(\d{1,9}(?:\.\d{1,9})?)"
TEXT_CAP = 2**16                                             # characters in which a verdict is looked for
# What no official page confirms yet; each is decided here and nowhere else.
INLINE_CAP = 18 * 2**20                                      # the limit is 20 MB, or 100 MB since January 2026
FAILED_MAY_BE_BILLED = True                                  # whether 5xx and calls that we gave up cost anything
GEMINI_SCHEMA = "responseJsonSchema"                         # deprecated in favour of responseFormat, and still taken

BLOCKED = ("SAFETY", "RECITATION", "BLOCKLIST", "PROHIBITED_CONTENT", "SPII", "IMAGE_SAFETY", "IMAGE_PROHIBITED_CONTENT",
           "IMAGE_RECITATION", "content_filter")
HARMS = ("HARASSMENT", "HATE_SPEECH", "SEXUALLY_EXPLICIT", "DANGEROUS_CONTENT")
# Errors about a picture; those that every picture would meet, because the model takes none; and a quota of zero.
ONE_IMAGE = re.compile(r"(?i)\bimages?\b|image_url|inline_?data|mime ?type")
NO_IMAGES = re.compile(r"(?i)not support|unsupported (content|parameter)|at most \d+ image|mmproj|multimodal|missing data|"
                       r"modality|not enabled|unknown variant|only supported by certain models|no endpoints found")
ZERO_LIMIT = re.compile(r"(?i)\blimit:? ?0\b(?![.,]?\d)")


# ------------------------------------------------------------------------------------------------ the models, as data

@dataclass(frozen=True)
class Profile:
    """What a family of models takes: `allowed` names the generation fields and their values (None: any)."""

    models: str
    allowed: dict
    default: dict
    structured: str = "schema"
    timeout: float = 300.0


SAMPLING = {"temperature": None, "topP": None, "topK": None, "seed": None}
MEDIA = {"mediaResolution": ("MEDIA_RESOLUTION_MEDIUM", "MEDIA_RESOLUTION_HIGH")}        # LOW would hide what is judged
# The first that fits. Sampling fields are deprecated from Gemini 3 on; a budget and a level together are refused.
PROFILES = (
    Profile(r"gemini-2\.5-pro", {**SAMPLING, **MEDIA, "thinkingBudget": (-1, *range(128, 32769))},
            {"temperature": 0, "thinkingBudget": -1}),
    Profile(r"gemini-2\.5-flash", {**SAMPLING, **MEDIA, "thinkingBudget": range(-1, 24577)},
            {"temperature": 0, "thinkingBudget": -1}),
    Profile(r"gemini-3\.8", {"seed": None, **MEDIA, "thinkingLevel": ("LOW", "MEDIUM", "HIGH")}, {}),
    Profile(r"gemini-3\b", {"seed": None, **MEDIA, "thinkingLevel": ("MINIMAL", "LOW", "MEDIUM", "HIGH")}, {}),
    Profile(r"gemini-4-neon", {"seed": None, **MEDIA, "thinkingLevel": ("LOW", "MEDIUM", "HIGH", "XHIGH")}, {}, timeout=900.0),
    Profile(r"gemini-4\b", {"seed": None, **MEDIA, "thinkingLevel": ("LOW", "MEDIUM", "HIGH")}, {}, timeout=900.0),
)
UNKNOWN = Profile("", {}, {}, structured="json_object")
OPENAI = Profile("", {"temperature": None, "top_p": None, "seed": None, "reasoning_effort": None}, {"temperature": 0})
TYPES = {"base_url": str, "key_env": str, "generation": dict, "system_in_user": bool, "price": dict, "weights": str}
BASE = {"gemini": "https://generativelanguage.googleapis.com/v1beta", "openai": "https://api.openai.com/v1"}
OWNERS = {"GEMINI_API_KEY": ".googleapis.com", "GOOGLE_API_KEY": ".googleapis.com", "OPENAI_API_KEY": ".openai.com"}


@dataclass(frozen=True)
class Spec:
    """One model and how it is asked, as a panel file has it; what is None takes the family's default.

    generation: sampling and thinking fields by their wire names ({} sends none). model_version: the names under which
    the model may answer, where they are not its own. price: USD per million tokens, {"input", "cached", "output", "date"}.
    rpm: requests per minute. weights: a digest of local weights, which is only recorded. Made by `from_json`.
    """

    provider: str
    model: str
    base_url: str | None = None
    key_env: str | None = None
    generation: dict | None = None
    structured: str | None = None                            # "schema", "json_object" or "none"
    max_output_tokens: int | None = None                     # thinking counts against it
    max_tokens_field: str = "max_tokens"
    system_in_user: bool = False                             # for chat templates without a system role
    model_version: tuple = ()
    price: dict | None = None
    rpm: float | None = None
    timeout: float | None = None                             # seconds for one call, all of it
    weights: str | None = None

    @classmethod
    def from_json(cls, given):
        """The dict of a panel file, checked; raises ValueError."""
        if not isinstance(given, dict):
            raise ValueError("a judge of a panel is an object with a provider and a model")
        if extra := sorted(given.keys() - {f.name for f in fields(cls)}):
            raise ValueError(f"a judge sets {', '.join(extra)}, which is no setting here; "
                             f"there are {', '.join(f.name for f in fields(cls))}")
        if missing := [name for name in ("provider", "model") if not isinstance(given.get(name), str)]:
            raise ValueError(f"a judge has no {missing[0]}: it needs a provider (gemini or openai) and a model")
        spec = cls(**{name: value for name, value in given.items() if value is not None})
        for name, kind in TYPES.items():
            if not isinstance(getattr(spec, name), (kind, type(None))):
                raise ValueError(f"{name} {getattr(spec, name)!r} of {spec.model} is not a {kind.__name__}")
        if spec.provider not in BASE:
            raise ValueError(f"provider {spec.provider!r}: choose gemini or openai")
        if not re.fullmatch(r"[A-Za-z0-9][\w.:@+-]*(/[A-Za-z0-9][\w.:@+-]*)*", spec.model):
            raise ValueError(f"model {spec.model!r} is no name of a model")
        if spec.model.endswith("latest") and spec.provider == "gemini":
            raise ValueError(f"model {spec.model!r} means another model every few months; name the one that is meant")
        profile = spec.profile
        versions = (spec.model_version,) if isinstance(spec.model_version, str) else tuple(map(str, spec.model_version))
        spec = replace(
            spec, base_url=(spec.base_url or BASE[spec.provider]).rstrip("/"), model_version=versions,
            generation=profile.default if spec.generation is None else spec.generation,
            structured=spec.structured or profile.structured, timeout=spec.timeout or profile.timeout,
            max_output_tokens=spec.max_output_tokens or (8192 if spec.provider == "gemini" else 2048))
        spec._check()
        return spec

    def _check(self):
        try:
            url = urlsplit(self.base_url)
            sound = url.scheme in ("http", "https") and url.hostname and (url.port or 1) and not (
                url.username or url.password or url.query or url.fragment) and re.fullmatch(r"[!-~]+", self.base_url)
        except ValueError:                                   # a port that is no number, a broken IPv6 address
            sound = False
        if not sound:
            raise ValueError(f"base_url of {self.model}: no plain http(s) address without user, query and fragment")
        if url.scheme == "http" and not self.local:
            raise ValueError(f"{self.base_url}: key and pictures would travel unencrypted; use https, or a tunnel to localhost")
        for name, value in self.generation.items():
            taken = self.profile.allowed
            if name not in taken or isinstance(value, bool) or (taken[name] is not None and value not in taken[name]):
                raise ValueError(f"{self.model} does not take {name} {value!r}; its fields are {', '.join(taken) or 'none'}")
        for name, known in (("structured", ("schema", "json_object", "none")),
                            ("max_tokens_field", ("max_tokens", "max_completion_tokens"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} {getattr(self, name)!r}: choose one of {', '.join(known)}")
        for name in ("max_output_tokens", "rpm", "timeout"):
            value = getattr(self, name)
            whole = name != "max_output_tokens" or type(value) is int
            if value is not None and not (_is_number(value) and value > 0 and whole):
                raise ValueError(f"{name} {value!r} of {self.model} is no number above 0 (max_output_tokens: a whole one)")
        rates = {k: v for k, v in (self.price or {"input": 0, "output": 0}).items() if k != "date"}
        if rates.keys() - {"cached"} != {"input", "output"} or not all(_is_number(r) and r >= 0 for r in rates.values()):
            raise ValueError(f"price of {self.model}: give input and output (and cached) in USD per million tokens")
        owner = OWNERS.get(self.key_env)
        if owner and not f".{self.host}".endswith(owner):
            raise ValueError(f"{self.key_env} is the key for *{owner}, not for {self.host}; name another variable as key_env")

    @property
    def profile(self):
        if self.provider == "openai":
            return OPENAI
        return next((profile for profile in PROFILES if re.match(profile.models, self.model)), UNKNOWN)

    @property
    def host(self):
        return urlsplit(self.base_url).hostname or ""

    @property
    def local(self):
        """Whether the server is this very machine."""
        try:
            return self.host == "localhost" or ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def url(self):
        """Where a request is posted."""
        path = f"/models/{self.model}:generateContent" if self.provider == "gemini" else "/chat/completions"
        return self.base_url + path

    def answers_as(self, version):
        """Whether a model of this name is the one that was asked: its own name, also with a date or number behind."""
        accepted = [re.escape(name) for name in self.model_version] or [re.escape(self.model) + r"(-\d[\d-]*)?"]
        return bool(re.fullmatch(f"(models/)?({'|'.join(accepted)})", version))

    def record(self):
        return asdict(self)


# ------------------------------------------------------------------------------------------- what is asked and answered

@dataclass(frozen=True)
class Request:
    """A question: `parts` are texts and PIL pictures in order; `schema` is that of the answer, or None for plain text.

    schema: JSON Schema of a flat object; its required properties are checked by type, others are ignored.
    seed: sent where the family takes one; the service does its best to follow it. name: of the question in a journal; not
    sent.
    """

    system: str
    parts: list
    schema: dict | None = None
    seed: int | None = None
    name: str = ""


@dataclass(frozen=True)
class Answer:
    """What came of a request, after all its calls. tokens: sums over the answered calls, None where not told.

    cost: USD of the answered calls, None if one of them is not known; unknown: how many calls may have cost something
    that nobody told. attempts: each call as {"call", "status", "http_status", "tokens", "cost", "seconds"}; "call" is its
    number in the journal.
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
        """JSON-ready."""
        return {**asdict(self), "attempts": list(self.attempts), "extra_keys": list(self.extra_keys)}


class Stop(Exception):
    """The run with this model ends here; `reason` is one of REASONS, the text one sentence with what to do."""

    def __init__(self, reason, text):
        super().__init__(reason, text)
        self.reason, self.text = reason, text

    def __str__(self):
        return self.text


# ------------------------------------------------------------------------------------------------------- the two wires

def settings(spec, request, room):
    """The request without its texts, pictures and schema: what a cache key has to know."""
    chosen = {**spec.generation}
    if request.seed is not None and "seed" in spec.profile.allowed:
        chosen["seed"] = request.seed
    if spec.provider == "openai":
        return {**chosen, spec.max_tokens_field: room, "stream": False}
    thinking = {name: chosen.pop(name) for name in ("thinkingBudget", "thinkingLevel") if name in chosen}
    return {"generationConfig": {"maxOutputTokens": room, **chosen, **({"thinkingConfig": thinking} if thinking else {})},
            "safetySettings": [{"category": f"HARM_CATEGORY_{harm}", "threshold": "BLOCK_NONE"} for harm in HARMS]}


def body(spec, request, parts, room):
    """The JSON of a call. parts: ("text", text) or ("image", base64 of a PNG); room: tokens for the answer."""
    return (_gemini_body if spec.provider == "gemini" else _openai_body)(spec, request, parts, room)


def _gemini_body(spec, request, parts, room):
    rest = settings(spec, request, room)
    if request.schema and spec.structured != "none":
        rest["generationConfig"]["responseMimeType"] = "application/json"
        if spec.structured == "schema":
            rest["generationConfig"][GEMINI_SCHEMA] = request.schema
    content = [{"text": part} if kind == "text" else {"inlineData": {"mimeType": "image/png", "data": part}}
               for kind, part in parts]
    system = {"parts": [{"text": request.system}]}
    return {"systemInstruction": system, "contents": [{"role": "user", "parts": content}], **rest}


def _openai_body(spec, request, parts, room):
    content = [{"type": "text", "text": part} if kind == "text" else
               {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{part}"}} for kind, part in parts]
    rules = [{"role": "system", "content": request.system}]
    if spec.system_in_user:
        rules, content = [], [{"type": "text", "text": request.system}, *content]
    whole = {"model": spec.model, "messages": [*rules, {"role": "user", "content": content}], **settings(spec, request, room)}
    if request.schema and spec.structured != "none":
        whole["response_format"] = {"type": "json_object"} if spec.structured == "json_object" else {
            "type": "json_schema", "json_schema": {"name": "verdict", "strict": True, "schema": request.schema}}
    return whole


def _gemini_reply(answer):
    """What a 200 says, as the fields of an Answer; a status of None: there is text to be read."""
    block = _string(_dict(answer.get("promptFeedback")).get("blockReason"))
    candidates = answer.get("candidates")
    candidate = _dict(candidates[0]) if isinstance(candidates, list) and candidates else {}
    parts = _dict(candidate.get("content")).get("parts")
    parts = [part for part in parts if isinstance(part, dict)] if isinstance(parts, list) else []
    texts = [_string(part.get("text")) or "" for part in parts if not part.get("thought")]
    thoughts = "parts marked as thought" if any(part.get("thought") and _string(part.get("text")) for part in parts) else None
    usage = _dict(answer.get("usageMetadata"))
    tokens = _tokens(usage, prompt="promptTokenCount", cached="cachedContentTokenCount", output="candidatesTokenCount",
                     thoughts="thoughtsTokenCount", total="totalTokenCount")
    return _reply("".join(texts), _string(candidate.get("finishReason")), block, bool(candidate), tokens, thoughts,
                  model_version=_string(answer.get("modelVersion")), response_id=_string(answer.get("responseId")),
                  model_status={k: short(v) for k, v in _dict(answer.get("modelStatus")).items() if _string(v)} or None)


def _openai_reply(answer):
    choices = answer.get("choices")
    choice = _dict(choices[0]) if isinstance(choices, list) and choices else {}
    message = _dict(choice.get("message"))
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(_string(_dict(part).get("text")) or "" for part in content)
    text = _without_thoughts(_string(content) or "")
    thoughts = next((name for name in ("reasoning", "reasoning_content") if (_string(message.get(name)) or "").strip()),
                    "a <think> block" if _string(content) and content.strip() and not text.strip() else None)
    usage = _dict(answer.get("usage"))
    reasoning = _dict(usage.get("completion_tokens_details")).get("reasoning_tokens", 0)
    cached = _dict(usage.get("prompt_tokens_details")).get("cached_tokens", 0)
    tokens = _tokens({**usage, "cached": cached, "reasoning": reasoning}, prompt="prompt_tokens", cached="cached",
                     output="completion_tokens", thoughts="reasoning", total="total_tokens")
    if tokens["output"] is not None and tokens["thoughts"] is not None:
        tokens["output"] = max(0, tokens["output"] - tokens["thoughts"])     # here it includes the reasoning
    reply = _reply(text, _string(choice.get("finish_reason")), None, bool(choice), tokens, thoughts,
                   model_version=_string(answer.get("model")), response_id=_string(answer.get("id")),
                   fingerprint=_string(answer.get("system_fingerprint")))
    if reply["status"] in (None, "empty") and (refusal := _string(message.get("refusal"))):
        reply |= {"status": "refused_text", "text": refusal}
    return reply


def _reply(text, finish, block, candidate, tokens, thoughts, **rest):
    """The fields of an Answer, by the same rules for both wires. An unknown finish reason is abnormal: only STOP is an answer.

    thoughts: the place where the reply has its reasoning, or None. Reasoning is never read as an answer.
    """
    if block:
        status = "blocked_prompt"
    elif not candidate:
        status = "no_candidate"
    elif finish in BLOCKED:
        status = "blocked_output"
    elif finish in ("MAX_TOKENS", "length"):
        status = "truncated"
    elif finish not in ("STOP", "stop"):
        status = "abnormal_finish"
    else:
        status = None if text.strip() else "empty"
    told = {"finish_reason": finish, "block_reason": block, **rest}
    told = {name: short(value, 200) if isinstance(value, str) else value for name, value in told.items()}
    remark = ""
    if thoughts and not text.strip() and status in ("empty", "truncated"):
        remark = f"the text is in {thoughts} alone, which is not read as an answer; " + (
            "raise max_output_tokens, or let the model think less" if status == "truncated" else
            "switch thinking off for this model, or have the server put the answer into its content")
    return {"status": status, "text": text, "tokens": tokens, "message": remark, **told}


def _without_thoughts(text):
    """The text after a <think> block. Some templates open it in the prompt, so that only its end is here."""
    opened = text.lstrip().startswith("<think>")
    if opened or ("</think>" in text and not text.lstrip().startswith(("{", "```"))):
        return text.partition("</think>")[2]
    return text


def _tokens(usage, **names):
    """Counts that are whole numbers, else None. One that is absent is zero if the total leaves no room for it."""
    def sane(value):
        return value if type(value) is int and value >= 0 else None
    found = {name: sane(usage.get(wire)) for name, wire in names.items()}
    if names["cached"] not in usage:
        found["cached"] = 0
    if found["prompt"] is not None and found["total"] == sum(found[n] or 0 for n in ("prompt", "output", "thoughts")):
        found |= {name: 0 for name in ("output", "thoughts") if names[name] not in usage}
    return found


# -------------------------------------------------------------------------------------------------- reading a verdict

def read_verdict(text, schema):
    """(status, data, parse_mode, names of extra keys) of an answer's text.

    The whole text, or the one object in it that fits the schema, in a fence or in prose. Nothing is repaired and no type
    is coerced. Two different objects are no verdict, and neither is a list, a cut object or a key that occurs twice.
    """
    try:
        whole = loads(text.strip())
        spans, mode = [text] if isinstance(whole, dict) else [], "whole"
    except (ValueError, RecursionError):
        if "{" not in text:
            return "refused_text", None, None, ()
        spans, mode = _objects(text[:TEXT_CAP]), "extracted"
    found = []
    for span in spans:
        try:
            value = loads(span)
        except (ValueError, RecursionError):
            continue
        if _fits(value, schema) and value not in found:
            found.append(value)
    if len(found) != 1:
        return "invalid_verdict", None, None, ()
    names = schema["properties"]
    return "ok", {n: found[0][n] for n in names if n in found[0]}, mode, tuple(n for n in found[0] if n not in names)


def _objects(text):
    """The outermost {...} of a text; none where one is in a list or never closes: what follows could be inside it."""
    spans, start, depth, quoted, escaped = [], 0, 0, False, False
    for i, char in enumerate(text):
        if quoted:
            quoted, escaped = escaped or char != '"', char == "\\" and not escaped
        elif char == '"':
            quoted = depth > 0
        elif char == "{":
            start, depth = (i, 1) if depth == 0 else (start, depth + 1)
        elif char == "}" and depth:
            depth -= 1
            if depth == 0:
                spans.append((start, text[start:i + 1]))
    if depth or any(text[:start].rstrip().endswith("[") for start, _ in spans):
        return []
    return [span for _, span in spans]


KINDS = {"boolean": bool, "string": str, "integer": int, "number": (int, float), "array": list, "object": dict}


def _fits(value, schema):
    for name in schema["properties"] if isinstance(value, dict) else ():
        kind = schema["properties"][name].get("type")
        if name not in value:
            if name in schema.get("required", ()):
                return False
        elif kind and (not isinstance(value[name], KINDS[kind]) or (isinstance(value[name], bool) and kind != "boolean")):
            return False
    return isinstance(value, dict)


def loads(text):
    """JSON as it is defined: no NaN, no key twice."""
    def once(pairs):
        if len({name for name, _ in pairs}) < len(pairs):
            raise ValueError("a key occurs twice")
        return dict(pairs)

    def never(name):
        raise ValueError(f"{name} is not JSON")
    return json.loads(text, object_pairs_hook=once, parse_constant=never)


# --------------------------------------------------------------------------------------------- one call and its outcome

@dataclass
class Outcome:
    """What came of one call. kind: "reply" (a 200 with JSON), "again" (may work later), "final" (this request only), "stop"."""

    kind: str
    status: str = "http_error"                               # of the Answer, where this was the last call
    message: str = ""
    http: int | None = None
    reason: str = ""                                         # of the Stop
    wait: float = 0.0                                        # seconds that the service asked for
    limited: bool = False                                    # a quota: every call of this model waits
    tries: int = TRIES
    reply: dict | None = None
    billed: bool = False                                     # may have cost something that nobody told


def understand(spec, status, headers, raw):
    """What an HTTP answer means (reference tables of the two services, by code and by details)."""
    if 300 <= status < 400:
        target = re.match(r"https?://([\w.-]+)", headers.get("Location", ""))
        return Outcome("stop", reason="redirect", http=status, message=f"{spec.host} redirects to "
                       f"{target[1] if target else 'another place'}, where the key does not belong; correct base_url")
    content, utf8 = None, True
    try:
        text = raw.decode("utf-8-sig")
        utf8 = "\0" not in text                              # JSON has none; UTF-16 without its mark has many
        content = loads(text)
    except UnicodeDecodeError:
        text, utf8 = raw.decode("utf-8", "replace"), False
    except ValueError:
        content = text
    except RecursionError:
        return Outcome("final", "too_large", "the answer is nested too deeply", status, billed=status == 200)
    content = content[0] if isinstance(content, list) and len(content) == 1 else content
    if status == 200 and isinstance(content, dict) and not content.get("error"):
        read = _gemini_reply if spec.provider == "gemini" else _openai_reply
        return Outcome("reply", http=status, reply=read(content))
    if status == 200 and not utf8:
        return Outcome("reply", http=status, reply={"status": "bad_encoding", "text": "", "tokens": {}, "message": ""})
    if 200 <= status < 300 and not isinstance(content, dict):
        return Outcome("again", http=status, message=f"{spec.host} answers with something that is not JSON", tries=FEW,
                       billed=FAILED_MAY_BE_BILLED)
    if status < 300:                                         # some gateways put an error into a 200
        code = _dict(_dict(content).get("error")).get("code")
        status = code if isinstance(code, int) and 400 <= code < 600 else 502
    return _refusal(spec, status, headers, *_problem(content, text))


def _refusal(spec, status, headers, name, message, details):
    told = f"{spec.host} answers {status}{' ' + name if name else ''}: {short(message)}"
    stop = Outcome("stop", http=status, message=told)
    about = message.replace(spec.model, "")                  # whose name may have "image" in it
    if status not in (401, 402, 403, 429) and NO_IMAGES.search(about) and ONE_IMAGE.search(about):
        return replace(stop, reason="model", message=f"{told}; {spec.model} must be able to see two pictures at once")
    if status == 429 or (status == 503 and name == "RESOURCE_EXHAUSTED"):
        return _quota(spec, headers, stop, details, name, message)
    if status in (408, 425, 499) or status >= 500:
        wait = _asked(headers, details)
        if wait > PATIENCE:
            return replace(stop, reason="unreachable", billed=FAILED_MAY_BE_BILLED,
                           message=f"{told}; it asks to wait {_span(wait)}: run the same command again then")
        return Outcome("again", "timeout" if status in (408, 504) else "http_error", told, status,
                        wait=wait, tries=FEW if status == 500 else TRIES, billed=FAILED_MAY_BE_BILLED)
    if "content_filter" in name or "content_policy" in name:
        return Outcome("final", "blocked_prompt", told, status)
    if status == 413 or (status in (400, 422) and ONE_IMAGE.search(about)):
        return Outcome("final", "bad_input", told, status)
    reasons = " ".join(_string(d.get("reason")) or "" for d in details)
    if status in (401, 402, 403) or "API_KEY" in reasons or re.search(r"(?i)\bAPI key\b|credential", message):
        return replace(stop, reason="credential", message=f"{told}; {_key_advice(status, reasons, message)}")
    if name == "FAILED_PRECONDITION":
        return replace(stop, reason="request", message=f"{told}; the free tier may not serve this country, or billing is off")
    if status == 404:
        return replace(stop, reason="model", message=f"{told}; {spec.model} is unknown there, retired or closed to new users, "
                       "or base_url is wrong: take another panel or correct it")
    return replace(stop, reason="request", message=f"{told}; the panel's settings do not suit this model")


def _key_advice(status, reasons, message):
    """The remedy for a refused key, by Google's ErrorInfo reasons and by what the message says."""
    if status == 402:
        return "add credit and start again"
    if "SERVICE_DISABLED" in reasons or re.search(r"(?i)has not been used in project|API (is|was) (not enabled|disabled)|"
                                                  r"API is not (enabled|activated)|API not enabled", message):
        return "the key is sound, but its project has this API switched off: enable it in the project's console, wait a few " \
               "minutes and start again"
    if "BILLING_DISABLED" in reasons or re.search(r"(?i)requires billing|enable billing", message):
        return "link billing to the key's project and start again"
    if "API_KEY_SERVICE_BLOCKED" in reasons or re.search(r"(?i)requests to this API .*blocked", message):
        return "the key is restricted to other APIs: allow this one among the key's restrictions, or take another key"
    if re.search(r"_(IP_ADDRESS|HTTP_REFERRER|ANDROID_APP|IOS_APP)_BLOCKED", reasons):
        return "the key may not be used from this machine: change its restrictions, or take another key"
    return "check the key: it is wrong, blocked or of another kind"


def _quota(spec, headers, stop, details, name, message):
    """The Outcome of a 429: wait, or stop where a wait within the hour does not help."""
    lists = [d.get("violations") for d in details]
    violations = [v for found in lists if isinstance(found, list) for v in found if isinstance(v, dict)]
    if "insufficient_quota" in name:
        return replace(stop, reason="quota", message=f"{stop.message}; add credit and start again")
    if any(v.get("quotaValue") in ("0", 0) for v in violations) or ZERO_LIMIT.search(message):
        return replace(stop, reason="quota", message=f"{spec.model} is not in the plan of this key: its quota is 0, so that no "
                       "waiting helps (or the model was withdrawn); take another panel, or link billing to the key's project")
    if any("PerDay" in (_string(v.get("quotaId")) or "") for v in violations):
        return replace(stop, reason="quota_day", message=f"today's quota for {spec.model} is spent; it starts anew at midnight "
                       "Pacific time (8:00 UTC in winter, 7:00 in summer): run the same command again then")
    wait = _asked(headers, details)
    if wait > PATIENCE:
        return replace(stop, reason="quota", message=f"the quota for {spec.model} is spent, and {spec.host} asks to wait "
                       f"{_span(wait)}: run the same command again then")
    return replace(stop, kind="again", limited=True, wait=wait)


def _asked(headers, details):
    """The longest sane wait in seconds that the header or the details ask for, else 0."""
    found = [re.fullmatch(SECONDS + "s", _string(d.get("retryDelay")) or "") for d in details]
    after = headers.get("Retry-After", "").strip()
    found.append(re.fullmatch(SECONDS + "s?", after))
    waits = [float(match[1]) for match in found if match]
    if after and not found[-1]:
        with contextlib.suppress(ValueError, TypeError):     # a date: against the server's own clock, not ours
            waits.append((parsedate_to_datetime(after) - parsedate_to_datetime(headers.get("Date", ""))).total_seconds())
    return max([seconds for seconds in waits if 0 <= seconds <= LONGEST], default=0.0)


def _span(seconds):
    return f"{seconds / 3600:.1f} hours" if seconds < 2 * 86400 else f"{seconds / 86400:.1f} days"


def _problem(content, text):
    """(name, message, details) of an error body, whatever its shape."""
    error = _dict(content).get("error", content)
    error = error if isinstance(error, dict) else {"message": error}
    name = next((error[k] for k in ("status", "code", "type") if isinstance(error.get(k), str)), "")
    message = next((error[k] for k in ("message", "detail") if _string(error.get(k))), text)
    if message.lstrip().startswith("<"):
        message = "a web page"
    details = error.get("details")
    return short(name, 60), message[:TEXT_CAP], [d for d in details if isinstance(d, dict)] if isinstance(details, list) else []


# -------------------------------------------------------------------------------------------------------- small helpers

def _is_number(value):
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def short(text, most=300):
    """The text on one line, cut at `most` characters, for a terminal: what is not printable is replaced."""
    text = "".join(char if char.isprintable() else "\ufffd" for char in " ".join(text[:10 * most].split()))
    return text if len(text) <= most else text[:most] + "..."


def _dict(value):
    return value if isinstance(value, dict) else {}


def _string(value):
    return value if isinstance(value, str) and value else None
