"""The suites: the arms of each experiment, and the pictures it runs on.

A suite is a list of arms (`plan.make_arm`): the method, the editor that it protects against, the editor of the attacker, and
a change of the picture before the edit. Every suite has the clean picture and random noise of the same budget beside its
methods.
"""

from ..files.digests import picture_sha256
from ..instructions.bank import ANY, Bank, Instruction, find_bank
from ..methods import METHODS
from .plan import NOISE, Case, controls, editing, make_arm

SUITES = ("white-box", "transfer", "ablation", "lambda", "consistency", "robustness", "unseen")
LAMBDAS = (0.001, 0.01, 0.1, 1.0, 10.0, 100.0, 1000.0)       # the paper's Table VII
ONLY_DISTANCE = 1e9              # with this weight the norm's part of a float32 gradient is rounded away: distance alone
ELSEWHERE = (NOISE, "sifm", "latent", "decontext")           # the control, the last one, and those for other kinds of editors
NEWER = ("danp", "diffusionguard", "tdae", "sifm-output")    # which the paper's tables do not have: --methods adds them
COMPARED = (*(name for name in METHODS if name not in ELSEWHERE), "sifm")               # SIFM last, as in the paper
PAPERS = tuple(name for name in COMPARED if name not in NEWER)
WORLD_SEED = 0                                               # of the miniature's samples
# The prompt types of a suite. The paper has unseen prompts in Tables II to IV only.
PROMPTS = dict.fromkeys(("white-box", "consistency", "unseen"), ("original", "unseen"))
METHODS_OF = {"white-box": PAPERS, "consistency": PAPERS, "transfer": PAPERS, "robustness": ("sifm",),
              "unseen": ("sifm",)}
TEXTS = {"one": "", "five": " (five prompts)", "any": " (any prompt)"}       # what the arms of unseen are made for: their names


# -- arms ------------------------------------------------------------------------------------------------------------------

def arms(suite, editors, methods, *, moving=True, robust=False):
    """(arms, remarks) of a suite, controls first.

    editors: name -> editor, and for transfer, beside its two, one with encoders alone, if there is one. moving: True if
    attacks that move the picture can be judged. robust: True if all methods expect purifiers.
    An arm that changes the protection of a method is called after it, as "sifm (both)": see `gains.py`.
    """
    names = list(editing(editors))
    if suite == "transfer" and len(names) != 2:
        raise ValueError("transfer needs two editors: add --other NAME")
    if suite == "transfer":
        both = {"both": names} | {f"both + {name}": [*names, name] for name in editors if name not in names}
        return [arm for source, target in (names, names[::-1]) for arm in (
            *controls(target), *(make_arm(m, m, source=source, target=target) for m in methods), *(
                make_arm(f"{m} ({name})", m, source=made_for, target=target) for m in methods
                for name, made_for in {"white box": target, **both}.items()))], []
    own = names[0]

    def sifm(name, **options):
        return make_arm(name, "sifm", source=own, target=own, options=options)
    if suite == "lambda":
        return [*controls(own), *(sifm(f"lambda {lam:g}", lam=lam) for lam in LAMBDAS)], []
    if suite == "ablation":
        return [*controls(own), sifm("distance only", lam=ONLY_DISTANCE), sifm("norm only", lam=0.0), sifm("sifm")], []
    if suite == "unseen":
        return [*controls(own), *(make_arm(f"{m}{called}", m, source=own, target=own, texts=texts) for m in methods
                                  for texts, called in TEXTS.items())], []
    plain = [*controls(own), *(make_arm(m, m, source=own, target=own) for m in methods)]
    if suite == "robustness" and not robust:
        plain += [make_arm(f"{m} (robust)", m, source=own, target=own, options={"robust": True}) for m in methods]
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


def bank(path=None, *, world=False):
    """The `Bank` that unseen draws from: a file's, a trained phrase of each of the miniature's edits, or the one that ships."""
    if path or not world:
        return find_bank(path or True)
    from ..miniature.kinds import KINDS
    asked = [kind.phrases(option)[0] for kind in KINDS.values() for option in kind.options]
    return Bank("miniature", tuple(Instruction(ANY, phrase, phrase) for phrase in asked))


# -- pictures --------------------------------------------------------------------------------------------------------------

def miniature_cases(count):
    """`count` of the photographs that ship, each with an instruction, five unseen ones, and their exact results."""
    from .. import miniature
    return [_world_case(f"miniature-{number:03}", sample) for number, sample in
            enumerate(miniature.samples(count, WORLD_SEED))]


def _world_case(case_id, sample):
    samples = {"original": sample} | {f"unseen-{i}": unseen for i, unseen in enumerate(sample.unseen, 1)}
    prompts = [{"id": name, "type": name.split("-")[0], "instruct": s.prompt, "img2img": None,
                "truth": picture_sha256(s.target)} for name, s in samples.items()]
    record = {"id": case_id, "category": sample.category, "prompts": prompts, "sha256": picture_sha256(sample.image),
              "edits": [[s.kind, s.option] for s in samples.values()]}
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
                record["edits"] = [[s.kind, s.option] for s in samples.values()]
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
