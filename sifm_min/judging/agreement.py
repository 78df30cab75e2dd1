"""Agreement of judges, people and models (paper, Table I).

There are two categories, yes and no. Counts may be arrays of tables; a coefficient is nan where it is undefined.
"""

import itertools
import math
from dataclasses import dataclass

from .intervals import DRAWS, Estimate, bootstrap, ratio
from .records import by_arm

LABELS = ("semantic_mismatch", "perceptual_degradation", "success")


def percent_agreement(n11, n10, n01, n00):
    """p_o = (n11 + n00) / n; n10: the first rater says yes and the second no."""
    return ratio(n11 + n00, n11 + n10 + n01 + n00)


def cohen_kappa(n11, n10, n01, n00):
    """kappa = (p_o - p_e) / (1 - p_e), p_e = ((n11 + n10)(n11 + n01) + (n00 + n01)(n00 + n10)) / n^2.

    Undefined where p_e = 1: both raters always give the same label (Cohen, Educ. Psychol. Meas. 20, 1960, 37-46).
    """
    n = n11 + n10 + n01 + n00
    chance = ratio((n11 + n10) * (n11 + n01) + (n00 + n01) * (n00 + n10), n * n)
    return ratio(ratio(n11 + n00, n) - chance, 1 - chance)


def fleiss_kappa(histogram):
    """kappa = (P - P_e) / (1 - P_e) of m raters; histogram: (..., m + 1) items with 0, 1, ..., m raters saying yes.

    P: the mean over items of (sum_j n_ij^2 - m) / (m (m - 1)), the share of agreeing pairs of raters; P_e = sum_j p_j^2
    with p_j the share of category j among all ratings. Undefined where one category took them all (Fleiss, Psychol. Bull.
    76, 1971, 378-382).
    """
    agree, yes = _multirater(histogram)
    chance = yes * yes + (1 - yes) * (1 - yes)
    return ratio(agree - chance, 1 - chance)


def gwet_ac1(histogram):
    """AC1 = (P - P_e) / (1 - P_e) with P as in Fleiss' kappa and P_e = 2 p (1 - p), p the share of yes among all ratings.

    P_e is at most 1/2, so it is defined wherever anything was rated, and 1 where all always agree; kappa collapses there,
    and near there, when one category is rare (Gwet, Br. J. Math. Stat. Psychol. 61, 2008, 29-48).
    """
    agree, yes = _multirater(histogram)
    chance = 2 * yes * (1 - yes)
    return ratio(agree - chance, 1 - chance)


def _multirater(histogram):
    """The mean share of agreeing pairs of raters per item, and the share of yes among all ratings."""
    import numpy as np

    histogram = np.asarray(histogram, float)
    raters = histogram.shape[-1] - 1
    yes, items = np.arange(raters + 1), histogram.sum(-1)
    pairs = (yes ** 2 + (raters - yes) ** 2 - raters) / (raters * (raters - 1))
    return ratio(histogram @ pairs, items), ratio(histogram @ yes, items * raters)


def prediction(n11, n10, n01, n00):
    """The second rater as a prediction of the first: precision n11/(n11+n01), recall n11/(n11+n10), bias (n01-n10)/n.

    Each is None where it would be a share of nothing.
    """
    shares = {"precision": ratio(n11, n11 + n01), "recall": ratio(n11, n11 + n10),
             "bias": ratio(n01 - n10, n11 + n10 + n01 + n00)}
    return {name: None if math.isnan(value) else float(value) for name, value in shares.items()}


@dataclass(frozen=True)
class Agreement:
    """The agreement of raters on one label.

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
    """The paper's Table I: {label: {row: Agreement}}. A label is a finding or "success" (their OR); the rows are

      people, models          each group among itself (the paper's human to human, MLLM to MLLM)
      people to models        every person with every model (human to MLLM)
      majority to consensus   the majority of the people and the AND of the models, which the ISR uses

    The study is every sample with a record of at least one person, or all samples if there are no people. The intervals
    are from the bootstrap over images. The last row counts only samples that all of them rated.
    """
    people, models = list(dict.fromkeys(people)), list(dict.fromkeys(models))
    if both := [name for name in people if name in models]:
        raise ValueError(f"{both[0]!r} is named among the people and among the models")
    if len(people) + len(models) < 2:
        raise ValueError("agreement needs at least two raters")
    study = [judged for arm in by_arm(records, [*people, *models]).values() for judged in arm.values()
             if not people or any(judged.records[name] for name in people)]
    rows = {"people": (people, list(itertools.combinations(people, 2))),
            "models": (models, list(itertools.combinations(models, 2))),
            "people to models": ([*people, *models], list(itertools.product(people, models)))}
    table = {}
    for label in LABELS:
        ratings = [(judged.image_id, {name: getattr(v, label) for name, v in judged.verdicts.items()})
                   for judged in study]
        table[label] = {row: _agreement(ratings, raters, pairs, row != "people to models", draws, seed)
                        for row, (raters, pairs) in rows.items() if pairs}
        if people and models:
            sides = [(image, _sides(rating, people, models)) for image, rating in ratings]
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
    """The Agreement of rows (image_id, {rater: True, False or None}).

    The vector of a row that is summed and resampled is the one-hot tables of all pairs and the one-hot histogram.
    """
    rows, cells = [], ((True, True), (True, False), (False, True), (False, False))
    for image, rating in ratings:
        votes = [rating[name] for name in raters]
        yes = None if None in votes else sum(votes)
        rows.append((image, [*((rating[a], rating[b]) == cell for a, b in pairs for cell in cells),
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
    estimates = bootstrap(rows, statistics, draws=draws, seed=seed)
    totals = [sum(column) for column in zip(*(vector for _, vector in rows), strict=True)]
    answers = {name: [rating[name] for _, rating in ratings if rating[name] is not None] for name in raters}
    items = sum(totals[size:])
    named = [estimates.get(name) for name in ("observed", "cohen", "ac1", "fleiss")]
    return Agreement(raters, items, len(rows) - items, *named,
                     {name: sum(a) / len(a) if a else None for name, a in answers.items()},
                     [(a, b, *totals[4 * i:4 * i + 4]) for i, (a, b) in enumerate(pairs)])
