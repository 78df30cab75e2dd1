"""Editors: networks, scheduler and text encoder that turn a picture and an instruction into an edited picture.

`load_editor` reads a shipped editor, a folder in the published (diffusers) layout, a single file of Stable Diffusion 3,
or a hub repository. Pictures are PIL images; `pixels` are (B,3,H,W) in [0,1]; the [-1,1] that the VAE wants exists only in
this file. A *condition* is what an editor is given of the picture: the VAE posterior's mean, unscaled. InstructPix2Pix and
UltraEdit see it beside a latent of pure noise; Stable Diffusion 3 denoises a noisy latent of the picture itself. The methods
reach every editor through the same calls: `encode`, `noise_latent`, `features` and `predict`, all differentiable, and a
`context` made of prompts, which only the editor looks into.
"""

import math
import warnings
from collections import OrderedDict
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from . import images
from .models import checkpoints, mmdit, schedulers, unet
from .models.clip import CLIPText
from .models.lean import Prepared, frozen
from .models.mmdit import MMDiT
from .models.t5 import T5Encoder
from .models.tokenizers import CLIPTokenizer, T5Tokenizer
from .models.unet import UNet
from .models.vae import AutoencoderKL

LOWEST_TIMESTEP = 50                                         # below it the noisy latent is the picture itself


@dataclass(frozen=True)
class Defaults:
    """What an edit uses unless told otherwise: denoising steps, the two guidances, the working size (long side), and for
    Stable Diffusion 3 the strength of img2img and how many tokens T5 reads."""

    steps: int = 100
    guidance: float = 7.5
    image_guidance: float = 1.5
    size: int = 512
    strength: float = 0.6
    text_length: int = 256


# InstructPix2Pix, SD3: the published pipelines' defaults. HQ-Edit: its README and demo (text 7.0, image 1.5, 512, 30 steps).
# UltraEdit: its authors' example (7.5, 1.5, 50 steps, 512); its own pipeline gives T5 as many tokens as CLIP.
SD3, ULTRAEDIT = Defaults(steps=50, guidance=7.0), Defaults(steps=50, text_length=77)
DEFAULTS = {"instruct-pix2pix": Defaults(), "hq-edit": Defaults(steps=30, guidance=7.0), "sd3": SD3, "ultraedit": ULTRAEDIT}


