"""What an experiment is made of: the arms of each suite, the pictures it runs on, and how long all of it will take.

A suite is a list of arms (protocol.arm): which method immunizes against which editor, who edits, and what is done to the
picture in between. Every suite has the clean picture and random noise of the same budget beside its methods.
"""

import statistics
import time

from . import isr, panels, protocol
from .immunize import METHODS, immunize

SUITES = ("white-box", "transfer", "ablation", "lambda", "consistency", "robustness")
LAMBDAS = (0.001, 0.01, 0.1, 1.0, 10.0, 100.0, 1000.0)       # the paper's Table VII
ONLY_DISTANCE = 1e9              # a weight at which the norm's part of a float32 gradient is rounded away: the distance alone
COMPARED = (*(name for name in METHODS if name not in (protocol.NOISE, "sifm")), "sifm")      # last, as in the paper
WORLD_SEED = 0                                               # of the miniature's samples
# Which prompts a suite edits with: outside of Tables II to IV the paper has the original one alone.
PROMPTS = {"white-box": ("original", "unseen"), "consistency": ("original", "unseen")}
METHODS_OF = {"white-box": COMPARED, "consistency": COMPARED, "transfer": COMPARED, "robustness": ("sifm",)}


# -- arms ------------------------------------------------------------------------------------------------------------------

def arms(suite, editors, methods, *, moving=True):
    """(arms, remarks) of a suite, controls first. editors: name -> editor; transfer goes both ways between its two. moving:
    whether attacks that move the picture can be judged."""
    names = list(editors)
    if suite == "transfer" and len(names) != 2:
        raise ValueError("transfer needs two editors: add --other NAME")
    if suite == "transfer":
        return [one for source, target in (names, names[::-1]) for one in (
            *protocol.controls(target), *(protocol.arm(m, m, source=source, target=target) for m in methods))], []
    own = names[0]

    def sifm(name, **options):
        return protocol.arm(name, "sifm", source=own, target=own, options=options)
    if suite == "lambda":
        return [*protocol.controls(own), *(sifm(f"lambda {lam:g}", lam=lam) for lam in LAMBDAS)], []
    if suite == "ablation":
        return [*protocol.controls(own), sifm("distance only", lam=ONLY_DISTANCE), sifm("norm only", lam=0.0), sifm("sifm")], []
    plain = [*protocol.controls(own), *(protocol.arm(m, m, source=own, target=own) for m in methods)]
    return (plain, []) if suite != "robustness" else _attacked(plain, editors, moving)


def _attacked(plain, editors, moving):
    """The arms as they are, and again after each attack that applies."""
    from . import robustness
    found, remarks = list(plain), []
    own, other = [*editors, None][:2]
    for name, attack in robustness.ATTACKS.items():
        used = {"own": own, "other": other}.get(attack.needs)
        if attack.needs and used is None:
            remarks.append(f"{name} is left out: it needs another editor, which --other NAME adds")
        elif why := attack.refusal(editors.get(used)):
            remarks.append(f"left out: {why}")
        elif attack.moves and not moving:
            remarks.append(f"{name} is left out: it moves the picture, and the ground truth of the oracles stays where it is")
        else:
            found += [{**one, "name": f"{one['name']}, {name}", "attack": {"name": name, "editor": used,
                                                                             "moves": attack.moves}} for one in plain]
    return found, remarks


# -- pictures --------------------------------------------------------------------------------------------------------------

def miniature_cases(count):
    """`count` pictures of the miniature's world: the instruction and five unseen ones, with their ground truth."""
    from . import miniature
    return [_world_case(f"miniature-{number:03}", sample) for number, sample in
            enumerate(miniature.samples(count, WORLD_SEED))]


def _world_case(called, sample):
    asked = {"original": sample} | {f"unseen-{i}": other for i, other in enumerate(sample.unseen, 1)}
    prompts = [{"id": name, "type": name.split("-")[0], "instruct": one.prompt, "img2img": one.target_caption,
                "truth": panels.picture_sha256(one.target)} for name, one in asked.items()]
    record = {"id": called, "category": sample.category, "prompts": prompts, "sha256": panels.picture_sha256(sample.image)}
    return protocol.Case(record, lambda: sample.image, asked)


