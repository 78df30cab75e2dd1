"""The attacks: each against a formulation of its own, and what all of them have in common."""

import io
import json
import math

import numpy as np
import pytest
import torch
from picture_files import icc_header
from PIL import Image

import sifm_min
from sifm_min import images
from sifm_min.purifiers import attacks, filters
from sifm_min.purifiers.attacks import ATTACKS, apply

FREE = [name for name, attack in ATTACKS.items() if not attack.needs]


def picture(width=37, height=29, mode="RGB", seed=0):
    """Smooth colours with edges and grain, and where the mode has it a transparency with all its values."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / max(width, height)
    colours = np.stack([200 * x, 120 + 90 * np.sin(9 * y), 255 * ((x + y) % 0.4 > 0.2)], -1)
    colours = (colours + rng.normal(0, 6, colours.shape)).clip(0, 255).astype(np.uint8)
    image = Image.fromarray(colours).convert("L" if mode.startswith("L") else "RGB")
    if mode.endswith("A"):
        image.putalpha(Image.fromarray((np.arange(width * height) % 256).reshape(height, width).astype(np.uint8)))
    return image


def array(image):
    return np.asarray(image).astype(np.float64)


@pytest.fixture(scope="module")
def editor(tiny_folder):
    return sifm_min.load_editor(tiny_folder, device="cpu")


# ----------------------------------------------------------------------------------------------------------- all of them

def test_the_table_is_data_that_a_report_can_hold():
    assert list(ATTACKS)[:5] == ["jpeg-95", "jpeg-85", "jpeg-75", "jpeg-65", "jpeg-50"]
    for name, attack in ATTACKS.items():
        assert attack.name == name and attack.source and attack.function.__doc__
        assert attack.needs in ("", "own", "other") and isinstance(attack.kinds, tuple)
        assert json.loads(json.dumps(attack.parameters)) == attack.parameters != {} or attack.function is attacks.autoencoder
    assert [name for name, attack in ATTACKS.items() if attack.needs] == ["vae", "vae-other", "regenerate-0.15"]
    assert [name for name, attack in ATTACKS.items() if attack.moves] == ["crop-0.75"]
    assert len({id(row) for row in ATTACKS.values()}) == len(ATTACKS)
    with pytest.raises(TypeError):
        ATTACKS["mine"] = ATTACKS["vae"]


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA"])
@pytest.mark.parametrize("name", FREE)
def test_an_attack_changes_colours_and_nothing_else(name, mode):
    image, profile = picture(mode=mode), icc_header("GRAY" if mode.startswith("L") else "RGB")
    image.info["icc_profile"] = profile
    before = image.tobytes()
    attacked = apply(name, image, seed=3)
    assert (attacked.size, attacked.mode) == (image.size, mode)
    assert attacked.info["icc_profile"] == profile
    if mode.endswith("A"):
        assert attacked.getchannel("A").tobytes() == image.getchannel("A").tobytes()
    assert attacked.getchannel(0).tobytes() != image.getchannel(0).tobytes()
    assert image.tobytes() == before, "the caller's picture was changed"
    assert apply(name, image, seed=3).tobytes() == attacked.tobytes()


@pytest.mark.parametrize("name", FREE)
@pytest.mark.parametrize("size", [(1, 1), (1, 5), (3, 2), (16, 16)])
def test_no_picture_is_too_small(name, size):
    assert apply(name, picture(*size)).size == size


def test_only_the_noise_depends_on_the_seed():
    image, generator = picture(16, 16), torch.random.get_rng_state()
    for name in FREE:
        same = apply(name, image, seed=1).tobytes() == apply(name, image, seed=2).tobytes()
        assert same is not name.startswith("noise"), name
    assert torch.equal(torch.random.get_rng_state(), generator), "drawn from the process's own generator"


def test_a_palette_picture_becomes_what_reading_it_gives():
    attacked = apply("jpeg-75", picture().convert("P"))
    assert attacked.mode == images.picture(picture().convert("P")).mode == "RGB"


@pytest.mark.parametrize("name", ["noise-0.1", "adverse-cleaner", "jpeg-50"])
def test_greyness_is_in_the_pixels_and_not_in_the_mode(name):
    grey = picture(mode="L")
    attacked = apply(name, grey.convert("RGB"), seed=3)
    assert attacked.mode == "RGB"
    assert attacked.tobytes() == apply(name, grey, seed=3).convert("RGB").tobytes()


@pytest.mark.parametrize("call, sentence", [
    (lambda: apply("jpeg-12", picture()), r"unknown attack 'jpeg-12': choose from jpeg-95, .*, regenerate-0\.15$"),
    (lambda: apply("vae", picture()), r"^vae needs the editor under attack: pass it as editor=$"),
    (lambda: apply("vae-other", picture()), r"^vae-other needs another editor than the one under attack"),
    (lambda: apply("regenerate-0.15", picture()), r"^regenerate-0\.15 needs the editor under attack"),
    (lambda: apply("blur-1", Image.fromarray(np.zeros((4, 4), np.float32))), "mode F has no fixed range"),
], ids=["name", "own", "other", "regenerate", "mode"])
def test_impossible_attacks_are_one_sentence(call, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        call()
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------------- files and sizes

@pytest.mark.parametrize("quality", [95, 50])
def test_jpeg_is_the_file_that_a_platform_stores(quality):
    image = picture(64, 48)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality, subsampling=2)             # 2 is Pillow's number of 4:2:0
    assert apply(f"jpeg-{quality}", image).tobytes() == Image.open(file).tobytes()
    grey = io.BytesIO()
    image.convert("L").save(grey, "JPEG", quality=quality)
    assert apply(f"jpeg-{quality}", image.convert("L")).tobytes() == Image.open(grey).tobytes()


def test_jpeg_of_lower_quality_is_further_away():
    image = picture(64, 64)
    away = [np.abs(array(apply(f"jpeg-{quality}", image)) - array(image)).mean() for quality in (95, 85, 75, 65, 50)]
    assert away == sorted(away)


@pytest.mark.parametrize("factor", [0.75, 0.5])
def test_resize_is_two_passes_of_the_projects_own_lanczos(factor):
    """`images.resize` is held against Pillow in its own tests; between its passes Pillow rounds to 8 bits."""
    image = picture(40, 33)
    small = images.resize(images.to_pixels(image), round(33 * factor), round(40 * factor))
    back = images.resize((small * 255).round() / 255, 33, 40)
    assert np.abs(array(apply(f"resize-{factor}", image)) - array(images.to_image(back))).max() <= 2


def test_crop_takes_the_middle_and_nothing_else():
    image = picture(64, 48)
    expected = image.crop((8, 6, 56, 42)).resize((64, 48), Image.Resampling.BICUBIC)
    assert apply("crop-0.75", image).tobytes() == expected.tobytes()
    framed = image.copy()
    framed.paste("red", (0, 0, 64, 6))
    framed.paste("red", (0, 0, 8, 48))
    assert apply("crop-0.75", framed).tobytes() == expected.tobytes(), "what is cut off shines in"


@pytest.mark.parametrize("bits", [5, 4])
def test_bit_depth_leaves_as_many_levels_each_value_the_nearest(bits):
    ramp = Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    levels = np.linspace(0, 255, 2 ** bits)
    nearest = levels[np.abs(np.arange(256)[:, None] - levels).argmin(1)]
    found = array(apply(f"bits-{bits}", ramp))[0]
    assert len(set(found)) == 2 ** bits and found[0] == 0 and found[-1] == 255
    assert np.abs(found - nearest).max() <= 0.5


# ------------------------------------------------------------------------------------------------------ noise and filters

@pytest.mark.parametrize("sigma", [0.05, 0.1])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_noise_has_its_standard_deviation_in_colour_and_in_grey(sigma, mode):
    flat = Image.new(mode, (200, 200), 128 if mode == "L" else (120, 128, 136))
    drawn = (array(apply(f"noise-{sigma}", flat, seed=5)) - array(flat)) / 255
    assert drawn.std() == pytest.approx(sigma, rel=0.02) and abs(drawn.mean()) < 0.002
    if mode == "RGB":
        assert abs(np.corrcoef(drawn[..., 0].ravel(), drawn[..., 1].ravel())[0, 1]) < 0.03, "the channels share their noise"


def test_noise_is_cut_at_black_and_white():
    black = array(apply("noise-0.1", Image.new("RGB", (50, 50))))
    assert black.min() == 0 and 0.4 < (black == 0).mean() < 0.6


@pytest.mark.parametrize("name, sigma", [("blur-1", 1.0), ("blur-1.5", 1.5)])
def test_blur_is_the_sum_written_out(name, sigma):
    image = picture(11, 7)
    values, found = array(image), np.zeros((7, 11, 3))
    weights = {(i, j): math.exp(-(i * i + j * j) / (2 * sigma * sigma)) for i in range(-2, 3) for j in range(-2, 3)}
    for y in range(7):
        for x in range(11):
            for (i, j), weight in weights.items():
                found[y, x] += weight / sum(weights.values()) * values[mirrored(y + i, 7), mirrored(x + j, 11)]
    assert np.abs(array(apply(name, image)) - found).max() <= 0.51


def mirrored(i, n):
    """The edge pixel stands there once."""
    return -i if i < 0 else 2 * (n - 1) - i if i >= n else i


def doubled(i, n):
    """The edge pixel stands there twice."""
    return -i - 1 if i < 0 else 2 * n - 1 - i if i >= n else i


def test_the_bilateral_filter_is_the_sum_written_out():
    values = array(picture(13, 9))
    expected = np.zeros_like(values)
    for y in range(9):
        for x in range(13):
            total = 0.0
            for i in range(-2, 3):
                for j in range(-2, 3):
                    if math.hypot(i, j) > 2:
                        continue
                    other = values[mirrored(y + i, 9), mirrored(x + j, 13)]
                    apart = sum(abs(other[c] - values[y, x, c]) for c in range(3))
                    weight = math.exp(-(i * i + j * j) / (2 * 8 ** 2)) * math.exp(-apart ** 2 / (2 * 8 ** 2))
                    expected[y, x] += weight * other
                    total += weight
            expected[y, x] /= total
    found = filters.bilateral(torch.from_numpy(values).permute(2, 0, 1).float(), 5, 8.0, 8.0)
    assert np.abs(found.permute(1, 2, 0).numpy() - expected).max() < 1e-3
    assert np.abs(expected - values).max() > 1


def test_the_guided_filter_is_a_ridge_regression_in_every_window():
    """Not by He's closed formula: fitted by least squares with the penalty as further rows, window by window."""
    guide, values, height, width = array(picture(12, 10)), array(picture(12, 10, seed=1)), 10, 12
    slopes, offsets = np.zeros((height, width, 3, 3)), np.zeros((height, width, 3))
    for y in range(height):
        for x in range(width):
            window = [(doubled(y + i, height), doubled(x + j, width)) for i in range(-4, 5) for j in range(-4, 5)]
            seen = np.array([guide[p] for p in window])
            wanted = np.array([values[p] for p in window])
            n = len(window)
            rows = np.vstack([np.hstack([seen, np.ones((n, 1))]), np.hstack([np.eye(3) * math.sqrt(16 * n), np.zeros((3, 1))])])
            fit = np.linalg.lstsq(rows, np.vstack([wanted, np.zeros((3, 3))]), rcond=None)[0]
            slopes[y, x], offsets[y, x] = fit[:3], fit[3]
    expected = np.zeros_like(values)
    for y in range(height):
        for x in range(width):
            window = [(doubled(y + i, height), doubled(x + j, width)) for i in range(-4, 5) for j in range(-4, 5)]
            mean = np.mean([slopes[p] for p in window], 0)
            expected[y, x] = guide[y, x] @ mean + np.mean([offsets[p] for p in window], 0)
    found = filters.Guide(as_values(guide), 4, 16.0).filter(as_values(values))
    assert np.abs(found.permute(1, 2, 0).numpy() - expected).max() < 1e-3


