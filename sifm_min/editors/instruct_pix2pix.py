"""InstructPix2Pix: a U-Net denoises a latent of pure noise beside the image latent (Brooks et al. 2023, section 3.2).

HQ-Edit is the same networks trained on other data.
"""

from functools import partial

import torch

from .. import memory
from ..models import schedulers, unet
from ..models.clip import CLIPText
from ..models.clip_tokenizer import CLIPTokenizer
from ..models.lean import frozen
from ..models.unet import UNet
from .autoencoders import load_autoencoder
from .base import Defaults, Editor, on
from .precision import in_dtype
from .text import warn_if_cut


class InstructPix2Pix(Editor):
    """InstructPix2Pix and HQ-Edit."""

    PIPELINES = ("StableDiffusionInstructPix2PixPipeline",)
    DEFAULTS = Defaults()                                    # the published pipeline's
    # HQ-Edit: its README and demo (text 7.0, image 1.5, 512, 30 steps).
    KNOWN = {"instruct-pix2pix": DEFAULTS, "hq-edit": Defaults(steps=30, guidance=7.0)}

    def __init__(self, *, unet, vae, text_encoder, tokenizer, scheduler, name, device=None, dtype=None, defaults=None,
                 notice="", checkpoint=None):
        weight = next(unet.parameters())                     # its device and dtype, unless it is not read yet
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
        # The sampler stored in the published repositories is not the one that their pipeline and their authors edit with.
        scheduler = checkpoint.parsed("scheduler/scheduler_config.json",
                                      partial(schedulers.load, ancestral=checkpoint.known in cls.KNOWN))
        if not isinstance(scheduler, schedulers.Scheduler):
            raise ValueError(f"{name}: scheduler_config.json is of rectified flow, which an InstructPix2Pix does not sample by")
        return cls(unet=checkpoint.load(UNet, "unet", device=device, dtype=dtype, lazily=True),
                   vae=load_autoencoder(checkpoint, device=device, dtype=vae_dtype),
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
    def shift_factor(self):
        return 0.0                                           # the published pipeline ignores the VAE's

    def context(self, prompts):
        """Prompts -> context (B,L,C): the last state of CLIP after its final norm."""
        prompts = list(prompts)
        for prompt in prompts:
            warn_if_cut(prompt, len(self.tokenizer.encode(prompt)) + 2, self.tokenizer.length, "CLIP")
        ids = torch.tensor(self.tokenizer(prompts))

        def run(device):
            if device == self.device:
                return self.text_encoder(ids.to(device)).last
            encoder = self.checkpoint.load(CLIPText, "text_encoder", device=device, dtype=torch.float32)
            self.forget_text()
            return encoder(ids).last.to(self.device, self.dtype)

        return memory.or_on_cpu(run, self.device, "text_encoder") if self.checkpoint else run(self.device)

    def features(self, image_latent, noisy_latent, timesteps, context, *, taps):
        """Activations of the U-Net, name -> tensor, with their graph; the forward pass ends at the last tap."""
        x, timesteps = self._inputs(image_latent, noisy_latent, timesteps)
        return in_dtype(self.dtype, lambda x: self.unet.features(x, timesteps, context, taps=taps), x)

    def predict(self, image_latent, noisy_latent, timesteps, context):
        """The U-Net's prediction (B,C,h,w), in the scheduler's parameterisation."""
        x, timesteps = self._inputs(image_latent, noisy_latent, timesteps)
        return in_dtype(self.dtype, lambda x: self.unet(x, timesteps, context), x)

    def _inputs(self, image_latent, noisy_latent, timesteps):
        # Only the network itself runs in its dtype: noise, noising and the sum of gradients stay in float32.
        return torch.cat([noisy_latent, image_latent], 1), on(timesteps, image_latent.device)

    def prepare_text(self, context):
        return self.unet.prepare_context(context) if frozen(self.unet) else context

    def prepare_timesteps(self, timesteps, context):
        return self.unet.prepare_timestep(timesteps.to(self.device)) if frozen(self.unet) else timesteps

    def word_positions(self, text):
        return [*range(1, 1 + min(len(self.tokenizer.encode(text)), self.tokenizer.length - 2))]
