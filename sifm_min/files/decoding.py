"""Decode a picture to 8 bits, upright, and check what Pillow decoded against what the file's header says.

Pillow decides by tables, and where a table has a gap it returns wrong pixels without an error. Every picture is therefore
decoded from memory (Pillow maps turned TIFF files from the disk in rows of the wrong length), and bits per sample,
photometric interpretation, planes, palettes, transparent colours and the number of rows are compared with the header.
What has no one meaning in 8 bits is refused; what was changed is a note.
"""

import contextlib
import io
import struct
import warnings
import zlib
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageFile, ImageOps

from . import colour, png

# Only these are opened: some of Pillow's other formats start programs (EPS runs Ghostscript) or hold no single picture.
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "AVIF", "PPM")
# Formats whose header says something that Pillow does not pass on.
OWN_HEADER = ("PNG", "TIFF", "JPEG2000", "AVIF", "PPM", "BMP")
SIXTEEN = ("I;16", "I;16L", "I;16B", "I;16N")
EIGHT = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "YCbCr", "HSV", "CMYK")
# What Pillow's decoders raise on damaged files, by format and place of the damage (found by damaging files at random).
DAMAGE = (OSError, ValueError, SyntaxError, EOFError, LookupError, TypeError, ArithmeticError, RuntimeError, struct.error,
          zlib.error)
# TIFF tags
WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, ORIENTATION = 256, 257, 258, 259, 262, 274
STRIPS, ROWS_PER_STRIP, STRIP_BYTES, PLANAR, COLORMAP, INK_SET, SAMPLE_FORMAT = 273, 278, 279, 284, 320, 332, 339
TILE_WIDTH, TILE_HEIGHT, TILES = 322, 323, 324
# JPEG 2000's colour spaces that Pillow decodes to RGB or grey: bi-level, CMYK, sRGB, grey, sYCC
JPEG2000_SPACES = (None, 0, 12, 15, 16, 17, 18)


class Refused(ValueError):
    """A picture that could be decoded, and whose colours have no one meaning in 8 bits."""


@dataclass(frozen=True)
class Decoded:
    """image: upright, 8-bit, of mode L, LA, RGB or RGBA. icc: an ICC profile that fits this mode, or None.

    chunks: PNG chunks ((kind, data), ...) that decide how the colours look. info: format, mode, frames of the source, and
    `notes`, sentences on what was changed in reading it.
    """

    image: Image.Image
    icc: bytes | None
    chunks: tuple
    info: dict


@dataclass
class _Header:
    """The header of a picture file. size: as stored, or None if unchecked. depth: bits a channel.

    stored: the bits that Pillow's 16-bit values really have. inverted: 0 is white, and Pillow did not turn it.
    key: the transparent grey in 8 bits. palette: the colours, where Pillow reads them wrong. grey: no colour in the file.
    """

    size: tuple | None = None
    depth: int = 8
    stored: int = 16
    inverted: bool = False
    key: int | None = None
    palette: bytes | None = None
    grey: bool = False
    icc: bytes | None = None
    chunks: tuple = ()
    notes: list = field(default_factory=list)


def decode(data, any_size=False):
    """The bytes of a picture file as a `Decoded`. Raises Refused, Pillow's errors for unknown formats, or DAMAGE.

    any_size: accept also what is above Pillow's warning limit of pixels, because the caller has opened it already.
    """
    head = png.header(data)
    if head is None and data.startswith(png.SIGNATURE):
        raise Refused("it begins as a PNG, and no PNG header follows")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                      # from the decoders, on metadata that is not used here
        warnings.simplefilter("ignore" if any_size else "error", Image.DecompressionBombWarning)
        with Image.open(io.BytesIO(head.lean if head else data), formats=_formats()) as image:
            return _normal(image, _header(image, data, head))


def decode_image(image):
    """A PIL image as a `Decoded`. A file that is open and not yet loaded is read again from its bytes."""
    if isinstance(image, ImageFile.ImageFile) and image.format in OWN_HEADER and image.tile and image.fp:
        here = image.fp.tell()
        image.fp.seek(0)
        data = image.fp.read()
        image.fp.seek(here)                                  # where a later load of this image goes on
        return decode(data, any_size=True)
    deep = image.mode in SIXTEEN
    return _normal(image, _Header(depth=16 if deep else 8, icc=image.info.get("icc_profile"),
                                  chunks=colour.of_info(image.info)))


def _formats():
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]  # an older Pillow has fewer


# ------------------------------------------------------------------------------------------------- what the headers say

