"""Verdicts and the statistics of the success rate: against published values, against brute force, and in what must not change.

No statistics package is asked: what a formula gives is found again by enumerating coins, resamples, subsets or pairs of raters.
"""

import dataclasses
import itertools
import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from records_by_hand import drawn, rated, record

from sifm_min import miniature
from sifm_min.judging.agreement import (
    consistency,
)
from sifm_min.judging.intervals import Estimate, bootstrap, share, wilson
from sifm_min.judging.paired import compare, holm, mcnemar, swap_test
from sifm_min.judging.rates import JudgeCounts, by_judge, controlled, success_rate
from sifm_min.judging.records import Edit, Record, ask, by_arm
from sifm_min.miniature.verdict import NoVerdict, Verdict, kleene_and, kleene_not, kleene_or

FINDINGS = list(itertools.product((False, True), repeat=2))


@pytest.mark.parametrize(("mismatch", "degraded"), FINDINGS)
def test_one_judge_thwarts_by_either_finding(mismatch, degraded):
    verdict = Verdict.of(mismatch, degraded)
    assert (verdict.semantic_mismatch, verdict.perceptual_degradation) == (mismatch, degraded)
    assert verdict.success == (mismatch or degraded)
    assert verdict.obeyed == (not verdict.success)          # one judge never splits


def test_findings_are_plain_booleans():
    for yes in (np.bool_(True), 1, "found"):
        verdict = Verdict.of(yes, not yes)
        assert all(type(value) is bool for value in dataclasses.astuple(verdict))       # JSON takes no others


def test_the_consensus_of_one_judge_is_that_judge():
    for findings in FINDINGS:
        assert Verdict.consensus([Verdict.of(*findings)]) == Verdict.of(*findings)


@pytest.mark.parametrize("judges", [2, 3])
def test_the_consensus_is_strict(judges):
    for findings in itertools.product(FINDINGS, repeat=judges):
        verdicts = [Verdict.of(*pair) for pair in findings]
        agreed = Verdict.consensus(verdicts)
        assert agreed.success == all(a or b for a, b in findings)
        assert agreed.obeyed == (not any(a or b for a, b in findings))
        assert agreed.semantic_mismatch == all(a for a, _ in findings)
        assert agreed.perceptual_degradation == all(b for _, b in findings)
        assert not (agreed.success and agreed.obeyed)
        split = len({v.success for v in verdicts}) == 2
        assert (not agreed.success and not agreed.obeyed) == split      # a split, and only that, is neither
        for order in itertools.permutations(verdicts):
            assert Verdict.consensus(order) == agreed


def test_judges_may_agree_on_success_for_different_reasons():
    agreed = Verdict.consensus(iter([Verdict.of(True, False), Verdict.of(False, True)]))
    assert agreed == Verdict(semantic_mismatch=False, perceptual_degradation=False, success=True, obeyed=False)


def test_no_judge_no_verdict():
    with pytest.raises(ValueError, match="at least one"):
        Verdict.consensus([])


def test_a_verdict_is_not_changed_afterwards():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Verdict.of(True, False).success = False


# -- three values --------------------------------------------------------------------------------------------------------

T, F, U = True, False, None
AND = {(T, T): T, (T, F): F, (T, U): U, (F, T): F, (F, F): F, (F, U): F, (U, T): U, (U, F): F, (U, U): U}
OR = {(T, T): T, (T, F): T, (T, U): T, (F, T): T, (F, F): F, (F, U): U, (U, T): T, (U, F): U, (U, U): U}


def test_kleenes_tables():
    assert [kleene_not(v) for v in (T, F, U)] == [F, T, U]
    for pair in itertools.product((T, F, U), repeat=2):
        assert kleene_and(pair) is AND[pair] and kleene_or(pair) is OR[pair]
    for triple in itertools.product((T, F, U), repeat=3):
        assert kleene_and(iter(triple)) is AND[AND[triple[:2]], triple[2]]
        assert kleene_or(iter(triple)) is OR[OR[triple[:2]], triple[2]]


