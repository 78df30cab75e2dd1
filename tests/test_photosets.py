"""tools/photosets.py: the square that is measured, and figures over photographs with their intervals."""

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
import photosets  # noqa: E402


def test_square_has_nothing_from_outside_itself():
    values = np.full((40, 60, 3), 100, np.uint8)
    values[:, :10] = values[:, 50:] = 255
    assert np.asarray(photosets.middle_square(Image.fromarray(values), 16)).tolist() == [[[100] * 3] * 16] * 16


def test_interval_is_of_the_statistic_over_photographs():
    values = np.random.default_rng(0).gamma(2, size=15)
    drawn = values[np.random.default_rng(1).integers(0, 15, (20_000, 15))]
    for statistic, of in (("mean", np.mean), ("median", np.median)):
        text = photosets.interval(values, statistic, digits=6)
        value, low, high = map(float, text.replace("[", "").replace("]", "").replace(",", "").split())
        assert value == pytest.approx(of(values), abs=1e-6)
        expected = np.quantile(of(drawn, axis=1), [0.025, 0.975])
        np.testing.assert_allclose([low, high], expected, atol=0.08 if statistic == "mean" else 0.2)
    even = photosets.interval([4, 1, 2, 3], "median")
    assert even.startswith("2.50 [1.") and photosets.interval([1, 1, 4]).startswith("2.00 [1.00, ")


def test_interval_of_few_photographs_is_the_value_alone():
    assert photosets.interval([]) == "-"
    assert photosets.interval([0.5]) == photosets.interval([0.5, 0.5], "median") == "0.50"
