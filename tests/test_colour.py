"""Profiles, gamma and primaries are kept in the PNG, converted, or left out with a message."""

import io
import struct
import zlib

import numpy as np
import PIL
import pytest
import torch
from picture_files import chunk, icc_header, png
from PIL import Image, ImageCms

from sifm_min import images
from sifm_min.files import colour
from sifm_min.files import png as png_file

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
LINEAR = (b"gAMA", struct.pack(">I", 100000))
P3 = (b"cHRM", struct.pack(">8I", 31270, 32900, 68000, 32000, 26500, 69000, 15000, 6000))
PQ = (b"cICP", bytes([9, 16, 0, 1]))
MASTERING = (b"mDCV", bytes(range(24)))
LIGHT = (b"cLLI", bytes(range(8)))
INTENT = (b"sRGB", b"\1")


def samples(count=3, seed=0, size=(6, 9)):
    return np.random.default_rng(seed).integers(0, 256, (*size, count), np.uint8)


def swapped():
    """A profile whose red and blue primaries have changed places, so that a conversion by it shows."""
    profile = bytearray(SRGB)
    tags = {bytes(profile[at:at + 4]): at for at in range(132, 132 + 12 * int.from_bytes(profile[128:132], "big"), 12)}
    red, blue = (slice(tags[name] + 4, tags[name] + 12) for name in (b"rXYZ", b"bXYZ"))
    profile[red], profile[blue] = profile[blue], profile[red]
    return bytes(profile)


def long(profile, length=1 << 20):
    """The same profile with unused bytes behind its tags."""
    return struct.pack(">I", length) + profile[4:] + np.random.default_rng(0).bytes(length - len(profile))


def written(picture, folder, overwrite=True):
    """The bytes of the immunized picture, as the command writes it."""
    delta = torch.full((1, picture.channels, *picture.image.size[::-1]), 0.02)
    target = folder / "immunized.png"
    images.write_checked(target, images.quantize(picture, delta, 0.03), picture, 0.03, overwrite=overwrite)
    with Image.open(target) as opened:                       # anybody's Pillow
        opened.load()
    return target.read_bytes()


def read(folder, data, name="a.png"):
    (folder / name).write_bytes(data)
    return images.read(folder / name)


@pytest.mark.parametrize("chunks", [[LINEAR], [LINEAR, P3], [PQ], [PQ, MASTERING, LIGHT, LINEAR], [INTENT], []],
                         ids=["gamma", "primaries", "HDR", "HDR with metadata", "sRGB", "none"])
@pytest.mark.parametrize("colour_type", [0, 2, 3, 4, 6])
def test_colour_chunks_reach_the_written_png(tmp_path, colour_type, chunks):
    pixels = samples(png_file.SAMPLES[colour_type])
    palette = chunk(b"PLTE", samples(3, 1, (1, 256)).tobytes()) if colour_type == 3 else b""
    picture = read(tmp_path, png(pixels, 8, colour_type, b"".join(chunk(*c) for c in chunks) + palette))
    assert picture.info["notes"] == []
    for data in (written(picture, tmp_path), edited(picture, tmp_path)):
        assert png_file.header(data).chunks == tuple(chunks)
    again = images.picture(Image.open(tmp_path / "a.png"))   # an image that is not loaded yet
    assert again.chunks == tuple(chunks)


def edited(picture, folder):
    """The bytes of an edit, as the command writes it: RGB, with the alpha of the input."""
    image = Image.fromarray(samples(3, 5))
    images.write_picture(folder / "edited.png", picture.coloured(image, alpha=True), overwrite=True)
    with Image.open(folder / "edited.png") as opened:
        assert opened.mode == ("RGBA" if picture.alpha else "RGB")
        assert np.array_equal(np.asarray(opened.convert("RGB")), image)
        assert not picture.alpha or opened.getchannel("A").tobytes() == picture.alpha.tobytes()
    return (folder / "edited.png").read_bytes()


