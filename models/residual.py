"""The residual block of 3x3 convolutions, which the tiny autoencoder consists of.

With frozen weights, on a CPU, cpu.py may choose NNPACK's Winograd convolutions for it. The block then works in its own memory
between the convolutions: large new memory costs more than a ReLU in it.
"""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from . import cpu
from .lean import only_the_input


def residual(x, layers):
    """relu(x + f(x)), f convolutions that keep size and width, with a ReLU between each two: (B, C, h, w) -> the same shape.

    layers: modules with `weight` (C, C, 3, 3) and `bias` (C,), stride 1 and padding 1.
    """
    parameters = [parameter for layer in layers for parameter in (layer.weight, layer.bias)]
    if cpu.residuals(x, parameters[::2]):
        if only_the_input(x, *parameters):
            return _Residual.apply(x, *parameters)
        if not torch.is_grad_enabled():
            return _steps(x, parameters)[-1]
    y = x
    for layer in layers[:-1]:
        y = F.relu(layer(y))
    return F.relu(layers[-1](y) + x)


class _Residual(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, *parameters):
        results = _steps(x, parameters)
        ctx.save_for_backward(*parameters[::2], *results)
        return results[-1]

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        saved = ctx.saved_tensors                               # read once: checkpointing computes them for one reading
        count = len(saved) // 2
        weights, results = saved[:count], saved[count:]
        skipped = torch.ops.aten.threshold_backward(gradient.contiguous(), results[-1], 0)
        found = skipped
        for i in range(count - 1, -1, -1):
            found = cpu.nnpack(found, weights[i].flip(2, 3).transpose(0, 1), None)
            if i:                                               # through the ReLU before this convolution
                torch.ops.aten.threshold_backward.grad_input(found, results[i - 1], 0, grad_input=found)
        return found.add_(skipped), *[None] * (2 * count)       # `skipped` reaches x without a convolution


def _steps(x, parameters):
    """The results of all ReLUs of `residual`, by NNPACK; the last is that of the block."""
    y = x = x.contiguous()
    results = []
    for i in range(0, len(parameters), 2):
        y = cpu.nnpack(y, *parameters[i:i + 2])
        if i == len(parameters) - 2:
            y.add_(x)
        results.append(y.relu_())
    return results
