"""Every depth, order, plane and direction that a picture's header may give is read rightly or refused.

The expected pixels are computed from the samples that the file was written from, never by Pillow.
"""

import io
import itertools
import struct
import zlib

import numpy as np
import pytest
from picture_files import chunk, png, tiff
from PIL import Image, TiffImagePlugin

from sifm_min import images
from sifm_min.files import png as png_file

HEIGHT, WIDTH = 7, 10


def samples(bits, *more, seed=0):
    return np.random.default_rng(seed).integers(0, 1 << bits, (HEIGHT, WIDTH, *more))


def in_eight_bits(values, bits):
    return values * 255 // ((1 << bits) - 1) if bits <= 8 else values >> bits - 8


def turned(values, orientation):
    """Upright pixels of what is stored with this orientation of EXIF."""
    flipped = {1: values, 2: values[:, ::-1], 3: values[::-1, ::-1], 4: values[::-1]}
    if orientation < 5:
        return flipped[orientation]
    across = np.swapaxes(values, 0, 1)
    return {5: across, 6: across[:, ::-1], 7: across[::-1, ::-1], 8: across[::-1]}[orientation]


def grey(values):
    return np.stack([values] * 3, -1)


def check(folder, data, colours, alpha=None, within=1):
    """The file is read as these colours and this alpha. Returns the Picture."""
    path = folder / "a.picture"
    path.write_bytes(data)
    found = images.read(path)
    assert found.image.size == colours.shape[1::-1]
    assert np.abs(np.asarray(found.image).astype(int) - colours).max() <= within
    assert (found.alpha is None) == (alpha is None)
    if alpha is not None:
        assert np.abs(np.asarray(found.alpha).astype(int) - alpha).max() <= within
    return found


def refusal(folder, data):
    """The sentence with which the file is refused."""
    path = folder / "a.picture"
    path.write_bytes(data)
    with pytest.raises(ValueError) as refused:
        images.read(path)
    assert str(refused.value).startswith(f"{path}") and "\n" not in str(refused.value)
    return str(refused.value)


# -- TIFF --------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("deflate", [False, True], ids=["raw", "deflate"])
@pytest.mark.parametrize("order", "<>", ids=["little", "big"])
@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_grey_tiffs_of_every_depth_and_direction(tmp_path, bits, order, deflate):
    for white, orientation, strip in itertools.product((0, 1), range(1, 9), (3, HEIGHT)):
        if (bits, order, white) == (16, ">", 0):             # Pillow has no such mode
            continue
        values = samples(bits)
        shown = in_eight_bits(values, bits)
        data = tiff(values, bits, white, order=order, deflate=deflate, orientation=orientation, rows_per_strip=strip)
        found = check(tmp_path, data, turned(grey(shown if white else 255 - shown), orientation))
        assert found.mode == "L" and found.channels == 1


def test_a_12_bit_tiff_is_as_bright_as_it_was(tmp_path):
    for deflate, orientation in itertools.product((False, True), (1, 6)):
        values = samples(12)
        found = check(tmp_path, tiff(values, 12, 1, deflate=deflate, orientation=orientation),
                      turned(grey(in_eight_bits(values, 12)), orientation))
        assert found.info["notes"] == ["12 bits a channel, of which the upper 8 are kept"]


@pytest.mark.parametrize("name, more", [
    ("10 bits", {"bits": 10}), ("14 bits", {"bits": 14}), ("32 bits", {"bits": 32}),
    ("12, 0 is white", {"bits": 12, "white": 0}),
    ("signed 8", {"bits": 8, "sample_format": 2}), ("signed 16", {"bits": 16, "sample_format": 2}),
    ("float", {"bits": 32, "sample_format": 3}), ("float, 0 is white", {"bits": 32, "white": 0, "sample_format": 3}),
    ("16 big, 0 is white", {"bits": 16, "white": 0, "order": ">"}),
])
def test_grey_tiffs_without_one_meaning_are_refused(tmp_path, name, more):
    bits, white = more.pop("bits"), more.pop("white", 1)
    for deflate in (False, True):
        assert "convert it" in refusal(tmp_path, tiff(samples(bits), bits, white, deflate=deflate, **more))


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("planar", [1, 2])
def test_rgb_tiffs_in_planes_and_pixels(tmp_path, planar, bits):
    for order, deflate, orientation, count in itertools.product("<>", (False, True), (1, 8), (3, 4)):
        values = samples(bits, count)
        data = tiff(values, bits, 2, order=order, deflate=deflate, planar=planar, orientation=orientation,
                    extra_samples=(2,) if count == 4 else (), rows_per_strip=3)
        if planar == 2 and bits == 16 and not deflate:       # Pillow takes every second byte of a plane
            assert "16 bits a channel in separate planes" in refusal(tmp_path, data)
            continue
        shown = turned(in_eight_bits(values, bits), orientation)
        found = check(tmp_path, data, shown[..., :3], shown[..., 3] if count == 4 else None)
        assert found.info["notes"] == (["16 bits a channel, of which the upper 8 are kept"] if bits == 16 else [])


