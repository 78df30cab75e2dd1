"""The loop: closed forms, invariants, and what it refuses."""

import math

import numpy as np
import pytest
import torch
from attacked_editors import seeded

from sifm_min.pgd import pgd


def picture(channels=3, height=6, width=7, seed=0):
    """Random pixels with some at either end of the range, where the range is tighter than the budget."""
    pixels = torch.rand(1, channels, height, width, generator=seeded(seed))
    pixels[..., :2, :] = 0
    pixels[..., -2:, :] = 1
    return pixels


def linear(weight):
    return lambda x, step: (weight * x).sum()


def test_a_linear_loss_ends_in_the_corner_of_the_box():
    pixels, weight = picture(), torch.randn(1, 3, 6, 7, generator=seeded(1))
    delta = pgd(pixels, linear(weight), 0.1, steps=25, step_size=0.01, generator=seeded())
    corner = (pixels - 0.1 * weight.sign()).clamp(0, 1) - pixels
    torch.testing.assert_close(delta, corner, rtol=0, atol=1e-7)


def test_the_steps_are_those_of_a_plain_loop():
    pixels, target = picture(), torch.rand(1, 3, 6, 7, generator=seeded(2))
    seen = []

    def objective(x, step):
        seen.append(x.detach().clone())
        return (x - target).pow(4).sum()

    delta = pgd(pixels, objective, 0.06, steps=5, step_size=0.02, init="zero")
    x = pixels.clone()
    for step in range(5):
        torch.testing.assert_close(seen[step], x, rtol=0, atol=1e-6)
        x = x - 0.02 * (x - target).sign()
        x = torch.min(torch.max(x, pixels - 0.06), pixels + 0.06).clamp(0, 1)
    torch.testing.assert_close(pixels + delta, x, rtol=0, atol=1e-6)


@pytest.mark.parametrize("schedule, steps, travelled", [
    ("constant", 4, 4 * 0.001), ("linear", 4, 0.001 * (1 + 0.67 + 0.34 + 0.01)), ("linear", 1, 0.001)])
