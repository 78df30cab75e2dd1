"""FLUX.1 Kontext and FLUX.2 klein: a transformer denoises pure noise beside the picture's own tokens, as references.

The picture reaches the denoiser through the reference tokens alone: without a picture there are none. Both give a picture of
the input's own shape, as the publisher's programs do. The default of Kontext's pipeline in diffusers is 1024 x 1024 for any
picture, and four of its seventeen sizes come out 16 pixels smaller there; the sizes here are those of the publisher's program.
klein takes 15 pixels at most from the picture's sides, and its edit is stretched over the whole picture.
Papers: Black Forest Labs 2025 (arXiv 2506.15742) for Kontext. klein: its model card and the published program.
"""

import math
import warnings
from functools import partial

import torch
import torch.nn.functional as F
from PIL import Image

from .. import images
from ..models import flux
from ..models.flow_matching import empirical_mu, even_sigmas
from ..models.lean import Prepared
from .base import Defaults, on, wide
from .guidance import UNGUIDED, over_text
from .precision import in_dtype
from .text import KleinTexts, KontextTexts, Text
from .transformer import TransformerEditor

# (width, height) of the pictures that Kontext was trained on: about a megapixel each.
SIZES = ((672, 1568), (688, 1504), (720, 1456), (752, 1392), (800, 1328), (832, 1248), (880, 1184), (944, 1104), (1024, 1024),
         (1104, 944), (1184, 880), (1248, 832), (1328, 800), (1392, 752), (1456, 720), (1504, 688), (1568, 672))
FULL = 1024                                         # side of the square that has the area of all working sizes
EARLY = 26 / 38                                     # of Kontext's single blocks: those that DeContext attacks
EARLY_KLEIN = 13 / 20                               # of klein's, beside the double blocks
SHORTEST, NARROWEST = 64, 8                         # klein: the least side in pixels, and the largest ratio of the sides


