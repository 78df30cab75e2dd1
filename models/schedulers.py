"""Noise levels and single denoising steps from a published `scheduler_config.json`: DDIM, Euler and Euler ancestral; those
of rectified flow (Stable Diffusion 3, FLUX) are in `flow_matching.py`.

`load(text)` gives a `Scheduler`, or for rectified flow a `FlowScheduler`: the training noise levels, and `add_noise`, which
is the same for every sampler of a kind. `scheduler.plan(steps)` gives a plan: the timesteps of one edit and the step from each
to the next. A flow's plan also takes a strength: the share of the way from noise to picture. `plan.fault` is "", or a sentence
that says why the plan cannot denoise; its timesteps are valid even then.

    latent = plan.sigma_start * noise
    for i, timestep in enumerate(plan.timesteps):
        noise_pred = unet(plan.scale_input(latent, i), timestep, context)
        latent = plan.step(noise_pred, i, latent, noise)      # fresh noise, needed where plan.draws_noise

Everything is a pure function of its arguments and differentiable in the latent and the prediction; the caller draws the
noise. The operations are in diffusers' order, so that whole trajectories agree to rounding.
Papers: Song et al. 2021 (DDIM), equation 12; Karras et al. 2022, algorithm 1 (Euler); Lin et al. 2023 (spacing, zero
terminal SNR). Euler ancestral is k-diffusion's sampler, without a paper.
"""

import math
from dataclasses import dataclass, fields
from typing import ClassVar

import torch

from .config import Config, parsed, shown
from .flow_matching import FILE, FLOW, TIMESTEPS, FlowConfig, FlowPlan, FlowScheduler
from .lean import Sent

__all__ = ["ANCESTRAL", "DDIM", "EULER", "FLOW", "DDIMPlan", "EulerPlan", "FlowConfig", "FlowPlan", "FlowScheduler",
           "Scheduler", "SchedulerConfig", "load"]

DDIM, EULER, ANCESTRAL = "DDIMScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"

# Keys that the class of that name reads and this file does not implement: accepted only with a value that means "off".
OFF = {
    DDIM: {"thresholding": (False,)},
    EULER: {
        "interpolation_type": ("linear",),
        "timestep_type": ("discrete",),
        "final_sigmas_type": ("zero",),
        "use_karras_sigmas": (False, None),
        "use_exponential_sigmas": (False, None),
        "use_beta_sigmas": (False, None),
    },
    ANCESTRAL: {},
    FLOW: {
        "invert_sigmas": (False, None),
        "shift_terminal": (None,),
        "stochastic_sampling": (False, None),
        "use_karras_sigmas": (False, None),
        "use_exponential_sigmas": (False, None),
        "use_beta_sigmas": (False, None),
    },
}
# Keys that only DDIM reads.
DDIM_ONLY = {"clip_sample", "clip_sample_range", "set_alpha_to_one"}
# Keys that change nothing: options of a key above that is off, or of other classes. Files carry the latter because a
# scheduler made from another one's config is saved with the other one's keys (SDXL's Euler has PNDM's and DDIM's).
IGNORED = {
    *DDIM_ONLY, *OFF[DDIM], *OFF[EULER], "dynamic_thresholding_ratio", "sample_max_value", "sigma_min", "sigma_max",
    "skip_prk_steps", "variance_type", "algorithm_type", "solver_order", "solver_type", "solver_p", "lower_order_final",
    "euler_at_final", "lambda_min_clipped", "use_lu_lambdas", "predict_x0", "disable_corrector", "use_flow_sigmas",
    "flow_shift", "time_shift_type", "use_dynamic_shifting", "shift_terminal", "rho", "sigma_data", "sigma_schedule",
    "original_inference_steps", "timestep_scaling",
    *OFF[FLOW], "base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len",
}
# Keys that describe the trained network and not the sampler. From a class that is not implemented, only these are read.
TRAINED = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type",
           "rescale_betas_zero_snr")
# Keys that change the training noise given by the betas, and the value that means "off".
OTHER_NOISE = {"use_flow_sigmas": False, "snr_shift_scale": 1.0}
# The training noise of every Stable Diffusion 1.x, for a folder that has no scheduler_config.json.
STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}

