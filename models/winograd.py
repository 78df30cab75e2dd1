"""3x3 convolutions in float32 with a quarter of the multiplications, for CPUs, where torch has none such.

Winograd's way (Lavin and Gray 2015, arXiv 1509.09308): a row of 4 outputs is 6 inputs times a polynomial of 3 weights, and a
product of polynomials is known by its values at enough points: 6 multiplications for 12, in both directions 36 for 144. What
goes to the points and back is additions; of many channels they cost little beside the matrix products at the points.

Points of small numerators and denominators, each with its reciprocal, keep the error low (Barabasz et al. 2018, arXiv
1803.10986): about 1.4e-6 of the values' root mean square, six times a plain convolution's; by 0, 1 and 2 it is 3.3e-6.
"""

import math
import threading

import torch

POINTS = (0, 2 / 3, -2 / 3, 3 / 2, -3 / 2)                      # and infinity
OUT, IN = 4, 6                                                  # the sides of a tile: of outputs, of the inputs they see
TILES = 128                                                     # at once, by each thread: about what its cache holds
MANY_CHANNELS, MANY_POSITIONS = 128, 512                        # fewer do not pay for the way to the points
KEPT = 2**24                                                    # numbers for which memory is kept from call to call
_kept = threading.local()


def suits(x, weight, stride, padding):
    """True where `convolve` equals the convolution and is faster: float32 on a CPU, and not for torch.compile."""
    positions, channels = x.shape[2] * x.shape[3], weight.shape[:2]
    return (weight.shape[2:] == (3, 3) and stride == (1, 1) and padding == (1, 1) and x.device.type == "cpu"
            and x.dtype == weight.dtype == torch.float32 and min(channels) >= MANY_CHANNELS and positions >= MANY_POSITIONS
            and len(x) * positions >= max(channels)             # weights go to the points once for all positions
            and weight.is_contiguous(memory_format=torch.channels_last) and not torch.compiler.is_compiling())


def convolve(x, weight, bias):
    """conv2d with padding 1: x (B, C, H, W), weight (O, C, 3, 3), bias (O,) or None -> (B, O, H, W), channels-last."""
    return _by_tiles(x, _at_points(weight, _KERNEL).transpose(1, 2), bias)


def gradient(y_gradient, weight):
    """Of `convolve` at x: the convolution with the weights turned around."""
    return _by_tiles(y_gradient, _at_points(weight, _KERNEL.flip(1)), None)


def _at_points(weight, kernel):
    """(O, C, 3, 3) -> (36, O, C), which holds until the next call."""
    weights = weight.permute(2, 3, 0, 1).reshape(9, -1)
    found = _room(IN * IN * weights.shape[1]).view(IN * IN, -1)
    return torch.mm(kernel, weights, out=found).view(IN * IN, *weight.shape[:2])


def _room(count):
    """Memory for so many numbers. New memory would take longer to get than to fill."""
    if count > KEPT:
        return torch.empty(count)
    if len(getattr(_kept, "room", ())) < count:
        with torch.inference_mode(False):                       # else it would be of no use outside
            _kept.room = torch.empty(count)
    return _kept.room[:count]


def _by_tiles(x, weights, bias):
    """x (B, C, H, W), weights (36, C, O) -> (B, O, H, W), some rows of tiles after the other."""
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
            start = OUT * min(start, down - rows)               # the last rows are whole: some are made again
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
    """The Winograd transforms of a tile (36, 36), of a kernel (36, 9), and of their products to the outputs (16, 36)."""
    def coefficients(roots):                                    # of the polynomial that has them, the constant one first
        found = [1.0]
        for root in roots:
            found = [before - root * here for before, here in zip([0.0, *found], [*found, 0.0], strict=True)]
        return found

    others = [[other for other in POINTS if other != point] for point in POINTS]
    tile = [*([*coefficients(rest), 0.0] for rest in others), coefficients(POINTS)]
    kernel = [[point**k / math.prod(point - other for other in rest) for k in range(3)]
              for point, rest in zip(POINTS, others, strict=True)]
    back = [[point**k for point in POINTS] + [float(k == OUT - 1)] for k in range(OUT)]
    rows = (torch.tensor(matrix, dtype=torch.float64) for matrix in (tile, [*kernel, [0.0, 0.0, 1.0]], back))
    return [torch.kron(matrix, matrix).float() for matrix in rows]              # rows and columns in one


_TILE, _KERNEL, _BACK = _matrices()
