"""The judges' thresholds are frozen: they were fixed before any method was run, and none is moved for a method."""

from sifm_min.miniature import thresholds


def test_the_thresholds_are_those_that_were_fixed():
    values = {name: value for name, value in vars(thresholds).items() if name.isupper()}
    assert values == {"FIXED": "2026-11-29", "PROGRESS": 0.5, "RESIDUAL": 0.6, "OUTSIDE": 0.12, "OUTSIDE_SHARE": 0.05,
                      "STRUCTURE": 0.15, "CONTRAST": 0.38, "ASKED": 0.10, "DAMAGED": 0.50}
