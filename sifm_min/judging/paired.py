"""Method against method on the same pictures and prompts: exact paired tests, corrected for their number.

    for result in compare(by_arm(records), [("sifm", "photoguard-encoder"), ("sifm", "noise")]):
        result.difference, result.p, result.p_holm           # of the two success rates
"""

from collections import Counter
from dataclasses import dataclass

from .intervals import DRAWS, Estimate
from .rates import difference
from .records import pairs_of


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

    p = P(|sum +-d_i| >= |sum d_i|) where each image's sign is a fair coin. With one prompt per image this is the exact
    McNemar test. With several it swaps whole images, as the bootstrap draws them (Fisher's randomization test, The Design
    of Experiments, 1935, section 21; all 2^n sign patterns at once, by convolution).
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

    Rejecting what is at most 0.05 keeps the chance of any false rejection in the family at 5 %, for any dependence of the tests
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
    """Two arms on the same images and prompts: the difference of their ISR and its p value.

    pairs: samples complete in both arms; left_out: the other samples of either. only_first, only_second: the pairs in
    which only one arm succeeded. p_holm: p, corrected by Holm's method for the number of `comparisons`.
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
    """[Comparison] of each pair of arms (first, second) in `family`.

    Holm's correction is over the whole family, so it must name every pair that is looked at. With one sample per image the
    test is McNemar's exact test; with several it is `swap_test` over whole images. Raises ValueError where a pair shares
    no image and prompt that every judge decided in both arms.
    """
    family = [tuple(names) for names in family]
    if not family:
        raise ValueError("there is nothing to compare: name at least one pair of arms")
    rows = []
    for first, second in family:
        pairs = pairs_of(arms, first, second)
        images, only = {}, Counter()
        for a, b in pairs:
            step = a.verdict.success - b.verdict.success
            images[a.image_id] = images.get(a.image_id, 0) + step
            only[step] += 1
        single = len(images) == len(pairs)
        rows.append((first, second, len(pairs), len(arms[first].keys() | arms[second].keys()) - len(pairs), only[1], only[-1],
                      difference(pairs, draws, seed), "exact McNemar" if single else "exact swap of whole images",
                      mcnemar(only[1], only[-1]) if single else swap_test(images.values())))
    adjusted = holm([row[-1] for row in rows])
    return [Comparison(*row, p_holm, len(rows)) for row, p_holm in zip(rows, adjusted, strict=True)]
