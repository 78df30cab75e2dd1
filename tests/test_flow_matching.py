"""FLUX's noise levels against diffusers' scheduler, called as the published pipelines call it.

The flow of Stable Diffusion 3, which shares scheduler and steps, is compared in test_schedulers.py.
"""

import json

import numpy as np
import pytest
import torch

from sifm_min.models import flow_matching
from sifm_min.models.flow_matching import FLOW, empirical_mu, even_sigmas
from sifm_min.models.schedulers import load

diffusers = pytest.importorskip("diffusers", reason="the oracle, diffusers, is not installed")
kontext = pytest.importorskip("diffusers.pipelines.flux.pipeline_flux_kontext", reason="this diffusers has no Kontext")
klein = pytest.importorskip("diffusers.pipelines.flux2.pipeline_flux2_klein", reason="this diffusers has no FLUX.2")

FLUX = {"shift": 3.0, "use_dynamic_shifting": True}
FILES = {
    "FLUX": FLUX,
    "other shifts": FLUX | {"base_shift": 0.3, "max_shift": 2.5, "base_image_seq_len": 64, "max_image_seq_len": 1024},
    "falling shifts": FLUX | {"base_shift": 1.0, "max_shift": -0.4},
    "linear": FLUX | {"time_shift_type": "linear"},
    "short training": FLUX | {"num_train_timesteps": 120},
    "schnell, a constant shift": {"shift": 1.0},
    "a constant shift of 3": {"shift": 3.0},
}
TOKENS = (256, 1024, 1536, 4096, 4300, 4301, 16384)
STEPS = (1, 2, 3, 4, 10, 28, 30, 50, 117, 200)


def pair(name: str) -> tuple:
    """Their scheduler, and ours from the file that theirs writes."""
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(**FILES[name])
    return load(theirs.to_json_string()), theirs


def flux1(theirs, steps: int, tokens: int) -> None:
    """Set their timesteps as FluxKontextPipeline does."""
    config = theirs.config
    mu = kontext.calculate_shift(tokens, config.base_image_seq_len, config.max_image_seq_len, config.base_shift,
                                 config.max_shift)
    kontext.retrieve_timesteps(theirs, steps, "cpu", sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)


def flux2(theirs, steps: int, tokens: int) -> None:
    """Set their timesteps as Flux2KleinPipeline does."""
    mu = klein.compute_empirical_mu(image_seq_len=tokens, num_steps=steps)
    klein.retrieve_timesteps(theirs, steps, "cpu", sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)


def mine(ours, steps: int, tokens: int, family):
    return ours.plan_over(even_sigmas(steps), mu=ours.mu(tokens) if family is flux1 else empirical_mu(tokens, steps))


def assert_same_levels(ours, theirs, steps, tokens, family):
    plan = mine(ours, steps, tokens, family)
    family(theirs, steps, tokens)
    assert torch.equal(plan.timesteps, theirs.timesteps) and plan.timesteps.dtype == theirs.timesteps.dtype
    assert torch.equal(plan.sigmas, theirs.sigmas)
    return plan


@pytest.mark.parametrize("family", [flux1, flux2])
@pytest.mark.parametrize("name", FILES)
def test_same_noise_levels_as_the_pipelines(name, family):
    ours, theirs = pair(name)
    assert (ours.note, ours.config.sampler) == ("", FLOW)
    for tokens in TOKENS:
        for steps in STEPS:
            assert_same_levels(ours, theirs, steps, tokens, family)


def test_same_noise_levels_for_every_number_of_steps():
    ours, theirs = pair("FLUX")
    for steps in range(1, 301):
        assert_same_levels(ours, theirs, steps, 4 * steps, flux1)


@pytest.mark.parametrize("family", [flux1, flux2])
def test_same_steps_as_the_pipelines(family):
    """A whole edit, from the same noise; the velocity is a function of latent and timestep that has no symmetry."""
    ours, theirs = pair("FLUX")
    plan = assert_same_levels(ours, theirs, 7, 1024, family)
    latent = expected = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0))
    for i, timestep in enumerate(theirs.timesteps):
        velocity = torch.tanh(1.5 * expected.roll(1, -1) + torch.cos(timestep / 100)) + 0.3 * expected
        latent = plan.step(velocity, i, plan.scale_input(latent, i))
        expected = theirs.step(velocity, timestep, expected).prev_sample
        assert torch.equal(latent, expected)


def test_published_noise_levels():
    """Kontext in 28 steps at two sizes, and klein in 4, computed elsewhere."""
    ours = pair("FLUX")[0]
    assert (ours.mu(4096), ours.mu(1024)) == (pytest.approx(1.15), pytest.approx(0.63))
    assert empirical_mu(4096, 4) == pytest.approx(2.29, abs=0.005)
    levels = mine(ours, 28, 4096, flux1).sigmas.tolist()
    assert levels[:4] == pytest.approx([1, 0.9884, 0.9762, 0.9634], abs=5e-5)
    assert levels[-4:] == pytest.approx([0.2748, 0.1955, 0.1047, 0], abs=5e-5)
    levels = mine(ours, 28, 1024, flux1).sigmas.tolist()
    assert (levels[1], levels[2], levels[-2]) == pytest.approx((0.9807, 0.9606, 0.0650), abs=5e-5)
    assert mine(ours, 4, 4096, flux2).sigmas.tolist() == pytest.approx([1, 0.967, 0.908, 0.767, 0], abs=5e-4)


