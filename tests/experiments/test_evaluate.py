"""The paper's experiments, end to end on a tiny random editor: every step is done once, kept, found again, and told."""

import contextlib
import csv
import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_editor
import torch
from fake_gemini import FakeGemini, serve_panel
from PIL import Image

import sifm_min
from sifm_min import cli, editors, evaluate, judge, miniature
from sifm_min.experiments import estimate, figures, manifest, plan, results, runner, store, suites, workers
from sifm_min.files.digests import picture_sha256
from sifm_min.files.ledger import Busy, Ledger, read_rows
from sifm_min.judging import canaries as canary_file
from sifm_min.judging.edits import read_edits
from sifm_min.miniature import pictures
from sifm_min.models.checkpoints import Unavailable
from sifm_min.purifiers import attacks, draws

ROOT = Path(__file__).resolve().parents[2]
ARMS = ("control", "noise", "photoguard-encoder")
SIZE = pictures.SIZE                                        # which other processes work at
QUICK = ("--steps", "1", "--methods", "photoguard-encoder")


@pytest.fixture(scope="module")
def loaded(tiny_folder, tmp_path_factory):
    """Two tiny editors of different weights, by the names that the command gets."""
    other = tiny_editor.write(tmp_path_factory.mktemp("other"), seed=1)
    return {str(tiny_folder): sifm_min.load_editor(tiny_folder), str(other): sifm_min.load_editor(other)}


def loader(loaded):
    """A `load_editor` that has these editors and no others; transfer does without latent spaces that are not there."""
    def load(source, **options):
        if source not in loaded:
            raise Unavailable(f"{source} is not on this machine")
        return loaded[source]
    return load


class Calls(list):
    """The immunizations and edits of a run: "immunize METHOD", and "edit N" for N prompts at once."""

    def count_of(self, what):
        return sum(call.startswith(what) for call in self)

    @property
    def edits(self):
        return sum(int(call.split()[1]) for call in self if call.startswith("edit"))


@pytest.fixture
def calls():
    return Calls()


@pytest.fixture
def run(loaded, tmp_path, monkeypatch, calls):
    """Run the command in this process and in tmp_path, on editors that are loaded once, and count what they are asked.

    The photographs are of 64 pixels.
    """
    monkeypatch.setattr(pictures, "SIZE", 64)
    monkeypatch.setattr(editors, "load_editor", loader(loaded))
    monkeypatch.setattr(estimate, "seconds_each", lambda asked, editors, case, left, **judging: dict.fromkeys(left.todo, 1.0))
    immunize = runner.immunize

    def immunizing(image, editor, prompts, *, method, **options):
        calls.append(f"immunize {method}")
        return immunize(image, editor, prompts, method=method, **options)
    monkeypatch.setattr(runner, "immunize", immunizing)
    for editor in loaded.values():
        def edit(pictures, prompts, *, real=editor.edit, **options):
            calls.append(f"edit {len(prompts)}")
            return real(pictures, prompts, **options)
        monkeypatch.setattr(editor, "edit", edit)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    first = next(iter(loaded))

    def run(suite, *argv, editor=first, quick=True):
        calls.clear()
        quick = QUICK if quick and suite in suites.METHODS_OF else ("--steps", "1")
        return evaluate.main(["run", suite, "--editor", editor, "--images", "2", "--jobs", "1", *quick, "-o", "out", "--quiet",
                              *argv])
    return run


def steps(folder="out"):
    """{step: [row]} of all journals, in the order of writing."""
    found = {}
    for path in sorted(Path(folder, "steps").glob("*.jsonl")):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            found.setdefault(row["step"], []).append(row)
    return found


def table(capsys, *argv, folder="out"):
    capsys.readouterr()
    assert evaluate.main(["table", folder, *argv]) == cli.OK
    return capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------------- white box

@pytest.mark.slow
def test_the_memory_plan_reaches_every_immunization(run, calls, monkeypatch):
    counted, asked = runner.immunize, []
    monkeypatch.setattr(runner, "immunize", lambda *given, memory, **more: (asked.append(memory),
                                                                              counted(*given, memory=memory, **more))[1])
    assert run("white-box", "--memory", "low") == cli.OK and set(asked) == {"low"}
    assert run("white-box") == cli.OK and calls == []        # the results are the same, so a plan is no other run