@pytest.mark.parametrize("judges", [1, 2])
def test_verdicts_are_known_if_no_missing_answer_changes_them(judges):
    for findings in itertools.product((T, F, U), repeat=2 * judges):
        found = Verdict.consensus(Verdict.of(*findings[i:i + 2]) for i in range(0, 2 * judges, 2))
        could_be = [Verdict.consensus(Verdict.of(*full[i:i + 2]) for i in range(0, 2 * judges, 2))
                    for full in itertools.product(*((T, F) if v is None else (v,) for v in findings))]
        for name in ("semantic_mismatch", "perceptual_degradation", "success", "obeyed"):
            values = {getattr(v, name) for v in could_be}
            assert getattr(found, name) is (values.pop() if len(values) == 1 else None)


def test_refusals_beside_failures_are_decided():
    refused = Verdict.of(None, None)
    assert Verdict.consensus([Verdict.of(False, False), refused]).success is False
    assert Verdict.consensus([Verdict.of(True, False), refused]).success is None


# Newcombe 1998, Statistics in Medicine 17, 857-872, table I, 95 %: his method 3, the uncorrected score.
NEWCOMBE = {(81, 263): (0.2553, 0.3662), (15, 148): (0.0624, 0.1605), (0, 20): (0.0, 0.1611), (1, 29): (0.0061, 0.1718)}


@pytest.mark.parametrize("case", NEWCOMBE)
def test_wilson_equals_newcombes_table(case):
    assert wilson(*case) == pytest.approx(NEWCOMBE[case], abs=5e-5)


def test_wilson_solves_the_score_test():
    """The interval's ends are the proportions at which the observation lies exactly z standard errors away."""
    for count, total in itertools.chain(((k, 10) for k in range(11)), ((70, 100), (1, 1000))):
        for z in (1.0, 1.959964, 2.575829):
            low, high = wilson(count, total, z)
            assert 0 <= low <= count / total <= high + 1e-12 <= 1 + 1e-12           # all of all: 1, to rounding
            for end in (low, high):
                if 1e-9 < end < 1 - 1e-9:
                    assert abs(count / total - end) / (end * (1 - end) / total) ** 0.5 == pytest.approx(z, rel=1e-6)
            mirrored = wilson(total - count, total, z)
            assert (1 - mirrored[1], 1 - mirrored[0]) == pytest.approx((low, high))


