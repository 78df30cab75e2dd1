"""PSNR and SSIM against stored values of peers and a float64 oracle, naive definitions, and their gradients."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from sifm_min import metrics


def pictures(batch=2, height=24, width=31, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(batch, 3, height, width, generator=generator, dtype=dtype) for _ in range(2)]


def load(path):
    array = np.asarray(Image.open(path).convert("RGB"))
    return torch.from_numpy(array.copy()).permute(2, 0, 1)[None] / 255


# -- stored values -----------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def vectors(shared):
    folder = shared / "data" / "metrics"
    pairs = json.loads((folder / "vectors.json").read_text())["pairs"]
    return [(pair["name"], load(folder / pair["dist"]), load(folder / pair["ref"]), pair["values"]) for pair in pairs]


def test_psnr_has_the_published_values(vectors):
    for name, dist, ref, values in vectors:
        assert metrics.psnr(dist, ref).item() == pytest.approx(float(values["psnr"]["exact"]), rel=1e-5), name


def test_ssim_has_the_published_values(vectors):
    for name, dist, ref, values in vectors:
        if min(ref.shape[2:]) < 11:
            with pytest.raises(ValueError, match="at least 11 pixels"):
                metrics.ssim(dist, ref)
            continue
        value = metrics.ssim(dist, ref).item()
        assert value == pytest.approx(values["ssim"]["ref64_rgb"], abs=1e-6, rel=1e-5), name
        # The other conventions are far from it: this test can tell them apart.
        if name == "linf8_512":
            assert abs(value - values["ssim"]["piq_down_f64"]) > 0.1
            assert abs(value - values["ssim"]["skimage_default_rgb"]) > 1e-3


# -- definitions -------------------------------------------------------------------------------------------------------

def naive_ssim(x, y):
    """The formula of the paper window by window, in float64; x, y: (H,W) arrays."""
    at = np.arange(11) - 5
    window = np.exp(-(at[:, None] ** 2 + at[None] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    found = []
    for i in range(x.shape[0] - 10):
        for j in range(x.shape[1] - 10):
            a, b = x[i:i + 11, j:j + 11], y[i:i + 11, j:j + 11]
            mean_a, mean_b = (window * a).sum(), (window * b).sum()
            var_a, var_b = (window * (a - mean_a) ** 2).sum(), (window * (b - mean_b) ** 2).sum()
            cov = (window * (a - mean_a) * (b - mean_b)).sum()
            found.append((2 * mean_a * mean_b + 1e-4) * (2 * cov + 9e-4)
                         / ((mean_a**2 + mean_b**2 + 1e-4) * (var_a + var_b + 9e-4)))
    return np.mean(found)


def test_ssim_is_the_papers_formula():
    dist, ref = pictures(height=14, width=17)
    expected = [np.mean([naive_ssim(dist[b, c].double().numpy(), ref[b, c].double().numpy()) for c in range(3)])
                for b in range(2)]
    assert metrics.ssim(dist, ref).tolist() == pytest.approx(expected, abs=1e-6)


def test_psnr_is_per_picture():
    ref = torch.full((3, 3, 4, 5), 0.5)
    dist = ref + torch.tensor([0.1, 0.01, 0.0])[:, None, None, None]
    assert metrics.psnr(dist, ref).tolist() == pytest.approx([20, 40, math.inf], abs=1e-3)


def test_equal_pictures():
    dist, _ = pictures()
    assert metrics.psnr(dist, dist).tolist() == [math.inf, math.inf]
    assert metrics.ssim(dist, dist).tolist() == pytest.approx([1, 1], abs=1e-6)


@pytest.mark.parametrize("dist, ref", [(100, 140), (0, 255), (255, 254), (7, 200), (128, 128)])
def test_flat_pictures_keep_their_digits(dist, ref):
    one, other = (torch.full((1, 3, 30, 30), value / 255) for value in (dist, ref))
    a, b = dist / 255, ref / 255
    assert metrics.ssim(one, other).item() == pytest.approx((2 * a * b + 1e-4) / (a * a + b * b + 1e-4), abs=1e-6)


def test_faint_texture_keeps_its_digits():
    # Moments of the raw float32 values are off by 3e-6 here.
    noise = [0.002 * plane for plane in pictures(batch=8, height=40, width=40)]
    ref = 0.9 + noise[0]
    dist = ref + noise[1]
    torch.testing.assert_close(metrics.ssim(dist, ref), metrics.ssim(dist.double(), ref.double()).float(),
                               rtol=0, atol=5e-7)


@pytest.mark.parametrize("metric", [metrics.psnr, metrics.ssim])
def test_a_batch_is_its_pictures(metric):
    dist, ref = pictures(batch=3)
    each = torch.cat([metric(dist[i:i + 1], ref[i:i + 1]) for i in range(3)])
    torch.testing.assert_close(metric(dist, ref), each, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_half_precision_is_computed_in_float32(dtype, tolerance):
    dist, ref = pictures()
    for metric in (metrics.psnr, metrics.ssim):
        value = metric(dist.to(dtype), ref.to(dtype))
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, metric(dist, ref), rtol=tolerance, atol=tolerance)
        assert torch.equal(value, metric(dist.to(dtype).float(), ref.to(dtype).float()))


# -- gradients ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("metric", [metrics.psnr, metrics.ssim])
def test_gradients(metric):
    dist, ref = pictures(batch=1, height=12, width=13, dtype=torch.float64)
    dist, ref = dist * 0.98 + 0.01, ref * 0.98 + 0.01        # away from the ends, where clipping has a kink
    assert torch.autograd.gradcheck(metric, (dist.requires_grad_(), ref.requires_grad_()), fast_mode=True)


@pytest.mark.parametrize("metric", [metrics.psnr, metrics.ssim])
def test_equal_pictures_have_no_gradient_and_no_nan(metric):
    dist = pictures()[0].requires_grad_()
    (gradient,) = torch.autograd.grad(metric(dist, dist.detach()).sum(), dist)
    assert gradient.abs().max() < 1e-5


def test_arguments_are_not_changed():
    dist, ref = pictures()
    kept = dist.clone(), ref.clone()
    metrics.psnr(dist, ref), metrics.ssim(dist, ref)
    assert torch.equal(dist, kept[0]) and torch.equal(ref, kept[1])


# -- refusals ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("metric", [metrics.psnr, metrics.ssim])
@pytest.mark.parametrize("change, says", [
    (lambda x: x * 255, "expected values in"),
    (lambda x: x * 2 - 1, "expected values in"),
    (lambda x: x + 0.01, "expected values in"),
    (lambda x: x.index_fill(3, torch.tensor([3]), math.nan), "expected values in"),
    (lambda x: (x * 255).to(torch.uint8), "floating-point"),
    (lambda x: x.numpy(), "floating-point"),
    (lambda x: x[0], "expected pictures"),
    (lambda x: x[:, :1], "differ in shape"),
    (lambda x: x[:, :2], "expected pictures"),
    (lambda x: torch.cat([x, x[:, :1]], 1), "expected pictures"),
    (lambda x: x[:0], "expected pictures"),
    (lambda x: x[:1], "differ in shape"),
    (lambda x: x[..., 1:], "differ in shape"),
])
def test_wrong_inputs_are_refused_on_either_side(metric, change, says):
    good, other = pictures()
    good[0, 0, 0, 0], other[0, 0, 0, 0] = 1.0, 1.0
    for pair in ((change(good), other), (other, change(good))):
        with pytest.raises(ValueError, match=says):
            metric(*pair)


def test_rounding_just_outside_the_range_is_clipped():
    dist, ref = pictures()
    assert torch.equal(metrics.psnr(dist + 0, ref), metrics.psnr(dist, ref))
    beyond = torch.where(dist > 0.5, 1.0, dist)
    assert torch.equal(metrics.psnr(torch.where(beyond == 1, 1.0005, beyond), ref), metrics.psnr(beyond, ref))