CHOICES = {
    "sampler": (DDIM, EULER, ANCESTRAL),
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
    "prediction_type": ("epsilon", "v_prediction", "sample"),
    "timestep_spacing": ("leading", "linspace", "trailing"),
}

BETAS = (1e-6, 0.999)                               # below, 1 - beta is 1 in float32; above, nothing of a picture remains


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig(Config):
    """`scheduler_config.json`. Defaults stand in for keys that a file leaves out, and are the published classes'."""

    FILE: ClassVar = FILE
    RANGE: ClassVar = {"num_train_timesteps": TIMESTEPS, "steps_offset": (0, TIMESTEPS[1]), "clip_sample_range": (1e-6, 1e6),
                       **dict.fromkeys(("beta_start", "beta_end", "trained_betas"), BETAS)}

    sampler: str                                    # the class that the file names, or the one used in its place
    timestep_spacing: str                           # the classes' defaults differ: leading in DDIM, linspace in Euler
    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    trained_betas: tuple[float, ...] | None = None  # instead of the three above
    rescale_betas_zero_snr: bool = False            # the last training timestep is pure noise
    prediction_type: str = "epsilon"                # what the network predicts: noise, velocity, or the clean latent
    steps_offset: int = 0                           # added to every timestep under "leading"
    clip_sample: bool = True                        # DDIM only: clamp the predicted clean latent ...
    clip_sample_range: float = 1.0                  # ... to this
    set_alpha_to_one: bool = True                   # DDIM only: True ends without noise, False at the noise of timestep 0

    def __post_init__(self):
        super().__post_init__()
        for key, choices in CHOICES.items():
            if getattr(self, key) not in choices:
                raise self.refusal(f"sets {key} to {shown(getattr(self, key))}; implemented are {', '.join(choices)}")
        if self.trained_betas is not None and len(self.trained_betas) != self.num_train_timesteps:
            raise self.refusal(f"has {len(self.trained_betas)} trained_betas for {self.num_train_timesteps} "
                               "num_train_timesteps")
        if self.rescale_betas_zero_snr and self.num_train_timesteps == 1:
            raise self.refusal("sets rescale_betas_zero_snr and num_train_timesteps to 1: that one would be pure noise")


def load(text: str | None, *, ancestral: bool = False) -> "Scheduler | FlowScheduler":
    """The scheduler that the text of a `scheduler_config.json` describes; None for a folder without that file.

    Rectified flow, DDIM, Euler and Euler ancestral are taken as stored. Any other class is replaced by Euler ancestral with
    linspace spacing on the stored betas. With `ancestral=True` DDIM and Euler are replaced as well: InstructPix2Pix and
    HQ-Edit are published to run with Euler ancestral, although their files name other classes. None gives the betas of
    Stable Diffusion. `.note` is a sentence about a replacement, or "". ValueError for a key or value that is not implemented.
    """
    if text is None:
        return Scheduler(SchedulerConfig(sampler=ANCESTRAL, timestep_spacing="linspace", **STABLE_DIFFUSION),
                         "No scheduler_config.json is stored: Euler ancestral with Stable Diffusion's betas is used.")
    given = parsed(text, FILE)
    stored = given.get("_class_name")
    if not isinstance(stored, str | None):
        raise ValueError(f"{FILE} sets _class_name to {shown(stored)}, not to a text")
    given = {key: value for key, value in given.items() if not key.startswith("_")}
    if stored == FLOW:
        return FlowScheduler(flow_config(given))
    if stored == ANCESTRAL or (stored in OFF and not ancestral):
        return Scheduler(as_stored(stored, given))
    return Scheduler(from_betas(stored, given), f"scheduler_config.json names {stored or 'no class'}: "
                                                "Euler ancestral with linspace spacing on its betas is used instead.")


def flow_config(given: dict) -> FlowConfig:
    """The config of a file of rectified flow; a key or value that is not implemented is refused."""
    known = {field.name for field in fields(FlowConfig)} - {"sampler"}
    check(FLOW, given, known)
    return FlowConfig(**{key: given[key] for key in given.keys() & known})


def check(sampler: str, given: dict, known: set[str]) -> None:
    """ValueError for a key or value that this file does not implement."""
    for key, off in OFF[sampler].items():
        if key in given and given[key] not in off:
            raise ValueError(f"scheduler_config.json sets {key} to {shown(given[key])}; "
                             f"for {sampler} only {off[0]!r} is implemented")
    if extra := sorted(given.keys() - known - IGNORED):
        raise ValueError(f"scheduler_config.json sets {', '.join(extra)}, which {sampler} here does not implement")


