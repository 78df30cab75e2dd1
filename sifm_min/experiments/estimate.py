"""The time that a run takes: the seconds of each kind of step, from finished steps or from a short trial."""

import os
import statistics
import time

from ..immunize import immunize
from ..judging.records import Edit, ask
from ..objectives.around import choose
from . import results
from .plan import PIXEL_METRICS, edit_options, prompts_of, words, work_of
from .runner import FAILURES, PIXELS, asked_of, distances, latent_shift

# The name of a step: one of them, several, and the thing that takes the time.
STEP_WORDS = {"immunize": ("immunization", "immunizations", ""), "attack": ("attack", "attacks", "an attack"),
         "edit": ("edit", "edits", ""), "metrics": ("comparison", "comparisons", "the distances of an edit"),
         "lpips": ("LPIPS", "LPIPS", "LPIPS"), "verdict": ("verdict", "verdicts", "a verdict"),
         "shift": ("shift of latents", "shifts of latents", "a shift of latents")}


class _Enough(Exception):
    """Ends a trial run."""


def announcement(folder, plan, editors, cases, jobs, *, by_panel, judges=None, lpips=None):
    """A sentence with the number of missing steps and the time that they will take, before the run begins.

    by_panel: True if a panel judges afterwards; its time is not estimated.
    """
    missing = results.left(folder, plan, cases)
    counts = {step: sum(n for (other, _), n in missing.todo.items() if other == step) for step, _ in missing.todo}
    verdicts = counts.pop("verdict", 0) if by_panel else 0
    later = f", and then {verdicts} verdicts by the panel" if verdicts else ""
    todo = ", ".join(f"{n} {STEP_WORDS[step][n > 1]}" for step, n in counts.items()) or "nothing"
    text = f"to do: {todo}; {missing.finished} pictures done"
    readable = next((case for case in cases if case.record["sha256"]), None)
    if not counts or readable is None:
        return text + later
    seconds = seconds_each(plan, editors, readable, missing, judges=judges, lpips=lpips)
    total = {(step, what): seconds[step, what] * n for (step, what), n in missing.todo.items()
             if step in counts and seconds[step, what] is not None}
    each = [f"{what if step == 'immunize' else f'an edit by {what}'} {_brief(seconds[step, what])}"
            for step, what in total if step in ("immunize", "edit")]
    for step in dict.fromkeys(step for step, _ in total if step not in ("immunize", "edit")):
        mean = sum(s for (other, _), s in total.items() if other == step) / counts[step]
        each.append(f"{STEP_WORDS[step][2]} {_brief(mean)}")
    each += [f"not counted: {what}, {step}, which failed" for (step, what), s in seconds.items() if s is None]
    return f"{text}; about {duration(sum(total.values()) / jobs)}{later} ({', '.join(each)})"


def seconds_each(plan, editors, case, missing, *, judges=None, lpips=None):
    """{(step, what): seconds} of the missing steps, a `results.Left`; None if the trial fails.

    The seconds are the median of finished steps of that kind, else timed now: the first three steps of a loop, or one call.
    A panel is not timed.
    """
    seconds = {}
    for arm in plan["arms"]:
        target, attack = arm["target"], arm["attack"]
        trials = {("immunize", work_of(arm)): _immunization, ("edit", target): _edit, ("metrics", target): _distances,
                  ("lpips", target): _distances, ("shift", target): _shift}
        if attack:
            trials["attack", attack["name"]] = _attack
        if judges:
            trials["verdict", target] = _verdict
        for kind, trial in trials.items():
            if kind in missing.todo and kind not in seconds:
                before = missing.kept.get(kind)
                try:
                    seconds[kind] = statistics.median(before) if before else trial(
                        plan, editors, case, arm, step=kind[0], judges=judges, lpips=lpips)
                except FAILURES:                             # the run itself reports it
                    seconds[kind] = None
    return seconds


def _immunization(plan, editors, case, arm, **_):
    steps = arm["settings"].get("steps", 1)
    around = choose(arm["method"], **{name: arm["settings"].get(name) for name in ("flat", "refine_text", "blur")},
                    any_prompt=arm.get("texts") == "any")
    editor, texts, more = asked_of(plan, editors, case.record, arm)
    plain, later = refinements(around, len(texts), steps)
    return timed(lambda on_step: immunize(
        case.read(), editor, texts, method=arm["method"], eps=plan["eps"], seed=plan["seed"], on_step=on_step,
        **arm["settings"], **more), steps, plain, later)