def test_schedules(schedule, steps, travelled):
    pixels = torch.full((1, 1, 2, 2), 0.5)
    delta = pgd(pixels, linear(1.0), 0.5, steps=steps, step_size=0.001, schedule=schedule, init="zero")
    torch.testing.assert_close(delta, torch.full_like(delta, -travelled), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("seed", range(12))
def test_budget_range_and_mask_hold_for_any_loss(seed):
    generator = seeded(seed)
    eps = [0.03, 8 / 255, 0.5, 1.0][seed % 4]
    pixels = picture(channels=1 + 2 * (seed % 2), seed=seed)
    weight = torch.randn(pixels.shape, generator=generator)
    mask = (torch.rand(1, 1, 6, 7, generator=generator) > 0.5).float() if seed % 3 else None

    def objective(x, step):
        assert x.min() >= 0 and x.max() <= 1
        assert (x - pixels).abs().max() <= eps + 1e-6
        return (weight * x.square()).sin().sum()

    kept = pixels.clone()
    delta = pgd(pixels, objective, eps, steps=7, step_size=eps / 2, mask=mask, generator=generator,
                schedule="linear" if seed % 2 else "constant", init="random" if seed % 5 else "zero")
    assert torch.equal(pixels, kept)
    assert delta.shape == pixels.shape and delta.dtype == pixels.dtype and not delta.requires_grad
    assert delta.abs().max() <= torch.tensor(eps)
    assert (pixels + delta).min() >= 0 and (pixels + delta).max() <= 1
    if mask is not None:
        assert not (delta * (1 - mask)).any()
        assert delta.any()


def test_the_loss_goes_down():
    pixels, weight = picture(), torch.randn(1, 3, 6, 7, generator=seeded(1))
    losses = []
    pgd(pixels, lambda x, step: ((x * weight).sum(), {"step": step}), 0.1, steps=10, step_size=0.01,
        generator=seeded(), on_step=lambda step, loss, terms: losses.append((step, loss, terms)))
    assert [step for step, _, _ in losses] == list(range(10))
    assert [terms for _, _, terms in losses] == [{"step": step} for step in range(10)]
    assert all(type(loss) is float for _, loss, _ in losses)
    assert losses[-1][1] < losses[0][1]


# -- the random start --------------------------------------------------------------------------------------------------

def start(pixels, eps, generator, **options):
    seen = []

    def objective(x, step):
        seen.append(x.detach().clone())
        return x.sum()

    pgd(pixels, objective, eps, steps=1, step_size=1e-3, generator=generator, **options)
    return seen[0] - pixels


def test_the_random_start_is_uniform_in_the_budget():
    pixels = torch.full((1, 3, 100, 100), 0.5)
    delta = start(pixels, 0.1, seeded())
    assert delta.min() == pytest.approx(-0.1, abs=1e-3) and delta.max() == pytest.approx(0.1, abs=1e-3)
    assert delta.mean().item() == pytest.approx(0, abs=2e-3)
    assert delta.std().item() == pytest.approx(0.2 / math.sqrt(12), abs=1e-3)


def test_the_random_start_comes_from_the_generator_alone():
    pixels = picture()
    before = torch.random.get_rng_state()
    one, same, other = start(pixels, 0.1, seeded(3)), start(pixels, 0.1, seeded(3)), start(pixels, 0.1, seeded(4))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(one, same) and not torch.equal(one, other)
    with pytest.raises(ValueError, match="generator"):
        start(pixels, 0.1, None)


def test_the_random_start_is_cut_to_range_and_mask():
    mask = torch.zeros(1, 1, 6, 7)
    mask[..., 3:] = 1
    delta = start(picture(), 0.1, seeded(), mask=mask)
    assert not delta[..., :3].any() and delta[..., 3:].any()
    assert (picture() + delta).min() >= 0 and (picture() + delta).max() <= 1


def test_no_steps_give_the_start_itself():
    pixels = picture()
    delta = pgd(pixels, lambda x, step: pytest.fail("the objective ran"), 0.1, steps=0, step_size=1, generator=seeded(3))
    torch.testing.assert_close(pixels + delta, pixels + start(pixels, 0.1, seeded(3)), rtol=0, atol=0)


def test_the_zero_start_is_zero():
    assert not start(picture(), 0.1, None, init="zero").any()


# -- objectives that compute their own gradient ------------------------------------------------------------------------

def test_a_given_gradient_is_followed():
    pixels = torch.full((1, 3, 4, 5), 0.5)
    direction = torch.randn(pixels.shape, generator=seeded())
    losses = []

    def objective(x, step):
        return torch.tensor(7.0) + ((x - x.detach()) * direction).sum()

    delta = pgd(pixels, objective, 0.1, steps=3, step_size=0.01, init="zero",
                on_step=lambda step, loss, terms: losses.append(loss))
    torch.testing.assert_close(delta, -0.03 * direction.sign(), rtol=1e-5, atol=1e-8)
    assert losses == [7.0] * 3


def test_a_grey_picture_stays_grey():
    pixels, weight = picture(channels=1), torch.randn(1, 3, 6, 7, generator=seeded())
    delta = pgd(pixels, lambda x, step: (weight * x.expand(-1, 3, -1, -1)).sum(), 0.05, steps=20, step_size=0.01,
                generator=seeded())
    corner = (pixels - 0.05 * weight.sum(1, keepdim=True).sign()).clamp(0, 1) - pixels
    torch.testing.assert_close(delta, corner, rtol=0, atol=1e-7)


# -- refusals ----------------------------------------------------------------------------------------------------------

def perturbed(pixels=None, objective=None, **changes):
    arguments = {"eps": 0.1, "steps": 2, "step_size": 0.01, "generator": seeded(), **changes}
    return pgd(picture() if pixels is None else pixels, objective or linear(1.0), arguments.pop("eps"), **arguments)


def test_a_zero_gradient_at_the_first_step_is_an_error():
    pixels = picture()
    with pytest.raises(ValueError, match="no gradient at this picture"):
        perturbed(pixels, lambda x, step: (x - pixels).square().sum(), init="zero")
    perturbed(pixels, lambda x, step: (x - pixels).square().sum(), init="random")
    perturbed(pixels, lambda x, step: (x.sum() if step == 0 else x.sum() * 0))       # later it means only "arrived"


def test_a_gradient_that_the_mask_hides_is_zero():
    mask = torch.zeros(1, 1, 6, 7)
    mask[..., 0] = 1
    with pytest.raises(ValueError, match="no gradient at this picture"):
        perturbed(objective=lambda x, step: x[..., 1:].sum(), mask=mask)


@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_an_error(at, value):
    with pytest.raises(ValueError, match=f"step {at}: the gradient is not finite"):
        perturbed(objective=lambda x, step: (x * (value if step == at else 1)).sum())


@pytest.mark.parametrize("changes, says", [
    ({"eps": 0}, "eps 0: the budget"), ({"eps": 300}, "eps 300: the budget"), ({"eps": math.nan}, "the budget"),
    ({"steps": -1}, "negative"), ({"step_size": 0}, "positive"), ({"step_size": math.nan}, "positive"),
    ({"step_size": math.inf}, "positive"),
    ({"schedule": "cosine"}, "schedule 'cosine': choose one of constant, linear"),
    ({"init": "ones"}, "init 'ones': choose one of random, zero"),
    ({"mask": torch.ones(6, 7)}, "does not fit"), ({"mask": torch.ones(1, 3, 6, 7)}, "does not fit"),
    ({"mask": torch.zeros(1, 1, 6, 7)}, "zeros and ones"), ({"mask": torch.full((1, 1, 6, 7), 0.5)}, "zeros and ones"),
    ({"rms": 0}, "rms 0: it is a share"), ({"rms": -0.5}, "rms -0.5"), ({"rms": math.nan}, "rms nan"),
    ({"rms": math.inf}, "rms inf"),
    ({"pixels": picture() * 255}, "in \\[0,1\\]"), ({"pixels": picture() * 2 - 1}, "in \\[0,1\\]"),
    ({"pixels": picture()[0]}, "in \\[0,1\\]"), ({"pixels": picture() * math.nan}, "in \\[0,1\\]"),
])
def test_wrong_arguments_are_refused_before_anything_runs(changes, says):
    with pytest.raises(ValueError, match=says):
        perturbed(objective=lambda x, step: pytest.fail("the objective ran"), **changes)


# -- each value's own budget -------------------------------------------------------------------------------------------

def test_each_value_ends_in_the_corner_of_its_own_box():
    pixels, weight = picture(), torch.randn(1, 3, 6, 7, generator=seeded(1))
    eps = torch.rand(1, 3, 6, 7, generator=seeded(2)) * 0.1
    eps[..., 3] = 0
    delta = pgd(pixels, linear(weight), eps, steps=25, step_size=0.1 * eps, generator=seeded())
    torch.testing.assert_close(delta, (pixels - eps * weight.sign()).clamp(0, 1) - pixels, rtol=0, atol=1e-7)
    assert not delta[..., 3].any() and (delta.abs() <= eps).all()


def test_steps_are_each_values_own():
    pixels, step_size = torch.full((1, 3, 2, 2), 0.5), torch.tensor([[0.01, 0.0], [0.02, 0.001]])
    delta = pgd(pixels, linear(1.0), torch.full((1, 1, 2, 2), 0.1), steps=3, step_size=step_size, init="zero")
    torch.testing.assert_close(delta, -3 * step_size.expand(1, 3, 2, 2), rtol=1e-5, atol=1e-8)


def test_a_random_start_is_uniform_in_each_values_budget():
    pixels, eps = torch.full((1, 3, 100, 100), 0.5), torch.full((1, 1, 100, 100), 0.1)
    eps[..., :50] = 0.02
    delta = start(pixels, eps, seeded())
    for part, most in ((delta[..., :50], 0.02), (delta[..., 50:], 0.1)):
        assert part.abs().max() == pytest.approx(most, abs=1e-3) and part.std().item() == pytest.approx(
            2 * most / math.sqrt(12), rel=0.02)


def test_a_budget_everywhere_is_the_number():
    pixels, weight = picture(), torch.randn(1, 3, 6, 7, generator=seeded(1))
    one, other = (pgd(pixels, linear(weight), eps, steps=2, step_size=0.01, generator=seeded())
                  for eps in (0.1, torch.full((1, 1, 6, 7), 0.1)))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-7)


