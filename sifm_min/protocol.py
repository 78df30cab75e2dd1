"""The protocol behind the paper's tables: immunize -> edit -> distances -> verdict, for every picture, arm, prompt and seed.

A *plan* is a JSON-ready dict of all that decides the results (see `plan`). It is carried out picture by picture, and each
step's result is kept under the hash of everything that decided it: bytes of the pictures that go in, weights, method,
options, words, seeds, version. What is found under its hash is not computed again, so a run that was killed, extended or
given another option does just what is new, and suites share their pictures.

  DIR/plans/*.json       what was asked for
  DIR/steps/*.jsonl      the steps of one picture, in the order in which they were finished; one writer at a time
  DIR/pictures/*.png     every picture that a step made, named by the SHA-256 of its pixels

A step that fails is written down with its reason, the next one goes on, and the next run tries it again. Several
processes, on one machine or on many, may work into one folder: whoever holds a picture's journal works on that picture.
"""

import inspect
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from . import __version__, cli, isr, ledger, memory, panels
from .files import writing
from .immunize import METHODS, PROTOCOL, immunize, options_of, settings
from .ledger import Busy, Ledger

STEPS = {"immunize": 2, "attack": 1, "edit": 1, "metrics": 1, "lpips": 1, "verdict": 1}   # raised where code changes results
METRICS = ("psnr", "ssim", "vifp", "fsim")
CONTROL, NOISE = "control", "noise"
REMEMBERED = 24                                              # decoded pictures of a journal: the edits of two arms
MEASURED = 1 << 21                                           # pixels at once, of edits whose distances are measured
FAILURES = (ValueError, OSError, RuntimeError, MemoryError)  # of one step; torch's out of memory is a RuntimeError


# -- what is asked for -----------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Case:
    """A picture of the protocol. record: JSON-ready id, category, prompts, and sha256 of its pixels, None where it cannot be
    read; the record then has a `reason`.

    prompts: [{"id", "type", "instruct", "img2img", "truth"}], the words for either kind of editor. read() -> the picture,
    PIL RGB; raises ValueError. samples: prompt id -> what the oracles of the miniature judge by; None elsewhere.
    """

    record: dict
    read: object
    samples: dict | None = None


def identity(editor):
    """What decides an editor's edits, JSON-ready: equal where two editors draw the same pictures."""
    told = editor.provenance()
    config = panels.digest([str(editor.scheduler.config), str(editor.vae.config)])
    found = {name: told[name] for name in ("weights", "scheduler", "defaults", "dtype", "device")} | {"config": config}
    # Told where it is not as always. Compiled, floats are added in another order.
    strange = {"vae_dtype": told["vae_dtype"] != "float32" and told["vae_dtype"]}
    return found | {name: value for name, value in strange.items() if value}


def about_editor(editor):
    return {"identity": identity(editor), "kind": editor.kind, "notice": editor.notice, "source": str(editor.name),
            "revision": editor.provenance()["revision"]}


def arm(name, method=None, *, source, target, options=None, attack=None):
    """One row of a table, JSON-ready: `method` immunizes against the editor `source`, the attacker edits with `target`.

    method None is the clean picture. options: of this arm beside the plan's. attack: what is done to the picture first, as
    {"name", "editor" (that it is done with, or None), "moves"}: see robustness.py.
    """
    return {"name": name, "method": method, "source": source, "target": target, "options": options or {}, "attack": attack}


def label(one):
    """What an arm is called where it may be of several editors."""
    return one["name"] + (f", made for {one['source']}" if one["source"] != one["target"] else "")


def unprotected(one):
    """What an arm's edits are measured against: those of the clean picture, which an attack that moves it moves too."""
    return {**one, "method": None, "attack": one["attack"] if (one["attack"] or {}).get("moves") else None}


def controls(target):
    """The two arms that every method stands beside: the clean picture, and random noise of the same budget."""
    return [arm(CONTROL, source=target, target=target), arm(NOISE, NOISE, source=target, target=target)]


