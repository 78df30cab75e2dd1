"""A headless Chromium, driven through the DevTools protocol over a pipe: for pages that people use with a keyboard."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
# The browser reads commands from descriptor 3 and answers on 4.
LAUNCH = "import os, sys; r, w = map(int, sys.argv[1:3]); os.dup2(w, 60); os.dup2(r, 3); os.dup2(60, 4); " \
         "os.execvp(sys.argv[3], sys.argv[3:])"


def find():
    """The path of a Chromium, or None. CHROMIUM names one that is not on the PATH."""
    return next(filter(None, [os.environ.get("CHROMIUM"), *map(shutil.which, NAMES)]), None)


class Browser:
    """One page: `open`, `press` keys, `run` JavaScript; downloads go to the folder `downloads`."""

    def __init__(self, downloads):
        self._profile = tempfile.mkdtemp()
        (theirs, to), (back, answers) = os.pipe(), os.pipe()
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
                   "--allow-file-access-from-files", "--remote-debugging-pipe", f"--user-data-dir={self._profile}"]
        self._process = subprocess.Popen([sys.executable, "-c", LAUNCH, str(theirs), str(answers), find(), *options],
                                         pass_fds=(theirs, answers), start_new_session=True,
                                         stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        os.close(theirs)
        os.close(answers)
        self._watch = threading.Timer(90, self._end)       # whatever waits then hears that the browser has ended
        self._watch.start()
        self._to, self._back, self._number, self._session = os.fdopen(to, "wb"), os.fdopen(back, "rb"), 0, None
        self.events, self._read = [], b""
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self._call(f"{domain}.enable")
        self._call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(downloads), eventsEnabled=True)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._watch.cancel()
        self._end()
        self._process.wait()
        self._to.close()
        self._back.close()
        shutil.rmtree(self._profile, ignore_errors=True)

    def _end(self):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)     # its own group: the browser and its helpers

    def open(self, url):
        self._call("Page.navigate", url=url)
        self.wait_for("Page.loadEventFired")

    def press(self, *keys):
        """Keys by their DOM names; one character is typed."""
        for key in keys:
            text = {"text": key} if len(key) == 1 else {}
            self._call("Input.dispatchKeyEvent", type="keyDown", key=key, **text)
            self._call("Input.dispatchKeyEvent", type="keyUp", key=key)

    def run(self, script):
        """The value of a JavaScript expression."""
        found = self._call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(found["exceptionDetails"])
        return found["result"].get("value")

    def wait_for(self, method, **having):
        """The next event of this name with these values."""
        while True:
            for event in self.events:
                if event["method"] == method and having.items() <= event["params"].items():
                    self.events.remove(event)
                    return event["params"]
            message = self._message()
            self.events += [message] if "method" in message else []

    def _call(self, method, **params):
        number = self._send(method, params)
        while True:
            found = self._message()
            if found.get("id") == number:
                if "error" in found:
                    raise RuntimeError(found["error"])
                return found["result"]
            if "method" in found:
                self.events.append(found)

    def _send(self, method, params):
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session and not method.startswith(("Target.", "Browser.")):
            message["sessionId"] = self._session
        self._to.write(json.dumps(message).encode() + b"\0")
        self._to.flush()
        return self._number

    def _message(self):
        while b"\0" not in self._read:
            more = self._back.read1(65536)
            if not more:
                raise RuntimeError("the browser has ended")
            self._read += more
        message, _, self._read = self._read.partition(b"\0")
        message = json.loads(message)
        if message.get("method") == "Page.javascriptDialogOpening":              # "leave the page?"
            self._send("Page.handleJavaScriptDialog", {"accept": True})
        return message
