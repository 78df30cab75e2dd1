"""Commands: exit codes, one sentence per mistake, streams, interruption."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from argparse import ArgumentTypeError
from pathlib import Path

import pytest
from outcomes import told

from sifm_min import cli
from sifm_min.models.checkpoints import Unavailable

ROOT = Path(__file__).resolve().parents[1]


def parser():
    made = cli.Parser("immunize", "Immunize pictures.", "example:\n  %(prog)s photo.png")
    made.add_argument("--eps", type=cli.eps, default=0.03)
    made.add_argument("--prompt", type=cli.prompt, action="append", required=True)
    made.add_argument("--timesteps", type=cli.timesteps, default=10)
    made.add_argument("--taps", type=cli.commas())
    made.shared("device", "dtype", "seed", "overwrite")
    return made


def run(body, *argv):
    return cli.run_command(body, parser(), ["--prompt", "a witch", *argv])


# -- types -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, value",
    [("0.03", 0.03), ("8/255", 8 / 255), ("1", 1.0), ("1/255", 1 / 255), ("16/255", 16 / 255)])
def test_eps(text, value):
    assert cli.eps(text) == value


@pytest.mark.parametrize("text", ["300", "0", "-0.03", "0.003", "1.01", "nan", "inf", "8/0", "8 of 255", ""])
def test_eps_refuses(text):
    with pytest.raises(ArgumentTypeError):
        cli.eps(text)


@pytest.mark.parametrize("kind, good, bad", [
    (cli.count, {"1": 1, "100": 100}, ["0", "-3", "2.5", "many", ""]),
    (cli.number, {"0.1": 0.1, "-2": -2.0, "1/4": 0.25}, ["nan", "inf", "-inf", "x", "1/0", "1e999"]),
    (cli.fraction, {"0": 0.0, "1": 1.0, "0.6": 0.6}, ["-0.1", "1.1", "nan"]),
    (cli.positive, {"0.1": 0.1}, ["0", "-1", "nan"]),
    (cli.seed, {"0": 0, str(2**63 - 1): 2**63 - 1}, ["-1", str(2**63), "1.5", "x"]),
    (cli.prompt, {"a b": "a b"}, ["", "  ", "\n"]),
    (cli.path, {"a": Path("a"), " ": Path(" "), "..": Path("..")}, [""]),
    (cli.commas(), {"a": ["a"], "a, b": ["a", "b"], "a,": ["a"]}, ["", "a,,b", ","]),
    (cli.commas(cli.count), {"1,2": [1, 2]}, ["1,0", "1,x"]),
    (cli.timesteps, {"10": 10, "900,500": [900, 500], "500,": [500], "0,999": [0, 999]},
     ["0", "1001", "1000,", "-1,", "5.5", ","]),
    (cli.device, {"cpu": "cpu", "cuda": "cuda", "cuda:1": "cuda:1"}, ["gpu", "cuda:", "cpu:0:1", "meta", ""]),
], ids=lambda value: getattr(value, "__name__", ""))
def test_types(kind, good, bad):
    for text, value in good.items():
        assert kind(text) == value
    for text in bad:
        with pytest.raises(ArgumentTypeError):
            kind(text)


# -- usage errors ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("argv, says", [
    (["--eps", "300"], "--eps: 300 is no budget: give a fraction of the pixel range"),
    (["--eps", "a\nb"], "is not a number"),
    (["--prompt", ""], "--prompt: the text is empty"),
    (["--dtype", "int8"], "--dtype: invalid choice"),
    (["--no-such"], "unrecognized arguments: --no-such"),
    (["--over"], "unrecognized arguments: --over"),          # no abbreviations
])
def test_usage_errors_are_one_sentence_and_code_2(capsys, argv, says):
    assert run(lambda args: pytest.fail("the body ran"), *argv) == cli.USAGE
    line = told(capsys)
    assert says in line and line.startswith("python -m sifm_min.immunize: ")


def test_a_missing_option_is_a_usage_error(capsys):
    assert cli.run_command(lambda args: None, parser(), []) == cli.USAGE
    assert "--prompt" in told(capsys)


def test_help(capsys):
    assert cli.run_command(lambda args: None, parser(), ["--help"]) == cli.OK
    shown = capsys.readouterr()
    assert "python -m sifm_min.immunize photo.png" in shown.out and shown.err == ""


def test_shared_flags():
    args = parser().parse_args(["--prompt", "x", "--device", "cuda:0", "--dtype", "float16", "--seed", "7", "--json"])
    assert (args.device, args.dtype, args.seed, args.json) == ("cuda:0", "float16", 7, True)
    assert (args.overwrite, args.quiet, args.debug) == (False, False, False)


def test_place():
    import torch
    args = parser().parse_args(["--prompt", "x", "--device", "cpu", "--dtype", "bfloat16"])
    assert cli.place(args) == {"device": "cpu", "dtype": torch.bfloat16, "vae_dtype": None}
    made = parser()
    made.add_argument("--vae-dtype", **cli.SHARED["vae-dtype"])
    args = made.parse_args(["--prompt", "x", "--vae-dtype", "float16"])
    assert cli.place(args) == {"device": None, "dtype": None, "vae_dtype": torch.float16}


def test_a_device_that_is_not_there_is_a_usage_error(capsys):
    assert run(lambda args: cli.place(args) and None, "--device", "cuda:63") == cli.USAGE
    assert "--device cuda:63" in told(capsys)


# -- the body's errors -------------------------------------------------------------------------------------------------

def raising(error):
    def body(args):
        raise error
    return body


@pytest.mark.parametrize("error, code, says", [
    (ValueError("--taps nothing: no such tap"), cli.USAGE, "error: --taps nothing: no such tap\n"),
    (Unavailable("sd3 is gated; accept its licence"), cli.UNAVAILABLE, "error: sd3 is gated; accept its licence\n"),
    (type("Unfit", (Unavailable, ValueError), {})("damaged"), cli.UNAVAILABLE, "error: damaged\n"),
    (OSError(errno.ENOSPC, "No space left on device", "/full/a.png"), cli.SOME_FAILED,
     "error: /full/a.png: no space left on device; free some space and run the same command again\n"),
    (PermissionError(errno.EACCES, "Permission denied", "/x"), cli.SOME_FAILED, "error: /x: permission denied\n"),
    (FileExistsError("a.png exists already"), cli.SOME_FAILED, "error: a.png exists already\n"),
    (ValueError("two\n  lines"), cli.USAGE, "error: two lines\n"),
    (ValueError(), cli.USAGE, "error: ValueError\n"),
    (KeyboardInterrupt(), cli.INTERRUPTED, "error: interrupted; what is finished is whole\n"),
])
def test_errors_become_a_sentence_and_a_code(capsys, error, code, says):
    assert run(raising(error)) == code
    assert told(capsys) == says


def test_debug_shows_the_traceback(capsys):
    assert run(raising(ValueError("why")), "--debug") == cli.USAGE
    told = capsys.readouterr().err
    assert "Traceback" in told and told.endswith("error: why\n")


def test_our_own_bugs_are_not_hidden():
    with pytest.raises(KeyError):
        run(raising(KeyError("bug")))


@pytest.mark.parametrize("returned, code", [(None, 0), (0, 0), (1, 1)])
def test_the_bodys_code_is_returned(returned, code):
    assert run(lambda args: returned) == code


def test_leave():
    with pytest.raises(SystemExit) as stop:
        cli.leave(3)
    assert stop.value.code == 3


# -- files -------------------------------------------------------------------------------------------------------------

def test_failed_files_are_listed_and_the_others_done(capsys):
    seen = []

    def work(path):
        seen.append(path)
        if path == "b.png":
            raise ValueError("b.png: a truncated picture")
        if path == "c.png":
            raise OSError(errno.EACCES, "Permission denied", "out/other.png")

    assert cli.each_file(["a.png", "b.png", "c.png", "d.png"], work) == cli.SOME_FAILED
    assert seen == ["a.png", "b.png", "c.png", "d.png"]
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "error: b.png: a truncated picture",
        "error: c.png: out/other.png: permission denied",
        "2 of 4 pictures done, 2 failed:",
        "  b.png: a truncated picture",
        "  c.png: out/other.png: permission denied",
    ]


def test_each_file_is_silent_when_all_is_well(capsys):
    assert cli.each_file(["a", "b"], lambda path: None) == cli.OK
    assert capsys.readouterr() == ("", "")


def test_one_file_that_fails_is_told_once(capsys):
    def work(path):
        raise ValueError("a.png: not a picture")
    assert cli.each_file([Path("a.png")], work) == cli.SOME_FAILED
    assert told(capsys) == "error: a.png: not a picture\n"


def test_each_file_tells_failures_as_json(capsys):
    def work(path):
        if path.name == "b.png":
            raise ValueError("no")
        cli.result({"file": path, "psnr": float("inf")}, "text", as_json=True)
    assert cli.each_file([Path("a.png"), Path("b.png")], work, as_json=True) == cli.SOME_FAILED
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == [
        {"file": "a.png", "psnr": "inf"}, {"file": "b.png", "error": "b.png: no"}]


@pytest.mark.parametrize("error, code", [
    (Unavailable("gone"), cli.UNAVAILABLE),
    (type("Unfit", (Unavailable, ValueError), {})("damaged"), cli.UNAVAILABLE),
    (OSError(errno.ENOSPC, "No space left on device", "b"), cli.SOME_FAILED),
    (OSError(errno.EROFS, "Read-only file system", "b"), cli.SOME_FAILED),
    (KeyboardInterrupt(), cli.INTERRUPTED),
])
def test_error_that_every_file_would_meet_ends_the_run(capsys, error, code):
    seen = []

    def work(path):
        seen.append(path)
        if path == "b":
            raise error

    assert run(lambda args: cli.each_file("abc", work)) == code
    assert seen == ["a", "b"]
    told = capsys.readouterr().err.splitlines()
    assert told[0] == "1 of 3 pictures done, 0 failed" and told[1].startswith("error: ") and len(told) == 2


# -- streams and processes ---------------------------------------------------------------------------------------------

def test_results_go_to_stdout_and_remarks_to_stderr(capsys):
    cli.result({"a": 1}, "saved", as_json=False)
    cli.say("thinking")
    cli.say("not this", quiet=True)
    assert capsys.readouterr() == ("saved\n", "thinking\n")


def test_json_is_json():
    record = {"inf": float("inf"), "low": -float("inf"), "nan": float("nan"), "path": Path("a/b"),
              "deep": [(1, 2.5, None)], 3: True}
    assert json.loads(cli.to_json(record, indent=1), parse_constant=pytest.fail) == {
        "inf": "inf", "low": "-inf", "nan": "nan", "path": "a/b", "deep": [[1, 2.5, None]], "3": True}
    with pytest.raises(TypeError):
        cli.to_json({"a": object()})


def test_no_bar_where_stderr_is_not_a_terminal(capsys):
    with cli.progress(range(3), what="steps") as bar:
        assert list(bar) == [0, 1, 2]
    assert capsys.readouterr() == ("", "")


def python(code, stdout=subprocess.PIPE, **variables):
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"} | variables
    return subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, text=True, stdout=stdout, stderr=subprocess.PIPE, env=variables)


def test_importing_is_silent_and_light():
    heavy = "('torch', 'numpy', 'PIL', 'huggingface_hub', 'requests')"
    process = python(f"import sys, sifm_min.cli; sys.exit(' '.join(m for m in {heavy} if m in sys.modules) or 0)")
    assert process.communicate() == ("", "")
    assert process.returncode == 0


COMMAND = """
import signal, time
from sifm_min import cli
signal.signal(signal.SIGINT, signal.default_int_handler)         # a shell's background job ignores it, and so its children
parser = cli.Parser('x', '')
parser.shared()
def work(path):
    cli.out(path)
    time.sleep(SECONDS if path == "b" else 0)