def test_published_file_is_read(shared):
    text = (shared / "data" / "checkpoints" / "flux_scheduler.config.json").read_text()
    assert load(text).config == pair("FLUX")[0].config


@pytest.mark.parametrize("key", ["base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len", "time_shift_type",
                                 "use_dynamic_shifting", "num_train_timesteps"])
def test_the_comparison_sees_a_key_read_wrongly(key):
    wrong = {"base_shift": 0.51, "max_shift": 1.16, "base_image_seq_len": 255, "max_image_seq_len": 4095,
             "time_shift_type": "linear", "use_dynamic_shifting": False, "num_train_timesteps": 999}[key]
    theirs = pair("FLUX")[1]
    stored = json.loads(theirs.to_json_string())
    with pytest.raises(AssertionError):
        assert_same_levels(load(json.dumps(stored | {key: wrong})), theirs, 10, 1024, flux1)


@pytest.mark.parametrize(("name", "fault", "family"), [
    ("even_sigmas", lambda steps: [1 - 0.999 * i / (steps - 1) for i in range(steps)], flux1),
    ("empirical_mu", lambda tokens, steps: 0.00016927 * tokens + 0.45666666, flux2),
], ids=["levels down to that of timestep 1", "200 steps' line"])
def test_the_comparison_sees_a_fault(name, fault, family, monkeypatch):
    ours, theirs = pair("FLUX")
    for tokens, steps in ((1024, 25), (1024, 28)):
        assert_same_levels(ours, theirs, steps, tokens, family)
    monkeypatch.setitem(globals(), name, fault)
    with pytest.raises(AssertionError):
        for tokens, steps in ((1024, 25), (1024, 28)):
            assert_same_levels(ours, theirs, steps, tokens, family)


def test_a_constant_shift_takes_no_mu():
    ours = pair("a constant shift of 3")[0]
    assert torch.equal(ours.plan_over([1, 0.5]).sigmas, ours.plan_over([1, 0.5], mu=2).sigmas)
    assert ours.plan_over([1, 0.5]).sigmas.tolist() == [1, 0.75, 0]


@pytest.mark.parametrize(("call", "sentence"), [
    (lambda flow: flow.plan(10), "sets use_dynamic_shifting, and the noise levels then depend on the size of the picture"),
    (lambda flow: flow.plan_over([1, 0.5]), "sets use_dynamic_shifting, so the plan needs a mu$"),
    (lambda flow: flow.plan_over([], mu=1), r"noise levels \[\]: they must fall from at most 1 to above 0$"),
    (lambda flow: flow.plan_over([0.5, 0.5], mu=1), "noise levels .* must fall"),
    (lambda flow: flow.plan_over([1.1, 0.5], mu=1), "noise levels .* must fall"),
    (lambda flow: flow.plan_over([0.5, 0], mu=1), "noise levels .* must fall"),
    (lambda flow: flow.plan_over([1, float("nan")], mu=1), "noise levels .* must fall"),
    (lambda flow: flow.plan_over([1, 0.5], mu=81), "mu 81: between -80 and 80 under time_shift_type exponential"),
    (lambda flow: flow.plan_over([1, 0.5], mu=float("nan")), "mu nan: between -80 and 80"),
    (lambda flow: pair("linear")[0].plan_over([1, 0.5], mu=0), "mu 0: above 0 under time_shift_type linear"),
    (lambda flow: even_sigmas(0), "0 denoising steps: at least one is needed"),
])
def test_impossible_plans_are_refused(call, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        call(pair("FLUX")[0])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("change", "sentence"), [
    ({"time_shift_type": "cubic"}, "sets time_shift_type to 'cubic'; implemented are exponential and linear"),
    ({"base_shift": None}, "sets use_dynamic_shifting, which needs numbers as base_shift and max_shift"),
    ({"max_shift": 50}, "sets max_shift to 50, not to a number from -20 to 20"),
    ({"base_image_seq_len": 4096}, "sets base_image_seq_len and max_image_seq_len to 4096; they must differ"),
    ({"max_image_seq_len": 0}, "sets max_image_seq_len to 0, not to a whole number from 1"),
    ({"use_dynamic_shifting": "yes"}, "sets use_dynamic_shifting to 'yes', not to true or false"),
])
def test_a_file_of_flux_that_is_damaged_is_refused(change, sentence):
    with pytest.raises(ValueError, match=f"^scheduler_config.json {sentence}"):
        load(json.dumps({"_class_name": FLOW} | FLUX | change))


def test_gradients_flow_through_a_plan():
    plan = pair("FLUX")[0].plan_over(even_sigmas(3), mu=1.0)
    inputs = [part.requires_grad_() for part in torch.randn(2, 1, 2, 2, dtype=torch.float64).unbind()]
    assert torch.autograd.gradcheck(lambda z, v: plan.step(v, 1, z), inputs)
    assert flow_matching.FlowPlan is type(plan)
