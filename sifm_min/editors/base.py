"""The editor that all others derive from: sizes, encoding, plans of denoising, and the edit itself.

Pictures are PIL images; `pixels` are (B,3,H,W) in [0,1]; `encode` and `decode` give the VAE the [-1,1] that it wants. An *image
latent* is the mean of the VAE's posterior at a picture, unscaled, (B,C,h,w): E(x) in the formulas. InstructPix2Pix and
UltraEdit see it beside a latent of pure noise; Stable Diffusion 3 denoises a noisy latent of the picture itself. The methods
use every editor through the same calls, all differentiable: `encode`, `noise_latent`, `features` and `predict`, with the
`context` of the prompts.
"""

import inspect
import math
from abc import abstractmethod
from dataclasses import asdict, dataclass

import torch
from PIL import Image

from .. import images, memory
from ..models.lean import Prepared, sent
from ..models.precision import full_float32
from ..models.schedulers import FlowScheduler
from .guidance import UNGUIDED, one_by_one, over_text, over_text_and_picture
from .precision import in_dtype
from .several import send_weights
from .text import apart, together

LOWEST_TIMESTEP = 50                                         # below it a noisy latent has almost no noise


@dataclass(frozen=True)
class Defaults:
    """The settings of an edit where the call gives none: denoising steps, the two guidances, the working size (long side),
    for Stable Diffusion 3 the strength of img2img, for FLUX.1 the guidance by a second pass, and the tokens of T5 or Qwen3."""

    steps: int = 100
    guidance: float = 7.5
    image_guidance: float = 1.5
    size: int = 512
    strength: float = 0.6
    text_length: int = 256
    true_guidance: float = 1.0


