"""Verdicts, the Immunization Success Rate (paper, section VI) and its statistics.

A judge finds, of one edit of an immunized picture, a semantic mismatch and a perceptual degradation; either makes the
immunization a success. Several judges agree strictly: success only if all say so, obeyed only if none does. Whatever was
not answered is None, and Kleene's strong logic carries it on: an answer counts where no missing one could change it.

A judge is any callable `judge(sample, edited) -> Verdict`, where `sample` has .image (the original, a PIL picture) and
.prompt. Where it has no verdict it raises NoVerdict(status). The oracles of the miniature are such judges; so are chat
models and people, who answer later and arrive as records. Everything below `ask` reads records and nothing else:

  Record  one judge's findings on one edited picture, with the names that place it:
    sample_id   the edited picture, unique within its arm
    image_id    the original. Edits of one original are not independent; resampling keeps them together
    prompt_id   the prompt, and whatever else was varied, such as a seed. (image_id, prompt_id) pairs the arms
    arm         what was edited: "control" (the clean picture), "noise" (random noise of the same budget), or a method
    judge       a model's or a person's name
    status      "ok", or why there are no findings
  Every planned answer has its record, also one that never came: a rate is over what the records name.

The statistics stand in reading order: rates, controlled rates, method against method, agreement. Each result is a frozen
dataclass, so `dataclasses.asdict` makes it JSON-ready. Intervals are at 95 %. numpy is imported where it computes:
commands import this file before they know whether there is anything to compute.
"""

import itertools
import math
from collections import Counter
from dataclasses import dataclass
from functools import cached_property

from .miniature.verdict import NoVerdict, Verdict, kleene_and, kleene_not, kleene_or  # noqa: F401

DRAWS, DEFINED = 10_000, 0.95                   # resamples; the share of them in which a statistic must be defined
LABELS = ("semantic_mismatch", "perceptual_degradation", "success")


# -- records -------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Record:
    """One judge's findings on one edited picture; see the module's docstring. A finding is True, False or None."""

    sample_id: str
    image_id: str
    prompt_id: str
    arm: str
    judge: str
    semantic_mismatch: bool | None
    perceptual_degradation: bool | None
    status: str = "ok"

    def __post_init__(self):
        names = (self.sample_id, self.image_id, self.prompt_id, self.arm, self.judge, self.status)
        findings = (self.semantic_mismatch, self.perceptual_degradation)
        if not all(isinstance(name, str) and name for name in names):
            raise ValueError(f"sample {self.sample_id!r}: sample, image, prompt, arm, judge and status are texts, none empty")
        if not all(finding is None or type(finding) is bool for finding in findings):
            raise ValueError(f"sample {self.sample_id!r}, judge {self.judge!r}: a finding is true, false or missing, "
                             f"got {findings[0]!r} and {findings[1]!r}")
        if self.status != "ok" and findings != (None, None):
            raise ValueError(f"sample {self.sample_id!r}, judge {self.judge!r}: status {self.status!r} goes with no findings")

    @property
    def verdict(self):
        return Verdict.of(self.semantic_mismatch, self.perceptual_degradation)


@dataclass(frozen=True)
class Edit:
    """One edited picture to be judged, with the names that its records get. `sample` has .image and .prompt."""

    sample_id: str
    image_id: str
    prompt_id: str
    arm: str
    sample: object
    edited: object


def ask(judges, edits):
    """Yield the Record of every judge of `judges` (name -> callable) on every Edit, one after the other."""
    for edit in edits:
        for name, judge in judges.items():
            try:
                verdict, status = judge(edit.sample, edit.edited), "ok"
            except NoVerdict as missing:
                verdict, status = Verdict.of(None, None), missing.status
            yield Record(edit.sample_id, edit.image_id, edit.prompt_id, edit.arm, name,
                         verdict.semantic_mismatch, verdict.perceptual_degradation, status)


@dataclass(frozen=True)
class Judged:
    """One edited picture with the records of a panel's judges, judge -> Record, or None where a judge has none."""

    sample_id: str
    image_id: str
    prompt_id: str
    records: dict

    @cached_property
    def verdicts(self):
        return {judge: record.verdict if record else Verdict.of(None, None) for judge, record in self.records.items()}

    @cached_property
    def verdict(self):
        return Verdict.consensus(self.verdicts.values())

    @property
    def complete(self):
        """Whether every judge decided. A panel may be decided without: one judge's no is enough."""
        return all(verdict.success is not None for verdict in self.verdicts.values())


