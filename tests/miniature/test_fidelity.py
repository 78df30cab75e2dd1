"""The exact oracle of photographs: every measure by hand, and the right verdict on pictures whose truth is known."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from sifm_min import images, metrics
from sifm_min.miniature import deciding, fidelity, thresholds
from sifm_min.miniature.kinds import KINDS, changed

SIDE = 128


def scene(side=SIDE, seed=0):
    """A colourful picture with flat parts, soft shades, hard edges and fine detail, (side,side,3) in [0,1]."""
    rng = np.random.default_rng(seed)
    soft = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8)).resize((side, side), Image.Resampling.BICUBIC)
    pixels = np.asarray(soft, np.float32) / 255
    for _ in range(12):
        top, left = rng.integers(0, side - 20, 2)
        height, width = rng.integers(8, 40, 2)
        pixels[top:top + height, left:left + width] = rng.uniform(0.05, 0.95, 3)
    pixels[side // 2:side // 2 + 24, :48] = (np.indices((24, 48)).sum(0) // 3 % 2)[..., None]
    return pixels


def image(pixels):
    return Image.fromarray((np.clip(pixels, 0, 1) * 255).round().astype(np.uint8))


def numbers(picture):
    return np.asarray(picture, np.float32) / 255


def sample_of(kind, option="", seed=0):
    source = image(scene(seed=seed))
    return SimpleNamespace(image=source, kind=kind, option=option, target=image(KINDS[kind].target(numbers(source), option)))


@pytest.fixture(scope="module")
def night():
    return sample_of("night")


@pytest.fixture
def lossless(monkeypatch):
    """An autoencoder that loses nothing: what is left of each measure can be calculated by hand."""
    monkeypatch.setattr(fidelity, "autoencoded", lambda picture: images.to_pixels(picture.convert("RGB")))


def between(one, other, share):
    return image(numbers(one) + share * (numbers(other) - numbers(one)))


# ----------------------------------------------------------------------------------------------------------- the measures

@pytest.mark.parametrize("share", [0.0, 0.25, 0.75, 1.0])
def test_progress_and_residual_are_shares_of_the_way(night, lossless, share):
    found = fidelity.measures_of(night, between(night.image, night.target, share))
    assert found.progress == pytest.approx(share, abs=0.01) and found.residual == pytest.approx(1 - share, abs=0.01)
    assert found.outside == 0


def test_the_residual_leaves_out_the_autoencoders_own_error(night, monkeypatch):
    lost = between(night.target, night.image, 0.3)           # an autoencoder that loses three tenths of the way
    monkeypatch.setattr(fidelity, "autoencoded", lambda picture: images.to_pixels(lost))
    assert fidelity.measures_of(night, lost).residual == 0
    found = fidelity.measures_of(night, between(night.target, night.image, 0.5))
    assert found.residual == pytest.approx((0.5 ** 2 - 0.3 ** 2) ** 0.5, abs=0.01)


def test_a_change_outside_is_its_rms_beyond_the_autoencoders(lossless):
    frame = sample_of("frame", "wooden")
    edit, outside = numbers(frame.target), ~np.kron(changed(numbers(frame.image), numbers(frame.target)), np.ones((2, 2), bool))
    edit = np.where(outside[..., None], np.where(edit > 0.5, edit - 0.2, edit + 0.2), edit)
    found = fidelity.measures_of(frame, image(edit))
    assert found.outside == pytest.approx(0.2, abs=0.02) and found.residual < 0.01 and not found.followed
    assert fidelity.measures_of(frame, frame.target).outside == 0


def test_a_change_outside_counts_only_where_a_part_is_unchanged(lossless):
    negative = sample_of("negative")
    unchanged = 1 - changed(numbers(negative.image), numbers(negative.target)).mean()
    assert unchanged < thresholds.OUTSIDE_SHARE              # the case that this test is about
    assert fidelity.measures_of(negative, negative.image).outside == 0


def test_structure_is_the_loss_of_ssim_at_both_resolutions(night, lossless):
    rng = np.random.default_rng(1)
    edit = image(numbers(night.target) + rng.normal(0, 0.05, (SIDE, SIDE, 3)))
    full = metrics.ssim(images.to_pixels(edit), images.to_pixels(night.target)).item()
    halves = [torch.nn.functional.avg_pool2d(images.to_pixels(picture), 2) for picture in (edit, night.target)]
    half = metrics.ssim(*halves).item()
    assert fidelity.measures_of(night, edit).structure == pytest.approx((1 - full) / 3 + 2 * (1 - half) / 3, abs=1e-4)


def test_structure_is_measured_against_the_autoencoded_target(night, monkeypatch):
    lost = night.target.filter(ImageFilter.GaussianBlur(2))
    monkeypatch.setattr(fidelity, "autoencoded", lambda picture: images.to_pixels(lost))
    assert fidelity.measures_of(night, lost).structure == 0
    assert fidelity.measures_of(night, night.target).structure < 0


@pytest.mark.parametrize("share", [0.2, 0.6])
def test_contrast_is_the_share_of_local_contrast_lost(lossless, share):
    negative = sample_of("negative")
    pixels = numbers(negative.target)
    found = fidelity.measures_of(negative, image(pixels + share * (pixels.mean((0, 1)) - pixels)))
    assert found.contrast == pytest.approx(share, abs=0.02)
    assert fidelity.measures_of(negative, negative.target).contrast == pytest.approx(0, abs=1e-6)


def test_an_edit_of_another_size_is_scaled_to_the_target(night):
    double = night.target.resize((2 * SIDE, 2 * SIDE), Image.Resampling.NEAREST)
    assert fidelity.measures_of(night, double).residual == pytest.approx(0, abs=0.05)
    assert fidelity.exact_oracle(night, double).obeyed


# ------------------------------------------------------------------------------------------------------------ the verdicts

@pytest.mark.parametrize(("kind", "option"), [("night", ""), ("black and white", ""), ("pencil sketch", ""), ("sun", "left"),
                                              ("frame", "white"), ("negative", "")])
def test_targets_are_obeyed_and_sources_are_not(kind, option):
    sample = sample_of(kind, option)
    assert fidelity.exact_oracle(sample, sample.target).obeyed
    assert fidelity.exact_oracle(sample, images.to_image(fidelity.autoencoded(sample.target))).obeyed
    for picture in (sample.image, images.to_image(fidelity.autoencoded(sample.image))):
        verdict = fidelity.exact_oracle(sample, picture)
        assert verdict.semantic_mismatch and not verdict.perceptual_degradation      # not followed, and not damaged


@pytest.mark.parametrize("other", ["sepia", "snow", "thermal", "negative", "fog"])
def test_another_edit_is_not_obeyed(night, other):
    assert fidelity.exact_oracle(night, sample_of(other).target).semantic_mismatch


def spoiled(pixels, kind):
    rng = np.random.default_rng(2)
    blocks = Image.Resampling.BOX, Image.Resampling.NEAREST
    return {"noise": lambda: image(pixels + rng.normal(0, 0.16, pixels.shape)),
            "blocks": lambda: image(pixels).resize((SIDE // 10, SIDE // 10), blocks[0]).resize((SIDE, SIDE), blocks[1]),
            "blur": lambda: image(pixels).filter(ImageFilter.GaussianBlur(4)),
            "washed out": lambda: image(0.2 * pixels + 0.8 * pixels.mean())}[kind]()


@pytest.mark.parametrize("kind", ["noise", "blocks", "blur", "washed out"])
def test_damage_over_a_followed_edit_is_a_degradation(kind):
    sample = sample_of("sepia")
    assert fidelity.exact_oracle(sample, spoiled(numbers(sample.target), kind)).perceptual_degradation


def test_false_texture_over_a_followed_edit_is_damage_alone():
    sample = sample_of("sepia")
    wave, lost = np.sin(np.arange(SIDE) * 1.3), numbers(images.to_image(fidelity.autoencoded(sample.target)))
    for strength, damaged in ((0.02, False), (0.15, True)):
        verdict = fidelity.exact_oracle(sample, image(lost + strength * (wave[:, None] * wave)[..., None]))
        assert (verdict.semantic_mismatch, verdict.perceptual_degradation) == (False, damaged)


def test_a_verdict_needs_no_editor_and_ignores_it(night, monkeypatch):
    monkeypatch.setattr(deciding, "judges", {"exact oracle": fidelity.exact_oracle})
    assert deciding.judge(night, night.target) == deciding.judge(night, night.target, editor=object())
    assert deciding.judge(night, night.target).obeyed


def test_the_reference_autoencoder_is_the_shipped_copy(night):
    from sifm_min.models import latent_spaces
    network = latent_spaces.copy_of(latent_spaces.SPACES["sd1"]).network(dtype=torch.float32)
    with torch.no_grad():
        wanted = network.decode(network.encode(2 * images.to_pixels(night.target) - 1)[0]) / 2 + 0.5
    assert torch.equal(fidelity.autoencoded(night.target), wanted.clamp(0, 1))


def test_a_missing_reference_autoencoder_is_named(monkeypatch, tmp_path):
    from sifm_min.models import latent_spaces
    monkeypatch.setattr(latent_spaces, "COPIES", tmp_path)
    with pytest.raises(FileNotFoundError, match="sd1"):
        fidelity.reference.__wrapped__()