cli.leave(cli.run_command(lambda args: cli.each_file("abc", work), parser, []))
"""


@pytest.mark.slow
@pytest.mark.parametrize("sent, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_runs_end_with_their_code_and_no_traceback(sent, code):
    process = python(COMMAND.replace("SECONDS", "30"))
    assert [process.stdout.readline() for _ in range(2)] == ["a\n", "b\n"]
    time.sleep(0.1)
    process.send_signal(sent)
    written, told = process.communicate(timeout=20)
    assert process.returncode == code
    assert written == ""
    assert told == "1 of 3 pictures done, 0 failed\nerror: interrupted; what is finished is whole\n"


def test_a_closed_pipe_is_no_traceback():
    process = python(COMMAND.replace("SECONDS", "0.2"))
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() in ("", "1 of 3 pictures done, 0 failed\n", "2 of 3 pictures done, 0 failed\n")
    assert process.wait(20) == cli.SOME_FAILED


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_a_full_disk_behind_stdout_is_one_sentence():
    with open("/dev/full", "w") as full:
        process = python(COMMAND.replace("SECONDS", "0"), stdout=full)
        told = process.communicate()[1]
    assert process.returncode == cli.SOME_FAILED
    assert told.splitlines()[-1].startswith("error: no space left on device")
    assert "Traceback" not in told and "Exception ignored" not in told


def test_a_name_that_the_terminal_cannot_show_is_escaped():
    process = python("from sifm_min import cli; cli.out('caf\\udce9.png')", PYTHONIOENCODING="ascii")
    assert process.communicate() == ("caf\\udce9.png\n", "")


def test_warning_is_one_remark_in_a_run(capsys):
    """The same sentence comes from every picture of a folder."""
    def work(path):
        with warnings.catch_warnings():                      # as libraries do, after which Python forgets what it has shown
            warnings.simplefilter("always")
            warnings.warn("the prompt is cut", stacklevel=1)
        warnings.warn(f"about {path}", stacklevel=1)

    assert cli.guard(lambda: cli.each_file("ab", work)) == cli.OK
    assert capsys.readouterr().err == "note: the prompt is cut\nnote: about a\nnote: about b\n"