def as_stored(sampler: str, given: dict) -> SchedulerConfig:
    """The config of a file that names a class implemented here; a key or value that is not implemented is refused."""
    known = {field.name for field in fields(SchedulerConfig)} - {"sampler"}
    if sampler != DDIM:
        known = known - DDIM_ONLY
    check(sampler, given, known)
    default = {"timestep_spacing": "leading" if sampler == DDIM else "linspace"}
    return SchedulerConfig(sampler=sampler, **default | {key: given[key] for key in given.keys() & known})


def from_betas(stored: str | None, given: dict) -> SchedulerConfig:
    """Euler ancestral on the training noise of a file that names another class; ValueError where the file has no betas."""
    betas = ["beta_start", "beta_end", "beta_schedule"] if given.get("trained_betas") is None else ["trained_betas"]
    reasons = [f"does not set {key}" for key in betas if key not in given] + [
        f"sets {key} to {shown(given[key])}" for key, off in OTHER_NOISE.items() if given.get(key, off) != off]
    if reasons:
        raise ValueError(f"scheduler_config.json names {stored or 'no class'} and {reasons[0]}, so Euler ancestral "
                         f"cannot take its place; implemented are {', '.join(OFF)}")
    kept = {key: given[key] for key in TRAINED if key in given}
    return SchedulerConfig(sampler=ANCESTRAL, timestep_spacing="linspace", **kept)


class Scheduler:
    """The noise levels that a network was trained with, and the sampler that its checkpoint names.

    config: as read. note: "", or one sentence about a sampler that replaces the stored one.
    alphas_cumprod: (num_train_timesteps,) float32 on the CPU, the clean latent's share of the noisy one's variance.
    """

    def __init__(self, config: SchedulerConfig, note: str = ""):
        self.config = config
        self._sent = Sent()
        self.note = note
        self.alphas_cumprod = torch.cumprod(1.0 - training_betas(config), dim=0)
        if not config.rescale_betas_zero_snr and not self.alphas_cumprod[-1]:
            raise config.refusal("has betas so large that nothing of a picture is left at the last training timestep")
        if config.rescale_betas_zero_snr and config.sampler != DDIM:
            # Zero would be an infinite sigma; this is the smallest positive half-precision number.
            self.alphas_cumprod = torch.cat([self.alphas_cumprod[:-1], self.alphas_cumprod.new_tensor([2.0**-24])])

    @property
    def draws_noise(self) -> bool:
        """True if every step, the last one included, needs fresh noise."""
        return self.config.sampler == ANCESTRAL

    def plan(self, steps: int) -> "DDIMPlan | EulerPlan":
        """The timesteps and transitions of one edit in that many denoising steps."""
        if not 1 <= steps <= self.config.num_train_timesteps:
            raise ValueError(f"{steps} denoising steps: between 1 and {self.config.num_train_timesteps} are possible")
        if self.config.sampler == DDIM:
            return DDIMPlan(self, steps)
        return EulerPlan(self, steps)

    def add_noise(self, latent, noise, timesteps):
        """sqrt(a) latent + sqrt(1 - a) noise with a = alphas_cumprod at the timesteps: the network's training input.

        latent (scaled) and noise are (B, C, h, w); timesteps is one number or (B,), and may be fractional. This is the
        variance-preserving form for every sampler: add_noise of diffusers' Euler classes, followed by scale_input.
        """
        kept, lost = self.shares(timesteps, latent)
        return kept * latent + lost * noise

    def shares(self, timesteps, latent):
        """sqrt(a) and sqrt(1 - a) at the timesteps, each (1 or B, 1, 1, 1), like latent. Sent to the device once."""
        def make(timesteps):
            kept = self.alphas_cumprod_at(timesteps)
            return kept.sqrt(), (1 - kept).sqrt()

        return self._sent(make, timesteps, latent)

    def alphas_cumprod_at(self, timesteps) -> torch.Tensor:
        """alphas_cumprod at timesteps (a number or a tensor, fractional allowed): float32 on the CPU, of their shape.

        Between two training timesteps sigma = sqrt((1 - a) / a) is interpolated linearly, as Euler's plans do.
        """
        timesteps = torch.as_tensor(timesteps).detach().cpu().double()
        if bool((timesteps < 0).any()) or bool((timesteps > self.config.num_train_timesteps - 1).any()):
            raise ValueError(f"timestep {timesteps.min():g} to {timesteps.max():g}: this scheduler was trained "
                             f"with 0 to {self.config.num_train_timesteps - 1}")
        trained = self.alphas_cumprod[timesteps.long()]
        between = 1 / (1 + self.sigma_at(timesteps) ** 2)
        return torch.where(timesteps == timesteps.floor(), trained, between.float())

    def sigma_at(self, timesteps: torch.Tensor) -> torch.Tensor:
        """sqrt((1 - a) / a) at float64 timesteps, interpolated linearly and constant outside the trained range."""
        sigmas = (((1 - self.alphas_cumprod) / self.alphas_cumprod) ** 0.5).double()
        timesteps = timesteps.clamp(0, len(sigmas) - 1)
        below, above = timesteps.floor().long(), timesteps.ceil().long()
        return (sigmas[above] - sigmas[below]) * (timesteps - below) + sigmas[below]


