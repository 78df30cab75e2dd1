"""The meaning of an HTTP response of the two services: a reply, an error that may pass, or a reason to stop.

Facts about the services are those of November 2026.
"""

import contextlib
import re
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime

from ..files.json_text import loads

TRIES, FEW = 6, 3                                            # calls for one answer; the fewer where another call seldom helps
PATIENCE = 3600                                              # seconds: the longest wait within a run; a longer one ends it
LONGEST = 31 * 86400                                         # seconds: a wait beyond this is a mistake, and is ignored
SECONDS = r"(\d{1,9}(?:\.\d{1,9})?)"
MESSAGE_CAP = 2**16                                          # characters of an error message that are looked at
FAILED_MAY_BE_BILLED = True                                  # whether 5xx and abandoned calls cost: no official page says
# Errors about a picture; those that every picture would meet, because the model takes none; and a quota of zero.
ONE_IMAGE = re.compile(r"(?i)\bimages?\b|image_url|inline_?data|mime ?type")
NO_IMAGES = re.compile(r"(?i)not support|unsupported (content|parameter)|at most \d+ image|mmproj|multimodal|missing data|"
                       r"modality|not enabled|unknown variant|only supported by certain models|no endpoints found")
ZERO_LIMIT = re.compile(r"(?i)\blimit:? ?0\b(?![.,]?\d)")


@dataclass
class Outcome:
    """The outcome of one call. kind: "reply" (a 200 with JSON), "again" (may work later), "final" (of this request), "stop"."""

    kind: str
    status: str = "http_error"                               # of the Answer, where this was the last call
    message: str = ""
    http: int | None = None
    reason: str = ""                                         # of the Stop
    wait: float = 0.0                                        # seconds to wait, as the service asks
    limited: bool = False                                    # a quota: every call of this model waits
    tries: int = TRIES
    answer: dict | None = None                               # the JSON of a "reply", or None where it is not UTF-8
    billed: bool = False                                     # it may have cost something, and no amount was stated


def understand(spec, status, headers, raw):
    """The Outcome of an HTTP response, by its code and details."""
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
        return Outcome("reply", http=status, answer=content)
    if status == 200 and not utf8:
        return Outcome("reply", http=status)
    if 200 <= status < 300 and not isinstance(content, dict):
        return Outcome("again", http=status, message=f"{spec.host} answers with something that is not JSON", tries=FEW,
                       billed=FAILED_MAY_BE_BILLED)
    if status < 300:                                         # some gateways put an error into a 200
        code = as_dict(as_dict(content).get("error")).get("code")
        status = code if isinstance(code, int) and 400 <= code < 600 else 502
    return _refusal(spec, status, headers, *_problem(content, text))


