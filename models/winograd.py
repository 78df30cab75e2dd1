"""3x3 convolutions in float32 with a quarter of the multiplications: Winograd's minimal filtering F(4x4, 3x3).

torch has no such kernel for CPUs. cpu.py decides where this one runs. Reference: Lavin and Gray 2015, arXiv 1509.09308. A row
of 4 outputs depends on 6 inputs and 3 weights. Both are read as polynomials and evaluated at 6 points, where their product
takes 6 multiplications; directly it takes 12. In both directions that is 36 in place of 144. The transforms to and from the
points are additions, which cost little beside the matrix products at the points if there are many channels.

The points have small numerators and denominators, and each comes with its reciprocal. This keeps the rounding error low
(Barabasz et al. 2018, arXiv 1803.10986): about 1.4e-6 of the root mean square of the values, six times the error of a plain
convolution. With the usual points 0, 1, -1, 2, -2 it is 3.3e-6.
"""

import math
import threading

import torch

POINTS = (0, 2 / 3, -2 / 3, 3 / 2, -3 / 2)                      # and infinity
OUT, IN = 4, 6                                                  # sides of a tile: of outputs, of the inputs they need
TILES = 128                                                     # at once and per thread: about what a core's cache holds
KEPT = 2**24                                                    # the most numbers whose memory is kept between calls
_kept = threading.local()


def convolve(x, weight, bias):
    """F.conv2d with padding 1: x (B, C, H, W), weight (O, C, 3, 3), bias (O,) or None -> (B, O, H, W), channels-last."""
    return _by_tiles(x, _at_points(weight, _KERNEL).transpose(1, 2), bias)


def gradient(y_gradient, weight):
    """The gradient at x of `convolve`: a convolution with the weights turned by 180 degrees, input and output exchanged."""
    return _by_tiles(y_gradient, _at_points(weight, _KERNEL.flip(1)), None)


def _at_points(weight, kernel):
    """The transformed weights, (O, C, 3, 3) -> (36, O, C). The next call on this thread overwrites them."""
    weights = weight.permute(2, 3, 0, 1).reshape(9, -1)
    transformed = _room(IN * IN * weights.shape[1]).view(IN * IN, -1)
    return torch.mm(kernel, weights, out=transformed).view(IN * IN, *weight.shape[:2])


def _room(count):
    """Memory for `count` numbers, kept from call to call: the system takes longer to provide new memory than we to fill it."""
    if count > KEPT:
        return torch.empty(count)
    if len(getattr(_kept, "room", ())) < count:
        with torch.inference_mode(False):                       # else no other mode could write to it
            _kept.room = torch.empty(count)
    return _kept.room[:count]


def _by_tiles(x, weights, bias):
    """x (B, C, H, W), weights (36, C, O) -> (B, O, H, W), a few rows of tiles at a time."""
    x = x.permute(0, 2, 3, 1)
    (count, height, width, channels), outs = x.shape, weights.shape[2]
    down, across = -(-height // OUT), -(-width // OUT)
    rows = min(down, max(1, TILES * torch.get_num_threads() // across))
    y = x.new_empty(count, OUT * down, OUT * across, outs)
    seen = x.new_zeros(OUT * rows + 2, OUT * across + 2, channels)              # with a margin, zero around the picture
    windows = seen.unfold(0, IN, OUT).unfold(1, IN, OUT).permute(3, 4, 0, 1, 2)  # (6, 6, rows, across, C)
    tiles, values = x.new_empty(2, *windows.shape)
    products, results = x.new_empty(IN * IN, rows * across, outs), x.new_empty(OUT, OUT, rows, across, outs)
    for picture, made in zip(x, y, strict=True):
        for start in range(0, down, rows):
            start = OUT * min(start, down - rows)               # the last group is whole too, and recomputes some rows
            first, end = max(start - 1, 0), min(start - 1 + len(seen), height)
            seen[:first - start + 1].zero_()
            seen[end - start + 1:].zero_()
            seen[first - start + 1:end - start + 1, 1:width + 1] = picture[first:end]
            tiles.copy_(windows)
            torch.mm(_TILE, tiles.view(IN * IN, -1), out=values.view(IN * IN, -1))
            torch.bmm(values.view(IN * IN, -1, channels), weights, out=products)
            torch.mm(_BACK, products.view(IN * IN, -1), out=results.view(OUT * OUT, -1))
            place = made[start:start + OUT * rows].view(rows, OUT, across, OUT, outs)
            torch.add(results.permute(2, 0, 3, 1, 4), 0 if bias is None else bias, out=place)
    return y[:, :height, :width].contiguous().permute(0, 3, 1, 2)


def _matrices():
    """The Winograd transforms: input tile (36, 36), kernel (36, 9), and products to outputs (16, 36)."""
    def coefficients(roots):                                    # of the monic polynomial with these roots, constant first
        result = [1.0]
        for root in roots:
            result = [before - root * here for before, here in zip([0.0, *result], [*result, 0.0], strict=True)]
        return result

    others = [[other for other in POINTS if other != point] for point in POINTS]
    tile = [*([*coefficients(rest), 0.0] for rest in others), coefficients(POINTS)]
    kernel = [[point**k / math.prod(point - other for other in rest) for k in range(3)]
              for point, rest in zip(POINTS, others, strict=True)]
    back = [[point**k for point in POINTS] + [float(k == OUT - 1)] for k in range(OUT)]
    rows = (torch.tensor(matrix, dtype=torch.float64) for matrix in (tile, [*kernel, [0.0, 0.0, 1.0]], back))
    return [torch.kron(matrix, matrix).float() for matrix in rows]              # both directions in one matrix


_TILE, _KERNEL, _BACK = _matrices()
