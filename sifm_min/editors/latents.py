"""Latent spaces without an editor: every open diffusion editor first encodes the picture by an autoencoder.

`load_editor("latents")` gives an editor without a denoiser, a list of encoders; `latent` is the method for it. A perturbation
against it needs no prompt and no large weights. It moves the picture's latents. The effect on an edit also depends on the
denoiser, which is not part of it, and a tiny autoencoder only approximates the full one.
"""

import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import torch

from .. import PROGRAM, images
from ..models import checkpoints, latent_spaces
from ..models.latent_spaces import SPACES
from ..models.precision import full_float32
from . import shifts
from .autoencoders import load_autoencoder
from .base import Defaults, Editor

NAME = "latents"
SIZES = (512, 1024)                                          # long sides, in pixels, that published editors work at
NOTICE = ("Tiny autoencoders are distilled copies of the editors' own: how far this perturbation moves the full ones, and what "
          "it does to an edit, is not measured here.")
COPIED = ("The copies that ship are copies of these: a perturbation made on one moves the published autoencoder about half "
          f"as far as one made on that, and the shifts told here are the copies' own; `{PROGRAM}.weights download {NAME}` "
          "fetches the published ones.")
REMEMBERED = 12                                              # pictures whose latents are kept for loop, report and preview


@dataclass(frozen=True, eq=False)
class LatentSpace:
    """One autoencoder, its latents in the scale of the diffusion model, where each has a standard deviation near 1.

    Those of FLUX.2 are scaled and shifted by channel only in its editor; a shift is over their standard deviation here.
    """

    name: str
    network: torch.nn.Module
    checkpoint: object
    tiny: bool

    def encode(self, pixels):
        """Pixels (B,3,H,W) in [0,1], sides multiples of the factor -> latents (B,C,h,w), float32 or wider."""
        latent = self.network.encode(2 * pixels - 1)[0]
        latent = latent.to(torch.promote_types(latent.dtype, torch.float32))
        return (latent - self.network.config.shift_factor) * self.network.config.scaling_factor

    def decode(self, latent):
        """The pixels (B,3,H,W) of latents, nominally in [0,1], not clipped."""
        latent = latent / self.network.config.scaling_factor + self.network.config.shift_factor
        return self.network.decode(latent) / 2 + 0.5


class Latents(Editor):
    """An editor without a denoiser: `spaces`, a list of `LatentSpace`. It encodes, and refuses to edit in a sentence.

    loop_dtype: what encoders compute in while a perturbation is sought; measurements are in float32.
    """

    kind = "encoders"
    OPTIONS = frozenset()
    needs_prompt = False
    tap_names = default_taps = ()
    scheduler = SimpleNamespace(note="", config=None)        # there is nothing to sample

    def __init__(self, spaces, *, device="cpu", loop_dtype=torch.float32):
        if not spaces:
            raise ValueError("latents needs at least one latent space")
        self.spaces, self.device, self.loop_dtype = list(spaces), torch.device(device), loop_dtype
        self._remembered = []                                # [(pixels, latents of all spaces)]
        self.name, self.vae, self.checkpoint, self.dtype, self.defaults = NAME, None, None, torch.float32, Defaults()
        copied = any(space.name.endswith("-copy") for space in spaces)
        self.notice = " ".join([NOTICE] * any(space.tiny for space in spaces) + [COPIED] * copied)

    @property
    def multiple(self):
        return max(space.network.factor for space in self.spaces)

    @property
    def networks(self):
        return [space.network for space in self.spaces]

    def wait(self):
        """Stay on the device: autoencoders take little memory."""

    def provenance(self):
        """As `Editor.provenance`; the weights of every space, below its name."""
        weights = {f"{space.name}/{file}": digest for space in self.spaces
                   for file, digest in space.checkpoint.hashes().items()}
        return {"name": NAME, "source": None, "revision": None, "weights": weights, "scheduler": None, "scheduler_note": "",
                "defaults": asdict(self.defaults), "dtype": str(self.loop_dtype).removeprefix("torch."), "vae_dtype": "float32",
                "device": self.device.type, "notice": self.notice,
                "spaces": {space.name: {"source": space.checkpoint.source, "revision": space.checkpoint.revision}
                           for space in self.spaces}}

    # -- encoding ------------------------------------------------------------------------------------------------------

    def frames(self, width, height, sizes=SIZES):
        """The (height, width) at which editors see a picture of this size: one for each of `sizes` that makes a difference."""
        return sorted({self.frame(width, height, size) for size in sizes})

    def encode_fast(self, space, pixels):
        """The latents of one space; a tiny autoencoder computes in `loop_dtype`."""
        with torch.autocast(self.device.type, self.loop_dtype, enabled=space.tiny and self.loop_dtype != torch.float32):
            return space.encode(pixels)

    def encode(self, pixels):
        """The latents of all spaces in one row, (B, N), weighted so that the mean squares of all spaces count equally."""
        pixels = pixels.to(self.device)
        rows = [self.encode_fast(space, pixels).flatten(1) for space in self.spaces]
        return torch.cat([row * row.shape[1] ** -0.5 for row in rows], 1) * max(row.shape[1] for row in rows) ** 0.5

    def scaled(self, image_latent):
        """The latents as they are: each space's are in the scale of its diffusion model already."""
        return image_latent

    def contexts(self, prompts):
        """A placeholder for each prompt; encoders read no text."""
        return [None] * len(prompts)

    @torch.no_grad()
    def latents(self, pixels, spaces=None):
        """{name: latent, float32} of pixels (1,3,H,W) at a working size, in these spaces (default: all).

        The latents of the last pictures are kept.
        """
        known = next((found for kept, found in self._remembered
                      if kept is pixels or kept.shape == pixels.shape and torch.equal(kept, pixels)), None)
        if known is None:
            known = {}
            self._remembered = [*self._remembered[1 - REMEMBERED:], (pixels, known)]
        for space in spaces or self.spaces:
            if space.name not in known:
                known[space.name] = space.encode(pixels)
        return known

    def measures(self, picture, immunized, control):
        """{"shifts": ...} for a report: `shifts.measure_shifts` of a `Picture`, of PIL images, and the purifiers of reports."""
        original = picture.put_together(picture.image)
        return {"shifts": shifts.measure_shifts(self, original, immunized, control, shifts.PURIFIERS)}

    @torch.no_grad()
    def decodings(self, picture):
        """[(name of the space, its decoding of a PIL picture)], at the working size."""
        height, width = self.frame(*picture.size)
        pixels = images.resize(images.to_pixels(picture).to(self.device), height, width)
        with full_float32():
            latents = self.latents(pixels)
            return [(space.name, images.to_image(space.decode(latents[space.name]))) for space in self.spaces]

    # -- the missing denoiser -------------------------------------------------------------------------------------------

    def _refuse(self, *args, **options):
        raise ValueError("latents has encoders and no denoiser, so it neither edits nor shows activations; give an editor")

    context = features = predict = decode = plan = edit = timesteps = noise_latent = noise_prediction = start = _refuse


