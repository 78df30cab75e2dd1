"""The purifiers with a gradient, each against Pillow or its own attack and against finite differences, and what is drawn."""

from collections import Counter

import numpy as np
import pytest
import torch
from photographs import smooth
from PIL import Image

from sifm_min import images
from sifm_min.purifiers import attacks, draws, filters
from sifm_min.purifiers.draws import Draws, blurred, cleaned, kinds, rescaled


def inner(width=13, height=11, seed=0):
    """A picture in double precision whose values stay away from 0 and 1, where nothing is clipped."""
    return 0.3 + 0.4 * images.to_pixels(smooth(width, height, seed)).double()


def check_gradient(function, x):
    """The gradient in a random direction equals the central difference in that direction."""
    generator = torch.Generator().manual_seed(0)
    weights, direction = (torch.randn(x.shape, generator=generator, dtype=x.dtype) for _ in range(2))
    x = x.requires_grad_()
    (gradient,) = torch.autograd.grad((function(x) * weights).sum(), x)
    with torch.no_grad():
        high, low = ((function(x + step * direction) * weights).sum() for step in (1e-5, -1e-5))
    assert (gradient * direction).sum().item() == pytest.approx((high - low).item() / 2e-5, rel=1e-6)
    assert gradient.abs().min() > 0 or gradient.count_nonzero() > 0.9 * gradient.numel()


# --------------------------------------------------------------------------------------------------------- the purifiers

@pytest.mark.parametrize("factor", [0.5, 0.61, 0.9])
def test_resize_is_pillows_bicubic(factor):
    for width, height in ((40, 31), (1, 5), (2, 9), (7, 1)):
        image = smooth(width, height)
        small = max(1, round(width * factor)), max(1, round(height * factor))
        bands = []
        for band in image.split():                           # in floating point, where Pillow does not round, nor clip
            band = band.convert("F")
            for size in (small[0], height), small, (width, small[1]), (width, height):
                band = Image.fromarray(np.asarray(band.resize(size, Image.Resampling.BICUBIC)).clip(0, 255))
            bands.append(np.asarray(band) / 255)
        found = rescaled(images.to_pixels(image), factor)[0].numpy()
        np.testing.assert_allclose(found, np.stack(bands), atol=2e-5)


