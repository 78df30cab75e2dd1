"""Layers that keep little for the way back where weights are frozen, and what need not be computed at every step.

Training asks for the gradients of the weights, and for those a layer's input is kept. Whoever moves a picture under
frozen weights asks for the picture's gradient alone: a convolution then needs nothing that depends on its input, and
what is cheap is computed again from what is kept anyhow. Each function here does so where no parameter of the layer
wants a gradient and its input does, and is the plain layer everywhere else; the values are the same to the bit, except
where a CPU convolves many channels: few positions as a matrix product, which adds in another order, and many in float32
by Winograd's way, whose rounding is some times a plain convolution's (winograd.py says how much).
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from . import winograd

MANY_WEIGHTS = 2**21                                # more than the cache of a core holds


def only_the_input(x, *parameters):
    """Whether a gradient will be asked for, and for none but x's."""
    return torch.is_grad_enabled() and x.requires_grad and not any(parameter.requires_grad for parameter in parameters)


def frozen(network):
    """Whether none of its weights wants a gradient."""
    return not any(parameter.requires_grad for parameter in network.parameters())


class Conv2d(nn.Conv2d):
    """A convolution with zero padding. Where its weights are frozen it keeps nothing but them; on a CPU it may then be a
    matrix product, or Winograd's."""

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
        # The rows and columns at the end that no step of the stride reached: they have a gradient too, of zero.
        left = [(size + 2 * pad - kernel) % step for size, pad, kernel, step in
                zip(ctx.size, ctx.padding, weight.shape[2:], ctx.stride, strict=True)]
        # This is the input's gradient, by the kernel that autograd would call, which would want to see the input.
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
    """Whether a CPU takes longer to bring the weights into the order in which it convolves, each time, than to convolve so
    few positions: of a 1280-channel convolution at 4x4 that is four fifths of the time. Few weights it orders in its cache."""
    ready = weight.device.type == "cpu" and weight.is_contiguous(memory_format=torch.channels_last)
    return ready and weight.numel() >= MANY_WEIGHTS and 2 * positions <= min(weight.shape[:2])


def _product(x, weight, bias, stride, padding):
    """The convolution as a matrix product of every position's neighbourhood with the weights as they lie in memory."""
    x = F.pad(x.permute(0, 2, 3, 1), (0, 0, padding[1], padding[1], padding[0], padding[0]))        # (B, H, W, C)
    near = x.unfold(1, weight.shape[2], stride[0]).unfold(2, weight.shape[3], stride[1])            # (B, h, w, C, k, k)
    y = F.linear(near.permute(0, 1, 2, 4, 5, 3).flatten(3), weight.permute(0, 2, 3, 1).flatten(1), bias)
    return y.permute(0, 3, 1, 2)                                                                    # (B, out, h, w)


def _product_gradient(gradient, weight):
    """The gradient at the input of a `_product` that keeps the size: every position adds to its neighbourhood."""
    (count, channels, height, width), kernel = gradient.shape, weight.shape[2]
    # A product of two dimensions: in one of four, torch may copy the weights for each of the others.
    near = gradient.permute(0, 2, 3, 1).reshape(-1, channels) @ weight.permute(0, 2, 3, 1).flatten(1)
    near = near.view(count, height, width, kernel, kernel, -1)
    near = near.to(torch.promote_types(near.dtype, torch.float32))              # a convolution adds in no less
    parts = [F.pad(near[:, :, :, i, j], (0, 0, j, kernel - 1 - j, i, kernel - 1 - i))
             for i in range(kernel) for j in range(kernel)]
    edge = kernel // 2
    whole = sum(parts[1:], parts[0])[:, edge:edge + height, edge:edge + width]
    return whole.to(gradient.dtype).permute(0, 3, 1, 2)


class Embedding(nn.Embedding):
    """nn.Embedding that draws no weights where there is no memory for them: on the meta device torch would import all of its
    compiler for that, which takes seconds."""

    def reset_parameters(self):
        if not self.weight.is_meta:
            super().reset_parameters()


class NormSiLU(nn.GroupNorm):
    """SiLU(norm(x)), x (B, C, h, w). Where its weights are frozen it keeps x and two numbers per group; plain layers keep
    two more of x's size."""

    def forward(self, x):
        if only_the_input(x, self.weight, self.bias):
            return _NormSiLU.apply(x, self.weight, self.bias, self.num_groups, self.eps)
        return F.silu(super().forward(x))


class _NormSiLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, groups, eps):
        ctx.groups, ctx.eps = groups, eps
        y, mean, rstd = torch.native_group_norm(x.contiguous(memory_format=_layout(x)), weight, bias, *_sizes(x), groups, eps)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        return F.silu(y)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        x, weight, bias, mean, rstd = ctx.saved_tensors
        layout = _layout(x)
        x = x.contiguous(memory_format=layout)
        if x.dtype in (torch.float32, torch.float64):
            mean_c, rstd_c = (part.repeat_interleave(x.shape[1] // ctx.groups, dim=1) for part in (mean, rstd))     # (B, C)
            scale = rstd_c * weight
            shift = bias - mean_c * scale
            y = torch.addcmul(shift[:, :, None, None], x, scale[:, :, None, None])          # norm(x), in one pass
        else:                                       # the kept numbers are rounded, and would be rounded on
            y, _, _ = torch.native_group_norm(x, weight, bias, *_sizes(x), ctx.groups, ctx.eps)
        gradient = torch.ops.aten.silu_backward(gradient, y).contiguous(memory_format=layout)
        x_gradient, _, _ = torch.ops.aten.native_group_norm_backward(
            gradient, x, mean, rstd, weight, *_sizes(x), ctx.groups, (True, False, False))
        return x_gradient, None, None, None, None


def _sizes(x):
    return x.shape[0], x.shape[1], x.shape[2] * x.shape[3]


def _layout(x):
    """The memory format in which group_norm runs: channels-last exists on CPUs only."""
    last = x.device.type == "cpu" and x.stride(1) == 1 and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def gated_gelu(x: torch.Tensor) -> torch.Tensor:
    """One half of the channels, (..., C), gated by the GELU of the other, (..., C). Kept is x alone, and not what becomes
    of the gate: half as much again."""
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


class Prepared:
    """What the blocks of a network make of a timestep or a text, whatever the picture: `prepared[block]` is
    `block.prepare(value)`, computed when it is first asked for and then kept."""

    def __init__(self, value):
        self.value, self.known = value, {}

    def __getitem__(self, block):
        if block not in self.known:
            self.known[block] = block.prepare(self.value)
        return self.known[block]

    @classmethod
    def for_many(cls, network, value):
        """One that outlives a walk. ValueError where a gradient would have to pass through it: its graph would not."""
        if value.requires_grad or not frozen(network):
            raise ValueError("what is prepared serves many calls, so no gradient can pass through it: freeze the network's "
                             "weights and detach the text, or pass timestep and text as they are")
        return cls(value)
