"""The schedulers against diffusers': timesteps, noise levels, and whole trajectories step by step."""

import inspect
import json
from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch

from sifm_min.models import schedulers
from sifm_min.models.schedulers import ANCESTRAL, DDIM, EULER, FLOW, load

diffusers = pytest.importorskip("diffusers", reason="the oracle, diffusers, is not installed")
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")        # thousands of them come from diffusers

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SETTINGS = {
    "defaults": {},
    "stable diffusion": SD,
    "stable diffusion 1.5's other keys": SD | {"steps_offset": 1, "timestep_spacing": "leading"},
    "leading": {"timestep_spacing": "leading", "steps_offset": 3},
    "linspace": {"timestep_spacing": "linspace", "steps_offset": 1},
    "trailing": SD | {"timestep_spacing": "trailing"},
    "velocity": SD | {"prediction_type": "v_prediction"},
    "clean latent": SD | {"prediction_type": "sample"},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "cosine velocity": {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"},
    "zero terminal": SD | {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction",
                           "timestep_spacing": "trailing"},
    "own betas": {"trained_betas": [0.001 + 0.0001 * i for i in range(200)], "num_train_timesteps": 200},
    "short training": SD | {"num_train_timesteps": 100},
}
DDIM_SETTINGS = {
    "no clip": SD | {"clip_sample": False},
    "wide clip": SD | {"clip_sample_range": 3.0},
    "stable diffusion's own": SD | {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1},
    "alpha of timestep 0": {"set_alpha_to_one": False, "timestep_spacing": "trailing"},
}
CASES = [(sampler, name) for sampler in (DDIM, EULER, ANCESTRAL) for name in SETTINGS
         if (sampler, name) != (ANCESTRAL, "clean latent")]                     # diffusers does not implement that one
CASES += [(DDIM, name) for name in DDIM_SETTINGS]


def pair(sampler: str, name: str, folder) -> tuple:
    """Their scheduler, and ours from the file that theirs writes."""
    theirs = getattr(diffusers, sampler)(**(SETTINGS | DDIM_SETTINGS)[name])
    theirs.save_pretrained(folder)
    ours = load((folder / "scheduler_config.json").read_text())
    assert (ours.note, ours.config.sampler) == ("", sampler)
    return ours, theirs


def assert_close(ours, theirs, tolerance=1e-6):
    assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
    assert (ours - theirs).abs().max().item() <= tolerance * max(theirs.abs().max().item(), 1e-3)


def toy(latent, timestep):
    """A stand-in for the network: nonlinear, not shift-invariant, depends on the timestep, of the size of noise."""
    return torch.tanh(latent.roll(1, -1) * 1.5 + torch.cos(timestep / 100)) + 0.3 * latent


def assert_same_trajectory(ours, theirs, steps, tolerance=1e-6):
    """Run one edit of both from the same noise; each step of ours starts from their latent, and the results are compared."""
    plan = ours.plan(steps)
    theirs.set_timesteps(steps)
    assert plan.draws_noise == ours.draws_noise == (ours.config.sampler == ANCESTRAL)
    assert torch.equal(plan.timesteps, theirs.timesteps) and plan.timesteps.dtype == theirs.timesteps.dtype
    assert plan.sigma_start == pytest.approx(float(theirs.init_noise_sigma), rel=1e-6)
    generator, same = torch.Generator().manual_seed(steps), torch.Generator().manual_seed(steps)
    latent = torch.randn(1, 4, 3, 5, generator=generator) * theirs.init_noise_sigma
    mine = torch.randn(1, 4, 3, 5, generator=same) * plan.sigma_start
    for i, timestep in enumerate(theirs.timesteps):
        scaled = theirs.scale_model_input(latent, timestep)
        assert_close(plan.scale_input(latent, i), scaled, tolerance)
        noise_pred = toy(scaled, timestep)
        noise = torch.randn(1, 4, 3, 5, generator=same) if plan.draws_noise else None
        ours_next = plan.step(noise_pred, i, latent, noise)
        mine = plan.step(toy(plan.scale_input(mine, i), plan.timesteps[i]), i, mine, noise)
        latent = theirs.step(noise_pred, timestep, latent, generator=generator).prev_sample
        assert_close(ours_next, latent, tolerance)
    assert torch.equal(generator.get_state(), same.get_state())                 # as many draws, the last step included
    assert_close(mine, latent, 1e-4)                                            # and ours on its own, from end to end
    return plan


@pytest.mark.parametrize(("sampler", "name"), CASES)
def test_same_trajectory_as_diffusers(sampler, name, tmp_path):
    ours, theirs = pair(sampler, name, tmp_path)
    assert_close(ours.alphas_cumprod, theirs.alphas_cumprod)
    for steps in (1, 2, 3, 10, 30):
        assert_same_trajectory(ours, theirs, steps)


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("sampler", [DDIM, EULER, ANCESTRAL])
def test_same_plan_for_every_number_of_steps(sampler, spacing):
    given = SD | {"timestep_spacing": spacing, "steps_offset": 1}
    theirs = getattr(diffusers, sampler)(**given)
    ours = load(theirs.to_json_string())
    for steps in [*range(1, 101), 233, 500, 999]:
        plan = ours.plan(steps)
        theirs.set_timesteps(steps)
        assert torch.equal(plan.timesteps, theirs.timesteps)
        assert plan.sigma_start == pytest.approx(float(theirs.init_noise_sigma), rel=1e-6)
        if sampler != DDIM:
            assert_close(plan.sigmas, theirs.sigmas)


def test_published_noise_levels():
    """InstructPix2Pix's schedule for 20, 30 and 100 steps, computed independently."""
    scheduler = load(json.dumps(SD | {"_class_name": ANCESTRAL}))
    for steps, first, last in [(20, (14.61465, 10.74685, 8.08154), (0.355547, 0.232168, 0.029168, 0)),
                               (30, (14.61465, 11.91756, 9.81418), (0.272184, 0.183457, 0.029168, 0)),
                               (100, (14.61465, 13.75251, 12.95247), (0.138622, 0.098703, 0.029168, 0))]:
        sigmas = scheduler.plan(steps).sigmas.tolist()
        assert sigmas[:3] == pytest.approx(first, abs=1e-5)
        assert sigmas[-4:] == pytest.approx(last, abs=1e-6)
    assert scheduler.plan(100).sigma_start == pytest.approx(14.614647, abs=1e-6)


WRONG = {                                           # a value of another setting, put where the file's own belongs
    "beta_start": 0.00086, "beta_end": 0.0121, "beta_schedule": "linear", "timestep_spacing": "trailing",
    "steps_offset": 1, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "num_train_timesteps": 999,
    "clip_sample": False, "clip_sample_range": 1.01, "set_alpha_to_one": False,
}


@pytest.mark.parametrize(("sampler", "key"), [(sampler, key) for sampler in (DDIM, EULER, ANCESTRAL) for key in WRONG
                                              if sampler == DDIM or key not in schedulers.DDIM_ONLY])
def test_the_comparison_sees_a_key_read_wrongly(sampler, key):
    given = SD | {"timestep_spacing": "leading"}
    theirs = getattr(diffusers, sampler)(**given)
    stored = json.loads(theirs.to_json_string())
    assert_same_trajectory(load(json.dumps(stored)), theirs, 10)
    with pytest.raises(AssertionError):
        assert_same_trajectory(load(json.dumps(stored | {key: WRONG[key]})), theirs, 10)


def faulty_step(self, noise_pred, i, latent, noise=None):                       # sigma_up and sigma_down exchanged
    sigma, following = self.sigmas[i], self.sigmas[i + 1]
    up = (following**2 * (sigma**2 - following**2) / sigma**2) ** 0.5
    down = (following**2 - up**2) ** 0.5
    return latent + noise_pred * (up - sigma) + noise * down


@pytest.mark.parametrize(("sampler", "fault"), [
    (ANCESTRAL, ("EulerPlan", "step", faulty_step)),
    (EULER, ("EulerPlan", "scale_input", lambda self, latent, i: latent / self.sigmas[i])),
    (DDIM, ("DDIMPlan", "scale_input", lambda self, latent, i: latent * 1.001)),
], ids=[ANCESTRAL, EULER, DDIM])
def test_the_comparison_sees_a_wrong_step(sampler, fault, monkeypatch):
    theirs = getattr(diffusers, sampler)(**SD)
    ours = load(theirs.to_json_string())
    assert_same_trajectory(ours, theirs, 5)
    monkeypatch.setattr(getattr(schedulers, fault[0]), *fault[1:])
    with pytest.raises(AssertionError):
        assert_same_trajectory(ours, theirs, 5)


def test_ancestral_with_clean_latents_predicted():
    """Without an oracle: a step from the predicted clean latent equals the step from the noise that belongs to it."""
    noisy, clean = (load(json.dumps(SD | {"_class_name": ANCESTRAL, "prediction_type": kind})).plan(6)
                    for kind in ("epsilon", "sample"))
    latent, noise_pred, noise = torch.randn(3, 2, 4, 4, 4, generator=torch.Generator().manual_seed(0)).double()
    for i in range(6):
        assert_close(clean.step(latent - clean.sigmas[i] * noise_pred, i, latent, noise),
                     noisy.step(noise_pred, i, latent, noise))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sampler", [DDIM, EULER, ANCESTRAL])
def test_half_precision_as_theirs(sampler, dtype):
    theirs = getattr(diffusers, sampler)(**SD)
    plan = load(theirs.to_json_string()).plan(4)
    theirs.set_timesteps(4)
    latent, noise_pred = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    for i, timestep in enumerate(theirs.timesteps):
        assert torch.equal(plan.scale_input(latent, i), theirs.scale_model_input(latent, timestep))
        noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(i), dtype=dtype)
        expected = theirs.step(noise_pred, timestep, latent, generator=torch.Generator().manual_seed(i)).prev_sample
        assert torch.equal(plan.step(noise_pred, i, latent, noise), expected)