def manifest_cases(path, kinds, *, oracles, count=None):
    """The pictures of a manifest (manifest.py), the first `count`. kinds: of the editors, which decide what words are needed;
    oracles: whether each needs its ground truth. One that has not what it takes is a case with a reason."""
    from . import manifest
    found = []
    for item in manifest.read(path)[:count]:
        record = {"id": item.id, "category": item.category, "prompts": [], "sha256": None}
        try:
            if oracles:
                sample = item.sample()
                samples = dict(zip(("original", *(f"unseen-{i}" for i in range(1, 1 + len(item.unseen_prompts)))),
                                   (sample, *sample.unseen), strict=False))
            wanted = {kind: item.prompts(kind) for kind in {"instruct", *kinds}}
            for i, words in enumerate(zip(*wanted.values(), strict=True)):
                name = f"unseen-{i}" if i else "original"
                record["prompts"].append({
                    "id": name, "type": name.split("-")[0], "instruct": None, "img2img": None,
                    **dict(zip(wanted, words, strict=True)),
                    "truth": panels.picture_sha256(samples[name].target) if oracles else None})
            record["sha256"] = panels.picture_sha256(item.picture().image)
        except (ValueError, OSError) as error:
            record["reason"] = " ".join(str(error).split())
        found.append(protocol.Case(record, lambda item=item: item.picture().image, samples if oracles else None))
    return found


# -- how long it takes -----------------------------------------------------------------------------------------------------

class _Enough(Exception):
    """Raised out of a run that is only timed."""


def seconds_each(asked, editors, case, left, *, judges=None, lpips=None):
    """{(step, what): seconds} of what a protocol.Left has to do: the median of what was done before, else timed now. Of
    what goes step by step the first three are, of the rest one; None where that fails. A panel is not waited for."""
    found = {}
    for one in asked["arms"]:
        target, attack = one["target"], one["attack"]
        ways = {("immunize", one["method"]): _timed_immunization, ("edit", target): _timed_edit,
                ("metrics", target): _timed_distances, ("lpips", target): _timed_distances}
        if attack:
            ways["attack", attack["name"]] = _timed_attack
        if judges:
            ways["verdict", target] = _timed_verdict
        for place, way in ways.items():
            if place in left.todo and place not in found:
                before = left.kept.get(place)
                try:
                    found[place] = statistics.median(before) if before else way(
                        asked, editors, case, one, step=place[0], judges=judges, lpips=lpips)
                except protocol.FAILURES:                    # what is wrong will be told where it belongs
                    found[place] = None
    return found


def _timed_immunization(asked, editors, case, one, **_):
    steps = one["settings"].get("steps", 1)
    return _timed(lambda on_step: immunize(
        case.read(), editors[one["source"]], protocol.words(asked, one["source"], case.record["prompts"][0]),
        method=one["method"], eps=asked["eps"], seed=asked["seed"], on_step=on_step, **one["settings"]), steps)


def _timed_edit(asked, editors, case, one, **_):
    prompts = [protocol.words(asked, one["target"], prompt) for prompt in protocol.prompts_of(asked, case.record)]
    editor = editors[one["target"]]
    steps = len(editor.plan(asked["edit"].get("steps")).timesteps)
    return _timed(lambda on_step: editor.edit([case.read()] * len(prompts), prompts, seed=asked["seeds"][0], on_step=on_step,
                                              **protocol.edit_options(asked, one["target"])), steps) / len(prompts)


def _timed_attack(asked, editors, case, one, **_):
    from . import robustness
    image, started = case.read(), time.perf_counter()
    robustness.apply(one["attack"]["name"], image, editor=editors.get(one["attack"]["editor"]), seed=asked["seed"])
    return time.perf_counter() - started


def _timed_distances(asked, editors, case, one, *, step, lpips, **_):
    """Of the picture from itself mirrored, as many at once as a run takes."""
    from . import images
    pixels = images.to_pixels(case.read())
    count = min(len(protocol.prompts_of(asked, case.record)), max(1, protocol.MEASURED // pixels[0, 0].numel()))
    pixels, started = pixels.expand(count, -1, -1, -1), time.perf_counter()
    protocol.distances(pixels, pixels.flip(3), protocol.METRICS if step == "metrics" else ("lpips",),
                       editors[one["target"]].device, lpips)
    return (time.perf_counter() - started) / count


def _timed_verdict(asked, editors, case, one, *, judges, **_):
    asking = judges(editors[one["target"]])
    image, started = case.read(), time.perf_counter()
    list(isr.ask(asking, [isr.Edit("timed", "timed", "timed", one["name"], case.samples["original"], image)]))
    return time.perf_counter() - started


def _timed(work, steps):
    """Seconds of work(on_step), from its first three steps; a step of the whole that is not there is not waited for."""
    stamps = [time.perf_counter()]

    def on_step(*_):
        stamps.append(time.perf_counter())
        if len(stamps) > min(3, steps):
            raise _Enough
    try:
        work(on_step)
    except _Enough:
        pass
    else:
        return time.perf_counter() - stamps[0]
    first, each = stamps[1] - stamps[0], stamps[-1] - stamps[-2]
    return first + each * (steps - 1)


def duration(seconds):
    """Seconds as people say them."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02} min"