def by_arm(records, judges=None):
    """{arm: {(image_id, prompt_id): Judged}}; the panel is `judges`, or every judge in the records.

    Filter the records before, for instance to the prompts that were optimised for, or to the unseen ones.
    """
    records, arms = list(records), {}
    if not records:
        raise ValueError("there are no records: nothing was judged")
    known = list(dict.fromkeys(record.judge for record in records))
    panel = known if judges is None else list(dict.fromkeys(judges))
    if not panel:
        raise ValueError(f"the panel is empty; the records have the judges {', '.join(known)}")
    if strangers := [judge for judge in panel if judge not in known]:
        raise ValueError(f"judge {strangers[0]!r} has no record; the records have {', '.join(known)}")
    places = {}
    for record in records:
        place = (record.image_id, record.prompt_id)
        if places.setdefault((record.arm, record.sample_id), place) != place:
            raise ValueError(f"sample {record.sample_id!r} of arm {record.arm!r} has two images or prompts")
        judged = arms.setdefault(record.arm, {}).setdefault(place, Judged(record.sample_id, *place, dict.fromkeys(panel)))
        if judged.sample_id != record.sample_id:
            raise ValueError(f"samples {judged.sample_id!r} and {record.sample_id!r} of arm {record.arm!r} are the same image "
                             f"and prompt; name what else was varied in the prompt_id")
        if record.judge in judged.records:
            if judged.records[record.judge] is not None:
                raise ValueError(f"judge {record.judge!r} has two records of sample {record.sample_id!r}, arm {record.arm!r}")
            judged.records[record.judge] = record
    return arms


def _arm(arms, name):
    if name not in arms:
        raise ValueError(f"arm {name!r} has no sample; there are {', '.join(arms) or 'none'}")
    return arms[name]


# -- intervals -----------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Estimate:
    """A number and its 95 % interval. value None: undefined. low, high None: no interval. `note`: why, or how it was made."""

    value: float | None
    low: float | None
    high: float | None
    note: str


def wilson(count, total, z=1.959964):
    """The Wilson score interval of a proportion, (low, high) in [0,1]; z 1.96 is 95 %. Of nothing: (0, 1).

    With p = count / total = k / n: (p + z^2 / 2n +- z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)
    (Wilson, JASA 22, 1927, 209-212). It holds for independent samples only.
    """
    if not 0 <= count <= total:
        raise ValueError(f"{count} of {total} is no proportion")
    if total == 0:
        return 0.0, 1.0
    share, shrink = count / total, 1 + z * z / total
    centre = (share + z * z / (2 * total)) / shrink
    half = z / shrink * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return max(0.0, centre - half), min(1.0, centre + half)


def bootstrap(rows, statistics, *, draws=DRAWS, seed=0):
    """{name: Estimate} of statistics of sums over samples, by resampling whole images (percentile interval).

    rows: (image_id, vector) per sample; statistics: name -> function of the summed vectors (..., k), nan where undefined.

    Why images: the prompts tried on one picture share the picture and its perturbation, so that five of them say less
    than five pictures would. Drawing single samples, or Wilson's formula, takes them for independent and is too narrow;
    drawing images with all their samples, n of n with replacement, keeps the dependence whatever it is (Davison and
    Hinkley, Bootstrap Methods and their Application, 1997, section 3.8). The interval is the 2.5 % and 97.5 % quantile
    of `draws` resamples (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, section 13.3).

    Images with equal sums are exchangeable: how often each kind is drawn is multinomial. The kinds are sorted, so that
    neither the order of the samples nor the names decide anything.
    """
    import numpy as np

    images = {}
    for image, vector in rows:
        images.setdefault(image, []).append(vector)
    if not images:
        return {name: Estimate(None, None, None, "undefined: no sample") for name in statistics}
    kinds, counts = np.unique([np.sum(vectors, axis=0, dtype=float) for vectors in images.values()], axis=0,
                              return_counts=True)
    rng, many, sums = np.random.default_rng(seed), len(images), []
    for start in range(0, draws, 1000):         # a thousand at a time bounds the memory
        sums.append(rng.multinomial(many, counts / many, size=min(1000, draws - start)) @ kinds)
    total, sums, found = counts @ kinds, np.concatenate(sums), {}
    for name, statistic in statistics.items():
        value, drawn = float(statistic(total)), np.asarray(statistic(sums))
        drawn = np.sort(drawn[np.isfinite(drawn)])
        note = f"bootstrap over {many} images"
        if not math.isfinite(value):
            found[name] = Estimate(None, None, None, "undefined on these samples")
        elif len(drawn) < DEFINED * draws:
            found[name] = Estimate(value, None, None, f"no interval: undefined in {draws - len(drawn)} of {draws} resamples")
        elif drawn[-1] - drawn[0] < 1e-12:
            found[name] = Estimate(value, None, None, f"no interval: {note}, but all resamples say the same")
        else:
            found[name] = Estimate(value, *(float(q) for q in np.quantile(drawn, (0.025, 0.975))), note)
    return found