# -- the training noise ------------------------------------------------------------------------------------------------

def test_add_noise_is_ddim_s():
    theirs = diffusers.DDIMScheduler(**SD)
    generator = torch.Generator().manual_seed(0)
    latent, noise = torch.randn(2, 5, 4, 3, 3, generator=generator)
    timesteps = torch.tensor([0, 1, 500, 998, 999])
    for sampler in (DDIM, EULER, ANCESTRAL):
        ours = load(json.dumps(SD | {"_class_name": sampler}))
        assert_close(ours.add_noise(latent, noise, timesteps), theirs.add_noise(latent, noise, timesteps))
        assert_close(ours.add_noise(latent, noise, timesteps.float()), theirs.add_noise(latent, noise, timesteps))
        assert_close(ours.add_noise(latent, noise, 37), theirs.add_noise(latent, noise, torch.full((5,), 37)))
        assert torch.equal(ours.alphas_cumprod_at(timesteps), ours.alphas_cumprod[timesteps])


@pytest.mark.parametrize("steps", [3, 20])
def test_add_noise_between_timesteps_is_what_euler_visits(steps):
    """diffusers' Euler adds sigma * noise, and scale_input divides later; our add_noise does both."""
    theirs = diffusers.EulerAncestralDiscreteScheduler(**SD)
    ours = load(theirs.to_json_string())
    theirs.set_timesteps(steps)
    latent, noise = torch.randn(2, 1, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    for timestep in theirs.timesteps:
        theirs._step_index = None
        noisy = theirs.scale_model_input(theirs.add_noise(latent, noise, timestep[None]), timestep)
        assert_close(ours.add_noise(latent, noise, timestep), noisy)


def test_add_noise_at_zero_terminal_snr_is_pure_noise():
    ours = load(json.dumps(SD | {"_class_name": DDIM, "rescale_betas_zero_snr": True}))
    latent, noise = torch.randn(2, 1, 4, 3, 3)
    assert torch.equal(ours.add_noise(latent, noise, 999), noise)
    assert ours.add_noise(latent, noise, 998.5).isfinite().all()


@pytest.mark.parametrize("timestep", [-1, 999.5, 1000, [3, 2000]])
def test_timesteps_outside_training_are_refused(timestep):
    ours = load(json.dumps(SD | {"_class_name": EULER}))
    with pytest.raises(ValueError, match="0 to 999"):
        ours.add_noise(torch.zeros(2, 4, 3, 3), torch.zeros(2, 4, 3, 3), torch.tensor(timestep))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("sampler", [DDIM, EULER, ANCESTRAL])
def test_gradients_flow_through_everything(sampler, kind):
    scheduler = load(json.dumps(SD | {"_class_name": sampler, "prediction_type": kind, "clip_sample": False}))
    plan = scheduler.plan(3)
    latent, noise_pred, noise = torch.randn(3, 1, 2, 2, 2, dtype=torch.float64).unbind()
    inputs = latent.requires_grad_(), noise_pred.requires_grad_()
    assert torch.autograd.gradcheck(lambda z, e: plan.step(e, 1, plan.scale_input(z, 1), noise), inputs)
    assert torch.autograd.gradcheck(lambda z, e: scheduler.add_noise(z, e, 123.4), inputs)


# -- what is read, replaced and refused --------------------------------------------------------------------------------

OTHERS = ["PNDMScheduler", "DPMSolverMultistepScheduler", "DDPMScheduler",
          "UniPCMultistepScheduler", "HeunDiscreteScheduler", "DEISMultistepScheduler", "LCMScheduler"]


@pytest.mark.parametrize("other", OTHERS)
def test_another_class_becomes_euler_ancestral_on_its_betas(other, tmp_path):
    made = getattr(diffusers, other)(prediction_type="v_prediction", **SD)
    made.save_pretrained(tmp_path)
    ours = load((tmp_path / "scheduler_config.json").read_text())
    assert other in ours.note and "Euler ancestral" in ours.note and ours.note.endswith(".") and "\n" not in ours.note
    assert_same_trajectory(ours, diffusers.EulerAncestralDiscreteScheduler.from_config(made.config), 6)


@pytest.mark.parametrize("stored", [DDIM, EULER])
def test_ancestral_replaces_another_stored_class_where_asked(stored):
    theirs = getattr(diffusers, stored)(timestep_spacing="trailing", **SD)
    assert load(theirs.to_json_string()).config.sampler == stored
    ours = load(theirs.to_json_string(), ancestral=True)
    assert stored in ours.note
    assert_same_trajectory(ours, diffusers.EulerAncestralDiscreteScheduler(**SD), 6)


def test_stored_euler_ancestral_is_taken_as_it_is():
    theirs = diffusers.EulerAncestralDiscreteScheduler(timestep_spacing="trailing", **SD)
    ours = load(theirs.to_json_string(), ancestral=True)
    assert ours.note == ""
    assert_same_trajectory(ours, theirs, 6)


def test_no_file_is_stable_diffusion_with_a_note():
    ours = load(None)
    assert ours.note.startswith("No scheduler_config.json")
    assert_same_trajectory(ours, diffusers.EulerAncestralDiscreteScheduler(**SD), 6)


@pytest.mark.parametrize("source", OTHERS)
@pytest.mark.parametrize("sampler", [DDIM, EULER, ANCESTRAL])
def test_a_scheduler_made_from_another_one_is_read(sampler, source, tmp_path):
    """A scheduler made by from_config keeps the other class's keys, and save_pretrained writes them."""
    theirs = getattr(diffusers, sampler).from_config(getattr(diffusers, source)(**SD).config)
    theirs.save_pretrained(tmp_path)
    ours = load((tmp_path / "scheduler_config.json").read_text())
    assert ours.note == ""
    assert_same_trajectory(ours, theirs, 4)


@pytest.mark.parametrize("sampler", [DDIM, EULER, ANCESTRAL])
def test_a_file_that_leaves_keys_out_gets_the_class_s_defaults(sampler):
    """Files of diffusers 0.6 leave keys out; the defaults of the three classes differ."""
    stored = SD | {"_class_name": sampler, "num_train_timesteps": 1000, "trained_betas": None}
    assert_same_trajectory(load(json.dumps(stored)), getattr(diffusers, sampler).from_config(stored), 10)


def test_published_sdxl_file_is_read():
    """An Euler file with keys of three classes, as stable-diffusion-xl-base-1.0 has it."""
    stored = SD | {"_class_name": EULER, "_diffusers_version": "0.19.0.dev0", "clip_sample": False,
                   "interpolation_type": "linear", "num_train_timesteps": 1000, "prediction_type": "epsilon",
                   "sample_max_value": 1.0, "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1,
                   "timestep_spacing": "leading", "trained_betas": None, "use_karras_sigmas": False}
    assert_same_trajectory(load(json.dumps(stored)), diffusers.EulerDiscreteScheduler.from_config(stored), 5)


@pytest.mark.parametrize(("sampler", "change", "named"), [
    (DDIM, {"thresholding": True}, "thresholding"),
    (EULER, {"use_karras_sigmas": True}, "use_karras_sigmas"),
    (EULER, {"use_exponential_sigmas": True}, "use_exponential_sigmas"),
    (EULER, {"use_beta_sigmas": True}, "use_beta_sigmas"),
    (EULER, {"interpolation_type": "log_linear"}, "interpolation_type"),
    (EULER, {"timestep_type": "continuous"}, "timestep_type"),
    (EULER, {"final_sigmas_type": "sigma_min"}, "final_sigmas_type"),
    (ANCESTRAL, {"brownian": 1}, "brownian"),
    (ANCESTRAL, {"beta_schedule": "sigmoid"}, "sigmoid"),
    (ANCESTRAL, {"prediction_type": "flow_prediction"}, "flow_prediction"),
    (DDIM, {"timestep_spacing": "log"}, "timestep_spacing"),
    (DDIM, {"trained_betas": [0.1, 0.2]}, "2 trained_betas"),
    ("FlowMatchHeunDiscreteScheduler", {"shift": 3.0}, "FlowMatchHeunDiscreteScheduler and does not set beta_start"),
    (EULER, SD | {"shift": 3.0}, "sets shift, which EulerDiscreteScheduler"),
    ("UniPCMultistepScheduler", SD | {"use_flow_sigmas": True}, "use_flow_sigmas"),
    ("CogVideoXDDIMScheduler", SD | {"snr_shift_scale": 3.0}, "snr_shift_scale"),
    (None, {}, "no class"),
])
def test_unimplemented_settings_are_refused(sampler, change, named):
    with pytest.raises(ValueError, match=named) as caught:
        load(json.dumps({"_class_name": sampler} | change))
    assert "\n" not in str(caught.value)


WRONG_TYPES = {
    "num_train_timesteps": (None, "1000", 0, 1000.0, 10**9, True, [1000]),
    "beta_start": (None, "0.1", -1, 0, 1.0, float("nan"), [0.1], {}),
    "beta_end": (None, "0.012", 2, float("inf"), True),
    "beta_schedule": (None, 3, ["linear"]),
    "trained_betas": (0.1, "0.1", [None] * 1000, [-0.1] * 1000, {"0": 0.1}),
    "prediction_type": (None, ["epsilon"]),
    "rescale_betas_zero_snr": (None, "no", 1),
    "timestep_spacing": (None, 1),
    "steps_offset": (None, -1, 0.5, "1"),
    "clip_sample": (None, "yes", 0),
    "clip_sample_range": (None, 0, -1.0, "1"),
    "set_alpha_to_one": (None, "true"),
    "_class_name": (["DDIMScheduler"], 3, {}, True),
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in WRONG_TYPES.items() for value in values], ids=str)
def test_values_of_a_wrong_type_are_told(key, value):
    with pytest.raises(ValueError, match=f"^scheduler_config.json sets {key} to ") as caught:
        load(json.dumps(SD | {"_class_name": DDIM, key: value}))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