def test_wilson_of_nothing_is_everything():
    assert wilson(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize("case", [(-1, 10), (11, 10), (1, 0), (0, -1)])
def test_counts_that_give_no_proportion_are_refused(case):
    with pytest.raises(ValueError, match="no proportion"):
        wilson(*case)


WILSON = {(79, 100): (0.7002, 0.8583), (97, 100): (0.9155, 0.9897), (325, 500): (0.6072, 0.6905), (0, 20): (0, 0.1611),
          (20, 20): (0.8389, 1), (111, 150): (0.6644, 0.8036), (1, 1): (0.2065, 1)}


@pytest.mark.parametrize("case", WILSON)
def test_wilson_of_the_papers_sizes(case):
    assert wilson(*case) == pytest.approx(WILSON[case], abs=1e-4)


# -- records -------------------------------------------------------------------------------------------------------------

def everything(records, draws=300):
    """All results on records of arms control, noise, sifm, mist by judges a and b."""
    arms = by_arm(records)
    return (success_rate(arms, "sifm", draws=draws), controlled(arms, "sifm", noise="noise", draws=draws),
            compare(arms, [("sifm", "mist"), ("sifm", "noise")], draws=draws),
            consistency(records, ["a"], ["b"], draws=draws))


def test_neither_order_nor_names_of_pictures_decide():
    records = drawn(1)
    expected = everything(records)
    random.Random(2).shuffle(records)
    assert everything(records) == expected
    names = [str(i) for i in range(12)]
    renamed = dict(zip(names, random.Random(3).sample(names, 12), strict=True))
    assert everything([dataclasses.replace(r, image_id=renamed[r.image_id], sample_id="s" + r.sample_id)
                       for r in records]) == expected


def test_judges_may_change_their_names():
    records, other = drawn(1), {"a": "b", "b": "a"}
    swapped = [dataclasses.replace(r, judge=other[r.judge]) for r in records]
    assert everything(swapped)[:3] == everything(records)[:3]
    for label, rows in consistency(records, ["a"], ["b"], draws=200).items():
        mirrored = consistency(swapped, ["a"], ["b"], draws=200)[label]["people to models"]
        (a, b, n11, n10, n01, n00), = rows["people to models"].tables
        assert mirrored.tables == [(a, b, n11, n01, n10, n00)]
        assert mirrored.cohen.value == rows["people to models"].cohen.value


def test_results_are_json():
    rate, controlled, comparisons, table = everything(drawn(4))
    text = json.dumps([dataclasses.asdict(one) for one in (rate, controlled, *comparisons)]
                      + [dataclasses.asdict(one) for rows in table.values() for one in rows.values()], allow_nan=False)
    assert json.loads(text)[0]["samples"] == 36


def test_unanswered_samples_and_missing_records_are_counted():
    records = rated([True, True]) + [record(2, judge="a")] + [record(3, judge="b", findings=(None, None), status="timeout")]
    rate = success_rate(by_arm(records), "sifm")
    assert (rate.samples, rate.complete, rate.successes, rate.coverage) == (4, 2, 2, 0.5)
    assert (rate.lowest, rate.highest) == (0.5, 1)
    counts = by_judge(by_arm(records), "sifm")
    assert counts["b"].statuses == {"ok": 2, "no record": 1, "timeout": 1}
    assert success_rate(by_arm(records, ["a"]), "sifm").complete == 3


def test_the_panel_can_be_any_of_the_judges():
    records = rated(["split"] * 3 + [True])
    assert success_rate(by_arm(records, ["a"]), "sifm").isr.value == 1
    assert success_rate(by_arm(records, ["b"]), "sifm").isr.value == 0.25


WRONG = {
    "nothing": (lambda: by_arm([]), "nothing was judged"),
    "no rater": (lambda: by_arm(rated([True]), []), "the panel is empty"),
    "stranger": (lambda: by_arm(rated([True]), ["a", "c"]), "judge 'c' has no record"),
    "twice": (lambda: by_arm(rated([True]) * 2), "two records of sample '0/own'"),
    "two places": (lambda: by_arm([record(1), dataclasses.replace(record(2), sample_id="1/own")]), "two images or prompts"),
    "one place": (lambda: by_arm([record(1), dataclasses.replace(record(1), sample_id="x", judge="b")]), "same image and"),
    "no arm": (lambda: success_rate(by_arm(rated([True])), "mist"), "arm 'mist' has no sample; there are sifm"),
    "no control": (lambda: controlled(by_arm(rated([True])), "sifm"), "arm 'control' has no sample"),
    "no pair": (lambda: compare(by_arm(rated([True]) + rated([None], "mist")), [("sifm", "mist")]), "no image and"),
    "no family": (lambda: compare(by_arm(rated([True])), []), "nothing to compare"),
    "alone": (lambda: consistency(rated([True]), ["a"]), "at least two raters"),
    "both": (lambda: consistency(rated([True]), ["a"], ["a"]), "among the people and among the models"),
    "a number": (lambda: record(1, findings=(1, False)), "true, false or missing, got 1 and False"),
    "a word": (lambda: record(1, findings=(True, "true")), "true, false or missing"),
    "numpy": (lambda: record(1, findings=(np.True_, None)), "true, false or missing"),
    "refused, but": (lambda: record(1, status="blocked_output"), "goes with no findings"),
    "number name": (lambda: Record("s", 1, "p", "arm", "a", True, True), "are texts"),
    "empty name": (lambda: Record("s", "i", "", "arm", "a", True, True), "none empty"),
    "fine": (lambda: NoVerdict("ok"), "why there is no verdict"),
    "no p": (lambda: holm([0.1, 1.2]), "not all probabilities"),
    "no count": (lambda: mcnemar(-1, 2), "no counts"),
}


@pytest.mark.parametrize("call, sentence", WRONG.values(), ids=WRONG)
def test_uncountable_input_is_one_sentence(call, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_importing_the_file_loads_no_numpy():
    code = "import sys, sifm_min.judge; sys.exit('numpy' in sys.modules)"
    assert not subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode


# -- one interface -------------------------------------------------------------------------------------------------------

def test_oracles_models_and_people_are_judges_alike():
    sample = miniature.samples(1, seed=5)[0]

    def model(asked, edited):
        if edited is asked.image:
            raise NoVerdict("blocked_prompt")
        return Verdict.of(asked.prompt == "", False)

    edits = [Edit(name, "0", "own", name, sample, picture)
             for name, picture in (("control", sample.target), ("identity", sample.image))]
    records = list(ask({**miniature.judges, "model": model}, edits))
    records += [Record("control", "0", "own", "control", "person 1", False, None)]
    assert [r.judge for r in records[:3]] == [*miniature.judges, "model"]
    assert records[5] == Record("identity", "0", "own", "identity", "model", None, None, "blocked_prompt")
    arms = by_arm(records, miniature.judges)
    for edit in edits:
        assert arms[edit.arm]["0", "own"].verdict == miniature.judge(sample, edit.edited)
    assert by_arm(records)["control"]["0", "own"].verdict.success is False
    assert success_rate(arms, "control").obeyed == 1


# -- the rate ------------------------------------------------------------------------------------------------------------

def test_the_rate_takes_complete_cases_and_its_bounds_all():
    """A sample that one judge refused can be decided only as a failure; a rate over decided samples would be too low."""
    rate = success_rate(by_arm(rated([True] * 6 + [False] * 1 + ["split"] * 1 + [None] * 1 + ["failed"] * 1)), "sifm")
    assert (rate.samples, rate.complete, rate.successes, rate.obeyed, rate.splits) == (10, 8, 6, 1, 1)
    assert rate.isr == Estimate(6 / 8, *wilson(6, 8), "Wilson")
    assert (rate.lowest, rate.highest) == (0.6, 0.7)


def test_a_rate_of_no_complete_sample_is_undefined():
    rate = success_rate(by_arm(rated([None, None, "failed"])), "sifm")
    assert (rate.isr.value, rate.isr.low, rate.isr.note) == (None, None, "undefined: no sample")
    assert (rate.lowest, rate.highest) == (0, pytest.approx(2 / 3))


def test_the_bounds_are_reached_by_the_worst_and_best_answers():
    records = drawn(6, arms=("sifm",), missing=0.3)
    rate = success_rate(by_arm(records), "sifm", draws=50)
    ends = []
    for answer in (False, True):
        full = [dataclasses.replace(r, semantic_mismatch=answer, perceptual_degradation=answer, status="ok")
                if r.semantic_mismatch is None else r for r in records]
        ends.append(success_rate(by_arm(full), "sifm", draws=50).isr.value)
    assert (rate.lowest, rate.highest) == pytest.approx(ends) and ends[0] < ends[1]


def test_two_judges_lose_half_their_disagreement():
    records = drawn(7, arms=("sifm",), images=60, missing=0)
    arms = by_arm(records)
    single = [counts.successes / counts.judged for counts in by_judge(arms, "sifm").values()]
    apart = 1 - consistency(records, ["a"], ["b"], draws=10)["success"]["people to models"].observed.value
    assert success_rate(arms, "sifm", draws=10).isr.value == pytest.approx(sum(single) / 2 - apart / 2)


def test_a_judges_reasons_are_counted():
    cases = [(True, False)] * 4 + [(False, True)] * 3 + [(True, True)] * 2 + [(False, False), (True, None), (False, None)]
    counts = by_judge(by_arm([record(i, findings=case) for i, case in enumerate(cases)]), "sifm")["a"]
    assert counts == JudgeCounts(11, 10, 4, 3, 2, {"ok": 11, "undecided": 1})


# -- whole images --------------------------------------------------------------------------------------------------------

def test_the_bootstrap_is_the_exact_distribution_of_resamples():
    """Six images with unlike numbers of prompts: all 6^6 resamples, against ten thousand drawn ones."""
    images = [(1, 1), (5, 5), (0, 5), (3, 5), (2, 4), (5, 7)]
    rows = [(str(i), (k < hits, 1)) for i, (hits, of) in enumerate(images) for k in range(of)]
    found = bootstrap(rows, {"share": lambda v: v[..., 0] / v[..., 1]})["share"]
    shares = [sum(h for h, _ in pick) / sum(n for _, n in pick) for pick in itertools.product(images, repeat=6)]
    assert found.value == 16 / 27 and found.note == "bootstrap over 6 images"
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(shares, (0.025, 0.975))), abs=0.012)