def _refusal(spec, status, headers, name, message, details):
    """The Outcome of an error, by the services' tables of codes, names and details."""
    error = f"{spec.host} answers {status}{' ' + name if name else ''}: {short(message)}"
    stop = Outcome("stop", http=status, message=error)
    about = message.replace(spec.model, "")                  # whose name may have "image" in it
    if status not in (401, 402, 403, 429) and NO_IMAGES.search(about) and ONE_IMAGE.search(about):
        return replace(stop, reason="model", message=f"{error}; {spec.model} must be able to see two pictures at once")
    if status == 429 or (status == 503 and name == "RESOURCE_EXHAUSTED"):
        return _quota(spec, headers, stop, details, name, message)
    if status in (408, 425, 499) or status >= 500:
        wait = requested_wait(headers, details)
        if wait > PATIENCE:
            return replace(stop, reason="unreachable", billed=FAILED_MAY_BE_BILLED,
                           message=f"{error}; it asks to wait {_span(wait)}: run the same command again then")
        return Outcome("again", "timeout" if status in (408, 504) else "http_error", error, status,
                        wait=wait, tries=FEW if status == 500 else TRIES, billed=FAILED_MAY_BE_BILLED)
    if "content_filter" in name or "content_policy" in name:
        return Outcome("final", "blocked_prompt", error, status)
    if status == 413 or (status in (400, 422) and ONE_IMAGE.search(about)):
        return Outcome("final", "bad_input", error, status)
    reasons = " ".join(as_text(d.get("reason")) or "" for d in details)
    if status in (401, 402, 403) or "API_KEY" in reasons or re.search(r"(?i)\bAPI key\b|credential", message):
        return replace(stop, reason="credential", message=f"{error}; {_key_advice(status, reasons, message)}")
    if name == "FAILED_PRECONDITION":
        return replace(stop, reason="request", message=f"{error}; the free tier may not serve this country, or billing is off")
    if status == 404:
        return replace(stop, reason="model", message=f"{error}; {spec.model} is unknown there, retired or closed to new users, "
                       "or base_url is wrong: take another panel or correct it")
    return replace(stop, reason="request", message=f"{error}; the panel's settings do not suit this model")


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
    violations = [v for entries in lists if isinstance(entries, list) for v in entries if isinstance(v, dict)]
    if "insufficient_quota" in name:
        return replace(stop, reason="quota", message=f"{stop.message}; add credit and start again")
    if any(v.get("quotaValue") in ("0", 0) for v in violations) or ZERO_LIMIT.search(message):
        return replace(stop, reason="quota", message=f"{spec.model} is not in the plan of this key: its quota is 0, so that no "
                       "waiting helps (or the model was withdrawn); take another panel, or link billing to the key's project")
    if any("PerDay" in (as_text(v.get("quotaId")) or "") for v in violations):
        return replace(stop, reason="quota_day", message=f"today's quota for {spec.model} is spent; it starts anew at midnight "
                       "Pacific time (8:00 UTC in winter, 7:00 in summer): run the same command again then")
    wait = requested_wait(headers, details)
    if wait > PATIENCE:
        return replace(stop, reason="quota", message=f"the quota for {spec.model} is spent, and {spec.host} asks to wait "
                       f"{_span(wait)}: run the same command again then")
    return replace(stop, kind="again", limited=True, wait=wait)


def requested_wait(headers, details):
    """The longest wait in seconds that the headers or the details ask for, up to LONGEST; else 0."""
    matches = [re.fullmatch(SECONDS + "s", as_text(d.get("retryDelay")) or "") for d in details]
    after = headers.get("Retry-After", "").strip()
    matches.append(re.fullmatch(SECONDS + "s?", after))
    waits = [float(match[1]) for match in matches if match]
    if after and not matches[-1]:
        with contextlib.suppress(ValueError, TypeError):     # a date: against the server's own clock, not ours
            waits.append((parsedate_to_datetime(after) - parsedate_to_datetime(headers.get("Date", ""))).total_seconds())
    return max([seconds for seconds in waits if 0 <= seconds <= LONGEST], default=0.0)


def _span(seconds):
    return f"{seconds / 3600:.1f} hours" if seconds < 2 * 86400 else f"{seconds / 86400:.1f} days"


def _problem(content, text):
    """(name, message, details) of an error body, whatever its shape."""
    error = as_dict(content).get("error", content)
    error = error if isinstance(error, dict) else {"message": error}
    name = next((error[k] for k in ("status", "code", "type") if isinstance(error.get(k), str)), "")
    message = next((error[k] for k in ("message", "detail") if as_text(error.get(k))), text)
    if message.lstrip().startswith("<"):
        message = "a web page"
    details = error.get("details")
    details = [detail for detail in details if isinstance(detail, dict)] if isinstance(details, list) else []
    return short(name, 60), message[:MESSAGE_CAP], details


def short(text, most=300):
    """The text on one line, cut at `most` characters, for a terminal: what is not printable is replaced."""
    text = "".join(char if char.isprintable() else "\ufffd" for char in " ".join(text[:10 * most].split()))
    return text if len(text) <= most else text[:most] + "..."


def as_dict(value):
    """The value if it is a dict, else an empty one."""
    return value if isinstance(value, dict) else {}


def as_text(value):
    """The value if it is a text and not empty, else None."""
    return value if isinstance(value, str) and value else None
