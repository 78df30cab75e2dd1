"""The parts that all commands share: flags and their types, exit codes, progress, and errors as one sentence.

A command is a parser, a body and three lines; results go to stdout (`result`), progress and remarks to stderr (`say`):

    def main(argv=None):
        return cli.run_command(_body, _parser(), argv)

    if __name__ == "__main__":
        cli.leave(main())

The exit code says what failed. An option's value is checked before any input is touched: a ValueError there is a
usage error (2). One that `each_file` meets while it works on a file belongs to that file (1), and the next file goes on.
Weights that cannot be had end the run (3). Importing this file loads neither torch nor the hub: --help is instant.
"""

import argparse
import contextlib
import errno
import os
import re
import signal
import sys
import threading
import traceback
import warnings
from fractions import Fraction
from pathlib import Path
from unicodedata import category

from . import PROGRAM, memory
from .files.json_text import to_json
from .files.listing import EARLIER
from .files.ranks import meet
from .models.sources import EDITORS

OK, SOME_FAILED, USAGE, UNAVAILABLE, INTERRUPTED, TERMINATED = 0, 1, 2, 3, 130, 143

REORDERING = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"

# Errors of the place that results are written to: the next file would fail as this one did, after minutes of work.
REMEDIES = {
    errno.ENOSPC: "; free some space and run the same command again",
    errno.EDQUOT: "; free some space and run the same command again",
    errno.EROFS: "; choose another folder",
}


# ------------------------------------------------------------------------------------------------- parser and its types

class Parser(argparse.ArgumentParser):
    """argparse whose usage errors are one sentence and exit code 2, with the flags that commands share.

    `command` is the module's name in the package; `examples` is shown below the options as it is written, where
    %(prog)s stands for the command. Options cannot be abbreviated: an abbreviation breaks when an option is added.
    """

    def __init__(self, command, description, examples=""):
        super().__init__(prog=f"{PROGRAM}.{command}", description=description, epilog=examples,
                         formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)

    def error(self, message):
        message = shown(" ".join(message.split()).removeprefix("argument "))
        self.exit(USAGE, f"{self.prog}: {message} (--help shows the usage)\n")

    def shared(self, *names):
        """Add the shared flags called `names` (keys of SHARED), and those that every command has."""
        for name in (*names, "json", "quiet", "debug"):
            self.add_argument(f"--{name}", **SHARED[name])

    def editor(self, several=""):
        """Add the flags that choose an editor: see `load_editor`. several: a remark, where --editor may be given repeatedly."""
        add = self.add_argument
        add("--editor", **({"action": "append"} if several else {"default": "miniature"}),
            help=f"{', '.join(EDITORS)}, a folder in the published layout, a single file of Stable Diffusion 3 or FLUX, "
                 f"a hub id, latents[:ITEM,ITEM], or MODULE:NAME{several}")
        add("--revision", help="of a hub repository (a commit, tag or branch)")
        add("--components", metavar="FOLDER-OR-NAME", help="where a single file's text encoders and tokenizers come from")
        add("--no-t5", dest="t5", action="store_false",
            help="do without Stable Diffusion 3's largest text encoder (9.5 GB less)")
        add("--strength", type=fraction, help="of img2img, 0 to 1: how much may change (default: the editor's)")

    def memory(self):
        """Add the flag that chooses a memory plan: see `memory.plans`."""
        self.add_argument("--memory", choices=memory.MEMORY, default="auto",
                          help="fast: whatever it takes; low: as little as possible, slower, for the edits of a preview too; "
                               "auto (default): gives way where memory ends")


def eps(text):
    """A budget, `0.03` or `8/255`, as a fraction of the pixel range. Less than one 8-bit step would change no file."""
    value = _number(text, Fraction)
    if not Fraction(1, 255) <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is no budget: give a fraction of the pixel range, from 1/255 to 1, "
                                         "such as 0.03 or 8/255")
    return float(value)


def count(text):
    """A whole number, at least 1."""
    value = _number(text, int)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1")
    return value


def number(text):
    """A finite number; `1/255` works too."""
    return _number(text, lambda text: float(Fraction(text)))