def load_editor(source="miniature", *, device=None, dtype=None, vae_dtype=None, revision=None, offline=None, t5=True,
                components=None):
    """The editor called `source`: a known name (`checkpoints.EDITORS`), a folder in the published layout, a single file of
    Stable Diffusion 3, or a hub id.

    `device` defaults to cuda where there is one, `dtype` (of denoiser and text encoders) to bfloat16 on cuda and float32
    elsewhere. `vae_dtype` defaults to float32 everywhere: pictures decoded in bfloat16 are a step or two of 1/255 off, and
    some VAEs overflow in float16. t5 False does without Stable Diffusion 3's
    largest text encoder, as its pipeline allows, and does not fetch it. components: for a single file, where the parts
    come from that it lacks (a folder, "sd3", or a hub id; default: its own folder). Raises `checkpoints.Unavailable` where
    the weights cannot be had and ValueError where they do not fit; both in one sentence.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    checkpoint = checkpoints.open_checkpoint(source, t5=t5, revision=revision, offline=offline, rest=components)
    name, index = str(source), checkpoint.index
    kind = next((kind for kind in EDITORS if index.get("_class_name") in kind.PIPELINES), InstructPix2Pix)
    if kind is StableDiffusion3:
        config = checkpoint.check(MMDiT, "transformer")
        if config.in_channels > config.out_channels:         # saved by a pipeline of the plain class's name
            kind = UltraEdit
    own = index.get("_sifm_min", {})
    defaults = replace(DEFAULTS.get(name, kind.DEFAULTS), **own.get("defaults", {}))
    return kind.load(checkpoint, name=name, device=device, dtype=dtype, vae_dtype=vae_dtype or torch.float32,
                     defaults=defaults, notice=own.get("notice", ""))


class Editor:
    """What all editors have in common.

    `tap_names` lists what `features` can return, and at a cost `probs_names`, the attention maps; `default_taps` is what SIFM
    perturbs; `working_size` is the long side that
    pictures are edited at; `notice` is a sentence that belongs beside every result of a shipped miniature. `kind` is
    "instruct" where the picture is a condition beside a latent of pure noise, "img2img" where it is the noisy latent.
    """

    kind = "instruct"
    OPTIONS = frozenset({"image_guidance"})                  # what `edit` takes besides steps and guidance

    def __init__(self, *, name, vae, scheduler, device, dtype, defaults, notice="", checkpoint=None):
        self.name, self.vae, self.scheduler, self.checkpoint = name, vae, scheduler, checkpoint
        self.device, self.dtype, self.defaults, self.notice = torch.device(device), dtype, defaults, notice

    @property
    def working_size(self):
        return self.defaults.size

    @property
    def is_miniature(self):
        return self.defaults.size < 512

    @property
    def checkpointing(self):
        """Whether the networks compute their activations again on the way back, instead of keeping them."""
        return self.vae.checkpointing

    @checkpointing.setter
    def checkpointing(self, value):
        self.denoiser.checkpointing = self.vae.checkpointing = value

    def forget_text(self):
        """Lets go of what reads prompts, until it is needed again."""

    def provenance(self):
        """What a report states of the editor: where its weights come from, their hashes, and how it samples."""
        checkpoint = self.checkpoint
        return {
            "name": self.name, "source": getattr(checkpoint, "source", None),
            "revision": getattr(checkpoint, "revision", None),
            "weights": checkpoint.hashes() if checkpoint else {}, "scheduler": self.scheduler.config.sampler,
            "scheduler_note": self.scheduler.note, "defaults": asdict(self.defaults),
            "dtype": str(self.dtype).removeprefix("torch."), "vae_dtype": str(self.vae_dtype).removeprefix("torch."),
            "device": self.device.type,
            "notice": self.notice,
        }

    # -- what the methods use ------------------------------------------------------------------------------------------

    def frame(self, width, height, size=None):
        """(height, width) at which a picture of this size is edited: see `images.working_size`."""
        size = size or self.defaults.size
        width, height = images.working_size(width, height, limit=size, multiple=self.multiple,
                                            upscale=self.is_miniature)     # which sees nothing in less than its own size
        return height, width

    @property
    def multiple(self):
        """What both sides of a working size are multiples of."""
        return self.vae.factor

    def resize(self, pixels, size=None):
        """Pixels of any size -> the working size, by the filter that `edit` uses (antialiased Lanczos), differentiably."""
        height, width = self.frame(pixels.shape[3], pixels.shape[2], size)
        return images.resize(pixels, height, width)

    def encode(self, pixels):
        """Pixels (B,3,H,W) in [0,1] at the working size -> the image condition (B,C,H/8,W/8), in float32 or wider."""
        return self.posterior(pixels)[0]

    def posterior(self, pixels):
        """Mean and log variance of the VAE's posterior. Only the network itself runs in its dtype: budget and gradients are
        of float32, in which they add up."""
        pixels = 2 * _wide(pixels.to(self.device)) - 1
        return tuple(_wide(moment) for moment in self.vae.encode(pixels.to(self.vae_dtype)))

    def decode(self, latent):
        """A latent as the sampler leaves it (B,C,h,w) -> pixels in [0,1], not clipped."""
        latent = _wide(latent) / self.vae.config.scaling_factor + self.shift
        return _wide(self.vae.decode(latent.to(self.vae_dtype))) / 2 + 0.5

    @property
    def shift(self):
        """What is subtracted from a latent before it is scaled."""
        return self.vae.config.shift_factor

    def scaled(self, condition):
        """The latent z of a picture given by its condition, in the scale that the denoiser denoises at."""
        return (condition - self.shift) * self.vae.config.scaling_factor

    @property
    def vae_dtype(self):
        return next(self.vae.parameters()).dtype

    def contexts(self, prompts):
        """One context for each prompt, all of them read at once: SD3's text encoders are loaded no more than once."""
        together = self.context(prompts)
        if isinstance(together, torch.Tensor):
            return list(together.split(1))
        return [type(together)(*parts) for parts in zip(*(part.split(1) for part in together), strict=True)]

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

    def noise_latent(self, condition, noise, timesteps):
        """The noisy latent z_t of a picture given by its condition; noise (B,C,h,w) standard normal, timesteps (B,)."""
        return self.scheduler.add_noise(self.scaled(condition), noise.to(condition), timesteps.to(condition.device))

    def prepare_text(self, context):
        """A context to be passed to `features` many times: what the denoiser makes of the text alone is computed once."""
        return self.denoiser.prepare_context(context) if frozen(self.denoiser) else context

    def prepare_timesteps(self, timesteps, context):
        """Timesteps to be passed to `features` many times, with this context: what they add to each block is computed once."""
        return self.denoiser.prepare_timestep(timesteps.to(self.device)) if frozen(self.denoiser) else timesteps

    # -- what the attacker uses ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def edit(self, image, prompt, *, negative_prompt="", seed=0, steps=None, guidance=None, image_guidance=None,
             strength=None, size=None, on_step=None):
        """Edit pictures as the published pipeline does; PIL in, PIL out, of the input's size (lists in, list out).

        `steps` are denoising steps and `guidance` weighs the text (defaults: `self.defaults`); `image_guidance` weighs the
        picture where it is a condition; `strength`, of img2img, is the share of the steps that is taken, and so how much
        may change. Where guidance <= 1 or image_guidance < 1 there is no guidance, as in the pipelines. Every picture of a
        batch draws from its own generator seeded with `seed`, so a batch gives what single calls give.
        """
        options = {"image_guidance": image_guidance, "strength": strength}
        options = {key: value for key, value in options.items() if value is not None}
        if wrong := sorted(options.keys() - self.OPTIONS):
            raise ValueError(f"{self.name} has no {wrong[0]}; it takes steps, guidance and {', '.join(self.OPTIONS)}")
        pictures, prompts = _lists(image, prompt)
        results = [None] * len(pictures)
        groups = {}
        for i, picture in enumerate(pictures):
            groups.setdefault(self.frame(*picture.size, size), []).append(i)
        for (height, width), members in groups.items():
            pixels = torch.cat([_pixels(pictures[i].convert("RGB").resize((width, height), Image.Resampling.LANCZOS))
                                for i in members])
            edited = self.sample(pixels, [prompts[i] for i in members], negative_prompt=negative_prompt,
                                 seeds=[seed] * len(members), steps=steps, guidance=guidance, on_step=on_step, **options)
            if not edited.isfinite().all():                  # as 8 bits it would look like an edit that was defeated
                raise ValueError("the edit is not a finite picture; a wider dtype, such as float32, or a smaller guidance "
                                 "may help")
            for i, output in zip(members, edited, strict=True):
                array = output.clamp(0, 1).permute(1, 2, 0).float().cpu().numpy()
                picture = Image.fromarray((array * 255).round().astype(np.uint8))
                results[i] = picture if picture.size == pictures[i].size else picture.resize(pictures[i].size,
                                                                                             Image.Resampling.LANCZOS)
        return results[0] if isinstance(image, Image.Image) and isinstance(prompt, str) else results

    def draws(self, seeds, shape):
        """A function that draws standard normal noise (B, *shape), every picture's from its own generator."""
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]

        def draw(dtype=self.dtype):
            return torch.cat([torch.randn((1, *shape), generator=generator, dtype=dtype)
                              for generator in generators]).to(self.device)

        return draw


