"""The residual block of models/residual.py: by NNPACK it is the plain block, in value, gradient and what it leaves alone."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from sifm_min.models import cpu
from sifm_min.models.lean import Conv2d
from sifm_min.models.residual import residual

LAST = torch.channels_last
WIDTH = 16


@pytest.fixture
def nnpack(monkeypatch):
    """NNPACK for small pictures, and the number of its convolutions so far."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    if not torch._nnpack_available():
        pytest.skip("this torch has no NNPACK, or NNPACK no kernels for this CPU")
    monkeypatch.setattr(cpu, "NNPACK_CHANNELS", WIDTH)
    monkeypatch.setattr(cpu, "NNPACK_POSITIONS", 1)
    ran, plain = [], cpu.nnpack
    monkeypatch.setattr(cpu, "nnpack", lambda *arguments: ran.append(1) or plain(*arguments))
    return ran


def layers(count=3, dtype=torch.float32):
    torch.manual_seed(0)
    return [Conv2d(WIDTH, WIDTH, 3, padding=1).to(dtype, memory_format=LAST).requires_grad_(False) for _ in range(count)]


def draw(height=21, width=26, seed=1, dtype=torch.float32):
    return torch.randn(2, WIDTH, height, width, generator=torch.Generator().manual_seed(seed)).to(dtype)


def by_hand(x, made):
    """The block in double precision, written out: (value, gradient of its weighted sum)."""
    x = x.detach().double().requires_grad_()
    y = x
    for i, layer in enumerate(made):
        y = F.conv2d(y, layer.weight.double(), layer.bias.double(), padding=1)
        y = F.relu(y + x) if i == len(made) - 1 else F.relu(y)
    return y.detach(), torch.autograd.grad(y, x, draw(*x.shape[2:], seed=2, dtype=torch.float64))[0]


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("layout", [torch.contiguous_format, LAST], ids=["rows first", "channels last"])
def test_values_and_gradients_are_the_plain_block_s(nnpack, layout, count):
    made, x = layers(count), draw().contiguous(memory_format=layout)
    above, before = draw(seed=2).contiguous(memory_format=layout), (x.clone(), draw(seed=2))
    value, gradient = by_hand(x, made)
    with cpu.record() as kernels:
        y = residual(x.requires_grad_(), made)
        (found,) = torch.autograd.grad(y, x, above)
        with torch.no_grad():
            again = residual(x, made)
    assert kernels == {"nnpack"} and len(nnpack) == 3 * count
    assert (y - value).abs().max() <= 1e-5 * value.abs().max() and torch.equal(y, again)
    # A value within rounding of zero may fall on the other side of a ReLU, so the gradient is compared as a whole.
    assert (found - gradient).norm() <= 1e-4 * gradient.norm()
    assert torch.equal(x.detach(), before[0]) and torch.equal(above, before[1])


def test_checkpointing_computes_the_same_gradient(nnpack):
    made, x = layers(), draw().requires_grad_()
    plain, again = (torch.autograd.grad(y.square().sum(), x)[0] for y in (
        residual(x, made), checkpoint(residual, x, made, use_reentrant=False)))
    assert torch.equal(plain, again) and len(nnpack) == 2 * 6 + 3


@pytest.mark.parametrize("case", ["other CPU", "switched off", "double", "autocast", "few channels", "few positions",
                                  "training"])
def test_other_blocks_are_plain(nnpack, monkeypatch, case):
    if case == "other CPU":
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(cpu, "NNPACK_CHANNELS", WIDTH + (case == "few channels"))
    monkeypatch.setattr(cpu, "NNPACK_POSITIONS", 21 * 26 + (case == "few positions"))
    dtype = torch.float64 if case == "double" else torch.float32
    made, x = layers(dtype=dtype), draw(dtype=dtype).requires_grad_()
    if case == "training":
        made[1].weight.requires_grad_(True)
    with cpu.kernels(case != "switched off"), torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"):
        y = residual(x, made)
    (found,) = torch.autograd.grad(y, x, draw(seed=2).to(y), retain_graph=case == "training")
    value, gradient = by_hand(x, made)
    assert not nnpack
    assert (y - value).abs().max() <= (0.03 if case == "autocast" else 1e-5) * value.abs().max()
    assert (found - gradient).norm() <= (0.2 if case == "autocast" else 1e-4) * gradient.norm()
    if case == "training":
        y.sum().backward()
        assert made[1].weight.grad.abs().max() > 0


def test_nnpack_runs_where_it_was_measured_to_gain(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    weights = [torch.empty(64, 64, 3, 3)] * 3
    gains = {size: cpu.residuals(torch.empty(1).expand(1, 64, size, size), weights) for size in (512, 128, 64, 32)}
    assert gains == {512: True, 128: True, 64: True, 32: False} or not torch._nnpack_available()
