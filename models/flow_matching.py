"""Noise levels and Euler steps of rectified flow: Stable Diffusion 3, FLUX.1 and FLUX.2.

`schedulers.load` reads the file and gives a `FlowScheduler`. Its plans have the interface that `schedulers.py` describes.

    plan = scheduler.plan(steps, strength)                                              # Stable Diffusion 3
    plan = scheduler.plan_over(even_sigmas(steps), mu=scheduler.mu(tokens))             # FLUX.1
    plan = scheduler.plan_over(even_sigmas(steps), mu=empirical_mu(tokens, steps))      # FLUX.2

tokens: how many tokens of the transformer the picture has; those of text and reference pictures do not count. The levels are
those of diffusers' FlowMatchEulerDiscreteScheduler as the published pipelines call it, equal to the bit. Papers: Liu et al.
2023 (rectified flow); Esser et al. 2024, section 5.3.2 (the shift by resolution).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch

from .config import Config, shown
from .lean import Sent

FILE = "scheduler_config.json"
FLOW = "FlowMatchEulerDiscreteScheduler"
TIMESTEPS = (1, 100_000)
SHIFTS = (-20, 20)                                  # of mu in a file: beyond, float32 leaves no level between noise and picture
EXPONENTIAL, LINEAR = "exponential", "linear"


@dataclass(frozen=True, kw_only=True)
class FlowConfig(Config):
    """`scheduler_config.json` of rectified flow. The last five fields are used under `use_dynamic_shifting` alone."""

    FILE: ClassVar = FILE
    RANGE: ClassVar = {"num_train_timesteps": TIMESTEPS, "shift": (0.001, 1000), "base_shift": SHIFTS, "max_shift": SHIFTS}

    sampler: str = FLOW
    num_train_timesteps: int = 1000
    shift: float = 1.0                              # above 1, more of the steps are spent on noisy latents
    use_dynamic_shifting: bool | None = False       # shift by a mu that depends on the picture's size, in place of `shift`
    time_shift_type: str = EXPONENTIAL
    base_shift: float | None = 0.5                  # FLUX.1's mu at base_image_seq_len tokens ...
    max_shift: float | None = 1.15                  # ... and at max_image_seq_len
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096

    def __post_init__(self):
        super().__post_init__()
        if self.time_shift_type not in (EXPONENTIAL, LINEAR):
            raise self.refusal(f"sets time_shift_type to {shown(self.time_shift_type)}; implemented are {EXPONENTIAL} and "
                               f"{LINEAR}")
        if self.use_dynamic_shifting and None in (self.base_shift, self.max_shift):
            raise self.refusal("sets use_dynamic_shifting, which needs numbers as base_shift and max_shift")
        if self.use_dynamic_shifting and self.base_image_seq_len == self.max_image_seq_len:
            raise self.refusal(f"sets base_image_seq_len and max_image_seq_len to {self.max_image_seq_len}; they must differ")


class FlowScheduler:
    """Rectified flow: a noisy latent is (1 - sigma) latent + sigma noise, and the network predicts noise - latent from it.

    The network's timestep is sigma times num_train_timesteps.
    """

    draws_noise, note = False, ""

    def __init__(self, config: FlowConfig):
        self.config = config
        self._sent = Sent()

    def plan(self, steps: int, strength: float = 1.0) -> "FlowPlan":
        """Stable Diffusion 3's timesteps and transitions: the last `strength` of that many steps from noise to picture.

        ValueError where the file sets use_dynamic_shifting: `plan_over` takes the mu that this needs.
        """
        config = self.config
        if config.use_dynamic_shifting:
            raise ValueError(f"{FILE} sets use_dynamic_shifting, and the noise levels then depend on the size of the picture: "
                             "pass them with a mu to plan_over")
        if not 1 <= steps <= config.num_train_timesteps:
            raise ValueError(f"{steps} denoising steps: between 1 and {config.num_train_timesteps} are possible")
        if not 0 < strength <= 1:
            raise ValueError(f"strength {strength}: above 0, where nothing changes, and at most 1, where nothing is kept")
        # From 1 to the least training noise. That one is shifted here and then again with the rest, as in the published
        # samples. The levels are float32 numbers, the arithmetic between them float64.
        train = config.num_train_timesteps
        lowest = self._shifted(torch.ones((), device="cpu") / train).item()
        even = torch.linspace(train, lowest * train, steps, dtype=torch.float64, device="cpu") / train
        skipped = int(steps - min(steps * strength, steps))                     # float arithmetic as in diffusers: 50 * 0.8
        if skipped >= steps:
            raise ValueError(f"strength {strength} of {steps} denoising steps is less than one step; raise either")
        return FlowPlan(self._shifted(even).float()[skipped:], train)

    def plan_over(self, sigmas: Sequence[float], *, mu: float | None = None) -> "FlowPlan":
        """The plan over given noise levels, falling from at most 1 to above 0, after they are shifted as the file says.

        mu: the amount of the shift under use_dynamic_shifting; not used otherwise.
        """
        if not len(sigmas) or not sigmas[0] <= 1 or not sigmas[-1] > 0 or not all(a > b for a, b in pairwise(sigmas)):
            raise ValueError(f"noise levels {shown(list(sigmas))}: they must fall from at most 1 to above 0")
        levels = torch.tensor(sigmas, dtype=torch.float32, device="cpu")
        if not self.config.use_dynamic_shifting:
            return FlowPlan(self._shifted(levels), self.config.num_train_timesteps)
        if mu is None:
            raise ValueError(f"{FILE} sets use_dynamic_shifting, so the plan needs a mu")
        exponential = self.config.time_shift_type == EXPONENTIAL
        if not (math.isfinite(mu) and abs(mu) <= 80 if exponential else 0 < mu < math.inf):
            raise ValueError(f"mu {mu}: {'between -80 and 80' if exponential else 'above 0'} under time_shift_type "
                             f"{self.config.time_shift_type}")
        # Tensors in place of numbers: torch divides a number by a tensor with another rounding.
        one, amount = levels.new_ones(()), levels.new_tensor(math.exp(mu) if exponential else mu)
        return FlowPlan(amount / (amount + (one / levels - 1)), self.config.num_train_timesteps)

    def mu(self, tokens: int) -> float:
        """FLUX.1's mu: a line in the picture's tokens through the two points that the file gives."""
        config = self.config
        slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
        return tokens * slope + (config.base_shift - slope * config.base_image_seq_len)

    def _shifted(self, sigma):
        shift = self.config.shift
        return shift * sigma / (1 + (shift - 1) * sigma)

    def add_noise(self, latent, noise, timesteps):
        """(1 - sigma) latent + sigma noise: latent (scaled) and noise (B, C, h, w), timesteps a number or (B,)."""
        (sigma,) = self.shares(timesteps, latent)
        return sigma * noise + (1.0 - sigma) * latent

    def shares(self, timesteps, latent):
        """(sigma at the timesteps, (1 or B, 1, 1, 1), like latent). Sent to the device once."""
        return self._sent(lambda timesteps: (self.sigma_at(timesteps),), timesteps, latent)

    def sigma_at(self, timesteps) -> torch.Tensor:
        """The share of noise at timesteps (a number or a tensor), of their shape, float32."""
        timesteps = torch.as_tensor(timesteps).detach().float()
        if bool((timesteps < 0).any()) or bool((timesteps > self.config.num_train_timesteps).any()):
            raise ValueError(f"timestep {timesteps.min():g} to {timesteps.max():g}: this scheduler was trained "
                             f"with 0 to {self.config.num_train_timesteps}")
        return timesteps / self.config.num_train_timesteps


class FlowPlan:
    """Euler steps along the flow, from the first of the given noise levels down to the picture.

    timesteps: (n,) float32 on the CPU. sigmas: (n + 1,), the last one 0. An edit begins with
    `scheduler.add_noise(latent, noise, timesteps[0])`, which at a noise level of 1 is the noise alone.
    """

    draws_noise, fault = False, ""
    sigma_start = 1.0

    def __init__(self, sigmas: torch.Tensor, num_train_timesteps: int):
        self.timesteps = sigmas * num_train_timesteps
        self.sigmas = torch.cat([sigmas, sigmas.new_zeros(1)])

    def scale_input(self, latent, i):
        """The latent, unchanged: this network takes it as it is."""
        return latent

    def step(self, velocity, i, latent, noise=None):
        """The latent of step i + 1, in velocity's dtype (summed in at least float32). noise is not used."""
        latent = latent.to(torch.promote_types(latent.dtype, torch.float32))
        return (latent + (self.sigmas[i + 1] - self.sigmas[i]) * velocity).to(velocity.dtype)


def even_sigmas(steps: int) -> list[float]:
    """Evenly spaced noise levels from 1 to 1 / steps: those that the pipelines of FLUX pass to their scheduler."""
    if steps < 1:
        raise ValueError(f"{steps} denoising steps: at least one is needed")
    gap = (1 / steps - 1) / max(steps - 1, 1)
    return [1.0 + i * gap for i in range(steps - 1)] + [1 / steps]


def empirical_mu(tokens: int, steps: int) -> float:
    """FLUX.2's mu for a picture of that many tokens: fitted lines for 10 and for 200 steps, and a line in the steps between.

    Above 4300 tokens the line for 200 steps serves every number of steps, as in the published program.
    """
    many = 0.00016927 * tokens + 0.45666666
    if tokens > 4300:
        return many
    few = 8.73809524e-05 * tokens + 1.89833333
    slope = (many - few) / 190
    return slope * steps + (many - 200 * slope)
