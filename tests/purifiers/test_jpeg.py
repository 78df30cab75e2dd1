"""JPEG with a gradient, against Pillow's files, and its gradient against the same arithmetic without rounding."""

import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from photographs import colours, smooth
from PIL import Image

from sifm_min import images
from sifm_min.purifiers.jpeg import SUBSAMPLINGS, jpeg

QUALITIES = (50, 58, 67, 75, 86, 95)


def stored(image, quality, subsampling):
    """The picture as Pillow's JPEG has it, and the error of ours in steps of 1/255."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality, subsampling=subsampling)
    with Image.open(file) as decoded:
        expected = images.to_pixels(decoded)
    return expected, 255 * (jpeg(images.to_pixels(image), quality, subsampling) - expected).abs()


def photographs(shared):
    paths = sorted((shared / "data" / "photos").glob("*.png")) + sorted((shared / "data" / "photoset").rglob("*.jpg"))[:6]
    if not paths:
        pytest.skip("no photographs are here")
    for i, path in enumerate(paths):
        with Image.open(path) as opened:
            image = opened.convert("RGB")
        yield image.crop((0, 0, min(image.width, 160 + i), min(image.height, 121 + i)))


@pytest.mark.parametrize("subsampling", SUBSAMPLINGS)
@pytest.mark.parametrize("quality", QUALITIES)
def test_jpeg_is_pillows_within_1_of_255(quality, subsampling):
    """On smooth pictures with grain, of odd and even sizes: a third of a step on average, and few values are far off."""
    for seed, size in enumerate([(61, 47), (64, 64), (50, 34), (33, 48)]):
        grain = colours(size, 3, seed).astype(int) // 24
        image = Image.fromarray((np.asarray(smooth(*size, seed)) * 0.9 + grain).astype(np.uint8))
        expected, error = stored(image, quality, subsampling)
        assert error.mean() < 0.7 and (error > 2).float().mean() < 0.06, size
        assert (255 * (images.to_pixels(image) - expected).abs()).mean() > 1, "the file is the picture, so nothing is tested"


@pytest.mark.parametrize("subsampling", SUBSAMPLINGS)
def test_jpeg_of_photographs_is_pillows(subsampling, shared):
    for image in photographs(shared):
        for quality in (50, 75, 95):
            assert stored(image, quality, subsampling)[1].mean() < 0.5


def test_every_small_size_is_pillows():
    """Edges are padded as libjpeg does it: rows after Cb and Cr are halved, columns before. Rounding flips a step or two."""
    sides, picture = (1, 2, 3, 4, 5, 7, 8, 9, 14, 16, 17, 18), smooth(64, 64, 3)
    errors = [stored(picture.crop((20, 20, 20 + width, 20 + height)), 90, "4:2:0")[1].mean().item()
              for height in sides for width in sides]
    assert np.mean(errors) < 0.25 and np.median(errors) < 0.15


def test_grey_stays_grey_and_flat_stays_flat():
    grey = jpeg(images.to_pixels(smooth(40, 30).convert("L")), 60)
    assert torch.equal(grey[:, 0], grey[:, 1]) and torch.equal(grey[:, 0], grey[:, 2])
    flat = torch.full((1, 3, 17, 9), 128 / 255)
    torch.testing.assert_close(jpeg(flat, 50), flat)


def test_result_is_8_bits_for_every_picture_of_a_batch():
    batch = torch.cat([images.to_pixels(smooth(35, 21, seed)) for seed in range(3)])
    found = jpeg(batch, 75)
    assert found.shape == batch.shape and found.min() >= 0 and found.max() <= 1
    torch.testing.assert_close(255 * found, (255 * found).round(), rtol=0, atol=1e-4)
    for picture, alone in zip(found, batch.split(1), strict=True):
        assert torch.equal(picture[None], jpeg(alone, 75))


@pytest.mark.parametrize("subsampling", SUBSAMPLINGS)
def test_gradient_is_that_of_the_arithmetic_unrounded(subsampling):
    """Without rounding the DCT cancels: what is left is the loss of colour resolution, written here as pooling."""
    x = images.to_pixels(smooth(26, 20)).double().requires_grad_()
    weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    (found,) = torch.autograd.grad((jpeg(x, 55, subsampling) * weights).sum(), x)
    luma = (x * x.new_tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)
    colour = x - luma
    if subsampling == "4:2:0":
        colour = F.interpolate(F.avg_pool2d(colour, 2), scale_factor=2, mode="bilinear", align_corners=False)
    (expected,) = torch.autograd.grad(((luma + colour) * weights).sum(), x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    (again,) = torch.autograd.grad((jpeg(x, 95, subsampling) * weights).sum(), x)
    torch.testing.assert_close(again, found, rtol=0, atol=1e-9)


@pytest.mark.parametrize("quality, subsampling", [(0, "4:2:0"), (101, "4:2:0"), (75, "4:2:2")])
def test_impossible_settings_are_one_sentence(quality, subsampling):
    with pytest.raises(ValueError, match=f"JPEG of quality {quality} with subsampling {subsampling}: the quality is 1 to 100"):
        jpeg(torch.zeros(1, 3, 8, 8), quality, subsampling)
