"""The models: their families, and the settings that a panel file may have. Facts of November 2026.

A request is fixed per model family (PROFILES) and never adapted between calls, because another request is another judge.
"""

import ipaddress
import math
import re
from dataclasses import asdict, dataclass, fields, replace
from urllib.parse import urlsplit


@dataclass(frozen=True)
class Profile:
    """A family of models. allowed: its generation fields and their values (None: any value)."""

    models: str
    allowed: dict
    default: dict
    structured: str = "schema"
    timeout: float = 300.0


# The first one that fits counts. Sampling fields are deprecated from Gemini 3 on; a budget and a level together are refused.
SAMPLING = {"temperature": None, "topP": None, "topK": None, "seed": None}
MEDIA = {"mediaResolution": ("MEDIA_RESOLUTION_MEDIUM", "MEDIA_RESOLUTION_HIGH")}        # LOW would hide what is judged
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
    """One model and its settings, as in a panel file. None takes the family's default. Made by `from_json`.

    generation: sampling and thinking fields by their names on the wire ({} sends none). model_version: names under which
    the model may answer, if they differ from its own. price: USD per million tokens, {"input", "cached", "output", "date"}.
    rpm: requests per minute. weights: a digest of local weights, which is only recorded.
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
    def from_json(cls, settings):
        """The Spec of a dict in a panel file; raises ValueError for any setting that cannot be."""
        if not isinstance(settings, dict):
            raise ValueError("a judge of a panel is an object with a provider and a model")
        if extra := sorted(settings.keys() - {f.name for f in fields(cls)}):
            raise ValueError(f"a judge sets {', '.join(extra)}, which is no setting here; "
                             f"there are {', '.join(f.name for f in fields(cls))}")
        if missing := [name for name in ("provider", "model") if not isinstance(settings.get(name), str)]:
            raise ValueError(f"a judge has no {missing[0]}: it needs a provider (gemini or openai) and a model")
        spec = cls(**{name: value for name, value in settings.items() if value is not None})
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
        """Raise ValueError where address, fields, numbers, price or key do not fit."""
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
        """True if the server is this machine."""
        try:
            return self.host == "localhost" or ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def url(self):
        """The address that a request is posted to."""
        path = f"/models/{self.model}:generateContent" if self.provider == "gemini" else "/chat/completions"
        return self.base_url + path

    def answers_as(self, version):
        """True if `version` names this model: its own name, or that name with a date or number after it."""
        accepted = [re.escape(name) for name in self.model_version] or [re.escape(self.model) + r"(-\d[\d-]*)?"]
        return bool(re.fullmatch(f"(models/)?({'|'.join(accepted)})", version))

    def record(self):
        return asdict(self)


def _is_number(value):
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
