"""JPEG with a gradient: the arithmetic of libjpeg from pixels to coefficients and back, without the file.

    Y  =  0.299 R + 0.587 G + 0.114 B,   Cb = (B - Y) / 1.772,   Cr = (R - Y) / 1.402                   JFIF
    c  =  D (block - 128) D^T                   the DCT of each 8x8 block of Y, and of Cb and Cr at their own size
    c' =  q round(c / q)                        q: the table of ITU-T T.81, annex K, scaled by the quality
    block'  =  D^T c' D + 128

With 4:2:0, Cb and Cr are means of 2x2 pixels, and come back by libjpeg's triangle filter, which is bilinear. Values are 0 to
255, and are rounded and clipped to 8 bits where libjpeg does so. Rounding has no useful gradient. It is passed straight
through: the gradient is that of the same arithmetic without rounding and clipping, and so the same for every quality.
"""

import math
from functools import lru_cache

import torch
import torch.nn.functional as F

SUBSAMPLINGS = {"4:4:4": 1, "4:2:0": 2}                      # pixels along a side for each value of Cb and Cr
LUMA = (16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55, 14, 13, 16, 24, 40, 57, 69, 56, 14, 17, 22, 29, 51, 87,
        80, 62, 18, 22, 37, 56, 68, 109, 103, 77, 24, 35, 55, 64, 81, 104, 113, 92, 49, 64, 78, 87, 103, 121, 120, 101, 72, 92,
        95, 98, 112, 100, 103, 99)                           # table K.1, by rows: for Y at quality 50
CHROMA = (17, 18, 24, 47, 18, 21, 26, 66, 24, 26, 56, 99, 47, 66, 99, 99)         # K.2, its upper left quarter; the rest is 99

TIE = 1e-4                                                   # far above the rounding of a DCT in float32, far below a step


def jpeg(pixels, quality, subsampling="4:2:0"):
    """Pixels (B,3,H,W) in [0,1] as they come back from a JPEG of this quality, 1 to 100: the same shape, multiples of 1/255.

    subsampling: "4:2:0", as platforms store it, or "4:4:4". Raises ValueError for others. Edges are repeated up to whole
    blocks, as libjpeg does.
    """
    if subsampling not in SUBSAMPLINGS or not 1 <= quality <= 100:
        raise ValueError(f"JPEG of quality {quality} with subsampling {subsampling}: the quality is 1 to 100, the subsampling "
                         f"one of {', '.join(SUBSAMPLINGS)}")
    height, width = pixels.shape[2:]
    side = SUBSAMPLINGS[subsampling]
    transform, luma, chroma = _constants(quality, pixels.dtype, pixels.device)
    # The columns are padded before Cb and Cr are halved, the rows afterwards; they differ in pictures of an even height.
    red, green, blue = F.pad(255 * pixels, (0, -width % (8 * side), 0, -height % side), mode="replicate").unbind(1)
    y = 0.299 * red + 0.587 * green + 0.114 * blue
    colour = _rounded(torch.stack([(blue - y) / 1.772, (red - y) / 1.402], 1) + 128)
    if side == 2:
        colour = _rounded(F.avg_pool2d(colour, 2), 0.25, 0.5)
    y = _blocks(_rounded(y)[:, None], transform, luma)
    colour = _blocks(colour, transform, chroma)
    if side == 2:
        colour = _doubled(colour[:, :, :-(-height // 2), :-(-width // 2)])
    y, (blue, red) = y[:, 0, :height, :width], (colour[:, :, :height, :width] - 128).unbind(1)
    green = -(0.114 * 1.772 * blue + 0.299 * 1.402 * red) / 0.587
    return _eight_bits(torch.stack([y + 1.402 * red, y + green, y + 1.772 * blue], 1)) / 255


def _blocks(values, transform, table):
    """Values (B,C,h,w), w a multiple of 8, through the coefficients of a table (8,8)."""
    rows = values.shape[2]
    values = F.pad(values, (0, 0, 0, -rows % 8), mode="replicate")
    blocks = values.unflatten(3, (-1, 8)).unflatten(2, (-1, 8)).transpose(3, 4) - 128                  # (B,C,rows,columns,8,8)
    coefficients = transform @ blocks @ transform.T
    exact = coefficients.detach()
    steps = (exact.abs() / table + 0.5 + TIE).floor().copysign(exact)        # libjpeg breaks ties away from 0
    coefficients = _straight(table * steps, coefficients)
    blocks = transform.T @ coefficients @ transform + 128
    return _eight_bits(blocks.transpose(3, 4).flatten(4, 5).flatten(2, 3)[:, :, :rows])


def _doubled(colour):
    """Cb and Cr (B,2,h,w) at twice the size. libjpeg repeats values where a row has two at most."""
    if colour.shape[3] <= 2:
        return F.interpolate(colour, scale_factor=2, mode="nearest")
    return _rounded(F.interpolate(colour, scale_factor=2, mode="bilinear", align_corners=False), 0.5, 7 / 16)


def _rounded(values, *bias):
    """Values rounded; with a bias for even and one for odd columns, floor(value + bias), as libjpeg breaks ties."""
    if not bias:
        return _straight(values.detach().round(), values)
    bias = torch.tensor(bias, dtype=values.dtype, device=values.device).repeat(-(-values.shape[3] // 2))[:values.shape[3]]
    return _straight((values.detach() + bias).floor(), values)


def _eight_bits(values):
    return _straight(values.detach().clamp(0, 255).round(), values)


def _straight(forward, values):
    """The first tensor with the gradient of the second; the first has none of its own."""
    return forward + (values - values.detach())


@lru_cache(maxsize=64)
def _constants(quality, dtype, device):
    """The DCT (frequency, place) and the tables for Y and for Cb and Cr, each (8,8)."""
    scale = 5000 // quality if quality < 50 else 200 - 2 * quality
    chroma = torch.full((8, 8), 99)
    chroma[:4, :4] = torch.tensor(CHROMA).view(4, 4)
    tables = [((table * scale + 50) // 100).clamp(1, 255) for table in (torch.tensor(LUMA).view(8, 8), chroma)]
    place = torch.arange(8, dtype=torch.float64)
    transform = torch.cos((2 * place + 1) * place[:, None] * math.pi / 16) / 2
    transform[0] /= math.sqrt(2)
    with torch.inference_mode(False):                        # else no gradient could pass later
        return tuple(matrix.to(device, dtype) for matrix in (transform, *tables))
