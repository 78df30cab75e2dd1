"""The model of just-noticeable changes: its formula by hand, the budget it gives, and the number for two pictures."""

import math

import numpy as np
import pytest
import torch

from sifm_min import images, metrics
from sifm_min.metrics import just_noticeable, perturbation


def texture(contrast, size=24, channels=3, mean=0.5, seed=0):
    """Noise of this standard deviation around a mean, alike in all channels."""
    noise = torch.randn(1, 1, size, size, generator=torch.Generator().manual_seed(seed))
    return (mean + contrast * noise).clamp(0, 1).expand(1, channels, size, size)


def by_hand(plane):
    """The threshold of the luma of a grey picture (H,W), pixel by pixel in double precision."""
    height, width = plane.shape

    def window(y, x):
        y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)          # beyond the border: the window at the border
        return plane[max(y - 2, 0):y + 3, max(x - 2, 0):x + 3]

    def of_window(values):
        light = 255 * values.mean()
        chou_li = 17 * (1 - math.sqrt(light / 127)) + 3 if light <= 127 else 3 / 128 * (light - 127) + 3
        smooth = just_noticeable.BASE * min(chou_li / 3, just_noticeable.BRIGHTEST)
        masked = just_noticeable.SLOPE * values.std()
        return smooth + masked - 0.3 * min(smooth, masked)

    found = np.empty_like(plane)
    for y in range(height):
        for x in range(width):
            found[y, x] = min(of_window(window(y + i, x + j)) for i in (-2, 0, 2) for j in (-2, 0, 2))
    return found


def test_thresholds_are_those_of_the_formula():
    plane = np.random.default_rng(0).random((9, 11)) * np.linspace(0.05, 1, 11)
    found = metrics.thresholds(torch.tensor(plane)[None, None])
    np.testing.assert_allclose(found[0, 0].numpy(), by_hand(plane), rtol=1e-6)


def test_channels_together_reach_the_threshold_of_the_luma():
    grey = texture(0.1)
    red, green, blue = metrics.thresholds(grey)[0]
    assert (green < red).all() and (red < blue).all()
    torch.testing.assert_close(0.299 * red + 0.587 * green + 0.114 * blue, metrics.thresholds(grey[:, :1])[0, 0])


def test_smooth_area_beside_an_edge_has_no_more_than_alone():
    edge = torch.full((1, 1, 20, 20), 0.5)
    edge[..., 10:] = 0.9
    steps = 255 * metrics.texture_budget(edge, 7 / 255)
    assert steps[..., :10].max() <= 255 * metrics.texture_budget(edge[..., :10], 7 / 255).max() + 1e-3
    assert 255 * metrics.texture_budget(texture(0.2, channels=1), 7 / 255).min() > steps.max() + 2


def test_budget_grows_with_the_contrast():
    means = [metrics.texture_budget(texture(contrast), 0.03).mean().item() for contrast in (0, 0.01, 0.02, 0.04, 0.08)]
    assert means == sorted(means) and means[-1] > 2 * means[0]


def test_mid_grey_shows_most():
    dark, grey, light = (metrics.thresholds(torch.full((1, 1, 6, 6), mean)).mean() for mean in (0.02, 0.5, 1))
    assert dark > grey < light
    assert dark <= just_noticeable.BRIGHTEST * just_noticeable.BASE + 2e-4      # float32 leaves a little contrast


@pytest.mark.parametrize("eps", [1 / 255, 0.03, 8 / 255, 0.1, 1.0])
@pytest.mark.parametrize("channels", [1, 3])
def test_budget_is_whole_steps_from_one_to_eps(eps, channels):
    noise = torch.rand(1, channels, 17, 13, generator=torch.Generator().manual_seed(0)) - 0.5
    pixels = 0.5 + noise * torch.linspace(0, 0.4, 13)
    found = metrics.texture_budget(pixels, eps)
    steps = images.budget(found)
    assert found.shape == pixels.shape and steps.shape == (17, 13, channels)
    assert steps.min() >= 1 and steps.max() <= images.budget(eps) and found.max() <= eps + 1e-7
    np.testing.assert_allclose(255 * found[0].permute(1, 2, 0).numpy(), steps, atol=1e-4)
    if eps in (0.03, 8 / 255):
        assert len(np.unique(steps)) > 2


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (2, 3), (4, 40)])
@pytest.mark.parametrize("mean", [0.0, 0.5, 1.0])
def test_flat_pictures_of_any_size_have_a_budget(size, mean):
    steps = 255 * metrics.texture_budget(torch.full((1, 3, *size), mean), 0.03)
    assert steps.shape == (1, 3, *size) and 1 <= steps.min().round() <= steps.max() < 4
    torch.testing.assert_close(steps.amin((2, 3)), steps.amax((2, 3)))


@pytest.mark.parametrize("turn", [lambda x: x.flip(2), lambda x: x.flip(3), lambda x: x.transpose(2, 3)])
def test_thresholds_turn_with_the_picture(turn):
    pixels = torch.rand(1, 3, 12, 15, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(metrics.thresholds(turn(pixels)), turn(metrics.thresholds(pixels)))


def test_visibility_counts_thresholds():
    ref = texture(0.03, mean=0.4).double()
    threshold = metrics.thresholds(ref)
    assert metrics.visibility(ref, ref).tolist() == [0]
    assert metrics.visibility(ref + 2 * threshold, ref).item() == pytest.approx(2, rel=1e-6)
    few = ref.clone()
    few[..., 0, :] += 4 * threshold[..., 0, :]               # one row of 24: fewer values than one in twenty
    assert metrics.visibility(few, ref).item() == 0
    both = torch.cat([ref + threshold, ref])
    assert metrics.visibility(both, torch.cat([ref, ref])).tolist() == pytest.approx([1, 0], rel=1e-6)


def test_same_change_shows_more_where_it_is_smooth():
    signs = texture(1, mean=0.5, seed=1) > 0.5
    shown = [metrics.visibility(picture + (2 * signs - 1) * 5 / 255, picture).item()
             for picture in (texture(0, mean=0.5), texture(0.02, mean=0.5), texture(0.08, mean=0.5))]
    assert shown[0] > shown[1] > shown[2] and shown[0] > 2.5


def test_texture_budget_is_barely_visible():
    pixels = torch.cat([texture(0.02), texture(0.06), texture(0.0)], 3)
    change = just_noticeable.RMS * metrics.texture_budget(pixels, 7 / 255)
    assert metrics.visibility((pixels + change).clamp(0, 1), pixels).item() < 1
    assert metrics.visibility((pixels + 7 / 255).clamp(0, 1), pixels).item() > 3


def test_a_budget_of_another_name_is_refused():
    with pytest.raises(ValueError, match="budget 'skin': choose one of uniform, texture"):
        perturbation.local_budget(None, 0.03, "skin")
    assert perturbation.local_budget(None, 0.03) == 0.03


def test_rms_of_a_texture_budget_is_that_of_uniform_noise():
    noise = torch.empty(100_000).uniform_(-1, 1, generator=torch.Generator().manual_seed(0))
    assert perturbation.rms_bound("texture") == pytest.approx(noise.square().mean().sqrt().item(), rel=0.01)
    assert perturbation.rms_bound("uniform") is None         # the paper's loop
