"""Kernels for CPUs, behind one switch: faster convolutions, and group norms that are exact in the channels-last layout.

On a CPU torch's layers lose time or digits in five places. Each has a replacement here:
- "winograd": 3x3 convolutions in float32 of many channels and positions, with a quarter of the multiplications (winograd.py).
- "nnpack": residual blocks of such convolutions with fewer channels (residual.py), by the Winograd kernels of NNPACK, which
  torch has built in and does not use by itself.
- "matrix product": convolutions of few positions and many weights. torch reorders the weights at each call.
- "strips": convolutions of very many positions, one after the other. A part of the picture goes through all of them at once.
- "group norm": norms of channels-last float32 tensors. torch adds all positions one after the other in float32. Where they
  are all alike, as in a picture of one colour, every addition rounds the same way: at 256x256 the variance is then off by up
  to a hundredth. Here the mean is known before the deviations are squared (two passes), blocks are added pairwise, and their
  sums in float64. Blocks stay in a core's cache, so that each pass reads memory once.

The functions here choose: `convolution` and `convolution_gradient` return a kernel, or None where torch's own is to run, and
`norms` is True or False. `kernels(False)` switches all of them off. `record` notes which ones ran, for a report.
"""

import contextlib

import torch
import torch.nn.functional as F

from . import winograd

# Measured for the shapes of InstructPix2Pix by `tools/bench.py convolutions` (--size 256, and --size 512 --networks unet), on
# one thread of a CPU with AVX2 and 32 MiB of cache. Each number is the kernel's time over torch's, forward or gradient.
# Winograd: .4 to .8 for 32x32 positions and more, up to 640 -> 640 channels for one picture and 1280 -> 1280 for four; .8 to
# .9 for 640 -> 640 at four times 16x16. With more than 400 kernels of 3x3 for each position it is .84 to 1.5, as 960 -> 640 at
# 32x32 (.98). For one picture of 16x16 or less it is above 1.1.
WINOGRAD_CHANNELS, WINOGRAD_POSITIONS, WINOGRAD_WEIGHTS = 128, 256, 400
# Matrix products: .2 to .8 for layers of 1280 -> 1280 channels or more at 8x8 and 16x16, and at 4x4 for four pictures; about 1
# at 4x4 for one; .8 to 1.3 for smaller layers, whose weights fit into the cache.
PRODUCT_WEIGHTS = 2**23
# NNPACK, 64 -> 64 channels: .63 at 512x512, .74 at 256x256, .78 at 128x128, .69 at 64x64, 1.3 at 32x32. Its error is 1.6e-6 of
# the root mean square of the values, that of torch .4e-6. It has kernels for AVX2 and none for wider units, so it is used on
# AVX2 alone.
NNPACK_CHANNELS, NNPACK_POSITIONS = 64, 2**12
# A layer's result of more positions is new memory from the system at every call, which costs more than adding it up does. With
# 64 channels: 512x512 in two strips takes .82 of the time in one (encoder of models/tiny_vae.py, forward and backward).
STRIP_POSITIONS = 2**17
NORM_POSITIONS = 1024                               # torch's sums of up to so many equal numbers are exact to some millionths
BLOCK = 2**17                                       # numbers: 512 KiB, about what a core's cache holds

_enabled, _ran = True, set()                        # for the whole process; a backward pass may run in another thread


# ------------------------------------------------------------------------------------------------------------ the switch

@contextlib.contextmanager
def kernels(on: bool = True):
    """Run the kernels of this file inside, or with on=False torch's own layers alone."""
    global _enabled
    before, _enabled = _enabled, on
    try:
        yield
    finally:
        _enabled = before


@contextlib.contextmanager
def record():
    """Note the kernels that run inside. Yields a set of their names, which grows while they run."""
    global _ran
    outer, _ran = _ran, set()
    inner = _ran
    try:
        yield inner
    finally:
        _ran = outer
        _ran.update(inner)


def describe(names, device):
    """The recorded names as plain data for a report: a sorted list, or None where the network was not on a CPU."""
    return sorted(names) if torch.device(device).type == "cpu" else None


def _chosen(name, fits):
    """True if a kernel fits and the kernels are switched on; then record its name."""
    if fits and _enabled:
        _ran.add(name)
    return fits and _enabled


# ---------------------------------------------------------------------------------------------------------- convolutions

def convolution(x, weight, stride, padding):
    """The kernel to use in place of F.conv2d, with the same arguments, or None."""
    sides = [(size + 2 * pad - kernel) // step + 1 for size, pad, kernel, step in
             zip(x.shape[2:], padding, weight.shape[2:], stride, strict=True)]
    if _chosen("matrix product", few_positions(len(x) * sides[0] * sides[1], weight)):
        return product
    if _chosen("winograd", many_positions(x, weight, stride, padding)):
        return _winograd
    return None