class Editor:
    """The base of all editors.

    An editor of your own derives from this class and defines `context`, `features`, `predict`, `tap_names` and `default_taps`;
    the rest has defaults. `check` says what is missing.

    vae: encodes pixels in [-1,1] to (mean, log variance), as `models.vae.AutoencoderKL` does, or to (latent,), as
      `models.tiny_vae.AutoencoderTiny` does; None where the editor has `encode`, `decode` and `scaled` of its own.
    scheduler: of `models.schedulers`. defaults: see `Defaults`. notice: a sentence that belongs beside every result.
    checkpoint: the source of the weights, which reports name.
    kind: "instruct" where the denoiser sees the image latent beside a latent of pure noise, "img2img" where the image
      latent, noised, is what it denoises, "encoders" where there is no denoiser. needs_prompt: False where no method reads a
      prompt. OPTIONS: what `edit` takes besides steps and guidance.
    tap_names: all that `features` can return. default_taps: what SIFM perturbs. probs_names: the attention maps among the
      former, which cost memory. denoiser: the network whose activations may be computed again in the backward pass.
    """

    kind = "instruct"
    OPTIONS = frozenset({"image_guidance"})
    needs_prompt = True
    probs_names = ()
    denoiser = None
    _checkpointing = _streaming = _waiting = False

    def __init__(self, *, name, scheduler, vae=None, device="cpu", dtype=torch.float32, defaults=None, notice="",
                 checkpoint=None):
        self.name, self.vae, self.scheduler, self.checkpoint = name, vae, scheduler, checkpoint
        self.device, self.dtype, self.defaults, self.notice = torch.device(device), dtype, defaults or Defaults(), notice

    # -- what an editor of your own has --------------------------------------------------------------------------------

    @property
    @abstractmethod
    def tap_names(self):
        """The names of the activations that `features` can return, in the order in which they are computed."""

    @property
    @abstractmethod
    def default_taps(self):
        """The names among `tap_names` that SIFM perturbs unless told otherwise."""

    @abstractmethod
    def context(self, prompts):
        """Prompts -> their context: a tensor (B,L,C), or `text.Text`."""

    @abstractmethod
    def features(self, image_latent, noisy_latent, timesteps, context, *, taps):
        """Activations of the denoiser, {tap: tensor (B,...)}, with their graph, in the order of execution.

        image_latent, noisy_latent: (B,C,h,w); timesteps: one or (B,); context: of one prompt or of B. timesteps and context
        may come from `prepare_timesteps` and `prepare_text`.
        """

    @abstractmethod
    def predict(self, image_latent, noisy_latent, timesteps, context):
        """The denoiser's prediction (B,C,h,w), in the scheduler's parameterisation; arguments as those of `features`."""

    def word_positions(self, text):
        """The positions of the text's own tokens in its context: neither start, end nor padding."""
        raise ValueError(f"{self.name} does not tell where words stand in its context")

    # -- size, memory and report ---------------------------------------------------------------------------------------

    @property
    def working_size(self):
        """The long side, in pixels, that pictures are edited at."""
        return self.defaults.size

    @property
    def is_small(self):
        """True where the working size is below 512: activations are small, and smaller pictures are scaled up to it."""
        return self.working_size < 512

    @property
    def networks(self):
        """The networks whose activations may be computed again in the backward pass."""
        return [network for network in (self.denoiser, self.vae) if network is not None]

    @property
    def checkpointing(self):
        """True where the networks compute their activations again in the backward pass, instead of keeping them."""
        return self._checkpointing

    @checkpointing.setter
    def checkpointing(self, value):
        self._checkpointing = value
        for network in self.networks:
            network.checkpointing = value

    @property
    def streaming(self):
        """True if a denoiser that is able to holds one block's weights at a time: see models/first_use.py."""
        return self._streaming

    @streaming.setter
    def streaming(self, value):
        self._streaming = value
        for network in self.networks:
            if hasattr(network, "streaming"):
                network.streaming = value

    def forget_text(self):
        """Release the text encoders until they are needed again."""

    def wait(self):
        """Keep the weights of the networks in main memory until the editor is used again: see `several.py`."""
        if self.device.type != "cpu" and not self._waiting:
            self._waiting = True
            send_weights(self.networks, torch.device("cpu"))

    def come(self):
        """Send the weights back to the device after `wait`."""
        if self._waiting:
            self._waiting = False
            send_weights(self.networks, self.device)

    def provenance(self):
        """The editor as a report states it: the source of its weights, their hashes, and how it samples."""
        checkpoint = self.checkpoint
        return {
            "name": self.name, "source": getattr(checkpoint, "source", None),
            "revision": getattr(checkpoint, "revision", None),
            "weights": checkpoint.hashes() if checkpoint else {}, "scheduler": self.scheduler.config.sampler,
            "scheduler_note": self.scheduler.note, "defaults": asdict(self.defaults),
            "dtype": str(self.dtype).removeprefix("torch."), "vae_dtype": str(self.vae_dtype).removeprefix("torch."),
            "device": self.device.type, "notice": self.notice,
        }

    # -- what the methods use ------------------------------------------------------------------------------------------

    def frame(self, width, height, size=None):
        """(height, width) at which a picture of this size is edited: see `images.working_size`."""
        size = size or self.defaults.size
        width, height = images.working_size(width, height, limit=size, multiple=self.multiple,
                                            upscale=self.is_small)
        return height, width

    @property
    def multiple(self):
        """The number that both sides of a working size are multiples of."""
        return self.vae.factor if self.vae else 8

    def fitted(self, picture, size=None):
        """A PIL picture in RGB at the size at which it is edited."""
        height, width = self.frame(*picture.size, size)
        return picture.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)

    def resize(self, pixels, size=None):
        """Pixels of any size -> the working size, by the filter that `edit` uses (antialiased Lanczos), differentiably."""
        height, width = self.frame(pixels.shape[3], pixels.shape[2], size)
        return images.resize(pixels, height, width)

    def encode(self, pixels):
        """Pixels (B,3,H,W) in [0,1] at the working size -> the image latent (B,C,h,w), in float32 or wider."""
        return self.posterior(pixels)[0]

    def posterior(self, pixels):
        """Mean and log variance of the VAE's posterior, (B,C,h,w) each; of a tiny autoencoder the latent alone, (latent,).

        Only the network itself runs in its dtype: budget and gradients are summed in float32.
        """
        self.come()
        pixels = 2 * wide(pixels.to(self.device)) - 1
        return tuple(wide(moment) for moment in in_dtype(self.vae_dtype, self.vae.encode, pixels))

    def decode(self, latent):
        """A latent as the sampler leaves it (B,C,h,w) -> pixels in [0,1], not clipped."""
        latent = wide(latent) / self.vae.config.scaling_factor + self.shift_factor
        return wide(in_dtype(self.vae_dtype, self.vae.decode, latent)) / 2 + 0.5

    @property
    def shift_factor(self):
        """The number that is subtracted from an image latent before it is scaled."""
        return self.vae.config.shift_factor

    def scaled(self, image_latent):
        """The latent z in the scale that the denoiser works at."""
        return (image_latent - self.shift_factor) * self.vae.config.scaling_factor

    @property
    def vae_dtype(self):
        return next(self.vae.parameters()).dtype if self.vae else self.dtype

    def contexts(self, prompts):
        """One context for each prompt, all encoded at once: the text encoders are loaded no more than once."""
        return apart(self.context(prompts))

    def timesteps(self, count):
        """`count` timesteps, (count,), evenly spaced over what a default edit visits, noisiest first."""
        if count < 1:
            raise ValueError(f"{count} timesteps: at least one is needed")
        visited = self.plan().timesteps
        highest = math.floor(visited.max())                  # an edit at a strength sees nothing noisier
        lowest = min(max(float(visited.min()), LOWEST_TIMESTEP), highest)
        if count == 1:
            return torch.tensor([round((highest + lowest) / 2)])
        return torch.linspace(highest, lowest, count).round().long()

    def plan(self, steps=None):
        """The timesteps and transitions of an edit: see `models/schedulers.py`."""
        return self.scheduler.plan(self.defaults.steps if steps is None else steps)

    def plan_at(self, height, width, steps=None, **options):
        """The plan of an edit at this size in pixels; only some schedulers depend on it. options: of `plan`."""
        return self.plan(steps, **options)

    def noise_latent(self, image_latent, noise, timesteps):
        """The noisy latent z_t of a picture; noise (B,C,h,w) standard normal, timesteps (B,)."""
        return self.scheduler.add_noise(self.scaled(image_latent), noise.to(image_latent), timesteps)

    def noise_prediction(self, prediction, noisy_latent, timesteps):
        """The noise (B,C,h,w) that a prediction implies in noisy_latent, for each parameterisation of the scheduler."""
        if isinstance(self.scheduler, FlowScheduler):        # z_sigma = (1 - sigma) z + sigma noise, v = noise - z
            (sigma,) = self.scheduler.shares(timesteps, noisy_latent)
            return noisy_latent + (1 - sigma) * prediction
        if self.scheduler.config.prediction_type == "epsilon":
            return prediction
        kept, lost = self.scheduler.shares(timesteps, noisy_latent)                      # z_t = sqrt(a) z + sqrt(1-a) noise
        if self.scheduler.config.prediction_type == "v_prediction":                      # v = sqrt(a) noise - sqrt(1-a) z
            return lost * noisy_latent + kept * prediction
        return (noisy_latent - kept * prediction) / lost                                 # "sample": z itself

    def prepare_text(self, context):
        """A context for many calls of `features`: what the denoiser computes from the text alone is computed once."""
        return context

    def prepare_timesteps(self, timesteps, context):
        """Timesteps for many calls of `features` with this context: what they add to each block is computed once."""
        return timesteps

    # -- the edit ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def edit(self, image, prompt, *, negative_prompt="", seed=0, steps=None, guidance=None, image_guidance=None,
             true_guidance=None, strength=None, size=None, on_step=None):
        """Edit pictures as the published pipeline does; PIL in, PIL out, of the input's size (lists in, list out).

        `steps` are denoising steps and `guidance` weighs the text (defaults: `self.defaults`); `image_guidance` weighs the
        image latent, for instruction editors; `strength`, for img2img, is the share of the denoising steps that is run; a
        larger one changes more. Where guidance <= 1 or image_guidance < 1 there is no guidance, as in the pipelines. FLUX.1
        takes `guidance` as an input of its network; `true_guidance` > 1 is its guidance by a second pass. Every picture of a
        batch draws from its own generator seeded with `seed`, so a batch gives what single calls give.
        """
        self.come()
        options = {"image_guidance": image_guidance, "true_guidance": true_guidance, "strength": strength}
        options = {key: value for key, value in options.items() if value is not None}
        if wrong := sorted(options.keys() - self.OPTIONS):
            raise ValueError(f"{self.name} has no {wrong[0]}; it takes steps, guidance and {', '.join(self.OPTIONS)}")
        pictures, prompts = _lists(image, prompt)
        results = [None] * len(pictures)
        groups = {}
        for i, picture in enumerate(pictures):
            groups.setdefault(self.frame(*picture.size, size), []).append(i)
        for (height, width), members in groups.items():
            pixels = torch.cat([images.to_pixels(self.fitted(pictures[i], size)) for i in members])
            texts = [prompts[i] for i in members]

            def run(plan, pixels=pixels, texts=texts):
                apart = plan != memory.EDIT_PLANS[0]
                with full_float32():
                    return torch.cat([
                        self.sample(part, texts[i:i + len(part)], negative_prompt=negative_prompt, seeds=[seed] * len(part),
                                    steps=steps, guidance=guidance, on_step=on_step, one_pass=apart, **options)
                        for i, part in enumerate(pixels.split(1 if apart else len(pixels)))])

            edited, _ = memory.first_fitting(run, memory.edit_plans(self), self, job=("edit", len(members)),
                                             size=height * width, advice="a smaller picture or --size, a narrower dtype, or "
                                                                         "--no-t5 with Stable Diffusion 3")
            if not edited.isfinite().all():                  # as 8 bits it would look like an edit that was defeated
                raise ValueError(f"the edit is not a finite picture: {self._likely_cause()}")
            for i, output in zip(members, edited.split(1), strict=True):
                picture = images.to_image(output)
                results[i] = picture if picture.size == pictures[i].size else picture.resize(pictures[i].size,
                                                                                             Image.Resampling.LANCZOS)
        return results[0] if isinstance(image, Image.Image) and isinstance(prompt, str) else results

    def _likely_cause(self):
        """The likely cause of an edit with infinite or undefined values, and the remedy."""
        for network, dtype, option in ((self.denoiser, self.dtype, "--dtype"), (self.vae, self.vae_dtype, "--vae-dtype")):
            if network is None:
                continue
            for name, weight in network.named_parameters():
                if not weight.is_meta and not weight.isfinite().all():
                    return f"the weights hold such values, in {name} of the {type(network).__name__}; fetch them again"
            if dtype == torch.float16:
                return (f"float16 ends at 65504, and activations of the {type(network).__name__} may exceed it; "
                        f"{option} bfloat16 or float32 has no such limit")
        return ("the guidance, the number of steps or the scheduler's config may drive the latents beyond all bounds; the "
                "editor's defaults are the place to start from")

    def sample(self, pixels, prompts, *, negative_prompt="", seeds, steps=None, guidance=None, strength=None, one_pass=False,
               on_step=None, **weights):
        """Pixels (B,3,H,W) in [0,1] at a working size -> edited pixels, not clipped. Differentiable if the caller wants it.

        one_pass: run the passes of the guidance one after the other, for memory. weights: the other arguments of `guide`.
        """
        guide, predict = self.guide(guidance, **weights), self.predictor(guidance)
        plan = self.plan_at(*pixels.shape[2:], steps, **({} if strength is None else {"strength": strength}))
        if plan.fault:
            raise ValueError(plan.fault)
        if guide is UNGUIDED:
            context = empty = self.context(prompts)
        else:                                                # encoded at once: the text encoders are loaded once
            *contexts, empty = self.contexts([*prompts, negative_prompt])
            context, empty = together(contexts), together([empty] * len(prompts))
        if self.streaming:
            self.forget_text()
        image_latent, latent, draw = self.start(pixels, plan, seeds)
        latent = self.denoise(latent.to(self.dtype), plan, image_latent, context, empty, guide=guide, draw=draw,
                              predict=one_by_one(predict) if one_pass else predict, on_step=on_step)
        return self.decode(latent)

    def denoise(self, latent, plan, image_latent, context, empty, *, guide, draw=None, predict=None, on_step=None):
        """Take a latent (B,C,h,w) through all steps of a plan; returns the last one.

        context, empty: of the prompts and of the negative prompt. guide: a `Guidance`. draw() -> fresh noise like the
        latent, needed where the plan draws it. predict: called in place of `self.predict`.
        """
        predict = predict or self.predict
        image_latents, contexts = guide.inputs(image_latent, context, empty)
        for i, timestep in enumerate(plan.timesteps):
            noisy = torch.cat([plan.scale_input(latent, i)] * len(guide.views))
            prediction = guide(predict(image_latents, noisy, timestep, contexts))
            latent = plan.step(prediction, i, latent, draw() if plan.draws_noise else None)
            if on_step:
                on_step(i, len(plan.timesteps))
        return latent

    def guide(self, guidance=None, image_guidance=None):
        """The `Guidance` of an edit with these weights (None: the defaults), `UNGUIDED` where the pipelines use none."""
        guidance = self.defaults.guidance if guidance is None else guidance
        image_guidance = self.defaults.image_guidance if image_guidance is None else image_guidance
        if guidance <= 1 or self.kind == "instruct" and image_guidance < 1:
            return UNGUIDED
        return over_text_and_picture(guidance, image_guidance) if self.kind == "instruct" else over_text(guidance)

    def predictor(self, guidance=None):
        """The function that an edit with this guidance calls in place of `predict`, where the guidance is an input of it."""
        return self.predict

    def start(self, pixels, plan, seeds):
        """(image latent, first latent, draw) of an edit: draw() continues the noise, each picture's from its own seed."""
        image_latent = self.encode(pixels)
        draw = self.draws(seeds, image_latent.shape[1:])
        return image_latent, self.first_latent(image_latent, draw(), plan), draw

    def first_latent(self, image_latent, noise, plan):
        """The latent that a plan starts from, (B,C,h,w); noise is standard normal."""
        return noise * plan.sigma_start

    def draws(self, seeds, shape):
        """A function that draws standard normal noise (B, *shape), every picture's from its own generator."""
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]

        def draw(dtype=self.dtype):
            return sent(torch.cat([torch.randn((1, *shape), generator=generator, dtype=dtype) for generator in generators]),
                        self.device)

        return draw


