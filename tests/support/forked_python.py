"""Fresh Python processes without the seconds that importing torch takes.

    with ForkedPython() as python:
        done = python("-m", "sifm_min.edit", "--help", cwd=folder)        # a CompletedProcess, as of subprocess.run
        child = python.start("-c", code)                                 # child.pid; child.wait() for the same
    select.select([stream, child.ends], [], [])                      # until it speaks through a stream, or has ended

One Python process imports torch, or the modules that ForkedPython is given, then forks for each command. The command runs in
the fork, with its own arguments, folder, environment and streams. Variables that Python or a library reads when it starts
have no effect, except PYTHONPATH. Where the system cannot fork, each command is a new process.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SERVER = """
import importlib, json, os, runpy, signal, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
signal.signal(signal.SIGINT, signal.default_int_handler)     # a background job of a shell ignores it, and so its children
print("ready", flush=True)
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        break
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
    sys.exit()
asked = json.loads(line)
os.chdir(asked["cwd"])
os.environ.clear()
os.environ.update(asked["env"])
for number, path in enumerate((os.devnull, asked["out"], asked["err"])):
    os.dup2(os.open(path, os.O_RDWR), number)
kind, *words = asked["words"]
path = [folder for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep) if folder]
first = os.getcwd() if kind == "-m" else "" if kind == "-c" else os.path.dirname(os.path.abspath(kind))
sys.path[:1] = [first, *path]
sys.dont_write_bytecode = bool(os.environ.get("PYTHONDONTWRITEBYTECODE"))
if kind == "-m":
    sys.argv = words
    runpy.run_module(words[0], run_name="__main__", alter_sys=True)
elif kind == "-c":
    sys.argv = ["-c", *words[1:]]
    exec(compile(words[0], "<string>", "exec"), {"__name__": "__main__"})
else:
    sys.argv = [kind, *words]
    runpy.run_path(kind, run_name="__main__")
"""


class Child:
    """A command that runs: its process id, the file of its stdout, and `wait` for its CompletedProcess.

    ends: a stream that is readable once the command has ended.
    """

    def __init__(self, pid, stdout, wait, ends):
        self.pid, self.stdout, self.wait, self.ends = pid, stdout, wait, ends


class ForkedPython:
    """Start commands by fork; one at a time. imports: the modules that they find imported. See the module."""

    def __init__(self, *imports):
        self.imports = imports or ("torch",)

    def __enter__(self):
        if hasattr(os, "fork"):
            kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
            self.folder = tempfile.TemporaryDirectory()
            self.process = subprocess.Popen([sys.executable, "-c", SERVER, *self.imports], text=True, cwd=ROOT, env=kept,
                                            stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            assert self.process.stdout.readline() == "ready\n"
        return self

    def __exit__(self, *_):
        if hasattr(os, "fork"):
            self.process.kill()
            self.process.communicate()
            self.folder.cleanup()

    def __call__(self, *words, cwd=ROOT, env=None):
        """Run `python *words` to its end. words: -m and a module, -c and code, or a file; then arguments."""
        if not hasattr(os, "fork"):
            return subprocess.run([sys.executable, *words], cwd=cwd, env=env, stdin=subprocess.DEVNULL, capture_output=True,
                                  text=True)
        return self.start(*words, cwd=cwd, env=env).wait()

    def start(self, *words, cwd=ROOT, env=None):
        """Start `python *words`; wait for it before the next one is started."""
        streams = [Path(self.folder.name, name) for name in ("out", "err")]
        for stream in streams:
            stream.write_bytes(b"")
        asked = {"words": [str(word) for word in words], "cwd": str(cwd), "env": dict(os.environ if env is None else env),
                 "out": str(streams[0]), "err": str(streams[1])}
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        pid = int(self.process.stdout.readline())

        def ended():
            code = int(self.process.stdout.readline())
            return subprocess.CompletedProcess(words, code, *(stream.read_text(encoding="utf-8") for stream in streams))
        return Child(pid, streams[0], ended, self.process.stdout)
