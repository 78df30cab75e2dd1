"""The plan of a run, and the keys of its steps: immunize -> attack -> edit -> distances -> verdict; and shift.

A *plan* is a JSON-ready dict of everything that decides the results (see `make_plan`). It lists the pictures with their
prompts, the editors, and the *arms*, the rows of a table. The runner carries it out for every picture, arm, prompt and
seed. The result of a step is kept under its *key*: the hash of everything that decides it, such as the bytes of the
pictures, weights, method, options, prompt, seed and version. A step whose key is known is not computed again. So a run
that was killed, extended or given another option computes only what is new, and suites share their results.
"""

import inspect
from dataclasses import asdict, dataclass

from .. import __version__
from ..files.digests import digest
from ..instructions.bank import ANY, Bank, Instruction
from ..methods import METHODS, PROTOCOL, options_of, settings

# The steps; a number is raised when code changes results.
STEPS = {"immunize": 2, "attack": 2, "edit": 1, "metrics": 1, "lpips": 1, "verdict": 1, "shift": 1}
PIXEL_METRICS = ("psnr", "ssim", "vifp", "fsim")
CONTROL, NOISE = "control", "noise"
SHARED = ("suite", "version", "seed", "eps", "given", "preset", "edit", "prompts")         # by the plans of one table


@dataclass(frozen=True)
class Case:
    """A picture of a run.

    record: JSON-ready id, category, prompts and sha256 of the pixels. sha256 is None if the picture cannot be read; then the
    record has a `reason`. prompts: [{"id", "type", "instruct", "img2img", "truth"}], with the words for either kind of
    editor. read() returns the picture, PIL RGB, or raises ValueError. samples: prompt id -> miniature.Sample, the ground
    truth that the oracles judge by; None for pictures whose exact results are not known.
    """

    record: dict
    read: object
    samples: dict | None = None


# -- editors and arms --------------------------------------------------------------------------------------------------

def editor_identity(editor):
    """Everything that decides an editor's edits, JSON-ready: equal for two editors whose edits are equal."""
    provenance = editor.provenance()
    config = digest([str(editor.scheduler.config), str(getattr(editor.vae, "config", None))])
    fields = {name: provenance[name] for name in ("weights", "scheduler", "defaults", "dtype", "device")} | {"config": config}
    if provenance["vae_dtype"] != "float32":                 # recorded only where it differs from the default
        fields["vae_dtype"] = provenance["vae_dtype"]
    return fields


def editing(editors):
    """Of name -> editor, those that edit: not those with encoders alone."""
    return {name: editor for name, editor in editors.items() if getattr(editor, "kind", None) != "encoders"}


def about_editor(editor):
    """The entry of an editor in a plan."""
    return {"identity": editor_identity(editor), "kind": editor.kind, "notice": editor.notice, "source": str(editor.name),
            "revision": editor.provenance()["revision"]}


def make_arm(name, method=None, *, source, target, options=None, attack=None, texts="one"):
    """One row of a table, JSON-ready: `method` immunizes against the editor `source`, the attacker edits with `target`.

    source: the name of an editor, or a list of names for one perturbation against all of them. texts: the texts that the method
    is given: "one", the prompt itself; "five", with four more of the plan's bank; "any", with all of the bank, drawn.
    method None stands for the clean picture. options: those of this arm beside the plan's. attack: a change of the picture
    before the edit, {"name", "editor" (the name of the editor that it uses, or None), "moves"}; see purifiers/attacks.py.
    """
    sources = [source] if isinstance(source, str) else list(source)
    return {"name": name, "method": method, "source": " + ".join(sources), "target": target, "options": options or {},
            "attack": attack, **({"sources": sources} if sources[1:] else {}), **({"texts": texts} if texts != "one" else {})}


def sources_of(arm):
    """The names of the editors that an arm protects against."""
    return arm.get("sources") or [arm["source"]]


def work_of(arm):
    """The method of an arm with what makes it another work: several editors, purifiers, or several texts."""
    return arm["method"] and arm["method"] + "".join(
        [f" for {' and '.join(sources_of(arm))}"] * ("sources" in arm) + [", robust"] * bool(arm["options"].get("robust"))
        + [{"five": ", five prompts", "any": ", any prompt"}.get(arm.get("texts"), "")])