def refinements(around, texts, steps):
    """(the first steps that refine their text, what is refined after them, in the time of so many steps)."""
    if not around.refine_text:
        return 0, 0.0
    turns = [-(-len(range(n, steps, texts)) // around.refine_text["every"]) - 1 for n in range(min(texts, steps))]
    return len(turns), sum(turns) * around.refine_text["rounds"] / (2 if around.flat else 1)


def _edit(plan, editors, case, arm, **_):
    prompts = [words(plan, arm["target"], prompt) for prompt in prompts_of(plan, case.record)]
    editor = editors[arm["target"]]
    steps = len(editor.plan(plan["edit"].get("steps")).timesteps)
    return timed(lambda on_step: editor.edit([case.read()] * len(prompts), prompts, seed=plan["seeds"][0], on_step=on_step,
                                             **edit_options(plan, arm["target"])), steps) / len(prompts)


def _attack(plan, editors, case, arm, **_):
    from ..purifiers import attacks
    image, started = case.read(), time.perf_counter()
    attacks.apply(arm["attack"]["name"], image, editor=editors.get(arm["attack"]["editor"]), seed=plan["seed"])
    return time.perf_counter() - started


def _distances(plan, editors, case, arm, *, step, lpips, **_):
    """Measure the picture against its mirror image, as many at once as a run measures."""
    from .. import images
    pixels = images.to_pixels(case.read())
    count = min(len(prompts_of(plan, case.record)), max(1, PIXELS // pixels[0, 0].numel()))
    pixels, started = pixels.expand(count, -1, -1, -1), time.perf_counter()
    distances(pixels, pixels.flip(3), PIXEL_METRICS if step == "metrics" else ("lpips",), editors[arm["target"]].device, lpips)
    return (time.perf_counter() - started) / count


def _shift(plan, editors, case, arm, **_):
    image, started = case.read(), time.perf_counter()
    latent_shift(editors[arm["target"]], image, image)
    return time.perf_counter() - started


def _verdict(plan, editors, case, arm, *, judges, **_):
    image, started = case.read(), time.perf_counter()
    list(ask(judges, [Edit("timed", "timed", "timed", arm["name"], case.samples["original"], image)]))
    return time.perf_counter() - started


def timed(work, steps, apart=0, later=0.0):
    """The seconds that work(on_step) takes with this number of steps, from a few of them.

    The first step may also compute something for all. apart: so many of the first steps, at least two, do more than others.
    later: what others do more, in the time of so many steps.
    """
    apart = min(max(apart, 2), steps - 1)
    stamps = [time.perf_counter()]

    def on_step(*_):
        stamps.append(time.perf_counter())
        if len(stamps) > apart + 1:
            raise _Enough
    try:
        work(on_step)
    except _Enough:
        pass
    else:                                                    # fewer steps than expected: that was the whole
        return time.perf_counter() - stamps[0]
    each = stamps[-1] - stamps[-2]
    return stamps[apart] - stamps[0] + each * (steps - apart + later)


class Clock:
    """Called after each picture: say how many pictures are finished, by all processes, and how long the rest takes."""

    def __init__(self, folder, plan, cases, say):
        self.folder, self.plan, self.cases, self.say = folder, plan, cases, say
        self.started = self.said = time.perf_counter()
        self.before = None                                   # pictures that were finished before this run

    def __call__(self, case):
        now = time.perf_counter()
        if self.before is not None and now - self.said < 5:
            return
        begun = [case for case in self.cases
                 if case.record["sha256"] and os.path.exists(self.folder.journal(case.record["sha256"]))]
        done = results.left(self.folder, self.plan, begun, again=False).finished
        before, self.said = self.before, now
        if before is None:                                   # a picture of an earlier run takes less than 5 seconds
            self.before = done - (now - self.started > 5)
        elif done < len(self.cases) and done > before:
            spent = now - self.started
            self.say(f"{done} of {len(self.cases)} pictures, {duration(spent)} so far, about "
                     f"{duration(spent / (done - before) * (len(self.cases) - done))} left")


def duration(seconds):
    """Seconds in words: 40 s, 12 min, 2 h 05 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02} min"


def _brief(seconds):
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1000 * seconds:.0f} ms"
