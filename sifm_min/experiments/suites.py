"""The suites: the arms of each experiment, and the pictures it runs on.

A suite is a list of arms (`plan.make_arm`): the method, the editor that it protects against, the editor of the attacker, and
a change of the picture before the edit. Every suite has the clean picture and random noise of the same budget beside its
methods.
"""

from ..files.digests import picture_sha256
from ..methods import METHODS
from .plan import NOISE, Case, controls, make_arm

SUITES = ("white-box", "transfer", "ablation", "lambda", "consistency", "robustness")
LAMBDAS = (0.001, 0.01, 0.1, 1.0, 10.0, 100.0, 1000.0)       # the paper's Table VII
ONLY_DISTANCE = 1e9              # with this weight the norm's part of a float32 gradient is rounded away: distance alone
ELSEWHERE = (NOISE, "sifm", "latent", "decontext")           # the control, the last one, and those for other kinds of editors
COMPARED = (*(name for name in METHODS if name not in ELSEWHERE), "sifm")               # SIFM last, as in the paper
WORLD_SEED = 0                                               # of the miniature's samples
# The prompt types of a suite. The paper has unseen prompts in Tables II to IV only.
PROMPTS = {"white-box": ("original", "unseen"), "consistency": ("original", "unseen")}
METHODS_OF = {"white-box": COMPARED, "consistency": COMPARED, "transfer": COMPARED, "robustness": ("sifm",)}


# -- arms ------------------------------------------------------------------------------------------------------------------

def arms(suite, editors, methods, *, moving=True):
    """(arms, remarks) of a suite, controls first.

    editors: name -> editor; transfer goes both ways between its two. moving: True if attacks that move the picture can be
    judged.
    """
    names = list(editors)
    if suite == "transfer" and len(names) != 2:
        raise ValueError("transfer needs two editors: add --other NAME")
    if suite == "transfer":
        return [arm for source, target in (names, names[::-1]) for arm in (
            *controls(target), *(make_arm(m, m, source=source, target=target) for m in methods))], []
    own = names[0]

    def sifm(name, **options):
        return make_arm(name, "sifm", source=own, target=own, options=options)
    if suite == "lambda":
        return [*controls(own), *(sifm(f"lambda {lam:g}", lam=lam) for lam in LAMBDAS)], []
    if suite == "ablation":
        return [*controls(own), sifm("distance only", lam=ONLY_DISTANCE), sifm("norm only", lam=0.0), sifm("sifm")], []
    plain = [*controls(own), *(make_arm(m, m, source=own, target=own) for m in methods)]
    return (plain, []) if suite != "robustness" else _attacked(plain, editors, moving)


def _attacked(plain, editors, moving):
    """(arms, remarks): the arms as they are, and again after each attack that applies."""
    from ..purifiers import attacks
    arms, remarks = list(plain), []
    own, other = [*editors, None][:2]
    for name, attack in attacks.ATTACKS.items():
        used = {"own": own, "other": other}.get(attack.needs)
        if attack.needs and used is None:
            remarks.append(f"{name} is left out: it needs another editor, which --other NAME adds")
        elif reason := attack.refusal(editors.get(used)):
            remarks.append(f"left out: {reason}")
        elif attack.moves and not moving:
            remarks.append(f"{name} is left out: it moves the picture, and the ground truth of the oracles stays where it is")
        else:
            arms += [{**arm, "name": f"{arm['name']}, {name}", "attack": {"name": name, "editor": used, "moves": attack.moves}}
                     for arm in plain]
    return arms, remarks


# -- pictures --------------------------------------------------------------------------------------------------------------

def miniature_cases(count):
    """`count` pictures of the miniature's world, each with its instruction, five unseen ones, and their ground truth."""
    from .. import miniature
    return [_world_case(f"miniature-{number:03}", sample) for number, sample in
            enumerate(miniature.samples(count, WORLD_SEED))]


def _world_case(case_id, sample):
    samples = {"original": sample} | {f"unseen-{i}": unseen for i, unseen in enumerate(sample.unseen, 1)}
    prompts = [{"id": name, "type": name.split("-")[0], "instruct": s.prompt, "img2img": s.target_caption,
                "truth": picture_sha256(s.target)} for name, s in samples.items()]
    record = {"id": case_id, "category": sample.category, "prompts": prompts, "sha256": picture_sha256(sample.image)}
    return Case(record, lambda: sample.image, samples)


def manifest_cases(path, kinds, *, oracles, count=None):
    """The first `count` pictures of a manifest (manifest.py). A picture that cannot be used is a case with a reason.

    kinds: the kinds of the editors, which decide the words that are needed. oracles: True if each picture needs its ground
    truth.
    """
    from . import manifest
    cases = []
    for item in manifest.read_manifest(path)[:count]:
        record = {"id": item.id, "category": item.category, "prompts": [], "sha256": None}
        samples = None
        try:
            names = ["original", *(f"unseen-{i}" for i in range(1, 1 + len(item.unseen_prompts)))]
            if oracles:
                sample = item.sample()
                samples = dict(zip(names, (sample, *sample.unseen), strict=False))
            by_kind = {kind: item.prompts(kind) for kind in {"instruct", *kinds}}
            for name, texts in zip(names, zip(*by_kind.values(), strict=True), strict=True):
                record["prompts"].append({
                    "id": name, "type": name.split("-")[0], "instruct": None, "img2img": None,
                    **dict(zip(by_kind, texts, strict=True)),
                    "truth": picture_sha256(samples[name].target) if oracles else None})
            record["sha256"] = picture_sha256(item.picture().image)
        except (ValueError, OSError) as error:
            record["reason"] = " ".join(str(error).split())
        cases.append(Case(record, lambda item=item: item.picture().image, samples))
    return cases
