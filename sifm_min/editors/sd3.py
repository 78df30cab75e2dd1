"""Stable Diffusion 3 by img2img, and UltraEdit, which is the same networks trained on instructions."""

from functools import cached_property

import torch

from ..models import mmdit
from ..models.mmdit import MMDiT
from .base import Defaults, Editor, on
from .precision import in_dtype
from .text import TextEncoders
from .transformer import TransformerEditor


class StableDiffusion3(TransformerEditor):
    """Stable Diffusion 3 by img2img: the picture's latent is noised up to a strength and denoised with the prompt, which
    describes the result (Esser et al. 2024; Meng et al. 2022 for img2img)."""

    kind = "img2img"
    OPTIONS = frozenset({"strength"})
    PIPELINES = ("StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline")
    DEFAULTS = Defaults(steps=50, guidance=7.0)              # the published pipeline's
    KNOWN = {"sd3": DEFAULTS}

    PUBLISHER, NETWORK, MODULE = "Stable Diffusion 3", MMDiT, mmdit

    def __init__(self, *, name, **more):
        super().__init__(name=name, **more)
        config = self.config
        if self.scheduler.config.use_dynamic_shifting:
            raise ValueError(f"{name}: scheduler_config.json sets use_dynamic_shifting, which is implemented for FLUX alone")
        latent = self.vae.config.latent_channels
        if config.in_channels not in self.takes(latent) or config.out_channels != latent:
            wanted = " or ".join(str(n) for n in self.takes(latent))
            raise ValueError(f"{name}: the transformer takes {config.in_channels} channels and gives {config.out_channels}; "
                             f"with this VAE it has to take {wanted} and give {latent}")
        if config.pooled_projection_dim != self.text_encoders.pooled_width:
            raise ValueError(f"{name}: the transformer takes {config.pooled_projection_dim} channels of pooled text, "
                             f"the two CLIP have {self.text_encoders.pooled_width}")

    def make_text_encoders(self):
        return TextEncoders(self.checkpoint, width=self.config.joint_attention_dim, length=self.defaults.text_length,
                            device=self.device, dtype=self.dtype)

    @staticmethod
    def takes(latent_channels):
        """The numbers of channels that the transformer may take."""
        return (latent_channels,)

    @property
    def multiple(self):
        return self.vae.factor * self.config.patch_size

    def plan(self, steps=None, strength=None):
        """The timesteps and transitions of an edit: the last `strength` of that many steps."""
        return self.scheduler.plan(self.defaults.steps if steps is None else steps,
                                   self.defaults.strength if strength is None else strength)

    def word_positions(self, text):
        """As in `Editor`; the context is two CLIP side by side, which split a text alike, then T5, which has no start."""
        clip, encoders = self.text_encoders.tokenizers[0], self.text_encoders
        positions = [*range(1, 1 + min(len(clip.encode(text)), clip.length - 2))]
        if positions and encoders.t5_tokenizer:
            positions += range(clip.length, clip.length + min(encoders.t5_tokenizer.count(text), encoders.length) - 1)
        return positions

    def prepare_text(self, context):
        states = self.transformer.prepare_context(context.states) if self.is_frozen else context.states
        return context._replace(states=states)

    def prepare_timesteps(self, timesteps, context):
        if not self.is_frozen:
            return timesteps
        return self.transformer.prepare_timestep(timesteps.to(self.device), context.pooled)

    def features(self, image_latent, noisy_latent, timesteps, context, *, taps):
        """Activations of the transformer, name -> tensor, with their graph; the forward pass ends at the last tap."""
        x, timesteps = self._inputs(image_latent, noisy_latent, timesteps)
        return in_dtype(self.dtype, lambda x: self.transformer.features(x, timesteps, *context, taps=taps), x)

    def predict(self, image_latent, noisy_latent, timesteps, context):
        """The transformer's prediction (B,C,h,w): the velocity, noise minus latent."""
        x, timesteps = self._inputs(image_latent, noisy_latent, timesteps)
        return in_dtype(self.dtype, lambda x: self.transformer(x, timesteps, *context), x)

    def _inputs(self, image_latent, noisy_latent, timesteps):
        return noisy_latent, on(timesteps, noisy_latent.device)           # it sees the noisy latent alone

    def start(self, pixels, plan, seeds):
        # The published pipeline does not take the posterior's mean, as the methods do, but draws from the posterior.
        # A tiny autoencoder has none: then the latent is taken as it is, and nothing is drawn for it.
        mean, *logvar = self.posterior(pixels)
        draw = self.draws(seeds, mean.shape[1:])
        drawn = mean + (0.5 * logvar[0]).exp() * draw(mean.dtype) if logvar else mean
        return mean, self.first_latent(drawn, draw(), plan), draw

    def first_latent(self, image_latent, noise, plan):
        return self.noise_latent(image_latent, noise, plan.timesteps[:1])


class UltraEdit(StableDiffusion3):
    """UltraEdit (Zhao et al. 2024): Stable Diffusion 3 trained on instructions, with the image latent in further channels.

    It follows its authors' code, not the pipeline in diffusers' collection: neither the image latent nor the noisy latent
    is shifted, and only the noisy latent is scaled. A checkpoint with a mask gets one that lets everything change.
    """

    kind = "instruct"
    OPTIONS = frozenset({"image_guidance"})
    PIPELINES = ("StableDiffusion3InstructPix2PixPipeline",)
    # Its authors' example (7.5, 1.5, 50 steps, 512); their own pipeline gives T5 as many tokens as CLIP.
    DEFAULTS = Defaults(steps=50, text_length=77)
    KNOWN = {"ultraedit": DEFAULTS}
    shift_factor = 0.0

    plan, start, first_latent = Editor.plan, Editor.start, Editor.first_latent     # from pure noise, as instruction editors do

    @staticmethod
    def takes(latent_channels):
        return 2 * latent_channels, 3 * latent_channels      # noisy latent, image latent; and mask

    def _inputs(self, image_latent, noisy_latent, timesteps):
        parts = [noisy_latent, image_latent]
        if self.config.in_channels == 3 * self.vae.config.latent_channels:
            present = image_latent.flatten(1).any(1)[:, None, None, None]                # no picture, no mask either
            parts.append(self._everything(image_latent.shape[-2:]) * present)
        return torch.cat(parts, 1), on(timesteps, image_latent.device)

    def _everything(self, shape):
        """The image latent of a white mask, encoded once for each size: everything may change."""
        if shape not in self._masks:
            with torch.no_grad():
                self._masks[shape] = self.encode(torch.ones(1, 3, *(side * self.vae.factor for side in shape)))
        return self._masks[shape]

    @cached_property
    def _masks(self):
        return {}
