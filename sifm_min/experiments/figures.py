"""The figures of a table: means of the distances, ISR with its interval, and what an immunization costs.

They are computed anew from cells, the dicts of `results.collect`.
"""

import dataclasses
import json
import math
import statistics
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from ..judging.intervals import Estimate, wilson
from ..judging.rates import by_judge, controlled, success_rate
from ..judging.records import Record, by_arm
from ..miniature.verdict import Verdict, kleene_and

DISTANCES = {"psnr": ("PSNR", "↓", 2), "ssim": ("SSIM", "↓", 4), "vifp": ("VIFp", "↓", 4), "fsim": ("FSIM", "↓", 4),
             "lpips": ("LPIPS", "↑", 4)}
PROMPTS = {"original": "Original prompt", "unseen": "Unseen prompts"}
NAMES = {"control": "clean (control)", "noise": "noise (control)"}


@lru_cache(maxsize=1)
def paper():
    """The paper's figures: see paper/tables.json."""
    return json.loads((Path(__file__).parent / "paper" / "tables.json").read_text(encoding="utf-8"))


def name_of(arm):
    """The name of an arm in the paper's spelling, with its attack behind it."""
    method, comma, attack = arm.partition(", ")
    method, bracket, setting = method.partition(" (")
    return (NAMES.get(method) or paper()["labels"].get(method, method)) + bracket + setting + comma + attack


@dataclass(frozen=True)
class Figures:
    """The figures of one arm on one type of prompts.

    cells: the number of edits that were made or failed. means, left_out: distance -> mean of the finite values, and the
    number of the others. rate, controlled: of judging/rates.py, None if nothing is judged.
    """

    cells: int
    failed: int
    means: dict
    left_out: dict
    rate: object = None
    controlled: object = None
    by_judge: dict = field(default_factory=dict)

    def record(self):
        return dataclasses.asdict(self)


def records(cells, judges):
    """Yield the Records of cells. A failed cell has records without findings: every planned answer counts."""
    for cell in cells:
        prompt = f"{cell['prompt_id']}, seed {cell['seed']}"
        for judge in judges:
            without = [None, None, "failed" if cell["failed"] else "not_judged"]
            yield Record(sample_of(cell), cell["image_id"], prompt, cell["arm"], judge,
                             *(cell["judges"] or {}).get(judge, without))


def sample_of(cell):
    """The name of an edit for people who judge. It has a part of the pixels' hash: a rating never moves to another edit."""
    return f"{cell['image_id']}, {cell['prompt_id']}, seed {cell['seed']}, {(cell['edited'] or 'not made')[:12]}"


def judges_in(cells):
    """The names of all judges of the cells, in order."""
    return list(dict.fromkeys(judge for cell in cells for judge in cell["judges"] or {}))


def judged_by_arm(cells, judges, prompts):
    """The judged edits of one prompt type, {arm: {(image, prompt): Judged}}; {} if nobody judged."""
    of_type = [cell for cell in cells if cell["prompt_type"] == prompts]
    return by_arm(records(of_type, judges)) if judges and of_type else {}


def figures(cells, judges, arms):
    """{(arm, prompt type): Figures} of the cells of one editor, for the arms that have cells."""
    by_arm = {}
    for prompts in dict.fromkeys(cell["prompt_type"] for cell in cells):
        of_type = [cell for cell in cells if cell["prompt_type"] == prompts]
        judged = judged_by_arm(cells, judges, prompts)
        for arm in arms:
            own = [cell for cell in of_type if cell["arm"] == arm]
            if not own:
                continue
            means, left_out = {}, {}
            for distance in DISTANCES:
                values = [cell["metrics"][distance] for cell in own if cell["metrics"].get(distance) is not None]
                finite = [value for value in values if math.isfinite(value)]
                means[distance] = statistics.fmean(finite) if finite else None
                if len(finite) < len(values):
                    left_out[distance] = len(values) - len(finite)
            rates = {}
            if judges:
                rates = {"rate": success_rate(judged, arm), "by_judge": by_judge(judged, arm),
                         "controlled": _controlled(judged, arm)}
            by_arm[arm, prompts] = Figures(len(own), sum(cell["failed"] is not None for cell in own), means, left_out, **rates)
    return by_arm


def _controlled(judged, arm):
    """The controlled rates of an arm. With an attack, the controls are those after the same attack."""
    after = "".join(arm.partition(", ")[1:])
    control, noise = f"control{after}", f"noise{after}"
    if arm == control or control not in judged:
        return None
    try:
        return controlled(judged, arm, control, noise=noise if noise in judged and arm != noise else None)
    except ValueError:                                       # no pair that every judge decided
        return None


def worst(cells):
    """The Estimate of the share of pictures whose edits are thwarted without an attack and after every attack."""
    images = {}
    for cell in cells:
        verdicts = [Verdict.of(*answer[:2]) for answer in (cell["judges"] or {}).values()]
        images.setdefault(cell["image_id"], []).append(Verdict.consensus(verdicts).success if verdicts else None)
    decided = [kleene_and(values) for values in images.values()]
    decided = [value for value in decided if value is not None]
    if not decided:
        return None
    return Estimate(sum(decided) / len(decided), *wilson(sum(decided), len(decided)), "Wilson")


def cost_of(arm):
    """The cost of an arm's immunizations: medians of seconds, passes and gradients, the largest step, mean PSNR and shift."""
    rows = list(arm["immunized"].values())
    if not rows:
        return {}
    passes = {key: statistics.median(row["passes"].get(key, 0) for row in rows) for key in rows[0]["passes"]}
    psnr = [float(row["psnr"]) for row in rows if math.isfinite(float(row["psnr"]))]
    shifts = [float(row["shift"]) for row in rows if row.get("shift") is not None]        # folders of older versions have none
    gradients = [row["gradient_evaluations"] for row in rows if "gradient_evaluations" in row]           # of either
    return {"seconds": statistics.median(row["seconds"] for row in rows), **passes,
            "gradients": statistics.median(gradients) if gradients else None,
            "shift": statistics.fmean(shifts) if shifts else None,
            "linf_255": max(row["linf_steps"] for row in rows), "psnr_of_picture": statistics.fmean(psnr) if psnr else None}


def interval_text(estimate):
    """An Estimate as text: 83% [74, 89]."""
    if estimate is None or estimate.value is None:
        return "-"
    return f"{100 * estimate.value:.0f}%" + ("" if estimate.low is None
                                             else f" [{100 * estimate.low:.0f}, {100 * estimate.high:.0f}]")
