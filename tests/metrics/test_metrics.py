"""The five distances against stored values of peers and a float64 oracle, naive definitions, and their gradients."""

import json
import math

import numpy as np
import pytest
import torch
from hashed_lpips import hashed
from PIL import Image
from safetensors.torch import load_file, save_file

from sifm_min import metrics
from sifm_min.metrics import backbones, convolutions, perceptual, phase, pixels, structure
from sifm_min.models.checkpoints import Unavailable, Unfit

# metric -> the least side that it takes
LEAST = {metrics.psnr: 1, metrics.ssim: 11, metrics.vifp: 41, metrics.fsim: 8, metrics.lpips: 31}


def call(metric, dist, ref):
    """A metric; LPIPS with hashed weights."""
    return metric(dist, ref, weights=hashed("alex")) if metric is metrics.lpips else metric(dist, ref)


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


def test_downsampled_ssim_has_piqs_values(vectors):
    for name, dist, ref, values in vectors:
        if min(ref.shape[2:]) >= 11:
            value = metrics.ssim(dist, ref, downsample=True).item()
            assert value == pytest.approx(values["ssim"]["piq_down_f64"], abs=1e-6, rel=1e-5), name


@pytest.mark.slow
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-5), (torch.float64, 2e-8)])
def test_vifp_has_the_published_values(vectors, dtype, tolerance):
    for name, dist, ref, values in vectors:
        if min(ref.shape[2:]) < 41:
            with pytest.raises(ValueError, match="at least 41 pixels"):
                metrics.vifp(dist, ref)
            continue
        dist, ref = dist.to(dtype), ref.to(dtype)
        value, expected = metrics.vifp(dist, ref).item(), float(values["vifp"]["ref64_luma"])
        if name == "const_same":
            expected = 1                                     # the oracle has nan for both flat pairs
        assert value == pytest.approx(expected, abs=tolerance, nan_ok=True), name
        if dtype == torch.float64 and max(ref.shape[2:]) < 400 and not name.startswith(("const", "identical")):
            swapped = float(values["vifp"]["ref64_luma_swapped"])
            assert metrics.vifp(ref, dist).item() == pytest.approx(swapped, abs=1e-6, nan_ok=True), name
            channels = torch.cat([metrics.vifp(dist[:, i:i + 1], ref[:, i:i + 1]) for i in range(3)])
            assert channels.mean().item() == pytest.approx(float(values["vifp"]["ref64_rgb_mean"]), abs=1e-6), name


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fsim_has_the_published_values(vectors, dtype):
    for name, dist, ref, values in vectors:
        if name.startswith(("const", "dist_const")) or (dtype == torch.float32 and name > "j"):
            continue                                         # flat ones: below; half of them twice are enough
        dist, ref = dist.to(dtype), ref.to(dtype)
        if name == "gray_640":                               # MATLAB's grid of blocks has a dark border there
            dist, ref = as_matlab_reduces(dist), as_matlab_reduces(ref)
            plain, chromatic = phase._fsim(dist, ref), phase._fsimc(dist, ref)
        else:
            plain, chromatic = metrics.fsim(dist, ref, chromatic=False), metrics.fsim(dist, ref)
        expected = values["fsim"]["ref64_matlab"]
        # In `negative` the chroma similarity is exactly 0 at many pixels, and its power 0.03 magnifies any rounding.
        assert plain.item() == pytest.approx(expected[0], abs=3e-7), name
        assert chromatic.item() == pytest.approx(expected[1], abs=3e-5 if name == "negative" else 3e-7), name
        if "gray" not in name and min(ref.shape[2:]) >= 40:
            assert plain.item() == pytest.approx(values["fsim"]["piq_luma_f64"], abs=3e-5), name
            assert chromatic.item() == pytest.approx(values["fsim"]["piq_chroma_f64"], abs=4e-3), name


def as_matlab_reduces(pixels):
    """By 3: the mean around each pixel, zeros outside, of which every third is taken."""
    padded = torch.nn.functional.pad(pixels, (1, 1, 1, 1))
    height, width = pixels.shape[2:]
    return sum(padded[:, :, i:i + height, j:j + width] for i in range(3) for j in range(3))[:, :, ::3, ::3] / 9


