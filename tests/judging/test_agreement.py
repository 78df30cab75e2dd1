"""Agreement of raters: published values, averages over pairs, and the paper's Table I by hand."""

import dataclasses
import itertools
import math
import random

import pytest
from records_by_hand import record

from sifm_min.judging.agreement import (
    _multirater,
    cohen_kappa,
    consistency,
    fleiss_kappa,
    gwet_ac1,
    percent_agreement,
    prediction,
)
from sifm_min.judging.intervals import Estimate

# Yes/no tables n11, n10, n01, n00 -> p_o, kappa. Cohen's paradoxes: Feinstein and Cicchetti, J. Clin. Epidemiol. 43 (1990)
# 543-549; then Gwet, Kappa Statistic is not Satisfactory (2002), with AC1 0.9408.
KAPPA = {(45, 15, 25, 15): (0.60, 0.1304), (40, 9, 6, 45): (0.85, 0.70), (80, 10, 5, 5): (0.85, 0.32),
         (118, 5, 2, 0): (0.944, -0.0234), (140, 4, 5, 1): (0.94, 0.15)}


@pytest.mark.parametrize("table", KAPPA)
def test_cohens_kappa_equals_published_values(table):
    digits = 5e-5 if table in ((45, 15, 25, 15), (118, 5, 2, 0)) else 5e-3
    assert (percent_agreement(*table), cohen_kappa(*table)) == pytest.approx(KAPPA[table], abs=digits)


def test_ac1_equals_published_values():
    assert gwet_ac1([0, 7, 118]) == pytest.approx(0.9408, abs=5e-5)
    assert gwet_ac1([1, 9, 140]) == pytest.approx(0.935, abs=5e-4)


def test_fleiss_kappa_of_an_example():
    yes = (3, 3, 3, 2, 2, 1, 0, 0, 3, 1)
    histogram = [yes.count(k) for k in range(4)]
    agree, share = _multirater(histogram)
    assert (agree, share ** 2 + (1 - share) ** 2) == pytest.approx((0.7333, 0.52), abs=5e-5)
    assert fleiss_kappa(histogram) == pytest.approx(0.4444, abs=5e-5)


def test_several_raters_are_the_average_over_their_pairs():
    """Fleiss' and Gwet's agreement, found by walking over every pair of ratings; chance from two ratings drawn apart."""
    rng = random.Random(12)
    for raters in (2, 3, 4):
        ratings = [[rng.random() < 0.3 + 0.5 * (i % 2) for _ in range(raters)] for i in range(20)]
        histogram = [sum(sum(r) == k for r in ratings) for k in range(raters + 1)]
        pairs = [a == b for r in ratings for a, b in itertools.combinations(r, 2)]
        flat = [vote for r in ratings for vote in r]
        agree = sum(pairs) / len(pairs)
        chance = sum(a == b for a in flat for b in flat) / len(flat) ** 2
        assert fleiss_kappa(histogram) == pytest.approx((agree - chance) / (1 - chance))
        assert gwet_ac1(histogram) == pytest.approx((agree - (1 - chance)) / chance)     # 2p(1-p) is the rest


def test_raters_who_always_say_the_same():
    for table, histogram in (((9, 0, 0, 0), [0, 0, 9]), ((0, 0, 0, 9), [9, 0, 0])):
        assert math.isnan(cohen_kappa(*table)) and math.isnan(fleiss_kappa(histogram))
        assert percent_agreement(*table) == gwet_ac1(histogram) == 1
    assert cohen_kappa(5, 0, 0, 4) == fleiss_kappa([4, 0, 5]) == 1
    assert cohen_kappa(0, 5, 5, 0) == pytest.approx(-1)
    assert all(math.isnan(f(*x)) for f, x in ((cohen_kappa, (0, 0, 0, 0)), (gwet_ac1, ([0, 0, 0],))))
    found = consistency([record(i, judge=j) for i in range(9) for j in "abc"], models="abc")["success"]["models"]
    assert found.cohen == found.fleiss == Estimate(None, None, None, "undefined on these samples")
    assert found.ac1.value == found.observed.value == 1 and "all resamples say the same" in found.ac1.note


PEOPLE = ("111", "110", "100", "000", "111", "011", "001", "000", "111", "101", "110", "000")
MODELS = ("11", "11", "10", "00", "10", "11", "01", "00", "11", "01", "11", "10")


