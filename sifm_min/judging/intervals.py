"""Intervals of rates: Wilson's for independent samples, and the bootstrap over images where prompts share a picture.

Intervals are at 95 %. Each result is a frozen dataclass, so `dataclasses.asdict` makes it JSON-ready. numpy is imported
inside the functions, so that a command can import this file before it knows if there is anything to compute.
"""

import math
from dataclasses import dataclass

DRAWS, DEFINED = 10_000, 0.95                   # resamples; the share of them in which a statistic must be defined


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

    The prompts tried on one picture share that picture and its perturbation, so five of them carry less information than
    five pictures. Wilson's formula, or drawing single samples, treats them as independent, and its interval is too narrow.
    Drawing whole images, n of n with replacement, keeps the dependence (Davison and Hinkley, Bootstrap Methods and their
    Application, 1997, section 3.8). The interval is the 2.5 % and 97.5 % quantile of `draws` resamples (Efron and
    Tibshirani, An Introduction to the Bootstrap, 1993, section 13.3).

    Images with equal sums are exchangeable: the number of draws of each kind is multinomial. The kinds are sorted, so the
    result depends neither on the order of the samples nor on their names.
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
    total, sums, estimates = counts @ kinds, np.concatenate(sums), {}
    for name, statistic in statistics.items():
        value, drawn = float(statistic(total)), np.asarray(statistic(sums))
        drawn = np.sort(drawn[np.isfinite(drawn)])
        note = f"bootstrap over {many} images"
        if not math.isfinite(value):
            estimates[name] = Estimate(None, None, None, "undefined on these samples")
        elif len(drawn) < DEFINED * draws:
            undefined = f"no interval: undefined in {draws - len(drawn)} of {draws} resamples"
            estimates[name] = Estimate(value, None, None, undefined)
        elif drawn[-1] - drawn[0] < 1e-12:
            estimates[name] = Estimate(value, None, None, f"no interval: {note}, but all resamples say the same")
        else:
            estimates[name] = Estimate(value, *(float(q) for q in np.quantile(drawn, (0.025, 0.975))), note)
    return estimates


def ratio(over, under):
    """over / under, nan where `under` is zero: numbers or arrays."""
    import numpy as np

    over, under = np.asarray(over, float), np.asarray(under, float)
    return np.divide(over, under, out=np.full(np.broadcast(over, under).shape, np.nan), where=under != 0)[()]


def share(rows, draws, seed):
    """The Estimate of a rate from rows of (image_id, hit): Wilson's if each image occurs once, else the bootstrap."""
    rows = [(image, (int(hit), 1)) for image, hit in rows]
    images, hits = len({image for image, _ in rows}), sum(hit for _, (hit, _) in rows)
    if len(rows) == images and rows:
        return Estimate(hits / images, *wilson(hits, images), "Wilson")
    estimate = bootstrap(rows, {"share": lambda v: ratio(v[..., 0], v[..., 1])}, draws=draws, seed=seed)["share"]
    if estimate.value in (0, 1):                   # no resample can differ; then each image counts as one sample
        bounds = wilson(int(estimate.value) * images, images)
        return Estimate(estimate.value, *bounds, f"Wilson over {images} images, all alike")
    return estimate