def convolution_gradient(gradient, weight, size, stride, padding):
    """The kernel (gradient, weight) -> the gradient at the input, which has this size (h, w); or None."""
    same = stride == (1, 1) and gradient.shape[2:] == size
    if _chosen("matrix product", same and few_positions(gradient[:, 0].numel(), weight)):
        return product_gradient
    if _chosen("winograd", many_positions(gradient, weight, stride, padding)):
        return winograd.gradient
    return None


def many_positions(x, weight, stride, padding):
    """True where Winograd's method computes the convolution and gains. For a gradient, x is the gradient at the output.

    The weights are transformed once for all positions, so there must be enough positions for them.
    """
    positions, channels = x.shape[2] * x.shape[3], weight.shape[:2]
    return (weight.shape[2:] == (3, 3) and stride == (1, 1) and padding == (1, 1) and x.device.type == "cpu"
            and x.dtype == weight.dtype == torch.float32 and weight.is_contiguous(memory_format=torch.channels_last)
            and min(channels) >= WINOGRAD_CHANNELS and positions >= WINOGRAD_POSITIONS
            and channels[0] * channels[1] <= WINOGRAD_WEIGHTS * len(x) * positions)


def residuals(x, weights):
    """True where `nnpack` computes a block of 3x3 convolutions that keep size and width, and gains."""
    fits = (x.device.type == "cpu" and x.dtype == torch.float32 and x.shape[1] >= NNPACK_CHANNELS
            and x.shape[2] * x.shape[3] >= NNPACK_POSITIONS and all(weight.dtype == torch.float32 for weight in weights)
            and not torch.is_autocast_enabled("cpu") and torch.backends.cpu.get_cpu_capability() == "AVX2"
            and torch._nnpack_available())
    return _chosen("nnpack", fits)


def nnpack(x, weight, bias):
    """F.conv2d with padding 1: x (B, C, H, W), contiguous, weight (O, C, 3, 3), bias (O,) or None -> (B, O, H, W), new."""
    return torch._nnpack_spatial_convolution(x, weight.contiguous(), bias, 1)


def few_positions(positions, weight):
    """True where a matrix product gains: torch spends more time on reordering that many weights, at each call, than on
    convolving so few positions."""
    ready = weight.device.type == "cpu" and weight.is_contiguous(memory_format=torch.channels_last)
    return ready and weight.numel() >= PRODUCT_WEIGHTS and 2 * positions <= min(weight.shape[:2])


def _winograd(x, weight, bias, stride, padding):
    """`winograd.convolve` with the arguments of F.conv2d."""
    return winograd.convolve(x, weight, bias)


def product(x, weight, bias, stride, padding):
    """The convolution as one matrix product: the neighbourhood of each position times the weights in their stored order."""
    x = F.pad(x.permute(0, 2, 3, 1), (0, 0, padding[1], padding[1], padding[0], padding[0]))        # (B, H, W, C)
    near = x.unfold(1, weight.shape[2], stride[0]).unfold(2, weight.shape[3], stride[1])            # (B, h, w, C, k, k)
    y = F.linear(near.permute(0, 1, 2, 4, 5, 3).flatten(3), weight.permute(0, 2, 3, 1).flatten(1), bias)
    return y.permute(0, 3, 1, 2)                                                                    # (B, out, h, w)


def product_gradient(gradient, weight):
    """The gradient at the input of a `product` that keeps the size: the part of each position is added to its neighbourhood."""
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