def arm_label(arm):
    """The name of an arm, with its editor where that is not the target."""
    return arm["name"] + (f", made for {arm['source']}" if arm["source"] != arm["target"] else "")


def reference_arm(arm):
    """The arm of the clean picture whose edits this arm is measured against. It has the attack if that moves the picture."""
    return {**arm, "method": None, "attack": arm["attack"] if (arm["attack"] or {}).get("moves") else None}


def controls(target):
    """The two arms beside every method: the clean picture, and random noise of the same budget."""
    return [make_arm(CONTROL, source=target, target=target), make_arm(NOISE, NOISE, source=target, target=target)]


# -- the plan ----------------------------------------------------------------------------------------------------------

def make_plan(suite, editors, cases, arms, *, seeds, seed=0, eps=0.03, options=None, preset="protocol", edit=None,
              prompts=None, judge=None, lpips=None, bank=None):
    """The plan of a run, JSON-ready.

    editors: name -> about_editor(...). seeds: of the edits; seed: of the perturbation. options: of the loop and of methods,
    each for the methods that have it; {"robust": True} is for all but the controls, {"budget": "texture"} and "blur" for noise
    as well, "flat" and "refine_text" for the methods that can have them (`objectives.around`).
    edit: options of every edit. prompts: the types ("original", "unseen") that are edited. judge: {"kind": "oracle"} or the
    record of a panel. lpips: the hash of its weights, or the reason of their absence. bank: an `instructions.bank.Bank`, which
    stands in the plan if an arm draws from it.
    """
    options = options or {}
    arms = [{**arm, "settings": _settings(arm, options, preset)} for arm in arms]
    return {"suite": suite, "version": __version__, "editors": editors, "cases": [case.record for case in cases], "arms": arms,
            "seeds": list(seeds), "seed": seed, "eps": eps, "given": options, "preset": preset, "edit": edit or {},
            "prompts": list(prompts or ("original", "unseen")), "judge": judge or {"kind": "oracle"}, "lpips": lpips or {},
            **({"bank": asdict(bank)} if any("texts" in arm for arm in arms) else {})}


def _settings(arm, given, preset):
    """The loop of an arm's method in full, and its options that are not the method's defaults; for the controls neither."""
    if arm["method"] is None:
        return {}
    budget = {"budget": given["budget"]} if given.get("budget", "uniform") != "uniform" else {}
    if given.get("blur"):
        budget["blur"] = given["blur"]
    if arm["method"] == NOISE:
        return budget
    from ..baselines import NATIVE
    from ..objectives.around import NOT_FLAT, REFINED
    around = {name: given[name] for name, fits in (("flat", arm["method"] not in NOT_FLAT),
                                                   ("refine_text", arm["method"] in REFINED and arm.get("texts") != "any"))
              if given.get(name) and fits}
    known = (*PROTOCOL, *options_of(arm["method"]))
    own = {name: value for name, value in arm["options"].items() if name != "robust"}
    chosen = {name: value for name, value in given.items() if name in known} | own
    preset = preset if arm["method"] in NATIVE else "protocol"
    loop, options = settings(arm["method"], preset, **chosen)
    defaults = inspect.signature(METHODS[arm["method"]]).parameters      # a default has the same key, given or not
    robust = arm["options"].get("robust", given.get("robust"))
    robust = {"robust": True} if robust else {}                          # recorded only where it differs from the default
    return {"preset": preset, **loop, **robust, **around, **budget,
            **{name: value for name, value in options.items() if value != defaults[name].default}}


def group_key(plan):
    """The key of the table that a plan belongs to: all of the plan but its pictures, arms and seeds."""
    editors = {name: about["identity"] for name, about in plan["editors"].items()}
    return digest([{name: plan[name] for name in SHARED}, editors, plan["judge"], *([plan["bank"]] if "bank" in plan else [])])


def prompts_of(plan, case):
    """The prompts of a picture (the record of a Case) that the plan edits with."""
    return [prompt for prompt in case["prompts"] if prompt["type"] in plan["prompts"]]


def words(plan, editor, prompt):
    """The text of a prompt for an editor: the instruction, or for img2img the caption of the result."""
    return prompt[plan["editors"][editor]["kind"]]


