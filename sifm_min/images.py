"""Pictures: read, resize, quantise under the budget, write whole or not at all, and lay side by side.

Pictures are PIL images at the border and `pixels`, (B,3,H,W) float32 in [0,1], inside; 0..255 exists only in this file.
What a picture has beside its colours (alpha, ICC profile, greyness) is kept in a `Picture` and given back; other
metadata (camera, place, thumbnails) is not passed on.
"""

import contextlib
import io
import math
import struct
import warnings
import zlib
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

from .files import writing

# Only these are opened: some of Pillow's other formats start programs (EPS runs Ghostscript) or hold no single picture.
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "AVIF", "PPM")
SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".jp2", ".avif", ".ppm", ".pgm")
SIXTEEN = ("I;16", "I;16L", "I;16B", "I;16N")
# What Pillow's decoders raise on damaged files, by format and place of the damage (found by damaging files at random).
DAMAGE = (OSError, ValueError, SyntaxError, EOFError, LookupError, TypeError, ArithmeticError, RuntimeError, struct.error,
          zlib.error)


# ----------------------------------------------------------------------------------------------------------------- read

@dataclass(frozen=True, eq=False)
class Picture:
    """A picture taken apart. `image` is 8-bit RGB, upright; what it is put together with again, unchanged, is the rest.

    mode: of the result, "RGB", "RGBA", "L" or "LA". Palette and CMYK pictures become RGB or RGBA, black-and-white ones L.
    channels: 1 for a grey picture, whose three channels are equal and stay so: optimise `to_pixels(image)[:, :channels]`
      and let the objective expand it. alpha: 8-bit L, or None. icc: the profile as in the file, or None.
    info: of the source, JSON-ready: format, mode, frames, and `notes`, sentences on what was changed in reading it.
    """

    image: Image.Image
    mode: str
    alpha: Image.Image | None = None
    icc: bytes | None = None
    info: dict = field(default_factory=dict)

    @property
    def channels(self):
        return 1 if self.mode in ("L", "LA") else 3

    def put_together(self, image):
        """An RGB image of this picture's size as a picture of its mode, with its alpha and ICC profile."""
        bands = [image.getchannel(0)] if self.channels == 1 else list(image.split())
        made = Image.merge(self.mode, [*bands, self.alpha] if self.alpha else bands)
        if self.icc:
            made.info["icc_profile"] = self.icc              # where Image.save finds it
        return made


