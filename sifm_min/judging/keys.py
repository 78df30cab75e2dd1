"""API keys: where they come from, and how they are kept out of every text."""

import os
import re
import stat
from urllib.parse import quote

from .spec import BASE


class Key:
    """A credential, which no repr shows. It comes from the environment or from a private file, never from a flag."""

    __slots__ = ("_value", "source")

    def __init__(self, value, source):
        value = value.strip()
        if not value or not re.fullmatch(r"[!-~]+", value):
            raise ValueError(f"the key from {source} is empty, or has characters that no key has; copy it again")
        self._value, self.source = value, source

    @classmethod
    def find(cls, spec):
        """The key for a spec's host, or None for a local server without one; raises ValueError."""
        default = {BASE["gemini"]: ["GEMINI_API_KEY", "GOOGLE_API_KEY"], BASE["openai"]: ["OPENAI_API_KEY"]}
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
        """Replace the key in a text, by exact value, also in its escaped form for a URL.

        A word of less than eight letters, as local servers get, is no secret and stays.
        """
        if len(self._value) < 8:
            return text
        for shape in {self._value, quote(self._value, safe=""), quote(self._value)}:
            text = text.replace(shape, "[key]")
        return text

    def headers(self, spec):
        """The header with the credential. Vertex takes OAuth tokens, as the OpenAI form does."""
        if spec.provider == "gemini" and not spec.host.endswith("aiplatform.googleapis.com"):
            return {"x-goog-api-key": self._value}
        return {"Authorization": f"Bearer {self._value}"}

    def __repr__(self):
        return f"Key(from {self.source})"

    def __reduce__(self):
        raise TypeError("a key is not written down")


def _private_text(path):
    """The text of a file that only its owner may read; raises ValueError."""
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