def as_values(values):
    return torch.from_numpy(values).permute(2, 0, 1).float()


GOLDEN = np.array([                                          # row, column, red, green, blue
    [0, 0, 101, 66, 61], [0, 15, 129, 67, 179], [11, 0, 124, 108, 179], [11, 15, 108, 109, 61], [2, 5, 128, 74, 179],
    [3, 4, 123, 77, 61], [5, 8, 108, 86, 179], [6, 7, 105, 90, 179], [6, 11, 122, 90, 61], [8, 3, 129, 98, 61],
    [9, 12, 132, 101, 61], [10, 9, 122, 105, 179]])


def test_the_adverse_cleaner_equals_its_authors_libraries():
    """Numbers of OpenCV 5.0.0 (bilateralFilter, ximgproc.guidedFilter) in the author's order, of a picture without noise."""
    y, x = np.mgrid[:12, :16]
    colours = np.stack([(7 * x + 3 * y) % 61 + 90, 5 * y + 60, (x // 4 + y // 3) % 2 * 120 + 60], -1)
    found = array(apply("adverse-cleaner", Image.fromarray(colours.astype(np.uint8))))
    assert np.abs(found[GOLDEN[:, 0], GOLDEN[:, 1]] - GOLDEN[:, 2:]).max() <= 1


def test_the_adverse_cleaner_flattens_noise_and_keeps_edges():
    edge = np.full((48, 48, 3), 60.0)
    edge[:, 24:] = 190
    noised = edge + np.random.default_rng(0).integers(-7, 8, edge.shape)
    cleaned = array(apply("adverse-cleaner", Image.fromarray(noised.astype(np.uint8))))
    assert np.abs(cleaned - edge)[:, :20].mean() < 0.6 * np.abs(noised - edge)[:, :20].mean()
    assert (cleaned[:, 26] - cleaned[:, 21]).mean() > 120


# ------------------------------------------------------------------------------------------------------------ by an editor

@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
def test_the_autoencoder_is_the_networks_own_in_the_vaes_scale(tiny, mode):
    """Without the editor's helpers: 2x - 1 in, the posterior's mean, decode, and back to [0,1]."""
    image = picture(48, 32, mode)
    attacked = apply("vae", image, editor=tiny)
    assert (attacked.size, attacked.mode) == (image.size, mode)
    small = images.to_pixels(image.convert("RGB").resize((32, 16), Image.Resampling.LANCZOS))      # 21 floored to 8s: 16
    with torch.no_grad():
        decoded = tiny.vae.decode(tiny.vae.encode(2 * small - 1)[0]) / 2 + 0.5
    expected = images.to_image(decoded).resize(image.size, Image.Resampling.LANCZOS).convert("L" if mode == "L" else "RGB")
    assert np.abs(array(attacked.convert(expected.mode)) - array(expected)).max() <= 2
    assert apply("vae-other", image, editor=tiny).tobytes() == attacked.tobytes()


def test_an_autoencoder_that_overflows_is_no_attack(tiny, monkeypatch):
    monkeypatch.setattr(type(tiny), "decode", lambda self, latent: torch.full((1, 3, 32, 32), math.nan))
    with pytest.raises(ValueError, match="autoencoder of .* gave no finite picture"):
        apply("vae", picture(32, 32), editor=tiny)


def test_regeneration_is_refused_for_instruction_editors(tiny, monkeypatch):
    monkeypatch.setattr(type(tiny), "edit", None)
    why = ATTACKS["regenerate-0.15"].refusal(tiny)
    assert why == (f"regenerate-0.15 does not apply to {tiny.name}: it is an instruct editor, and only img2img editors can "
                   "paint a picture again at a low strength")
    with pytest.raises(ValueError, match="does not apply to"):
        apply("regenerate-0.15", picture(), editor=tiny)
    assert ATTACKS["vae"].refusal(tiny) is None and ATTACKS["jpeg-75"].refusal() is None


class Recorded:
    """An img2img editor that notes what it is asked for."""

    name, kind = "recorded", "img2img"

    def edit(self, image, prompt, **options):
        self.asked = image.mode, prompt, options
        return image.point(lambda value: 255 - value)


@pytest.mark.parametrize("mode", ["RGB", "LA"])
def test_regeneration_is_an_unguided_edit_without_a_prompt(mode):
    editor, image = Recorded(), picture(mode=mode)
    attacked = apply("regenerate-0.15", image, editor=editor, seed=9)
    assert editor.asked == ("RGB", "", {"strength": 0.15, "guidance": 1.0, "seed": 9})
    assert attacked.mode == mode and array(attacked.getchannel(0))[0, 0] == 255 - array(image.getchannel(0))[0, 0]


def test_stronger_attacks_leave_less_of_a_perturbation():
    image = Image.new("RGB", (64, 64), (120, 160, 90))
    steps = np.random.default_rng(0).choice([-7, 7], (64, 64, 3))
    noised = Image.fromarray((array(image) + steps).clip(0, 255).astype(np.uint8))
    left = {name: np.abs(array(apply(name, noised)) - array(apply(name, image))).mean() for name in FREE}
    assert left["jpeg-50"] < left["jpeg-75"] < left["jpeg-95"] < 7
    assert left["blur-1.5"] < left["blur-1"] < left["resize-0.75"] < 7