def test_grey_and_alpha_in_planes_is_refused(tmp_path):
    values = samples(8, 2)
    check(tmp_path, tiff(values, 8, 1, extra_samples=(2,)), grey(values[..., 0]), values[..., 1])
    for deflate in (False, True):
        data = tiff(values, 8, 1, planar=2, extra_samples=(2,), deflate=deflate)
        assert "separate planes" in refusal(tmp_path, data)


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("scale", [257, 1], ids=["16-bit palette", "8-bit palette"])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_palette_tiffs(tmp_path, bits, scale, orientation):
    """TIFF wants palettes of 16-bit numbers; some programs write 8-bit ones, which Pillow shows as black."""
    for order, deflate in itertools.product("<>", (False, True)):
        values, palette = samples(bits), np.random.default_rng(1).integers(0, 256, (3, 1 << bits))
        data = tiff(values, bits, 3, order=order, deflate=deflate, orientation=orientation, colormap=palette.ravel() * scale)
        check(tmp_path, data, turned(np.stack([colour[values] for colour in palette], -1), orientation), within=0)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "RGB", "LA"])
def test_turned_tiffs_of_pillow_opened_by_path(tmp_path, mode):
    """Pillow maps these from the disk, in rows of the wrong length."""
    stored = Image.fromarray(samples(8, 3).astype(np.uint8))
    stored = stored.quantize(16) if mode == "P" else stored.convert(mode)
    for orientation in (5, 6, 7, 8):
        stored.save(tmp_path / "a.tif", tiffinfo={274: orientation})
        expected = turned(np.asarray(stored.convert("RGB")), orientation)
        for found in (images.read(tmp_path / "a.tif"), images.picture(Image.open(tmp_path / "a.tif"))):
            assert np.array_equal(np.asarray(found.image), expected)


def test_cut_tiffs_are_refused(tmp_path):
    values = samples(8)
    whole = tiff(values, 8, 1, rows_per_strip=3)
    check(tmp_path, whole, grey(values), within=0)
    counts = whole.index((30).to_bytes(4, "little") * 2 + (10).to_bytes(4, "little"))
    short = whole[:counts] + (5).to_bytes(4, "little") + whole[counts + 4:]
    assert "it holds 45 bytes of pixels, and its size says 70" in refusal(tmp_path, short)
    assert "it has 2 strips or tiles" in refusal(tmp_path, whole.replace(b"\x11\1\4\0\3", b"\x11\1\4\0\2"))
    lower = whole.replace(struct.pack("<HHII", 257, 4, 1, 7), struct.pack("<HHII", 257, 4, 1, 3))
    assert "it has 3 strips or tiles of pixels, and its size says 1" in refusal(tmp_path, lower)


def test_inks_that_are_not_cmyk_are_refused(tmp_path):
    assert "inks" in refusal(tmp_path, tiff(samples(8, 4), 8, 5, tags={332: [2]}))


def test_a_size_that_differs_from_the_header_is_refused(tmp_path, monkeypatch):
    """The guard itself: a decoder that gives another size than the header says."""
    load = TiffImagePlugin.TiffImageFile.load

    def cropped(image):
        result = load(image)
        image.im = image.im.crop((0, 0, 5, 5))
        return result

    monkeypatch.setattr(TiffImagePlugin.TiffImageFile, "load", cropped)
    assert "another size than its header says" in refusal(tmp_path, tiff(samples(8), 8, 1))


# -- PNG ---------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_the_transparent_grey_of_a_png_of_every_depth(tmp_path, depth):
    values = samples(depth)
    for key in {0, 1, (1 << depth) - 1}:
        data = png(values, depth, 0, chunk(b"tRNS", key.to_bytes(2, "big")))
        found = check(tmp_path, data, grey(in_eight_bits(values, depth)), np.where(values == key, 0, 255), within=0)
        assert found.mode == "LA"
        again = images.picture(Image.open(tmp_path / "a.picture"))       # an image that is not loaded yet
        assert again.alpha.tobytes() == found.alpha.tobytes()


def test_16_bit_pngs(tmp_path):
    for colour_type, count in ((0, 1), (2, 3), (4, 2), (6, 4)):
        values = samples(16, count)
        shown = values >> 8
        colours = shown[..., :3] if count > 2 else grey(shown[..., 0])
        found = check(tmp_path, png(values, 16, colour_type), colours, shown[..., -1] if count in (2, 4) else None, within=0)
        assert found.mode == {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}[count]
        assert found.info["notes"] == ["16 bits a channel, of which the upper 8 are kept"]


@pytest.mark.parametrize("depth, colour_type", [(1, 0), (8, 0), (16, 0), (8, 2), (16, 2), (2, 3), (8, 4), (8, 6), (16, 6)])
def test_a_png_that_lacks_rows_is_refused(tmp_path, depth, colour_type):
    """Pillow fills the missing rows with black."""
    count = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour_type]
    palette = chunk(b"PLTE", bytes(range(12))) if colour_type == 3 else b""
    whole = png(samples(depth, count), depth, colour_type, palette)
    (tmp_path / "a.png").write_bytes(whole)
    images.read(tmp_path / "a.png")
    short = png(samples(depth, count)[:-1], depth, colour_type, palette)
    assert refusal(tmp_path, whole[:33] + short[33:]).endswith("its pixels end before the last of 7 rows")


