"""PNG as bytes: its chunks, the ones that decide how colours look, and a check that no row is missing.

Only the standard library. Pillow decodes the pixels; this file reads what Pillow drops (cICP, the scale of a transparent
grey) or refuses (a profile or a text above 1 MiB).
"""

import struct
import zlib
from dataclasses import dataclass, field

SIGNATURE = b"\x89PNG\r\n\x1a\n"
SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}                     # colour type -> samples of a pixel
# Chunks that decide how the numbers look, and their lengths. A chunk of another length is ignored, as viewers do.
COLOUR = {b"cICP": 4, b"sRGB": 1, b"gAMA": 4, b"cHRM": 32, b"mDCV": 24, b"cLLI": 8}
LARGEST_PROFILE = (1 << 20) - 1                              # Pillow opens no PNG with a longer ICC profile
# Kept for Pillow beside the critical chunks: transparency, orientation and the frames of an animation.
KEPT = (b"tRNS", b"eXIf", b"acTL", b"fcTL", b"fdAT")
ORIENTATION_TEXTS = (b"XML:com.adobe.xmp\0", b"Raw profile type exif\0")
# Adam7, the interlacing of PNG: (first row, first column, row step, column step) of each pass.
PASSES = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))


@dataclass(frozen=True)
class Header:
    """The facts of a PNG. key: the transparent grey (one sample), or None. icc: the profile, or None.

    palette: True if there is one. chunks: ((kind, data), ...) of COLOUR, in file order.
    lean: the file without the chunks that decoding does not need.
    """

    width: int
    height: int
    depth: int
    colour_type: int
    interlaced: bool
    key: int | None = None
    icc: bytes | None = None
    palette: bool = False
    chunks: tuple = ()
    lean: bytes = field(default=b"", repr=False)

    @property
    def size(self):
        return self.width, self.height

    def length(self):
        """The bytes that all rows have after decompression, with one byte a row for the filter."""
        parts = PASSES if self.interlaced else ((0, 0, 1, 1),)
        total = 0
        for top, left, down, right in parts:
            rows, columns = -(-(self.height - top) // down), -(-(self.width - left) // right)
            if rows > 0 and columns > 0:
                total += rows * (1 + -(-columns * self.depth * SAMPLES[self.colour_type] // 8))
        return total


def header(data):
    """The Header of a PNG; None where the bytes do not begin as a PNG with a valid IHDR."""
    parts = list(_chunks(data))
    if not parts or parts[0][0] != b"IHDR" or len(parts[0][1]) != 13:
        return None
    width, height, depth, colour_type, _, _, interlace = struct.unpack(">IIBBBBB", parts[0][1])
    if colour_type not in SAMPLES:
        return None
    found, icc, key = {}, None, None
    for kind, content, valid, _ in parts:
        if kind == b"IDAT":
            break                                            # what follows the pixels decides nothing
        if kind in COLOUR and valid and len(content) == COLOUR[kind]:
            found.setdefault(kind, content)
        elif kind == b"iCCP" and valid and icc is None:
            icc = _profile(content)
        elif kind == b"tRNS" and colour_type == 0 and len(content) == 2:
            key = struct.unpack(">H", content)[0] & ((1 << depth) - 1)
    lean = SIGNATURE + b"".join(whole for kind, content, _, whole in parts if _needed(kind, content))
    palette = any(kind == b"PLTE" and content for kind, content, *_ in parts)
    return Header(width, height, depth, colour_type, interlace == 1, key, icc, palette, tuple(found.items()), lean)


def rows_missing(data, head):
    """True if the compressed pixels of a PNG end before its last row. A damaged stream is left to the decoder."""
    inflate, needed = zlib.decompressobj(), head.length()
    for kind, content, _, _ in _chunks(data):
        while kind == b"IDAT" and content and needed > 0 and not inflate.eof:
            try:
                needed -= len(inflate.decompress(content, 1 << 24))
            except zlib.error:
                return False
            content = inflate.unconsumed_tail
    return needed > 0


def with_chunks(data, chunks):
    """A PNG with further chunks ((kind, data), ...) behind its IHDR."""
    end = len(SIGNATURE) + 25
    return data[:end] + b"".join(_chunk(*chunk) for chunk in chunks) + data[end:]


def _chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _chunks(data):
    """Yield (kind, content, True if its checksum is right, the chunk as it stands) up to IEND or the first cut."""
    at = len(SIGNATURE)
    while data.startswith(SIGNATURE) and at + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        end = at + 12 + length
        if end > len(data):
            yield kind, data[at + 8:], False, data[at:]      # cut off: the decoder says so
            return
        content = data[at + 8:end - 4]
        yield kind, content, zlib.crc32(kind + content) == struct.unpack_from(">I", data, end - 4)[0], data[at:end]
        at = end
        if kind == b"IEND":
            return


def _needed(kind, content):
    """True for chunks that Pillow needs: critical ones, KEPT, and texts in which an orientation may stand."""
    return kind[:1].isupper() or kind in KEPT or kind[1:] in (b"TXt", b"EXt") and content.startswith(ORIENTATION_TEXTS)


def _profile(content):
    """The ICC profile in an iCCP chunk; None where it is damaged or above 64 MiB."""
    name, _, rest = content.partition(b"\0")
    inflate = zlib.decompressobj()
    try:
        profile = inflate.decompress(rest[1:], 1 << 26)
    except zlib.error:
        return None
    return profile if name and rest[:1] == b"\0" and inflate.eof else None