def fraction(text):
    """A number from 0 to 1."""
    value = number(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def positive(text):
    """A number above 0."""
    value = number(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def seed(text):
    """The seed of a generator: a whole number from 0 to 2**63 - 1."""
    value = _number(text, int)
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"{text} is no seed: give a whole number from 0 to 2**63 - 1")
    return value


def prompt(text):
    """A text that is not blank."""
    if not text.strip():
        raise argparse.ArgumentTypeError("the text is empty")
    return text


def path(text):
    """A path that is not empty. An unset shell variable leaves an empty one, which would mean the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("the name is empty")
    return Path(text)


def commas(item=str):
    """The type of a comma list: `a,b,c` -> [item(a), item(b), item(c)]; a comma at the end is allowed."""
    def items(text):
        parts = [part.strip() for part in text.removesuffix(",").split(",")]
        if "" in parts:
            raise argparse.ArgumentTypeError(f"{text!r} has an empty item; write it like a,b,c")
        return [item(part) for part in parts]
    return items


def timesteps(text):
    """`10` -> 10, a count of timesteps; `900,500,100` -> those timesteps, 0 to 999 (`500,` is one: the comma tells)."""
    if "," not in text:
        if (value := count(text)) > 1000:
            raise argparse.ArgumentTypeError(f"{text} timesteps are more than there are: 1000")
        return value
    values = [_number(part, int) for part in commas()(text)]
    if wrong := [value for value in values if not 0 <= value < 1000]:
        raise argparse.ArgumentTypeError(f"{wrong[0]} is no timestep: they run from 0 to 999")
    return values


def device(text):
    """The name of a device. `place` checks later that this machine has it."""
    if not re.fullmatch(r"(cpu|mps|(cuda|xpu)(:\d+)?)", text):
        raise argparse.ArgumentTypeError(f"{text} is no device: give cpu, cuda, cuda:1 or mps")
    return text


def _number(text, kind):
    try:
        return kind(text)
    except (ValueError, ArithmeticError):                    # 1/0; 1e999 is no float
        raise argparse.ArgumentTypeError(f"{text!r} is not a {'whole ' if kind is int else ''}number") from None


DTYPES = "float32", "bfloat16", "float16"
SHARED = {
    "device": {"type": device, "help": "cpu, cuda, cuda:1 or mps (default: cuda where there is one, else cpu)"},
    "dtype": {"choices": DTYPES, "help": "of the networks (default: bfloat16 on cuda, float16 on cards without it)"},
    "vae-dtype": {"choices": DTYPES,
                  "help": "of the VAE (default: float32; bfloat16 is faster, and pictures decoded in it are a little off)"},
    "seed": {"type": seed, "default": 0, "help": "of everything drawn (default: 0)"},
    "overwrite": {"action": "store_true", "help": "replace results that exist already"},
    "json": {"action": "store_true", "help": "results on stdout as JSON, one object a line"},
    "quiet": {"action": "store_true", "help": "no progress and no remarks; errors are still told"},
    "debug": {"action": "store_true", "help": "show the traceback of an error"},
}


def place(args):
    """--device, --dtype and --vae-dtype as `load_editor` takes them, by name; None where not given, or no option here.

    Processes that torchrun started take one GPU after the other. Raises ValueError where this machine has no such device.
    """
    import torch
    device = _device_of_rank(args.device, os.environ)
    if args.device:
        try:
            torch.empty(0, device=args.device)
        except (RuntimeError, AssertionError, NotImplementedError):      # torch built without it: an AssertionError
            raise ValueError(f"--device {args.device}: not on this machine, or not with its torch {torch.__version__}; "
                             "leave the option out for what is there") from None
    dtypes = {name: getattr(args, name, None) for name in ("dtype", "vae_dtype")}
    return {"device": device, **{name: given and getattr(torch, given) for name, given in dtypes.items()}}


def _device_of_rank(asked, environment):
    """The device of a process that torchrun started: its own GPU, or one that it shares; else the one that was asked for."""
    import torch
    local, count = environment.get("LOCAL_RANK", ""), environment.get("LOCAL_WORLD_SIZE", "")
    if not local.isdecimal() or asked not in (None, "cuda") and not asked.startswith("cuda:") or not torch.cuda.is_available():
        return asked
    if asked not in (None, "cuda"):
        if count.isdecimal() and int(count) > 1:
            raise ValueError(f"--device {asked}: torchrun started {count} processes, and all would share this GPU; leave the "
                             "option out, and each takes its own")
        return asked
    cards = torch.cuda.device_count()
    if int(local) >= cards:
        warnings.warn(f"torchrun started more processes than the {cards} GPU(s) that this one sees: it shares GPU "
                      f"{int(local) % cards}; --nproc-per-node {cards} gives each its own", stacklevel=2)
    return f"cuda:{int(local) % cards}"


# ------------------------------------------------------------------------------------------------ results and remarks

def out(text):
    """Print a line of results to stdout."""
    _write(text, sys.stdout)


def result(record, text, *, as_json=False):
    """Print a finished result to stdout: the JSON-ready `record` with --json, otherwise its `text`."""
    out(to_json(record) if as_json else text)


def shown(text):
    """Text as a terminal may show it: control characters, and those that reorder a line, as escapes."""
    return "".join(letter.encode("unicode_escape").decode() if letter in REORDERING or (
        category(letter) in ("Cc", "Zl", "Zp") and letter != "\t") else letter for letter in text)


def say(text, *, quiet=False):
    """Print a remark to stderr."""
    if not quiet:
        _write(text, sys.stderr)


def say_notes(path, notes, *, quiet=False):
    """Say on stderr what reading a picture changed (`images.Picture.info["notes"]`), with the file's name before each."""
    for note in notes:
        say(f"{path}: {note}", quiet=quiet)


def say_editor(editor, *, quiet=False):
    """Say on stderr what a user should know of an editor: its notice, and a sampler that is not the stored one."""
    for remark in (editor.notice, getattr(getattr(editor, "scheduler", None), "note", "")):
        if remark:
            say(remark, quiet=quiet)


def fail(text, code=SOME_FAILED, *, error=None):
    """Print one sentence on stderr, below the traceback of `error` if there is one, and return `code`."""
    if error:
        say("".join(traceback.format_exception(error)).rstrip())
    say(f"error: {text}")
    return code


def sentence(error):
    """The message of an exception as one line, with the file it concerns."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: " if error.filename is not None else ""
        text += error.strerror[:1].lower() + error.strerror[1:] + REMEDIES.get(error.errno, "")
    return " ".join(text.split()) or type(error).__name__


def progress(iterable=None, *, total=None, what="", unit="step", quiet=False):
    """A progress bar with the time left, on stderr; none with --quiet, or where stderr is not a terminal.

    Iterate over it, or call `.update()`; use it in a `with`, so that an error leaves a clean line.
    """
    from huggingface_hub.utils import tqdm
    return tqdm(iterable, total=total, desc=shown(what) or None, unit=unit, disable=quiet or None, leave=False,
                dynamic_ncols=True, file=sys.stderr)


def _write(text, file):
    encoding = getattr(file, "encoding", None) or "utf-8"
    text = "\n".join(map(shown, text.split("\n"))).encode(encoding, "backslashreplace").decode(encoding)
    try:
        if hub := sys.modules.get("huggingface_hub.utils"):
            hub.tqdm.write(text, file=file)                  # above a running bar, not through it
        else:
            print(text, file=file)
        file.flush()                                         # a full disk or a closed pipe shows here, not at exit
    except OSError:
        with contextlib.suppress(OSError, ValueError):       # Python flushes the rest at exit, and would fail once more
            os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())
        raise


# ------------------------------------------------------------------------------------------------------- running

def run_command(body, parser, argv=None):
    """Parse and run a command: body(args) -> exit code or None. Returns the code; a user's mistake is one sentence."""
    _open_streams()
    debug = False

    def parsed():
        nonlocal debug
        args = parser.parse_args(argv)
        debug = args.debug
        code = body(args) or OK
        meet(os.environ, wait=code == SOME_FAILED)
        return code

    return guard(parsed, debug=lambda: debug)


def guard(body, *, debug=lambda: False):
    """body() -> exit code or None. Expected errors (not our own bugs) end in one sentence and their code.

    SIGINT ends with 130 and SIGTERM, which batch systems send, with 143; temporary files are removed on the way.
    """
    with Signals() as signals:
        try:
            with _plain_warnings(), memory.in_words():
                code = body() or OK
        except SystemExit as stop:                           # --help, or a usage error that argparse has printed
            code = stop.code or OK
        except BrokenPipeError:                              # the reader has ended, as `| head` does
            code = SOME_FAILED
        except (_unavailable(), ValueError, OSError) as error:           # in this order: some errors are two of them
            codes = ((_unavailable(), UNAVAILABLE), (ValueError, USAGE), (OSError, SOME_FAILED))
            code = next(code for kind, code in codes if isinstance(error, kind))
            fail(sentence(error), code, error=error if debug() else None)
    if signals.received:
        return fail("interrupted; what is finished is whole", signals.code)
    return code


class Signals:
    """While it is open, SIGINT and SIGTERM raise KeyboardInterrupt, and any error that follows from one is dropped.

    received: the first signal, or None. An extension module may turn the exception into another error, or swallow it;
    `received` stays.
    """

    received = None

    def __enter__(self):
        self._before = {}
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) == signal.SIG_IGN:   # a shell's background job ignores Ctrl-C, and so do we
                continue
            try:
                self._before[number] = signal.signal(number, self._receive)
            except ValueError:                               # not in the main thread, where handlers cannot be set
                break
        return self

    def _receive(self, number, frame):
        if getattr(getattr(sys.modules.get("torch"), "__spec__", None), "_initializing", False):
            # An exception that passes through torch's C++ while it is imported aborts the process: try again soon.
            wake = getattr(signal, "pthread_kill", lambda thread, number: signal.raise_signal(number))       # not on Windows
            again = threading.Timer(0.1, wake, [threading.main_thread().ident, number])
            again.daemon = True
            return again.start()
        self.received = self.received or number
        raise KeyboardInterrupt

    def __exit__(self, kind, error, trace):
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        if isinstance(error, KeyboardInterrupt):             # also one that no signal sent
            self.received = self.received or signal.SIGINT
        return self.received is not None

    @property
    def code(self):
        return TERMINATED if self.received == signal.SIGTERM else INTERRUPTED