@pytest.mark.parametrize("changes, says", [
    ({"eps": torch.zeros(1, 3, 6, 7)}, "eps 0: the budget"), ({"eps": torch.full((1, 1, 6, 7), -0.1)}, "the budget"),
    ({"eps": torch.full((1, 1, 6, 7), math.nan)}, "the budget"), ({"eps": torch.ones(1, 3, 7, 6)}, "eps's shape"),
    ({"eps": torch.ones(2, 3, 6, 7)}, "eps's shape"), ({"step_size": torch.zeros(6, 7)}, "positive"),
    ({"step_size": torch.ones(5)}, "step_size's shape"),
])
def test_wrong_budgets_of_values_are_refused(changes, says):
    with pytest.raises(ValueError, match=says):
        perturbed(objective=lambda x, step: pytest.fail("the objective ran"), **changes)


# -- a bound of the root mean square -----------------------------------------------------------------------------------

def boxes():
    """(mid-grey pixels, each value's own eps with zeros in one column, a mask without one row, where values may change)."""
    eps = 0.02 + torch.rand(1, 3, 6, 7, generator=seeded(2)) * 0.08
    eps[..., 3] = 0
    mask = torch.ones(1, 1, 6, 7)
    mask[..., 4, :] = 0
    return torch.full((1, 3, 6, 7), 0.5), eps, mask, ((eps > 0) & (mask > 0)).numpy()