class InstructPix2Pix(Editor):
    """InstructPix2Pix, and HQ-Edit, which is the same networks trained on other data (Brooks et al. 2023, section 3.2)."""

    PIPELINES = ("StableDiffusionInstructPix2PixPipeline",)
    DEFAULTS = Defaults()

    def __init__(self, *, unet, vae, text_encoder, tokenizer, scheduler, name, device=None, dtype=None, defaults=None,
                 notice="", checkpoint=None):
        weight = next(unet.parameters())                     # says both, unless it is still to be read
        super().__init__(name=name, vae=vae, scheduler=scheduler, device=device or weight.device,
                         dtype=dtype or weight.dtype, defaults=defaults or self.DEFAULTS, notice=notice,
                         checkpoint=checkpoint)
        self.unet, self.text_encoder, self.tokenizer = unet, text_encoder, tokenizer
        if unet.config.in_channels != 2 * vae.config.latent_channels:
            raise ValueError(f"{name}: the U-Net takes {unet.config.in_channels} channels; an instruction editor takes "
                             f"{2 * vae.config.latent_channels}, the noisy latent and the picture's")
        if unet.config.cross_attention_dim != text_encoder.config.hidden_size:
            raise ValueError(f"{name}: the U-Net attends to {unet.config.cross_attention_dim} channels of text, "
                             f"the text encoder has {text_encoder.config.hidden_size}")

    @classmethod
    def load(cls, checkpoint, *, name, device, dtype, vae_dtype, **more):
        # The published repositories' stored sampler is not the one that anybody, their authors included, edits with.
        scheduler = schedulers.load(checkpoint.text("scheduler/scheduler_config.json"), ancestral=name in DEFAULTS)
        if not isinstance(scheduler, schedulers.Scheduler):
            raise ValueError(f"{name}: scheduler_config.json is of rectified flow, which an InstructPix2Pix does not sample by")
        return cls(unet=checkpoint.load(UNet, "unet", device=device, dtype=dtype, lazily=True),
                   vae=checkpoint.load(AutoencoderKL, "vae", device=device, dtype=vae_dtype, lazily=True),
                   text_encoder=checkpoint.load(CLIPText, "text_encoder", device=device, dtype=dtype, lazily=True),
                   tokenizer=CLIPTokenizer.from_folder(checkpoint.path("tokenizer")),
                   scheduler=scheduler, name=name, device=device, dtype=dtype, checkpoint=checkpoint, **more)

    @property
    def tap_names(self):
        return self.unet.tap_names

    @property
    def default_taps(self):
        return unet.default_taps(self.unet.config)

    @property
    def probs_names(self):
        return self.unet.probs_names

    @property
    def denoiser(self):
        return self.unet

    def forget_text(self):
        if self.checkpoint:
            self.text_encoder = self.checkpoint.load(CLIPText, "text_encoder", device=self.device, dtype=self.dtype,
                                                     lazily=True)

    @property
    def shift(self):
        return 0.0                                           # its pipeline knows none

    def context(self, prompts):
        """Prompts -> text context (B, tokens, C): the last state of CLIP after its final norm."""
        prompts = list(prompts)
        for prompt in prompts:
            _warn_if_cut(prompt, len(self.tokenizer.encode(prompt)) + 2, self.tokenizer.length, "CLIP")
        ids = torch.tensor(self.tokenizer(prompts), device=self.device)
        return self.text_encoder(ids).last

    def features(self, condition, noisy_latent, timesteps, context, *, taps):
        """Activations of the U-Net, name -> tensor, live; the forward pass ends at the last tap."""
        return self.unet.features(*self._inputs(condition, noisy_latent, timesteps), context, taps=taps)

    def predict(self, condition, noisy_latent, timesteps, context):
        """The U-Net's prediction (B,C,h,w), in the scheduler's parameterisation."""
        return self.unet(*self._inputs(condition, noisy_latent, timesteps), context)

    def _inputs(self, condition, noisy_latent, timesteps):
        # Only the network itself runs in its dtype: noise, noising and the sum of gradients stay in float32.
        return torch.cat([noisy_latent, condition], 1).to(self.dtype), _on(timesteps, condition.device)

    def noise_prediction(self, prediction, noisy_latent, timesteps):
        """The noise (B,C,h,w) that a prediction takes to be in noisy_latent, whatever the network was trained to predict."""
        if self.scheduler.config.prediction_type == "epsilon":
            return prediction
        kept = self.scheduler.alphas_cumprod_at(timesteps).reshape(-1, 1, 1, 1)          # z_t = sqrt(a) z + sqrt(1-a) noise
        kept, lost = kept.sqrt().to(noisy_latent), (1 - kept).sqrt().to(noisy_latent)
        if self.scheduler.config.prediction_type == "v_prediction":                      # v = sqrt(a) noise - sqrt(1-a) z
            return lost * noisy_latent + kept * prediction
        return (noisy_latent - kept * prediction) / lost                                 # "sample": z itself

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
        draw = self.draws(seeds, condition.shape[1:])
        plan = self.plan(steps)
        latent = draw() * plan.sigma_start
        for i, timestep in enumerate(plan.timesteps):
            noisy = plan.scale_input(latent, i)
            prediction = self.predict(condition, torch.cat([noisy] * 3) if guided else noisy, timestep, context)
            if guided:
                prediction = three_ways(*prediction.chunk(3), guidance, image_guidance)
            latent = plan.step(prediction, i, latent, draw() if plan.draws_noise else None)
            if on_step:
                on_step(i, len(plan.timesteps))
        return self.decode(latent)


