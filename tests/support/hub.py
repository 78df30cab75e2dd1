"""A hub of our own: the endpoints that huggingface_hub asks for, on the loopback interface, and faults on request.

    with Hub() as hub:
        hub.add("owner/name", {"model_index.json": b"{}"})          # a commit, and `main` that points to it
        hub.faults["unet/config.json"] = status(500)                # for requests whose path contains this

`hub.log` lists the requests as (method, path, Range header or None, bearer token or None).
"""

import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

LARGE = 200                                                         # bytes from which a file is stored by its SHA-256


def status(code, error=None, message=None):
    """A fault: answer with this status and the hub's error headers."""
    def answer(handler):
        headers = {"X-Error-Code": error, "X-Error-Message": message}
        handler.reply(code, b"", {name: value for name, value in headers.items() if value})
        return True
    return answer


def text(body):
    """A fault: answer 200 with something else, as a login page does."""
    def answer(handler):
        handler.reply(200, body.encode(), {"Content-Type": "text/html"})
        return True
    return answer


def hang(handler):
    """A fault: take the request and never answer."""
    handler.server.stopping.wait(30)
    handler.close_connection = True
    return True


def break_off(after, times=10**9):
    """A fault: close the connection after so many bytes of a body, the first `times` times."""
    left = [times]

    def answer(handler):
        if handler.command == "HEAD" or left[0] <= 0:
            return False
        left[0] -= 1
        handler.truncate = after
        return False
    return answer


def unless_token(token, fault):
    """A fault for everybody who does not send this token."""
    return lambda handler: handler.headers.get("Authorization") != f"Bearer {token}" and fault(handler)


class Hub(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.commits, self.refs, self.log, self.faults = {}, {}, [], {}
        self.stopping = threading.Event()

    def __enter__(self):
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.stopping.set()
        self.shutdown()
        self.server_close()

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


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    truncate = None

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
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
            return self.reply(404, b"", {"X-Error-Code": "RepoNotFound"})
        commit = self.server.refs.get((repo, revision or "main"))
        if commit is None:
            return self.reply(404, b"", {"X-Error-Code": "RevisionNotFound"})
        files = self.server.commits[repo, commit]
        if path.startswith("/api/"):
            siblings = [{"rfilename": name, "size": len(content), "blobId": git_hash(content)} | (
                {"lfs": {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}}
                if len(content) >= LARGE else {}) for name, content in files.items()]
            body = {"_id": "0", "id": repo, "modelId": repo, "sha": commit, "siblings": siblings, "tags": [],
                    "private": False, "gated": False, "downloads": 0, "likes": 0}
            return self.reply(200, json.dumps(body).encode(), {"Content-Type": "application/json"})
        if name not in files:
            return self.reply(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        content = files[name]
        etag = hashlib.sha256(content).hexdigest() if len(content) >= LARGE else git_hash(content)
        headers = {"X-Repo-Commit": commit, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        if asked := self.headers.get("Range"):
            start = int(asked.removeprefix("bytes=").split("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            return self.reply(206, content[start:], headers)
        return self.reply(200, content, headers)

    do_HEAD = do_GET

    def reply(self, code, body, headers):
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[: self.truncate])
        if self.truncate is not None:
            self.truncate = None
            self.close_connection = True

    def log_message(self, *_):
        pass


def git_hash(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
