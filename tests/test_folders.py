"""Folders as users have them: nothing is passed over in silence, nothing is lost, and each run knows what is its own."""

import argparse
import errno
import hashlib
import importlib.machinery
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from photographs import photo

from sifm_min import cli, compare, edit, images
from sifm_min.files import ledger, listing, reports, weight_digests, writing
from sifm_min.immunizing import previews

ROOT = Path(__file__).resolve().parents[1]
immunize_module = importlib.import_module("sifm_min.immunize")


@pytest.fixture
def run(tiny_folder, tmp_path, monkeypatch):
    """Run `immunize` on the tiny editor with one step of a cheap method, in tmp_path."""
    monkeypatch.chdir(tmp_path)
    return lambda *argv: immunize_module.main(
        ["-o", "out", "--prompt", "x", "--editor", str(tiny_folder), "--steps", "1", "--method", "photoguard-encoder", *argv])


def made(folder="out"):
    return sorted(path.name for path in Path(folder).iterdir())


# ------------------------------------------------------------------------------------------------- nothing in silence

def test_folder_names_everything_it_leaves_out(run, capsys):
    for name in ("a.png", "b.jpe", "c.mpo", "d.apng", "holiday_preview.png", "cat_immunized.png", "more/g.png", ".h.png"):
        photo(Path("in", name), seed=len(name))
    Path("in/e.heic").write_bytes(b"\0\0\0\x18ftypheic")
    Path("in/notes.txt").write_text("hello")
    Path("in/f.png").symlink_to("moved-away.png")
    assert run("in", "--no-preview") == cli.SOME_FAILED
    err = capsys.readouterr().err
    assert [name for name in made() if name.endswith(".png")] == [
        f"{stem}_immunized.png" for stem in ("a", "b", "c", "cat_immunized", "d", "holiday_preview")]
    assert "6 of 8 pictures done, 2 failed:" in err
    assert err.count("e.heic") == 2 and err.count("f.png") == 2          # when it failed, and at the end
    assert "2 files were not immunized:" in err
    assert "no picture, by its name: in/notes.txt" in err and "in/more" in err and ".h.png" not in err


def test_left_out_files_are_in_the_json(run, capsys):
    photo("in/a.png")
    Path("in/notes.txt").touch()
    assert run("in", "--no-preview", "--json", "--quiet") == cli.OK
    out, err = capsys.readouterr()
    assert json.loads(out.splitlines()[-1]) == {"file": "in/notes.txt", "left_out": "no picture, by its name"}
    assert err == "1 file was not immunized:\n  no picture, by its name: in/notes.txt\n"


@pytest.mark.slow
def test_results_are_left_out_where_a_report_says_so(run, capsys):
    photo("in/a.png")
    assert run("in", "-o", "in") == cli.OK
    photo("in/b_immunized.png", seed=5)                      # a user's own picture
    capsys.readouterr()
    assert run("in", "-o", "in", "--no-preview") == cli.OK
    err = capsys.readouterr().err
    assert "the result of an earlier run (name it, to have it all the same): in/a.json, in/a_immunized.png, in/a_" in err
    assert "b_immunized_immunized.png" in made("in") and "a_immunized_immunized.png" not in made("in")
    assert run("in/a_immunized.png", "--no-preview") == cli.OK           # named, so it is immunized
    assert "a_immunized_immunized.png" in made("out")