@pytest.mark.parametrize("sigma", [0.5, 1.0, 1.5])
def test_blur_is_the_gaussian_written_out(sigma):
    x = inner(9, 14)
    reach = np.arange(-5, 6)
    weights = np.exp(-reach ** 2 / (2 * sigma ** 2))
    weights = np.outer(weights, weights) / weights.sum() ** 2
    padded = np.pad(x[0].numpy(), ((0, 0), (5, 5), (5, 5)), mode="edge")
    expected = [[(padded[:, i:i + 11, j:j + 11] * weights).sum((1, 2)) for j in range(9)] for i in range(14)]
    np.testing.assert_allclose(blurred(x, sigma)[0].permute(1, 2, 0).numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("function, value", [(rescaled, 0.7), (rescaled, 0.5), (blurred, 0.5), (blurred, 1.5)])
def test_gradients_of_smooth_purifiers_are_differences(function, value):
    check_gradient(lambda x: function(x, value), inner())


def test_cleaner_is_the_attack_with_fewer_bilateral_filters():
    image = Image.fromarray(np.asarray(smooth(21, 17)) // 2 + np.random.default_rng(0).integers(0, 20, (17, 21, 3), np.uint8))
    parameters = attacks.ATTACKS["adverse-cleaner"].parameters
    expected = images.to_pixels(attacks.adverse_cleaner(image, **parameters | {"bilateral_times": 8}))
    found = cleaned(images.to_pixels(image))
    assert (found - expected).abs().max() <= 0.51 / 255
    assert (found - images.to_pixels(image)).abs().mean() > 2 / 255


def test_gradient_of_the_bilateral_filter_is_linear():
    """With the weights that the picture got held fixed, the filter is linear: its matrix is written out here."""
    x = 100 + 40 * torch.rand((3, 6, 5), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gradient_out = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    leaf = x.clone().requires_grad_()
    (found,) = torch.autograd.grad((filters.bilateral(leaf, 5, 8.0, 8.0) * gradient_out).sum(), leaf)
    rows, columns = (np.pad(np.arange(side), 2, mode="reflect") for side in (6, 5))
    expected = torch.zeros_like(x)
    for i in range(6):
        for j in range(5):
            places = [(rows[i + 2 + dy], columns[j + 2 + dx], dy * dy + dx * dx) for dy in range(-2, 3) for dx in range(-2, 3)
                      if dy * dy + dx * dx <= 4]
            weights = torch.stack([torch.exp(-(x[:, a, b] - x[:, i, j]).abs().sum() ** 2 / 128 - torch.tensor(near / 128))
                                   for a, b, near in places])
            for (a, b, _), weight in zip(places, weights / weights.sum(), strict=True):
                expected[:, a, b] += weight * gradient_out[:, i, j]
    torch.testing.assert_close(found, expected)


def test_gradient_of_the_guided_filter_is_a_difference():
    """By its input, and by its guide, through which most of a perturbation survives the cleaner."""
    x = 100 + 40 * torch.rand((3, 9, 8), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    check_gradient(lambda values: filters.Guide(x, 2, 16.0).filter(values), x / 2)
    check_gradient(lambda guide: filters.Guide(guide, 2, 16.0).filter(x / 2), x.clone())


def test_gradient_of_the_cleaner_goes_through_the_guide():
    """Without bilateral filters all of it is smooth."""
    x = inner() * 0.1 + 0.4
    check_gradient(lambda x: cleaned(x, bilateral_times=0), x)


@pytest.mark.parametrize("size", [(1, 1), (2, 9), (200, 3)])
def test_every_purifier_takes_every_size_and_keeps_grey_grey(size):
    x = images.to_pixels(smooth(*size).convert("L")).requires_grad_()
    for kind in draws.KINDS:
        for value in {kind.low, kind.high} if kind.option else {None}:
            found = draws.Draw(kind, value)(x)
            assert found.shape == x.shape and found.isfinite().all()
            torch.testing.assert_close(found[:, 0], found[:, 2], rtol=0, atol=1e-6)
            (gradient,) = torch.autograd.grad(found.sum(), x)
            assert gradient.isfinite().all() and gradient.any()


# --------------------------------------------------------------------------------------------------------- what is drawn

def test_shares_and_ranges_are_those_of_the_report():
    one = Draws(True, seed=1)
    drawn = [one() for _ in range(4000)]
    stated = draws.stated(True)
    assert stated == {"none": {"share": 0.2}, "jpeg": {"share": 0.4, "quality": [50, 95]},
                      "resize": {"share": 0.2, "factor": [0.5, 0.9]}, "blur": {"share": 0.2, "sigma": [0.5, 1.5]}}
    counts = Counter(draw.kind.name for draw in drawn)
    for name, about in stated.items():
        assert counts[name] / len(drawn) == pytest.approx(about["share"], abs=0.03)
        values = [draw.value for draw in drawn if draw.kind.name == name]
        if len(about) == 1:
            assert set(values) == {None}
            continue
        (_, (low, high)), span = list(about.items())[1], about[[*about][1]][1] - about[[*about][1]][0]
        assert low <= min(values) < low + 0.05 * span and high - 0.05 * span < max(values) <= high
        assert np.mean(values) == pytest.approx((low + high) / 2, abs=0.05 * span)
    assert all(isinstance(draw.value, int) for draw in drawn if draw.kind.name == "jpeg")


def test_draws_depend_on_the_seed_alone():
    rows = []
    for seed in (3, 3, 4):
        torch.rand(1, generator=torch.Generator().manual_seed(0))
        one = Draws("cleaner", seed)
        rows.append([str(one()) for _ in range(50)])
    assert rows[0] == rows[1] != rows[2] and "cleaner" in rows[0] and any(name.startswith("jpeg ") for name in rows[0])


@pytest.mark.parametrize("robust", ["jpeg", 3, "yes"])
def test_unknown_sets_of_purifiers_are_one_sentence(robust):
    with pytest.raises(ValueError, match=f"^robust {robust!r}: give True, or \"cleaner\" for AdverseCleaner"):
        kinds(robust)