def test_fsim_reduces_by_means_of_blocks(vectors):
    ((dist, ref),) = [(dist, ref) for name, dist, ref, _ in vectors if name == "gray_640"]
    by_hand = [pixels[:, :, :639, :639].unflatten(3, (213, 3)).mean(4).unflatten(2, (213, 3)).mean(3) for pixels in (dist, ref)]
    assert metrics.fsim(dist, ref).item() == pytest.approx(phase._fsimc(*by_hand).item(), abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("network", ["alex", "squeeze", "vgg"])
def test_lpips_has_the_values_of_its_package(vectors, shared, network):
    stored = json.loads((shared / "data/metrics/lpips_fixture/lpips_values.json").read_text())["nets"][network]
    small = ("odd_123x187", "const_diff", "dist_const") if network != "alex" else ()    # the others take their time
    found = 0
    for name, dist, ref, _ in vectors:
        if name in (small or stored["values"]) and name in stored["values"]:
            value = metrics.lpips(dist, ref, network=network, weights=hashed(network)).item()
            layers = [layer.item() for layer in metrics.lpips_layers(dist.expand(-1, 3, -1, -1), ref, hashed(network))]
            assert value == pytest.approx(stored["values"][name]["total"], abs=1e-6), name
            assert layers == pytest.approx(stored["values"][name]["per_layer"], abs=1e-6), name
            found += 1
    assert found == (3 if small else 19)


def test_lpips_convolves_in_float32_and_restores_the_setting(monkeypatch):
    seen, convolve = [], perceptual._convolve

    def setting():
        conv = getattr(torch.backends.cudnn, "conv", None)
        return conv.fp32_precision if conv else torch.backends.cudnn.allow_tf32

    monkeypatch.setattr(perceptual, "_convolve", lambda *given, **how: seen.append(setting()) or convolve(*given, **how))
    before = setting()
    call(metrics.lpips, *pictures(1, 32, 32))
    assert set(seen) in ({"ieee"}, {False}) and setting() == before not in seen


@pytest.mark.parametrize("network", ["alex", "squeeze", "vgg"])
def test_weights_are_read_and_hashed_as_published(network, shared, tmp_path):
    stored = json.loads((shared / "data/metrics/lpips_fixture/lpips_values.json").read_text())["nets"][network]
    save_file({"classifier.weight": torch.zeros(2)} | {name: hashed(network).tensors[name]
              for name in backbones.NETWORKS[network].shapes}, tmp_path / "backbone.safetensors")
    weights = metrics.lpips_weights(network, tmp_path / "backbone.safetensors")
    assert weights.sha256 == stored["backbone_sha256_concat_fp32"] and not weights.pinned
    assert weights.tensors.keys() == hashed(network).tensors.keys()
    assert all(torch.equal(weights.tensors[name], tensor) for name, tensor in hashed(network).tensors.items())
    dist, ref = pictures(1, 40, 40)
    assert metrics.lpips(dist, ref, network=network, weights=tmp_path / "backbone.safetensors") == metrics.lpips(
        dist, ref, network=network, weights=hashed(network))


def test_the_squeezenet_fixture_is_a_file_of_weights(shared):
    weights = metrics.lpips_weights("squeeze", shared / "data/metrics/lpips_fixture/squeeze_hash_backbone.safetensors")
    assert all(torch.equal(weights.tensors[name], tensor) for name, tensor in hashed("squeeze").tensors.items())


def test_the_linear_layers_are_those_of_the_fixture(shared):
    theirs = load_file(shared / "data/metrics/lpips_fixture/lpips_v01_linear.safetensors")
    ours = {f"{network}.{name}": tensor for network in backbones.NETWORKS for name, tensor in
            metrics.linear_layers(network).items()}
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert all(tensor.min() >= 0 for tensor in ours.values())


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


@pytest.mark.parametrize("metric", LEAST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_pictures(metric, dtype):
    dist, _ = pictures(height=50, width=61, dtype=dtype)
    flat = torch.full_like(dist, 0.3)
    exact = {metrics.psnr: math.inf, metrics.lpips: 0}.get(metric, 1)
    for same in (dist, flat, dist[:, :1], torch.zeros_like(dist), torch.ones_like(dist)):
        assert call(metric, same, same.clone()).tolist() == [exact, exact]


def test_flat_pictures_tell_nothing():
    """A flat reference gives nan, not the noise of rounding. A flat picture has no features: PC is 0."""
    generator = torch.Generator().manual_seed(1)
    picture = torch.rand(1, 3, 97, 90, generator=generator)
    for colour in torch.rand(4, 3, generator=generator):
        flat, other = (torch.ones(1, 3, 97, 90) * c[:, None, None] for c in (colour, colour * 0.9))
        assert metrics.vifp(flat, picture).item() == 0
        for dist, ref in ((picture, flat), (flat, other), (other, flat)):
            assert metrics.vifp(dist, ref).isnan().all()
        assert metrics.fsim(flat, other).isnan().all()
        assert phase._phase_congruency(255 * metrics.luma(flat)).abs().max() == 0
        assert 0 < metrics.fsim(flat, picture).item() == metrics.fsim(picture, flat).item() < 0.9


def test_flat_areas_do_not_spoil_vifp():
    """Most of the reference is flat, far from its mean, and the distorted is noisy there: float32 still has its digits."""
    dist, ref = pictures(1, 96, 96)
    ref[:, :, 20:] = 1.0
    for d, r in ((dist, ref), (0.95 * ref + 0.05 * dist, ref), (dist[:, :1], ref[:, :1])):
        assert metrics.vifp(d, r).item() == pytest.approx(metrics.vifp(d.double(), r.double()).item(), abs=2e-5)


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


@pytest.mark.parametrize("metric", LEAST)
def test_a_batch_is_its_pictures(metric):
    dist, ref = pictures(batch=3, height=47, width=50)
    each = torch.cat([call(metric, dist[i:i + 1], ref[i:i + 1]) for i in range(3)])
    torch.testing.assert_close(call(metric, dist, ref), each, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("metric", [structure._ssim, structure._vifp, phase._fsim, phase._fsimc])
def test_a_batch_at_once_is_its_pictures(metric):
    """As on a GPU; on a CPU they are taken one by one."""
    dist, ref = pictures(batch=3, height=47, width=50)
    torch.testing.assert_close(metric(dist, ref), pixels.each_picture(metric, dist, ref), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("metric", LEAST)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_half_precision_is_computed_in_float32(metric, dtype, tolerance):
    dist, ref = pictures(height=43, width=42)
    value = call(metric, dist.to(dtype), ref.to(dtype))
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, call(metric, dist, ref), rtol=tolerance, atol=tolerance)
    assert torch.equal(value, call(metric, dist.to(dtype).float(), ref.to(dtype).float()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(value, call(metric, dist.to(dtype), ref.to(dtype)))


@pytest.mark.parametrize("metric", LEAST)
def test_float64_stays_and_float32_is_near_it(metric):
    dist, ref = pictures(height=43, width=42)
    value = call(metric, dist.double(), ref.double())
    assert value.dtype == torch.float64
    torch.testing.assert_close(call(metric, dist, ref).double(), value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("metric", LEAST)
def test_grey_is_rgb_of_equal_channels(metric):
    dist, ref = (pixels[:, :1] for pixels in pictures(height=50, width=43))
    torch.testing.assert_close(call(metric, dist, ref), call(metric, dist.expand(-1, 3, -1, -1), ref.expand(-1, 3, -1, -1)),
                               rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("metric", LEAST)
def test_the_least_size_and_odd_sizes(metric):
    least = LEAST[metric]
    for height, width in ((least, least), (least + 1, least), (least, least + 6)):
        assert call(metric, *pictures(1, height, width)).isfinite().all()
    if least > 1:
        for height, width in ((least - 1, 64), (64, least - 1)):
            with pytest.raises(ValueError, match=f"at least {least} pixels a side, got {width}x{height}"):
                call(metric, *pictures(1, height, width))


def test_only_vifp_is_asymmetric():
    dist, ref = pictures(1, 60, 60)
    dist = 0.5 * ref + 0.01 * dist
    for metric in LEAST:
        there, back = call(metric, dist, ref).item(), call(metric, ref, dist).item()
        assert (there == pytest.approx(back, rel=1e-5)) == (metric is not metrics.vifp)
    assert metrics.vifp(ref, dist) > 1                       # more contrast than the reference has


# -- gradients ---------------------------------------------------------------------------------------------------------

def smooth(*size):
    """A pair in float64 away from the ends, where clipping has a kink."""
    return [(0.98 * pixels + 0.01).requires_grad_() for pixels in pictures(1, *size, dtype=torch.float64)]


@pytest.mark.parametrize("metric, size", [(metrics.psnr, (12, 13)), (metrics.ssim, (12, 13)), (metrics.vifp, (41, 44)),
                                          (metrics.fsim, (17, 20)), (metrics.lpips, (32, 35))])
def test_gradients(metric, size):
    assert torch.autograd.gradcheck(lambda dist, ref: call(metric, dist, ref), smooth(*size), fast_mode=True)


@pytest.mark.parametrize("metric", LEAST)
def test_gradients_are_finite_where_a_root_or_a_ratio_has_none(metric):
    """Black, white and flat areas, equal and wholly flat pictures, dead features."""
    dist, ref = pictures(1, 48, 52)
    clipped = dist.clone()
    clipped[:, :, :20], clipped[:, :, 30:] = 0, 1
    flat = torch.full_like(dist, 0.5)
    for one, other in ((clipped, ref), (ref, clipped), (dist, dist), (flat, flat), (flat, ref), (clipped, clipped)):
        one, other = one.clone().requires_grad_(), other.clone().requires_grad_()
        gradients = torch.autograd.grad(call(metric, one, other).sum(), (one, other))
        assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("metric", [metrics.psnr, metrics.ssim, metrics.fsim, metrics.lpips])
def test_equal_pictures_have_no_gradient(metric):
    dist = pictures(height=40, width=40)[0].requires_grad_()
    (gradient,) = torch.autograd.grad(call(metric, dist, dist.detach()).sum(), dist)
    assert gradient.abs().max() < 1e-5


def test_vifp_of_equal_pictures_grows_with_contrast():
    ref = pictures(1, 48, 48)[0] * 0.8 + 0.1
    dist = ref.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(metrics.vifp(dist, ref), dist)
    assert (gradient * (ref - ref.mean())).sum() > 0


@pytest.mark.parametrize("metric", [metrics.fsim, metrics.lpips])
def test_weights_from_inference_mode_serve_gradients_later(metric):
    phase._filters.cache_clear(), convolutions.placed.cache_clear()
    dist, ref = pictures(1, 33, 35)
    with torch.inference_mode():
        value = call(metric, dist, ref)
    assert torch.equal(call(metric, dist.requires_grad_(), ref).detach(), value)
    assert torch.autograd.grad(call(metric, dist, ref).sum(), dist)[0].any()


def test_arguments_are_not_changed():
    dist, ref = pictures(height=43, width=42)
    kept = dist.clone(), ref.clone()
    for metric in LEAST:
        call(metric, dist, ref)
    assert torch.equal(dist, kept[0]) and torch.equal(ref, kept[1])


# -- the weights of LPIPS ----------------------------------------------------------------------------------------------

def test_without_its_weights_lpips_has_no_value(monkeypatch, tmp_path):
    monkeypatch.setattr(backbones.constants, "HF_HOME", str(tmp_path))
    for network, title in (("alex", "AlexNet"), ("vgg", "VGG16"), ("squeeze", "SqueezeNet 1.1")):
        with pytest.raises(Unavailable, match=rf"LPIPS \({title}\) are not in .*weights download lpips-{network}"):
            metrics.lpips(*pictures(1, 40, 40), network=network)
    with pytest.raises(ValueError, match="'resnet': choose one of alex, vgg, squeeze"):
        metrics.lpips(*pictures(1, 40, 40), network="resnet")


@pytest.mark.parametrize("change, says", [
    (lambda path: path.unlink(), "no such file"),
    (lambda path: path.write_bytes(path.read_bytes()[:1000]), "cut short, damaged or not safetensors"),
    (lambda path: path.write_text("<html>"), "cut short, damaged or not safetensors"),
    (lambda path: save_file({"features.0.weight": torch.zeros(64, 3, 11, 11)}, path), "features.0.bias is missing"),
    (lambda path: save_file(hashed("vgg").tensors, path), r"0.weight is torch.float32 \[64, 3, 3, 3\], expected \[64, 3, 11"),
    (lambda path: save_file({name: tensor.int() for name, tensor in hashed("alex").tensors.items()}, path), "is torch.int32"),
    (lambda path: save_file(hashed("alex").tensors, path, {"sha256": "0" * 64}), "is damaged"),
])
def test_other_files_of_weights_are_refused(change, says, tmp_path):
    path = tmp_path / "backbone.safetensors"
    save_file(hashed("alex").tensors, path)
    change(path)
    with pytest.raises(Unavailable, match=says):
        metrics.lpips(*pictures(1, 40, 40), weights=path)


def test_a_pickle_that_is_not_the_pinned_one_is_never_opened(tmp_path, monkeypatch):
    path = tmp_path / "alexnet-owt-7be5be79.pth"
    torch.save({"features.0.weight": torch.zeros(1)}, path)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("opened"))
    with pytest.raises(Unfit, match="is not alexnet-owt-7be5be79.pth: its SHA-256 is"):
        metrics.lpips_weights("alex", path)


def test_the_tables_of_the_backbones():
    assert [backbone.kept_size for backbone in backbones.NETWORKS.values()] == [9_878_784, 58_858_752, 2_889_984]
    for backbone in backbones.NETWORKS.values():
        assert backbone.url == f"https://download.pytorch.org/models/{backbone.file}"
        assert len(backbone.sha256) == 64 and backbone.file.endswith(f"-{backbone.sha256[:8]}.pth")


# -- refusals ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("metric", LEAST)
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
    good, other = pictures(height=43, width=42)
    good[0, 0, 0, 0], other[0, 0, 0, 0] = 1.0, 1.0
    for pair in ((change(good), other), (other, change(good))):
        with pytest.raises(ValueError, match=says):
            call(metric, *pair)


def test_rounding_just_outside_the_range_is_clipped():
    dist, ref = pictures()
    assert torch.equal(metrics.psnr(dist + 0, ref), metrics.psnr(dist, ref))
    beyond = torch.where(dist > 0.5, 1.0, dist)
    assert torch.equal(metrics.psnr(torch.where(beyond == 1, 1.0005, beyond), ref), metrics.psnr(beyond, ref))