NEEDED = ("name", "kind", "device", "dtype", "defaults", "notice", "OPTIONS", "scheduler", "tap_names", "default_taps",
          "context", "features", "predict", "encode", "decode", "scaled", "contexts", "timesteps", "plan", "plan_at",
          "noise_latent", "noise_prediction", "prepare_text", "prepare_timesteps", "resize", "frame", "edit", "guide",
          "denoise", "first_latent", "forget_text", "checkpointing", "is_small", "provenance", "probs_names", "word_positions")


def check(editor):
    """Raise ValueError, in one sentence, where an editor lacks something that methods or commands use."""
    missing = [name for name in NEEDED if not _has(editor, name)]
    if isinstance(editor, Editor) and getattr(editor, "vae", None) is None:
        missing += [name for name in ("encode", "decode", "scaled") if getattr(type(editor), name) is getattr(Editor, name)]
    if missing:
        kind = editor if isinstance(editor, type) else type(editor)
        raise ValueError(f"the editor {kind.__name__} lacks {', '.join(missing)}; derive it from {Editor.__module__}.Editor, "
                         "which has defaults for most of an editor and says what the rest is")


def _has(editor, name):
    """True if an object has this attribute, and not only a method that is still to be written; no property is computed."""
    attribute = inspect.getattr_static(editor, name, None)
    if attribute is None and hasattr(type(editor), "__getattr__"):
        return hasattr(editor, name)
    return attribute is not None and not getattr(attribute, "__isabstractmethod__", False)


def on(timesteps, device):
    """Timesteps, plain or prepared, on a device."""
    return timesteps if isinstance(timesteps, Prepared) else sent(timesteps, device)


def wide(tensor):
    """A tensor in float32, unless it is wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _lists(image, prompt):
    """(pictures, prompts), equally many; one of either serves for all of the other."""
    pictures = list(image) if isinstance(image, list | tuple) else [image]
    prompts = list(prompt) if isinstance(prompt, list | tuple) else [prompt]
    for values, kind, wanted in ((pictures, Image.Image, "PIL pictures"), (prompts, str, "prompts, as text")):
        if wrong := [value for value in values if not isinstance(value, kind)]:
            raise ValueError(f"edit takes {wanted}; it got {type(wrong[0]).__name__}")
    if not pictures or not prompts:
        raise ValueError("edit needs at least one picture and one prompt")
    count = max(len(pictures), len(prompts))
    if {len(pictures), len(prompts)} - {1, count}:
        raise ValueError(f"edit got {len(pictures)} pictures and {len(prompts)} prompts; "
                         "give one of either, or as many of both")
    return pictures * (count // len(pictures)), prompts * (count // len(prompts))