def test_betas_that_leave_nothing_of_a_picture_are_refused():
    for sampler in (DDIM, EULER, ANCESTRAL):
        with pytest.raises(ValueError, match="nothing of a picture is left at the last training timestep"):
            load(json.dumps({"_class_name": sampler, "beta_start": 0.5, "beta_end": 0.9}))
    with pytest.raises(ValueError, match="rescale_betas_zero_snr and num_train_timesteps to 1"):
        load(json.dumps(SD | {"_class_name": DDIM, "num_train_timesteps": 1, "rescale_betas_zero_snr": True}))


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["squaredcos_cap_v2", "scaled_linear"])
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_euler_ancestral_stays_finite_in_few_steps(schedule, spacing):
    """The oracle's formula in float64, where the number under its root is positive."""
    plan = None
    for steps in range(1, 60):
        plan = load(json.dumps({"_class_name": ANCESTRAL, "beta_schedule": schedule, "timestep_spacing": spacing})).plan(steps)
        generator = torch.Generator().manual_seed(steps)
        latent, prediction, noise = torch.randn(3, 1, 4, 4, 4, generator=generator)
        for i in range(steps):
            before, after = plan.sigmas[i].double(), plan.sigmas[i + 1].double()
            up = (after**2 * (before**2 - after**2) / before**2) ** 0.5
            down = (after**2 - up**2).clamp(min=0) ** 0.5
            expected = latent + prediction * (down - before) + noise * up
            found = plan.step(prediction, i, latent, noise)
            assert found.isfinite().all(), (steps, i)
            assert_close(found.double(), expected.double(), 3e-6)