@pytest.mark.slow
def test_every_step_is_done_once_and_a_second_run_does_nothing(run, calls, capsys):
    assert run("white-box") == cli.OK
    assert sorted(calls) == sorted(["immunize noise", "immunize photoguard-encoder", *["edit 6"] * 3] * 2)
    made = steps()
    assert {step: len(rows) for step, rows in made.items()} == {"immunize": 4, "edit": 36, "metrics": 24, "verdict": 36,
                                                                  "shift": 4}
    names = [row["name"] for rows in made.values() for row in rows]
    assert len(set(names)) == len(names)
    for row in made["immunize"] + made["edit"]:
        image = Image.open(f"out/pictures/{row['sha256']}.png")
        assert picture_sha256(image) == row["sha256"]
    first = table(capsys)
    assert run("white-box") == cli.OK and calls == []
    assert table(capsys) == first and "PhotoGE, paper" in first


@pytest.mark.slow
def test_results_are_what_the_library_says(run, loaded):
    """One cell by hand: immunize, edit with another seed, distances, and both judges."""
    from sifm_min import images, metrics
    run("white-box", "--seeds", "3")
    (group,) = results.collect("out")
    cell = next(c for c in group["cells"] if c["arm"] == "photoguard-encoder" and c["prompt_id"] == "unseen-2")
    sample, editor = miniature.samples(1, 0)[0], next(iter(loaded.values()))
    immunized = sifm_min.immunize(sample.image, editor, sample.prompt, method="photoguard-encoder", steps=1).image
    other = sample.unseen[1]
    prompts = [sample.prompt, *sample.unseen_prompts]
    edited, clean = (editor.edit([image] * 6, prompts, seed=3)[2] for image in (immunized, sample.image))
    assert cell["prompt"] == other.prompt and cell["image_id"] == "miniature-000"
    assert cell["edited"] == picture_sha256(edited) and cell["edited_original"] == picture_sha256(clean)
    pixels = [images.to_pixels(image) for image in (edited, clean)]
    for name in ("psnr", "ssim", "vifp", "fsim"):
        assert cell["metrics"][name] == pytest.approx(getattr(metrics, name)(*pixels).item(), abs=1e-4)
    for name, oracle in miniature.judges.items():
        said = oracle(other, edited)
        assert cell["judges"][name] == [said.semantic_mismatch, said.perceptual_degradation, "ok"]


@pytest.mark.slow
@pytest.mark.parametrize("argv, immunizations, edits", [
    (("--eps", "0.05"), 4, 24),                              # other pictures; the clean edits are the same
    (("--steps", "2"), 2, 12),                               # neither is noise
    (("--edit-steps", "1"), 0, 36),
    (("--seeds", "1,2"), 0, 36),
    (("--images", "3"), 2, 18),
    (("--methods", "photoguard-encoder,sds"), 2, 12),
    (("--set", "variant=grey"), 2, 12),
    (("--budget", "texture"), 4, 24),                        # of the noise as well
    (("--budget", "uniform"), 0, 0),
    (("--robust",), 2, 12),                                  # of the method, not of the noise
    (("--edit-batch", "2"), 0, 0),
])
def test_a_changed_option_redoes_what_it_touches(run, calls, argv, immunizations, edits):
    run("white-box")
    assert run("white-box", *argv) == cli.OK
    assert (calls.count_of("immunize"), calls.edits) == (immunizations, edits)


@pytest.mark.slow
def test_robust_reaches_the_methods_and_the_notes(run, capsys):
    assert run("white-box", "--robust", "--images", "1") == cli.OK
    options = {row["options"]["init"]: row["options"]["robust"] for row in steps()["immunize"] if row["options"]["steps"]}
    assert options == {"random": draws.stated(True)} and len(steps()["immunize"]) == 2
    assert "robust" in table(capsys)


@pytest.mark.slow
def test_budget_reaches_methods_noise_and_notes(run, capsys):
    assert run("white-box", "--budget", "texture", "--images", "1") == cli.OK
    assert [row["options"]["budget"] for row in steps()["immunize"]] == ["texture", "texture"]
    assert "budget texture" in table(capsys)


@pytest.mark.slow
def test_a_default_that_is_spelled_out_is_the_default(run, calls):
    run("white-box", "--methods", "sifm", quick=False)
    assert run("lambda") == cli.OK
    assert calls.count_of("immunize sifm") == 2 * (len(suites.LAMBDAS) - 1)  # 0.1 is what SIFM has anyway
    assert run("ablation") == cli.OK
    assert calls.count_of("immunize sifm") == 2 * 2 and calls.count_of("immunize noise") == 0


@pytest.mark.slow
def test_lpips_that_comes_later_is_all_that_is_measured(run, calls, capsys, monkeypatch):
    from sifm_min import metrics
    monkeypatch.setattr(metrics, "lpips_weights", _absent)
    run("white-box")
    assert "LPIPS is absent: there are none" in table(capsys)
    monkeypatch.setattr(metrics, "lpips_weights", lambda network, file: SimpleNamespace(network="alex", sha256="0" * 64))
    monkeypatch.setattr(metrics, "lpips", lambda dist, ref, *, network, weights: torch.full((len(dist),), 0.25))
    before = {step: len(rows) for step, rows in steps().items()}
    assert run("white-box") == cli.OK and calls == []
    assert {step: len(rows) for step, rows in steps().items()} == {**before, "lpips": before["metrics"]}
    (group,) = results.collect("out")
    assert {cell["metrics"].get("lpips") for cell in group["cells"]} == {None, 0.25} and "absent" not in table(capsys)


