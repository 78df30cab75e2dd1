"""Editors: networks, scheduler and text encoders that turn a picture and an instruction into an edited picture.

    base.py               `Editor`: sizes, encoding, plans and the edit itself, for all editors
    autoencoders.py       the autoencoder that a folder's vae/ holds
    guidance.py           classifier-free guidance, over the text or over text and picture
    instruct_pix2pix.py   InstructPix2Pix and HQ-Edit
    transformer.py        what the editors with a diffusion transformer share
    sd3.py                Stable Diffusion 3 by img2img, and UltraEdit
    flux.py               FLUX.1 Kontext and FLUX.2 klein
    precision.py          gradients through a network that runs in float16
    latents.py            encoders without a denoiser, and the method for them
    several.py            several editors that one perturbation is made for
    text.py               text contexts, and the text encoders of Stable Diffusion 3 and FLUX
    loading.py            `load_editor`
"""

from .base import Defaults, Editor, check
from .flux import FluxKlein, FluxKleinBase, FluxKontext
from .instruct_pix2pix import InstructPix2Pix
from .latents import Latents
from .loading import DEFAULTS, EDITORS, load_editor
from .sd3 import StableDiffusion3, UltraEdit
from .several import Several
from .text import Text, TextEncoders

__all__ = ["DEFAULTS", "EDITORS", "Defaults", "Editor", "FluxKlein", "FluxKleinBase", "FluxKontext", "InstructPix2Pix",
           "Latents", "Several", "StableDiffusion3", "Text", "TextEncoders", "UltraEdit", "check", "load_editor"]
