"""The signs in a picture file that decide how its numbers look: ICC profiles, EXIF, and the boxes of AVIF and JPEG 2000."""

import io
import struct

from PIL import ImageCms

# Adobe RGB (1998) as PNG says it: gamma 563/256, white D65, and its three primaries, in steps of 1/100000.
ADOBE_RGB = ((b"gAMA", struct.pack(">I", 45471)),
             (b"cHRM", struct.pack(">8I", 31270, 32900, 64000, 33000, 21000, 71000, 15000, 6000)))
SRGB = ((b"sRGB", b"\0"),)
EXIF, INTEROPERABILITY, COLOUR_SPACE, INTEROPERABILITY_INDEX = 0x8769, 0xA005, 0xA001, 1
CONTAINERS = {b"jp2h": 0, b"meta": 4, b"iprp": 0, b"ipco": 0}      # boxes that hold boxes: bytes before the first one
UNSAID = {(1, 13), (2, 2)}                                   # (primaries, transfer) of sRGB, and of "unspecified"


def fitting(icc, grey):
    """(profile, chunks, notes): an ICC profile as a PNG of this kind may carry it, or why it cannot."""
    if icc is None:
        return None, (), []
    if len(icc) < 132 or icc[36:40] != b"acsp":
        return None, (), ["its colour profile is damaged, and is left out"]
    space = icc[16:20].decode("latin-1").strip()
    if space == ("GRAY" if grey else "RGB"):
        return icc, (), []
    if grey and space == "RGB" and any("sRGB".encode(code) in icc for code in ("ascii", "utf-16-be")):
        return None, SRGB, []                                # the same curve, said as a grey PNG may say it
    kind = "grey" if grey else "RGB"
    return None, (), [f"its colour profile is one for {space}, which {kind} pixels cannot have, and is left out"]


def to_srgb(image, icc):
    """An RGB or CMYK image in sRGB, converted by its ICC profile; None where that fails or Pillow has no LittleCMS."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(icc))
        return ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB",
                                         renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
                                         flags=ImageCms.Flags.BLACKPOINTCOMPENSATION)
    except (ImageCms.PyCMSError, ImportError, OSError, ValueError, TypeError):
        return None


def of_exif(exif):
    """(chunks, notes) of EXIF without an ICC profile: Adobe RGB (index R03) as PNG says it, or "not sRGB, unknown"."""
    space = exif.get_ifd(EXIF).get(COLOUR_SPACE)
    index = exif.get_ifd(INTEROPERABILITY).get(INTEROPERABILITY_INDEX)
    if isinstance(index, bytes):
        index = index.decode("latin-1")
    if space == 2 or space == 0xFFFF and str(index or "").startswith("R03"):
        return ADOBE_RGB, ["its colours are Adobe RGB by its EXIF; the PNG says so by gAMA and cHRM"]
    if space == 0xFFFF:
        return (), ["its EXIF says that its colours are not sRGB, and nothing says what they are; kept as they are"]
    return (), []


def of_info(info):
    """The chunks that Pillow keeps in the `info` of a PNG which it has opened."""
    chunks = []
    if "srgb" in info:
        chunks.append((b"sRGB", bytes([info["srgb"] & 3])))
    if info.get("gamma"):
        chunks.append((b"gAMA", struct.pack(">I", round(info["gamma"] * 100000))))
    if len(info.get("chromaticity", ())) == 8:
        chunks.append((b"cHRM", struct.pack(">8I", *(round(value * 100000) for value in info["chromaticity"]))))
    return tuple(chunks)


def boxes(data, start=0, end=None):
    """Yield (kind, content) of the boxes of JPEG 2000 and AVIF, and of the boxes inside CONTAINERS."""
    end = len(data) if end is None else end
    while start + 8 <= end:
        size, kind = struct.unpack_from(">I4s", data, start)
        first = start + 8
        if size == 1 and first + 8 <= end:
            size, first = struct.unpack_from(">Q", data, first)[0], first + 8
        stop = end if size == 0 else start + size
        if stop > end or stop < first:
            return
        if kind in CONTAINERS:
            yield from boxes(data, first + CONTAINERS[kind], stop)
        elif kind in (b"colr", b"av1C"):
            yield kind, data[first:stop]
        start = stop


def of_avif(data):
    """(bits a channel, chunks): an AVIF says its colours by CICP numbers, which a PNG has room for."""
    depth, chunks = 8, ()
    for kind, content in boxes(data):
        if kind == b"av1C" and len(content) > 2:
            depth = max(depth, 8 if not content[2] & 0x40 else 12 if content[2] & 0x20 else 10)
        elif kind == b"colr" and content[:4] == b"nclx" and len(content) > 10 and not chunks:
            primaries, transfer = struct.unpack_from(">HH", content, 4)
            if (primaries, transfer) not in UNSAID and max(primaries, transfer) < 256:
                chunks = ((b"cICP", bytes([primaries, transfer, 0, 1])),)      # pixels are RGB, in full range
    return depth, chunks


def of_jpeg2000(data):
    """(bits of each channel, the number of its colour space or None, ICC profile or None)."""
    depths, space, icc = [], None, None
    at = data.find(b"\xff\x4f\xff\x51")                      # SIZ, the first segment of a codestream
    if at >= 0 and at + 42 <= len(data):
        count = struct.unpack_from(">H", data, at + 40)[0]
        depths = [(value & 0x7F) + 1 for value in data[at + 42:at + 42 + 3 * count:3]]
    for kind, content in boxes(data):
        if kind == b"colr" and content[:1] == b"\1" and len(content) >= 7 and space is None:
            space = struct.unpack_from(">I", content, 3)[0]
        elif kind == b"colr" and content[:1] in (b"\2", b"\3") and icc is None:
            icc = content[3:]
    return depths, space, icc


def of_bmp(data):
    """The ICC profile that a BMP of version 5 embeds, or None."""
    if len(data) < 138 or struct.unpack_from("<I", data, 14)[0] < 124 or data[70:74] != b"DEBM":
        return None
    start, size = struct.unpack_from("<II", data, 126)
    return data[14 + start:14 + start + size] or None
