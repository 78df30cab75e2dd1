"""Verdicts, their strict consensus, and Wilson's interval against published values."""

import dataclasses
import itertools

import numpy as np
import pytest

from sifm_min.isr import Verdict, wilson

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
def test_what_is_no_proportion_is_refused(case):
    with pytest.raises(ValueError, match="no proportion"):
        wilson(*case)