def test_the_same_seed_gives_the_same_interval():
    arms = by_arm(drawn(8))
    first, again, other = (success_rate(arms, "sifm", draws=1500, seed=seed).isr for seed in (0, 0, 1))
    assert first == again != other
    assert (other.low, other.high) == pytest.approx((first.low, first.high), abs=0.04)


def test_intervals_cover_where_prompts_of_an_image_go_together():
    """150 studies of 60 images with five prompts each, p of an image uniform: whole images cover, single samples do not."""
    rng, covered, naive = np.random.default_rng(9), 0, 0
    for _ in range(150):
        p = rng.random(60)
        hits = rng.binomial(5, p)
        rows = [(str(i), k < n) for i, n in enumerate(hits) for k in range(5)]
        found = share(rows, 600, 0)
        covered += found.low <= 0.5 <= found.high
        low, high = wilson(int(hits.sum()), 300)
        naive += low <= 0.5 <= high
    assert 0.90 * 150 <= covered <= 0.99 * 150
    assert naive < 0.83 * 150


def test_one_sample_per_image_takes_wilson_and_more_take_images():
    own, unseen = rated([True, False] * 10), rated([True, False, False] * 10, prompts="xyz")
    assert success_rate(by_arm(own), "sifm").isr.note == "Wilson"
    assert success_rate(by_arm(unseen[:-6] + unseen[-2:]), "sifm").isr.note == "bootstrap over 10 images"


