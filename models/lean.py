"""Layers that save almost nothing for the backward pass where weights are frozen, and values computed once for many steps.

Training needs the gradients of the weights, and for those a layer saves its input. Optimising a picture under frozen weights
needs the picture's gradient alone: a convolution then saves nothing that depends on its input, and cheap values are computed
again. The layers here work in this way if their input requires a gradient and none of their parameters does. Otherwise they
are torch's. Values are equal to the bit, but for the kernels of cpu.py, which run on CPUs and can be switched off there.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from . import cpu


def only_the_input(x, *parameters):
    """True if autograd will need the gradient of x and of no parameter; an absent one, such as a bias, is None."""
    return torch.is_grad_enabled() and x.requires_grad and not any(p is not None and p.requires_grad for p in parameters)


def tapped(activations, taps):
    """{name: activation} of the taps, a set, from the (name, activation) pairs of a `walk`, which ends at the last of them."""
    found = {}
    for name, x in activations:
        if name in taps:
            found[name] = x
            if len(found) == len(taps):
                break
    assert len(found) == len(taps), "tap_names has a name that walk does not yield"
    return found


def frozen(network):
    """True if no weight of the network requires a gradient."""
    return not any(parameter.requires_grad for parameter in network.parameters())


class Conv2d(nn.Conv2d):
    """A convolution with zero padding. With frozen weights it saves nothing but the weights, and on a CPU a kernel of cpu.py
    may compute it."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, *, stride: int = 1, padding: int = 0,
                 bias: bool = True):
        super().__init__(in_channels, out_channels, kernel_size, stride=stride, padding=padding, bias=bias)

    def forward(self, x):
        if only_the_input(x, self.weight, self.bias):
            return _Convolution.apply(x, self.weight, self.bias, self.stride, self.padding)
        if torch.is_grad_enabled():
            return super().forward(x)
        return _convolve(x, self.weight, self.bias, self.stride, self.padding)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, stride, padding):
        ctx.save_for_backward(weight)
        ctx.stride, ctx.padding, ctx.size = stride, padding, x.shape[2:]
        return _convolve(x, weight, bias, stride, padding)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        (weight,) = ctx.saved_tensors
        if kernel := cpu.convolution_gradient(gradient, weight, ctx.size, ctx.stride, ctx.padding):
            return kernel(gradient, weight), None, None, None, None
        # Rows and columns at the end that the stride does not reach have a gradient of zero.
        left = [(size + 2 * pad - kernel) % step for size, pad, kernel, step in
                zip(ctx.size, ctx.padding, weight.shape[2:], ctx.stride, strict=True)]
        # The same function as autograd's gradient at the input, for which autograd would save the input.
        x_gradient = F.conv_transpose2d(gradient, weight.to(gradient.dtype), None, ctx.stride, ctx.padding, left)
        return x_gradient, None, None, None, None


def _convolve(x, weight, bias, stride, padding):
    kernel = cpu.convolution(x, weight, stride, padding) or F.conv2d
    return kernel(x, weight, bias, stride, padding)


class Embedding(nn.Embedding):
    """nn.Embedding that draws no weights on the meta device: torch imports its whole compiler to draw them, which takes
    seconds."""

    def reset_parameters(self):
        if not self.weight.is_meta:
            super().reset_parameters()


class GroupNorm(nn.GroupNorm):
    """Group norm of x (B, C, h, w). On a CPU, with frozen weights, the kernel of cpu.py may compute it."""

    silu = False

    def forward(self, x):
        on_cpu = cpu.norms(x)
        if only_the_input(x, self.weight, self.bias) and (on_cpu or self.silu):
            return _GroupNorm.apply(x, self.weight, self.bias, self.num_groups, self.eps, self.silu)
        if on_cpu and not torch.is_grad_enabled():
            return cpu.group_norm(x, self.weight, self.bias, self.num_groups, self.eps, self.silu)[0]
        return F.silu(super().forward(x)) if self.silu else super().forward(x)