class EulerPlan:
    """Euler steps along dx/dsigma. The ancestral sampler steps to a lower sigma than the next one, and then adds noise.

    timesteps: (steps,) float32 on the CPU, fractional under linspace. sigmas: (steps + 1,) likewise, the last one 0.
    The latent here is clean + sigma * noise; `scale_input` scales it to the unit variance that the network expects.
    """

    fault = ""

    def __init__(self, scheduler: Scheduler, steps: int):
        config = scheduler.config
        self.draws_noise = scheduler.draws_noise
        self.prediction_type = config.prediction_type
        self.timesteps = torch.tensor(visited(config, steps), dtype=torch.float32, device="cpu")
        sigmas = scheduler.sigma_at(self.timesteps.double()).float()
        self.sigmas = torch.cat([sigmas, sigmas.new_zeros(1)])
        start = self.sigmas.max()
        if config.timestep_spacing == "leading":                                # starts below the noisiest timestep
            start = (start**2 + 1) ** 0.5
        self.sigma_start = start.item()

    def scale_input(self, latent, i):
        """The latent, scaled for the network at step i."""
        return latent / (self.sigmas[i] ** 2 + 1) ** 0.5

    def step(self, noise_pred, i, latent, noise=None):
        """The latent of step i + 1, in noise_pred's dtype (computed in at least float32).

        noise: standard normal, of latent's shape; only the ancestral sampler uses it, and needs it at every step.
        """
        sigma, sigma_next = self.sigmas[i], self.sigmas[i + 1]
        latent = latent.to(torch.promote_types(latent.dtype, torch.float32))
        if self.prediction_type == "epsilon":
            clean = latent - sigma * noise_pred
        elif self.prediction_type == "v_prediction":
            clean = noise_pred * (-sigma / (sigma**2 + 1) ** 0.5) + latent / (sigma**2 + 1)
        else:
            clean = noise_pred
        direction = (latent - clean) / sigma
        if not self.draws_noise:
            return (latent + direction * (sigma_next - sigma)).to(noise_pred.dtype)
        if noise is None:
            raise ValueError("Euler ancestral adds noise at every step: pass standard normal noise of latent's shape")
        sigma_up = (sigma_next**2 * (sigma**2 - sigma_next**2) / sigma**2) ** 0.5
        # Rounding may make the difference slightly negative where sigma is much larger than the next one.
        sigma_down = (sigma_next**2 - sigma_up**2).clamp(min=0) ** 0.5
        return (latent + direction * (sigma_down - sigma) + noise * sigma_up).to(noise_pred.dtype)


