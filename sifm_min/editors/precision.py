"""The precision of networks: the 16-bit dtype of a device, and gradients through a network that runs in float16.

float16 has no numbers between 0 and 6e-8. The gradient of a mean over 100,000 activations is of that size, and would be rounded
to a few values or to zero. So the gradient is multiplied by a power of two where it enters the network, which brings its
largest element to about 1, and divided by it where it leaves. What the network computes forwards is not changed.
"""

import torch
from torch.autograd.function import once_differentiable

LARGEST = 120                                                # of the exponent: a float32 ends near 2**128


def half_dtype(device):
    """The 16-bit dtype for networks on a CUDA device: bfloat16, or float16 on a card that does not compute in bfloat16."""
    capable = torch.version.hip or torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.bfloat16 if capable else torch.float16


def in_dtype(dtype, network, x):
    """network(x) computed in a dtype, with gradients for x that keep their precision: see the module.

    network returns a tensor, a tuple of tensors or a dict of tensors; in float16 they come in float32 if gradients are wanted.
    """
    if dtype != torch.float16 or not (torch.is_grad_enabled() and x.requires_grad):
        return network(x.to(dtype))
    scale = []                                               # of this call, known when its gradient comes
    outputs = network(_Narrowed.apply(x, dtype, scale))
    if isinstance(outputs, torch.Tensor):
        return _Widened.apply(scale, outputs)[0]
    if isinstance(outputs, dict):
        return dict(zip(outputs, _Widened.apply(scale, *outputs.values()), strict=True))
    return _Widened.apply(scale, *outputs)


class _Narrowed(torch.autograd.Function):
    """x in the network's dtype; its gradient divided by the scale."""

    @staticmethod
    def forward(ctx, x, dtype, scale):
        ctx.dtype, ctx.scale = x.dtype, scale
        return x.to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        return gradient.to(ctx.dtype) / ctx.scale[-1].to(ctx.dtype), None, None


class _Widened(torch.autograd.Function):
    """The network's outputs in float32; their gradients multiplied by one scale, which suits the largest of them."""

    @staticmethod
    def forward(ctx, scale, *outputs):
        ctx.scale, ctx.dtypes = scale, [output.dtype for output in outputs]
        return tuple(output.float() for output in outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):
        largest = torch.stack([gradient.abs().amax() for gradient in gradients]).amax()
        _, exponent = torch.frexp(largest)
        ctx.scale.append(torch.exp2(-exponent.clamp(-LARGEST, LARGEST).float()))
        return None, *((gradient * ctx.scale[-1]).to(dtype) for gradient, dtype in zip(gradients, ctx.dtypes, strict=True))