def test_zero_terminal_snr_with_epsilon_is_a_fault_of_the_plan():
    stored = SD | {"_class_name": DDIM, "rescale_betas_zero_snr": True, "clip_sample": False, "timestep_spacing": "trailing"}
    plan = load(json.dumps(stored)).plan(4)
    assert "timestep 999 is noise alone" in plan.fault and plan.timesteps[0] == 999
    latent, prediction = torch.randn(2, 1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    assert not plan.step(prediction, 0, latent).isfinite().all()                # the fault is no exaggeration
    for change in ({"clip_sample": True}, {"prediction_type": "v_prediction"}, {"prediction_type": "sample"},
                   {"timestep_spacing": "leading"}, {"rescale_betas_zero_snr": False}, {"_class_name": EULER},
                   {"_class_name": ANCESTRAL}):
        plan = load(json.dumps(stored | change)).plan(4)
        assert plan.fault == "" and plan.step(prediction, 0, latent, latent).isfinite().all(), change
    assert load(json.dumps({"_class_name": FLOW})).plan(4).fault == ""


@pytest.mark.parametrize("text", ["", "{", "[]", "null"])
def test_text_that_is_no_json_object_is_refused(text):
    with pytest.raises(ValueError, match="not a JSON object"):
        load(text)


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_impossible_numbers_of_steps_are_refused(steps):
    with pytest.raises(ValueError, match="between 1 and 1000"):
        load(None).plan(steps)


def test_ddim_refuses_to_start_after_the_end_of_training():
    stored = json.dumps(SD | {"_class_name": DDIM, "steps_offset": 1})
    assert load(stored).plan(999).timesteps[0] == 999
    with pytest.raises(ValueError, match="timestep 1000"):
        load(stored).plan(1000)


def test_ancestral_needs_its_noise():
    with pytest.raises(ValueError, match="pass standard normal noise"):
        load(None).plan(3).step(torch.zeros(1, 4, 2, 2), 0, torch.zeros(1, 4, 2, 2), None)


# -- rectified flow ----------------------------------------------------------------------------------------------------

FLOWS = {
    "Stable Diffusion 3": {"shift": 3.0},
    "defaults": {},
    "whole number": {"shift": 6},
    "barely shifted": {"shift": 1.15},
    "shifted the other way": {"shift": 0.5},
    "short training": {"shift": 2.7, "num_train_timesteps": 120},
}


def flow_pair(name: str) -> tuple:
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(**FLOWS[name])
    ours = load(theirs.to_json_string())
    assert (ours.note, ours.config.sampler, ours.draws_noise) == ("", FLOW, False)
    return ours, theirs


def restart(theirs, steps: int, strength: float) -> torch.Tensor:
    """(diffusers' scheduler as StableDiffusion3Img2ImgPipeline sets it up before the first step, the timesteps to visit)."""
    pytest.importorskip("transformers", reason="diffusers has no pipelines without transformers")
    theirs.set_timesteps(steps)
    pipeline = SimpleNamespace(scheduler=theirs)
    timesteps, count = diffusers.StableDiffusion3Img2ImgPipeline.get_timesteps(pipeline, steps, strength, "cpu")
    assert len(timesteps) == count
    return timesteps


def assert_same_flow(ours, theirs, steps, strength):
    """Run one img2img edit of both from the same latent and noise, as assert_same_trajectory does."""
    plan = ours.plan(steps, strength)
    timesteps = restart(theirs, steps, strength)
    assert torch.equal(plan.timesteps, timesteps) and plan.timesteps.dtype == timesteps.dtype
    assert torch.equal(plan.sigmas, theirs.sigmas[-len(timesteps) - 1:]) and plan.sigmas[-1] == 0
    picture, noise = torch.randn(2, 2, 4, 3, 5, generator=torch.Generator().manual_seed(steps))
    mine = ours.add_noise(picture, noise, plan.timesteps[0])
    latent = theirs.scale_noise(picture, timesteps[:1].repeat(2), noise)
    assert_close(mine, latent)
    for i, timestep in enumerate(timesteps):
        assert plan.scale_input(latent, i) is latent
        velocity = toy(latent, timestep)
        ours_next = plan.step(velocity, i, latent)
        mine = plan.step(toy(mine, plan.timesteps[i]), i, mine)
        latent = theirs.step(velocity, timestep, latent).prev_sample
        assert torch.equal(ours_next, latent)
    assert_close(mine, latent, 1e-5)
    return plan


@pytest.mark.parametrize("name", FLOWS)
def test_same_flow_as_diffusers(name):
    ours, theirs = flow_pair(name)
    for steps, strength in [(1, 1.0), (2, 0.5), (3, 1.0), (10, 0.3), (28, 0.6), (50, 0.8), (50, 1.0)]:
        assert_same_flow(ours, theirs, steps, strength)


@pytest.mark.parametrize("name", FLOWS)
def test_same_noise_levels_for_every_number_of_steps(name):
    ours, theirs = flow_pair(name)
    for steps in [*range(1, 101), 117, 233, 500, 999, 1000]:
        if steps <= theirs.config.num_train_timesteps:
            plan = ours.plan(steps)
            theirs.set_timesteps(steps)
            assert torch.equal(plan.timesteps, theirs.timesteps) and torch.equal(plan.sigmas, theirs.sigmas)


def test_flow_starts_at_the_noise_alone():
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=0.4)           # 0.4 / (1 + (0.4 - 1)) in float32 is above 1
    theirs.set_timesteps(20)
    plan = load(theirs.to_json_string()).plan(20)
    assert theirs.timesteps[0] > 1000 and plan.timesteps[0] == 1000
    assert_close(plan.timesteps, theirs.timesteps)
    assert_close(plan.sigmas, theirs.sigmas)