class NormSiLU(GroupNorm):
    """SiLU(norm(x)). With frozen weights it saves x and two numbers per group; plain layers save two more tensors of x's
    size."""

    silu = True


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, groups, eps, silu):
        ctx.groups, ctx.eps, ctx.silu = groups, eps, silu
        if cpu.norms(x):
            y, mean, rstd = cpu.group_norm(x, weight, bias, groups, eps, silu)
        else:
            laid_out = x.contiguous(memory_format=_layout(x))
            y, mean, rstd = torch.native_group_norm(laid_out, weight, bias, *_sizes(x), groups, eps)
            y = F.silu(y) if silu else y
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        x, weight, bias, mean, rstd = ctx.saved_tensors
        if cpu.norms(x):
            x_gradient = cpu.group_norm_gradient(gradient, x, mean, rstd, weight, bias, ctx.groups, ctx.silu)
            return x_gradient, None, None, None, None, None
        layout = _layout(x)
        x = x.contiguous(memory_format=layout)
        if ctx.silu:
            gradient = torch.ops.aten.silu_backward(gradient, _normalized(x, weight, bias, mean, rstd, ctx))
        x_gradient, _, _ = torch.ops.aten.native_group_norm_backward(
            gradient.contiguous(memory_format=layout), x, mean, rstd, weight, *_sizes(x), ctx.groups, (True, False, False))
        return x_gradient, None, None, None, None, None


def _normalized(x, weight, bias, mean, rstd, ctx):
    """Compute norm(x) again, in the backward pass."""
    if x.dtype not in (torch.float32, torch.float64):        # the saved moments are rounded: compute new ones
        return torch.native_group_norm(x, weight, bias, *_sizes(x), ctx.groups, ctx.eps)[0]
    mean, rstd = (part.repeat_interleave(x.shape[1] // ctx.groups, dim=1) for part in (mean, rstd))         # (B, C)
    scale = rstd * weight
    shift = bias - mean * scale
    return torch.addcmul(shift[:, :, None, None], x, scale[:, :, None, None])


def _sizes(x):
    return x.shape[0], x.shape[1], x.shape[2] * x.shape[3]


def _layout(x):
    """The memory format in which torch's group norm runs: it has channels-last on CPUs only."""
    last = x.device.type == "cpu" and x.stride(1) == 1 and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def gated_gelu(x: torch.Tensor) -> torch.Tensor:
    """Half of the channels times the GELU of the other half: (..., 2C) -> (..., C). Saves x alone; the plain operations also
    save the gate's GELU, half of x's size."""
    return _GatedGELU.apply(x) if only_the_input(x) else _gated_gelu(x)


def _gated_gelu(x):
    x, gate = x.chunk(2, dim=-1)
    return x * F.gelu(gate)


class _GatedGELU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return _gated_gelu(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        x, gate = ctx.saved_tensors[0].chunk(2, dim=-1)
        return torch.cat([gradient * F.gelu(gate), torch.ops.aten.gelu_backward(gradient * x, gate)], dim=-1)


def sent(values, device, dtype=None):
    """Copy values to a device, like tensor.to(). To a GPU the copy is queued, from pinned memory, without a wait."""
    values = values.to(dtype or values.dtype)
    if torch.device(device).type != "cuda" or values.device.type != "cpu":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


class Sent:
    """A cache on the device of numbers that depend on timesteps alone."""

    KEPT = 64

    def __init__(self):
        self.known = {}

    def __call__(self, make, timesteps, latent):
        """The tensors of make(timesteps), each (1 or B, 1, ...) for a latent (B, ...), of its dtype and on its device."""
        timesteps = torch.as_tensor(timesteps, device="cpu").detach()
        key = (*timesteps.reshape(-1).tolist(), latent.ndim, latent.dtype, latent.device, torch.is_inference_mode_enabled())
        if key not in self.known:
            if len(self.known) >= self.KEPT:
                self.known.clear()
            shape = -1, *[1] * (latent.ndim - 1)
            self.known[key] = [sent(part.reshape(shape), latent.device, latent.dtype) for part in make(timesteps)]
        return self.known[key]


class Prepared:
    """The part of each block's input that depends on a timestep or a text alone. `prepared[block]` is `block.prepare(value)`,
    computed at the first use and then kept."""

    def __init__(self, value):
        self.value, self.known = value, {}

    def __getitem__(self, block):
        if block not in self.known:
            self.known[block] = block.prepare(self.value)
        return self.known[block]

    @classmethod
    def for_many(cls, network, value):
        """Values for many calls of the network. Raises ValueError where a gradient would have to pass through them, because
        their graph serves one backward pass only."""
        if value.requires_grad or not frozen(network):
            raise ValueError("prepared values serve many calls, so no gradient can pass through them: freeze the network's "
                             "weights and detach the text, or pass timestep and text unprepared")
        return cls(value)
