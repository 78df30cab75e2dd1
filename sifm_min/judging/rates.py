"""The Immunization Success Rate (paper, Eq. 8), and what must stand beside it: counts, bounds, and the control.

    arms = by_arm(records)                                   # records.py
    success_rate(arms, "sifm").isr                           # an Estimate: value, low, high, note
    controlled(arms, "sifm").added                           # the failures that the perturbation adds
"""

from collections import Counter
from dataclasses import dataclass

from .intervals import DRAWS, Estimate, bootstrap, ratio, share
from .records import arm_of, pairs_of


@dataclass(frozen=True)
class Rate:
    """The ISR of one arm, with its counts and bounds.

    samples: all. complete: those that every judge decided; of them `successes` (all say so), `obeyed` (none does), `splits`.
    isr: successes / complete. It is fair only if missing verdicts do not depend on the outcome. Therefore lowest, highest:
    the rate over all samples if every undecided one were a failure, and if it were a success.
    """

    samples: int
    complete: int
    successes: int
    obeyed: int
    splits: int
    isr: Estimate
    lowest: float | None
    highest: float | None

    @property
    def coverage(self):
        """The share of samples that every judge decided."""
        return self.complete / self.samples if self.samples else None


def success_rate(arms, arm, *, draws=DRAWS, seed=0):
    """ISR = N_success / N_total (paper, Eq. 8) of one arm: a Rate.

    With one sample per image the interval is Wilson's; with several, as with unseen prompts, it is from the bootstrap over
    images. Only complete samples count. A sample with one judge's no and one missing verdict is decided, but such samples
    could enter the rate as failures only.
    """
    return _rate(arm_of(arms, arm).values(), draws, seed)


def _rate(judged, draws, seed):
    judged = list(judged)
    verdicts, complete = [sample.verdict for sample in judged], [sample for sample in judged if sample.complete]
    successes, obeyed = (sum(getattr(sample.verdict, name) for sample in complete) for name in ("success", "obeyed"))
    decided, unknown = (sum(v.success is value for v in verdicts) for value in (True, None))
    return Rate(len(judged), len(complete), successes, obeyed, len(complete) - successes - obeyed,
                share([(sample.image_id, sample.verdict.success) for sample in complete], draws, seed),
                *((decided / len(judged), (decided + unknown) / len(judged)) if judged else (None, None)))


@dataclass(frozen=True)
class JudgeCounts:
    """One judge's answers on an arm: successes among `judged` samples, by reason; `statuses` counts all samples."""

    judged: int
    successes: int
    mismatch_only: int
    degradation_only: int
    both: int
    statuses: dict


def by_judge(arms, arm):
    """{judge: JudgeCounts}. A success with a finding missing is in no reason's count.

    Two judges who disagree on a share d of the complete samples have ISR = mean of their own rates - d / 2.
    """
    judged, counts = list(arm_of(arms, arm).values()), {}
    for judge in judged[0].records:
        verdicts = [sample.verdicts[judge] for sample in judged]
        reasons = Counter((v.semantic_mismatch, v.perceptual_degradation) for v in verdicts)
        statuses = Counter(_status(sample.records[judge]) for sample in judged)
        counts[judge] = JudgeCounts(sum(v.success is not None for v in verdicts), sum(v.success is True for v in verdicts),
                                    reasons[True, False], reasons[False, True], reasons[True, True], dict(statuses))
    return counts


def _status(record):
    if record is None:
        return "no record"
    return "undecided" if record.status == "ok" and record.verdict.success is None else record.status


@dataclass(frozen=True)
class Controlled:
    """One arm beside its control, over the pairs of edits that every judge decided in both.

    pairs, left_out: of the arm's samples. table: how many pairs, "both" thwarted, "arm only", "control only", "neither".
    isr, control: the two rates. added: mean(s - c), the failures that the perturbation adds. attributable:
    (isr - control) / (1 - control), after Abbott (J. Econ. Entomol. 18, 1925); undefined where every clean edit fails.
    ok: the arm's Rate among samples whose clean edit every judge calls obeyed. The judges select these samples, so their
    errors leak into the selection; this rate does not replace the isr.
    noise: the same for the noise arm. beyond_noise: mean(s - s of the noise arm).
    """

    arm: str
    pairs: int
    left_out: int
    table: dict
    isr: Estimate
    control: Estimate
    added: Estimate
    attributable: Estimate
    ok: Rate
    noise: object = None
    beyond_noise: Estimate | None = None


def controlled(arms, arm, control="control", noise=None, *, draws=DRAWS, seed=0):
    """The controlled ISR (not in the paper): the effect of the protection beside edits that fail by themselves.

    s = 1 if the consensus calls the arm's edit thwarted; c = the same for the clean edit with that image and prompt.
    """
    pairs, clean = pairs_of(arms, arm, control), arm_of(arms, control)
    table = Counter((first.verdict.success, second.verdict.success) for first, second in pairs)
    rows = [(first.image_id, (first.verdict.success, second.verdict.success, 1)) for first, second in pairs]
    estimates = bootstrap(rows, {"added": lambda v: ratio(v[..., 0] - v[..., 1], v[..., 2]),
                                 "attributable": lambda v: ratio(v[..., 0] - v[..., 1], v[..., 2] - v[..., 1])},
                      draws=draws, seed=seed)
    working = [sample for place, sample in arm_of(arms, arm).items() if place in clean and clean[place].verdict.obeyed]
    return Controlled(arm, len(pairs), len(arms[arm]) - len(pairs),
                      {"both": table[True, True], "arm only": table[True, False],
                       "control only": table[False, True], "neither": table[False, False]},
                      share([(image, v[0]) for image, v in rows], draws, seed),
                      share([(image, v[1]) for image, v in rows], draws, seed), **estimates, ok=_rate(working, draws, seed),
                      noise=None if noise is None else controlled(arms, noise, control, draws=draws, seed=seed),
                      beyond_noise=None if noise is None else difference(pairs_of(arms, arm, noise), draws, seed))


def difference(pairs, draws, seed):
    """The Estimate of the mean difference in success over pairs of Judged, by resampling whole images."""
    rows = [(a.image_id, (a.verdict.success - b.verdict.success, 1)) for a, b in pairs]
    return bootstrap(rows, {"mean": lambda v: ratio(v[..., 0], v[..., 1])}, draws=draws, seed=seed)["mean"]