def test_a_strength_visits_what_their_pipeline_visits():
    """Steps times strength may be no whole number, or be one in exact arithmetic only."""
    ours, theirs = flow_pair("Stable Diffusion 3")
    for steps in (1, 2, 3, 7, 10, 20, 25, 28, 30, 50, 100):
        for strength in (1e-6, 0.001, 1 / 3, 0.999, *(i / 20 for i in range(1, 21)), *(0.1 * i for i in range(1, 10))):
            assert torch.equal(ours.plan(steps, strength).timesteps, restart(theirs, steps, strength))


@pytest.mark.parametrize(("steps", "strength", "count", "first"), [
    (28, 0.6, 17, 0.814325), (28, 0.8, 23, 0.929818), (50, 0.3, 15, 0.548046), (50, 0.6, 30, 0.813852),
    (50, 0.8, 40, 0.921533)])
def test_published_strengths(steps, strength, count, first):
    """The number of steps and the first noise level of Stable Diffusion 3, computed independently."""
    plan = flow_pair("Stable Diffusion 3")[0].plan(steps, strength)
    assert (len(plan.timesteps), len(plan.sigmas)) == (count, count + 1)
    assert plan.sigmas[0].item() == pytest.approx(first, abs=1e-6)
    assert plan.timesteps[0].item() == pytest.approx(1000 * first, abs=1e-3)