def plan(suite, editors, cases, arms, *, seeds, seed=0, eps=0.03, given=None, preset="protocol", edit=None, prompts=None,
         judge=None, lpips=None):
    """The plan of a run, JSON-ready. editors: name -> about_editor(...); given: options of the loop and of methods, which go
    to those that have them; edit: options of every edit; prompts: which types ("original", "unseen") are edited; judge:
    who judges, {"kind": "oracle"} or a panel's record; lpips: the hash of its weights, or the reason of their absence."""
    given = given or {}
    arms = [{**one, "settings": _settings(one, given, preset)} for one in arms]
    return {"suite": suite, "version": __version__, "editors": editors, "cases": [case.record for case in cases], "arms": arms,
            "seeds": list(seeds), "seed": seed, "eps": eps, "given": given, "preset": preset, "edit": edit or {},
            "prompts": list(prompts or ("original", "unseen")), "judge": judge or {"kind": "oracle"}, "lpips": lpips or {}}


def _settings(one, given, preset):
    """What an arm's method runs with: the loop in full, options that are not the method's defaults; {} for the controls."""
    if one["method"] in (None, NOISE):
        return {}
    from .baselines import NATIVE
    known = (*PROTOCOL, *options_of(one["method"]))
    chosen = {name: value for name, value in given.items() if name in known} | one["options"]
    preset = preset if one["method"] in NATIVE else "protocol"
    loop, options = settings(one["method"], preset, **chosen)
    defaults = inspect.signature(METHODS[one["method"]]).parameters      # asked for or not, a default is the same
    return {"preset": preset, **loop, **{name: value for name, value in options.items() if value != defaults[name].default}}


def group(asked):
    """What a plan shares with those that stand in one table with it: all but which pictures, arms and seeds."""
    shared = ("suite", "version", "seed", "eps", "given", "preset", "edit", "prompts")
    editors = {name: about["identity"] for name, about in asked["editors"].items()}
    return panels.digest([{name: asked[name] for name in shared}, editors, asked["judge"]])


def prompts_of(asked, case):
    return [prompt for prompt in case["prompts"] if prompt["type"] in asked["prompts"]]


# -- the names of steps ----------------------------------------------------------------------------------------------------

def name(step, **decides):
    """The name of a step's result: the hash of all that decides it."""
    return panels.digest({"step": step, "code": [__version__, STEPS[step]], **decides})


def words(asked, editor, prompt):
    """What an editor is told: the instruction, or for img2img the caption of the result."""
    return prompt[asked["editors"][editor]["kind"]]


def immunize_name(asked, case, one):
    if one["method"] == NOISE:                               # drawn without any editor, so once for all of them
        return name("immunize", picture=case["sha256"], method=NOISE, eps=asked["eps"], seed=asked["seed"])
    return name("immunize", picture=case["sha256"], method=one["method"], eps=asked["eps"], seed=asked["seed"],
                settings=one["settings"], editor=asked["editors"][one["source"]]["identity"],
                prompt=words(asked, one["source"], case["prompts"][0]))


def attack_name(asked, one, sha256):
    used = one["attack"]["editor"]
    return name("attack", picture=sha256, attack=one["attack"]["name"], seed=asked["seed"],
                editor=used and asked["editors"][used]["identity"])


def edit_options(asked, editor):
    """The options of an edit by this editor: of two editors, only one may know how much the picture weighs."""
    return {name: value for name, value in asked["edit"].items()
            if name != "image_guidance" or asked["editors"][editor]["kind"] == "instruct"}


def edit_name(asked, one, sha256, prompt, seed):
    return name("edit", picture=sha256, editor=asked["editors"][one["target"]]["identity"],
                options=edit_options(asked, one["target"]), prompt=words(asked, one["target"], prompt), seed=seed)


def metrics_name(sha256, reference):
    return name("metrics", pictures=[sha256, reference])


def lpips_name(sha256, reference, weights):
    return name("lpips", pictures=[sha256, reference], weights=weights)


def verdict_name(asked, one, case, prompt, sha256):
    return name("verdict", judge=asked["judge"], kind=asked["editors"][one["target"]]["kind"], original=case["sha256"],
                prompt=prompt["instruct"], truth=prompt["truth"], edited=sha256)


# -- the folder ------------------------------------------------------------------------------------------------------------