def read(path):
    """The picture in a file, or ValueError: one sentence that names the file and says why it is refused."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is a folder, not a picture" if path.is_dir() else f"{path}: no such file")
    try:
        with _bombs_refused(), Image.open(path, formats=_formats()) as image:
            return picture(image)
    except Image.UnidentifiedImageError:
        raise ValueError(f"{path} is not a picture that can be read here; convert it to PNG") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ValueError(f"{path}: more than the {Image.MAX_IMAGE_PIXELS / 1e6:.0f} million pixels that are safe to open; "
                         "scale it down first") from None
    except Refused as error:
        raise ValueError(f"{path}: {error}") from None
    except MemoryError:
        raise ValueError(f"{path} does not fit into memory; scale it down first") from None
    except DAMAGE as error:
        if getattr(error, "errno", None):                    # the disk's or the system's fault, not the picture's
            raise ValueError(f"{path}: {error.strerror}") from None
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path} is damaged, or unusual ({reason}); open it elsewhere and save it anew") from None


class Refused(ValueError):
    """A picture that could be decoded, and whose colours have no one meaning in 8 bits."""


def picture(image):
    """A PIL image of any usual mode as a `Picture`, upright (its EXIF orientation applied); raises ValueError."""
    info = {"format": image.format, "mode": image.mode, "frames": getattr(image, "n_frames", 1), "notes": []}
    if info["frames"] > 1:
        image.seek(0)
        info["notes"].append(f"the first of {info['frames']} frames")
    # Pillow itself reduces 48-bit colours when it decodes; only the decoder's name tells.
    deep = image.mode in SIXTEEN or any(";16" in str(tile[3]) for tile in getattr(image, "tile", ()))
    icc, transparent = image.info.get("icc_profile"), image.has_transparency_data
    if 0 in image.size:
        raise Refused(f"its size is {image.width}x{image.height}")
    image = ImageOps.exif_transpose(image)
    if image.mode in SIXTEEN or (image.mode == "I" and info["format"] == "PNG"):       # "I": Pillow before 11
        image, deep = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)), True
    if deep:
        info["notes"].append("16 bits a channel, of which the upper 8 are kept")
        if "transparency" in image.info or (transparent and image.mode == "L"):
            raise Refused("16 bits a channel and one colour of them transparent; convert it to 8 bits with alpha")
    if image.mode == "CMYK":
        image, icc = image.convert("RGB"), None
        info["notes"].append("CMYK converted to RGB, without its colour profile")
    if image.mode not in ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "YCbCr", "HSV"):
        raise Refused(f"its mode {image.mode} has no fixed range of colours; convert it to 8-bit RGB")
    mode = ("L" if image.mode in ("1", "L", "LA", "La") else "RGB") + ("A" if transparent else "")
    if image.mode == "La":
        image = image.convert("LA")
    if image.mode == "RGBa":
        image = image.convert("RGBA")
    whole = image.convert(mode)
    alpha = whole.getchannel("A") if transparent else None
    return Picture(whole.convert("RGB"), mode, alpha, icc, info)


def read_mask(path, width, height):
    """The mask in a picture file as (1,1,H,W) of zeros and ones: light is one, dark is zero. Raises ValueError."""
    image = read(path).image
    if image.size != (width, height):
        raise ValueError(f"{path}: the mask is {image.width}x{image.height}, the picture {width}x{height}; make them equal")
    mask = torch.from_numpy(np.array(image.convert("L")) >= 128).float()[None, None]
    if not mask.any():
        raise ValueError(f"{path}: the mask is all dark; paint white where the picture may be changed")
    return mask


def find(paths):
    """Files as they are, and for each folder the pictures directly in it, by name; each once, hidden files never.

    Raises ValueError for a folder without pictures. A file that does not exist is reported by `read`.
    """
    found = []
    for path in map(Path, paths):
        inside = [path]
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES and p.name[0] != "." and p.is_file())
            if not inside:
                raise ValueError(f"{path}: no pictures in this folder ({', '.join(SUFFIXES)})")
        found += inside
    return list(dict.fromkeys(found))


def _formats():
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]  # an older Pillow has fewer


@contextlib.contextmanager
def _bombs_refused():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                      # of the decoders: about metadata that is not used here
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


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
        pixels = (pixels @ torch.tensor(_lanczos(pixels.shape[3], width).T).to(pixels)).clamp(0, 1)
    if pixels.shape[2] != height:
        pixels = (torch.tensor(_lanczos(pixels.shape[2], height)).to(pixels) @ pixels).clamp(0, 1)
    return pixels


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
    """How many steps of 1/255 the saved file may differ by: 7 for eps = 0.03, 8 for 8/255. Raises ValueError."""
    steps = math.floor(255 * eps + 1e-9) if 0 < eps <= 1 else 0     # neither nan nor inf has a floor
    if steps < 1:
        raise ValueError(f"eps {eps:.6g}: the budget must be from 1/255 (one 8-bit step) to 1, such as 0.03 or 8/255")
    return steps


def quantize(original, delta, eps):
    """The `Picture` original plus delta (1,channels,H,W) in 8 bits, within the budget: a PIL image of original.mode.

    delta is rounded to steps of 1/255 and cut to the budget, the sum to 0..255; where delta is 0 nothing changes.
    """
    expected = (1, original.channels, original.image.height, original.image.width)
    if tuple(delta.shape) != expected:
        raise ValueError(f"delta is {tuple(delta.shape)}; this {original.mode} picture takes {expected}")
    limit = budget(eps)
    delta = delta.detach()[0].permute(1, 2, 0).cpu().double().numpy()
    steps = (delta * 255).round().clip(-limit, limit).astype(np.int16)
    immunized = np.asarray(original.image).astype(np.int16) + steps      # one channel of steps serves all three
    return original.put_together(Image.fromarray(immunized.clip(0, 255).astype(np.uint8)))


def steps_used(one, other):
    """The largest difference of two images of one size in any colour channel, in 8-bit steps (L-infinity * 255)."""
    if one.size != other.size:
        raise ValueError(f"the pictures differ in size: {one.width}x{one.height} and {other.width}x{other.height}")
    one, other = (np.asarray(image.convert("RGB")).astype(np.int16) for image in (one, other))
    return int(np.abs(one - other).max())


# ---------------------------------------------------------------------------------------------------------------- write

def write(path, image, *, overwrite=False):
    """Write a PIL image to a file as PNG, whole or not at all: see `files.writing.write`."""
    writing.write(path, _png(image), overwrite=overwrite)


def write_checked(path, image, original, eps, *, overwrite=False):
    """Write an immunized picture as PNG and decode it again before it gets its name. Returns the steps it really uses.

    Raises ValueError, with nothing left behind, unless size, mode and alpha are those of the `Picture` original and every
    colour is within the budget.
    """
    def check(part):
        with _bombs_allowed(), Image.open(part, formats=["PNG"]) as decoded:
            decoded.load()
            if decoded.size != original.image.size or decoded.mode != original.mode:
                raise ValueError(f"{path}: decodes to {decoded.mode} {decoded.size}, the original is "
                                 f"{original.mode} {original.image.size}; it was not written")
            if original.alpha and decoded.getchannel("A").tobytes() != original.alpha.tobytes():
                raise ValueError(f"{path}: the transparency changed; it was not written")
            steps = steps_used(decoded, original.image)
        if steps > budget(eps):
            raise ValueError(f"{path}: decodes to {steps}/255 from the original, the budget is {budget(eps)}/255; "
                             "it was not written")
        return steps
    return writing.write(path, _png(image), overwrite=overwrite, check=check)


def _png(image):
    encoded = io.BytesIO()
    image.save(encoded, "PNG")
    return encoded.getvalue()


@contextlib.contextmanager
def _bombs_allowed():
    with warnings.catch_warnings():                          # our own file, of a size that was accepted when it was read
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield


# -------------------------------------------------------------------------------------------------------- contact sheet

def amplify(original, immunized, gain=10):
    """The perturbation made visible: mid-grey plus `gain` times the difference of two images, as RGB."""
    original, immunized = (np.asarray(image.convert("RGB")).astype(np.int16) for image in (original, immunized))
    return Image.fromarray((128 + gain * (immunized - original)).clip(0, 255).astype(np.uint8))


def sheet(columns, footer="", cell=384):
    """Pictures side by side, each below its caption, as one RGB image: columns are (caption, PIL image).

    Each picture is fitted into cell x cell, small ones scaled up by a whole factor without smoothing. Captions and the
    `footer`, a remark that runs below them all, are wrapped. Transparency is shown on white.
    """
    if not columns:
        raise ValueError("a contact sheet needs at least one picture")
    pictures = [_fitted(_on_white(image), cell) for _, image in columns]
    width, height = max(200, *(p.width for p in pictures)), max(p.height for p in pictures)
    size, gap = 18, 12
    font = ImageFont.load_default(size)
    captions = [_wrapped(caption, font, width, lines=5) for caption, _ in columns]
    line = round(size * 1.3)
    top = gap + line * max(map(len, captions)) + gap
    total = gap + len(columns) * (width + gap)
    remarks = _wrapped(footer, font, total - 2 * gap, lines=8)
    made = Image.new("RGB", (total, top + height + gap + (len(remarks) * line + gap if remarks else 0)), "white")
    draw = ImageDraw.Draw(made)
    for i, (image, caption) in enumerate(zip(pictures, captions, strict=True)):
        left = gap + i * (width + gap)
        draw.multiline_text((left, gap), "\n".join(caption), fill="black", font=font, spacing=line - size)
        made.paste(image, (left + (width - image.width) // 2, top + (height - image.height) // 2))
    draw.multiline_text((gap, top + height + gap), "\n".join(remarks), fill="black", font=font, spacing=line - size)
    return made


def _on_white(image):
    kept = picture(image)
    white = Image.new("RGB", kept.image.size, "white")
    white.paste(kept.image, mask=kept.alpha)
    return white


def _fitted(image, cell):
    long = max(image.size)
    if long <= cell:
        return image.resize((image.width * (cell // long), image.height * (cell // long)), Image.Resampling.NEAREST)
    return image.resize((max(image.width * cell // long, 1), max(image.height * cell // long, 1)), Image.Resampling.LANCZOS)


def _wrapped(text, font, width, lines):
    """Text as at most `lines` lines that fit the width; a word that is too long is broken, text too long ends in dots."""
    rows = []
    for word in text.split():
        if rows and font.getlength(f"{rows[-1]} {word}") <= width:
            rows[-1] += f" {word}"
            continue
        rows.append("")
        for letter in word:
            if font.getlength(rows[-1] + letter) > width:
                rows.append("")
            rows[-1] += letter
    if len(rows) > lines:
        rows = rows[:lines]
        while font.getlength(rows[-1] + "...") > width:
            rows[-1] = rows[-1][:-1]
        rows[-1] += "..."
    return rows