def test_edits_are_results_too(tiny_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    photo("in/a.png"), photo("in/b_edited.png", seed=1)
    argv = ["--prompt", "x", "--editor", str(tiny_folder), "-o", "in", "--steps", "1"]
    assert edit.main(["in", *argv]) == cli.OK
    first = {name: Path("in", name).stat().st_mtime_ns for name in made("in")}
    assert sorted(first) == ["a.png", "a_edited.json", "a_edited.png", "b_edited.png", "b_edited_edited.json",
                             "b_edited_edited.png"]
    assert edit.main(["in", *argv]) == cli.OK
    assert {name: Path("in", name).stat().st_mtime_ns for name in made("in")} == first
    assert "in/a.png: done before, skipped" in capsys.readouterr().err
    assert edit.main(["in/a.png", *argv, "--seed", "1"]) == cli.SOME_FAILED
    assert "a_edited.png exists, from another picture or other options" in capsys.readouterr().err


@pytest.mark.slow
def test_compare_names_the_previews_it_leaves_out(run, capsys):
    photo("in/a.png"), photo("in/x_preview.png", seed=3)
    assert run("in") == cli.OK
    capsys.readouterr()
    assert compare.main(["out", "in", "--metrics", "linf"]) == cli.OK
    out, err = capsys.readouterr()
    assert "a_immunized.png" in out and "x_preview_immunized.png" in out and "mean of 2" in out
    assert "not compared:" in err and "out/a.json, out/a_preview.png, out/x_preview.json, out/x_preview_preview.png" in err


def test_list_pictures(tmp_path):
    for name in ("b.PNG", "a.jpg", ".hidden.png", "notes.txt"):
        (tmp_path / name).touch()
    (tmp_path / "sub.png").mkdir()
    pictures, left_out = listing.list_pictures([tmp_path / "x", tmp_path, tmp_path / "a.jpg"])
    assert pictures == [tmp_path / name for name in ("x", "a.jpg", "b.PNG")]
    assert left_out == {"no picture, by its name": [tmp_path / "notes.txt"],
                        "a folder in a folder (name it too, to have its pictures)": [tmp_path / "sub.png"]}
    with pytest.raises(ValueError, match="sub.png: no pictures in this folder"):
        listing.list_pictures([tmp_path / "sub.png"])
    named, left_out = listing.list_pictures([tmp_path, tmp_path / "notes.txt"])
    assert tmp_path / "notes.txt" in named and "no picture, by its name" not in left_out


# ------------------------------------------------------------------------------------------------ the main result first

@pytest.mark.slow
@pytest.mark.parametrize("error", [ValueError("the edit is not finite"), MemoryError(), RuntimeError("CUDA error: kernel")])
def test_failed_preview_costs_nothing_else(run, monkeypatch, capsys, error):
    def fail(*args, **options):
        raise error

    photo("a.png")
    with monkeypatch.context() as patched:
        patched.setattr(previews, "_shown", fail)
        assert run("a.png") == cli.OK
    out, err = capsys.readouterr()
    assert made() == ["a.json", "a_immunized.png"] and json.loads(Path("out/a.json").read_text())["finished"]
    assert out.startswith("a.png -> out/a_immunized.png: at most 7/255") and "no preview, because its edit failed" in err
    before = Path("out/a_immunized.png").stat().st_mtime_ns
    assert run("a.png") == cli.OK                            # the next run adds the preview, and only that
    assert made() == ["a.json", "a_immunized.png", "a_preview.png"]
    assert Path("out/a_immunized.png").stat().st_mtime_ns == before


# ---------------------------------------------------------------------------------------------------- two runs at once

@pytest.mark.slow
@pytest.mark.parametrize("place", ["before the results", "between report and picture"])
def test_same_question_from_two_runs_is_success(run, monkeypatch, capsys, place):
    photo("a.png")
    home, name = (images, "quantize") if place == "before the results" else (images, "write_checked")
    once, usual = [], getattr(home, name)

    def meanwhile(*args, **options):
        if not once:
            once.append(None)
            once[0] = run("a.png", "--no-preview")           # the other run, from its start to its end
        return usual(*args, **options)

    monkeypatch.setattr(home, name, meanwhile)
    assert run("a.png", "--no-preview") == cli.OK and once == [cli.OK]
    assert made() == ["a.json", "a_immunized.png"] and json.loads(Path("out/a.json").read_text())["finished"]
    assert "exists" not in capsys.readouterr().err


def test_another_question_at_the_same_time_is_refused(run, monkeypatch, capsys):
    photo("a.png")
    once, quantize = [], images.quantize

    def meanwhile(*args):
        if not once:
            once.append(None)
            once[0] = run("a.png", "--no-preview", "--seed", "1")
        return quantize(*args)

    monkeypatch.setattr(images, "quantize", meanwhile)
    assert run("a.png", "--no-preview") == cli.SOME_FAILED and once == [cli.OK]
    assert "--overwrite replaces it" in capsys.readouterr().err
    assert json.loads(Path("out/a.json").read_text())["options"]["seed"] == 1


def test_unfinished_report_of_a_killed_run_is_finished(run):
    photo("a.png")
    assert run("a.png", "--no-preview") == cli.OK
    report = json.loads(Path("out/a.json").read_text())
    Path("out/a.json").write_text(json.dumps({"finished": False, "asked": report["asked"]}))
    Path("out/a_immunized.png").unlink()
    assert run("a.png", "--no-preview") == cli.OK
    assert json.loads(Path("out/a.json").read_text())["finished"] and "a_immunized.png" in made()


# ------------------------------------------------------------------------------------- a folder that goes, files that stay

@pytest.mark.parametrize("how", ["deleted", "renamed"])
def test_output_folder_gone_ends_the_run(run, monkeypatch, capsys, how):
    for name in "abc":
        photo(f"in/{name}.png", seed=ord(name))
    quantize, seen = images.quantize, []

    def gone(*args):
        seen.append(1)
        Path("out").rename("elsewhere") if how == "renamed" else Path("out").rmdir()
        return quantize(*args)

    monkeypatch.setattr(images, "quantize", gone)
    assert run("in", "--no-preview") == cli.SOME_FAILED
    assert len(seen) == 1 and not Path("out").exists()
    assert "error: out: the folder for results is gone" in capsys.readouterr().err


def test_parts_of_a_killed_run_are_removed(run):
    photo("a.png")
    Path("out").mkdir()
    Path("out/.0123456789abcdef.part").write_bytes(b"half a picture")
    with writing._part(Path("out/b.png")) as alive:          # another run, at work on its file
        assert run("a.png", "--no-preview") == cli.OK
        assert alive.exists()
    assert made() == ["a.json", "a_immunized.png"]


# ---------------------------------------------------------------------------------------------- terminals and signals

COMMAND = """
import sys
from pathlib import Path
from sifm_min import cli
from sifm_min.files import writing
parser = cli.Parser('x', '')
parser.shared()
def work(path):
    cli.out(path)
    cli.say('remark')
    writing.write(Path(sys.argv[1]) / path, 'content')
cli.leave(cli.run_command(lambda args: cli.each_file('ab', work), parser, []))
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows has no closed standard streams")
@pytest.mark.parametrize("closed", [[1], [2], [1, 2], [0, 1, 2]])
def test_closed_streams_change_nothing(tmp_path, closed):
    def close():
        for number in closed:
            os.close(number)

    done = subprocess.run([sys.executable, "-c", COMMAND, str(tmp_path)], cwd=ROOT, preexec_fn=close, timeout=60,
                          stdout=None if 1 in closed else subprocess.PIPE, stderr=None if 2 in closed else subprocess.PIPE)
    assert done.returncode == cli.OK and b"Traceback" not in (done.stderr or b"")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "content", "b": "content"}


def test_control_characters_never_reach_the_terminal(run, capsys):
    evil = "in/\x1b]0;owned\x07\x9b31m\u202egnp.png"
    photo(evil)
    Path("in/\x1b[2J.txt").touch(), Path("in/\x1b[2J\n.heic").touch()
    assert run("in", "--no-preview") == cli.SOME_FAILED
    out, err = capsys.readouterr()
    assert not {"\x1b", "\x07", "\x9b", "\u202e"} & {*out, *err}
    assert "\\x1b[2J.txt" in err and "\\x1b]0;owned\\x07\\x9b31m\\u202egnp_immunized.png" in out


def test_control_characters_of_arguments_are_escaped(capsys):
    assert immunize_module.main(["a.png", "--eps", "\x1b[31m", "--prompt", "x", "-o", "out"]) == cli.USAGE
    assert "\x1b" not in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM to send")
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("delay", [0.25, 0.6, 1.2, 2.0, 3.0])
def test_signal_at_any_moment_has_its_code(tiny_folder, tmp_path, number, code, delay):
    """From start-up on: while modules are imported, while the editor is loaded, in the first steps."""
    photo(tmp_path / "a.png")
    process = subprocess.Popen(
        [sys.executable, "-m", "sifm_min.immunize", str(tmp_path / "a.png"), "--prompt", "x", "--editor", str(tiny_folder),
         "-o", str(tmp_path / "out"), "--steps", "100000"], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    time.sleep(delay)
    process.send_signal(number)
    err = process.communicate(timeout=60)[1].decode()
    assert process.returncode in (code, -number)             # -number: a shell says 128 + number, which is the code
    if process.returncode == code:
        assert err.endswith("error: interrupted; what is finished is whole\n") and "Traceback" not in err
    assert not list(tmp_path.glob("out/.*.part")) and not list(tmp_path.glob("out/*.png"))


@pytest.mark.slow
def test_signal_while_torch_is_imported_waits_for_it(monkeypatch):
    """C++ code of torch that is passed by an exception at that time aborts the process."""
    module = type(sys)("torch")
    module.__spec__ = importlib.machinery.ModuleSpec("torch", None)
    module.__spec__._initializing = True
    monkeypatch.setitem(sys.modules, "torch", module)

    def imported():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.3)                                      # stands for C++ code: nothing may be raised here
        module.__spec__._initializing = False
        time.sleep(5)
        pytest.fail("the signal was lost")

    assert cli.guard(imported) == 143


def test_error_that_follows_from_a_signal_is_no_error(capsys):
    """An extension module may turn KeyboardInterrupt into another error, or swallow it."""
    def converted():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        except KeyboardInterrupt:
            raise ImportError("numpy failed to import") from None

    def swallowed():
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        except KeyboardInterrupt:
            return None

    before = signal.getsignal(signal.SIGTERM)
    assert cli.guard(converted) == 143 and cli.guard(swallowed) == 130
    assert capsys.readouterr().err == "error: interrupted; what is finished is whole\n" * 2
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_preview_of_another_question_does_not_count_as_done(run, monkeypatch):
    """--overwrite, stopped before its preview."""
    photo("a.png")
    assert run("a.png") == cli.OK
    before = Path("out/a_preview.png").read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(previews, "write_preview", lambda *args: None)
        assert run("a.png", "--seed", "3", "--overwrite") == cli.OK
    assert not Path("out/a_preview.png").exists()
    assert run("a.png", "--seed", "3") == cli.OK and Path("out/a_preview.png").read_bytes() != before


def test_each_command_leaves_out_the_results_of_both(run, tiny_folder, capsys):
    photo("in/a.png")
    assert run("in", "-o", "in") == cli.OK

    def edited(folder):
        return edit.main([folder, "--prompt", "x", "--editor", str(tiny_folder), "-o", folder, "--quiet"])

    assert edited("in") == cli.OK
    assert made("in") == sorted(["a.json", "a.png", "a_edited.json", "a_edited.png", "a_immunized.png", "a_preview.png",
                                 "a_immunized_edited.json", "a_immunized_edited.png"])        # no edit of the preview
    before = made("in")
    capsys.readouterr()
    assert run("in", "-o", "in") == cli.OK and made("in") == before
    assert "a.png: done before, skipped" in capsys.readouterr().err


@pytest.mark.parametrize("change", ["scheduler/scheduler_config.json", "tokenizer/vocab.json", "model_index.json"])
def test_a_changed_config_is_another_editor(run, tiny_folder, change, tmp_path, capsys):
    folder = tmp_path / "editor"
    shutil.copytree(tiny_folder, folder)
    photo("a.png")
    assert run("a.png", "--editor", str(folder), "--no-preview") == cli.OK
    with (folder / change).open("a") as file:
        file.write(" \n")
    assert run("a.png", "--editor", str(folder), "--no-preview") == cli.SOME_FAILED
    assert "from another picture or other options" in capsys.readouterr().err


def test_a_flag_that_is_not_given_is_no_part_of_the_question(run, monkeypatch, capsys):
    """So that a later version, with more flags, goes on."""
    photo("a.png")
    assert run("a.png", "--no-preview") == cli.OK
    question = immunize_module.question
    monkeypatch.setattr(immunize_module, "question", lambda path, editor, args: question(
        path, editor, argparse.Namespace(**vars(args), later=None, another=False, more=[])))
    assert run("a.png", "--no-preview") == cli.OK and "done before, skipped" in capsys.readouterr().err


def test_too_long_a_name_is_told_before_the_work(run, monkeypatch, capsys):
    photo(f"{'n' * 246}.png")
    monkeypatch.setattr(immunize_module, "immunize", lambda *args, **options: pytest.fail("it was immunized"))
    assert run(f"{'n' * 246}.png", "--overwrite") == cli.SOME_FAILED
    assert "ame too long" in capsys.readouterr().err


@pytest.mark.parametrize(("argv", "says"), [
    (["--any-prompt", "in"], "--any-prompt took in for its FILE, and no picture is left; put it behind the pictures"),
    (["in", "--any-prompt", ""], "--any-prompt: the name is empty"),
    (["in", "--option", "1:steps=3"], "has no option steps"),
    (["in", "--editor", "miniature", "--components", "sd3"], "--components is for an editor that is a single file")])
def test_flags_that_were_taken_in_silence_are_refused(argv, says, run, capsys):
    photo("in/a.png")
    argv = ["--editor", "latents", *argv] if "--components" in argv else argv
    assert run(*argv) == cli.USAGE
    err = capsys.readouterr().err
    assert says in err and "Traceback" not in err


def test_an_option_of_the_first_editor_wins_over_that_of_all(run):
    photo("a.png")
    assert run("a.png", "--method", "sifm", "--timesteps", "1", "--lam", "0.5", "--option", "1:lam=0.2",
               "--no-preview") == cli.OK
    assert json.loads(Path("out/a.json").read_text())["options"]["lam"] == 0.2


def test_a_default_that_json_does_not_know_is_written_as_text(run, monkeypatch):
    photo("a.png")
    monkeypatch.syspath_prepend(".")
    Path("own.py").write_text("import torch\ndef away(editor, x_orig, contexts, *, generator, dtype=torch.float32):\n"
                              "    return lambda x, step: -(editor.encode(editor.resize(x))).square().mean()\n")
    assert run("a.png", "--method", "own:away", "--no-preview") == cli.OK
    assert json.loads(Path("out/a.json").read_text())["options"]["dtype"] == "torch.float32"


def test_a_file_system_without_locks_is_told(run, tmp_path, monkeypatch):
    """The digests of weights do without."""
    def no_lock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_lock)
    with pytest.raises(ValueError, match=r"steps.jsonl: this file system has no locks \(No locks available\)") as caught, (
            ledger.Ledger(tmp_path / "steps.jsonl")):
        pass
    assert not isinstance(caught.value, ledger.Busy)
    monkeypatch.setattr(weight_digests, "LARGE", 0)
    (tmp_path / "w").write_bytes(b"weights")
    assert weight_digests.Digests(tmp_path)(tmp_path / "w") == hashlib.sha256(b"weights").hexdigest()


@pytest.mark.slow
def test_torchrun_does_all_pictures_though_one_fails(tiny_folder, tmp_path):
    """torchrun stops the other processes when one has ended with an error: that one waits for them."""
    for i in range(6):
        photo(tmp_path / f"in/{i}.png", seed=i)
    for i in (0, 2, 4):                                      # the share of rank 0, which ends at once
        (tmp_path / f"in/{i}.png").write_text("damaged")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "sifm_min.immunize",
         "in", "--prompt", "x", "--editor", str(tiny_folder), "--steps", "20", "--timesteps", "2", "--no-preview", "-o", "out"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        timeout=300)
    assert done.returncode == 1 and "3 failed" in done.stderr, done.stderr[-2000:]
    assert made(tmp_path / "out") == sorted(f"{i}{end}" for i in (1, 3, 5) for end in (".json", "_immunized.png"))


def test_disk_errors_name_the_folder(tmp_path):
    with pytest.raises(OSError, match="b") as caught:
        writing.write(tmp_path / "gone" / "b", b"")
    assert caught.value.errno == errno.ENOENT


def test_report_of_somebody_else_claims_nothing(tmp_path):
    (tmp_path / "a_immunized.png").touch()
    for text in ("{}", "[]", '{"results": ["a_immunized.png"]}', "not json"):
        (tmp_path / "a.json").write_text(text)
        assert not reports.is_result(tmp_path / "a_immunized.png", ("_immunized.png",), ".json")
    (tmp_path / "a.json").write_text('{"asked": {}, "results": ["a_immunized.png"]}')
    assert reports.is_result(tmp_path / "a_immunized.png", ("_immunized.png",), ".json")
