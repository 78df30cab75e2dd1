"""Carry out a plan: every step of every arm, one picture after the other, each result kept as soon as it is there.

A step that fails is written down with its reason and the next one goes on; the next run tries it again.
"""

import time
from dataclasses import dataclass

from .. import cli, memory
from ..files.ledger import Busy
from ..immunize import immunize
from ..judging.records import Edit, ask
from .plan import (
    PIXEL_METRICS,
    arm_label,
    attack_key,
    bank_of,
    edit_key,
    edit_options,
    immunize_key,
    lpips_key,
    metrics_key,
    prompts_of,
    reference_arm,
    shift_key,
    sources_of,
    texts_of,
    verdict_key,
    words,
)
from .store import Journal

PIXELS = 1 << 21                                             # of the edits whose distances are measured at once
FAILURES = (ValueError, OSError, RuntimeError, MemoryError)  # of one step; torch's out of memory is a RuntimeError


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
    """A step needs an editor that may not be used now."""


class Runner:
    """Carries out a plan, one picture at a time.

    editors: name -> a loaded editor. judges: {name: judge}, or None if a panel judges later. lpips: a
    `metrics.LPIPSWeights` or None. batch: the number of edits at once. memory: of immunizing, see `memory.plans`.
    fail(Failure, error) is called for every failure, done() at the end of every arm of a picture. `only`: the names
    of the editors that may be used now, or None for all; steps that need others, or fewer, are left for later.
    """

    def __init__(self, folder, plan, editors, *, judges=None, lpips=None, batch=None, memory="auto", fail=None, done=None):
        self.folder, self.plan, self.editors, self.judges, self.lpips = folder, plan, editors, judges, lpips
        self.batch, self.memory, self.fail, self.done = batch, memory, fail or (lambda *_: None), done or (lambda: None)
        self.failures, self.computed, self.only, self._in_vain = [], 0, None, set()

    def run(self, case):
        """Do all arms of one picture. Raises Busy if another process works on it."""
        if case.record["sha256"] is None:
            self._report(case, "every arm", "read", ValueError(case.record["reason"]))
            for _ in self.plan["arms"]:
                self.done()
            return
        try:
            with Journal(self.folder, case.record["sha256"]) as journal:
                journal.hold(case.record["sha256"], case.read)
                for arm in self.plan["arms"]:
                    try:
                        self.folder.probe()
                        self._arm(journal, case, arm)
                    except _Failed:
                        pass
                    except OSError as error:                 # the failure itself cannot be written down
                        self._report(case, arm_label(arm), "write", error)
                    self.done()
        except Busy:
            raise
        except (ValueError, OSError) as error:               # the journal is damaged, or the picture has changed
            self._report(case, "every arm", "begin", error)

    def _report(self, case, label, step, error):
        """Note a failure, once, and return its reason."""
        reason = reason_of(error, step)
        failure = Failure(case.record["id"], label, step, reason)
        if failure not in self.failures:                     # every round meets a picture that cannot be read
            self.failures.append(failure)
            self.fail(failure, error)
        return reason

    def _step(self, journal, case, arm, step, keys, make, *arguments):
        """Call make(*arguments), which adds `keys` to the journal. If it fails, write the reason under each missing key."""
        if self._in_vain.issuperset(keys):                   # failed in an earlier round; only the next run tries again
            raise _Failed
        try:
            self.computed += 1
            return make(*arguments)
        except FAILURES as error:
            reason = self._report(case, arm_label(arm), step, error)
            self._in_vain.update(keys)
            for key in keys:
                if not journal.get(key):
                    journal.add(key, step, failed=reason)
            raise _Failed from None

    def _require(self, *editors):
        """Raise _Later unless it is the turn of these editors; those with encoders alone are small and have no turn."""
        if self.only is not None and {*self.only} != {e for e in editors if self.plan["editors"][e]["kind"] != "encoders"}:
            raise _Later

    def _arm(self, journal, case, arm):
        """Do every step of one arm of one picture."""
        sha256 = self._protected(journal, case, arm)
        clean = reference_arm(arm)
        clean_sha256 = self._protected(journal, case, clean)
        prompts = prompts_of(self.plan, case.record)
        for seed in self.plan["seeds"]:
            reference = self._edits(journal, case, clean, clean_sha256, prompts, seed)
            edited = self._edits(journal, case, arm, sha256, prompts, seed)
            if sha256 != clean_sha256:
                self._distances(journal, case, arm, edited, reference)
            if self.judges:
                self._judge(journal, case, arm, prompts, edited)
        key = shift_key(self.plan, case.record, arm, sha256)
        if key and not journal.get(key):
            self._require(arm["target"])
            self._step(journal, case, arm, "shift", [key], self._shift, journal, case, arm, sha256, key)

    def _protected(self, journal, case, arm):
        """Immunize and attack the picture; return the SHA-256 of the picture that is then edited."""
        sha256 = case.record["sha256"]
        if arm["method"]:
            key = immunize_key(self.plan, case.record, arm)
            row = journal.get(key)
            if not row:
                self._require(*sources_of(arm))
                row = self._step(journal, case, arm, "immunize", [key], self._immunize, journal, case, arm, key)
            sha256 = row["sha256"]
        if arm["attack"]:
            key = attack_key(self.plan, arm, sha256)
            row = journal.get(key) or self._step(journal, case, arm, "attack", [key], self._attack, journal, arm, key, sha256)
            sha256 = row["sha256"]
        return sha256

    def _attack(self, journal, arm, key, sha256):
        from .. import images, metrics
        from ..purifiers import attacks
        started = time.perf_counter()
        before = journal.image(sha256)
        image = attacks.apply(arm["attack"]["name"], before, seed=self.plan["seed"],
                              editor=self.editors.get(arm["attack"]["editor"]))
        damage = metrics.psnr(images.to_pixels(image), images.to_pixels(before)).item()
        return journal.add(key, "attack", image, seconds=_since(started), psnr=_plain(damage))

    def _immunize(self, journal, case, arm, key):
        editor, texts, more = asked_of(self.plan, self.editors, case.record, arm)
        result = immunize(journal.image(case.record["sha256"]), editor, texts, method=arm["method"],
                          eps=self.plan["eps"], seed=self.plan["seed"], memory=self.memory, **arm["settings"], **more)
        kept = {name: result.report[name] for name in ("linf_steps", "budget_steps", "psnr", "ssim", "passes", "seconds",
                                                       "gradient_evaluations", "loop_seconds", "peak_memory_bytes", "note",
                                                       "options")}
        last = result.report["loss"][-1] if result.report["loss"] else None
        return journal.add(key, "immunize", result.image.convert("RGB"), **_plain(kept), last=_plain(last))

    def _edits(self, journal, case, arm, sha256, prompts, seed):
        """Make the missing edits in batches; return the SHA-256 of every edited picture, in the order of the prompts."""
        keys = [edit_key(self.plan, arm, sha256, prompt, seed) for prompt in prompts]
        missing = list({key: prompt for key, prompt in zip(keys, prompts, strict=True) if not journal.get(key)}.items())
        if missing:
            self._require(arm["target"])
        size = self.batch or len(missing) or 1
        for part in (missing[start:start + size] for start in range(0, len(missing), size)):
            self._step(journal, case, arm, "edit", [key for key, _ in part], self._edit, journal, arm, sha256, part, seed)
        return [journal.get(key)["sha256"] for key in keys]

    def _edit(self, journal, arm, sha256, part, seed):
        started = time.perf_counter()
        prompts = [words(self.plan, arm["target"], prompt) for _, prompt in part]
        edited = self.editors[arm["target"]].edit([journal.image(sha256)] * len(part), prompts, seed=seed,
                                                  **edit_options(self.plan, arm["target"]))
        for (key, _), image in zip(part, edited, strict=True):
            journal.add(key, "edit", image, seconds=round(_since(started) / len(part), 4))

    def _distances(self, journal, case, arm, edited, reference):
        """Measure the missing distances between the edits of the immunized picture and those of the original."""
        pairs = list(zip(edited, reference, strict=True))
        for step, names, key in (("metrics", PIXEL_METRICS, metrics_key), ("lpips", ("lpips",), lpips_key)):
            if step == "lpips" and self.lpips is None:
                continue
            keys = {pair: key(self.plan, *pair) for pair in pairs}
            missing = [pair for pair in keys if not journal.get(keys[pair])]
            if missing:
                self._step(journal, case, arm, step, [keys[pair] for pair in missing], self._measure, journal, keys, missing,
                           step, names, self.editors[arm["target"]].device)

    def _measure(self, journal, keys, pairs, step, names, device):
        """Measure pairs of pictures, all of one size, as many at once as PIXELS allows."""
        import torch

        from .. import images
        width, height = journal.image(pairs[0][0]).size
        size = max(1, PIXELS // (width * height))
        for part in (pairs[i:i + size] for i in range(0, len(pairs), size)):
            started = time.perf_counter()
            dist, ref = (torch.cat([images.to_pixels(journal.image(pair[side])) for pair in part]) for side in (0, 1))
            values, absent = distances(dist, ref, names, device, self.lpips)
            for i, pair in enumerate(part):
                journal.add(keys[pair], step, values=_plain({metric: of_all[i] for metric, of_all in values.items()}),
                            absent=absent, seconds=round(_since(started) / len(part), 4))

    def _shift(self, journal, case, arm, sha256, key):
        started = time.perf_counter()
        value = latent_shift(self.editors[arm["target"]], journal.image(case.record["sha256"]), journal.image(sha256))
        journal.add(key, "shift", shift=_plain(value), seconds=round(_since(started), 4))

    def _judge(self, journal, case, arm, prompts, edited):
        for prompt, sha256 in zip(prompts, edited, strict=True):
            key = verdict_key(self.plan, arm, case.record, prompt, sha256)
            if not journal.get(key):
                self._step(journal, case, arm, "verdict", [key], self._verdict, journal, case, arm, prompt, sha256, key)

    def _verdict(self, journal, case, arm, prompt, sha256, key):
        started = time.perf_counter()
        edit = Edit(sha256, case.record["id"], prompt["id"], arm["name"], case.samples[prompt["id"]], journal.image(sha256))
        journal.add(key, "verdict", judges=answers_of(ask(self.judges, [edit])), seconds=round(_since(started), 4))


def asked_of(plan, editors, case, arm):
    """(editor or editors, prompts, other arguments) of an arm's `immunize` for a picture, the record of a Case."""
    texts = texts_of(plan, case, arm)
    more = {"any_prompt": bank_of(plan, case)} if arm.get("texts") == "any" else {}
    if "sources" not in arm:
        return editors[arm["source"]], texts[arm["source"]], more
    return [editors[source] for source in texts], [], {"each": [{"prompts": own} for own in texts.values()], **more}


def reason_of(error, step):
    """The reason of a failure in one sentence. Out of memory has one fixed sentence: allocators print varying numbers."""
    if memory.is_short(error):
        return "out of memory" + ("; --edit-batch 1 edits one at a time" if step == "edit" else "")
    return cli.sentence(error)


def distances(dist, ref, names, device, lpips):
    """({metric: values}, {metric: reason of its absence}) of pixels (B,3,H,W), computed on a GPU if the editor is on one."""
    from .. import metrics
    if device.type == "cuda":
        dist, ref = dist.to(device), ref.to(device)
    values, absent = {}, {}
    for name in names:
        options = {"network": lpips.network, "weights": lpips} if name == "lpips" else {}
        try:
            values[name] = getattr(metrics, name)(dist, ref, **options).tolist()
        except ValueError as error:                          # the pictures are too small for this metric
            absent[name] = str(error)
    return values, absent


def latent_shift(editor, original, immunized):
    """The shift (editors/shifts.py) of an editor's own latents at its working size, of two PIL images."""
    import torch

    from .. import images
    from ..editors.shifts import shift
    from ..models.precision import full_float32
    with torch.no_grad(), full_float32():
        before, after = (editor.encode(editor.resize(images.to_pixels(image).to(editor.device))).float()
                         for image in (original, immunized))
        return shift(after, before).item()


def answers_of(records):
    """{judge: [semantic mismatch, perceptual degradation, status]} of Records on one edit."""
    return {r.judge: [r.semantic_mismatch, r.perceptual_degradation, r.status] for r in records}


def _since(started):
    return time.perf_counter() - started


def _plain(value):
    """The value with infinities as the strings that `float` reads, since JSON has none."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and value - value != 0 else value