class DDIMPlan:
    """Deterministic DDIM steps (eta 0) on latents of unit variance: sqrt(a) * clean + sqrt(1 - a) * noise.

    timesteps: (steps,) int64 on the CPU.
    """

    draws_noise = False
    sigma_start = 1.0

    def __init__(self, scheduler: Scheduler, steps: int):
        config = scheduler.config
        self.config = config
        self.timesteps = torch.tensor(visited(config, steps), dtype=torch.float64, device="cpu").round().long()
        if self.timesteps[0] >= config.num_train_timesteps:
            raise ValueError(f"{steps} denoising steps with steps_offset {config.steps_offset} would start at timestep "
                             f"{self.timesteps[0]}, and training ended at {config.num_train_timesteps - 1}; use fewer")
        following = self.timesteps - config.num_train_timesteps // steps
        final = torch.ones((), device="cpu") if config.set_alpha_to_one else scheduler.alphas_cumprod[0]
        self.kept = scheduler.alphas_cumprod[self.timesteps]                    # a at each step; kept_next: at the next
        self.kept_next = torch.where(following >= 0, scheduler.alphas_cumprod[following.clamp(min=0)], final)
        self.fault = ""
        if config.prediction_type == "epsilon" and not config.clip_sample and bool((self.kept == 0).any()):
            self.fault = (f"{FILE} sets rescale_betas_zero_snr with prediction_type epsilon and no clip_sample: timestep "
                          f"{self.timesteps[0]} is noise alone, and its predicted noise says nothing of the picture; such a "
                          "network is trained to predict v_prediction")

    def scale_input(self, latent, i):
        """The latent, unchanged: DDIM's networks take latents of unit variance."""
        return latent

    def step(self, noise_pred, i, latent, noise=None):
        """The latent of step i + 1. noise is not used; all plans have the same arguments."""
        kept, kept_next = self.kept[i], self.kept_next[i]
        if self.config.prediction_type == "epsilon":
            clean = (latent - (1 - kept) ** 0.5 * noise_pred) / kept**0.5
        elif self.config.prediction_type == "v_prediction":
            clean = kept**0.5 * latent - (1 - kept) ** 0.5 * noise_pred
            noise_pred = kept**0.5 * noise_pred + (1 - kept) ** 0.5 * latent
        else:
            clean = noise_pred
            noise_pred = (latent - kept**0.5 * clean) / (1 - kept) ** 0.5
        if self.config.clip_sample:
            clean = clean.clamp(-self.config.clip_sample_range, self.config.clip_sample_range)
        return kept_next**0.5 * clean + (1 - kept_next) ** 0.5 * noise_pred


def visited(config: SchedulerConfig, steps: int) -> list[float]:
    """The timesteps of an edit, noisiest first, before DDIM rounds them (table 2 of Lin et al.)."""
    train = config.num_train_timesteps
    if config.timestep_spacing == "linspace":                                   # the last and the first one included
        gap = (train - 1) / max(steps - 1, 1)
        inner = [i * gap for i in reversed(range(steps - 1))]
        return [float(train - 1), *inner] if steps > 1 else [0.0]
    if config.timestep_spacing == "leading":                                    # steps of a whole number, from 0 upwards
        return [float(i * (train // steps) + config.steps_offset) for i in reversed(range(steps))]
    # Trailing: even steps from the last one downwards. diffusers steps by a rounded gap: for some numbers of steps, such as
    # 61 of 1000, it makes one step more, at timestep -1. This code does the same, so that the edits are equal.
    gap = (train - train / steps) - train
    return [float(round(train + i * gap) - 1) for i in range(math.ceil(train / (train / steps)))]


def training_betas(config: SchedulerConfig) -> torch.Tensor:
    """The variance that each training timestep adds, (num_train_timesteps,) float32 on the CPU."""
    count, start, end = config.num_train_timesteps, config.beta_start, config.beta_end
    if config.trained_betas is not None:
        betas = torch.tensor(config.trained_betas, dtype=torch.float32, device="cpu")
    elif config.beta_schedule == "linear":
        betas = torch.linspace(start, end, count, dtype=torch.float32, device="cpu")
    elif config.beta_schedule == "scaled_linear":                               # linear in the square root
        betas = torch.linspace(start**0.5, end**0.5, count, dtype=torch.float32, device="cpu") ** 2
    else:                                                                       # squaredcos_cap_v2: Nichol 2021
        kept = [math.cos((i / count + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(count + 1)]
        betas = [min(1 - kept[i + 1] / kept[i], 0.999) for i in range(count)]
        betas = torch.tensor(betas, dtype=torch.float32, device="cpu")
    if config.rescale_betas_zero_snr:                                           # Lin et al., algorithm 1
        root = torch.cumprod(1.0 - betas, dim=0).sqrt()
        kept = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2
        betas = 1 - torch.cat([kept[:1], kept[1:] / kept[:-1]])
    return betas
