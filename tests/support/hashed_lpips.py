"""Weights for LPIPS without a download: every bit follows from the name of the network."""

import math
from functools import lru_cache

import numpy as np
import torch

from sifm_min import metrics
from sifm_min.metrics import backbones


@lru_cache
def hashed(network):
    """A backbone of portable integer arithmetic, and the real linear layers: as in the stored values of the lpips package."""
    def uniform(stream, count):
        with np.errstate(over="ignore"):
            z = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
            z += np.uint64(stream * 0x632BE59BD9B4E019 % 2**64)
            z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return ((z ^ (z >> np.uint64(31))) >> np.uint64(11)).astype(np.float64) / 2**53

    tensors = {}
    for i, (name, shape) in enumerate(backbones.NETWORKS[network].shapes.items()):      # weight, bias, weight, ...
        bound = math.sqrt(6 / math.prod(shape[1:])) if len(shape) > 1 else 0.05
        values = (2 * uniform(i + 1, math.prod(shape)) - 1) * bound
        tensors[name] = torch.from_numpy(values.astype(np.float32)).reshape(shape)
    return metrics.LPIPSWeights(network, tensors | metrics.linear_layers(network), "", False, None)