def test_chunks_of_a_wrong_length_or_checksum_are_ignored(tmp_path):
    broken = bytearray(chunk(*LINEAR))
    broken[-1] ^= 1
    extra = bytes(broken) + chunk(b"cHRM", b"short") + chunk(*PQ)
    assert read(tmp_path, png(samples(), 8, 2, extra)).chunks == (PQ,)
    assert read(tmp_path, png(samples(), 8, 2, after=chunk(*PQ))).chunks == ()     # behind the pixels it means nothing


def test_the_gamma_of_a_loaded_image_is_kept(tmp_path):
    (tmp_path / "a.png").write_bytes(png(samples(), 8, 2, chunk(*LINEAR) + chunk(*P3)))
    loaded = Image.open(tmp_path / "a.png")
    loaded.load()
    assert images.picture(loaded).chunks == (LINEAR, P3)


def test_a_profile_is_kept_and_wins_over_exif(tmp_path):
    exif = adobe_exif()
    for suffix, options in {"png": {}, "jpg": {}, "webp": {}, "tiff": {}}.items():
        Image.fromarray(samples()).save(tmp_path / f"a.{suffix}", icc_profile=SRGB, exif=exif, **options)
        picture = images.read(tmp_path / f"a.{suffix}")
        head = png_file.header(written(picture, tmp_path))
        assert (head.icc, head.chunks, picture.info["notes"]) == (SRGB, (), [])


# -- profiles that a PNG cannot carry ----------------------------------------------------------------------------------

@pytest.mark.parametrize("suffix, mode", [("png", "RGB"), ("png", "RGBA"), ("jpg", "RGB"), ("tiff", "RGB"), ("tiff", "RGBA")])
def test_a_long_profile_is_converted_and_the_png_opens(tmp_path, suffix, mode):
    """Pillow opens no PNG with a profile above 1 MiB, so the colours become sRGB before the work."""
    pixels = samples(len(mode))
    if suffix == "png":
        profile = chunk(b"iCCP", b"scanner\0\0" + zlib.compress(long(swapped())))
        (tmp_path / "a.png").write_bytes(png(pixels, 8, 2 if mode == "RGB" else 6, profile))
    else:
        Image.fromarray(pixels).save(tmp_path / f"a.{suffix}", icc_profile=long(swapped()), **(
            {"quality": 100, "subsampling": 0} if suffix == "jpg" else {}))
    picture = images.read(tmp_path / f"a.{suffix}")
    assert picture.info["notes"] == ["its colour profile of 1.0 MB is larger than other programs open in a PNG: converted to "
                                     "sRGB"]
    assert png_file.header(written(picture, tmp_path)).icc is None
    change = np.abs(np.asarray(picture.image).astype(int) - pixels[..., 2::-1]).max()
    assert change <= (8 if suffix == "jpg" else 2)           # red and blue have changed places
    if mode == "RGBA":
        assert np.array_equal(np.asarray(picture.alpha), pixels[..., 3])


def test_a_profile_just_below_the_limit_is_kept(tmp_path):
    for length, kept in ((png_file.LARGEST_PROFILE, True), (png_file.LARGEST_PROFILE + 1, False)):
        profile = long(SRGB, length)
        picture = read(tmp_path, png(samples(), 8, 2, chunk(b"iCCP", b"x\0\0" + zlib.compress(profile))))
        assert (png_file.header(written(picture, tmp_path)).icc == profile) == kept


def test_a_long_profile_that_fails_is_left_out_and_told(tmp_path, monkeypatch):
    for spoiled in (long(icc_header()), long(SRGB)):
        picture = read(tmp_path, png(samples(), 8, 2, chunk(b"iCCP", b"x\0\0" + zlib.compress(spoiled))))
        assert np.array_equal(np.asarray(picture.image), samples())
        assert picture.icc is None and "is left out: its colours may look different" in picture.info["notes"][0]

        def missing(*args, **options):
            raise ImportError("no LittleCMS")
        monkeypatch.setattr(ImageCms, "profileToProfile", missing)      # a Pillow without it, for the second


@pytest.mark.parametrize("mode, space", [("RGB", "GRAY"), ("RGB", "CMYK"), ("RGB", "Lab"), ("L", "CMYK"), ("L", "RGB")])
def test_a_profile_of_other_pixels_is_left_out_and_told(tmp_path, mode, space):
    Image.fromarray(samples()).convert(mode).save(tmp_path / "a.tiff", icc_profile=icc_header(space))
    picture = images.read(tmp_path / "a.tiff")
    kind = "grey" if mode == "L" else "RGB"
    assert picture.icc is None and picture.info["notes"] == [
        f"its colour profile is one for {space}, which {kind} pixels cannot have, and is left out"]


def test_a_grey_picture_keeps_what_a_grey_png_may_say(tmp_path):
    grey = Image.fromarray(samples()).convert("L")
    for profile, icc, chunks in ((icc_header("GRAY"), icc_header("GRAY"), ()), (SRGB, None, ((b"sRGB", b"\0"),))):
        grey.save(tmp_path / "a.jpg", icc_profile=profile)
        picture = images.read(tmp_path / "a.jpg")
        head = png_file.header(written(picture, tmp_path))
        assert (head.colour_type, head.icc, head.chunks, picture.info["notes"]) == (0, icc, chunks, [])
    assert "icc_profile" not in picture.coloured(Image.fromarray(samples())).info


def test_a_damaged_profile_is_left_out_and_told(tmp_path):
    for profile in (b"not a profile", SRGB[:36] + b"????" + SRGB[40:]):
        Image.fromarray(samples()).save(tmp_path / "a.jpg", icc_profile=profile)
        picture = images.read(tmp_path / "a.jpg")
        assert picture.icc is None and picture.info["notes"] == ["its colour profile is damaged, and is left out"]


# -- CMYK --------------------------------------------------------------------------------------------------------------

def test_cmyk_is_told(tmp_path):
    inks = Image.fromarray(samples()).convert("CMYK")
    for suffix in ("jpg", "tiff"):
        inks.save(tmp_path / f"a.{suffix}")
        assert images.read(tmp_path / f"a.{suffix}").info["notes"] == ["CMYK converted to RGB, without a colour profile"]


def test_cmyk_is_converted_by_its_profile(tmp_path, monkeypatch):
    """LittleCMS makes no CMYK profile, so its call stands here for one; what it is given and what is done with it count."""
    seen = []

    def convert(image, source, target, **options):
        seen.append((image.mode, options["outputMode"]))
        return Image.new("RGB", image.size, (1, 2, 3))

    monkeypatch.setattr(ImageCms, "ImageCmsProfile", lambda file: file.read())
    monkeypatch.setattr(ImageCms, "profileToProfile", convert)
    Image.fromarray(samples()).convert("CMYK").save(tmp_path / "a.tiff", icc_profile=icc_header("CMYK"))
    picture = images.read(tmp_path / "a.tiff")
    assert seen == [("CMYK", "RGB")] and picture.image.getpixel((0, 0)) == (1, 2, 3) and picture.icc is None
    assert picture.info["notes"] == ["CMYK converted to sRGB by its colour profile"]


# -- signs of other formats --------------------------------------------------------------------------------------------

def adobe_exif(space=0xFFFF, index="R03"):
    exif = Image.Exif()
    exif[colour.EXIF] = {colour.COLOUR_SPACE: space, colour.INTEROPERABILITY: {1: index}}
    return exif.tobytes()


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_adobe_rgb_of_exif_becomes_gamma_and_primaries(tmp_path, suffix):
    Image.fromarray(samples()).save(tmp_path / f"a.{suffix}", exif=adobe_exif())
    picture = images.read(tmp_path / f"a.{suffix}")
    chunks = dict(png_file.header(written(picture, tmp_path)).chunks)
    assert struct.unpack(">I", chunks[b"gAMA"])[0] == round(100000 * 256 / 563)
    assert struct.unpack(">8I", chunks[b"cHRM"]) == (31270, 32900, 64000, 33000, 21000, 71000, 15000, 6000)
    assert picture.info["notes"] == ["its colours are Adobe RGB by its EXIF; the PNG says so by gAMA and cHRM"]


def test_other_colours_of_exif(tmp_path):
    for space, index, note in ((1, "R98", ""), (0xFFFF, "", "not sRGB, and nothing says what they are"), (2, "", "Adobe RGB")):
        Image.fromarray(samples()).save(tmp_path / "a.jpg", exif=adobe_exif(space, index))
        notes = images.read(tmp_path / "a.jpg").info["notes"]
        assert note in notes[0] if note else notes == []


def test_the_colours_of_an_avif(tmp_path):
    file = io.BytesIO()
    try:
        Image.fromarray(samples(size=(16, 16))).save(file, "AVIF")
    except (KeyError, OSError):
        pytest.skip("this Pillow writes no AVIF")
    data = file.getvalue()
    at = data.index(b"colrnclx") + 8
    for primaries, transfer, chunks in ((12, 13, ((b"cICP", bytes([12, 13, 0, 1])),)), (9, 16, (PQ,)), (1, 13, ()), (2, 2, ())):
        changed = data[:at] + struct.pack(">HH", primaries, transfer) + data[at + 4:]
        assert read(tmp_path, changed, "a.avif").chunks == chunks


@pytest.mark.parametrize("flags, depth", [(0x00, 8), (0x40, 10), (0x60, 12)])
def test_the_depth_of_an_avif(flags, depth):
    inside = box(b"iprp", box(b"ipco", box(b"av1C", bytes([0x81, 0, flags, 0]))))
    assert colour.of_avif(box(b"ftyp", b"avif") + box(b"meta", bytes(4) + inside)) == (depth, ())


def box(kind, content):
    return struct.pack(">I4s", 8 + len(content), kind) + content


def test_the_profile_of_a_jpeg2000(tmp_path):
    file = io.BytesIO()
    Image.fromarray(samples(size=(16, 16))).save(file, "JPEG2000")
    data = file.getvalue()
    head = data.index(b"jp2h") - 4
    old = data.index(b"colr") - 4
    length = int.from_bytes(data[old:old + 4], "big")
    new = box(b"colr", b"\2\0\0" + SRGB)
    size = int.from_bytes(data[head:head + 4], "big") + len(new) - length
    changed = data[:head] + size.to_bytes(4, "big") + data[head + 4:old] + new + data[old + length:]
    if int(PIL.__version__.partition(".")[0]) < 11:
        pytest.skip(f"Pillow {PIL.__version__} decodes no JPEG 2000 with a profile")
    assert read(tmp_path, changed, "a.jp2").icc == SRGB


def test_the_profile_of_a_bmp(tmp_path):
    pixels = samples(size=(4, 4))
    rows = pixels[::-1, :, ::-1].tobytes()
    head = struct.pack("<IiiHHIIiiII", 124, 4, 4, 1, 24, 0, len(rows), 0, 0, 0, 0) + bytes(16) + b"DEBM" + bytes(48)
    head += struct.pack("<IIII", 4, 124 + len(rows), len(SRGB), 0)
    assert len(head) == 124
    data = struct.pack("<2sIHHI", b"BM", 14 + 124 + len(rows) + len(SRGB), 0, 0, 138) + head + rows + SRGB
    picture = read(tmp_path, data, "a.bmp")
    assert np.array_equal(np.asarray(picture.image), pixels) and picture.icc == SRGB