class Folder:
    """Where a run's results lie; see the module's docstring."""

    def __init__(self, path):
        self.path = Path(path)

    def make(self):
        writing.make_folder(self.path)
        for inner in ("plans", "steps", "pictures"):
            writing.make_folder(self.path / inner)

    def add_plan(self, asked):
        path = self.path / "plans" / f"{asked['suite']}-{panels.digest(asked)[:16]}.json"
        if not path.exists():
            writing.write(path, cli.to_json(asked, indent=1) + "\n", overwrite=True)

    def plans(self):
        """The plans asked for, oldest first; raises ValueError where there are none."""
        from . import verdicts
        found = sorted((self.path / "plans").glob("*.json"), key=lambda path: (path.stat().st_mtime_ns, path.name))
        if not found:
            raise ValueError(f"{self.path}: holds no results; `evaluate run SUITE -o {self.path}` makes them")
        return [verdicts.load(path) for path in found]

    def journal(self, sha256):
        return self.path / "steps" / f"{sha256[:24]}.jsonl"

    def rows(self, sha256):
        """{name: row} of a picture's steps; somebody may be writing them."""
        path = self.journal(sha256)
        return {row["name"]: row for row in ledger.read(path)} if path.exists() else {}

    def picture(self, sha256):
        return self.path / "pictures" / f"{sha256}.png"

    def keep(self, image):
        """Write a picture and return its name."""
        from . import images
        sha256 = panels.picture_sha256(image)
        if not self.picture(sha256).exists():
            images.write(self.picture(sha256), image, overwrite=True)
        return sha256

    def probe(self):
        """Raise OSError where nothing can be written, before minutes of work are spent on it."""
        part = self.path / "pictures" / f".{os.getpid()}.part"
        try:
            with part.open("wb") as file:
                file.write(bytes(1 << 16))
                file.flush()
                os.fsync(file.fileno())
        finally:
            part.unlink(missing_ok=True)


class Journal:
    """The steps of one picture: looked up, or made and written down. Raises Busy where another process has it open."""

    def __init__(self, folder, sha256):
        self.folder, self._ledger = folder, Ledger(folder.journal(sha256))

    def __enter__(self):
        self._ledger.__enter__()
        self.rows, self._images = {row["name"]: row for row in self._ledger.rows}, {}
        return self

    def __exit__(self, *_):
        self._ledger.__exit__()

    def found(self, name):
        """The row of a finished step whose picture, if it made one, is still there; None otherwise."""
        row = self.rows.get(name)
        if row is None or "failed" in row or ("sha256" in row and not self.folder.picture(row["sha256"]).exists()):
            return None
        return row

    def add(self, name, step, image=None, **result):
        if image is not None:
            result["sha256"] = self.folder.keep(image)
            self._remember(result["sha256"], image)
        row = {"name": name, "step": step, **result}
        self._ledger.append(row)
        self.rows[name] = row
        return row

    def hold(self, sha256, read):
        """Have the original among the pictures of the folder; raises ValueError where it is not what it was."""
        if not self.folder.picture(sha256).exists() and self.folder.keep(read()) != sha256:
            raise ValueError("the picture has changed since this run began; run the same command again")

    def image(self, sha256):
        from . import images
        if sha256 not in self._images:
            self._remember(sha256, images.read(self.folder.picture(sha256)).image)
        return self._images[sha256]

    def _remember(self, sha256, image):
        self._images[sha256] = image
        while len(self._images) > REMEMBERED:
            del self._images[next(iter(self._images))]


# -- carrying it out -------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Failure:
    """A step that could not be done."""

    case: str
    arm: str
    step: str
    reason: str

    def __str__(self):
        return f"{self.case}, {self.arm}, {self.step}: {self.reason}"


class _Failed(Exception):
    """A step failed and was written down; the arm cannot go on."""


class _Later(_Failed):
    """A step needs an editor whose turn it is not."""


