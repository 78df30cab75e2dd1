"""Layers that the diffusion transformers of SD3 and FLUX share: waves of a timestep, and adaLN modulation.

Peebles and Xie 2023 (arXiv 2212.09748), section 3.2, for adaLN-zero. Parameters carry the names of the published files.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

NORM_EPS = 1e-6                                     # of every norm


def waves(values: torch.Tensor, count: int) -> torch.Tensor:
    """Cosines and then sines (T, count), float32, of values (T,), at frequencies from 1 down to 1/10000.

    In float32 whatever the weights' dtype, in the published code's order of operations, which decides the last digits.
    """
    steps = torch.arange(count // 2, dtype=torch.float32, device=values.device)
    angle = values.reshape(-1, 1).float() * torch.exp(-math.log(10000) * steps / (count // 2))
    return torch.cat([angle.cos(), angle.sin()], dim=1)


class TwoLayers(nn.Module):
    """A linear layer, SiLU, a linear layer."""

    def __init__(self, ins: int, width: int, *, bias: bool = True):
        super().__init__()
        self.linear_1 = nn.Linear(ins, width, bias=bias)
        self.linear_2 = nn.Linear(width, width, bias=bias)

    def forward(self, x):
        return self.linear_2(F.silu(self.linear_1(x)))


class Modulation(nn.Module):
    """adaLN: `count` vectors, computed from the vector of time and text, that shift, scale and gate one stream's tokens."""

    def __init__(self, width: int, count: int, *, bias: bool = True):
        super().__init__()
        self.count = count
        self.linear = nn.Linear(width, count * width, bias=bias)

    def prepare(self, temb):
        """The vectors, for a `Prepared` of modulation that many blocks share."""
        return self(temb)

    def forward(self, temb):                                                # (B, C) -> count times (B, 1, C)
        return self.linear(F.silu(temb)).unsqueeze(1).chunk(self.count, dim=-1)


def normed(x, shift, scale):
    """Normalise each token of x (B, L, C) to zero mean and unit variance, then scale and shift it by (B, 1, C)."""
    return F.layer_norm(x, x.shape[-1:], eps=NORM_EPS) * (1 + scale) + shift


class FeedForward(nn.Module):
    """Two layers, to four times the width and back. The identity replaces the dropout of the published layout."""

    def __init__(self, width: int):
        super().__init__()
        first = nn.Module()
        first.proj = nn.Linear(width, 4 * width)                            # the files say net.0.proj
        self.net = nn.ModuleList([first, nn.Identity(), nn.Linear(4 * width, width)])

    def forward(self, x):
        return self.net[2](F.gelu(self.net[0].proj(x), approximate="tanh"))