def test_constant_samples_keep_a_wide_interval():
    alike = success_rate(by_arm(rated([True] * 100, prompts="vwxyz")), "sifm").isr
    assert alike == Estimate(1.0, *wilson(20, 20), "Wilson over 20 images, all alike")
    assert alike.low < wilson(100, 100)[0]
    even = success_rate(by_arm(rated([True, False] * 9, prompts="xy")), "sifm").isr
    assert (even.value, even.low, even.high) == (0.5, None, None) and "all resamples say the same" in even.note


# -- controlled ----------------------------------------------------------------------------------------------------------

def example():
    """100 images: 79 thwarted, 12 clean edits fail and 6 split the judges; 63 of the 82 that work are thwarted."""
    return (rated([True] * 63 + [False] * 19 + [True] * 16 + [False] * 2)
            + rated([False] * 82 + ["split"] * 6 + [True] * 12, "control"))


def test_the_controlled_rate_of_an_example():
    found = controlled(by_arm(example()), "sifm")
    assert (found.pairs, found.left_out) == (100, 0)
    assert found.table == {"both": 10, "arm only": 69, "control only": 2, "neither": 19}
    assert found.isr == Estimate(0.79, *wilson(79, 100), "Wilson")
    assert (found.isr.low, found.isr.high) == pytest.approx((0.700, 0.858), abs=5e-4)
    assert (found.control.value, found.control.low, found.control.high) == pytest.approx((0.12, 0.070, 0.198), abs=5e-4)
    assert found.added.value == pytest.approx(0.67) and 0.55 < found.added.low < 0.60 and 0.74 < found.added.high < 0.79
    assert found.attributable.value == pytest.approx(0.67 / 0.88)
    assert (found.ok.samples, found.ok.isr.value, found.ok.isr.low, found.ok.isr.high) == pytest.approx(
        (82, 0.768, 0.666, 0.846), abs=5e-4)
    assert found.noise is None and found.beyond_noise is None


def test_the_noise_arm_stands_beside_it():
    noise = rated([False] * 80 + ["split"] * 2 + [True] * 18, "noise")
    found = controlled(by_arm(example() + noise), "sifm", noise="noise")
    assert found.noise == controlled(by_arm(example() + noise), "noise")
    assert found.noise.ok.samples == 82 and found.noise.ok.isr.value == 0
    assert found.beyond_noise.value == pytest.approx(0.79 - 0.18)
    assert found.beyond_noise.low < 0.61 < found.beyond_noise.high


def test_missing_verdicts_leave_pairs_out_and_widen_bounds():
    treated, clean = [True, True, False, None, True], [False, None, False, False, True]
    found = controlled(by_arm(rated(treated) + rated(clean, "control")), "sifm")
    assert (found.pairs, found.left_out) == (3, 2)
    assert (found.isr.value, found.control.value, found.added.value) == pytest.approx((2 / 3, 1 / 3, 1 / 3))
    assert (found.ok.samples, found.ok.complete, found.ok.successes) == (3, 2, 1)
    assert (found.ok.lowest, found.ok.highest) == pytest.approx((1 / 3, 2 / 3))


