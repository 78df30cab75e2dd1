"""The lean layers against plain ones: the same values, to the bit but for matrix products in a convolution's place, the same
gradients, and fewer bytes kept for them."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from sifm_min.models import cpu
from sifm_min.models.lean import Conv2d, NormSiLU, Prepared, gated_gelu, only_the_input
from sifm_min.models.unet import UNet, UNetConfig
from sifm_min.models.vae import AutoencoderKL, VAEConfig

LAST = torch.channels_last
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}                     # of the largest value
CONVOLUTIONS = {                                    # in, out, kernel, options, size
    "3x3": (6, 10, 3, {"padding": 1}, (9, 7)),
    "1x1": (6, 10, 1, {}, (5, 5)),
    "half the size, even": (6, 8, 3, {"stride": 2, "padding": 1}, (8, 6)),
    "half the size, odd": (6, 8, 3, {"stride": 2, "padding": 1}, (9, 7)),
    "half the size, unpadded": (6, 8, 3, {"stride": 2}, (9, 10)),
    "patches with a rest": (4, 8, 3, {"stride": 3}, (8, 10)),
    "one picture element": (6, 8, 3, {"padding": 1}, (1, 1)),
}
FEW_POSITIONS = {                                   # of many channels: at most half as many as there are of either
    "3x3": (40, 48, 3, {"padding": 1}, (3, 2)),
    "1x1": (48, 40, 1, {}, (2, 5)),
    "half the size, even": (40, 48, 3, {"stride": 2, "padding": 1}, (6, 4)),
    "half the size, odd": (40, 48, 3, {"stride": 2, "padding": 1}, (5, 3)),
    "half the size, unpadded": (40, 48, 3, {"stride": 2}, (5, 8)),
    "one picture element": (6, 8, 3, {"padding": 1}, (1, 1)),
}


def draw(*shape, dtype=torch.float64, layout=torch.contiguous_format, seed=0):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return x.contiguous(memory_format=layout) if x.ndim == 4 else x


def frozen(module, dtype, layout=torch.contiguous_format):
    """Its parameters random, so that no scale is one, and without gradients."""
    for i, parameter in enumerate(module.parameters()):
        parameter.data = draw(*parameter.shape, seed=i + 1)
    return module.to(dtype, memory_format=layout).requires_grad_(False)


def assert_close(ours, plain):
    assert (ours.shape, ours.dtype) == (plain.shape, plain.dtype)
    assert (ours - plain).abs().max().item() <= TOLERANCE[ours.dtype] * plain.abs().max().item()


def kept(call):
    """Its value, and the bytes kept for the backward pass, each storage once, parameters left out."""
    found = {}

    def keep(tensor):
        if not isinstance(tensor, nn.Parameter) and not isinstance(tensor._base, nn.Parameter):
            found[tensor.untyped_storage()._cdata] = tensor                 # held, so that no other takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        value = call()
    return value, sum(tensor.untyped_storage().nbytes() for tensor in found.values())


def compare(lean, plain, x, equal=torch.equal):
    """Values to the bit, or as `equal` has it, the gradient at x to rounding; and what each keeps, in bytes."""
    pair, bytes_kept = zip(*(kept(lambda run=run: run(x)) for run in (lean, plain)), strict=True)
    assert equal(*pair) is not False and pair[0].stride() == pair[1].stride()
    weight = draw(*pair[0].shape, dtype=pair[0].dtype, seed=9)
    gradients = [torch.autograd.grad((y * weight).sum(), x)[0] for y in pair]
    assert gradients[1].abs().max() > 0
    assert_close(*gradients)
    return bytes_kept


# ---------------------------------------------------------------------------------------------------------- convolutions

@pytest.mark.parametrize("layout", [torch.contiguous_format, LAST], ids=["rows first", "channels last"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_frozen_convolution_is_the_plain_one_and_keeps_nothing(name, dtype, layout):
    ins, outs, kernel, options, size = CONVOLUTIONS[name]
    lean = frozen(Conv2d(ins, outs, kernel, **options), dtype, layout)
    plain = nn.Conv2d(ins, outs, kernel, **options)
    plain.to(dtype, memory_format=layout).requires_grad_(False)
    plain.load_state_dict(lean.state_dict())                                # the same names
    x = draw(2, ins, *size, dtype=dtype, layout=layout).requires_grad_()
    assert compare(lean, plain, x) == (0, x.nbytes)


def no_convolution(*inputs, **options):
    raise AssertionError("few positions were convolved")


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", FEW_POSITIONS)
def test_a_convolution_of_few_positions_is_a_matrix_product(name, dtype, monkeypatch):
    monkeypatch.setattr(cpu, "PRODUCT_WEIGHTS", 0)
    ins, outs, kernel, options, size = FEW_POSITIONS[name]
    lean = frozen(Conv2d(ins, outs, kernel, **options), dtype, LAST)
    plain = nn.Conv2d(ins, outs, kernel, **options).to(dtype, memory_format=LAST).requires_grad_(False)
    plain.load_state_dict(lean.state_dict())
    x = draw(2, ins, *size, dtype=dtype, layout=LAST).requires_grad_()
    assert compare(lean, plain, x, equal=assert_close) == (0, x.nbytes)
    rows_first = x.detach().contiguous()
    assert_close(lean(rows_first.requires_grad_()), plain(x))
    theirs = plain(x).detach()
    monkeypatch.setattr(F, "conv2d", no_convolution)
    assert_close(lean(x).detach(), theirs)
    with torch.no_grad():
        assert_close(lean(x), theirs)
    with pytest.raises(AssertionError, match="few positions"), torch.no_grad():         # of more, it is one
        lean(torch.cat([x] * 3))


def test_few_weights_are_convolved(monkeypatch):
    layer, asked = frozen(Conv2d(40, 48, 3, padding=1), torch.float32, LAST), []
    monkeypatch.setattr(F, "conv2d", lambda *inputs: asked.append(inputs))
    with torch.no_grad():
        layer(draw(2, 40, 2, 2, dtype=torch.float32, layout=LAST))
    assert len(asked) == 1


def test_trained_weights_take_torchs_convolution(monkeypatch):
    monkeypatch.setattr(cpu, "PRODUCT_WEIGHTS", 0)
    layer = Conv2d(40, 48, 3, padding=1).to(memory_format=LAST)
    layer(draw(2, 40, 2, 2, dtype=torch.float32, layout=LAST)).sum().backward()
    assert layer.weight.grad.abs().max() > 0


def test_gradients_are_those_of_differences(monkeypatch):
    monkeypatch.setattr(cpu, "PRODUCT_WEIGHTS", 0)
    lean = frozen(Conv2d(3, 4, 3, stride=2, padding=1), torch.float64)
    norm = frozen(NormSiLU(2, 4), torch.float64)
    x = draw(2, 3, 5, 4).requires_grad_()
    torch.autograd.gradcheck(lambda x: gated_gelu(norm(lean(x)).flatten(2).transpose(1, 2)), x)
    few = frozen(Conv2d(12, 14, 3, padding=1), torch.float64, LAST)
    torch.autograd.gradcheck(few, draw(1, 12, 2, 3, layout=LAST).requires_grad_())


# --------------------------------------------------------------------------------------------------------- norms, gates

@pytest.mark.parametrize("layout", [torch.contiguous_format, LAST], ids=["rows first", "channels last"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("shape", "groups"), [((2, 12, 5, 7), 4), ((1, 8, 6, 6), 1), ((3, 6, 4, 4), 6), ((2, 8, 1, 1), 2),
                                               ((2, 1, 4, 4), 1)], ids=str)
def test_frozen_norm_with_silu_equals_the_plain_one(shape, groups, dtype, layout):
    norm = frozen(NormSiLU(groups, shape[1], eps=1e-3), dtype)
    x = (3 * draw(*shape, dtype=dtype, layout=layout) + 2).requires_grad_()
    ours, theirs = compare(norm, lambda x: F.silu(nn.GroupNorm.forward(norm, x)), x)
    numbers = 2 * shape[0] * groups * x.element_size()                      # a mean and a deviation for each group
    assert (ours, theirs) == (x.nbytes + numbers, 2 * x.nbytes + numbers)   # a convolution would keep a third


def test_any_strides_will_do():
    norm = frozen(NormSiLU(2, 4), torch.float64)
    for x in (draw(2, 4, 6, 5).transpose(2, 3), draw(2, 4, 6, 6)[:, :, ::2], draw(2, 6, 5, 5, layout=LAST)[:, 1:5]):
        x = x.requires_grad_()
        compare(norm, lambda x: F.silu(nn.GroupNorm.forward(norm, x)), x)
        assert norm(x).sum().backward() is None


def test_the_gradient_may_come_in_any_layout():
    norm, conv = frozen(NormSiLU(2, 4), torch.float64), frozen(Conv2d(4, 4, 3), torch.float64, LAST)
    for layout, other in ((LAST, torch.contiguous_format), (torch.contiguous_format, LAST)):
        x = draw(2, 4, 5, 6, layout=layout).requires_grad_()
        for lean, plain in ((norm, lambda x: F.silu(nn.GroupNorm.forward(norm, x))),
                            (conv, lambda x: F.conv2d(x, conv.weight, conv.bias))):
            ours, theirs = lean(x), plain(x)
            weight = draw(*ours.shape, layout=other, seed=4)
            assert_close(*(torch.autograd.grad(y, x, weight)[0] for y in (ours, theirs)))


def plain_gated_gelu(x):
    x, gate = x.chunk(2, dim=-1)
    return x * F.gelu(gate)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_a_gate_is_the_plain_one_and_keeps_its_input(dtype):
    x = draw(2, 7, 12, dtype=dtype).requires_grad_()
    assert compare(gated_gelu, plain_gated_gelu, x) == (x.nbytes, x.nbytes * 3 // 2)


@pytest.mark.slow
@pytest.mark.parametrize("layer", ["convolution", "few positions", "norm", "gate"])
def test_low_precision_is_as_near_the_truth_as_plain_layers(layer, monkeypatch):
    """The mean over many elements of how far the gradient is from that in double precision, of the rounded inputs."""
    monkeypatch.setattr(cpu, "PRODUCT_WEIGHTS", 2**21)
    shape = (8, 512, 4, 4) if layer == "few positions" else (4, 16, 24, 24)
    norm, conv = NormSiLU(4, shape[1]), Conv2d(shape[1], shape[1], 3, padding=1).to(memory_format=LAST)
    x, weight = 3 * draw(*shape, dtype=torch.float32, layout=LAST) + 2, draw(*shape, layout=LAST, seed=3)
    weight = weight.chunk(2, dim=-1)[0] if layer == "gate" else weight
    x, weight = x.bfloat16(), weight.bfloat16()
    convolution = conv, lambda x: F.conv2d(x, conv.weight, conv.bias, padding=1)
    lean, plain = {"convolution": convolution, "few positions": convolution,
                   "norm": (norm, lambda x: F.silu(nn.GroupNorm.forward(norm, x))),
                   "gate": (gated_gelu, plain_gated_gelu)}[layer]

    def gradient(run, dtype):
        for module in (norm, conv):
            frozen(module, torch.bfloat16, LAST).to(dtype)
        at = x.to(dtype).requires_grad_()
        found = torch.autograd.grad(run(at), at, weight.to(dtype))[0]
        assert found.dtype == dtype
        return found.double()

    truth = gradient(plain, torch.float64)
    with cpu.record() as kernels:
        ours, theirs = ((gradient(run, torch.bfloat16) - truth).abs().mean() for run in (lean, plain))
    assert ("matrix product" in kernels) == (layer == "few positions")
    assert 0 < ours <= 1.1 * theirs


# ------------------------------------------------------------------------------------ where only the input's is asked for

def test_training_takes_the_plain_layers():
    """Second derivatives, which the lean layers refuse, tell which of the two ran."""
    conv, norm, x = Conv2d(2, 4, 3), NormSiLU(2, 4), draw(1, 2, 5, 5, dtype=torch.float32).requires_grad_()
    y = norm(conv(x))
    first = torch.autograd.grad(y.square().sum(), [x, *conv.parameters(), *norm.parameters()], create_graph=True)
    assert len(first) == 5 and all(gradient.requires_grad for gradient in first)
    sum(gradient.square().sum() for gradient in first).backward()
    for parameter in (*conv.parameters(), *norm.parameters()):
        assert parameter.grad.abs().max() > 0


@pytest.mark.parametrize("run", ["convolution", "norm", "gate"])
def test_a_second_derivative_is_refused_in_words(run):
    conv, norm = frozen(Conv2d(2, 2, 1), torch.float64), frozen(NormSiLU(1, 2), torch.float64)
    layer = {"convolution": conv, "norm": norm, "gate": gated_gelu}[run]
    x = draw(1, 2, 4, 4).requires_grad_()
    (gradient,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_when_it_is_lean():
    x, weight, bias = draw(2).requires_grad_(), nn.Parameter(draw(2)), nn.Parameter(draw(2), requires_grad=False)
    assert only_the_input(x) and only_the_input(x, bias)
    assert not only_the_input(x, weight, bias) and not only_the_input(x, bias, weight)
    assert not only_the_input(x.detach(), bias)
    with torch.no_grad():
        assert not only_the_input(x, bias)


# ---------------------------------------------------------------------------------------------------- whole networks

UNET = UNetConfig(block_out_channels=(8, 16), down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                  up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=12, layers_per_block=1,
                  attention_head_dim=2, norm_num_groups=4)
VAE = VAEConfig(block_out_channels=(8, 16), layers_per_block=1, latent_channels=4, norm_num_groups=4)
NETWORKS = {
    "U-Net": lambda: (UNet(UNET), lambda net, x: net(x, 421, draw(1, 5, 12, dtype=x.dtype)), (2, 4, 16, 12)),
    "encoder": lambda: (AutoencoderKL(VAE), lambda net, x: net.encode(x)[0], (2, 3, 24, 16)),
    "decoder": lambda: (AutoencoderKL(VAE), lambda net, x: net.decode(x), (2, 4, 12, 8)),
}


def prepared(name, dtype=torch.float64):
    """The network frozen, the same with gradients, one of its calls, and an input."""
    torch.manual_seed(0)
    network, call, shape = NETWORKS[name]()
    network = network.to(dtype, memory_format=LAST)
    return copy.deepcopy(network).requires_grad_(False), network, call, draw(*shape, dtype=dtype).requires_grad_()


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_frozen_networks_keep_less_and_do_the_same(name, checkpointing):
    frozen, trained, call, x = prepared(name)
    plain, much = kept(lambda: call(trained, x))
    frozen.checkpointing = checkpointing
    lean, little = kept(lambda: call(frozen, x))
    assert torch.equal(lean, plain)
    assert_close(*(torch.autograd.grad(y.square().sum(), x)[0] for y in (lean, plain)))
    assert little < (0.3 if checkpointing else 0.6) * much


@pytest.mark.parametrize("name", NETWORKS)
def test_checkpointing_in_training_changes_no_gradient(name):
    _, network, call, x = prepared(name)
    plain, much = kept(lambda: call(network, x))
    asked = [x, *(parameter for parameter in network.parameters())]
    expected = torch.autograd.grad(plain.square().sum(), asked, allow_unused=True)
    network.checkpointing = True
    found, little = kept(lambda: call(network, x))
    assert little < 0.6 * much and torch.equal(found, plain)
    for ours, theirs in zip(torch.autograd.grad(found.square().sum(), asked, allow_unused=True), expected, strict=True):
        assert ours is theirs is None or torch.equal(ours, theirs)


@pytest.mark.parametrize("name", NETWORKS)
def test_inside_a_checkpoint_and_with_what_is_kept_elsewhere(name):
    frozen, _, call, x = prepared(name)
    (expected,) = torch.autograd.grad(call(frozen, x).square().sum(), x)
    for inner in (False, True):                     # blocks recomputed inside of what is recomputed
        frozen.checkpointing = inner
        (found,) = torch.autograd.grad(checkpoint(lambda x: call(frozen, x), x, use_reentrant=False).square().sum(), x)
        assert torch.equal(found, expected)
        with torch.autograd.graph.save_on_cpu():
            y = call(frozen, x)
        assert torch.equal(torch.autograd.grad(y.square().sum(), x)[0], expected)


def test_recomputed_blocks_run_twice_and_others_once():
    frozen, _, call, x = prepared("encoder")
    ran = []
    for name, module in frozen.encoder.named_modules():
        module.register_forward_pre_hook(lambda *_, name=name: ran.append(name))
    frozen.checkpointing = True
    call(frozen, x).sum().backward()
    twice = {name for name in ran if ran.count(name) == 2}
    assert {"down_blocks.0.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1"} <= twice
    assert {"conv_in", "down_blocks.0.downsamplers.0", "conv_out"} <= set(ran) - twice
    ran.clear()
    with torch.no_grad():
        call(frozen, x)
    assert len(ran) == len(set(ran))


# -------------------------------------------------------------------------------------------------------- prepared once

def test_prepared_is_made_once_and_when_it_is_asked_for():
    class Block:
        asked = 0

        def prepare(self, value):
            self.asked += 1
            return 2 * value

    first, second, prepared = Block(), Block(), Prepared(21)
    assert (first.asked, prepared[first], prepared[first], first.asked, second.asked) == (0, 42, 42, 1, 0)