def test_published_timesteps():
    timesteps = flow_pair("Stable Diffusion 3")[0].plan(28).timesteps.tolist()
    assert timesteps[:4] == pytest.approx([1000, 987.3806, 974.1077, 960.1293], abs=1e-4)
    assert timesteps[-4:] == pytest.approx([278.0488, 199.827, 110.9057, 8.9286], abs=1e-4)


@pytest.mark.parametrize("change", [{"shift": 3.1}, {"num_train_timesteps": 999}], ids=str)
def test_the_comparison_of_flows_sees_a_key_read_wrongly(change):
    theirs = flow_pair("Stable Diffusion 3")[1]
    stored = json.loads(theirs.to_json_string())
    assert_same_flow(load(json.dumps(stored)), theirs, 10, 0.6)
    with pytest.raises(AssertionError):
        assert_same_flow(load(json.dumps(stored | change)), theirs, 10, 0.6)


@pytest.mark.parametrize("fault", [
    ("FlowPlan", "step", lambda self, velocity, i, latent: latent - (self.sigmas[i + 1] - self.sigmas[i]) * velocity),
    ("FlowScheduler", "add_noise", lambda self, latent, noise, timestep: latent + timestep / 1000 * noise),
], ids=["against the flow", "as Euler adds noise"])
def test_the_comparison_of_flows_sees_a_fault(fault, monkeypatch):
    ours, theirs = flow_pair("Stable Diffusion 3")
    monkeypatch.setattr(getattr(schedulers, fault[0]), *fault[1:])
    with pytest.raises(AssertionError):
        assert_same_flow(ours, theirs, 5, 0.6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_flows_as_theirs(dtype):
    ours, theirs = flow_pair("Stable Diffusion 3")
    plan = ours.plan(4)
    theirs.set_timesteps(4)
    latent, velocity = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    for i, timestep in enumerate(theirs.timesteps):
        expected = theirs.step(velocity, timestep, latent).prev_sample
        assert expected.dtype == dtype and torch.equal(plan.step(velocity, i, latent), expected)
        restarted = flow_pair("Stable Diffusion 3")[1].scale_noise(latent, torch.tensor([1000.0]), velocity)
        assert torch.equal(ours.add_noise(latent, velocity, 1000), restarted)


@pytest.mark.parametrize("name", FLOWS)
def test_flow_s_noise_is_theirs(name):
    """At the noise levels of training, before a plan is made, and at the levels that a plan visits."""
    ours, theirs = flow_pair(name)
    latent, noise = torch.randn(2, 5, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    for steps in (None, 5, 28):
        if steps:
            theirs.set_timesteps(steps)
        timesteps = theirs.timesteps[[0, 1, 2, -2, -1]]
        expected = theirs.scale_noise(latent, timesteps, noise)
        assert_close(ours.add_noise(latent, noise, timesteps), expected)
        assert_close(ours.add_noise(latent, noise, timesteps.double()), expected)
        assert_close(ours.add_noise(latent[3:4], noise[3:4], float(timesteps[3])), expected[3:4])
        torch.testing.assert_close(ours.sigma_at(timesteps), theirs.sigmas[:-1][[0, 1, 2, -2, -1]] if steps else
                                   theirs.sigmas[[0, 1, 2, -2, -1]])


def test_flow_goes_from_the_latent_to_the_noise():
    ours = load(json.dumps({"_class_name": FLOW}))
    latent, noise = torch.randn(2, 2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ours.add_noise(latent, noise, 0), latent)
    assert torch.equal(ours.add_noise(latent, noise, 1000), noise)
    assert_close(ours.add_noise(latent, noise, torch.tensor([250, 750])),
                 torch.stack([0.75 * latent[0] + 0.25 * noise[0], 0.25 * latent[1] + 0.75 * noise[1]]))
    plan = ours.plan(7, 0.6)
    mine = ours.add_noise(latent, noise, plan.timesteps[0])
    for i in range(len(plan.timesteps)):            # a network that knows the answer arrives at the picture
        mine = plan.step(noise - latent, i, mine)
    assert_close(mine, latent)


def test_gradients_flow_through_a_flow():
    scheduler = flow_pair("Stable Diffusion 3")[0]
    plan = scheduler.plan(3, 0.7)
    latent, velocity = torch.randn(2, 1, 2, 2, 2, dtype=torch.float64).unbind()
    inputs = latent.requires_grad_(), velocity.requires_grad_()
    assert torch.autograd.gradcheck(lambda z, v: plan.step(v, 1, plan.scale_input(z, 1)), inputs)
    assert torch.autograd.gradcheck(lambda z, v: scheduler.add_noise(z, v, 123.4), inputs)


@pytest.mark.parametrize("name", FLOWS)
def test_a_flow_s_file_is_read(name, tmp_path):
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(**FLOWS[name])
    theirs.save_pretrained(tmp_path)
    text = (tmp_path / "scheduler_config.json").read_text()
    for ancestral in (False, True):                 # what InstructPix2Pix asks for does not concern a flow
        ours = load(text, ancestral=ancestral)
        assert (ours.note, ours.config.shift) == ("", theirs.config.shift)
        assert ours.config.num_train_timesteps == theirs.config.num_train_timesteps


@pytest.mark.parametrize("stored", [
    {"_diffusers_version": "0.29.0.dev0", "num_train_timesteps": 1000, "shift": 3.0},       # as Stable Diffusion 3 has it
    {"_diffusers_version": "0.31.0.dev0", "base_image_seq_len": 256, "base_shift": 0.5, "max_image_seq_len": 4096,
     "max_shift": 1.15, "num_train_timesteps": 1000, "shift": 3.0, "use_dynamic_shifting": False},
    {"shift": 3.0},
], ids=["2024-06", "2024-10", "bare"])
def test_published_flow_files_are_read(stored):
    ours = load(json.dumps({"_class_name": FLOW} | stored))
    assert (ours.config.num_train_timesteps, ours.config.shift) == (1000, 3.0)


def test_every_option_of_a_flow_is_decided_on():
    options = inspect.signature(diffusers.FlowMatchEulerDiscreteScheduler.__init__).parameters
    options = {name: option.default for name, option in options.items() if name != "self"}
    ours = {field.name: field.default for field in fields(schedulers.FlowConfig) if field.name != "sampler"}
    assert options.keys() <= ours.keys() | schedulers.IGNORED
    config = load(json.dumps({"_class_name": FLOW} | options)).config
    assert ours == {key: getattr(config, key) for key in ours} == {key: options[key] for key in ours}


@pytest.mark.parametrize(("change", "named"), [
    *(({key: True}, f"sets {key} to True; for {FLOW} only False is implemented") for key in (
        "invert_sigmas", "stochastic_sampling", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")),
    ({"shift_terminal": 0.1}, "sets shift_terminal to 0.1; .* only None is implemented"),
    ({"beta_start": 0.1}, f"sets beta_start, which {FLOW} here does not implement"),
    *(({"shift": wrong}, "sets shift to .*, not to a number from 0.001") for wrong in (
        0, -3.0, None, "3", True, float("nan"), float("inf"))),
    *(({"num_train_timesteps": wrong}, "sets num_train_timesteps to .*, not to a whole number from 1") for wrong in (
        0, -1, 1000.0, None, "1000", True)),
], ids=str)
def test_a_flow_that_is_not_implemented_is_refused(change, named):
    with pytest.raises(ValueError, match=f"^scheduler_config.json {named}") as caught:
        load(json.dumps({"_class_name": FLOW, "shift": 3.0} | change))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("arguments", "sentence"), [
    ((0,), "^0 denoising steps: between 1 and 1000 are possible$"),
    ((1001,), "^1001 denoising steps: between 1 and 1000"),
    ((10, 0), "^strength 0: above 0"),
    ((10, -0.5), "^strength -0.5: above 0"),
    ((10, 1.01), "^strength 1.01: above 0, .* and at most 1"),
    ((10, float("nan")), "^strength nan: above 0"),
    ((10, 1e-20), "^strength 1e-20 of 10 denoising steps is less than one step; raise either$"),
])
def test_impossible_flows_are_refused(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        load(json.dumps({"_class_name": FLOW})).plan(*arguments)


@pytest.mark.parametrize("timestep", [-1, 1000.5, [3, 2000]])
def test_noise_levels_outside_a_flow_are_refused(timestep):
    with pytest.raises(ValueError, match="0 to 1000"):
        load(json.dumps({"_class_name": FLOW})).add_noise(torch.zeros(2, 4, 3, 3), torch.zeros(2, 4, 3, 3),
                                                          torch.tensor(timestep))