def leave(code):
    """End the process with this exit code. A signal from here on ends it at once, as the system does it."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    if code in (INTERRUPTED, TERMINATED):
        # Python remembers a KeyboardInterrupt that passed through an exec(), as modules use when they are imported, and would
        # end as if by SIGINT whatever the exit code. The streams are flushed: `_write` does it.
        os._exit(code)
    sys.exit(code)


def _open_streams():
    """Put the null device in place of standard streams that were closed before the start (daemons, `>&-`).

    Else the next file to be opened would get the number of the closed stream, and receive its output.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))             # noqa: SIM115


def each_file(paths, work, *, output=None, left_out=None, done="done", unit="picture", quiet=False, debug=False,
              as_json=False):
    """Call work(path) for each file. A file that fails is reported, once more at the end, and the next one goes on.

    left_out: {reason: [path, ...]} of files that are not worked on; the end of the run names them. done: the participle
    for what work does, as "immunized".

    A ValueError or OSError belongs to its file. The run ends where every further file would fail the same way: weights
    unavailable, the folder `output` gone, its disk full or read-only, the reader of stdout gone, Ctrl-C.
    Returns OK or SOME_FAILED.
    """
    paths, failures, finished = list(paths), [], 0
    try:
        with progress(total=len(paths), what="files", unit=unit, quiet=quiet or len(paths) == 1) as bar:
            for path in paths:
                try:
                    with memory.in_words():
                        work(path)
                except (ValueError, OSError) as error:
                    if output is not None and not Path(output).is_dir():
                        raise OSError(errno.ENOENT, "the folder for results is gone", str(output)) from error
                    if _hopeless(error):
                        raise
                    text = sentence(error)
                    failures.append(text if Path(path).name in text else f"{path}: {text}")
                    fail(failures[-1], error=error if debug else None)
                    if as_json:
                        out(to_json({"file": path, "error": failures[-1]}))
                finished += 1
                bar.update()
    finally:
        if len(paths) > 1 and (failures or finished < len(paths)):
            say(f"{finished - len(failures)} of {len(paths)} {unit}s done, {len(failures)} failed{':' if failures else ''}")
            for line in failures:
                say(f"  {line}")
        _tell_left_out(left_out or {}, done, quiet, as_json)
    return SOME_FAILED if failures else OK


def _tell_left_out(left_out, done, quiet, as_json):
    """Name the files that were not worked on, by reason; --quiet silences only the results of earlier runs."""
    if quiet:
        left_out = {reason: paths for reason, paths in left_out.items() if reason != EARLIER}
    count = sum(map(len, left_out.values()))
    if count:
        say(f"{count} file{'s were' if count > 1 else ' was'} not {done}:")
    for reason, paths in left_out.items():
        say(f"  {reason}: {', '.join(shown(str(path)) for path in paths)}")
        for path in paths if as_json else ():
            out(to_json({"file": path, "left_out": reason}))


def _hopeless(error):
    """True if every further file would fail the same way."""
    return isinstance(error, (BrokenPipeError, _unavailable())) or getattr(error, "errno", None) in REMEDIES


def _unavailable():
    from .models.checkpoints import Unavailable
    return Unavailable


@contextlib.contextmanager
def _plain_warnings():
    """Print a warning as a remark of one sentence, once in a run, without the line of code that gave it."""
    printed = set()

    def remark(message, *where, **how):
        if (text := sentence(message)) not in printed:
            printed.add(text)
            say(f"note: {text}")

    with warnings.catch_warnings():
        warnings.showwarning = remark
        yield
