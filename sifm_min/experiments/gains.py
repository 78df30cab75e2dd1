"""The table "what each gains": an arm with a changed protection against the same method without it, paired, with the cost.

The arm "sifm (both)" is compared with the arm "sifm", "sifm (robust), jpeg-50" with "sifm, jpeg-50": on the same pictures,
prompts, seeds and attack.
"""

from dataclasses import dataclass

from . import comparison
from .figures import cost_of, interval_text, name_of

PARTS = ("encoder", "denoiser")
WHITE_BOX = "white box"


@dataclass(frozen=True)
class Gain:
    """One comparison. arm, base: names of the arms. paired: a `comparison.Paired` of arm and base. rate, without: their ISR,
    Estimates. kept: the arm's share of the white box's effect, or None. cost, cost_without: see `figures.cost_of`."""

    arm: str
    base: str
    prompts: str
    paired: object
    rate: object
    without: object
    kept: float | None
    cost: dict
    cost_without: dict


def base_of(name):
    """The name of the arm without the change: "sifm, jpeg-50" of "sifm (robust), jpeg-50"; None of an arm without one."""
    method, comma, attack = name.partition(", ")
    method, bracket, setting = method.partition(" (")
    return method + comma + attack if bracket and setting.endswith(")") else None


def gains(cells, judges, arms, by_arm):
    """The Gains of the arms of one editor, in order; those without a judged pair are left out.

    cells, judges, by_arm: see `figures.figures`. arms: of `results.collect`. p is corrected by Holm's method over all of them.
    """
    costs = {arm["name"]: cost_of(arm) for arm in arms}
    references = {name: base_of(name) for name in costs if base_of(name) in costs}
    found = []
    for (name, prompts), paired in (comparison.against(cells, judges, references) if judges else {}).items():
        if paired.result:
            base = references[name]
            found.append(Gain(name, base, prompts, paired, by_arm[name, prompts].rate.isr, by_arm[base, prompts].rate.isr,
                              _kept(by_arm, name, base, prompts), costs[name], costs[base]))
    return found


def _kept(by_arm, name, base, prompts):
    """The effect of an arm over that of the white box: what is thwarted beyond the control, each."""
    method, comma, attack = base.partition(", ")
    added = []
    for one in (name, f"{method} ({WHITE_BOX}){comma}{attack}"):
        controlled = by_arm[one, prompts].controlled if (one, prompts) in by_arm else None
        added.append(controlled.added.value if controlled else None)
    return added[0] / added[1] if None not in added and added[1] > 0 else None


def table(make, title, found):
    """The table of these Gains. make: the class `tables.Table`."""
    columns = [("", "Protection"), ("", "Prompts"), ("", "pictures"), ("ISR", "with it"), ("ISR", "without"), ("ISR", "gain"),
               ("", "p, corrected"), ("", "of the white box"), ("Seconds", "with it"), ("Seconds", "without"),
               *((f"Passes, {part}", side) for part in PARTS for side in ("with it", "without"))]
    rows, data = [], []
    for one in found:
        costs = one.cost, one.cost_without
        rows.append([name_of(one.arm), one.prompts, str(one.paired.images), interval_text(one.rate), interval_text(one.without),
                     interval_text(one.paired.result.difference), one.paired.text,
                     "-" if one.kept is None else f"{100 * one.kept:.0f}%",
                     *(f"{cost['seconds']:.1f}" if cost else "-" for cost in costs),
                     *(_passes(cost, part) for part in PARTS for cost in costs)])
        data.append({"table": title, "method": one.arm, "over": one.base, "prompts": one.prompts, "isr": one.rate.value,
                     "isr_without": one.without.value, "gain": one.paired.result.difference.value,
                     "gain_low": one.paired.result.difference.low, "gain_high": one.paired.result.difference.high,
                     "p": None if one.paired.note else one.paired.result.p, "p_holm": one.paired.p_holm,
                     "of_white_box": one.kept, **{f"{name}{side}": cost.get(name) for side, cost in
                                                  zip(("", "_without"), costs, strict=True)
                                                  for name in ("seconds", *(f"{part}_{way}" for part in PARTS
                                                                            for way in ("forward", "backward")))}})
    return make(title, columns, rows, [
        "Each protection against the same method without it: its ISR, the gain with its 95 % interval on the same pictures, "
        "prompts and seeds, and p of the paired test, corrected by Holm's method over this table.",
        "of the white box: the share of edits thwarted beyond the clean picture's, over that of the arm made for this editor "
        "alone. Seconds and passes (forward + backward) are of one immunization."], data)


def _passes(cost, part):
    if f"{part}_forward" not in cost:
        return "-"
    return f"{cost[f'{part}_forward']:g} + {cost[f'{part}_backward']:g}"
