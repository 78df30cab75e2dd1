"""Nine hundred mutated pictures: each is read as its header says, or refused in one sentence. Never a traceback.

Twenty-odd whole files are mutated in their bytes, in their length, in the chunks of a PNG (whose checksums are then set
right, so that the change is believed) and in the tags of a TIFF. The seed is fixed; a failure names the number of its case.
Sizes are read again by parsers of this file. The pixels of a PNG without filters and of a plain TIFF are decoded here too.
"""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from picture_files import PNG_COLOURS, chunk, icc_header, png, tiff
from PIL import Image

from sifm_min import images

SEED, CASES = 20261128, 900
HEIGHT, WIDTH = 9, 12
TAG_VALUES = (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 16, 32, 258, 259, 262, 274, 284)


def samples(bits, count=1, seed=0):
    return np.random.default_rng(seed).integers(0, 1 << bits, (HEIGHT, WIDTH, count))


def saved(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def whole_files():
    """{name: bytes}: pictures of every format and many kinds, each of which is read as it stands."""
    colours = Image.fromarray(samples(8, 3).astype(np.uint8))
    frames = [Image.fromarray(samples(8, 3, seed).astype(np.uint8)) for seed in range(3)]
    exif = Image.Exif()
    exif[274] = 6
    palette = chunk(b"PLTE", samples(8, 3).astype(np.uint8).tobytes()[:48])
    extra = chunk(b"gAMA", struct.pack(">I", 45455)) + chunk(b"iCCP", b"p\0\0" + zlib.compress(icc_header()))
    files = {
        "grey1.png": png(samples(1), 1, 0), "grey2.png": png(samples(2), 2, 0, chunk(b"tRNS", b"\0\1")),
        "grey4.png": png(samples(4), 4, 0, chunk(b"tRNS", b"\0\7")), "grey16.png": png(samples(16), 16, 0),
        "rgb8.png": png(samples(8, 3), 8, 2, extra), "rgb16.png": png(samples(16, 3), 16, 2),
        "palette4.png": png(samples(4), 4, 3, palette + chunk(b"tRNS", bytes(range(0, 160, 10)))),
        "grey_alpha.png": png(samples(8, 2), 8, 4), "rgba.png": png(samples(8, 4), 8, 6, chunk(b"eXIf", exif.tobytes()[6:])),
        "apng.png": saved(frames[0], "PNG", save_all=True, append_images=frames[1:]),
        "grey1.tif": tiff(samples(1), 1, 0), "grey4.tif": tiff(samples(4), 4, 1, rows_per_strip=4),
        "grey8.tif": tiff(samples(8), 8, 1, orientation=6), "grey12.tif": tiff(samples(12), 12, 1),
        "grey16.tif": tiff(samples(16), 16, 0), "big16.tif": tiff(samples(16), 16, 1, order=">"),
        "rgb8.tif": tiff(samples(8, 3), 8, 2, rows_per_strip=4), "planes.tif": tiff(samples(8, 3), 8, 2, planar=2),
        "rgba16.tif": tiff(samples(16, 4), 16, 2, extra_samples=(2,)), "cmyk.tif": tiff(samples(8, 4), 8, 5),
        "palette.tif": tiff(samples(4), 4, 3, colormap=np.arange(48) * 1300),
        "deflate.tif": tiff(samples(8), 8, 1, deflate=True),
        "rgb.jpg": saved(colours, "JPEG", exif=exif, icc_profile=icc_header()), "grey.jpg": saved(colours.convert("L"), "JPEG"),
        "progressive.jpg": saved(colours, "JPEG", progressive=True), "cmyk.jpg": saved(colours.convert("CMYK"), "JPEG"),
        "moves.gif": saved(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "moves.webp": saved(frames[0], "WEBP", lossless=True, save_all=True, append_images=frames[1:]),
        "rgb.bmp": saved(colours, "BMP"), "palette.bmp": saved(colours.quantize(16), "BMP"), "rgb.ppm": saved(colours, "PPM"),
        "deep.pgm": b"P5 12 9 1023\n" + (samples(16) % 1024).astype(">u2").tobytes(), "rgb.jp2": saved(colours, "JPEG2000"),
    }
    if "AVIF" in Image.SAVE:
        files["rgb.avif"] = saved(colours, "AVIF")
    return files


# -- mutations ---------------------------------------------------------------------------------------------------------

def flipped(data, random):
    data = bytearray(data)
    for at in random.integers(0, len(data), random.integers(1, 5)):
        data[at] = random.integers(256)
    return bytes(data)


def early(data, random):
    """As `flipped`, in the first bytes, where the header is."""
    data = bytearray(data)
    for at in random.integers(0, min(64, len(data)), 2):
        data[at] = random.choice([0, 1, 2, 3, 4, 6, 8, 16, 32, 255])
    return bytes(data)


def cut(data, random):
    return data[:random.integers(0, len(data))]


def inserted(data, random):
    at = random.integers(0, len(data))
    return data[:at] + random.bytes(random.integers(1, 9)) + data[at:]


def believed(data, random):
    """A PNG with one changed, doubled, lost or moved chunk, all checksums right."""
    parts, at = [], 8
    while at < len(data):
        length = int.from_bytes(data[at:at + 4], "big")
        parts.append((data[at + 4:at + 8], data[at + 8:at + 8 + length]))
        at += 12 + length
    which = random.integers(len(parts))
    kind, content = parts[which]
    way = random.integers(6)
    if way < 3 and content:
        new = bytearray(content)
        new[random.integers(len(new))] = random.choice([0, 1, 2, 3, 4, 6, 8, 9, 16, 200, 255])
        parts[which] = kind, bytes(new)
    elif way == 3:
        parts[which:which + 1] = []
    elif way == 4:
        parts.insert(random.integers(len(parts)), (kind, content))
    else:
        parts[which] = kind, content[:random.integers(0, len(content) + 1)]
    return data[:8] + b"".join(chunk(*part) for part in parts)


def retagged(data, random):
    """A TIFF with one or two values of its tags changed."""
    data, order = bytearray(data), "<" if data[:2] == b"II" else ">"
    count = struct.unpack_from(order + "H", data, 8)[0]
    for _ in range(random.integers(1, 3)):
        at = 10 + 12 * random.integers(count) + random.choice([0, 2, 4, 8])
        struct.pack_into(order + "H", data, at, random.choice(TAG_VALUES))
    return bytes(data)


def mutated(name, data, random):
    ways = [flipped, early, cut, inserted]
    ways += [believed] * 4 if name.endswith("png") else [retagged] * 4 if name.endswith("tif") else []
    return ways[random.integers(len(ways))](data, random)


# -- what the header says ----------------------------------------------------------------------------------------------

def png_header(data):
    return struct.unpack(">IIBBBBB", data[16:29])


def png_pixels(data):
    """The 8-bit colours of a PNG without interlacing and filters, from its chunks; None for other PNGs."""
    width, height, depth, colour_type, _, _, interlaced = png_header(data)
    at, stream, palette = 8, b"", None
    while at + 8 <= len(data) and data[at + 4:at + 8] != b"IEND":
        length, kind = struct.unpack_from(">I4s", data, at)
        stream += data[at + 8:at + 8 + length] if kind == b"IDAT" else b""
        palette = data[at + 8:at + 8 + length] if kind == b"PLTE" else palette
        at += 12 + length
    count = PNG_COLOURS[colour_type]
    row = -(-width * depth * count // 8)
    try:
        rows = np.frombuffer(zlib.decompressobj().decompress(stream), np.uint8)
    except zlib.error:
        return None
    if interlaced or len(rows) < height * (row + 1):
        return None
    rows = rows[:height * (row + 1)].reshape(height, row + 1)
    if rows[:, 0].any():
        return None
    values = unpacked(rows[:, 1:], width * count, depth, ">").reshape(height, width, count)
    if colour_type == 3:
        known = np.frombuffer(palette[:len(palette) // 3 * 3], np.uint8).reshape(-1, 3)
        return known[values[..., 0]] if values.max() < len(known) else None
    return in_eight_bits(values, depth)[..., :3 if count > 2 else 1]


def unpacked(rows, count, bits, order):
    """Rows of bytes as `count` samples each."""
    if bits == 16:
        return np.ascontiguousarray(rows).view(f"{order}u2")[:, :count].astype(int)
    ones = np.unpackbits(rows, axis=1)[:, :count * bits].reshape(len(rows), count, bits)
    return ones @ (1 << np.arange(bits)[::-1])


def in_eight_bits(values, bits):
    return values * 255 // ((1 << bits) - 1) if bits <= 8 else values >> bits - 8


def tiff_tags(data):
    """(byte order, {tag: [values]}) of the first page; no tags where one stands twice, lies outside, or is of a rare kind."""
    order = "<" if data[:2] == b"II" else ">"
    start = struct.unpack_from(order + "I", data, 4)[0]
    tags = {}
    for i in range(struct.unpack_from(order + "H", data, start)[0]):
        tag, kind, count = struct.unpack_from(order + "HHI", data, start + 2 + 12 * i)
        code, size = {1: ("B", 1), 3: ("H", 2), 4: ("I", 4)}.get(kind, ("B", 1))
        at = start + 10 + 12 * i
        at = at if count * size <= 4 else struct.unpack_from(order + "I", data, at)[0]
        if tag in tags or at + count * size > len(data) or kind not in (3, 4) or count == 0:
            return order, {}
        tags[tag] = list(struct.unpack_from(f"{order}{count}{code}", data, at))
    return order, tags


def tiff_pixels(data):
    """The 8-bit colours of an uncompressed grey or RGB TIFF, as stored; None for other TIFFs."""
    order, tags = tiff_tags(data)
    if not {256, 257} <= tags.keys():
        return None
    width, height, bits = tags[256][0], tags[257][0], tags.get(258, [1])
    photometric, count = tags.get(262, [0])[0], tags.get(277, [1])[0]
    plain = tags.get(259, [1]) == [1] and tags.get(266, [1]) == [1] and tags.get(284, [1]) == [1] and 273 in tags
    if not plain or (photometric, count) not in ((0, 1), (1, 1), (2, 3)) or len(set(bits)) > 1 or bits[0] not in (
            1, 2, 4, 8, 12, 16):
        return None
    bits, rows = bits[0], min(tags.get(278, [height])[0], height)
    row = -(-width * bits * count // 8)
    strips = [data[at:at + row * min(rows, height - i * rows)] for i, at in enumerate(tags[273][:-(-height // rows)])]
    stored = np.frombuffer(b"".join(strips), np.uint8)
    if len(stored) != row * height:
        return None
    shown = in_eight_bits(unpacked(stored.reshape(height, row), width * count, bits, order), bits)
    return (255 - shown if photometric == 0 else shown).reshape(height, width, count)


def size_by_header(data):
    """(width, height) as the header of these formats says; None for other formats."""
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return png_header(data)[:2]
    if data[:4] in (b"II*\0", b"MM\0*"):
        tags = tiff_tags(data)[1]
        return (tags[256][0], tags[257][0]) if {256, 257} <= tags.keys() else None
    if data[:3] == b"GIF":
        return struct.unpack_from("<HH", data, 6)
    if data[:2] == b"BM":
        return tuple(map(abs, struct.unpack_from("<ii", data, 18))) if data[14] >= 40 else struct.unpack_from("<HH", data, 18)
    if data[:2] == b"\xff\xd8":
        at = 2
        while at + 9 < len(data):
            if data[at] != 0xFF or data[at + 1] in (0xFF, 0):
                at += 1
            elif data[at + 1] in (0xC0, 0xC1, 0xC2):
                return struct.unpack_from(">HH", data, at + 5)[::-1]
            else:
                at += 2 + int.from_bytes(data[at + 2:at + 4], "big")
    return None


def check(picture, data, folder):
    """The picture agrees with the header of its file, and can be perturbed, written and read again."""
    width, height = picture.image.size
    if size := size_by_header(data):
        larger = picture.info["format"] == "GIF" and width >= size[0] and height >= size[1]
        assert tuple(size) in ((width, height), (height, width)) or larger, size     # a frame may exceed a GIF's screen
    assert picture.image.mode == "RGB" and picture.mode in ("L", "LA", "RGB", "RGBA")
    assert picture.image.im.size == picture.image.size
    assert (picture.alpha is not None) == picture.mode.endswith("A")
    assert picture.alpha is None or picture.alpha.size == picture.image.size
    kind = picture.info["format"]
    expected = png_pixels(data) if kind == "PNG" else tiff_pixels(data) if kind == "TIFF" else None
    if expected is not None:
        found = np.asarray(picture.image).astype(int)
        turns = [np.rot90(view, k) for view in (expected, expected[:, ::-1]) for k in range(4)]
        assert any(turn.shape[:2] == found.shape[:2] and np.abs(found - turn).max() <= 1 for turn in turns)
    delta = torch.full((1, picture.channels, *picture.image.size[::-1]), 0.02)
    images.write_checked(folder / "out.png", images.quantize(picture, delta, 0.03), picture, 0.03, overwrite=True)
    return expected is not None


def test_whole_files_are_read(tmp_path):
    """Without this a fuzz test would pass where everything is refused."""
    for name, data in whole_files().items():
        (tmp_path / name).write_bytes(data)
        check(images.read(tmp_path / name), data, tmp_path)


@pytest.mark.slow
def test_mutated_pictures_are_right_or_refused(tmp_path):
    files, counts = list(whole_files().items()), {"read": 0, "refused": 0, "compared": 0}
    for case in range(CASES):
        random = np.random.default_rng((SEED, case))
        name, data = files[case % len(files)]
        data = mutated(name, data, random)
        (tmp_path / name).write_bytes(data)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")               # a warning on a user's terminal is no sentence of ours
                picture = images.read(tmp_path / name)
        except ValueError as error:                          # anything else ends the test with its traceback
            sentence = str(error)
            assert name in sentence and "\n" not in sentence and len(sentence) < 400, f"case {case}: {sentence}"
            counts["refused"] += 1
            continue
        try:
            counts["compared"] += check(picture, data, tmp_path)
        except AssertionError as error:
            pytest.fail(f"case {case}, {name}: {picture.info}, {picture.image.size}: {error}")
        counts["read"] += 1
    assert counts["read"] > 250 and counts["refused"] > 250 and counts["compared"] > 60, counts