def latent(editor, x_orig, contexts, *, generator, sizes=SIZES, spaces_per_step: int = None):
    """Encoder-max: move the latents of every space as far as possible. No prompt.

        L = - sum over spaces of log( RMS(z(x') - z(x)) / std(z(x)) )

    Ours. The logarithm weighs equal factors equally: in a plain sum the space whose latents are hardest to move (SD3's) would
    be neglected. sizes: long sides that the picture is scaled down to before it is encoded, one in each step, in turn; a
    larger one means the picture's own size. spaces_per_step: so many spaces take turns, in order; None for all in every step.
    Each space has its own backward pass, so the memory is that of one. Cost: encoder 1F 1B a step and space.
    """
    sizes = (sizes,) if isinstance(sizes, int) else tuple(sizes)
    if not sizes:
        raise ValueError("sizes is empty; give at least one long side in pixels")
    frames = editor.frames(x_orig.shape[3], x_orig.shape[2], sizes)
    count = len(editor.spaces)
    some = count if spaces_per_step is None else spaces_per_step
    if not 1 <= some <= count:
        raise ValueError(f"spaces_per_step {some}: this editor has {count} latent space{'s' * (count > 1)}")
    originals = {}                                           # frame -> pixels of the original

    def objective(x_imu, step):
        turn, place = divmod(step, len(frames))
        frame = frames[place]
        if frame not in originals:
            with torch.no_grad():
                originals[frame] = images.resize(x_orig, *frame)
        spaces = [editor.spaces[i] for i in sorted((turn * some + k) % count for k in range(some))]
        before = editor.latents(originals[frame], spaces)
        pixels = images.resize(x_imu, *frame)
        leaf = pixels.detach().requires_grad_()
        moved, loss, g = {}, 0, torch.zeros_like(leaf)
        for space in spaces:
            moved[space.name] = shifts.shift(editor.encode_fast(space, leaf), before[space.name])
            part = -moved[space.name].log()
            loss, g = loss + part.detach(), g + torch.autograd.grad(part, leaf)[0]
        return loss + ((pixels - leaf.detach()) * g).sum(), moved

    def first(steps):
        """The number of the original's encodings in so many steps, at most: an editor remembers those of its last pictures."""
        return sum(min(count, some * len(range(place, steps, len(frames)))) for place in range(len(frames)))

    objective.passes = lambda steps: {
        "encoder_forward": first(steps) + some * steps, "encoder_backward": some * steps,
        "denoiser_forward": 0, "denoiser_backward": 0}
    return objective