def test_rate_is_unknown_if_every_clean_edit_fails():
    found = controlled(by_arm(rated([True, False, True]) + rated([True] * 3, "control")), "sifm")
    assert found.attributable == Estimate(None, None, None, "undefined on these samples")
    assert found.added.value == pytest.approx(-1 / 3)
    assert (found.ok.samples, found.ok.isr.value, found.ok.lowest) == (0, None, None)


def test_an_arm_against_itself_adds_nothing():
    records = rated([True, False, "split", True])
    found = controlled(by_arm(records + [dataclasses.replace(r, arm="control") for r in records]), "sifm")
    assert found.added.value == found.attributable.value == 0 and found.table["arm only"] == found.table["control only"] == 0


# -- method against method -----------------------------------------------------------------------------------------------

def test_mcnemar_of_examples():
    assert mcnemar(15, 6) == pytest.approx(0.0784, abs=5e-5)
    assert mcnemar(12, 3) == pytest.approx(0.0352, abs=5e-5)
    assert mcnemar(0, 0) == mcnemar(4, 4) == 1
    assert mcnemar(3000, 2000) < 1e-40                   # no overflow on the way


def test_mcnemar_is_a_share_of_coin_tosses():
    for n in range(9):
        heads = [sum(toss) for toss in itertools.product((0, 1), repeat=n)]
        for b in range(n + 1):
            further = sum(abs(2 * h - n) >= abs(2 * b - n) for h in heads) / 2 ** n
            assert mcnemar(b, n - b) == pytest.approx(further) == pytest.approx(mcnemar(n - b, b))
            assert swap_test([1] * b + [-1] * (n - b) + [0] * 3) == pytest.approx(further)


def test_the_swap_test_is_the_share_of_all_swaps():
    rng = random.Random(10)
    for _ in range(30):
        steps = [rng.randint(-5, 5) for _ in range(rng.randint(1, 8))]
        sums = [sum(swapped) for swapped in itertools.product(*((d, -d) for d in steps))]
        assert swap_test(steps) == pytest.approx(sum(abs(s) >= abs(sum(steps)) for s in sums) / len(sums))


def test_holm_is_the_closure_of_bonferroni():
    """A hypothesis falls where every set of hypotheses that holds it falls by Bonferroni."""
    rng = random.Random(11)
    for _ in range(30):
        ps = [rng.choice((rng.random() ** 3, 0.01, 0.02)) for _ in range(rng.randint(1, 6))]
        closed = [max(min(1, size * min(ps[j] for j in held)) for size in range(1, len(ps) + 1)
                      for held in itertools.combinations(range(len(ps)), size) if i in held) for i in range(len(ps))]
        assert holm(ps) == pytest.approx(closed)
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []


def test_methods_are_compared_on_the_same_samples():
    first, second = [True] * 15 + [False] * 6 + [True] * 5 + [False] * 4, [False] * 15 + [True] * 6 + [True] * 5 + ["split"] * 4
    records = rated([*first, None, True]) + rated([*second, True, "failed"], "mist") + rated([*first, True, True], "ace")
    found = compare(by_arm(records), [("sifm", "mist"), ("sifm", "ace"), ("mist", "sifm")])
    one, same, mirrored = found
    assert (one.pairs, one.left_out, one.only_first, one.only_second, one.test) == (30, 2, 15, 6, "exact McNemar")
    assert one.p == pytest.approx(0.0784, abs=5e-5) and one.p_holm == pytest.approx(3 * one.p) and one.comparisons == 3
    assert one.difference.value == pytest.approx(9 / 30) and one.difference.low < 0.3 < one.difference.high
    assert (same.p, same.p_holm, same.difference.value) == (1, 1, 0)
    assert (mirrored.only_first, mirrored.only_second, mirrored.p) == (6, 15, one.p)
    assert mirrored.difference.value == -one.difference.value


def test_several_prompts_of_an_image_are_swapped_together():
    """Ten images, on each of which one method wins all five prompts: fifty wins say no more than ten."""
    found, = compare(by_arm(rated([True] * 50, prompts="vwxyz") + rated([False] * 50, "mist", prompts="vwxyz")),
                         [("sifm", "mist")])
    assert found.test == "exact swap of whole images" and found.only_first == 50
    assert found.p == pytest.approx(2 / 2 ** 10) and found.p > 1e6 * mcnemar(50, 0)