def _header(image, data, head):
    """The _Header of a file that Pillow has opened and not yet decoded; raises Refused."""
    if image.format == "PNG" and head:
        return _png(data, head)
    if image.format == "TIFF":
        return _tiff(image)
    found = _Header(icc=image.info.get("icc_profile"))
    if image.format == "AVIF":
        found.depth, found.chunks = colour.of_avif(data)
    elif image.format == "JPEG2000":
        depths, space, icc = colour.of_jpeg2000(data)
        if space not in JPEG2000_SPACES:
            raise Refused(f"its colours are of JPEG 2000's colour space {space}; convert it to sRGB")
        if depths and min(depths) < 8 and image.mode not in ("P", "PA"):
            raise Refused(f"{min(depths)} bits a channel in JPEG 2000, which Pillow reads too dark; convert it to 8 bits")
        found.depth, found.icc = max([8, *depths]), found.icc or icc
    elif image.format == "BMP":
        found.icc = found.icc or colour.of_bmp(data)
    elif image.format == "PPM":
        args = image.tile[0][3] if image.tile else ()
        largest = args[1] if isinstance(args, tuple) and len(args) > 1 and isinstance(args[1], int) else 255
        found.depth = max(8, largest.bit_length() if image.mode != "I" or largest > 255 else 16)
    return found


def _png(data, head):
    if png.rows_missing(data, head):
        raise Refused(f"its pixels end before the last of {head.height} rows")
    if head.colour_type == 3 and not head.palette:
        raise Refused("its colours are numbers in a palette, and the palette is missing")
    key = None if head.key is None or head.depth > 8 else head.key * 255 // ((1 << head.depth) - 1)
    if head.key is not None and head.depth > 8:
        raise Refused("16 bits a channel and one colour of them transparent; convert it to 8 bits with alpha")
    return _Header(head.size, head.depth if head.depth > 8 else 8, key=key, grey=head.colour_type in (0, 4), icc=head.icc,
                   chunks=head.chunks)


def _tiff(image):
    tags = image.tag_v2
    bits, photometric, planar = tags.get(BITS, (1,)), tags.get(PHOTOMETRIC, 0), tags.get(PLANAR, 1)
    depth, raw = max(bits), tags.get(COMPRESSION, 1) == 1
    if set(tags.get(SAMPLE_FORMAT, (1,))) != {1}:
        raise Refused("its samples are signed or not whole numbers, and have no fixed range of colours; convert it to "
                      "8-bit RGB")
    if planar == 2 and (raw and depth > 8 or len(bits) == 2):
        raise Refused(f"{depth} bits a channel in separate planes, which Pillow reads wrong; save it with interleaved "
                      "channels")
    if photometric == 5 and tags.get(INK_SET, 1) != 1:
        raise Refused("its inks are not cyan, magenta, yellow and black; convert it to RGB")
    _check_parts(tags, bits, planar, raw)
    found = _Header((tags[WIDTH], tags[HEIGHT]), max(8, depth), icc=image.info.get("icc_profile"))
    if image.mode in SIXTEEN:
        found.stored, found.inverted = depth, photometric == 0
    if image.mode in ("P", "PA") and max(tags[COLORMAP]) < 256:          # 8-bit numbers where TIFF wants 16
        found.palette = np.array(tags[COLORMAP], np.uint8).reshape(3, -1).T.tobytes()
    if tags.get(ORIENTATION) in (5, 6, 7, 8):
        found.size = found.size[::-1]                        # Pillow turns it while it decodes
    return found