# ---------------------------------------------------------------------------------------------------------------- loading

def is_latents(source):
    """True for "latents" and "latents:NAME,NAME"."""
    return re.fullmatch(rf"{NAME}(:.*)?", str(source)) is not None


def at_hand():
    """The items of "latents:ITEM,ITEM" for all that is on this machine: a tiny autoencoder or a copy for each space, and the
    autoencoders of the downloaded editors."""
    editors = [source for source in checkpoints.EDITORS.values()
               if source.hub_id and checkpoints.cached(source.hub_id, source.revision, ["vae"])[1] is None]
    return [*(checkpoint.name for checkpoint in _tiny_at_hand()),
            *(source.hub_id if source.name in SPACES else source.name for source in editors)]      # "sd3" is the space


def no_space(folder=f"as {NAME}:FOLDER"):
    """The error where no latent space is on this machine. folder: how an editor's folder is given in its place."""
    return checkpoints.Unavailable(f"no latent space is on this machine: run `{PROGRAM}.weights download {NAME}` once, about "
                                   f"50 MB, or give the folder of an editor {folder}")


def _tiny_at_hand():
    """The checkpoint of each space: the published one, else the copy; spaces with neither are left out."""
    for space in SPACES.values():
        try:
            yield latent_spaces.find_or_copy(space)
        except checkpoints.Unfit:
            raise
        except checkpoints.Unavailable:
            continue


def load_latents(source, *, device=None, dtype=None, offline=None):
    """The `Latents` called "latents", all spaces on this machine, or "latents:ITEM,ITEM".

    An item is a space (`SPACES`), the copy of one that ships (sd1-copy, sd3-copy), a folder with files of tiny autoencoders, or
    an editor (a folder, a hub id, a known name that is no space's), of which the autoencoder alone is read. Where the published
    tiny autoencoder of a space is not on this machine, the copy stands for it, if there is one. dtype: what the encoders
    compute in while a perturbation is sought (default: bfloat16 on a CPU with units for it, else float32). Raises `Unavailable`
    where a space is not here.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    asked = str(source).partition(":")[2]
    if asked:
        items = [item.strip() for item in asked.split(",")]
        found = _named_apart([(item, space) for item in items for space in _spaces_of(item, device, offline)])
    else:
        found = [_tiny(checkpoint, device) for checkpoint in _tiny_at_hand()]
        if not found:
            raise no_space()
    names = [space.name for space in found]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"{source} has the latent space {twice} twice; name each once")
    return Latents(found, device=device, loop_dtype=dtype or (torch.bfloat16 if _has_bfloat16_units(device) else torch.float32))


def _named_apart(found):
    """The spaces of (item, space) pairs. Where two folders have one name, the spaces are called as the items were written."""
    names = [space.name for _, space in found]
    return [replace(space, name=item) if names.count(space.name) > 1 and space.name not in SPACES else space
            for item, space in found]


def _spaces_of(item, device, offline):
    if item in SPACES:
        return [_tiny(latent_spaces.find_or_copy(SPACES[item]), device)]
    if copy := next((copy for copy in map(latent_spaces.copy_of, SPACES.values()) if copy and copy.name == item), None):
        return [_tiny(copy, device)]
    folder = Path(item).expanduser()
    if item and folder.is_dir() and not (folder / "vae").is_dir():
        found = latent_spaces.in_folder(folder)
        if not found:
            raise checkpoints.Unavailable(f"{folder} has neither an editor's vae/ nor files of a tiny autoencoder such as "
                                          "taesd_encoder.safetensors and taesd_decoder.safetensors")
        return [_tiny(checkpoint, device) for checkpoint in found]
    try:
        checkpoint = checkpoints.open_checkpoint(item, ["vae"], offline=offline)
    except checkpoints.Unavailable:
        raise
    except ValueError as error:
        known = [*SPACES, *(copy.name for copy in map(latent_spaces.copy_of, SPACES.values()) if copy)]
        raise ValueError(f"latents: {item!r} is none of {', '.join(known)}; as an editor, {error}") from None
    network = load_autoencoder(checkpoint, device=device, dtype=torch.float32)
    name = folder.resolve().name if folder.exists() else item
    return [LatentSpace(item if name in SPACES else name, network, checkpoint, type(network).__name__ == "AutoencoderTiny")]


def _tiny(checkpoint, device):
    return LatentSpace(checkpoint.name, checkpoint.network(device=device, dtype=torch.float32), checkpoint, True)


def _has_bfloat16_units(device):
    """True for a CPU that multiplies matrices of bfloat16 in hardware, which is several times as fast as float32 there."""
    known = [getattr(torch.cpu, name, None) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported")]
    return device.type == "cpu" and any(check() for check in known if check)