def along(weight, eps, free):
    """The direction of a step by hand, in double precision: weight times eps over its root mean square, over `free`."""
    values = np.where(free, weight.double().numpy() * eps.double().numpy(), 0)
    return values / np.sqrt((values[free] ** 2).mean())


@pytest.mark.parametrize("scale", [1, 1e-25, 1e25])
def test_rms_steps_go_along_the_gradient(scale):
    pixels, eps, mask, free = boxes()
    weight = (0.5 + torch.rand(1, 3, 6, 7, generator=seeded(1))) * torch.randn(1, 3, 6, 7, generator=seeded(3)).sign()
    one, many = (pgd(pixels, linear(weight * scale), eps, steps=steps, step_size=0.1 * eps, init="zero", mask=mask, rms=0.25)
                 for steps in (1, 9))
    direction = along(weight, eps, free)
    np.testing.assert_allclose(one.numpy(), -0.1 * eps.numpy() * direction, rtol=1e-4, atol=1e-9)
    np.testing.assert_allclose(many.numpy(), -0.25 * eps.numpy() * direction, rtol=1e-4, atol=1e-9)
    assert np.abs(0.25 * direction).max() < 1                # so that no box ends before


@pytest.mark.parametrize("seed", range(6))
def test_rms_budget_range_and_mask_hold_at_every_step(seed):
    _, eps, mask, free = boxes()
    pixels, rms = picture(seed=seed), (0.1, 0.6, 5.0)[seed % 3]
    weight, seen = 10.0 ** torch.randn(1, 3, 6, 7, generator=seeded(seed)), []

    def objective(x, step):
        seen.append(x.detach() - pixels)
        return (weight * x).sin().sum()

    seen.append(pgd(pixels, objective, eps, steps=7, step_size=0.3 * eps, mask=mask, rms=rms, generator=seeded(seed)))
    for delta in seen[1:]:
        assert (delta.abs() <= eps * mask + 1e-7).all() and (pixels + delta).min() >= 0 and (pixels + delta).max() <= 1
        assert np.sqrt(((delta / eps).numpy()[free] ** 2).mean()) <= rms + 1e-5
    assert (seen[-1].abs() <= eps).all() and seen[-1].any()
    if rms == 5:                                             # beyond every box: only the boxes bound, and some values end there
        assert ((seen[-1] / eps).abs().numpy()[free] > 0.999).any()


def test_rms_leaves_what_the_loss_hardly_sees():
    pixels, weight = torch.full((1, 1, 8, 8), 0.5), torch.ones(1, 1, 8, 8)
    weight[..., 4:] = 0.01
    by_sign, along = (pgd(pixels, linear(weight), 0.1, steps=20, step_size=0.02, generator=seeded(), rms=rms).abs()
                      for rms in (None, 0.6))
    assert by_sign.min() > 0.099
    assert along[..., :4].min() > 0.08 and along[..., 4:].max() < 0.01


def test_rms_keeps_a_place_where_the_gradient_vanished():
    pixels = picture()
    kept = [pgd(pixels, lambda x, step, last=last: x.sum() * (step < last), 0.1, steps=steps, step_size=0.01, rms=0.3,
                init="zero") for steps, last in ((2, 2), (5, 2))]
    assert torch.equal(*kept)
