"""Layers that save almost nothing for the backward pass where weights are frozen, and values computed once for many steps.

Training needs the gradients of the weights, and for those a layer's input is saved. Moving a picture under frozen weights
needs the picture's gradient alone: a convolution then needs nothing that depends on its input, and what is cheap is computed
again from what is saved anyway. The functions here do so where no parameter of the layer requires a gradient and its input
does. Elsewhere they are the plain layers. Values are equal to the bit, with three exceptions on a CPU: a convolution of few
positions is a matrix product, which adds in another order; many channels in float32 are convolved by Winograd's method, whose
rounding error winograd.py states; and group norms of many positions are computed by cpu.py, more exactly than by torch.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from . import cpu, winograd

MANY_WEIGHTS = 2**21                                # more than the cache of a core holds


def only_the_input(x, *parameters):
    """True if autograd will need the gradient of x and of no parameter."""
    return torch.is_grad_enabled() and x.requires_grad and not any(parameter.requires_grad for parameter in parameters)


def frozen(network):
    """True if no weight of the network requires a gradient."""
    return not any(parameter.requires_grad for parameter in network.parameters())


class Conv2d(nn.Conv2d):
    """A convolution with zero padding. With frozen weights it saves nothing but the weights; on a CPU it is then computed as
    a matrix product, or by Winograd's method, where that is faster."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, *, stride: int = 1, padding: int = 0):
        super().__init__(in_channels, out_channels, kernel_size, stride=stride, padding=padding)

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
        if ctx.stride == (1, 1) and gradient.shape[2:] == ctx.size and _few(gradient[:, 0].numel(), weight):
            return _product_gradient(gradient, weight), None, None, None, None
        if winograd.suits(gradient, weight, ctx.stride, ctx.padding):
            return winograd.gradient(gradient, weight), None, None, None, None
        # Rows and columns at the end that the stride did not reach have a gradient of zero.
        left = [(size + 2 * pad - kernel) % step for size, pad, kernel, step in
                zip(ctx.size, ctx.padding, weight.shape[2:], ctx.stride, strict=True)]
        # The gradient at the input, by the kernel that autograd calls; autograd would save the input for it.
        x_gradient = F.conv_transpose2d(gradient, weight.to(gradient.dtype), None, ctx.stride, ctx.padding, left)
        return x_gradient, None, None, None, None


def _convolve(x, weight, bias, stride, padding):
    sides = [(size + 2 * pad - kernel) // step + 1 for size, pad, kernel, step in
             zip(x.shape[2:], padding, weight.shape[2:], stride, strict=True)]
    if _few(len(x) * sides[0] * sides[1], weight):
        return _product(x, weight, bias, stride, padding)
    if winograd.suits(x, weight, stride, padding):
        return winograd.convolve(x, weight, bias)
    return F.conv2d(x, weight, bias, stride, padding)


def _few(positions, weight):
    """True where a CPU spends more time on reordering the weights, at each call, than on convolving so few positions: four
    fifths of the time for 1280 channels at 4x4. Few weights are reordered within the cache, which costs little."""
    ready = weight.device.type == "cpu" and weight.is_contiguous(memory_format=torch.channels_last)
    return ready and weight.numel() >= MANY_WEIGHTS and 2 * positions <= min(weight.shape[:2])


def _product(x, weight, bias, stride, padding):
    """The convolution as one matrix product: every position's neighbourhood times the weights as they are stored."""
    x = F.pad(x.permute(0, 2, 3, 1), (0, 0, padding[1], padding[1], padding[0], padding[0]))        # (B, H, W, C)
    near = x.unfold(1, weight.shape[2], stride[0]).unfold(2, weight.shape[3], stride[1])            # (B, h, w, C, k, k)
    y = F.linear(near.permute(0, 1, 2, 4, 5, 3).flatten(3), weight.permute(0, 2, 3, 1).flatten(1), bias)
    return y.permute(0, 3, 1, 2)                                                                    # (B, out, h, w)


def _product_gradient(gradient, weight):
    """The gradient at the input of a `_product` that keeps the size: each position's part is added to its neighbourhood."""
    (count, channels, height, width), kernel = gradient.shape, weight.shape[2]
    # The product has two dimensions. With four, torch may copy the weights for each of the other two.
    near = gradient.permute(0, 2, 3, 1).reshape(-1, channels) @ weight.permute(0, 2, 3, 1).flatten(1)
    near = near.view(count, height, width, kernel, kernel, -1)
    near = near.to(torch.promote_types(near.dtype, torch.float32))              # a convolution adds in float32 or wider
    parts = [F.pad(near[:, :, :, i, j], (0, 0, j, kernel - 1 - j, i, kernel - 1 - i))
             for i in range(kernel) for j in range(kernel)]
    edge = kernel // 2
    whole = sum(parts[1:], parts[0])[:, edge:edge + height, edge:edge + width]
    return whole.to(gradient.dtype).permute(0, 3, 1, 2)


class Embedding(nn.Embedding):
    """nn.Embedding that draws no weights on the meta device. torch would import its whole compiler for that, which takes
    seconds."""

    def reset_parameters(self):
        if not self.weight.is_meta:
            super().reset_parameters()


class GroupNorm(nn.GroupNorm):
    """Group norm of x (B, C, h, w). On a CPU the norm of many positions is that of cpu.py, unless the weights are trained."""

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
            found = cpu.group_norm_gradient(gradient, x, mean, rstd, weight, bias, ctx.groups, ctx.silu)
            return found, None, None, None, None, None
        layout = _layout(x)
        x = x.contiguous(memory_format=layout)
        if ctx.silu:
            gradient = torch.ops.aten.silu_backward(gradient, _normalized(x, weight, bias, mean, rstd, ctx))
        x_gradient, _, _ = torch.ops.aten.native_group_norm_backward(
            gradient.contiguous(memory_format=layout), x, mean, rstd, weight, *_sizes(x), ctx.groups, (True, False, False))
        return x_gradient, None, None, None, None, None


def _normalized(x, weight, bias, mean, rstd, ctx):
    """norm(x), computed again in the backward pass."""
    if x.dtype not in (torch.float32, torch.float64):        # the saved moments are rounded: take them anew
        return torch.native_group_norm(x, weight, bias, *_sizes(x), ctx.groups, ctx.eps)[0]
    mean, rstd = (part.repeat_interleave(x.shape[1] // ctx.groups, dim=1) for part in (mean, rstd))         # (B, C)
    scale = rstd * weight
    shift = bias - mean * scale
    return torch.addcmul(shift[:, :, None, None], x, scale[:, :, None, None])


def _sizes(x):
    return x.shape[0], x.shape[1], x.shape[2] * x.shape[3]


def _layout(x):
    """The memory format in which torch's group norm runs: channels-last exists on CPUs only."""
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
    """Values on a device, as tensor.to(). From pinned memory the copy waits in the GPU's queue, and the program goes on."""
    values = values.to(dtype or values.dtype)
    if torch.device(device).type != "cuda" or values.device.type != "cpu":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


class Prepared:
    """The part of each block's input that depends on a timestep or a text alone: `prepared[block]` is `block.prepare(value)`,
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
