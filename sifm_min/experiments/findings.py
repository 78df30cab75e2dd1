"""The table "beyond noise": what each method does to edits that work on the clean picture, finding by finding, against noise.

An edit works if every judge calls the edit of the clean picture obeyed. A finding is what every judge finds. Method and noise
are paired: the same pictures, prompts, seeds and attack.
"""

import dataclasses
from dataclasses import dataclass

from ..judging.paired import compare, holm
from ..judging.rates import success_rate
from ..judging.records import pairs_of
from .comparison import FEWEST
from .figures import PROMPTS, interval_text, judged_by_arm, name_of
from .plan import CONTROL, NOISE

# Of a judge's two findings, those that make a success; "thwarted" is the paper's immunization success.
FINDINGS = {"thwarted": (True, True), "mismatch": (True, False), "damage": (False, True)}


@dataclass(frozen=True)
class Beyond:
    """One finding on one arm. working: the edits that work on the clean picture. images: pictures with a pair.

    rate, noise: the finding's share of the working edits, an Estimate each. result: the `paired.Comparison` of arm and noise.
    p_holm: its p, corrected over the `comparisons` of the table; None where there are fewer than FEWEST pictures.
    """

    arm: str
    prompts: str
    finding: str
    working: int
    images: int
    rate: object
    noise: object
    result: object
    p_holm: float | None = None
    comparisons: int = 0

    @property
    def p_text(self):
        if self.p_holm is None:
            return f"few ({self.images})"
        return f"{self.p_holm:.3f}" if self.p_holm >= 0.001 else "< 0.001"


def beyond_noise(cells, judges, names):
    """The Beyonds of the arms of one editor, in order. cells, judges: see `figures.figures`; names: of the arms."""
    found = []
    for prompts in PROMPTS if judges else ():
        judged = {finding: judged_by_arm([_kept(cell, wanted) for cell in cells], judges, prompts)
                  for finding, wanted in FINDINGS.items()}
        for arm in names:
            after = "".join(arm.partition(", ")[1:])         # the attack, which the controls have as well
            control, noise = CONTROL + after, NOISE + after
            if arm not in (control, noise) and {arm, control, noise} <= judged["thwarted"].keys():
                works = {place for place, edit in judged["thwarted"][control].items() if edit.verdict.obeyed}
                found += [one for finding in FINDINGS if (one := _beyond(judged[finding], arm, noise, prompts, finding, works))]
    tested = [i for i, one in enumerate(found) if one.images >= FEWEST]
    for i, p in zip(tested, holm([found[i].result.p for i in tested]), strict=True):
        found[i] = dataclasses.replace(found[i], p_holm=p, comparisons=len(tested))
    return found


def _kept(cell, wanted):
    """The cell with only the wanted ones of each judge's findings; the others count as absent from the picture."""
    if not cell["judges"]:
        return cell
    return {**cell, "judges": {judge: [*(value if want or value is None else False for value, want in
                                        zip(said[:2], wanted, strict=True)), *said[2:]]
                               for judge, said in cell["judges"].items()}}


def _beyond(judged, arm, noise, prompts, finding, works):
    """The Beyond of one finding, uncorrected; None without a pair."""
    arms = {name: {place: edit for place, edit in judged[name].items() if place in works} for name in (arm, noise)}
    try:
        pairs = pairs_of(arms, arm, noise)
    except ValueError:                                       # no edit that every judge decided in both
        return None
    (result,) = compare(arms, [(arm, noise)])
    return Beyond(arm, prompts, finding, len(works), len({one.image_id for one, _ in pairs}), success_rate(arms, arm).isr,
                  success_rate(arms, noise).isr, result)


def table(make, title, found):
    """The table of these Beyonds. make: the class `tables.Table`."""
    columns = [("", "Method"), ("", "Prompts"), ("", "n"),
               *((finding.capitalize(), heading) for finding in FINDINGS for heading in ("method", "noise", "beyond", "p"))]
    rows, data = {}, []
    for one in found:
        row = rows.setdefault((one.arm, one.prompts), [name_of(one.arm), one.prompts, str(one.working)])
        row += [interval_text(one.rate), interval_text(one.noise), interval_text(one.result.difference), one.p_text]
        data.append({"table": title, "method": one.arm, "prompts": one.prompts, "finding": one.finding, "working": one.working,
                     "images": one.images, "pairs": one.result.pairs, "share": one.rate.value, "share_low": one.rate.low,
                     "share_high": one.rate.high, "noise": one.noise.value, "beyond": one.result.difference.value,
                     "beyond_low": one.result.difference.low, "beyond_high": one.result.difference.high,
                     "p": None if one.p_holm is None else one.result.p, "p_holm": one.p_holm, "comparisons": one.comparisons})
    return make(title, columns, list(rows.values()), [
        "Of the n edits that every judge calls obeyed on the clean picture: the share that all judges call thwarted, the share "
        "in which all find a mismatch with the prompt, and that in which all find damage, each beside random noise of the same "
        "budget. beyond: the difference on the same pictures, prompts and seeds, with its 95 % interval.",
        "p: of the paired test as in the other tables, here against noise, corrected by Holm's method over this table."], data)