def strips(x):
    """The number of strips in which a chain of convolutions should run through x (B, C, h, w)."""
    count = -(-len(x) * x.shape[2] * x.shape[3] // STRIP_POSITIONS) if x.device.type == "cpu" else 1
    return count if _chosen("strips", count > 1) else 1


# ----------------------------------------------------------------------------------------------------------- group norms

def norms(x):
    """True for the tensors (B, C, h, w) whose group norm is computed here. Few positions are left to torch, which is exact."""
    return (_enabled and x.device.type == "cpu" and x.dtype == torch.float32 and x.stride(1) == 1
            and not x.is_contiguous() and x.shape[2] * x.shape[3] > NORM_POSITIONS)


def group_norm(x, weight, bias, groups, eps, silu):
    """(group norm of x, with SiLU if `silu`, channels-last; mean of each group, (B, groups); 1 / deviation, likewise)."""
    _ran.add("group norm")
    rows = _rows(x)
    mean, rstd = _moments(rows, groups, eps)
    shift, scale = _affine(mean, rstd, weight, bias, groups)
    y = torch.empty_like(rows)
    for offset, slope, block, place in _blocks(shift, scale, rows, y):
        torch.addcmul(offset, block, slope, out=place)
        if silu:
            torch.ops.aten.silu.out(place, out=place)
    return _picture(y, x), mean, rstd


def group_norm_gradient(gradient, x, mean, rstd, weight, bias, groups, silu):
    """The gradient at x of `group_norm`. gradient: at its result; mean, rstd: the moments that it returned."""
    rows, above = _rows(x), _rows(gradient)
    count = rows[0].numel() // groups
    shift, scale = _affine(mean, rstd, weight, bias, groups)
    center = _per_channel(mean, groups, rows)
    found = torch.empty_like(rows)
    before = found if silu else above                       # at the norm, before SiLU; shares memory with the result
    sums, products = (rows.new_zeros(len(rows), 1, rows.shape[2], dtype=torch.float64) for _ in range(2))
    scratch = _scratch(rows)
    for offset, slope, middle, block, outer, inner, total, product in _blocks(
            shift, scale, center, rows, above, before, sums, products):
        work = scratch[:block.numel()].view_as(block)
        if silu:
            torch.addcmul(offset, block, slope, out=work)
            torch.ops.aten.silu_backward.grad_input(outer, work, grad_input=inner)
        total.add_(inner.sum(1, keepdim=True))
        torch.sub(block, middle, out=work)
        product.add_(torch.mul(work, inner, out=work).sum(1, keepdim=True))

    def per_group(sums):
        return (sums * weight).unflatten(2, (groups, -1)).sum((1, 3)) / count                   # (B, groups)

    # scale * gradient + constant + linear * (x - mean)
    constant = _per_channel(-rstd * per_group(sums), groups, rows)
    linear = _per_channel(-rstd.double() ** 3 * per_group(products), groups, rows)
    for middle, offset, slope, factor, block, inner, place in _blocks(center, constant, linear, scale, rows, before, found):
        work = scratch[:block.numel()].view_as(block)
        torch.sub(block, middle, out=work)
        torch.addcmul(offset, work, slope, out=work)
        torch.addcmul(work, inner, factor, out=place)
    return _picture(found, x)


def _moments(rows, groups, eps):
    """Mean and 1 / deviation of each group, (B, groups), in two passes: the mean, then the squared deviations from it."""
    count = rows[0].numel() // groups
    mean = (rows.sum(1).double().unflatten(1, (groups, -1)).sum(2) / count).to(rows.dtype)
    squares = rows.new_zeros(len(rows), 1, rows.shape[2], dtype=torch.float64)
    scratch = _scratch(rows)
    for middle, block, total in _blocks(_per_channel(mean, groups, rows), rows, squares):
        work = scratch[:block.numel()].view_as(block)
        torch.sub(block, middle, out=work)
        total.add_(torch.mul(work, work, out=work).sum(1, keepdim=True))
    variance = squares.unflatten(2, (groups, -1)).sum((1, 3)) / count
    return mean, (variance + eps).rsqrt().to(rows.dtype)


def _affine(mean, rstd, weight, bias, groups):
    """(shift, scale), each (B, 1, C): the norm is shift + scale * x."""
    scale = rstd.repeat_interleave(len(weight) // groups, dim=1) * weight
    shift = bias - mean.repeat_interleave(len(weight) // groups, dim=1) * scale
    return shift[:, None], scale[:, None]


def _per_channel(values, groups, rows):
    """(B, groups) -> (B, 1, C), in the dtype of the rows."""
    return values.to(rows.dtype).repeat_interleave(rows.shape[2] // groups, dim=1)[:, None]


def _rows(x):
    """(B, C, h, w) -> (B, h*w, C), a view where x is channels-last."""
    return x.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1).flatten(1, 2)


def _picture(rows, like):
    """(B, h*w, C) -> (B, C, h, w), channels-last."""
    return rows.unflatten(1, like.shape[2:]).permute(0, 3, 1, 2)


def _scratch(rows):
    """Memory for one block."""
    return rows.new_empty(min(rows.numel(), BLOCK + rows.shape[2]))


def _blocks(*tensors):
    """Yield tensors (B, positions or 1, C) in blocks: a part of a picture, or several pictures where they are small."""
    positions, channels = max(tensors, key=torch.numel).shape[1:]
    pictures = max(1, BLOCK // (positions * channels))
    rows = positions if pictures > 1 else max(1, BLOCK // channels)
    for several in zip(*(tensor.split(pictures) for tensor in tensors), strict=True):
        pieces = [part.split(rows, 1) for part in several]
        count = max(len(piece) for piece in pieces)
        yield from zip(*(piece if len(piece) == count else piece * count for piece in pieces), strict=True)
