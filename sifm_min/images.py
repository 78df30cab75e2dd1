"""Pictures: read, resize, quantise under the budget, and write whole or not at all.

Pictures are PIL images at the border and `pixels`, (B,3,H,W) float32 in [0,1], inside; 0..255 exists only in this file.
A `Picture` keeps what a picture has beside its colours (alpha, ICC profile, gamma) and gives it back. Other metadata
(camera, place, thumbnails) is not passed on.
"""

import contextlib
import io
import math
import warnings
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from .files import decoding, png, writing
from .files.decoding import Refused

CHUNKS = "sifm_min_chunks"                                   # the key of an image's info
LARGEST_FILE = 1 << 31                                       # bytes; a picture is read as a whole


# ----------------------------------------------------------------------------------------------------------------- read

@dataclass(frozen=True, eq=False)
class Picture:
    """A picture taken apart. `image` is 8-bit RGB, upright; the other fields are what a file of it has besides.

    mode: of the result, "RGB", "RGBA", "L" or "LA". Palette and CMYK pictures become RGB or RGBA, black-and-white ones L.
    alpha: 8-bit L, or None. icc: an ICC profile that fits the mode, or None. chunks: other PNG chunks that decide how the
    colours look (gamma, primaries, HDR), as ((kind, data), ...).
    info: of the source, JSON-ready: format, mode, frames, and `notes`, sentences on what was changed in reading it.
    """

    image: Image.Image
    mode: str
    alpha: Image.Image | None = None
    icc: bytes | None = None
    chunks: tuple = ()
    info: dict = field(default_factory=dict)

    @cached_property
    def channels(self):
        """1 for a picture without colour: its three channels are equal, and stay so. Else 3.

        Optimise `to_pixels(image)[:, :channels]` and let the objective expand it. The pixels decide, not the mode: a grey
        photograph is often saved as RGB.
        """
        red, green, blue = self.image.split()
        return 1 if red.tobytes() == green.tobytes() == blue.tobytes() else 3

    def put_together(self, image):
        """An image of this picture's size as a picture of its mode, with its alpha and what decides its colours."""
        return self._dressed(image.convert("L" if self.mode in ("L", "LA") else "RGB"), self.alpha, self.icc)

    def coloured(self, image, alpha=False):
        """An RGB image of any size with what decides this picture's colours; a profile for grey pixels is left out.

        alpha: with this picture's transparency as well; the image must be of its size.
        """
        icc = None if self.mode in ("L", "LA") else self.icc
        return self._dressed(image.convert("RGB"), self.alpha if alpha else None, icc)

    def _dressed(self, image, alpha, icc):
        dressed = image.copy()
        dressed.info = {}
        if alpha:
            dressed.putalpha(alpha)
        if icc:
            dressed.info["icc_profile"] = icc                # where Image.save looks for it
        if self.chunks:
            dressed.info[CHUNKS] = self.chunks               # where `_png` looks for them
        return dressed


def read(path):
    """The picture in a file, or ValueError: one sentence that names the file and says why it is refused."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is a folder, not a picture" if path.is_dir() else f"{path}: no such file")
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise Refused(f"more than {LARGEST_FILE >> 30} GiB; scale it down first")
        return _picture(decoding.decode(path.read_bytes()))
    except Image.UnidentifiedImageError:
        raise ValueError(f"{path} is not a picture that can be read here; convert it to PNG") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ValueError(f"{path}: more than the {Image.MAX_IMAGE_PIXELS / 1e6:.0f} million pixels that are safe to open; "
                         "scale it down first") from None
    except Refused as error:
        raise ValueError(f"{path}: {error}") from None
    except MemoryError:
        raise ValueError(f"{path} does not fit into memory; scale it down first") from None
    except decoding.DAMAGE as error:
        if getattr(error, "errno", None):                    # the disk's or the system's fault, not the picture's
            raise ValueError(f"{path}: {error.strerror}") from None
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path} is damaged, or unusual ({reason}); open it elsewhere and save it anew") from None


def picture(image):
    """A PIL image of any usual mode as a `Picture`, upright (its EXIF orientation applied); raises ValueError."""
    return _picture(decoding.decode_image(image))


def _picture(decoded):
    image = decoded.image
    alpha = image.getchannel("A") if image.mode in ("LA", "RGBA") else None
    return Picture(image.convert("RGB"), image.mode, alpha, decoded.icc, decoded.chunks, decoded.info)


def read_mask(path, width, height):
    """The mask in a picture file as (1,1,H,W) of zeros and ones: light is one, dark or transparent is zero.

    Raises ValueError for a mask of another size, and for one without any light.
    """
    mask = read(path)
    if mask.image.size != (width, height):
        raise ValueError(f"{path}: the mask is {mask.image.width}x{mask.image.height}, the picture {width}x{height}; make "
                         "them equal")
    light = np.asarray(mask.image.convert("L")).astype(np.uint32)
    if mask.alpha:
        light = light * np.asarray(mask.alpha) // 255        # shown on black
    if not (light >= 128).any():
        dark = "dark or transparent" if mask.alpha else "dark"
        raise ValueError(f"{path}: the mask is all {dark}; paint white where the picture may be changed")
    return torch.from_numpy(light >= 128).float()[None, None]




# -------------------------------------------------------------------------------------------------- pixels, resize, size

def to_pixels(image):
    """A PIL image of any mode -> pixels (1,3,H,W), float32 in [0,1]."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None].float() / 255


