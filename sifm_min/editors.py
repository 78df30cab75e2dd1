"""Editors: networks, scheduler and text encoder that turn a picture and an instruction into an edited picture.

`load_editor` reads a shipped editor, a folder in the published (diffusers) layout, or a hub repository. Pictures are PIL
images; `pixels` are (B,3,H,W) in [0,1]; the [-1,1] that the VAE wants exists only in this file. A *condition* is what
InstructPix2Pix sees of the picture: the VAE posterior's mean, unscaled (Brooks et al. 2023, section 3.2). The methods
reach the editor through `encode`, `noise_latent`, `features` and `predict`, all differentiable.
"""

import json
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from . import images
from .models import checkpoints, schedulers
from .models.clip import CLIPText
from .models.tokenizers import CLIPTokenizer
from .models.unet import UNet, default_taps
from .models.vae import AutoencoderKL

COMPONENTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
LOWEST_TIMESTEP = 50                                         # below it the noisy latent is the picture itself


@dataclass(frozen=True)
class Defaults:
    """What an edit uses unless told otherwise: denoising steps, the two guidances, and the working size (long side)."""

    steps: int = 100
    guidance: float = 7.5
    image_guidance: float = 1.5
    size: int = 512


# InstructPix2Pix: the published pipeline's defaults. HQ-Edit: its README and demo (text 7.0, image 1.5, 512, 30 steps).
DEFAULTS = {"instruct-pix2pix": Defaults(), "hq-edit": Defaults(steps=30, guidance=7.0)}


def load_editor(source="miniature", *, device=None, dtype=None, revision=None, offline=None):
    """The editor called `source`: a known name (`checkpoints.EDITORS`), a folder in the published layout, or a hub id.

    `device` defaults to cuda where there is one, `dtype` (of U-Net and text encoder; the VAE stays in float32, since
    half-precision VAEs overflow) to bfloat16 on cuda and float32 elsewhere. Raises `checkpoints.Unavailable` where the
    weights cannot be had and ValueError where they do not fit; both in one sentence.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    checkpoint = checkpoints.open_checkpoint(source, COMPONENTS, revision=revision, offline=offline)
    name = str(source)
    try:
        index = dict(json.loads(checkpoint.text("model_index.json"))) if checkpoint.has("model_index.json") else {}
    except (ValueError, TypeError) as error:
        raise ValueError(f"{name}: model_index.json is not a JSON object ({error}); fetch it again") from None
    if (pipeline := index.get("_class_name", InstructPix2Pix.PIPELINE)) != InstructPix2Pix.PIPELINE:
        raise ValueError(f"{name} is a {pipeline}; only {InstructPix2Pix.PIPELINE} is implemented")
    # The published repositories' stored sampler is not the one that anybody, their authors included, edits with.
    text = checkpoint.text("scheduler/scheduler_config.json")
    return InstructPix2Pix(
        name=name,
        unet=checkpoint.load(UNet, "unet", device=device, dtype=dtype),
        vae=checkpoint.load(AutoencoderKL, "vae", device=device, dtype=torch.float32),
        text_encoder=checkpoint.load(CLIPText, "text_encoder", device=device, dtype=dtype),
        tokenizer=CLIPTokenizer.from_folder(checkpoint.folder / "tokenizer"),
        scheduler=schedulers.load(text, ancestral=name in DEFAULTS),
        defaults=Defaults(**index["_sifm_min"]["defaults"]) if "_sifm_min" in index else DEFAULTS.get(name, Defaults()),
        notice=index.get("_sifm_min", {}).get("notice", ""),
        checkpoint=checkpoint,
    )


class InstructPix2Pix:
    """InstructPix2Pix, and HQ-Edit, which is the same networks trained on other data.

    `tap_names` lists what `features` can return, `default_taps` what SIFM perturbs; `working_size` is the long side that
    pictures are edited at; `notice` is a sentence that belongs beside every result of a shipped miniature.
    """

    PIPELINE = "StableDiffusionInstructPix2PixPipeline"
    kind = "instruct"                                        # the picture is a condition beside a latent of pure noise

    def __init__(self, *, name, unet, vae, text_encoder, tokenizer, scheduler, defaults=None, notice="",
                 checkpoint=None):
        self.name, self.unet, self.vae, self.text_encoder = name, unet, vae, text_encoder
        self.tokenizer, self.scheduler, self.checkpoint = tokenizer, scheduler, checkpoint
        self.defaults, self.notice = defaults or Defaults(), notice
        if unet.config.in_channels != 2 * vae.config.latent_channels:
            raise ValueError(f"{name}: the U-Net takes {unet.config.in_channels} channels; an instruction editor takes "
                             f"{2 * vae.config.latent_channels}, the noisy latent and the picture's")
        if unet.config.cross_attention_dim != text_encoder.config.hidden_size:
            raise ValueError(f"{name}: the U-Net attends to {unet.config.cross_attention_dim} channels of text, "
                             f"the text encoder has {text_encoder.config.hidden_size}")

    @property
    def device(self):
        return next(self.unet.parameters()).device

    @property
    def dtype(self):
        return next(self.unet.parameters()).dtype

    @property
    def working_size(self):
        return self.defaults.size

    @property
    def tap_names(self):
        return self.unet.tap_names

    @property
    def default_taps(self):
        return default_taps(self.unet.config)

    def provenance(self):
        """What a report states of the editor: where its weights come from, their hashes, and how it samples."""
        checkpoint = self.checkpoint
        return {
            "name": self.name, "source": getattr(checkpoint, "source", None),
            "revision": getattr(checkpoint, "revision", None),
            "weights": checkpoint.hashes() if checkpoint else {}, "scheduler": self.scheduler.config.sampler,
            "scheduler_note": self.scheduler.note,
            "dtype": str(self.dtype).removeprefix("torch."), "device": self.device.type, "notice": self.notice,
        }

    # -- what the methods use ------------------------------------------------------------------------------------------

    def frame(self, width, height, size=None):
        """(height, width) at which a picture of this size is edited: see `images.working_size`."""
        size = size or self.defaults.size
        upscale = self.defaults.size < 512                   # a miniature sees nothing in less than its own size
        width, height = images.working_size(width, height, limit=size, multiple=self.vae.factor, upscale=upscale)
        return height, width

    def resize(self, pixels, size=None):
        """Pixels of any size -> the working size, by the filter that `edit` uses (antialiased Lanczos), differentiably."""
        height, width = self.frame(pixels.shape[3], pixels.shape[2], size)
        return images.resize(pixels, height, width)

    def encode(self, pixels):
        """Pixels (B,3,H,W) in [0,1] at the working size -> the image condition (B,C,H/8,W/8), in the VAE's dtype."""
        mean, _ = self.vae.encode(2 * pixels.to(self.device, self.vae_dtype) - 1)
        return mean

    def decode(self, latent):
        """A latent as the sampler leaves it (B,C,h,w) -> pixels in [0,1], not clipped."""
        return self.vae.decode(latent.to(self.vae_dtype) / self.vae.config.scaling_factor) / 2 + 0.5

    @property
    def vae_dtype(self):
        return next(self.vae.parameters()).dtype

    def context(self, prompts):
        """Prompts -> text context (B, tokens, C): the last state of CLIP after its final norm."""
        ids = torch.tensor(self.tokenizer(list(prompts)), device=self.device)
        return self.text_encoder(ids).last

    def timesteps(self, count):
        """`count` timesteps, (count,), evenly spaced over what a default edit visits, noisiest first."""
        if count < 1:
            raise ValueError(f"{count} timesteps: at least one is needed")
        visited = self.scheduler.plan(self.defaults.steps).timesteps
        highest, lowest = float(visited.max()), max(float(visited.min()), LOWEST_TIMESTEP)
        if count == 1:
            return torch.tensor([round((highest + lowest) / 2)])
        return torch.linspace(highest, lowest, count).round().long()

    def scaled(self, condition):
        """The latent z of a picture given by its condition, in the scale that the denoiser denoises at."""
        return condition * self.vae.config.scaling_factor

    def noise_latent(self, condition, noise, timesteps):
        """The noisy latent z_t of a picture given by its condition; noise (B,C,h,w) standard normal, timesteps (B,)."""
        return self.scheduler.add_noise(self.scaled(condition), noise.to(condition), timesteps.to(condition.device))

    def features(self, condition, noisy_latent, timesteps, context, *, taps):
        """Activations of the U-Net, name -> tensor, live; the forward pass ends at the last tap."""
        return self.unet.features(*self._inputs(condition, noisy_latent, timesteps), context, taps=taps)

    def predict(self, condition, noisy_latent, timesteps, context):
        """The U-Net's prediction (B,C,h,w), in the scheduler's parameterisation."""
        return self.unet(*self._inputs(condition, noisy_latent, timesteps), context)

    def noise_prediction(self, prediction, noisy_latent, timesteps):
        """The noise (B,C,h,w) that a prediction takes to be in noisy_latent, whatever the network was trained to predict."""
        if self.scheduler.config.prediction_type == "epsilon":
            return prediction
        kept = self.scheduler.alphas_cumprod_at(timesteps).reshape(-1, 1, 1, 1)          # z_t = sqrt(a) z + sqrt(1-a) noise
        kept, lost = kept.sqrt().to(noisy_latent), (1 - kept).sqrt().to(noisy_latent)
        if self.scheduler.config.prediction_type == "v_prediction":                      # v = sqrt(a) noise - sqrt(1-a) z
            return lost * noisy_latent + kept * prediction
        return (noisy_latent - kept * prediction) / lost                                 # "sample": z itself

    def _inputs(self, condition, noisy_latent, timesteps):
        # Only the network itself runs in its dtype: noise, noising and the sum of gradients stay in float32.
        return torch.cat([noisy_latent, condition], 1).to(self.dtype), timesteps.to(condition.device)

    # -- what the attacker uses ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def edit(self, image, prompt, *, negative_prompt="", seed=0, steps=None, guidance=None, image_guidance=None,
             size=None, on_step=None):
        """Edit pictures as the published pipeline does; PIL in, PIL out, of the input's size (lists in, list out).

        `steps` are denoising steps; `guidance` and `image_guidance` weigh text and picture (defaults: `self.defaults`),
        and where guidance <= 1 or image_guidance < 1 there is no guidance, as in the pipeline. Every picture of a batch
        draws from its own generator seeded with `seed`, so a batch gives what single calls give.
        """
        pictures, prompts = _lists(image, prompt)
        results = [None] * len(pictures)
        groups = {}
        for i, picture in enumerate(pictures):
            groups.setdefault(self.frame(*picture.size, size), []).append(i)
        for (height, width), members in groups.items():
            pixels = torch.cat([_pixels(pictures[i].convert("RGB").resize((width, height), Image.Resampling.LANCZOS))
                                for i in members])
            edited = self.sample(pixels, [prompts[i] for i in members], negative_prompt=negative_prompt,
                                 seeds=[seed] * len(members),
                                 steps=steps, guidance=guidance, image_guidance=image_guidance, on_step=on_step)
            if not edited.isfinite().all():                  # as 8 bits it would look like an edit that was defeated
                raise ValueError("the edit is not a finite picture; a wider dtype, such as float32, or a smaller guidance "
                                 "may help")
            for i, output in zip(members, edited, strict=True):
                array = output.clamp(0, 1).permute(1, 2, 0).float().cpu().numpy()
                picture = Image.fromarray((array * 255).round().astype(np.uint8))
                results[i] = picture if picture.size == pictures[i].size else picture.resize(pictures[i].size,
                                                                                             Image.Resampling.LANCZOS)
        return results[0] if isinstance(image, Image.Image) and isinstance(prompt, str) else results

    def sample(self, pixels, prompts, *, negative_prompt="", seeds, steps=None, guidance=None, image_guidance=None,
               on_step=None):
        """Pixels (B,3,H,W) in [0,1] at a working size -> edited pixels, not clipped. Differentiable if the caller wants it."""
        guidance = self.defaults.guidance if guidance is None else guidance
        image_guidance = self.defaults.image_guidance if image_guidance is None else image_guidance
        guided = guidance > 1 and image_guidance >= 1
        condition, context = self.encode(pixels), self.context(prompts)
        if guided:                                           # three passes: text and picture, picture alone, neither
            nothing = self.context([negative_prompt]).expand_as(context)
            context = torch.cat([context, nothing, nothing])
            condition = torch.cat([condition, condition, torch.zeros_like(condition)])
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        shape = (1, *condition.shape[1:])

        def draw():
            return torch.cat([torch.randn(shape, generator=generator, dtype=self.dtype)
                              for generator in generators]).to(self.device)

        plan = self.scheduler.plan(self.defaults.steps if steps is None else steps)
        latent = draw() * plan.sigma_start
        for i, timestep in enumerate(plan.timesteps):
            noisy = plan.scale_input(latent, i)
            prediction = self.predict(condition, torch.cat([noisy] * 3) if guided else noisy, timestep, context)
            if guided:
                full, image_only, neither = prediction.chunk(3)
                prediction = neither + guidance * (full - image_only) + image_guidance * (image_only - neither)
            latent = plan.step(prediction, i, latent, draw() if plan.draws_noise else None)
            if on_step:
                on_step(i, len(plan.timesteps))
        return self.decode(latent)


def _pixels(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255


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