def _wide(tensor):
    """In float32, unless it is wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _on(timesteps, device):
    return timesteps if isinstance(timesteps, Prepared) else timesteps.to(device)


def three_ways(full, image_only, neither, guidance, image_guidance):
    """Classifier-free guidance over text and picture (Brooks et al. 2023, equation 3), of the network's predictions with
    both, with the picture alone, and with neither."""
    return neither + guidance * (full - image_only) + image_guidance * (image_only - neither)


# -- Stable Diffusion 3 --------------------------------------------------------------------------------------------------

class Text(NamedTuple):
    """What SD3 is told: states (B, L, C), CLIP's tokens and then T5's, and pooled (B, P), one vector for all of it."""

    states: torch.Tensor
    pooled: torch.Tensor


class TextEncoders:
    """SD3's text encoders as one: prompts -> `Text` (Esser et al. 2024, figure 2).

    The networks are read when new prompts come, one after the other, and let go again: together they are three times
    as large as the transformer. What was said of the last `KEPT` prompts is kept, and the usual negative prompt, "", is
    read along: an edit that follows, with the transformer in memory, need not read them again.
    """

    KEPT = 32

    def __init__(self, checkpoint, *, width, length, device, dtype):
        self.checkpoint, self.width, self.length, self.device, self.dtype = checkpoint, width, length, device, dtype
        self.clips = ("text_encoder", "text_encoder_2")
        configs = [checkpoint.check(CLIPText, component) for component in self.clips]
        self.tokenizers = [CLIPTokenizer.from_folder(checkpoint.path(name)) for name in ("tokenizer", "tokenizer_2")]
        lengths, places = [t.length for t in self.tokenizers], [config.max_position_embeddings for config in configs]
        if len(set(lengths)) > 1 or lengths[0] > min(places):
            raise ValueError(f"{checkpoint.source}: the tokenizers make {lengths[0]} and {lengths[1]} tokens of a prompt, "
                             f"the two CLIP have places for {places[0]} and {places[1]}")
        self.t5_tokenizer = None
        if "text_encoder_3" in checkpoint.components:
            t5 = checkpoint.check(T5Encoder, "text_encoder_3")
            self.t5_tokenizer = T5Tokenizer.from_folder(checkpoint.path("tokenizer_3"))
            if t5.d_model != width:
                raise ValueError(f"{checkpoint.source}: the transformer takes {width} channels of text, T5 has {t5.d_model}")
        self.pooled_width = sum(config.projection_dim or config.hidden_size for config in configs)
        if (clip := sum(config.hidden_size for config in configs)) > width:
            raise ValueError(f"{checkpoint.source}: the transformer takes {width} channels of text, the two CLIP have {clip}")
        self._known = OrderedDict()

    def __call__(self, prompts):
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._known]
        if new:
            if "" not in (*new, *self._known):
                new.append("")
            fresh = self._encode(new)
            self._known.update((prompt, Text(*(part[i:i + 1] for part in fresh))) for i, prompt in enumerate(new))
        found = [self._known[prompt] for prompt in prompts]
        for prompt in prompts:
            self._known.move_to_end(prompt)
        while len(self._known) > self.KEPT:
            self._known.popitem(last=False)
        return together(found)

    def _encode(self, prompts):
        clips = []
        for prompt in prompts:                               # both CLIP read the same words
            _warn_if_cut(prompt, len(self.tokenizers[0].encode(prompt)) + 2, self.tokenizers[0].length, "CLIP")
        for component, tokenizer in zip(self.clips, self.tokenizers, strict=True):
            clips.append(self._run(CLIPText, component, tokenizer(prompts)))
        states = torch.cat([found.penultimate for found in clips], -1)          # without the final norm
        states = F.pad(states, (0, self.width - states.shape[-1]))
        if self.t5_tokenizer is None:                        # zeros in its place, as many as it would have had tokens
            more = states.new_zeros(len(prompts), self.length, self.width)
        else:
            for prompt in prompts:
                _warn_if_cut(prompt, self.t5_tokenizer.count(prompt), self.length, "T5")
            more = self._run(T5Encoder, "text_encoder_3", self.t5_tokenizer(prompts, self.length))
        return Text(torch.cat([states, more.to(states.dtype)], 1), torch.cat([found.pooled for found in clips], -1))

    @torch.no_grad()
    def _run(self, network_class, component, ids):
        network = self.checkpoint.load(network_class, component, device=self.device, dtype=self.dtype)
        return network(torch.tensor(ids, device=self.device))


def together(contexts):
    """Several contexts, tensors or `Text`, as one batch."""
    if isinstance(contexts[0], torch.Tensor):
        return torch.cat(contexts)
    return Text(*(torch.cat(parts) for parts in zip(*contexts, strict=True)))


class StableDiffusion3(Editor):
    """Stable Diffusion 3 by img2img: noise is added to the picture's latent, up to a strength, and removed again as the
    prompt, a description of the result, asks (Esser et al. 2024; Meng et al. 2022 for img2img)."""

    kind = "img2img"
    OPTIONS = frozenset({"strength"})
    PIPELINES = ("StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline")
    DEFAULTS = SD3

    def __init__(self, *, checkpoint, name, device, dtype, vae_dtype=torch.float32, defaults=None, notice=""):
        super().__init__(name=name, vae=checkpoint.load(AutoencoderKL, "vae", device=device, dtype=vae_dtype, lazily=True),
                         scheduler=schedulers.load(checkpoint.text("scheduler/scheduler_config.json")),
                         device=device, dtype=dtype, defaults=defaults or self.DEFAULTS, notice=notice, checkpoint=checkpoint)
        self.config = config = checkpoint.check(MMDiT, "transformer")
        self.context = TextEncoders(checkpoint, width=config.joint_attention_dim, length=self.defaults.text_length,
                                    device=self.device, dtype=dtype)
        if not isinstance(self.scheduler, schedulers.FlowScheduler):
            raise ValueError(f"{name}: scheduler_config.json does not name {schedulers.FLOW}, which Stable Diffusion 3 is "
                             "sampled by")
        latent = self.vae.config.latent_channels
        if config.in_channels not in self.takes(latent) or config.out_channels != latent:
            wanted = " or ".join(str(n) for n in self.takes(latent))
            raise ValueError(f"{name}: the transformer takes {config.in_channels} channels and gives {config.out_channels}; "
                             f"with this VAE it has to take {wanted} and give {latent}")
        if config.pooled_projection_dim != self.context.pooled_width:
            raise ValueError(f"{name}: the transformer takes {config.pooled_projection_dim} channels of pooled text, "
                             f"the two CLIP have {self.context.pooled_width}")

    @classmethod
    def load(cls, checkpoint, **more):
        return cls(checkpoint=checkpoint, **more)

    @staticmethod
    def takes(latent_channels):
        """How many channels the transformer may take."""
        return (latent_channels,)

    @cached_property
    def transformer(self):
        """Read when it is first used, which is after the prompts were encoded: the text encoders are gone by then."""
        return self.checkpoint.load(MMDiT, "transformer", device=self.device, dtype=self.dtype, lazily=True)

    @property
    def tap_names(self):
        return mmdit.tap_names(self.config)

    @property
    def default_taps(self):
        return mmdit.default_taps(self.config)

    @property
    def probs_names(self):
        return self.transformer.probs_names

    @property
    def denoiser(self):
        return self.transformer

    @property
    def multiple(self):
        return self.vae.factor * self.config.patch_size

    def plan(self, steps=None, strength=None):
        """The timesteps and transitions of an edit: those of `steps` that `strength` takes."""
        return self.scheduler.plan(self.defaults.steps if steps is None else steps,
                                   self.defaults.strength if strength is None else strength)

    def prepare_text(self, context):
        return context._replace(states=super().prepare_text(context.states))

    def prepare_timesteps(self, timesteps, context):
        if not frozen(self.denoiser):
            return timesteps
        return self.denoiser.prepare_timestep(timesteps.to(self.device), context.pooled)

    def features(self, condition, noisy_latent, timesteps, context, *, taps):
        """Activations of the transformer, name -> tensor, live; the forward pass ends at the last tap."""
        return self.transformer.features(*self._inputs(condition, noisy_latent, timesteps), *context, taps=taps)

    def predict(self, condition, noisy_latent, timesteps, context):
        """The transformer's prediction (B,C,h,w): the velocity, noise minus latent."""
        return self.transformer(*self._inputs(condition, noisy_latent, timesteps), *context)

    def _inputs(self, condition, noisy_latent, timesteps):
        return noisy_latent.to(self.dtype), _on(timesteps, noisy_latent.device)          # all it sees is the noisy latent

    def noise_prediction(self, prediction, noisy_latent, timesteps):
        """The noise (B,C,h,w) that a velocity takes to be in noisy_latent: z_sigma + (1 - sigma) v."""
        sigma = self.scheduler.sigma_at(timesteps).reshape(-1, 1, 1, 1).to(noisy_latent)
        return noisy_latent + (1 - sigma) * prediction

    def sample(self, pixels, prompts, *, negative_prompt="", seeds, steps=None, guidance=None, strength=None, on_step=None):
        """Pixels (B,3,H,W) in [0,1] at a working size -> edited pixels, not clipped. Differentiable if the caller wants it."""
        guidance = self.defaults.guidance if guidance is None else guidance
        plan = self.plan(steps, strength)
        context = self.context([*[negative_prompt] * len(prompts), *prompts] if guidance > 1 else prompts)
        mean, logvar = self.posterior(pixels)
        draw = self.draws(seeds, mean.shape[1:])
        # The pipeline does not take the posterior's mean, as the methods do, but draws from it.
        latent = self.scaled(mean + (0.5 * logvar).exp() * draw(mean.dtype))
        latent = self.scheduler.add_noise(latent, draw(), plan.timesteps[:1]).to(self.dtype)
        for i, timestep in enumerate(plan.timesteps):
            velocity = self.predict(None, torch.cat([latent] * 2) if guidance > 1 else latent, timestep, context)
            if guidance > 1:                                 # two passes: without the text, with it
                without, full = velocity.chunk(2)
                velocity = without + guidance * (full - without)
            latent = plan.step(velocity, i, latent)
            if on_step:
                on_step(i, len(plan.timesteps))
        return self.decode(latent)