def to_image(pixels):
    """Pixels (1,3,H,W), clipped to [0,1] and rounded to 8 bits -> PIL RGB."""
    if pixels.shape[:2] != (1, 3):
        raise ValueError(f"to_image takes one RGB picture (1,3,H,W), got {tuple(pixels.shape)}")
    array = (pixels.detach()[0].float().clamp(0, 1) * 255).round().permute(1, 2, 0).byte().cpu().numpy()
    return Image.fromarray(array)


def working_size(width, height, limit=512, multiple=8, upscale=False):
    """(width, height) at which an editor works: the long side at most `limit`, each side floored to `multiple`.

    Never below one multiple. `upscale`: smaller pictures are scaled up to the limit as well.
    """
    long = max(width, height)
    scaled = long > limit or upscale
    width, height = (side * limit // long if scaled else side for side in (width, height))
    return max(width // multiple, 1) * multiple, max(height // multiple, 1) * multiple


def resize(pixels, height, width):
    """Pixels (B,C,H,W) -> (B,C,height,width): Pillow's antialiased Lanczos resize, differentiable.

    As `Image.resize(..., LANCZOS)` on 8 bits, without its rounding: along the rows, then the columns, each pass clipped
    to [0,1]. (Pillow 13 takes the columns first where they shrink more: a difference at hard edges, where it clips.)
    """
    if pixels.shape[3] != width:
        pixels = (pixels @ _weights(pixels.shape[3], width, pixels.dtype, pixels.device, across=True)).clamp(0, 1)
    if pixels.shape[2] != height:
        pixels = (_weights(pixels.shape[2], height, pixels.dtype, pixels.device) @ pixels).clamp(0, 1)
    return pixels


@lru_cache(maxsize=16)
def _weights(size, new, dtype, device, across=False):
    """`_lanczos`, transposed for the pass along the rows, on a device: sent there once for all steps."""
    weights = _lanczos(size, new)
    with torch.inference_mode(False):                        # else no gradient could pass later
        return torch.tensor(weights.T if across else weights, dtype=dtype).to(device)


@lru_cache(maxsize=16)
def _lanczos(size, new):
    """The weights (new, size) of one pass, float64: sinc(x) sinc(x / 3), stretched to the scale when shrinking.

    Dense, though about six lobes of each row are not zero: a product with all of it is some 1 % of a step of an editor
    that works at 512, and no slower at 64 than anything sparse (4000x3000, one CPU thread: 1.1 s and 0.3 s).
    """
    stretch = max(size / new, 1)
    centre = (np.arange(new)[:, None] + 0.5) * size / new
    x = (np.arange(size)[None] + 0.5 - centre) / stretch
    weights = np.where(np.abs(x) < 3, np.sinc(x) * np.sinc(x / 3), 0)
    return weights / weights.sum(1, keepdims=True)


# ------------------------------------------------------------------------------------------------------- 8-bit budget

def budget(eps):
    """The number of steps of 1/255 that the saved file may differ by: 7 for eps = 0.03, 8 for 8/255. Raises ValueError.

    eps: a number; or a tensor (1,C,H,W), C 1 or 3, each value's own budget, and the result is an array (H,W,C). There a
    budget may be below one step: such a value does not change.
    """
    if isinstance(eps, torch.Tensor):
        budget(round(eps.max().item(), 6))                   # float32 has seven digits
        return np.floor(255 * eps[0].permute(1, 2, 0).cpu().double().numpy() + 1e-4).astype(np.int16)
    steps = math.floor(255 * eps + 1e-9) if 0 < eps <= 1 else 0     # neither nan nor inf has a floor
    if steps < 1:
        raise ValueError(f"eps {eps:.6g}: the budget must be from 1/255 (one 8-bit step) to 1, such as 0.03 or 8/255")
    return steps


def quantize(original, delta, eps):
    """The `Picture` original plus delta (1,channels,H,W) in 8 bits, within the budget: a PIL image of original.mode.

    delta is rounded to steps of 1/255 and cut to `budget(eps)`, the sum to 0..255; where delta is 0 nothing changes.
    """
    expected = (1, original.channels, original.image.height, original.image.width)
    if tuple(delta.shape) != expected:
        raise ValueError(f"delta is {tuple(delta.shape)}; this {original.mode} picture takes {expected}")
    limit = budget(eps)
    delta = delta.detach()[0].permute(1, 2, 0).cpu().double().numpy()
    steps = (delta * 255).round().clip(-limit, limit).astype(np.int16)
    immunized = np.asarray(original.image).astype(np.int16) + steps      # one channel of steps serves all three
    return original.put_together(Image.fromarray(immunized.clip(0, 255).astype(np.uint8)))


def steps_apart(one, other):
    """The differences of two images of one size in 8-bit steps, as an array (H,W,3) of int16, not negative."""
    if one.size != other.size:
        raise ValueError(f"the pictures differ in size: {one.width}x{one.height} and {other.width}x{other.height}")
    one, other = (np.asarray(image.convert("RGB")).astype(np.int16) for image in (one, other))
    return np.abs(one - other)


def steps_used(one, other):
    """The largest difference of two images of one size in any colour channel, in 8-bit steps (L-infinity * 255)."""
    return int(steps_apart(one, other).max())


def amplify(original, immunized, gain=10):
    """The perturbation made visible: mid-grey plus `gain` times the difference of two images, as RGB."""
    original, immunized = (np.asarray(image.convert("RGB")).astype(np.int16) for image in (original, immunized))
    return Image.fromarray((128 + gain * (immunized - original)).clip(0, 255).astype(np.uint8))


# ---------------------------------------------------------------------------------------------------------------- write

def write_picture(path, image, *, overwrite=False):
    """Write a PIL image to a file as PNG, whole or not at all: see `files.writing.write`."""
    writing.write(path, _png(image), overwrite=overwrite)


def write_checked(path, image, original, eps, *, overwrite=False):
    """Write an immunized picture as PNG and decode it again before it gets its name. Returns the steps it really uses.

    Raises ValueError, with nothing left behind, unless size, mode and alpha are those of the `Picture` original and every
    colour of every pixel is within its budget. eps: see `budget`.
    """
    def check(part):
        with _bombs_allowed(), Image.open(part, formats=["PNG"]) as decoded:
            decoded.load()
            if decoded.size != original.image.size or decoded.mode != original.mode:
                raise ValueError(f"{path}: decodes to {decoded.mode} {decoded.size}, the original is "
                                 f"{original.mode} {original.image.size}; it was not written")
            if original.alpha and decoded.getchannel("A").tobytes() != original.alpha.tobytes():
                raise ValueError(f"{path}: the transparency changed; it was not written")
            steps, limit = np.broadcast_arrays(steps_apart(decoded, original.image), budget(eps))
        worst = np.argmax(steps - limit)
        if steps.flat[worst] > limit.flat[worst]:
            raise ValueError(f"{path}: decodes to {steps.flat[worst]}/255 from the original, the budget is "
                             f"{limit.flat[worst]}/255; it was not written")
        return int(steps.max())
    return writing.write(path, _png(image), overwrite=overwrite, check=check)


def _png(image):
    """The bytes of a PNG, with the colour chunks that `Picture.put_together` left in the image's info."""
    encoded = io.BytesIO()
    image.save(encoded, "PNG")
    return png.with_chunks(encoded.getvalue(), image.info.get(CHUNKS, ()))


@contextlib.contextmanager
def _bombs_allowed():
    with warnings.catch_warnings():                          # our own file, of a size that was accepted when it was read
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield
