"""Pictures of every kind in, the same kind out, within the budget; whole files or none."""

import io
import math
import warnings

import numpy as np
import pytest
import torch
from picture_files import chunk, png
from PIL import Image, ImageCms

from sifm_min import images

ICC = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def array(height=13, width=17, channels=3, seed=0, high=256, dtype=np.uint8):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, high, shape, dtype=dtype)


def rgb(height=13, width=17, seed=0):
    return Image.fromarray(array(height, width, 3, seed))


def perturbation(original, eps, seed=0):
    """A delta of the size that `pgd` gives back: anywhere in the budget, with many values at its very end."""
    shape = (1, original.channels, original.image.height, original.image.width)
    delta = torch.empty(shape).uniform_(-2 * eps, 2 * eps, generator=torch.Generator().manual_seed(seed))
    return delta.clamp(-eps, eps)


def round_trip(path, folder, eps=0.03):
    """Read, perturb, write, decode: (the source's Picture, the decoded result)."""
    original = images.read(path)
    immunized = images.quantize(original, perturbation(original, eps), eps)
    target = folder / "immunized.png"
    steps = images.write_checked(target, immunized, original, eps, overwrite=True)
    decoded = Image.open(target)
    decoded.load()
    assert decoded.size == original.image.size
    assert decoded.mode == immunized.mode == original.mode
    assert 0 < steps == images.steps_used(decoded, original.image) <= images.budget(eps)
    return original, decoded


# -- kinds of pictures -------------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_a_photograph_is_turned_upright_and_keeps_its_profile(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6                                         # turn clockwise by 90 degrees to see it upright
    y, x = np.mgrid[:200, :300]
    photo = Image.fromarray(np.stack([x % 256, y % 256, (x + y) % 256], 2).astype(np.uint8))
    photo.save(tmp_path / "photo.jpg", exif=exif, icc_profile=ICC, quality=50)
    original, decoded = round_trip(tmp_path / "photo.jpg", tmp_path)
    assert original.image.size == decoded.size == (200, 300)
    upright = Image.open(tmp_path / "photo.jpg").transpose(Image.Transpose.ROTATE_270)
    assert images.steps_used(original.image, upright) == 0
    assert decoded.info["icc_profile"] == ICC
    assert not decoded.getexif()                             # or a viewer would turn it again


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    rgb().save(tmp_path / "a.png", exif=exif)
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}        # the Transpose that makes each of them upright
    upright = rgb() if orientation == 1 else rgb().transpose(undo[orientation])
    assert images.steps_used(images.read(tmp_path / "a.png").image, upright) == 0


@pytest.mark.parametrize("suffix, options", [("png", {}), ("webp", {"lossless": True, "exact": True}), ("tiff", {})])
def test_alpha_is_kept_exactly(tmp_path, suffix, options):
    source = Image.fromarray(array(channels=4))
    source.save(tmp_path / f"a.{suffix}", icc_profile=ICC, **options)
    original, decoded = round_trip(tmp_path / f"a.{suffix}", tmp_path)
    assert decoded.mode == "RGBA"
    assert np.array_equal(np.asarray(decoded)[..., 3], np.asarray(source)[..., 3])
    assert images.steps_used(original.image, source) == 0
    assert decoded.info["icc_profile"] == ICC


@pytest.mark.parametrize("mode, comes_back", [("L", "L"), ("LA", "LA"), ("1", "L")])
@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_a_grey_picture_stays_grey(tmp_path, mode, comes_back, suffix):
    source = Image.fromarray(array(channels=1)).convert(mode)
    if mode == "LA":
        source.putalpha(Image.fromarray(array(channels=1, seed=1)))
    source.save(tmp_path / f"a.{suffix}")
    original, decoded = round_trip(tmp_path / f"a.{suffix}", tmp_path)
    assert decoded.mode == comes_back and original.channels == 1
    assert np.array_equal(np.asarray(original.image)[..., 1], np.asarray(source.convert("L")))
    if mode == "LA":
        assert decoded.getchannel("A").tobytes() == source.getchannel("A").tobytes()


def test_a_grey_jpeg_stays_grey(tmp_path):
    Image.fromarray(array(channels=1)).save(tmp_path / "a.jpg")
    assert round_trip(tmp_path / "a.jpg", tmp_path)[1].mode == "L"


def test_a_16_bit_grey_png_keeps_its_upper_bits_and_says_so(tmp_path):
    source = array(channels=1, high=65536, dtype=np.uint16)
    Image.fromarray(source).save(tmp_path / "a.png")
    original, decoded = round_trip(tmp_path / "a.png", tmp_path)
    assert decoded.mode == "L"
    assert np.array_equal(np.asarray(original.image)[..., 0], source >> 8)
    assert original.info["notes"] == ["16 bits a channel, of which the upper 8 are kept"]


@pytest.mark.parametrize("channels, colour_type, mode", [(3, 2, "RGB"), (4, 6, "RGBA")])
def test_a_48_bit_png_keeps_its_upper_bits_and_says_so(tmp_path, channels, colour_type, mode):
    source = array(channels=channels, high=65536, dtype=np.uint16)
    (tmp_path / "a.png").write_bytes(png(source, 16, colour_type))
    original, decoded = round_trip(tmp_path / "a.png", tmp_path)
    assert decoded.mode == mode
    assert np.array_equal(np.asarray(original.image), source[..., :3] >> 8)
    assert original.info["notes"] == ["16 bits a channel, of which the upper 8 are kept"]


def test_a_16_bit_tiff(tmp_path):
    source = array(channels=1, high=65536, dtype=np.uint16)
    Image.fromarray(source).save(tmp_path / "a.tiff")
    original, _ = round_trip(tmp_path / "a.tiff", tmp_path)
    assert np.array_equal(np.asarray(original.image)[..., 2], source >> 8)


def test_a_palette_gif_gives_its_first_frame(tmp_path):
    frames = [rgb(seed=seed).quantize(32) for seed in range(3)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    original, decoded = round_trip(tmp_path / "a.gif", tmp_path)
    assert decoded.mode == "RGB"
    assert images.steps_used(original.image, frames[0]) == 0
    assert original.info["notes"] == ["the first of 3 frames"] and original.info["frames"] == 3


@pytest.mark.parametrize("suffix", ["gif", "png"])
def test_a_transparent_palette_becomes_alpha(tmp_path, suffix):
    source = rgb().quantize(16)
    source.save(tmp_path / f"a.{suffix}", transparency=3)
    original, decoded = round_trip(tmp_path / f"a.{suffix}", tmp_path)
    assert decoded.mode == "RGBA"
    expected = np.asarray(Image.open(tmp_path / f"a.{suffix}").convert("RGBA"))[..., 3]
    assert {0, 255} == set(expected.flat)
    assert np.array_equal(np.asarray(decoded.getchannel("A")), expected)


@pytest.mark.parametrize("mode, key, comes_back", [("RGB", (1, 2, 3), "RGBA"), ("L", 7, "LA")])
def test_a_transparent_colour_becomes_alpha(tmp_path, mode, key, comes_back):
    source = rgb().convert(mode)
    source.putpixel((4, 5), key)
    source.save(tmp_path / "a.png", transparency=key)
    original, decoded = round_trip(tmp_path / "a.png", tmp_path)
    assert decoded.mode == comes_back
    assert original.alpha.getpixel((4, 5)) == 0 and original.alpha.getextrema() == (0, 255)


def test_a_cmyk_jpeg_becomes_rgb_and_says_so(tmp_path):
    rgb().convert("CMYK").save(tmp_path / "a.jpg", icc_profile=b"a profile of inks" * 20)
    original, decoded = round_trip(tmp_path / "a.jpg", tmp_path)
    assert decoded.mode == "RGB" and "icc_profile" not in decoded.info
    assert original.info["notes"] == ["CMYK converted to RGB, without its colour profile"]


@pytest.mark.parametrize("size", [(37, 513), (513, 37), (1, 1), (1, 700)])
def test_strips_and_specks(tmp_path, size):
    rgb(size[1], size[0]).save(tmp_path / "a.png")
    assert round_trip(tmp_path / "a.png", tmp_path)[1].size == size


@pytest.mark.parametrize("suffix", ["webp", "tiff", "bmp", "ppm", "jpg"])
def test_other_formats(tmp_path, suffix):
    rgb().save(tmp_path / f"a.{suffix}")
    original, decoded = round_trip(tmp_path / f"a.{suffix}", tmp_path)
    assert images.steps_used(original.image, Image.open(tmp_path / f"a.{suffix}")) == 0
    assert decoded.mode == "RGB"


def test_an_image_in_memory_is_taken_apart_too():
    for mode in ("RGB", "RGBA", "L", "LA", "RGBa", "P", "1", "CMYK", "YCbCr", "HSV"):
        original = images.picture(rgb().convert("RGBA" if mode == "RGBa" else "RGB").convert(mode))
        assert original.image.mode == "RGB"
        same = images.quantize(original, perturbation(original, 0.1) * 0, 0.1)
        assert same.mode == original.mode and images.steps_used(same, original.image) == 0


# -- refusals ----------------------------------------------------------------------------------------------------------

def damaged(folder):
    whole = io.BytesIO()
    rgb(200, 200).save(whole, "JPEG")
    other = io.BytesIO()
    rgb(200, 200).save(other, "PNG")
    zero = bytearray(other.getvalue())
    zero[16:20] = bytes(4)
    files = {
        "text.png": b"this is not a picture\n", "empty.jpg": b"", "half.jpg": whole.getvalue()[:len(whole.getvalue()) // 2],
        "half.png": other.getvalue()[:2000], "zero.png": bytes(zero), "page.svg": b"<svg xmlns='x'></svg>",
        "print.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        "key48.png": png(array(high=65536, dtype=np.uint16), 16, 2, chunk(b"tRNS", bytes(6))),
        "key16.png": png(array(channels=1, high=65536, dtype=np.uint16), 16, 0, chunk(b"tRNS", bytes(2))),
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    Image.fromarray(array(channels=1).astype(np.float32)).save(folder / "float.tiff")
    (folder / "folder.png").mkdir()
    return [*files, "float.tiff", "folder.png", "missing.png"]


def test_file_that_is_no_picture_is_refused_in_one_sentence(tmp_path):
    for name in damaged(tmp_path):
        with pytest.raises(ValueError) as refusal:
            images.read(tmp_path / name)
        assert name in str(refusal.value) and "\n" not in str(refusal.value) and len(str(refusal.value)) < 300
        assert refusal.value.__suppress_context__ or refusal.value.__context__ is None    # no second traceback in --debug
        assert ("one colour of them transparent" in str(refusal.value)) == name.startswith("key")


@pytest.mark.parametrize("limit", [150, 250])                # Pillow warns above its limit and raises above twice of it
def test_a_decompression_bomb_is_refused_in_one_sentence(tmp_path, monkeypatch, limit):
    rgb(20, 20).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match="bomb.png: more than the 0 million pixels that are safe to open"):
            images.read(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400)
    images.read(tmp_path / "bomb.png")


def test_an_image_above_the_limit_that_was_opened_is_taken(tmp_path, monkeypatch):
    rgb(20, 20).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 250)
    with pytest.warns(Image.DecompressionBombWarning):
        opened = Image.open(tmp_path / "large.png")
    assert images.picture(opened).image.size == (20, 20)


def test_damaged_files_never_raise_anything_else(tmp_path):
    generator = np.random.default_rng(0)
    for suffix, options in {"png": {}, "jpg": {}, "gif": {}, "webp": {}, "tiff": {"compression": "tiff_deflate"}}.items():
        buffer = io.BytesIO()
        rgb().save(buffer, {"jpg": "JPEG"}.get(suffix, suffix.upper()), **options)
        for _ in range(60):
            content = bytearray(buffer.getvalue())
            for at in generator.integers(0, len(content), 3):
                content[at] = generator.integers(256)
            (tmp_path / f"a.{suffix}").write_bytes(content)
            try:
                images.read(tmp_path / f"a.{suffix}")
            except ValueError as refusal:
                assert f"a.{suffix}" in str(refusal)


def test_masks(tmp_path):
    drawn = np.zeros((6, 9), np.uint8)
    drawn[2:4, 3:] = 200
    Image.fromarray(drawn).save(tmp_path / "mask.png")
    assert torch.equal(images.read_mask(tmp_path / "mask.png", 9, 6)[0, 0], torch.from_numpy(drawn > 0).float())
    with pytest.raises(ValueError, match="the mask is 9x6, the picture 6x9"):
        images.read_mask(tmp_path / "mask.png", 6, 9)
    Image.fromarray(drawn // 4).save(tmp_path / "dark.png")
    with pytest.raises(ValueError, match="dark.png: the mask is all dark"):
        images.read_mask(tmp_path / "dark.png", 9, 6)


# -- pixels, sizes, resize ---------------------------------------------------------------------------------------------

def test_write_makes_a_png(tmp_path):
    images.write_picture(tmp_path / "a.png", rgb())
    assert images.steps_used(Image.open(tmp_path / "a.png"), rgb()) == 0
    with pytest.raises(FileExistsError):
        images.write_picture(tmp_path / "a.png", rgb())


def test_pixels_and_back():
    pixels = images.to_pixels(rgb())
    assert pixels.shape == (1, 3, 13, 17) and pixels.dtype == torch.float32
    assert pixels[0, 1, 2, 3] == np.float32(np.asarray(rgb())[2, 3, 1] / 255)
    assert images.to_image(pixels).tobytes() == rgb().tobytes()
    assert images.to_image(pixels * 3 - 1).getextrema() == ((0, 255),) * 3
    every = torch.arange(256).float().view(1, 1, 16, 16).expand(1, 3, 16, 16) / 255
    assert np.array_equal(np.asarray(images.to_image(every))[..., 0].ravel(), np.arange(256))
    with pytest.raises(ValueError, match="one RGB picture"):
        images.to_image(pixels[:, :1])


@pytest.mark.parametrize("size, options, expected", [
    ((512, 512), {}, (512, 512)), ((512, 384), {}, (512, 384)), ((500, 333), {}, (496, 328)),
    ((4000, 3000), {}, (512, 384)), ((3000, 4000), {}, (384, 512)), ((513, 37), {}, (512, 32)), ((37, 513), {}, (32, 512)),
    ((5000, 3), {}, (512, 8)), ((1, 1), {}, (8, 8)), ((64, 64), {}, (64, 64)),
    ((50, 40), {"limit": 64, "upscale": True}, (64, 48)), ((640, 480), {"limit": 64, "upscale": True}, (64, 48)),
    ((1000, 700), {"multiple": 16}, (512, 352)), ((768, 512), {"limit": 768}, (768, 512)),
])
def test_working_size(size, options, expected):
    assert images.working_size(*size, **options) == expected


def test_working_size_rules():
    generator = np.random.default_rng(0)
    for width, height in generator.integers(1, 5000, (300, 2)):
        for upscale in (False, True):
            new = images.working_size(int(width), int(height), upscale=upscale)
            assert all(type(side) is int and side % 8 == 0 and 8 <= side <= 512 for side in new)
            scale = 512 / max(width, height)
            scale = scale if upscale else min(scale, 1)
            for side, was in zip(new, (width, height), strict=True):
                assert side == max(math.floor(was * scale / 8 + 1e-9) * 8, 8)


SIZES = [((40, 50), (16, 24)), ((40, 50), (40, 24)), ((40, 50), (16, 50)), ((24, 16), (64, 48)), ((37, 513), (32, 512)),
         ((7, 5), (8, 8)), ((100, 3), (8, 8)), ((1, 9), (8, 3)), ((301, 203), (48, 32)), ((33, 33), (32, 32))]


@pytest.mark.parametrize("old, new", SIZES)
def test_resize_is_pillows_on_floats(old, new):
    source = np.random.default_rng(0).uniform(0.35, 0.65, old).astype(np.float32)    # so that no overshoot is clipped
    theirs = np.asarray(Image.fromarray(source).resize(new[::-1], Image.Resampling.LANCZOS))
    ours = images.resize(torch.from_numpy(source)[None, None], *new)[0, 0].numpy()
    np.testing.assert_allclose(ours, theirs, atol=2e-6)


@pytest.mark.parametrize("old, new", SIZES)
def test_resize_is_pillows_on_8_bits_to_one_step(old, new):
    hard = Image.fromarray(array(*old, 3) // 128 * 255)      # black and white: everything overshoots and is clipped
    for source in (rgb(*old), hard):
        # Pass by pass: since 13, Pillow takes the columns first where they shrink more than the rows.
        rows = source.resize((new[1], old[0]), Image.Resampling.LANCZOS)
        theirs = np.asarray(rows.resize(new[::-1], Image.Resampling.LANCZOS)).astype(int)
        ours = images.resize(images.to_pixels(source), *new)
        assert ours.min() >= 0 and ours.max() <= 1
        assert np.abs(np.asarray(images.to_image(ours)).astype(int) - theirs).max() <= 1


def test_resize_is_pillows_on_a_photograph(shared):
    source = Image.open(shared / "data" / "photos" / "astronaut.png").convert("RGB")
    for new in ((64, 64), (200, 328)):
        theirs = images.to_pixels(source.resize(new[::-1], Image.Resampling.LANCZOS))
        assert (images.resize(images.to_pixels(source), *new) - theirs).abs().max() <= 1.3 / 255


def test_resize_to_the_same_size_is_the_picture_itself():
    pixels = images.to_pixels(rgb())
    assert images.resize(pixels, 13, 17) is pixels


def test_resize_has_the_right_gradient():
    pixels = torch.rand(2, 3, 9, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 0.2 + 0.4
    assert torch.autograd.gradcheck(lambda x: images.resize(x, 4, 10), pixels.requires_grad_(), fast_mode=True)


def test_resize_serves_gradients_after_inference_mode():
    with torch.inference_mode():
        images.resize(torch.rand(1, 3, 30, 31), 8, 9)
    pixels = torch.rand(1, 3, 30, 31, requires_grad=True)
    images.resize(pixels, 8, 9).sum().backward()
    assert pixels.grad.any()


# -- the 8-bit budget --------------------------------------------------------------------------------------------------

def test_budget_in_steps():
    assert images.budget(0.03) == 7 and images.budget(8 / 255) == 8 and images.budget(1) == 255
    assert [images.budget(n / 255) for n in range(1, 256)] == list(range(1, 256))
    assert [images.budget(math.nextafter(n / 255, 0)) for n in range(1, 256)] == list(range(1, 256))
    assert [images.budget((n - 1e-3) / 255) for n in range(2, 256)] == list(range(1, 255))
    for eps in (0, 0.0039, -1, 1.01, 300):
        with pytest.raises(ValueError, match="the budget must be"):
            images.budget(eps)


@pytest.mark.parametrize("eps", [0.03, 8 / 255, 1 / 255, 16 / 255, 0.1, 1.0])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA"])
def test_the_budget_holds_after_rounding(eps, mode):
    limit = images.budget(eps)
    for seed in range(5):
        source = array(channels=4, seed=seed)
        source[:3], source[3:6] = 0, 255                     # ends of the range, where the sum must not wrap around
        original = images.picture(Image.fromarray(source).convert(mode))
        delta = perturbation(original, eps, seed)
        immunized = images.quantize(original, delta, eps)
        assert immunized.mode == mode
        assert images.steps_used(immunized, original.image) <= limit
        before = np.asarray(original.image).astype(int)
        wanted = before + (delta[0].permute(1, 2, 0).double().numpy() * 255).round().clip(-limit, limit)
        assert np.array_equal(np.asarray(immunized.convert("RGB")), wanted.clip(0, 255))


def test_a_delta_beyond_the_budget_is_cut_to_it():
    original = images.picture(Image.new("RGB", (4, 4), (128, 128, 129)))
    immunized = images.quantize(original, torch.full((1, 3, 4, 4), 0.5), 0.03)
    assert immunized.getextrema() == ((135, 135), (135, 135), (136, 136))


def test_pixels_with_zero_delta_stay():
    original = images.picture(rgb())
    delta = perturbation(original, 0.1)
    delta[..., :8] = 0
    changed = np.asarray(images.quantize(original, delta, 0.1)) != np.asarray(rgb())
    assert not changed[:, :8].any() and changed[:, 8:].any()


@pytest.mark.parametrize("shape", [(1, 1, 13, 17), (1, 3, 17, 13), (2, 3, 13, 17), (3, 13, 17)])
def test_a_delta_of_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match="this RGB picture takes"):
        images.quantize(images.picture(rgb()), torch.zeros(shape), 0.03)


def test_steps_used():
    one = rgb()
    other = one.copy()
    assert images.steps_used(one, other) == 0
    other.putpixel((3, 4), tuple(abs(v - 200) for v in one.getpixel((3, 4))))
    assert images.steps_used(one, other) == images.steps_used(other, one) > 50
    assert images.steps_used(Image.new("RGB", (1, 1), (255, 0, 9)), Image.new("RGB", (1, 1), (0, 0, 9))) == 255
    with pytest.raises(ValueError, match="17x13 and 13x17"):
        images.steps_used(one, rgb(17, 13))


# -- writing -----------------------------------------------------------------------------------------------------------

def test_write_checked_measures_the_decoded_file(tmp_path):
    original = images.picture(rgb())
    immunized = images.quantize(original, torch.full((1, 3, 13, 17), 0.02), 0.03)
    assert images.write_checked(tmp_path / "a.png", immunized, original, 0.03) == 5
    with pytest.raises(FileExistsError):
        images.write_checked(tmp_path / "a.png", immunized, original, 0.03)


def beyond(immunized):
    changed = immunized.copy()
    values = immunized.getpixel((0, 0))
    changed.putpixel((0, 0), (values[0] + (50 if values[0] < 128 else -50), *values[1:]))
    return changed


def opaque(immunized):
    changed = immunized.copy()
    changed.putalpha(255)
    return changed


@pytest.mark.parametrize("change, says", [
    (beyond, "the budget is 7/255"), (opaque, "the transparency changed"),
    (lambda image: image.convert("RGB"), "decodes to RGB"), (lambda image: image.crop((0, 0, 5, 5)), "the original is"),
])
def test_write_checked_writes_nothing_that_breaks_a_promise(tmp_path, change, says):
    original = images.picture(Image.fromarray(array(channels=4)))
    immunized = images.quantize(original, perturbation(original, 0.03), 0.03)
    with pytest.raises(ValueError, match=says):
        images.write_checked(tmp_path / "a.png", change(immunized), original, 0.03)
    assert list(tmp_path.iterdir()) == []
    assert images.write_checked(tmp_path / "a.png", immunized, original, 0.03) == 7


def test_write_checked_notices_a_file_of_other_pixels(tmp_path, monkeypatch):
    original = images.picture(rgb())
    immunized = images.quantize(original, perturbation(original, 0.03), 0.03)
    save = Image.Image.save
    monkeypatch.setattr(Image.Image, "save", lambda image, file, kind: save(image.point(lambda v: 255 - v), file, kind))
    with pytest.raises(ValueError, match="the budget is 7/255"):
        images.write_checked(tmp_path / "a.png", immunized, original, 0.03)
    assert list(tmp_path.iterdir()) == []


def own_budgets(channels=3):
    """Budgets of 0 to 7 steps, and the steps; a little below and above whole ones, as float32 has them."""
    steps = np.random.default_rng(5).integers(0, 8, (13, 17, channels))
    steps[0, 0] = 7
    return torch.from_numpy(steps).permute(2, 0, 1)[None].float() / 255, steps


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_every_value_keeps_its_own_budget(tmp_path, mode):
    original = images.picture(rgb().convert(mode))
    eps, steps = own_budgets(original.channels)
    assert np.array_equal(images.budget(eps), steps)
    immunized = images.quantize(original, 20 / 255 * torch.ones_like(eps), eps)
    room = 255 - np.asarray(original.image).astype(int)
    assert np.array_equal(images.steps_apart(immunized, original.image), np.minimum(steps, room))
    assert images.write_checked(tmp_path / "a.png", immunized, original, eps) == 7


def test_write_checked_refuses_one_value_beyond_its_own_budget(tmp_path):
    original = images.picture(Image.new("RGB", (17, 13), (100, 100, 101)))
    eps, steps = own_budgets()
    immunized = images.quantize(original, eps, eps)
    y, x, c = np.argwhere(steps == 3)[0]
    values = np.asarray(immunized).copy()
    values[y, x, c] += 1                                     # 4: well within the largest budget, 7
    with pytest.raises(ValueError, match="decodes to 4/255 from the original, the budget is 3/255"):
        images.write_checked(tmp_path / "a.png", Image.fromarray(values), original, eps)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("eps", [torch.zeros(1, 3, 13, 17), torch.full((1, 3, 13, 17), 0.5 / 255),
                                 torch.full((1, 1, 13, 17), float("nan")), torch.full((1, 1, 13, 17), 2.0)])
def test_budgets_that_leave_nothing_are_refused(eps):
    with pytest.raises(ValueError, match="the budget must be from 1/255"):
        images.budget(eps)


def test_amplify():
    one = Image.new("RGB", (4, 4), (100, 100, 100))
    other = Image.new("RGB", (4, 4), (107, 93, 100))
    assert images.amplify(one, other).getpixel((0, 0)) == (198, 58, 128)
    assert images.amplify(Image.new("L", (1, 1), 0), Image.new("L", (1, 1), 20)).getpixel((0, 0)) == (255,) * 3