def _absent(network, file):
    raise Unavailable("there are none")


@pytest.mark.slow
def test_the_table_of_another_version_still_prints(run, calls, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(plan, "__version__", "0.0.1")
        assert run("white-box", "--images", "1") == cli.OK
        text = table(capsys)
    assert table(capsys) == text and "sifm_min 0.0.1" in text
    assert run("white-box", "--images", "1") == cli.OK and calls.edits > 0      # nothing is taken for this version's
    assert [group["missing"] for group in results.collect("out")] == [0, 0]


@pytest.mark.slow
def test_a_lost_picture_is_made_again(run, calls):
    run("white-box")
    lost = steps()["edit"][0]["sha256"]
    Path(f"out/pictures/{lost}.png").unlink()
    assert run("white-box") == cli.OK and len(calls) == 1
    assert Path(f"out/pictures/{lost}.png").exists()


@pytest.mark.slow
def test_noise_is_drawn_once_for_all_editors(run, calls, loaded):
    run("white-box")
    second = list(loaded)[1]
    assert run("white-box", editor=second) == cli.OK
    assert calls.count_of("immunize noise") == 0 and calls.count_of("immunize photoguard-encoder") == 2 and calls.edits == 36
    assert len(results.collect("out")) == 2


# ------------------------------------------------------------------------------------------------------- who does what

def command(*argv):
    return [sys.executable, "-m", "sifm_min.evaluate", "run", "white-box", "--images", "2", "--jobs", "1", *QUICK, "-o", "out",
            *argv]


@pytest.mark.slow
def test_kill_9_and_two_processes_in_one_folder(run, calls, loaded, tmp_path, monkeypatch):
    """Two share the work without being told to; one is killed amid it. What they finished is not done again."""
    monkeypatch.setattr(pictures, "SIZE", SIZE)
    surroundings = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    both = [subprocess.Popen(command("--editor", next(iter(loaded))), cwd=tmp_path, env=surroundings,
                             stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for _ in range(2)]
    until = time.monotonic() + 120
    while time.monotonic() < until and len(list(Path("out/steps").glob("*.jsonl"))) < 2 and None in [p.poll() for p in both]:
        time.sleep(0.02)
    both[0].send_signal(signal.SIGKILL)
    both[0].wait(), both[1].wait(timeout=120)
    assert both[1].returncode == cli.OK
    assert run("white-box") == cli.OK and calls == []        # the survivor took over what the other had begun
    names = [row["name"] for rows in steps().values() for row in rows]
    assert len(set(names)) == len(names) == 4 + 36 + 24 + 36 + 4


@pytest.mark.slow
def test_jobs_share_the_work_and_helpers_end_with_their_run(run, calls, loaded, monkeypatch):
    monkeypatch.setattr(pictures, "SIZE", SIZE)
    assert run("white-box", "--jobs", "2", "--images", "3") == cli.OK
    names = [row["name"] for rows in steps().values() for row in rows]
    assert len(set(names)) == len(names) == 6 + 54 + 36 + 54 + 6
    assert run("white-box", "--helper-of", str(os.getpid()), "-o", "other") == cli.INTERRUPTED and calls.edits == 6
    args = SimpleNamespace(jobs=None, helper_of=None, shard=(0, 1))
    assert workers.jobs(SimpleNamespace(jobs=2, helper_of=7, shard=(0, 1)), loaded) == 1   # or there were no end of them
    monkeypatch.setattr(workers.os, "sched_getaffinity", lambda process: {0, 1, 2})
    assert workers.jobs(args, loaded) == 3
    large = SimpleNamespace(is_small=False, device=torch.device("cpu"))
    assert workers.jobs(args, {**loaded, "large": large}) == 1
    assert workers.jobs(SimpleNamespace(**{**vars(args), "shard": (0, 2)}), loaded) == 1


@pytest.mark.slow
def test_a_picture_that_another_process_holds_comes_last():
    class Runner:
        order = []

        def run(self, case):
            self.order.append(case)
            if self.order.count(1) < 3 and case == 1:
                raise Busy("held")
    told = []
    workers.carry_out(Runner(), [1, 2], remark=told.append)
    assert Runner.order == [1, 2, 1, 1] and len(told) == 1


@pytest.mark.slow
def test_shares_and_ranks_give_the_table_of_one_process(run, calls, capsys, monkeypatch):
    run("white-box")
    whole = table(capsys, "--format", "csv")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in "10":
        monkeypatch.setenv("RANK", rank)
        assert run("white-box", "-o", "ranks") == cli.OK
        assert calls.count_of("immunize photoguard-encoder") == 1
    assert timeless(table(capsys, "--format", "csv", folder="ranks")) == timeless(whole)


def timeless(text):
    """The rows of a CSV without the columns of seconds."""
    rows = [line.split(",") for line in text.splitlines()]
    return [[value for key, value in zip(rows[0], row, strict=True) if not key.startswith("seconds")] for row in rows]


@pytest.mark.slow
def test_torchrun_gives_the_table_of_one_process(run, capsys, loaded, tmp_path, monkeypatch):
    """Two ranks by torch's own launcher, started as its users start it."""
    monkeypatch.setattr(pictures, "SIZE", SIZE)
    alone = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}          # more threads round otherwise
    ranks = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    done = subprocess.run([*ranks, *command("--editor", next(iter(loaded)))[2:]], cwd=tmp_path, env=alone, capture_output=True,
                          text=True)
    assert done.returncode == cli.OK and done.stdout.count("white-box on tiny0: 1 pictures of 2 done") == 2, done.stderr
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert run("white-box", "-o", "whole") == cli.OK
    finally:
        torch.set_num_threads(threads)
    assert timeless(table(capsys, "--format", "csv")) == timeless(table(capsys, "--format", "csv", folder="whole"))


@pytest.mark.slow
def test_killed_again_and_again_at_any_moment(run, calls, capsys):
    """Two processes at work, both killed without warning, four times over: the table is that of an undisturbed run,
    and nothing was done twice."""
    assert run("white-box", "-o", "whole") == cli.OK
    whole, moments = table(capsys, "--format", "csv", folder="whole"), random.Random(5)
    for goal in sorted(moments.sample(range(3, 70), 4)):     # of 100 steps
        both = [os.fork() for _ in range(2)]
        if 0 in both:
            try:
                torch.set_num_threads(1)                     # a fork has none of its parent's threads
                run("white-box")
            finally:
                os._exit(0)
        while len(lines()) < goal and not any(os.waitpid(child, os.WNOHANG)[0] for child in both):
            time.sleep(0.002)
        time.sleep(moments.random() / 50)
        for child in both:
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
        assert goal <= len(lines()) < 104
    assert run("white-box") == cli.OK and run("white-box") == cli.OK and calls == []
    names = [row["name"] for rows in steps().values() for row in rows]
    assert len(set(names)) == len(names) == 4 + 36 + 24 + 36 + 4
    assert timeless(table(capsys, "--format", "csv")) == timeless(whole)


def lines(folder="out"):
    """All that journals hold, whole or not."""
    return [line for path in Path(folder, "steps").glob("*.jsonl") for line in path.read_bytes().split(b"\n") if line]


@pytest.mark.parametrize("shard, environment, expected", [
    ((0, 1), {}, (0, 1)), ((1, 3), {}, (1, 3)), ((0, 1), {"RANK": "2", "WORLD_SIZE": "4"}, (2, 4)),
    ((1, 2), {"RANK": "2", "WORLD_SIZE": "4"}, (6, 8)),
])
def test_share(shard, environment, expected):
    assert workers.share_of_work(shard, environment) == expected


# --------------------------------------------------------------------------------------------------------- what fails

@pytest.mark.slow
def test_a_step_that_fails_is_listed_and_tried_again(run, calls, capsys, monkeypatch):
    real = runner.immunize

    def failing(image, editor, prompts, *, method, **options):
        if method == "photoguard-encoder" and calls.count_of("immunize photoguard") == 0:
            calls.append("immunize photoguard-encoder, in vain")
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(image, editor, prompts, method=method, **options)
    monkeypatch.setattr(runner, "immunize", failing)
    assert run("white-box") == cli.SOME_FAILED
    assert "miniature-000, photoguard-encoder, immunize: out of memory" in capsys.readouterr().err
    assert calls.edits == 30                                 # all but those of the picture that is not there
    assert "- 6 edits failed: out of memory." in table(capsys)
    monkeypatch.setattr(runner, "immunize", real)
    assert run("white-box") == cli.OK
    assert calls.count_of("immunize") == 1 and calls.edits == 6
    assert "failed" not in table(capsys)


def test_a_full_disk_fails_every_cell_before_work_is_spent_on_it(run, calls, capsys, monkeypatch):
    def full(self):
        raise OSError(errno.ENOSPC, "No space left on device", "out/pictures")
    monkeypatch.setattr(store.Folder, "probe", full)
    assert run("white-box") == cli.SOME_FAILED and calls == []
    assert capsys.readouterr().err.count("no space left on device") == 2 * 6            # told when met, and at the end


@pytest.fixture
def small_disk(tmp_path):
    """A file system of two megabytes."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", place], capture_output=True).returncode:
        pytest.skip("mounting a file system is for root")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


@pytest.mark.slow
def test_a_disk_that_is_really_full(run, calls, capsys, small_disk):
    """Whatever write is the one that does not fit, what is there is whole, and room is all that the next run needs."""
    filler = small_disk / "filler"
    for room in (160_000, 100_000, 70_000, 0):               # the end comes at a picture, at a journal, at the probe
        filler.unlink(missing_ok=True)
        with contextlib.suppress(OSError), filler.open("wb") as file:
            file.write(bytes(shutil.disk_usage(small_disk).free - room))
        assert run("white-box", "-o", "disk/out") == cli.SOME_FAILED
        assert "no space left on device; free some space" in capsys.readouterr().err
    filler.unlink()
    before = {row["name"] for rows in steps("disk/out").values() for row in rows if "failed" not in row}
    assert run("white-box", "-o", "disk/out") == cli.OK
    made = [row["name"] for rows in steps("disk/out").values() for row in rows if "failed" not in row]
    assert len(made) == len(set(made)) == 4 + 36 + 24 + 36 + 4 and before < set(made)


@pytest.mark.slow
@pytest.mark.parametrize("broken", ["journal", "original"])
def test_unreadable_parts_are_listed_and_the_rest_goes_on(run, calls, capsys, broken):
    """A folder stands where a file should: not even root can read that."""
    run("white-box")
    journal = sorted(Path("out/steps").glob("*.jsonl"))[0]
    place = journal if broken == "journal" else next(
        path for path in Path("out/pictures").iterdir() if path.stem == next(
            cell["original"] for cell in results.collect("out")[0]["cells"] if cell["original"].startswith(journal.stem)))
    kept = place.read_bytes()
    place.unlink()
    place.mkdir()
    assert run("white-box", "--seeds", "2") == cli.SOME_FAILED and calls.edits == 18
    told = capsys.readouterr().err
    assert "is a directory" in told or "is a folder, not a picture" in told
    assert "edits failed: " in table(capsys)
    place.rmdir()
    place.write_bytes(kept)
    assert run("white-box", "--seeds", "2") == cli.OK and calls.edits == 18 and calls.count_of("immunize") == 0


@pytest.mark.slow
def test_a_broken_picture_and_a_damaged_journal(run, calls, capsys):
    sample = miniature.samples(2)
    items = []
    for i, one in enumerate(sample):
        one.image.save(f"{i}.png")
        items.append(manifest.Item(
            id=f"p{i}", image=f"{i}.png", category=one.category, prompt=one.prompt, unseen_prompts=tuple(one.unseen_prompts),
            sha256=manifest.hashlib.sha256(Path(f"{i}.png").read_bytes()).hexdigest(),
            origin={"edits": [[s.kind, s.option] for s in (one, *one.unseen)]}, path=Path(f"{i}.png")))
    manifest.write_manifest("manifest.jsonl", items)
    assert run("white-box", "--manifest", "manifest.jsonl") == cli.OK and calls.edits == 36
    whole = Path("1.png").read_bytes()
    Path("1.png").write_bytes(b"not a picture")
    assert run("white-box", "--manifest", "manifest.jsonl", "--seeds", "2") == cli.SOME_FAILED and calls.edits == 18
    assert "p1, every arm, read: 1.png is not the file of the manifest" in capsys.readouterr().err
    Path("1.png").write_bytes(whole)
    assert run("white-box", "--manifest", "manifest.jsonl", "--seeds", "2") == cli.OK and calls.edits == 18
    journal = sorted(Path("out/steps").glob("*.jsonl"))[0]
    journal.write_text("{}x\n" + journal.read_text())
    assert run("white-box", "--manifest", "manifest.jsonl", "--seeds", "5") == cli.SOME_FAILED and calls.edits == 18
    assert "line 1: is damaged" in capsys.readouterr().err
    assert "line 1: is damaged" in table(capsys)


@pytest.mark.parametrize("argv, sentence", [
    (("white-box", "--methods", "sifm,psychic"), "--methods psychic: choose from photoguard-encoder,"),
    (("white-box", "--seeds", "0"), "is also --seed"),
    (("white-box", "--set", "lamb=1"), "--set lamb: no method of this run has this option"),
    (("transfer",), "transfer needs two editors"),
    (("white-box", "--panel", "nobody"), "panel 'nobody': there is none of this name"),
    (("ablation", "--methods", "sds"), "--methods is not for ablation"),
    (("white-box", "--shard", "2/2"), "2/2 is no share"),
    (("white-box", "--manifest", "absent.jsonl"), "absent.jsonl: no such file"),
])
def test_usage_errors_are_one_sentence(run, capsys, argv, sentence):
    assert run(*argv, quick=False) == cli.USAGE
    told = capsys.readouterr().err.splitlines()[-1]
    assert sentence in told and not Path("out").exists()


def test_an_editor_that_is_no_miniature_needs_a_manifest(run, capsys, loaded, monkeypatch):
    editor = next(iter(loaded.values()))
    with monkeypatch.context() as patched:
        patched.setattr(editor, "notice", "")
        assert run("white-box") == cli.USAGE and "is no miniature" in capsys.readouterr().err
    monkeypatch.setattr(editor, "kind", "img2img")
    assert run("white-box") == cli.USAGE and "have instructions and no captions" in capsys.readouterr().err


def test_a_folder_without_results(tmp_path, capsys):
    assert evaluate.main(["table", str(tmp_path)]) == cli.USAGE
    assert "holds no results" in capsys.readouterr().err
    Path("out/plans").mkdir(parents=True)
    Path("out/plans/x.json").write_text("{}")
    assert evaluate.main(["table", "out"]) == cli.USAGE
    assert "x.json: has no suite, so it is no plan that this version knows; remove it" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------- other suites

@pytest.mark.slow
def test_transfer_goes_both_ways(run, calls, loaded, capsys):
    second = list(loaded)[1]
    assert run("transfer", "--other", second) == cli.OK
    assert calls.count_of("immunize photoguard-encoder") == 6 and calls.count_of("immunize noise") == 2      # 2 for both
    assert calls.edits == 2 * 2 * 5                          # the original prompt alone
    (group,) = results.collect("out")
    pairs = {(cell["source"], cell["target"]) for cell in group["cells"] if cell["arm"] == "photoguard-encoder"}
    names = [Path(name).name for name in loaded]
    assert pairs == {tuple(names), tuple(names[::-1])}
    assert f"Transfer: {names[0]} → {names[1]}" in table(capsys)


@pytest.mark.slow
def test_large_editors_take_turns_in_transfer(run, capsys, loaded, monkeypatch):
    """No editor is used between two uses of another but once, it is let go of in between, and the table is the same."""
    first, second = loaded
    assert run("transfer", "--other", second) == cli.OK
    expected, used = table(capsys, "--format", "csv"), []
    monkeypatch.setattr(workers, "are_small", lambda editors: False)
    monkeypatch.setattr(editors, "load_editor", lambda source, **options: loader(loaded)(source) and (
        used.append(f"load {source}") or loaded[source]))
    immunize = runner.immunize

    def immunizing(image, editor, prompts, *, method, **options):
        if method != plan.NOISE:
            used.append("both" if isinstance(editor, list) else editor.name)
        return immunize(image, editor, prompts, method=method, **options)
    monkeypatch.setattr(runner, "immunize", immunizing)
    for editor in loaded.values():
        monkeypatch.setattr(editor, "edit", lambda *given, name=editor.name, edit=editor.edit, **options: (
            used.append(name), edit(*given, **options))[1])
    assert run("transfer", "--other", second, "-o", "turns") == cli.OK
    order = [name for name, before in zip(used, [None, *used], strict=False) if name != before]
    load = [f"load {name}" for name in (first, second)]
    assert order == [*load, *load, first, load[0], second, load[1], "both", *load, first, load[0], second, load[1]]
    assert timeless(table(capsys, "--format", "csv", folder="turns")) == timeless(expected)
    Path("turns/steps").rename("turns/before")
    monkeypatch.setattr(runner, "immunize", broken := Broken())
    assert run("transfer", "--other", second, "-o", "turns") == cli.SOME_FAILED
    assert broken.tried == 2 * 4                             # noise, and the method for either editor and both; each once
    told = capsys.readouterr().err
    assert told.count("miniature-001, photoguard-encoder, made for") == 2    # when it failed, and at the end; each for the
    assert told.count("miniature-001, photoguard-encoder (white box), ") == 2          # first arm that has this immunization


class Broken:
    """An immunization for which there is no memory."""

    tried = 0

    def __call__(self, *_, **__):
        self.tried += 1
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")


@pytest.mark.slow
def test_robustness_attacks_every_arm_with_what_applies(run, calls, capsys):
    assert run("robustness", "--images", "1") == cli.OK
    made = steps()
    (group,) = results.collect("out")
    attacks = {cell["attack"] for cell in group["cells"]}
    assert {None, "jpeg-50", "adverse-cleaner", "vae"} <= attacks and not {"crop-0.75", "vae-other"} & attacks
    assert len(made["attack"]) == 4 * (len(attacks) - 1) and calls.edits == 4 * len(attacks)
    assert all(row["psnr"] for row in made["attack"])
    text = table(capsys)
    assert "| worst for each picture | - |" in text and "| jpeg-50 |" in text
    assert "| ISR: PhotoGE | ISR: PhotoGE (robust) |" in text         # side by side in one table


@pytest.mark.slow
def test_consistency_shares_the_edits_and_lists_them_for_people(run, calls, capsys):
    run("white-box")
    assert run("consistency") == cli.OK and calls == []
    listed = read_edits("out/edits.jsonl")
    assert len(listed) == 36 and {sample.arm for sample in listed} == set(ARMS)
    assert "| Judge to judge |" in table(capsys)


@pytest.mark.slow
def test_people_and_judges_are_compared_on_rated_edits(run, capsys, loaded):
    """From the exported sheet to Table I, its shares by counting; edits of another editor hear nothing of them."""
    second = list(loaded)[1]
    assert run("consistency") == cli.OK == run("consistency", editor=second, quick=True)
    assert run("consistency") == cli.OK                      # the list of edits is that of the last run
    assert judge.main(["export-sheet", "out/edits.jsonl", "--raters", "ann,ben", "-o", "study", "--items", "20", "--seed", "1",
                       "--attention", "2", "--quiet"]) == cli.OK
    with open("study/keep/study_items.csv", newline="") as file:
        items = {row["item_id"]: row for row in csv.DictReader(file) if row["is_attention"] == "0"}
    said = {}                                                # rater -> item -> mismatch
    for rater in ("ann", "ben"):
        with open(f"study/sheet/{rater}.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        for row in rows:
            found = rater == "ann" or int(row["item_id"], 16) % 3 == 0
            said.setdefault(rater, {})[row["item_id"]] = found
            row |= {"semantic_mismatch": int(found), "perceptual_degradation": 0}
        with open(f"{rater}.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)
    assert judge.main(["import-ratings", "study/keep", "ann.csv", "ben.csv", "-o", "people", "--quiet"]) == cli.OK
    text = table(capsys, "--people", "people")
    mine, theirs = (text[text.index(f"Agreement of judges: {Path(name).name}"):].split("### ")[0] for name in loaded)
    rows = {line.split(" | ")[0].strip("| "): line.split(" | ") for line in mine.splitlines() if line.startswith("| ")}
    assert rows["Human to human"][1].startswith(f"{sum(said['ben'][item] for item in items) / len(items):.0%}")
    group = next(group for group in results.collect("out") if Path(next(iter(loaded))).name in group["plan"]["editors"])
    cells = {(cell["arm"], figures.sample_of(cell)): cell for cell in group["cells"]}
    agree = [said[rater][item] == finding[0] for item, row in items.items() for rater in said
             for finding in cells[row["arm"], row["sample_id"]]["judges"].values()]
    assert rows["Human to judge"][1].startswith(f"{sum(agree) / len(agree):.0%}")
    assert rows["Human to human"][-1].strip(" |") == rows["Judge to judge"][-1].strip(" |") == "20"
    assert "People: ann, ben, 20 of 36 edits" in mine
    assert "| Human to human |" not in theirs and "evaluate table DIR --people RATINGS" in theirs


@pytest.fixture
def panel(monkeypatch, run):
    """A fake service, and panel.json with two of its models, which find a semantic mismatch in every edit."""
    monkeypatch.setattr(canary_file, "SIZE", 48)
    monkeypatch.setenv("JUDGE_KEY", "AQ.sentinel-0123456789")
    with FakeGemini() as server:
        serve_panel(server, "panel.json")
        yield server


def panel_answers(folder="out"):
    """The answers on edits in the ledgers of panels."""
    paths = Path(folder, "verdicts").glob("*/ledger.jsonl")
    return [row for path in paths for row in read_rows(path) if row["kind"] == "verdict"]


@pytest.mark.slow
def test_a_panel_judges_after_the_edits_and_buys_nothing_twice(run, calls, capsys, panel):
    ours = ("ablation", "--panel", "panel.json", "--images", "1")
    assert run(*ours) == cli.OK
    asked = len(panel.calls)
    edits = {row["sha256"] for row in steps()["edit"]}
    assert len(panel_answers()) == 2 * len(edits) and asked == 2 * (10 + len(edits))
    assert "verdict" not in steps()                          # the answers are in one place
    assert run(*ours) == cli.OK
    assert len(panel.calls) == asked and calls == []
    text = table(capsys)
    assert "Judged by panel test (2026-11-21): gemini-2.5-pro, gemini-2.5-flash" in text and "| SIFM | " in text
    (group,) = results.collect("out")
    assert all(said == [True, False, "ok"] for cell in group["cells"] for said in cell["judges"].values())


@pytest.mark.slow
def test_answers_before_a_kill_are_in_the_table_and_stay_bought(run, loaded, capsys, panel, monkeypatch):
    ours, append, done = ("white-box", "--panel", "panel.json", "--images", "1"), Ledger.append, []

    def interrupted(ledger, row):
        append(ledger, row)
        if row.get("kind") == "verdict":
            done.append(row)
            if len(done) == 3:
                raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "append", interrupted)
        assert run(*ours) == 130
    (group,) = results.collect("out")
    told = {(cell["edited"], judge): said[2] for cell in group["cells"] for judge, said in (cell["judges"] or {}).items()}
    kept = {(row["image_sha256"][1], row["judge"]) for row in panel_answers()}
    assert {question for question, status in told.items() if status == "ok"} == kept and len(kept) == len(done) == 3
    assert "| noise (control) | " in table(capsys)

    edits, editor = {row["sha256"] for row in steps()["edit"]}, next(iter(loaded))
    capsys.readouterr()
    evaluate.main(["run", ours[0], *ours[1:], "--editor", editor, "--jobs", "1", *QUICK, "-o", "out"])
    whole = sum({(edit, "gemini-2.5-pro"), (edit, "gemini-2.5-flash")} <= kept for edit in edits)
    assert f"to do: nothing; 1 pictures done, and then {len(edits) - whole} verdicts" in capsys.readouterr().err
    answers = [(row["image_sha256"][1], row["judge"]) for row in panel_answers()]
    assert len(answers) == len(set(answers)) == 2 * len(edits)


@pytest.mark.slow
def test_verdicts_that_an_older_version_copied_still_print(run, capsys, panel):
    ours = ("white-box", "--panel", "panel.json", "--images", "1")
    assert run(*ours) == cli.OK
    text = table(capsys)
    (group,) = results.collect("out")
    (journal,) = Path("out", "steps").glob("*.jsonl")
    with Ledger(journal) as ledger:                          # as it wrote them
        for key, judges in {cell["verdict"]: cell["judges"] for cell in group["cells"]}.items():
            ledger.append({"name": key, "step": "verdict", "judges": judges})
    shutil.rmtree("out/verdicts")
    assert table(capsys) == text
    asked = len(panel.calls)
    assert run(*ours) == cli.OK and len(panel.calls) == asked


@pytest.mark.slow
def test_answers_of_two_shares_are_one_table(run, panel):
    ours = ("white-box", "--panel", "panel.json")
    for share in ("0/2", "1/2"):
        assert run(*ours, "--shard", share) == cli.OK
    asked = len(panel.calls)
    (group,) = results.collect("out")
    assert len(list(Path("out", "verdicts").iterdir())) == 2 and len({cell["image_id"] for cell in group["cells"]}) == 2
    assert all(said[2] == "ok" for cell in group["cells"] for said in cell["judges"].values())
    assert run(*ours) == cli.OK and len(panel.calls) == asked


@pytest.mark.slow
def test_the_estimate_counts_and_times_every_kind_of_step(loaded, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(editors, "load_editor", loader(loaded))
    monkeypatch.setattr(attacks, "ATTACKS", {"jpeg-50": attacks.ATTACKS["jpeg-50"]})

    def announced(*argv):
        capsys.readouterr()
        assert evaluate.main(["run", "robustness", "--editor", next(iter(loaded)), "--images", "1", "--jobs", "1", *QUICK,
                              "-o", "out", *argv]) == cli.OK
        return next(line for line in capsys.readouterr().err.splitlines() if "to do: " in line)
    with monkeypatch.context() as patch:
        patch.setattr(estimate, "immunize", Broken())          # of the estimate alone
        told = announced()
    assert "not counted: noise, immunize, which failed" in told and "a verdict " in told
    told = announced("-o", "other")
    for part in ("3 immunizations", "4 attacks", "8 edits", "7 comparisons", "8 verdicts", "3 shifts", "0 pictures done",
                 "; about "):
        assert part in told
    for part in ("noise", "photoguard-encoder", "photoguard-encoder, robust", "an edit by tiny0", "an attack",
                 "the distances of an edit", "a verdict", "a shift of latents"):
        assert re.search(rf"[(, ]{part} [0-9.]+ m?s", told), part
    assert "to do: nothing; 1 pictures done" in announced("-o", "other")


def test_the_estimate_stops_after_three_steps(loaded):
    taken = []

    def work(on_step):
        for i in range(10):
            time.sleep(0.01)
            taken.append(i)
            on_step(i)
    seconds = estimate.timed(work, 10)
    assert len(taken) == 3 and 0.08 < seconds < 1
    assert [estimate.duration(s) for s in (5, 89, 90, 3600, 7200, 9000)] == ["5 s", "89 s", "2 min", "60 min", "2 h 00 min",
                                                                          "2 h 30 min"]