class Runner:
    """Carries out a plan, a picture at a time.

    editors: name -> a loaded editor; judges: editor -> {name: judge}, or None where a panel judges later; lpips: a
    `metrics.LPIPSWeights` or None; batch: how many edits at once; memory: of immunizing, see `memory.plans`; fail(Failure,
    error) hears of what fails; done() is called when an arm of a picture is over. `only`, where it is set, is the one editor
    that may be used: what needs another waits.
    """

    def __init__(self, folder, asked, editors, *, judges=None, lpips=None, batch=None, memory="auto", fail=None, done=None):
        self.folder, self.asked, self.editors, self.judges, self.lpips = folder, asked, editors, judges, lpips
        self.batch, self.memory, self.fail, self.done = batch, memory, fail or (lambda *_: None), done or (lambda: None)
        self.failures, self.computed, self.only, self._in_vain = [], 0, None, set()

    def run(self, case):
        """All arms of one picture. Raises Busy where another process works on it."""
        if case.record["sha256"] is None:
            self._tell(case, "every arm", "read", ValueError(case.record["reason"]))
            for _ in self.asked["arms"]:
                self.done()
            return
        try:
            with Journal(self.folder, case.record["sha256"]) as journal:
                journal.hold(case.record["sha256"], case.read)
                for one in self.asked["arms"]:
                    try:
                        self.folder.probe()
                        self._arm(journal, case, one)
                    except _Failed:
                        pass
                    except OSError as error:                 # not even that a step failed can be written down
                        self._tell(case, label(one), "write", error)
                    self.done()
        except Busy:
            raise
        except (ValueError, OSError) as error:               # the journal is damaged, or the picture is another by now
            self._tell(case, "every arm", "begin", error)

    def _tell(self, case, arm_name, step, error):
        reason = reason_of(error, step)
        failure = Failure(case.record["id"], arm_name, step, reason)
        if failure not in self.failures:                     # every turn meets a picture that cannot be read
            self.failures.append(failure)
            self.fail(failure, error)
        return reason

    def _step(self, journal, case, one, step, names, make, *given):
        """make(*given) adds these names to the journal; where it fails, the reason is written under each of them."""
        if self._in_vain.issuperset(names):                  # the next run tries again, not the next turn of this one
            raise _Failed
        try:
            self.computed += 1
            return make(*given)
        except FAILURES as error:
            reason = self._tell(case, label(one), step, error)
            self._in_vain.update(names)
            for missing in names:
                if not journal.found(missing):
                    journal.add(missing, step, failed=reason)
            raise _Failed from None

    def _needs(self, editor):
        if self.only not in (None, editor):
            raise _Later

    def _arm(self, journal, case, one):
        """Every step of one arm of one picture."""
        asked, record = self.asked, case.record
        sha256 = self._protected(journal, case, one)
        clean = unprotected(one)
        beside = self._protected(journal, case, clean)
        prompts = prompts_of(asked, record)
        for seed in asked["seeds"]:
            reference = self._edits(journal, case, clean, beside, prompts, seed)
            edited = self._edits(journal, case, one, sha256, prompts, seed)
            if sha256 != beside:
                self._distances(journal, case, one, edited, reference)
            if self.judges:
                self._judge(journal, case, one, prompts, edited)

    def _protected(self, journal, case, one):
        """The name of the picture that the attacker gets."""
        sha256 = case.record["sha256"]
        if one["method"]:
            key = immunize_name(self.asked, case.record, one)
            row = journal.found(key)
            if not row:
                self._needs(one["source"])
                row = self._step(journal, case, one, "immunize", [key], self._immunize, journal, case, one, key)
            sha256 = row["sha256"]
        if one["attack"]:
            key = attack_name(self.asked, one, sha256)
            row = journal.found(key) or self._step(journal, case, one, "attack", [key], self._attack, journal, one, key, sha256)
            sha256 = row["sha256"]
        return sha256

    def _attack(self, journal, one, key, sha256):
        from . import images, metrics, robustness
        started = time.perf_counter()
        before = journal.image(sha256)
        image = robustness.apply(one["attack"]["name"], before, seed=self.asked["seed"],
                                 editor=self.editors.get(one["attack"]["editor"]))
        damage = metrics.psnr(images.to_pixels(image), images.to_pixels(before)).item()
        return journal.add(key, "attack", image, seconds=_since(started), psnr=_plain(damage))

    def _immunize(self, journal, case, one, key):
        told = words(self.asked, one["source"], case.record["prompts"][0])
        found = immunize(journal.image(case.record["sha256"]), self.editors[one["source"]], told, method=one["method"],
                         eps=self.asked["eps"], seed=self.asked["seed"], memory=self.memory, **one["settings"])
        kept = {name: found.report[name] for name in ("linf_steps", "budget_steps", "psnr", "ssim", "passes", "seconds",
                                                      "loop_seconds", "peak_memory_bytes", "note", "options")}
        last = found.report["loss"][-1] if found.report["loss"] else None
        return journal.add(key, "immunize", found.image.convert("RGB"), **_plain(kept), last=_plain(last))

    def _edits(self, journal, case, one, sha256, prompts, seed):
        """The names of the edited pictures, in the prompts' order; those that are missing are made in one batch."""
        names = [edit_name(self.asked, one, sha256, prompt, seed) for prompt in prompts]
        missing = list({key: prompt for key, prompt in zip(names, prompts, strict=True) if not journal.found(key)}.items())
        if missing:
            self._needs(one["target"])
        size = self.batch or len(missing) or 1
        for part in (missing[start:start + size] for start in range(0, len(missing), size)):
            self._step(journal, case, one, "edit", [key for key, _ in part], self._edit, journal, one, sha256, part, seed)
        return [journal.found(key)["sha256"] for key in names]

    def _edit(self, journal, one, sha256, part, seed):
        started = time.perf_counter()
        told = [words(self.asked, one["target"], prompt) for _, prompt in part]
        found = self.editors[one["target"]].edit([journal.image(sha256)] * len(part), told, seed=seed,
                                                 **edit_options(self.asked, one["target"]))
        for (key, _), image in zip(part, found, strict=True):
            journal.add(key, "edit", image, seconds=round(_since(started) / len(part), 4))

    def _distances(self, journal, case, one, edited, reference):
        """Of the edits of the immunized picture from those of the original: all that are missing, in one batch."""
        pairs = list(zip(edited, reference, strict=True))
        for step, wanted, weights in (("metrics", METRICS, None), ("lpips", ("lpips",), self.lpips)):
            if step == "lpips" and self.lpips is None:
                continue
            names = {pair: metrics_name(*pair) if step == "metrics" else lpips_name(*pair, weights.sha256) for pair in pairs}
            missing = [pair for pair in names if not journal.found(names[pair])]
            if missing:
                self._step(journal, case, one, step, [names[pair] for pair in missing], self._measure, journal, names, missing,
                           step, wanted, self.editors[one["target"]].device)

    def _measure(self, journal, names, pairs, step, wanted, device):
        """All of one size, as edits of one picture are; as many at once as MEASURED allows."""
        import torch

        from . import images
        width, height = journal.image(pairs[0][0]).size
        size = max(1, MEASURED // (width * height))
        for part in (pairs[i:i + size] for i in range(0, len(pairs), size)):
            started = time.perf_counter()
            dist, ref = (torch.cat([images.to_pixels(journal.image(pair[side])) for pair in part]) for side in (0, 1))
            found, absent = distances(dist, ref, wanted, device, self.lpips)
            for i, pair in enumerate(part):
                journal.add(names[pair], step, values=_plain({metric: values[i] for metric, values in found.items()}),
                            absent=absent, seconds=round(_since(started) / len(part), 4))

    def _judge(self, journal, case, one, prompts, edited):
        judges = self.judges(self.editors[one["target"]])
        for prompt, sha256 in zip(prompts, edited, strict=True):
            key = verdict_name(self.asked, one, case.record, prompt, sha256)
            if not journal.found(key):
                self._step(journal, case, one, "verdict", [key], self._verdict, journal, case, one, judges, prompt, sha256, key)

    def _verdict(self, journal, case, one, judges, prompt, sha256, key):
        started = time.perf_counter()
        edit = isr.Edit(sha256, case.record["id"], prompt["id"], one["name"], case.samples[prompt["id"]], journal.image(sha256))
        journal.add(key, "verdict", judges=said(isr.ask(judges, [edit])), seconds=round(_since(started), 4))


def reason_of(error, step):
    """Why a step failed, in one sentence that is the same for the same reason: allocators count bytes at length."""
    if memory.is_short(error):
        return "out of memory" + ("; --edit-batch 1 edits one at a time" if step == "edit" else "")
    return cli.sentence(error)


def distances(dist, ref, wanted, device, lpips):
    """({metric: values}, {metric: why there are none}) of pixels (B,3,H,W), computed where the editor computes."""
    from . import metrics
    if device.type == "cuda":
        dist, ref = dist.to(device), ref.to(device)
    found, absent = {}, {}
    for metric in wanted:
        how = {"network": lpips.network, "weights": lpips} if metric == "lpips" else {}
        try:
            found[metric] = getattr(metrics, metric)(dist, ref, **how).tolist()
        except ValueError as error:                          # the pictures are too small for it
            absent[metric] = str(error)
    return found, absent


def said(records):
    """{judge: [semantic mismatch, perceptual degradation, status]} of isr.Records on one edit."""
    return {r.judge: [r.semantic_mismatch, r.perceptual_degradation, r.status] for r in records}


def _since(started):
    return time.perf_counter() - started


def _plain(value):
    """JSON-ready without infinities: those become the strings that `float` reads."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and value - value != 0 else value


# -- how much is left ------------------------------------------------------------------------------------------------------

class Left(NamedTuple):
    """todo: (step, what) -> how many are to be made; kept: (step, what) -> [seconds] of those that are there; finished: how
    many pictures lack nothing but a panel's verdicts. what: a method, an attack, or the editor that edits."""

    todo: dict
    kept: dict
    finished: int


def left(folder, asked, cases, *, again=True):
    """The `Left` of these cases. A step whose picture is yet to be made is to be made. again: so is what failed; otherwise it
    is over, and with it what would have been made of it."""
    todo, kept, finished = {}, {}, 0
    for case in cases:
        record = case.record
        if record["sha256"] is None:
            continue
        try:
            rows = folder.rows(record["sha256"])
        except (ValueError, OSError):                        # a damaged journal: the run will tell
            continue
        failed = {key for key, row in rows.items() if "failed" in row}
        rows = {key: row for key, row in rows.items() if key not in failed}
        steps = dict.fromkeys(_steps(asked, record, rows, () if again else failed))
        for step, what, key in steps:
            if key not in rows:
                todo[step, what] = todo.get((step, what), 0) + 1
            elif "seconds" in rows[key]:
                kept.setdefault((step, what), []).append(rows[key]["seconds"])
        asking = asked["judge"]["kind"] != "oracle"
        finished += all(key in rows or asking and step == "verdict" for step, _, key in steps)
    return Left(todo, kept, finished)


def _steps(asked, case, rows, failed):
    """(step, what, name) of all that is done with a picture but what failed and what follows from it; some come twice."""
    def made(step, what, key):
        """The picture that a step makes, by name; by that of the step where it is still to be made; None where it failed."""
        if key in failed:
            return None
        found.append((step, what, key))
        return rows[key].get("sha256") if key in rows else f"{key} to come"

    def protected(one):
        sha256 = case["sha256"]
        if one["method"]:
            sha256 = made("immunize", one["method"], immunize_name(asked, case, one))
        if one["attack"] and sha256:
            sha256 = made("attack", one["attack"]["name"], attack_name(asked, one, sha256))
        return sha256
    for one in asked["arms"]:
        found, target = [], one["target"]
        sha256, beside = protected(one), protected(unprotected(one))
        for seed in asked["seeds"]:
            for prompt in prompts_of(asked, case):
                reference, edited = (picture and made("edit", target, edit_name(asked, one, picture, prompt, seed))
                                     for picture in (beside, sha256))
                if edited is None or reference is None:
                    continue
                if sha256 != beside:
                    made("metrics", target, metrics_name(edited, reference))
                    if asked["lpips"].get("sha256"):
                        made("lpips", target, lpips_name(edited, reference, asked["lpips"]["sha256"]))
                made("verdict", target, verdict_name(asked, one, case, prompt, edited))
        yield from found


# -- what came of it -------------------------------------------------------------------------------------------------------

def collect(path):
    """[{"plan", "arms", "cells", "missing"}], one per table of the folder: see `group`. Computes nothing.

    plan: the newest of the plans that share the table. cells: one per edit, with what its steps found. missing: how many
    planned edits are not made and did not fail either. arms: each with its immunizations' rows.
    """
    folder, groups = Folder(path), {}
    for asked in folder.plans():
        groups.setdefault(group(asked), []).append(asked)
    return [_collected(folder, plans) for plans in groups.values()]


def cells(folder, asked, case):
    """What there is of one picture (the record of a Case): a dict per edit that was made or failed, see `collect`."""
    try:
        rows = folder.rows(case["sha256"]) if case["sha256"] else {}
    except (ValueError, OSError):                            # a damaged journal: the run has told
        return
    for one in asked["arms"]:
        done = _immunized(asked, case, one, rows)
        for seed in asked["seeds"]:
            for prompt in prompts_of(asked, case):
                if cell := _cell(asked, case, one, rows, done, prompt, seed):
                    yield cell


def keep_verdict(folder, sha256, name, records):
    """Write a panel's isr.Records on one edit into the journal of its original; waits for whoever works on that picture."""
    while True:
        try:
            with Journal(folder, sha256) as journal:
                journal.add(name, "verdict", judges=said(records))
            return
        except Busy:
            time.sleep(0.5)


def _collected(folder, plans):
    cells, immunized, arms, missing, journals, damaged = {}, {}, {}, set(), {}, {}
    for asked in plans:
        for case in asked["cases"]:
            sha256 = case["sha256"]
            if sha256 is not None and sha256 not in journals:
                try:
                    journals[sha256] = folder.rows(sha256)
                except (ValueError, OSError) as error:
                    journals[sha256], damaged[sha256] = {}, {"sha256": None, "reason": cli.sentence(error)}
            case = case | damaged.get(sha256, {})
            for one in asked["arms"]:
                arms.setdefault((one["target"], one["source"], one["name"]), one)
                rows = journals.get(sha256, {})
                done = _immunized(asked, case, one, rows)
                if one["method"] and done and "failed" not in done:
                    immunized.setdefault((one["target"], one["source"], one["name"]), {})[case["id"]] = done
                for seed in asked["seeds"]:
                    for prompt in prompts_of(asked, case):
                        place = (one["target"], one["source"], one["name"], case["id"], prompt["id"], seed)
                        cell = _cell(asked, case, one, rows, done, prompt, seed)
                        if cell is None:
                            missing.add(place)
                        else:
                            cells[place] = cell
    return {"plan": plans[-1], "cells": list(cells.values()), "missing": len(missing - cells.keys()),
            "arms": [{**one, "immunized": immunized.get(place, {})} for place, one in arms.items()],
            "pictures": {case["id"]: case["category"] for asked in plans for case in asked["cases"]}}


def _immunized(asked, case, one, rows):
    if case["sha256"] is None:
        return {"failed": case.get("reason") or "cannot be read"}
    if one["method"] is None:
        return {"sha256": case["sha256"]}
    return rows.get(immunize_name(asked, case, one))


def _cell(asked, case, one, rows, done, prompt, seed):
    """One edit as data, None where it is still to be made."""
    cell = {"target": one["target"], "source": one["source"], "arm": one["name"], "image_id": case["id"],
            "attack": (one["attack"] or {}).get("name"), "method": one["method"], "category": case["category"],
            "prompt_id": prompt["id"], "prompt_type": prompt["type"], "seed": seed,
            "prompt": prompt["instruct"], "metrics": {}, "absent": {}, "damage": None, "judges": None, "failed": None,
            "original": case["sha256"], "immunized": None, "edited_original": None, "edited": None, "verdict": None}
    if done is None:
        return None
    if "failed" in done:
        return {**cell, "failed": done["failed"]}
    sha256 = done["sha256"]
    beside = case["sha256"]
    for side in (sha256, beside) if (one["attack"] or {}).get("moves") else (sha256,) if one["attack"] else ():
        row = rows.get(attack_name(asked, one, side))
        if row is None or "failed" in row:
            return {**cell, "failed": row["failed"]} if row else None
        cell["damage"] = float(row["psnr"])
        sha256, beside = (row["sha256"] if name == side else name for name in (sha256, beside))
    row = rows.get(edit_name(asked, one, sha256, prompt, seed))
    clean = rows.get(edit_name(asked, one, beside, prompt, seed))
    for found in (row, clean):
        if found is None or "failed" in found:
            return {**cell, "failed": found["failed"]} if found else None
    cell |= {"immunized": sha256, "edited": row["sha256"], "edited_original": clean["sha256"]}
    if sha256 != beside:
        names = [metrics_name(row["sha256"], clean["sha256"])]
        if asked["lpips"].get("sha256"):
            names.append(lpips_name(row["sha256"], clean["sha256"], asked["lpips"]["sha256"]))
        for measured in filter(None, map(rows.get, names)):
            if "failed" in measured:
                return {**cell, "failed": measured["failed"]}
            cell["metrics"] |= {key: None if value is None else float(value) for key, value in measured["values"].items()}
            cell["absent"] |= measured["absent"]
    cell["verdict"] = verdict_name(asked, one, case, prompt, row["sha256"])
    verdict = rows.get(cell["verdict"]) or {"judges": None}
    return {**cell, "failed": verdict["failed"]} if "failed" in verdict else {**cell, "judges": verdict["judges"]}