def _ratio(over, under):
    """over / under, nan where `under` is zero: numbers or arrays."""
    import numpy as np

    over, under = np.asarray(over, float), np.asarray(under, float)
    return np.divide(over, under, out=np.full(np.broadcast(over, under).shape, np.nan), where=under != 0)[()]


def _share(rows, draws, seed):
    """The Estimate of a rate, rows of (image_id, hit): Wilson where each image stands once, else by whole images."""
    rows = [(image, (int(hit), 1)) for image, hit in rows]
    images, hits = len({image for image, _ in rows}), sum(hit for _, (hit, _) in rows)
    if len(rows) == images and rows:
        return Estimate(hits / images, *wilson(hits, images), "Wilson")
    found = bootstrap(rows, {"share": lambda v: _ratio(v[..., 0], v[..., 1])}, draws=draws, seed=seed)["share"]
    if found.value in (0, 1):                   # no resample can differ; then each image counts as one sample
        return Estimate(found.value, *wilson(int(found.value) * images, images), f"Wilson over {images} images, all alike")
    return found


# -- the rate --------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Rate:
    """The ISR of one arm, with what must stand beside it.

    samples: all. complete: those that every judge decided; of them `successes` (all say so), `obeyed` (none does), `splits`.
    isr: successes / complete, the headline; it is fair only where missing verdicts do not depend on the outcome, hence
    lowest, highest: over all samples, every undecided one taken as a failure, and as a success.
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

    One sample per image: Wilson's interval. Several, as with unseen prompts: bootstrap over images. A sample with one
    judge's no and one missing verdict is decided, but not complete: counting such samples in the headline would let them
    enter as failures only.
    """
    return _rate(_arm(arms, arm).values(), draws, seed)


def _rate(judged, draws, seed):
    judged = list(judged)
    verdicts, complete = [one.verdict for one in judged], [one for one in judged if one.complete]
    successes, obeyed = (sum(getattr(one.verdict, name) for one in complete) for name in ("success", "obeyed"))
    decided, unknown = (sum(v.success is value for v in verdicts) for value in (True, None))
    return Rate(len(judged), len(complete), successes, obeyed, len(complete) - successes - obeyed,
                _share([(one.image_id, one.verdict.success) for one in complete], draws, seed),
                *((decided / len(judged), (decided + unknown) / len(judged)) if judged else (None, None)))


@dataclass(frozen=True)
class JudgeCounts:
    """What one judge said of an arm: of `judged` samples, `successes`, and for which reason; `statuses` of all samples."""

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
    judged, counts = list(_arm(arms, arm).values()), {}
    for judge in judged[0].records:
        verdicts = [one.verdicts[judge] for one in judged]
        reasons = Counter((v.semantic_mismatch, v.perceptual_degradation) for v in verdicts)
        statuses = Counter(_status(one.records[judge]) for one in judged)
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
    ok: the arm's Rate among samples whose clean edit succeeded, in the eyes of every judge. The judges select these
    samples, so their errors leak into the selection; it does not replace the isr.
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
    """The controlled ISR (not in the paper): what the protection does, beside edits that fail by themselves.

    s = 1 where the consensus calls the arm's edit thwarted, c = the same of the clean edit with that image and prompt.
    """
    pairs, clean = _pairs(arms, arm, control), _arm(arms, control)
    table = Counter((first.verdict.success, second.verdict.success) for first, second in pairs)
    rows = [(first.image_id, (first.verdict.success, second.verdict.success, 1)) for first, second in pairs]
    found = bootstrap(rows, {"added": lambda v: _ratio(v[..., 0] - v[..., 1], v[..., 2]),
                             "attributable": lambda v: _ratio(v[..., 0] - v[..., 1], v[..., 2] - v[..., 1])},
                      draws=draws, seed=seed)
    working = [one for place, one in _arm(arms, arm).items() if place in clean and clean[place].verdict.obeyed]
    return Controlled(arm, len(pairs), len(arms[arm]) - len(pairs),
                      {"both": table[True, True], "arm only": table[True, False],
                       "control only": table[False, True], "neither": table[False, False]},
                      _share([(image, v[0]) for image, v in rows], draws, seed),
                      _share([(image, v[1]) for image, v in rows], draws, seed), **found, ok=_rate(working, draws, seed),
                      noise=None if noise is None else controlled(arms, noise, control, draws=draws, seed=seed),
                      beyond_noise=None if noise is None else _difference(_pairs(arms, arm, noise), draws, seed))


