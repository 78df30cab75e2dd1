"""The table "beyond noise": what each method does to edits that work on the clean picture, finding by finding, against noise.

An edit works if every judge calls the edit of the clean picture obeyed. A finding is what every judge finds. Method and noise
are paired: the same pictures, prompts, seeds and attack.
"""

from dataclasses import dataclass

from ..judging.rates import success_rate
from . import comparison
from .figures import PROMPTS, interval_text, judged_by_arm, name_of
from .plan import CONTROL, NOISE

# Of a judge's two findings, those that make a success; "thwarted" is the paper's immunization success.
FINDINGS = {"thwarted": (True, True), "mismatch": (True, False), "damage": (False, True)}


@dataclass(frozen=True)
class Beyond:
    """One finding on one arm. working: the edits that work on the clean picture. rate, noise: the finding's share of them with
    the method and with noise, an Estimate each. paired: the `comparison.Paired` of arm and noise."""

    arm: str
    prompts: str
    finding: str
    working: int
    rate: object
    noise: object
    paired: object


def beyond_noise(cells, judges, names):
    """The Beyonds of the arms of one editor, in order. cells, judges: see `figures.figures`; names: of the arms."""
    of_arms, pairs = {}, {}
    for prompts in PROMPTS if judges else ():
        judged = {finding: judged_by_arm([_kept(cell, wanted) for cell in cells], judges, prompts)
                  for finding, wanted in FINDINGS.items()}
        whole = judged["thwarted"]
        for arm in names:
            after = "".join(arm.partition(", ")[1:])         # the attack, which the controls have as well
            control, noise = CONTROL + after, NOISE + after
            if arm in (control, noise) or not {arm, control, noise} <= whole.keys():
                continue
            works = {place for place, edit in whole[control].items() if edit.verdict.obeyed}
            for finding in FINDINGS:
                arms = {name: {place: edit for place, edit in judged[finding][name].items() if place in works}
                        for name in (arm, noise)}
                paired = comparison.pair(arms, arm, noise)
                if paired.result:                            # else no edit that every judge decided in both
                    pairs[arm, prompts, finding] = paired
                    of_arms[arm, prompts, finding] = len(works), *(success_rate(arms, name).isr for name in (arm, noise))
    return [Beyond(*place, *of_arms[place], paired) for place, paired in comparison.corrected(pairs).items()]


def _kept(cell, wanted):
    """The cell with only the wanted ones of each judge's findings; the others count as absent from the picture."""
    if not cell["judges"]:
        return cell
    return {**cell, "judges": {judge: [*(value if want or value is None else False for value, want in
                                        zip(said[:2], wanted, strict=True)), *said[2:]]
                               for judge, said in cell["judges"].items()}}


def table(make, title, found):
    """The table of these Beyonds. make: the class `tables.Table`."""
    columns = [("", "Method"), ("", "Prompts"), ("", "n"),
               *((finding.capitalize(), heading) for finding in FINDINGS for heading in ("method", "noise", "beyond", "p"))]
    rows, data = {}, []
    for one in found:
        row = rows.setdefault((one.arm, one.prompts), [name_of(one.arm), one.prompts, str(one.working)])
        paired, beyond = one.paired, one.paired.result.difference
        row += [interval_text(one.rate), interval_text(one.noise), interval_text(beyond), paired.text]
        data.append({"table": title, "method": one.arm, "prompts": one.prompts, "finding": one.finding, "working": one.working,
                     "images": paired.images, "pairs": paired.result.pairs, "share": one.rate.value,
                     "share_low": one.rate.low, "share_high": one.rate.high, "noise": one.noise.value, "beyond": beyond.value,
                     "beyond_low": beyond.low, "beyond_high": beyond.high, "p": None if paired.note else paired.result.p,
                     "p_holm": paired.p_holm, "comparisons": paired.comparisons})
    return make(title, columns, list(rows.values()), [
        "Of the n edits that every judge calls obeyed on the clean picture: the share that all judges call thwarted, the share "
        "in which all find a mismatch with the prompt, and that in which all find damage, each beside random noise of the same "
        "budget. beyond: the difference on the same pictures, prompts and seeds, with its 95 % interval.",
        "p: of the paired test as in the other tables, here against noise, corrected by Holm's method over this table."], data)