def bank_of(plan, case):
    """The `Bank` of a plan for a picture (the record of a Case), without the prompts that this picture is edited with, and
    without other words for the same edits of the miniature."""
    from ..miniature.kinds import KINDS
    bank = Bank(plan["bank"]["name"], tuple(Instruction(**one) for one in plan["bank"]["instructions"]))
    own = [prompt[kind] for prompt in case["prompts"] for kind in ("instruct", "img2img") if prompt.get(kind)]
    return bank.without([*own, *(phrase for kind, option in case.get("edits", ()) for phrase in KINDS[kind].phrases(option))])


def texts_of(plan, case, arm):
    """{source: the texts that its method is given for a picture} of an arm; none for encoders alone.

    The first is the original prompt. Of "five" the others are the bank's first four of the picture's category and of any.
    """
    found = {}
    for source in sources_of(arm):
        kind = plan["editors"][source]["kind"]
        found[source] = [] if kind == "encoders" else [words(plan, source, case["prompts"][0])]
        if arm.get("texts") == "five" and kind != "encoders":
            fitting = [one for one in bank_of(plan, case).instructions if one.category in (case["category"], ANY)]
            fitting.sort(key=lambda one: one.category != case["category"])
            found[source] += Bank("", tuple(fitting)).texts(kind)[:4]
    return found


def edit_options(plan, editor):
    """The options of an edit by this editor. Only instruction editors have image_guidance."""
    return {name: value for name, value in plan["edit"].items()
            if name != "image_guidance" or plan["editors"][editor]["kind"] == "instruct"}


# -- the keys of steps -------------------------------------------------------------------------------------------------
# case: the record of a Case. sha256: of the pixels of a picture.

def step_key(plan, step, **inputs):
    """The key of a step's result: the hash of all that decides it, with the version of sifm_min that made the plan."""
    return digest({"step": step, "code": [plan["version"], STEPS[step]], **inputs})


def immunize_key(plan, case, arm):
    if arm["method"] == NOISE:                               # needs no editor, so one result serves all of them
        return step_key(plan, "immunize", picture=case["sha256"], method=NOISE, eps=plan["eps"], seed=plan["seed"],
                        **arm["settings"])
    texts, identities = texts_of(plan, case, arm), [plan["editors"][source]["identity"] for source in sources_of(arm)]
    asked = {"picture": case["sha256"], "method": arm["method"], "eps": plan["eps"], "seed": plan["seed"],
             "settings": arm["settings"]}
    if "sources" not in arm and "texts" not in arm:
        return step_key(plan, "immunize", **asked, editor=identities[0], prompt=texts[arm["source"]][0])
    bank = {"bank": bank_of(plan, case).digest} if arm.get("texts") == "any" else {}
    return step_key(plan, "immunize", **asked, editors=identities, prompts=list(texts.values()), **bank)


def attack_key(plan, arm, sha256):
    used = arm["attack"]["editor"]
    return step_key(plan, "attack", picture=sha256, attack=arm["attack"]["name"], seed=plan["seed"],
                    editor=used and plan["editors"][used]["identity"])


def edit_key(plan, arm, sha256, prompt, seed):
    return step_key(plan, "edit", picture=sha256, editor=plan["editors"][arm["target"]]["identity"],
                    options=edit_options(plan, arm["target"]), prompt=words(plan, arm["target"], prompt), seed=seed)


def metrics_key(plan, sha256, reference):
    return step_key(plan, "metrics", pictures=[sha256, reference])


def lpips_key(plan, sha256, reference):
    return step_key(plan, "lpips", pictures=[sha256, reference], weights=plan["lpips"]["sha256"])


def shift_key(plan, case, arm, sha256):
    """Of the shift of the target's latents; None for an arm without a perturbation, or with an attack behind it."""
    if not arm["method"] or arm["attack"]:
        return None
    return step_key(plan, "shift", pictures=[case["sha256"], sha256], editor=plan["editors"][arm["target"]]["identity"])


def verdict_key(plan, arm, case, prompt, sha256):
    return step_key(plan, "verdict", judge=plan["judge"], kind=plan["editors"][arm["target"]]["kind"], original=case["sha256"],
                    prompt=prompt["instruct"], truth=prompt["truth"], edited=sha256)
