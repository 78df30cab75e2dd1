"""A hub of our own: the endpoints that huggingface_hub asks for, on the loopback interface, and faults on request.

    with Hub() as hub:
        hub.add("owner/name", {"model_index.json": b"{}"})          # a commit, and `main` that points to it
        hub.faults["unet/config.json"] = status(500)                # for requests whose path contains this

`hub.log` lists the requests as (method, path, Range header or None, bearer token or None).
"""

import hashlib
import json
from contextlib import contextmanager
from urllib.parse import unquote, urlsplit

from local_server import Answers, LocalServer

LARGE = 200                                                         # bytes from which a file is stored by its SHA-256


def status(code, error=None, message=None):
    """A fault: answer with this status and the hub's error headers."""
    return lambda handler: handler.reply(code, X_Error_Code=error, X_Error_Message=message)


def text(body):
    """A fault: answer 200 with something else, as a login page does."""
    return lambda handler: handler.reply(200, body.encode(), Content_Type="text/html")


def hang(handler):
    """A fault: take the request and never answer."""
    return handler.hang()


def break_off(after, times=10**9):
    """A fault: close the connection after so many bytes of a body, the first `times` times."""
    left = [times]

    def answer(handler):
        if handler.command == "HEAD" or left[0] <= 0:
            return False
        left[0] -= 1
        handler.cut = after
        return False
    return answer


def unless_token(token, fault):
    """A fault for everybody who does not send this token."""
    return lambda handler: handler.headers.get("Authorization") != f"Bearer {token}" and fault(handler)


class Hub(LocalServer):
    def __init__(self):
        super().__init__(Handler)
        self.commits, self.refs, self.log, self.faults = {}, {}, [], {}

    def add(self, repo, files, commit=None, branch="main"):
        commit = commit or hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.commits[repo, commit] = files
        self.refs[repo, branch] = self.refs[repo, commit] = commit
        return commit

    def asked(self, method=None):
        """The paths of the files that were asked for, in order."""
        return [path.split("/resolve/")[1].split("/", 1)[1] for verb, path, *_ in self.log
                if "/resolve/" in path and method in (None, verb)]

    @contextmanager
    def fault(self, part, answer):
        self.faults[part] = answer
        try:
            yield
        finally:
            del self.faults[part]


class Handler(Answers):
    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        if path == "/api/agent-harnesses":                   # huggingface_hub asks for it by itself, once a day
            return self.reply(404)
        token = self.headers.get("Authorization")
        self.server.log.append((self.command, path, self.headers.get("Range"), token and token.split()[-1]))
        if any(answer(self) for part, answer in list(self.server.faults.items()) if part in path):
            return
        if path.startswith("/api/models/"):
            repo, _, revision = path.removeprefix("/api/models/").partition("/revision/")
        else:
            repo, _, rest = path.removeprefix("/").partition("/resolve/")
            revision, _, name = rest.partition("/")
        if not any(known == repo for known, _ in self.server.refs):
            return self.reply(404, X_Error_Code="RepoNotFound")
        commit = self.server.refs.get((repo, revision or "main"))
        if commit is None:
            return self.reply(404, X_Error_Code="RevisionNotFound")
        files = self.server.commits[repo, commit]
        if path.startswith("/api/"):
            siblings = [{"rfilename": name, "size": len(content), "blobId": git_hash(content)} | (
                {"lfs": {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}}
                if len(content) >= LARGE else {}) for name, content in files.items()]
            body = {"_id": "0", "id": repo, "modelId": repo, "sha": commit, "siblings": siblings, "tags": [],
                    "private": False, "gated": False, "downloads": 0, "likes": 0}
            return self.reply(200, json.dumps(body).encode(), Content_Type="application/json")
        if name not in files:
            return self.reply(404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        content = files[name]
        etag = hashlib.sha256(content).hexdigest() if len(content) >= LARGE else git_hash(content)
        headers = {"X_Repo_Commit": commit, "ETag": f'"{etag}"', "Accept_Ranges": "bytes"}
        if asked := self.headers.get("Range"):
            start = int(asked.removeprefix("bytes=").split("-")[0])
            headers["Content_Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            return self.reply(206, content[start:], **headers)
        return self.reply(200, content, **headers)

    do_HEAD = do_GET


def git_hash(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
