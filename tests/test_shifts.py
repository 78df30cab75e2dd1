"""The shift of latents, measured for a report: the formula by hand, Pillow's purifiers, and noise of the same budget."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from test_latent_spaces import home, network, write_authors  # noqa: F401 (home is a fixture)
from test_latents import folder, photo, shift_by_hand  # noqa: F401 (folder is a fixture)

import sifm_min
from sifm_min import images
from sifm_min.editors import load_editor, shifts


@pytest.fixture(scope="module")
def editor(folder):  # noqa: F811
    return load_editor(f"latents:{folder}", device="cpu")


def jpeg(image):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=75, subsampling="4:2:0")
    return Image.open(file).convert("RGB")


def resized(image):
    small = image.resize((round(image.width * 0.75), round(image.height * 0.75)), Image.Resampling.LANCZOS)
    return small.resize(image.size, Image.Resampling.LANCZOS)


def changed(image, amount, seed=0):
    steps = np.random.default_rng(seed).integers(-amount, amount + 1, (image.height, image.width, 3))
    return Image.fromarray((np.asarray(image).astype(int) + steps).clip(0, 255).astype(np.uint8))


def test_purified_shifts_are_of_pictures_that_pillow_purified(editor):
    original = photo(48, 40)
    immunized, control = changed(original, 7), changed(original, 5, seed=1)
    found = shifts.measure_shifts(editor, original, immunized, control, shifts.PURIFIERS)
    assert [record["space"] for record in found] == ["sd1", "sd3"]
    for space, record in zip(editor.spaces, found, strict=True):
        assert record["size"] == [48, 40] and [*record["after"]] == ["jpeg-75", "resize-0.75"]
        for purify, at in ((lambda image: image, record), (jpeg, record["after"]["jpeg-75"]),
                           (resized, record["after"]["resize-0.75"])):
            before, *others = (images.to_pixels(purify(image)) for image in (original, immunized, control))
            by_hand = [shift_by_hand(space, other, before) for other in others]
            assert [at["shift"], at["noise"]] == pytest.approx(by_hand, rel=1e-3) and by_hand[0] != by_hand[1]


def test_purifiers_are_measured_at_the_smallest_size(editor, monkeypatch):
    monkeypatch.setattr(editor, "frames", lambda width, height: [(16, 24), (32, 48)])
    original = photo(48, 32)
    found = shifts.measure_shifts(editor, original, changed(original, 7), changed(original, 7, seed=1), ("jpeg-75",))
    assert [(record["space"], record["size"], "after" in record) for record in found] == [
        ("sd1", [24, 16], True), ("sd3", [24, 16], True), ("sd1", [48, 32], False), ("sd3", [48, 32], False)]
    before, after = (images.resize(images.to_pixels(image), 16, 24) for image in (original, changed(original, 7)))
    assert found[1]["shift"] == pytest.approx(shift_by_hand(editor.spaces[1], after, before), rel=1e-3)
    before, after = (images.resize(images.to_pixels(jpeg(image)), 16, 24) for image in (original, changed(original, 7)))
    purified = shift_by_hand(editor.spaces[1], after, before)
    assert found[1]["after"]["jpeg-75"]["shift"] == pytest.approx(purified, rel=1e-3)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
def test_noise_is_that_of_the_noise_method(editor, mode):
    original = photo(40, 32).convert(mode)
    control = shifts.noise_control(images.picture(original), 0.03, seed=3)
    assert np.array_equal(np.asarray(control), np.asarray(
        sifm_min.immunize(original, editor, method="noise", eps=0.03, seed=3).image))
    assert control.mode == mode and images.steps_used(original, control) == 7


def test_shift_has_a_slope_where_nothing_moved():
    original = torch.randn(1, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    latent = original.clone().requires_grad_()
    value = shifts.shift(latent, original)
    (slope,) = torch.autograd.grad(value, latent)
    assert value.item() < 2e-6 and slope.isfinite().all()


def test_words_name_every_figure():
    records = [{"space": "sd1", "size": [512, 384], "shift": 1.234, "noise": 0.36,
                "after": {"jpeg-75": {"shift": 0.8, "noise": 0.3}}},
               {"space": "sd1", "size": [1024, 768], "shift": 1.1, "noise": 0.4}]
    assert shifts.tell_shifts(records) == ("sd1 at 512: shift 1.23 (noise 0.36), after jpeg-75 0.80 (0.30); "
                                        "sd1 at 1024: shift 1.10 (noise 0.40)")
