"""POST requests with a deadline for the whole call, without redirects, proxies of local servers, or bodies without end."""

import queue
import ssl
import threading
import time
from dataclasses import replace

import requests

from . import outcomes
from .outcomes import Outcome, short

CONNECT = 10                                                 # seconds to connect
BODY_CAP = 4 * 2**20                                         # bytes of an answer, which has about 3,000


class Transport:
    """Connections to one server. Sessions are kept, and each is used by one call at a time."""

    def __init__(self, spec, key):
        self.spec, self._key, self._sessions = spec, key, queue.LifoQueue()

    def post(self, url, body, interrupted):
        """Make one POST: (status, headers, body), or an Outcome. interrupted() is true when the run was left.

        The POST has a thread of its own, so that the deadline also holds for a name server, a slow header and a body that
        comes byte by byte.
        """
        try:
            session = self._sessions.get_nowait()
        except queue.Empty:
            session = requests.Session()
            session.auth = lambda prepared: prepared         # else a .netrc entry would replace the header
        result, finished, given_up = [], threading.Event(), threading.Event()

        def work():
            headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
            if self.spec.provider == "gemini":
                headers["X-Server-Timeout"] = str(max(1, int(self.spec.timeout)))
            headers |= self._key.headers(self.spec) if self._key else {"Authorization": "Bearer none"}
            direct = dict.fromkeys(("http", "https", "all")) if self.spec.local else None        # never through a proxy
            try:
                result.append(_exchange(session, given_up, url=url, data=body, headers=headers, proxies=direct,
                                       timeout=(min(CONNECT, self.spec.timeout), self.spec.timeout)))
            finally:
                finished.set()

        threading.Thread(target=work, daemon=True).start()
        until = time.monotonic() + self.spec.timeout
        while not finished.wait(max(0.0, min(0.25, until - time.monotonic()))):
            if time.monotonic() >= until or interrupted():
                given_up.set()
                return Outcome("again", "timeout", f"no whole answer within {self.spec.timeout:g} s", tries=outcomes.FEW,
                                billed=outcomes.FAILED_MAY_BE_BILLED)
        if isinstance(result[0], tuple):
            self._sessions.put(session)
        else:
            session.close()                                  # the next call opens a fresh connection
        return result[0]


class _TooLarge(Exception):
    pass


def _content(response, given_up):
    """The decoded body up to BODY_CAP. It is read in small steps: a compressed kilobyte may unfold to a megabyte."""
    if response.headers.get("Content-Encoding", "identity").strip().lower() not in ("", "identity", "gzip", "deflate"):
        raise requests.exceptions.ContentDecodingError("an encoding that was not asked for")
    announced, body = response.headers.get("Content-Length", ""), bytearray()
    if announced.isdecimal() and (len(announced) > 12 or int(announced) > BODY_CAP):
        raise _TooLarge
    for chunk in response.iter_content(1024):
        body += chunk
        if len(body) > BODY_CAP or given_up.is_set():        # given up: the body is not used
            raise _TooLarge
    return bytes(body)


def _exchange(session, given_up, **call):
    """Make one POST without redirects: (status, headers, body), or the Outcome of a failure."""
    lost = Outcome("again", billed=outcomes.FAILED_MAY_BE_BILLED)
    try:
        with session.post(allow_redirects=False, stream=True, **call) as response:
            return response.status_code, response.headers, _content(response, given_up)
    except _TooLarge:
        return replace(lost, kind="final", status="too_large", message=f"the answer is larger than {BODY_CAP} bytes")
    except requests.exceptions.SSLError as error:            # first: it is a ConnectionError, too
        if isinstance(_root(error), ssl.SSLEOFError | ssl.SSLZeroReturnError):
            return replace(lost, message="the connection broke off")
        return Outcome("stop", reason="tls", message=f"no trusted connection: {_cause(error)}")
    except requests.Timeout:
        return replace(lost, status="timeout", message="no answer in time", tries=outcomes.FEW)
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
    """The text of the innermost error: the outer ones quote objects and addresses."""
    error = _root(error)
    return short(getattr(error, "strerror", None) or str(error) or type(error).__name__)