class UltraEdit(StableDiffusion3):
    """UltraEdit (Zhao et al. 2024): Stable Diffusion 3 trained on instructions, the picture a condition in further channels.

    As its authors' code has it, and not the pipeline in diffusers' collection: neither the condition nor the latent is
    shifted, and only the latent is scaled. A checkpoint with a mask is given one that lets everything change.
    """

    kind = "instruct"
    OPTIONS = frozenset({"image_guidance"})
    PIPELINES = ("StableDiffusion3InstructPix2PixPipeline",)
    DEFAULTS = ULTRAEDIT
    shift = 0.0

    @staticmethod
    def takes(latent_channels):
        return 2 * latent_channels, 3 * latent_channels      # noisy latent, picture; and mask

    def plan(self, steps=None):
        """The timesteps and transitions of an edit: all of them, from pure noise."""
        return self.scheduler.plan(self.defaults.steps if steps is None else steps)

    def _inputs(self, condition, noisy_latent, timesteps):
        parts = [noisy_latent, condition]
        if self.config.in_channels == 3 * self.vae.config.latent_channels:
            present = condition.flatten(1).any(1)[:, None, None, None]                   # no picture, no mask either
            parts.append(self._everything(condition.shape[-2:]) * present)
        return torch.cat(parts, 1).to(self.dtype), _on(timesteps, condition.device)

    def _everything(self, shape):
        """The condition of a white mask, encoded once for each size: everything may change."""
        if shape not in self._masks:
            with torch.no_grad():
                self._masks[shape] = self.encode(torch.ones(1, 3, *(side * self.vae.factor for side in shape)))
        return self._masks[shape]

    @cached_property
    def _masks(self):
        return {}

    def sample(self, pixels, prompts, *, negative_prompt="", seeds, steps=None, guidance=None, image_guidance=None,
               on_step=None):
        """Pixels (B,3,H,W) in [0,1] at a working size -> edited pixels, not clipped. Differentiable if the caller wants it."""
        guidance = self.defaults.guidance if guidance is None else guidance
        image_guidance = self.defaults.image_guidance if image_guidance is None else image_guidance
        guided = guidance > 1 and image_guidance >= 1
        count = len(prompts)
        context = self.context([*prompts, *[negative_prompt] * (2 * count)] if guided else prompts)
        condition = self.encode(pixels)
        latent = self.draws(seeds, condition.shape[1:])()
        if guided:                                           # three passes: text and picture, picture alone, neither
            condition = torch.cat([condition, condition, torch.zeros_like(condition)])
        plan = self.plan(steps)
        for i, timestep in enumerate(plan.timesteps):
            velocity = self.predict(condition, torch.cat([latent] * 3) if guided else latent, timestep, context)
            if guided:
                velocity = three_ways(*velocity.chunk(3), guidance, image_guidance)
            latent = plan.step(velocity, i, latent)
            if on_step:
                on_step(i, len(plan.timesteps))
        return self.decode(latent)


EDITORS = (InstructPix2Pix, StableDiffusion3, UltraEdit)


def _warn_if_cut(prompt, tokens, limit, who):
    if tokens > limit:
        start = prompt if len(prompt) <= 40 else prompt[:40] + "..."
        warnings.warn(f"the prompt {start!r} is {tokens} tokens long, and {who} reads {limit}: the rest is cut off, as in the "
                      "published pipeline", stacklevel=2)


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
