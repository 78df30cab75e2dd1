"""Load an editor by its name: from the shipped ones, a folder, a single file or a hub repository."""

import importlib
import inspect
import re
from pathlib import Path

import torch

from ..models import checkpoints
from ..models.config import replaced
from ..models.mmdit import MMDiT
from .base import check
from .flux import FluxKlein, FluxKleinBase, FluxKontext
from .instruct_pix2pix import InstructPix2Pix
from .latents import is_latents, load_latents
from .precision import half_dtype
from .sd3 import StableDiffusion3, UltraEdit

EDITORS = (InstructPix2Pix, StableDiffusion3, UltraEdit, FluxKontext, FluxKlein)
RANGES = {"text_length": (0, 4096), "size": (8, 8192), "strength": (0, 1)}      # of the defaults that a folder may state
DEFAULTS = {name: defaults for editor_class in EDITORS for name, defaults in editor_class.KNOWN.items()}


def load_editor(source="miniature", *, device=None, dtype=None, vae_dtype=None, revision=None, offline=None, t5=True,
                components=None):
    """Load the editor called `source`: a known name (`checkpoints.EDITORS`), a folder in the published (diffusers) layout,
    a single file of Stable Diffusion 3 or FLUX, a hub id, "latents" or "latents:ITEM,ITEM" (see `latents.load_latents`), or
    "module:name" of a class or function that returns an editor.

    device: default cuda where there is one, else cpu.
    dtype: of denoiser and text encoders; default on cuda bfloat16, or float16 where the card has no bfloat16; else float32.
    vae_dtype: default float32 everywhere. Pictures decoded in bfloat16 are one or two steps of 1/255 off, and some VAEs
      overflow in float16.
    t5: False does without Stable Diffusion 3's largest text encoder, as its pipeline allows, and does not fetch it.
    revision, offline: for a hub id (see `checkpoints.open_checkpoint`).
    components: the source of the parts that a single file lacks (a folder, a known name such as "sd3", or a hub id; default:
      the file's folder).

    Raises `checkpoints.Unavailable` where the weights cannot be had and ValueError where they do not fit; both in one
    sentence.
    """
    if is_latents(source):
        if revision is not None or components is not None:
            raise ValueError(f"revision and components are for one editor; {source} has encoders alone")
        return load_latents(source, device=device, dtype=dtype, offline=offline)
    if re.fullmatch(r"[^\W\d][\w.]*:[^\W\d][\w.]*", str(source)) and not Path(source).exists():
        return _outside(str(source), device=device, dtype=dtype, vae_dtype=vae_dtype, revision=revision, components=components)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or (half_dtype(device) if device.type == "cuda" else torch.float32)
    checkpoint = checkpoints.open_checkpoint(source, t5=t5, revision=revision, offline=offline, rest=components)
    name, index = str(source), checkpoint.index
    editor_class = next((known for known in EDITORS if index.get("_class_name") in known.PIPELINES), InstructPix2Pix)
    if editor_class is StableDiffusion3:
        config = checkpoint.check(MMDiT, "transformer")
        if config.in_channels > config.out_channels:         # saved by a pipeline of the plain class's name
            editor_class = UltraEdit
    if editor_class is FluxKlein and not index.get("is_distilled"):
        editor_class = FluxKleinBase
    own, notice = checkpoint.settings
    try:
        defaults = replaced(editor_class.KNOWN.get(checkpoint.known, editor_class.DEFAULTS), own,
                            f"{checkpoint.source}/{checkpoints.MAIN}: its _sifm_min", RANGES)
        return editor_class.load(checkpoint, name=name, device=device, dtype=dtype, vae_dtype=vae_dtype or torch.float32,
                                 defaults=defaults, notice=notice)
    except checkpoints.Unavailable:
        raise
    except ValueError as error:                              # of a tokenizer, say: the files are there and do not fit
        raise checkpoints.Unfit(str(error)) from error


def _outside(source, **arguments):
    """The editor that a class or function from outside the package returns; it gets the arguments that are not None."""
    make = imported(source)
    arguments = {name: value for name, value in arguments.items() if value is not None}
    try:
        inspect.signature(make).bind(**arguments)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source} cannot be called with {', '.join(f'{name}=...' for name in arguments) or 'no argument'}: "
                         f"{error}") from None
    editor = make(**arguments)
    check(editor)
    return editor


def imported(name):
    """The function or class called "module:name"; ValueError, in one sentence, where there is none."""
    module_name, _, attribute = name.partition(":")
    if not (module_name and attribute and all(part.isidentifier() for part in (*module_name.split("."), attribute))):
        raise ValueError(f"{name!r} is not of the form module:name")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and f"{module_name}.".startswith(f"{error.name}."):
            raise ValueError(f"{name}: there is no module {module_name}, neither in the working folder nor installed") from None
        raise ValueError(f"{name}: importing {module_name} failed: {error}") from error
    except (ImportError, SyntaxError) as error:
        raise ValueError(f"{name}: importing {module_name} failed: {error}") from error
    thing = getattr(module, attribute, None)
    if not callable(thing):
        raise ValueError(f"{name}: {module_name} has no function or class {attribute}")
    return thing