def _pairs(arms, first, second):
    """[(Judged, Judged)] with the same image and prompt, complete in both arms."""
    one, other = _arm(arms, first), _arm(arms, second)
    pairs = [(one[place], other[place]) for place in one if place in other and one[place].complete and other[place].complete]
    if not pairs:
        raise ValueError(f"arms {first!r} and {second!r} have no image and prompt that every judge decided in both")
    return pairs


def _difference(pairs, draws, seed):
    rows = [(a.image_id, (a.verdict.success - b.verdict.success, 1)) for a, b in pairs]
    return bootstrap(rows, {"mean": lambda v: _ratio(v[..., 0], v[..., 1])}, draws=draws, seed=seed)["mean"]


# -- method against method -----------------------------------------------------------------------------------------------

def mcnemar(b, c):
    """The exact two-sided p of McNemar's test: b samples where only the first succeeds, c where only the second does.

    p = min(1, 2 sum_{i <= min(b,c)} C(b + c, i) / 2^(b + c)): under the hypothesis each discordant pair is a fair coin
    (McNemar, Psychometrika 12, 1947, 153-157; the binomial in place of his chi-square).
    """
    if b < 0 or c < 0:
        raise ValueError(f"{b} and {c} are no counts")
    choose = total = 1                          # C(b + c, 0); the next one is the last times (b + c - i) / (i + 1)
    for i in range(min(b, c)):
        choose = choose * (b + c - i) // (i + 1)
        total += choose
    return min(1.0, 2 * total / 2 ** (b + c))


def swap_test(differences):
    """The exact two-sided p that the sum of `differences`, one integer per image, comes from swapping the methods by chance.

    p = P(|sum +-d_i| >= |sum d_i|), every image's sign a fair coin. With one prompt per image this is the exact McNemar
    test; with several it takes whole images, as the bootstrap does (Fisher's randomization test, The Design of
    Experiments, 1935, section 21; all 2^n sign patterns at once, by convolution).
    """
    import numpy as np

    sizes, target = [abs(d) for d in differences], abs(sum(differences))
    reach = sum(sizes)
    chance = np.zeros(2 * reach + 1)            # of each sum from -reach to reach
    chance[reach] = 1
    for size in sizes:
        if size:
            chance = (np.roll(chance, size) + np.roll(chance, -size)) / 2       # the ends are still empty: nothing wraps
    return float(min(1.0, chance[abs(np.arange(-reach, reach + 1)) >= target].sum()))


def holm(ps):
    """Holm's adjusted p of a family, in its order: the i-th smallest is max_{j <= i} min(1, (n - j + 1) p_j).

    Rejecting what is at most 0.05 keeps the chance of any false rejection in the family at 5 %, whatever depends on what
    (Holm, Scandinavian Journal of Statistics 6, 1979, 65-70).
    """
    if not all(0 <= p <= 1 for p in ps):
        raise ValueError(f"{list(ps)} are not all probabilities")
    adjusted, largest = [None] * len(ps), 0.0
    for rank, index in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[index]))
        adjusted[index] = largest
    return adjusted


@dataclass(frozen=True)
class Comparison:
    """Two arms on the same images and prompts: difference of their ISR, p, and Holm's p over `comparisons` of them.

    pairs: complete in both; left_out: in either, but not so. only_first, only_second: the discordant pairs.
    """

    first: str
    second: str
    pairs: int
    left_out: int
    only_first: int
    only_second: int
    difference: Estimate
    test: str
    p: float
    p_holm: float
    comparisons: int