def test_broken_pngs_that_pillow_reads_are_refused(tmp_path):
    head, rest = png(samples(2), 2, 3)[8:33], png(samples(2), 2, 3)[33:]
    assert "the palette is missing" in refusal(tmp_path, png_file.SIGNATURE + head + rest)
    assert "the palette is missing" in refusal(tmp_path, png_file.SIGNATURE + head + chunk(b"PLTE", b"") + rest)
    gamma = chunk(b"gAMA", bytes([0, 0, 200, 0]))
    assert "no PNG header follows" in refusal(tmp_path, png_file.SIGNATURE + gamma + png(samples(8), 8, 0)[8:])


def test_the_length_of_an_interlaced_png():
    """Adam7 on 7 x 10 pixels in two bits, counted by hand: rows of each pass, and bytes of each row with its filter."""
    head = png_file.Header(10, 7, 2, 0, True)
    assert head.length() == 1 * 2 + 1 * 2 + 1 * 2 + 2 * 2 + 2 * 3 + 4 * 3 + 3 * 4
    assert png_file.Header(1, 1, 8, 2, True).length() == 4


@pytest.mark.parametrize("place", [{"extra": True}, {"after": True}])
def test_the_orientation_of_a_png(tmp_path, place):
    exif = Image.Exif()
    exif[274] = 6
    values = samples(8, 3)
    data = png(values, 8, 2, **{where: chunk(b"eXIf", exif.tobytes()[6:]) for where in place})
    check(tmp_path, data, turned(values, 6), within=0)


def test_the_orientation_of_a_webp(tmp_path):
    exif, values, file = Image.Exif(), samples(8, 3), io.BytesIO()
    exif[274] = 8
    Image.fromarray(values.astype(np.uint8)).save(file, "WEBP", lossless=True, exif=exif)
    check(tmp_path, file.getvalue(), turned(values, 8), within=0)


@pytest.mark.parametrize("kind, content", [
    (b"zTXt", b"workflow\0\0" + zlib.compress(b"a" * 3_000_000)),
    (b"iTXt", b"workflow\0\1\0\0\0" + zlib.compress(b"a" * 3_000_000)), (b"tEXt", b"workflow\0" + b"a" * 3_000_000),
], ids=["zTXt", "iTXt", "tEXt"])
def test_a_png_with_a_long_text_is_read(tmp_path, kind, content):
    """Pillow refuses texts above 1 MiB, such as the workflows that image generators store."""
    values = samples(8, 3)
    check(tmp_path, png(values, 8, 2, chunk(kind, content)), values, within=0)


# -- other formats -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("largest", [1, 15, 255, 1023, 65535])
def test_portable_maps_of_every_depth(tmp_path, largest):
    for count in (1, 3):
        values = np.random.default_rng(0).integers(0, largest + 1, (HEIGHT, WIDTH, count))
        data = b"P%d %d %d %d\n" % (5 if count == 1 else 6, WIDTH, HEIGHT, largest)
        data += values.astype(">u2" if largest > 255 else "u1").tobytes()
        shown = values * 255 // largest
        found = check(tmp_path, data, shown if count == 3 else grey(shown[..., 0]))
        deep = [f"{largest.bit_length()} bits a channel, of which the upper 8 are kept"]
        assert found.info["notes"] == (deep if largest > 255 else [])


def jpeg2000(values, depth=8):
    """A JPEG 2000 file whose header says `depth` bits a channel."""
    file = io.BytesIO()
    Image.fromarray(values.astype(np.uint8)).save(file, "JPEG2000")
    data = bytearray(file.getvalue())
    at = data.index(b"\xff\x4f\xff\x51") + 42
    for component in range(int.from_bytes(data[at - 2:at], "big")):
        data[at + 3 * component] = depth - 1
    return bytes(data)


def test_jpeg2000_of_few_or_unusual_colours_is_refused(tmp_path):
    whole = jpeg2000(samples(8, 3))
    check(tmp_path, whole, samples(8, 3), within=0)
    assert "4 bits a channel in JPEG 2000" in refusal(tmp_path, jpeg2000(samples(8, 3), 4))
    space = whole.index(b"colr\1\0\0") + 7
    assert "colour space 21" in refusal(tmp_path, whole[:space] + (21).to_bytes(4, "big") + whole[space + 4:])


def test_a_file_of_gigabytes_is_refused_unread(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(bytes(100))
    monkeypatch.setattr(images, "LARGEST_FILE", 99)
    monkeypatch.setattr(type(tmp_path), "read_bytes", lambda path: pytest.fail("it was read"))
    with pytest.raises(ValueError, match="a.png: more than 0 GiB; scale it down first"):
        images.read(tmp_path / "a.png")