def _check_parts(tags, bits, planar, raw):
    """Refuse a TIFF whose strips or tiles are not as many, or not as long, as its size says.

    Pillow leaves rows black where strips are missing, and draws the strips that are too many over the first.
    """
    width, height, planes = tags[WIDTH], tags[HEIGHT], len(bits) if planar == 2 else 1
    across, down = tags.get(TILE_WIDTH, width), tags.get(TILE_HEIGHT, height)
    if STRIPS in tags:
        across, down = width, min(tags.get(ROWS_PER_STRIP, height), height)
    parts, wanted = tags.get(STRIPS, tags.get(TILES, ())), planes * -(-width // max(1, across)) * -(-height // max(1, down))
    if len(parts) < wanted or raw and len(parts) > wanted:
        raise Refused(f"it has {len(parts)} strips or tiles of pixels, and its size says {wanted}")
    stored = tags.get(STRIP_BYTES, ())
    row = -(-width * sum(bits) // 8) if planar == 1 else sum(-(-width * b // 8) for b in bits)
    if STRIPS in tags and raw and stored and min(stored) > 0 and sum(stored) < row * height:
        raise Refused(f"it holds {sum(stored)} bytes of pixels, and its size says {row * height}")


# --------------------------------------------------------------------------------------------------------------- decode

def _normal(image, head):
    """An opened image as a `Decoded`: the pixels of its first frame, upright, in 8 bits."""
    info = {"format": image.format, "mode": image.mode, "frames": getattr(image, "n_frames", 1), "notes": head.notes}
    if info["frames"] > 1:
        image.seek(0)
        info["notes"].append(f"the first of {info['frames']} frames")
    # Pillow itself reduces 48-bit colours when it decodes; only the decoder's name tells.
    deep = image.mode in SIXTEEN or any(";16" in str(tile[3]) for tile in getattr(image, "tile", ()))
    if 0 in image.size:
        raise Refused(f"its size is {image.width}x{image.height}")
    image.load()
    if image.mode in ("P", "PA") and image.palette is None:
        raise Refused("its colours are numbers in a palette, and the palette is missing")
    transparent = image.has_transparency_data or head.key is not None
    if image.size != image.im.size or head.size and image.format == "PNG" and image.size != head.size:
        raise Refused("it decodes to another size than its header says")
    chunks, exif_notes = _by_exif(image) if head.icc is None and not head.chunks else (head.chunks, [])
    image = ImageOps.exif_transpose(image)
    if head.size and info["format"] == "TIFF" and image.size != head.size:
        raise Refused("it decodes to another size than its header says")
    if head.palette:
        image.putpalette(head.palette)
    if image.mode in SIXTEEN or image.mode == "I" and info["format"] in ("PNG", "PPM"):      # "I": 16 bits to Pillow here
        values, deep = np.asarray(image).astype(np.int32), True
        values = (1 << head.stored) - 1 - values if head.inverted else values
        transparent = transparent and "transparency" in image.info
        image = Image.fromarray((values >> head.stored - 8).clip(0, 255).astype(np.uint8))
    depth = head.depth if head.depth > 8 else 16 if deep else 8
    if depth > 8:
        info["notes"].append(f"{depth} bits a channel, of which the upper 8 are kept")
        if transparent and (image.mode == "L" or "transparency" in image.info):
            raise Refused("16 bits a channel and one colour of them transparent; convert it to 8 bits with alpha")
    if image.mode not in EIGHT:
        raise Refused(f"its mode {image.mode} has no fixed range of colours; convert it to 8-bit RGB")
    if head.key is not None:
        alpha = np.where(np.asarray(image.convert("L")) == head.key, 0, 255).astype(np.uint8)
        image = image.convert("L")
        image.info.pop("transparency", None)
        image.putalpha(Image.fromarray(alpha))
    icc = head.icc
    if image.mode == "CMYK":
        image, icc = _of_cmyk(image, icc, info["notes"]), None
    grey = head.grey or image.mode in ("1", "L", "LA", "La")
    image = image.convert({"La": "LA", "RGBa": "RGBA"}.get(image.mode, image.mode))
    image = image.convert(("L" if grey else "RGB") + ("A" if transparent else ""))
    icc, instead, notes = colour.fitting(icc, grey)
    if icc and len(icc) > png.LARGEST_PROFILE:
        image, icc = _without_profile(image, icc, notes), None
    info["notes"] += [*exif_notes, *notes]
    return Decoded(image, icc, instead or chunks, info)


def _by_exif(image):
    with contextlib.suppress(*DAMAGE):
        return colour.of_exif(image.getexif())
    return (), []


def _of_cmyk(image, icc, notes):
    converted = colour.to_srgb(image, icc) if icc else None
    if converted:
        notes.append("CMYK converted to sRGB by its colour profile")
    else:
        notes.append(f"CMYK converted to RGB, without {'its' if icc else 'a'} colour profile")
    return converted or image.convert("RGB")


def _without_profile(image, icc, notes):
    """The image in sRGB, without a profile that is too large for a PNG."""
    size = f"its colour profile of {len(icc) / 1e6:.1f} MB is larger than other programs open in a PNG"
    converted = colour.to_srgb(image.convert("RGB"), icc) if image.mode in ("RGB", "RGBA") else None
    if converted is None:
        notes.append(f"{size}, and is left out: its colours may look different")
        return image
    notes.append(f"{size}: converted to sRGB")
    if image.mode == "RGBA":
        converted.putalpha(image.getchannel("A"))
    return converted