def compare(arms, family, *, draws=DRAWS, seed=0):
    """[Comparison] of each (first, second) of `family`, which is also the family of Holm's correction: name all you look at.

    With one sample per image the test is McNemar's, exact; with several it is `swap_test` over whole images.
    """
    family = [tuple(names) for names in family]
    if not family:
        raise ValueError("there is nothing to compare: name at least one pair of arms")
    found = []
    for first, second in family:
        pairs = _pairs(arms, first, second)
        images, only = {}, Counter()
        for a, b in pairs:
            step = a.verdict.success - b.verdict.success
            images[a.image_id] = images.get(a.image_id, 0) + step
            only[step] += 1
        single = len(images) == len(pairs)
        found.append((first, second, len(pairs), len(arms[first].keys() | arms[second].keys()) - len(pairs), only[1], only[-1],
                      _difference(pairs, draws, seed), "exact McNemar" if single else "exact swap of whole images",
                      mcnemar(only[1], only[-1]) if single else swap_test(images.values())))
    adjusted = holm([row[-1] for row in found])
    return [Comparison(*row, p_holm, len(found)) for row, p_holm in zip(found, adjusted, strict=True)]


# -- agreement (paper, Table I) ------------------------------------------------------------------------------------------
# Two categories, yes and no. Counts may be arrays of tables; a coefficient is nan where it is undefined.

def percent_agreement(n11, n10, n01, n00):
    """p_o = (n11 + n00) / n; n10: the first rater says yes and the second no."""
    return _ratio(n11 + n00, n11 + n10 + n01 + n00)


def cohen_kappa(n11, n10, n01, n00):
    """kappa = (p_o - p_e) / (1 - p_e), p_e = ((n11 + n10)(n11 + n01) + (n00 + n01)(n00 + n10)) / n^2.

    Undefined where p_e = 1: both raters always say the same one thing (Cohen, Educ. Psychol. Meas. 20, 1960, 37-46).
    """
    n = n11 + n10 + n01 + n00
    chance = _ratio((n11 + n10) * (n11 + n01) + (n00 + n01) * (n00 + n10), n * n)
    return _ratio(_ratio(n11 + n00, n) - chance, 1 - chance)


def fleiss_kappa(histogram):
    """kappa = (P - P_e) / (1 - P_e) of m raters; histogram: (..., m + 1) items with 0, 1, ..., m raters saying yes.

    P: the mean over items of (sum_j n_ij^2 - m) / (m (m - 1)), the share of agreeing pairs of raters; P_e = sum_j p_j^2
    with p_j the share of category j among all ratings. Undefined where one category took them all (Fleiss, Psychol. Bull.
    76, 1971, 378-382).
    """
    agree, yes = _multirater(histogram)
    chance = yes * yes + (1 - yes) * (1 - yes)
    return _ratio(agree - chance, 1 - chance)


def gwet_ac1(histogram):
    """AC1 = (P - P_e) / (1 - P_e) with P as in Fleiss' kappa and P_e = 2 p (1 - p), p the share of yes among all ratings.

    P_e is at most 1/2, so it is defined wherever anything was rated, and 1 where all always agree; kappa collapses there,
    and near there, when one category is rare (Gwet, Br. J. Math. Stat. Psychol. 61, 2008, 29-48).
    """
    agree, yes = _multirater(histogram)
    chance = 2 * yes * (1 - yes)
    return _ratio(agree - chance, 1 - chance)


def _multirater(histogram):
    """The mean share of agreeing pairs of raters per item, and the share of yes among all ratings."""
    import numpy as np

    histogram = np.asarray(histogram, float)
    raters = histogram.shape[-1] - 1
    yes, items = np.arange(raters + 1), histogram.sum(-1)
    pairs = (yes ** 2 + (raters - yes) ** 2 - raters) / (raters * (raters - 1))
    return _ratio(histogram @ pairs, items), _ratio(histogram @ yes, items * raters)


def prediction(n11, n10, n01, n00):
    """How the second rater predicts the first: precision n11/(n11+n01), recall n11/(n11+n10), bias (n01-n10)/n.

    Each is None where it would be a share of nothing.
    """
    found = {"precision": _ratio(n11, n11 + n01), "recall": _ratio(n11, n11 + n10),
             "bias": _ratio(n01 - n10, n11 + n10 + n01 + n00)}
    return {name: None if math.isnan(value) else float(value) for name, value in found.items()}


