"""The switch of models/cpu.py, the choice of a kernel for each convolution, and whole networks with and without kernels."""

import threading
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import sifm_min
from sifm_min.models import cpu, winograd
from sifm_min.models.lean import Conv2d, GroupNorm
from sifm_min.models.unet import UNet, UNetConfig
from sifm_min.models.vae import AutoencoderKL, VAEConfig

LAST = torch.channels_last
NAMES = {"group norm", "matrix product", "winograd"}


@pytest.fixture
def smaller(monkeypatch):
    """Matrix products also for 512 -> 512 channels, so that tests can be small."""
    monkeypatch.setattr(cpu, "PRODUCT_WEIGHTS", 2**21)


def layer(ins=128, outs=128, kernel=3, *, layout=LAST, dtype=torch.float32, **options):
    made = Conv2d(ins, outs, kernel, **(options or {"padding": kernel // 2}))
    return made.to(dtype, memory_format=layout).requires_grad_(False)


@pytest.fixture
def ran(monkeypatch):
    """The names of the functions that ran, in order."""
    names = []
    for module, name in ((winograd, "convolve"), (winograd, "gradient"), (cpu, "product"), (cpu, "product_gradient"),
                         (cpu, "group_norm"), (F, "conv2d"), (F, "conv_transpose2d")):
        def run(own, name, *args, **options):
            names.append(name)
            return own(*args, **options)
        monkeypatch.setattr(module, name, partial(run, getattr(module, name), name))
    return names


# ------------------------------------------------------------------------------------------------------------ the choice

@pytest.mark.parametrize(("ins", "outs", "pictures", "side", "name"), [
    (128, 128, 1, 256, "winograd"), (512, 512, 1, 32, "winograd"), (320, 320, 1, 32, "winograd"),
    (640, 640, 1, 32, "winograd"), (640, 640, 4, 16, "winograd"), (640, 640, 1, 16, None), (960, 640, 1, 32, None),
    (1280, 640, 1, 32, None), (1280, 1280, 1, 32, None), (1280, 1280, 4, 16, None), (1280, 1280, 4, 32, "winograd"),
    (1280, 1280, 1, 16, "matrix product"), (1280, 1280, 4, 8, "matrix product"), (2560, 1280, 1, 8, "matrix product"),
    (640, 1280, 1, 16, None), (640, 640, 1, 8, None), (4, 320, 1, 32, None)], ids=str)
def test_kernels_run_where_they_were_measured_to_gain(ins, outs, pictures, side, name):
    weight = torch.empty(outs, ins, 3, 3).contiguous(memory_format=LAST)
    x, gradient = (torch.empty(1).expand(pictures, channels, side, side) for channels in (ins, outs))
    kernels = {"winograd": (cpu._winograd, winograd.gradient), "matrix product": (cpu.product, cpu.product_gradient),
               None: (None, None)}[name]
    with cpu.record() as names:
        assert cpu.convolution(x, weight, (1, 1), (1, 1)) is kernels[0]
        assert cpu.convolution_gradient(gradient, weight, x.shape[2:], (1, 1), (1, 1)) is kernels[1]
    assert names == ({name} if name else set())


def test_many_channels_and_positions_go_to_winograd(ran):
    conv, x = layer(), torch.randn(1, 128, 32, 32)
    with torch.no_grad():
        conv(x)
    conv(x.requires_grad_()).sum().backward()
    assert ran == ["convolve", "convolve", "gradient"]


@pytest.mark.parametrize("conv", [
    lambda: layer(ins=127), lambda: layer(outs=127), lambda: layer(kernel=1), lambda: layer(kernel=5),
    lambda: layer(stride=2, padding=1), lambda: layer(stride=1, padding=0), lambda: layer(layout=torch.contiguous_format),
    lambda: layer(dtype=torch.float64), lambda: layer(dtype=torch.bfloat16)],
    ids=["few in", "few out", "1x1", "5x5", "stride 2", "no padding", "rows first", "double", "bfloat16"])
def test_other_layers_are_convolved_by_torch(conv, ran):
    conv = conv()
    conv(torch.randn(1, conv.in_channels, 32, 32, dtype=conv.weight.dtype).requires_grad_()).sum().backward()
    assert ran == ["conv2d", "conv_transpose2d"]


def test_a_layer_that_trains_is_convolved_by_torch(ran):
    trained = layer().requires_grad_(True)
    trained(torch.randn(1, 128, 32, 32)).sum().backward()
    assert trained.weight.grad.abs().max() > 0 and ran == ["conv2d"]


# ------------------------------------------------------------------------------------------------------------ the switch

@pytest.mark.parametrize("name", ["winograd", "matrix product", "group norm"])
def test_switched_off_a_layer_is_torch_s_to_the_bit(name, ran, smaller):
    made, plain, shape = {
        "winograd": (layer(), nn.Conv2d(128, 128, 3, padding=1), (1, 128, 32, 32)),
        "matrix product": (layer(512, 512), nn.Conv2d(512, 512, 3, padding=1), (1, 512, 4, 4)),
        "group norm": (GroupNorm(4, 16).requires_grad_(False), nn.GroupNorm(4, 16), (1, 16, 40, 40))}[name]
    plain.to(memory_format=LAST).requires_grad_(False).load_state_dict(made.state_dict())
    x = torch.randn(shape).contiguous(memory_format=LAST).requires_grad_()
    weight = torch.randn(shape)

    def run(layer):
        with cpu.record() as names:
            y = layer(x)
            return y.detach(), torch.autograd.grad(y, x, weight)[0], names

    on = run(made)
    ran.clear()
    with cpu.kernels(on=False):
        off = run(made)
    assert not set(ran) - {"conv2d", "conv_transpose2d"}
    truth = run(plain)
    assert on[2] == {name} and off[2] == set()
    assert torch.equal(off[0], truth[0])
    assert torch.allclose(off[1], truth[1], rtol=0, atol=1e-6 * truth[1].abs().max().item())
    for mine, torch_s in zip(on[:2], off[:2], strict=True):
        assert (mine - torch_s).abs().max() <= 2e-5 * torch_s.abs().max()


def test_the_switch_returns_to_what_it_was():
    x, conv = torch.randn(1, 128, 32, 32), layer()

    def used():
        with cpu.record() as names, torch.no_grad():
            conv(x)
        return names == {"winograd"}

    with pytest.raises(KeyError), cpu.kernels(on=False):
        with cpu.kernels():
            assert used()
        assert not used()
        raise KeyError
    assert used()


def test_the_switch_holds_in_a_backward_pass_of_any_thread(ran):
    y = layer()(torch.randn(1, 128, 32, 32).requires_grad_()).sum()
    with cpu.kernels(on=False):
        thread = threading.Thread(target=y.backward)
        thread.start()
        thread.join()
    assert ran == ["convolve", "conv_transpose2d"]


def test_a_record_names_what_ran_inside_it_alone(smaller):
    few, many = layer(512, 512), layer()
    small, large = torch.randn(1, 512, 4, 4), torch.randn(1, 128, 32, 32)
    with torch.no_grad(), cpu.record() as outer:
        few(small)
        with cpu.record() as inner:
            many(large)
        assert inner == {"winograd"}
    many(large)
    assert outer == {"matrix product", "winograd"} and inner == {"winograd"}
    assert cpu.describe(outer, "cpu") == ["matrix product", "winograd"] and cpu.describe(set(), torch.device("cpu")) == []
    assert cpu.describe(set(), "cuda:0") is None


def test_a_report_names_the_kernels_that_ran(monkeypatch):
    monkeypatch.setattr(cpu, "NORM_POSITIONS", 2**9)         # the latent has 32x32
    editor = sifm_min.load_editor("miniature")
    picture = Image.effect_noise((64, 64), 50).convert("RGB")

    def reported():
        return sifm_min.immunize(picture, editor, "make it night", steps=1, timesteps=1).report["cpu_kernels"]

    assert "group norm" in reported()
    with cpu.kernels(on=False):
        assert reported() == []


# -------------------------------------------------------------------------------------------------------- whole networks

def switched(call, source):
    """[(value, gradient at the source, names of kernels)] with the kernels and without."""
    results = []
    for on in (True, False):
        with cpu.kernels(on), cpu.record() as names:
            value = call()
            weight = torch.randn(value.shape, generator=torch.Generator().manual_seed(0))
            results.append((value.detach(), torch.autograd.grad((value * weight).sum(), source)[0], names))
    return results


def encoder():
    net = AutoencoderKL(VAEConfig(block_out_channels=(128, 256), layers_per_block=1, latent_channels=4))
    return net, lambda x: net.encode(x)[0], (1, 3, 64, 64), {"group norm", "winograd"}


def unet():
    net = UNet(UNetConfig(block_out_channels=(128, 256, 512), layers_per_block=1, cross_attention_dim=16,
                          down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
                          up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D")))
    context = torch.randn(1, 5, 16)
    return net, lambda x: net(x, 421, context), (1, 4, 40, 36), NAMES


@pytest.mark.slow
@pytest.mark.parametrize("network", [encoder, unet])
def test_networks_with_and_without_kernels_agree(network, smaller):
    torch.manual_seed(0)
    net, call, shape, expected = network()
    net.to(memory_format=LAST).requires_grad_(False)
    x = torch.randn(shape).requires_grad_()
    on, off = switched(lambda: call(x), x)
    assert on[2] == expected and off[2] == set()
    for mine, torch_s in zip(on[:2], off[:2], strict=True):
        assert 0 < (mine - torch_s).abs().max() <= 5e-5 * torch_s.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("size", [(24, 40), (44, 36)], ids=str)
def test_an_autoencoder_by_winograd_is_diffusers(size, monkeypatch, ran):
    monkeypatch.setattr(cpu, "WINOGRAD_CHANNELS", 1)
    monkeypatch.setattr(cpu, "WINOGRAD_POSITIONS", 1)
    monkeypatch.setattr(winograd, "TILES", 32)
    diffusers = pytest.importorskip("diffusers", reason="the oracle, diffusers, is not installed")
    torch.manual_seed(0)
    config = {"block_out_channels": (32, 48), "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 8}
    theirs = diffusers.AutoencoderKL(down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
                                     **config).eval()
    ours = AutoencoderKL(VAEConfig(**config))
    ours.load_state_dict(theirs.state_dict())
    ours = ours.to(memory_format=LAST).requires_grad_(False)
    pixels = (torch.rand(2, 3, *size) * 2 - 1).requires_grad_()
    latent = torch.randn(2, 4, 40, 60).requires_grad_()
    for source, mine, other in ((pixels, lambda: ours.encode(pixels)[0], lambda: theirs.encode(pixels).latent_dist.mean),
                                (latent, lambda: ours.decode(latent), lambda: theirs.decode(latent).sample)):
        ran.clear()
        mine, other = mine(), other()
        weight = torch.randn_like(other)
        gradients = [torch.autograd.grad((y * weight).sum(), source)[0] for y in (mine, other)]
        assert ran.count("convolve") >= 8 and ran.count("gradient") >= 8
        for a, b in ((mine, other), gradients):
            assert (a - b).abs().max() <= 2e-5 * b.abs().max()