class Flux(TransformerEditor):
    """The part that both have: packing, reference tokens and the noise levels of a picture's size. TEXTS: the text encoders.

    The working size (`defaults.size`) is the side of the square whose area a picture is edited at.
    """

    kind = "instruct"
    OPTIONS = frozenset()
    PUBLISHER, MODULE = "FLUX", flux
    PACKED = False                                  # True where image latents have 2 x 2 positions as channels already

    def __init__(self, *, name, **more):
        super().__init__(name=name, **more)
        wanted = 4 * self.vae.config.latent_channels
        if (self.config.in_channels, self.config.out_channels) != (wanted, wanted):
            raise ValueError(f"{name}: the transformer takes {self.config.in_channels} channels and gives "
                             f"{self.config.out_channels}; with this VAE it has to take and give {wanted}")

    def make_text_encoders(self):
        return self.TEXTS(self.checkpoint, config=self.config, length=self.defaults.text_length, device=self.device,
                          dtype=self.dtype)

    @property
    def multiple(self):
        return 2 * self.vae.factor

    @property
    def context_blocks(self):
        """The module paths of the blocks through which the reference picture enters, those that `decontext` attacks."""
        return tuple(f"single_transformer_blocks.{i}" for i in range(max(1, round(EARLY * self.config.num_single_layers))))

    def plan(self, steps=None):
        """The plan of an edit at the full working size, see `plan_at`."""
        return self.plan_at(self.defaults.size, self.defaults.size, steps)

    def plan_at(self, height, width, steps=None):
        """The timesteps and transitions of an edit at this size in pixels: larger pictures spend more steps on noise."""
        steps = self.defaults.steps if steps is None else steps
        return self.scheduler.plan_over(even_sigmas(steps), mu=self.mu(height * width // self.multiple**2, steps))

    def guide(self, guidance=None, true_guidance=None):
        """The `Guidance` of an edit: a second pass without the text where the weight is above 1, as in the pipelines."""
        weight = self.defaults.true_guidance if true_guidance is None else true_guidance
        return over_text(weight) if weight > 1 else UNGUIDED

    def prepare_timesteps(self, timesteps, context):
        if not self.is_frozen:
            return timesteps
        return self.transformer.prepare_timestep(timesteps.to(self.device), **self._vectors(context))

    def word_positions(self, text):
        return self.text_encoders.word_positions(text)

    def features(self, image_latent, noisy_latent, timesteps, context, *, taps, guidance=None):
        """Activations of the transformer, name -> tensor, with their graph; the forward pass ends at the last tap.

        image_latent None: no picture, and no tokens of one. guidance: where it is an input (None: the default).
        """
        network = partial(self.transformer.features, taps=taps)
        return self._run(network, image_latent, noisy_latent, timesteps, context, guidance)

    def predict(self, image_latent, noisy_latent, timesteps, context, guidance=None):
        """The transformer's prediction, like noisy_latent: the velocity, noise minus latent. Arguments as of `features`."""
        velocity = self._run(self.transformer, image_latent, noisy_latent, timesteps, context, guidance)
        return velocity if self.PACKED else F.pixel_shuffle(velocity, 2)

    def context_mass(self, image_latent, noisy_latent, timesteps, context, *, blocks):
        """The share of the target's attention that goes to the picture in each of `blocks` (module paths): (blocks, B).

        Averaged over heads and target tokens.
        """
        found = self.features(image_latent, noisy_latent, timesteps, context, taps=[f"{block}.attn.mass" for block in blocks])
        return torch.stack([found[f"{block}.attn.mass"] for block in blocks])

    def _run(self, network, image_latent, noisy_latent, timesteps, context, guidance):
        latents = [noisy_latent] if image_latent is None else [noisy_latent, self.scaled(image_latent).to(noisy_latent)]
        x = torch.cat(latents if self.PACKED else [F.pixel_unshuffle(latent, 2) for latent in latents], 1)
        timesteps = on(timesteps, x.device)
        vectors = {} if isinstance(timesteps, Prepared) else self._vectors(context, guidance)
        states = context.states if isinstance(context, Text) else context

        def run(x):
            noisy, *reference = x.split(self.config.in_channels, 1)
            return network(noisy, reference[0] if reference else None, timesteps, states, **vectors)

        return in_dtype(self.dtype, run, x)

    def _vectors(self, context, guidance=None):
        """The inputs that modulate the blocks beside the timestep."""
        return {}


class FluxKontext(Flux):
    """FLUX.1 Kontext [dev]. `guidance` is an input of its network; `true_guidance` above 1 is a second pass without the text.

    A picture is stretched to the size of the nearest shape in `SIZES`, which are scaled with the working size, and the edit
    is stretched back.
    """

    OPTIONS = frozenset({"true_guidance"})
    PIPELINES = ("FluxKontextPipeline",)
    NETWORK, TEXTS = flux.Flux1, KontextTexts
    DEFAULTS = Defaults(steps=28, guidance=2.5, size=FULL, text_length=512)      # guidance: of the model card
    KNOWN = {"flux-kontext": DEFAULTS}

    def frame(self, width, height, size=None):
        _, *nearest = min((abs(width / height - w / h), w, h) for w, h in SIZES)
        scale, multiple = (size or self.defaults.size) / FULL, self.multiple
        width, height = (max(int(side * scale) // multiple, 1) * multiple for side in nearest)
        return height, width

    def mu(self, tokens, steps):
        """The shift of the noise levels for a picture of so many tokens."""
        return self.scheduler.mu(tokens)

    def predictor(self, guidance=None):
        return partial(self.predict, guidance=guidance)

    def prepare_text(self, context):
        return context._replace(states=self.transformer.prepare_context(context.states)) if self.is_frozen else context

    def _vectors(self, context, guidance=None):
        guidance = self.defaults.guidance if guidance is None else guidance
        return {"pooled": context.pooled, "guidance": guidance if self.config.guidance_embeds else None}


class FluxKlein(Flux):
    """FLUX.2 [klein], distilled to four steps without guidance. Its latents are normalised by statistics, after 2 x 2
    positions became channels: image latents here are the VAE's mean in that arrangement, (B, 4 C, h / 2, w / 2).

    A picture above the working size's area is scaled down to it; then its sides are cut to multiples of 16, at its centre.
    """

    PIPELINES = ("Flux2KleinPipeline",)
    NETWORK, TEXTS, PACKED = flux.Flux2, KleinTexts, True
    DEFAULTS = Defaults(steps=4, guidance=1.0, size=FULL, text_length=512)
    KNOWN = {"flux-klein": DEFAULTS}

    def __init__(self, *, name, **more):
        super().__init__(name=name, **more)
        if self.config.guidance_embeds:
            raise ValueError(f"{name}: the transformer takes the guidance as an input, which no klein does")
        if getattr(self.vae, "bn", None) is None:
            raise ValueError(f"{name}: the autoencoder has no statistics of its latents (bn), by which FLUX.2 scales them; a "
                             "tiny autoencoder cannot take the place of FLUX.2's")

    @property
    def context_blocks(self):
        singles = range(max(1, round(EARLY_KLEIN * self.config.num_single_layers)))
        return (*(f"transformer_blocks.{i}" for i in range(self.config.num_layers)),
                *(f"single_transformer_blocks.{i}" for i in singles))

    def mu(self, tokens, steps):
        """The shift of the noise levels for a picture of so many tokens."""
        return empirical_mu(tokens, steps)

    def guide(self, guidance=None):
        """No guidance: the network is distilled. A weight is ignored with a warning, as in the pipeline."""
        if guidance is not None and guidance > 1:
            warnings.warn(f"{self.name} is distilled: guidance {guidance} is ignored, as in the published pipeline",
                          stacklevel=2)
        return UNGUIDED

    # -- size ----------------------------------------------------------------------------------------------------------

    def frame(self, width, height, size=None):
        if min(width, height) < SHORTEST or max(width, height) > NARROWEST * min(width, height):
            raise ValueError(f"a picture of {width} x {height} pixels: FLUX.2 takes sides of at least {SHORTEST} pixels, the "
                             f"longer at most {NARROWEST} times the shorter")
        width, height = self._scaled_down(width, height, size)
        return height // self.multiple * self.multiple, width // self.multiple * self.multiple

    def _scaled_down(self, width, height, size):
        """(width, height) before the sides are cut."""
        area = (size or self.defaults.size) ** 2
        scale = math.sqrt(area / (width * height))
        return (int(width * scale), int(height * scale)) if scale < 1 else (width, height)

    def _window(self, width, height, size):
        """((width, height) before the sides are cut, (left, top, width, height) of what is kept)."""
        kept_height, kept_width = self.frame(width, height, size)
        whole = self._scaled_down(width, height, size)
        return whole, ((whole[0] - kept_width) // 2, (whole[1] - kept_height) // 2, kept_width, kept_height)

    def fitted(self, picture, size=None):
        whole, (left, top, width, height) = self._window(*picture.size, size)
        picture = picture.convert("RGB")
        if whole != picture.size:
            picture = picture.resize(whole, Image.Resampling.LANCZOS)
        return picture.crop((left, top, left + width, top + height))

    def resize(self, pixels, size=None):
        whole, (left, top, width, height) = self._window(pixels.shape[3], pixels.shape[2], size)
        pixels = images.resize(pixels, whole[1], whole[0])
        return pixels[:, :, top:top + height, left:left + width]

    # -- latents -------------------------------------------------------------------------------------------------------

    def posterior(self, pixels):
        return tuple(F.pixel_unshuffle(moment, 2) for moment in super().posterior(pixels))

    def scaled(self, image_latent):
        return self.vae.bn(image_latent)

    def decode(self, latent):
        latent = self.vae.denormalised(wide(latent))
        return wide(in_dtype(self.vae_dtype, self.vae.decode, latent)) / 2 + 0.5

    def prepare_text(self, context):
        return self.transformer.prepare_context(context) if self.is_frozen else context


class FluxKleinBase(FluxKlein):
    """FLUX.2 [klein] base, which is not distilled: guidance over the text, by a second pass."""

    PIPELINES, KNOWN = (), {}                       # loading.py takes it for a pipeline that is not distilled
    DEFAULTS = Defaults(steps=50, guidance=4.0, size=FULL, text_length=512)

    def guide(self, guidance=None):
        """The `Guidance` of an edit; none where the weight is at most 1."""
        weight = self.defaults.guidance if guidance is None else guidance
        return over_text(weight) if weight > 1 else UNGUIDED