@dataclass(frozen=True)
class Agreement:
    """How raters agree on one label.

    items: those that all of `raters` rated; left_out: the rest of the study, still used for the pairs of raters who did.
    observed, cohen, ac1: the mean over the pairs of `tables` of percent agreement, Cohen's kappa and Gwet's AC1;
    fleiss: Fleiss' kappa of all at once, on `items`; None between two groups. marginals: each rater's share of yes,
    without which neither percent agreement nor kappa can be read. tables: (rater, rater, n11, n10, n01, n00).
    """

    raters: list
    items: int
    left_out: int
    observed: Estimate
    cohen: Estimate
    ac1: Estimate
    fleiss: Estimate | None
    marginals: dict
    tables: list


def consistency(records, people=(), models=(), *, draws=DRAWS, seed=0):
    """{label: {row: Agreement}}, Table I: label a finding or "success" (the OR of both), row one of

      people, models          each group among itself (the paper's human to human, MLLM to MLLM)
      people to models        every person with every model (human to MLLM)
      majority to consensus   more than half of the people, and the models' AND: what an ISR really uses

    The study is what at least one person has a record of, or everything where there are no people. The intervals are
    from the bootstrap over images. In the last row only samples that all of them rated count.
    """
    people, models = list(dict.fromkeys(people)), list(dict.fromkeys(models))
    if both := [name for name in people if name in models]:
        raise ValueError(f"{both[0]!r} is named among the people and among the models")
    if len(people) + len(models) < 2:
        raise ValueError("agreement needs at least two raters")
    study = [one for arm in by_arm(records, [*people, *models]).values() for one in arm.values()
             if not people or any(one.records[name] for name in people)]
    rows = {"people": (people, list(itertools.combinations(people, 2))),
            "models": (models, list(itertools.combinations(models, 2))),
            "people to models": ([*people, *models], list(itertools.product(people, models)))}
    table = {}
    for label in LABELS:
        ratings = [(one.image_id, {name: getattr(v, label) for name, v in one.verdicts.items()}) for one in study]
        table[label] = {row: _agreement(ratings, raters, pairs, row != "people to models", draws, seed)
                        for row, (raters, pairs) in rows.items() if pairs}
        if people and models:
            sides = [(image, _sides(one, people, models)) for image, one in ratings]
            table[label]["majority to consensus"] = _agreement(sides, ["majority", "consensus"], [("majority", "consensus")],
                                                               False, draws, seed)
    return table


def _sides(rating, people, models):
    """The people's majority and the models' consensus; None where a rating is missing or the people are tied."""
    votes = [rating[name] for name in people]
    tied = None in votes or 2 * sum(votes) == len(votes)
    if tied or None in (rating[name] for name in models):
        return {"majority": None, "consensus": None}
    return {"majority": 2 * sum(votes) > len(votes), "consensus": all(rating[name] for name in models)}


def _agreement(ratings, raters, pairs, together, draws, seed):
    """An Agreement of (image_id, {rater: True, False or None}); the vector of an item is one-hot tables and histogram."""
    rows, cells = [], ((True, True), (True, False), (False, True), (False, False))
    for image, said in ratings:
        votes = [said[name] for name in raters]
        yes = None if None in votes else sum(votes)
        rows.append((image, [*((said[a], said[b]) == cell for a, b in pairs for cell in cells),
                             *(yes == count for count in range(len(raters) + 1))]))
    size = 4 * len(pairs)

    def mean(coefficient):                      # over the pairs of raters; undefined where one of them is
        return lambda v: coefficient(*(v[..., cell:size:4] for cell in range(4))).mean(-1)

    def ac1(n11, n10, n01, n00):
        import numpy as np
        return gwet_ac1(np.stack([n00, n10 + n01, n11], -1))

    statistics = {"observed": mean(percent_agreement), "cohen": mean(cohen_kappa), "ac1": mean(ac1)}
    if together:
        statistics["fleiss"] = lambda v: fleiss_kappa(v[..., size:])
    found = bootstrap(rows, statistics, draws=draws, seed=seed)
    totals = [sum(column) for column in zip(*(vector for _, vector in rows), strict=True)]
    answers = {name: [said[name] for _, said in ratings if said[name] is not None] for name in raters}
    items = sum(totals[size:])
    return Agreement(raters, items, len(rows) - items, found["observed"], found["cohen"], found["ac1"], found.get("fleiss"),
                     {name: sum(a) / len(a) if a else None for name, a in answers.items()},
                     [(a, b, *totals[4 * i:4 * i + 4]) for i, (a, b) in enumerate(pairs)])
