"""Group norms of models/cpu.py: as exact as those of contiguous tensors, and used for the right tensors."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sifm_min.models import cpu
from sifm_min.models.lean import GroupNorm, NormSiLU

LAST = torch.channels_last
SHAPES = {                                          # (B, C, h, w), groups
    "one picture": ((1, 16, 48, 40), 4),
    "several in a block": ((5, 6, 33, 32), 3),
    "several blocks a picture": ((2, 64, 80, 75), 8),
    "one group": ((1, 8, 40, 40), 1),
    "a group for each channel": ((2, 8, 36, 36), 8),
}


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pictures(kind, shape):
    """Activations of a flat picture, of a nearly flat one, or of noise; float64, of values that float32 has."""
    colours = 3 + draw(*shape[:2], 1, 1, seed=1)
    x = {"flat": colours.expand(shape), "nearly flat": colours + 1e-3 * draw(*shape, seed=2), "noise": draw(*shape)}[kind]
    return x.float().double().contiguous(memory_format=LAST)


def frozen(layer, groups, channels):
    made = layer(groups, channels, eps=1e-6)
    made.weight.data, made.bias.data = 1 + draw(channels, seed=3) / 4, draw(channels, seed=4)
    return made.requires_grad_(False)


def passes(layer, x, weight):
    """(value, gradient) in double precision."""
    x = x.detach().requires_grad_()
    y = layer(x)
    return y.detach().double(), torch.autograd.grad(y, x, weight.to(y))[0].double()


@pytest.mark.parametrize("layer", [GroupNorm, NormSiLU])
@pytest.mark.parametrize("kind", ["flat", "nearly flat", "noise"])
@pytest.mark.parametrize("name", SHAPES)
def test_a_norm_is_as_exact_as_a_contiguous_one(name, kind, layer):
    shape, groups = SHAPES[name]
    if kind == "flat" and groups == shape[1]:
        pytest.skip("the deviation is zero")
    x, weight = pictures(kind, shape), 1 + draw(*shape, seed=5)             # a mean: the sums of the gradient are not small
    norm = frozen(layer, groups, shape[1])
    truth = passes(norm.double(), x, weight)
    norm, x = norm.float(), x.float()
    theirs = passes(norm, x.contiguous(), weight)
    ours = passes(norm, x, weight)
    with torch.no_grad():
        assert torch.equal(norm(x).double(), ours[0]) and norm(x).is_contiguous(memory_format=LAST)
    for mine, other, true in zip(ours, theirs, truth, strict=True):
        largest = true.abs().max()
        error, allowed = ((found - true).abs().max() / largest for found in (mine, other))
        assert error <= 5 * max(allowed, 2e-7)


@pytest.mark.slow
@pytest.mark.parametrize("layer", [GroupNorm, NormSiLU])
def test_gradients_are_those_of_differences(layer, monkeypatch):
    monkeypatch.setattr(cpu, "NORM_POSITIONS", 0)
    monkeypatch.setattr(cpu, "norms", lambda x: x.ndim == 4)                # in double precision too
    norm = frozen(layer, 2, 4).double()
    x = draw(2, 4, 3, 5).contiguous(memory_format=LAST).requires_grad_()
    assert torch.autograd.gradcheck(norm, x)


def test_the_gradient_may_come_in_any_layout():
    norm, x = frozen(NormSiLU, 2, 4).float(), pictures("noise", (2, 4, 33, 40)).float()
    above = draw(2, 4, 33, 40, seed=6).float()
    contiguous, last = (passes(norm, x, above.contiguous(memory_format=layout)) for layout in (torch.contiguous_format, LAST))
    assert torch.equal(contiguous[1], last[1])


def test_a_norm_saves_its_input_and_two_numbers_a_group():
    norm, x = frozen(NormSiLU, 2, 8).float(), pictures("noise", (3, 8, 40, 40)).float().requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        norm(x)
    assert sum(t.numel() for t in saved if not isinstance(t, nn.Parameter)) == x.numel() + 2 * 3 * 2


# -------------------------------------------------------------------------------------------------------- which runs when

@pytest.fixture
def ran(monkeypatch):
    """How often `cpu.group_norm` ran."""
    found, own = [], cpu.group_norm
    monkeypatch.setattr(cpu, "group_norm", lambda *inputs: found.append(1) or own(*inputs))
    return found


@pytest.mark.parametrize(("change", "times"), [
    (lambda x: x, 2), (lambda x: x.contiguous(), 0), (lambda x: x.double(), 0), (lambda x: x.bfloat16(), 0),
    (lambda x: x[:, :, :32, :32].contiguous(memory_format=LAST), 0)],
    ids=["channels-last", "contiguous", "double", "bfloat16", "few positions"])
def test_which_tensors_are_normed_here(change, times, ran):
    x = change(pictures("noise", (1, 4, 40, 40)).float())
    norm = frozen(NormSiLU, 2, 4).to(x.dtype)
    norm(x.clone().requires_grad_()).sum().backward()
    with torch.no_grad():
        norm(x)
    assert len(ran) == times


def test_a_norm_that_trains_is_torch_s(ran):
    norm, x = NormSiLU(2, 4), pictures("noise", (1, 4, 40, 40)).float().requires_grad_()
    with cpu.record() as kernels:
        norm(x).square().sum().backward()
    assert kernels == set()
    plain = nn.GroupNorm(2, 4)
    F.silu(plain(x)).square().sum().backward()
    assert not ran and torch.equal(norm.weight.grad, plain.weight.grad) and norm.weight.grad.abs().max() > 0