def panel_study():
    """Twelve samples, people p q r and models x y, and what each finds."""
    return [record(i, judge=judge, findings=(vote == "1", False))
            for i, votes in enumerate(zip(PEOPLE, MODELS, strict=True))
            for judge, vote in zip("pqrxy", "".join(votes), strict=True)]


def test_table_one():
    table = consistency(panel_study(), people="pqr", models="xy", draws=500)
    assert list(table) == ["semantic_mismatch", "perceptual_degradation", "success"]
    rows = table["success"]
    assert list(rows) == ["people", "models", "people to models", "majority to consensus"]
    # unanimous 6 of 12, and (3p - 1) / 2 of three raters are unanimous where pairs agree in p
    assert rows["people"].observed.value == pytest.approx(2 / 3) and rows["people"].items == 12
    assert rows["models"].observed.value == pytest.approx(7 / 12)
    assert rows["models"].tables == [("x", "y", 5, 3, 2, 2)]
    assert rows["models"].marginals == pytest.approx({"x": 8 / 12, "y": 7 / 12})
    by_hand = [p == m for people, models in zip(PEOPLE, MODELS, strict=True) for p in people for m in models]
    assert rows["people to models"].observed.value == pytest.approx(sum(by_hand) / 72)
    assert len(rows["people to models"].tables) == 6 and rows["people to models"].fleiss is None
    consensus = rows["majority to consensus"]
    (first, second, n11, n10, n01, n00), = consensus.tables
    assert (first, second, n11, n10, n01, n00) == ("majority", "consensus", 5, 2, 0, 5)
    assert prediction(n11, n10, n01, n00) == pytest.approx({"precision": 1, "recall": 5 / 7, "bias": -2 / 12})
    assert prediction(0, 0, 0, 3) == {"precision": None, "recall": None, "bias": 0}
    assert table["semantic_mismatch"] == rows and table["perceptual_degradation"]["people"].cohen.value is None


def test_every_pair_counts_on_what_both_rated():
    records = panel_study()
    records[0] = dataclasses.replace(records[0], semantic_mismatch=None, perceptual_degradation=None, status="skipped")
    rows = consistency([r for r in records if (r.judge, r.image_id) != ("x", "5")], "pqr", "xy", draws=100)["success"]
    assert (rows["people"].items, rows["people"].left_out) == (11, 1)
    assert [sum(t[2:]) for t in rows["people"].tables] == [11, 11, 12]
    assert [sum(t[2:]) for t in rows["people to models"].tables] == [10, 11, 11, 12, 11, 12]
    assert (rows["majority to consensus"].items, rows["majority to consensus"].left_out) == (10, 2)
    rating = {(r.judge, r.image_id): r.verdict.success for r in records if (r.judge, r.image_id) != ("x", "5")}
    for row in rows.values():
        for a, b, *counts in row.tables:
            if a != "majority":
                said = [(rating.get((a, str(i))), rating.get((b, str(i)))) for i in range(12)]
                assert counts == [said.count(cell) for cell in ((True, True), (True, False), (False, True), (False, False))]


def test_the_study_is_what_people_rated():
    more = [record(i, judge=judge) for i in range(100, 160) for judge in "xy"]
    assert consistency(panel_study() + more, "pqr", "xy", draws=50) == consistency(panel_study(), "pqr", "xy", draws=50)
    assert consistency(panel_study() + more, models="xy", draws=50)["success"]["models"].items == 72


def test_an_even_number_of_people_can_be_tied():
    tied = [record(0, judge=j, findings=(v, False)) for j, v in zip("pqx", (True, False, True), strict=True)]
    rest = [record(i, judge=j) for i in (1, 2) for j in "pqx"]
    assert consistency(tied + rest, "pq", "x", draws=10)["success"]["majority to consensus"].items == 2


def test_agreement_is_resampled_by_image():
    """The same ratings, once as 60 images and once as 12 images with five samples each that go together."""
    rng = random.Random(13)
    kinds = [(True, True), (False, False), (True, False)]
    said = [kind for kind in (rng.choice(kinds) for _ in range(12)) for _ in range(5)]
    widths = []
    for group in (1, 5):
        records = [record(i // group, i % group, judge=j, findings=(v, False)) for i, votes in enumerate(said)
                   for j, v in zip("ab", votes, strict=True)]
        found = consistency(records, models="ab", draws=2000)["success"]["models"]
        widths.append(found.ac1.high - found.ac1.low)
    assert widths[1] > 1.6 * widths[0]
