"""LPIPS: the distance of a classifier's features, weighted by layers that were fitted to human judgements."""

import torch
from torch.nn import functional as F

from ..models.precision import full_float32
from . import backbones
from .convolutions import LPIPSWeights, lpips_weights, placed
from .pixels import checked, root

SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)       # of the backbones' inputs, for pixels in [-1,1]


def lpips(dist, ref, *, network="alex", weights=None):
    """Learned perceptual distance, (B,), 0 for equal pictures: version 0.1 of the `lpips` package, its default network.

    Zhang et al. 2018 (arXiv 1801.03924): features of a backbone trained on ImageNet, normalised over channels, their
    squared differences weighted by the linear layers that ship here, averaged over the picture and summed over layers.
    Equals `lpips.LPIPS(net=...)` on the pictures in [-1,1]. network: "alex", "vgg" (which piq has) or "squeeze".
    The value depends on the size of the pictures, which are not resized. Grey is repeated to RGB.

    weights: a `LPIPSWeights`, or a file that `lpips_weights` takes; by default the files that `weights download lpips`
    fetched. Without them it raises `Unavailable`; there is no replacement. Pictures below
    31 pixels a side (vgg: 16, squeeze: 17) are refused.
    """
    if network not in backbones.NETWORKS:
        raise ValueError(f"network {network!r}: choose one of {', '.join(backbones.NETWORKS)}")
    dist, ref = checked(dist, ref, smallest=backbones.NETWORKS[network].smallest)
    if not isinstance(weights, LPIPSWeights):
        weights = lpips_weights(network, weights)
    return sum(lpips_layers(dist, ref, weights))


def lpips_layers(dist, ref, weights):
    """The summands of `lpips`, one (B,) per tapped layer; weights: a `LPIPSWeights`."""
    tensors = placed(weights, dist.dtype, dist.device)
    shift, scale = (torch.tensor(v, dtype=dist.dtype, device=dist.device)[:, None, None] for v in (SHIFT, SCALE))
    layers = []
    # With autocast or TF32 only three digits would be right.
    with torch.autocast(dist.device.type, enabled=False), full_float32():
        taps = [FEATURES[weights.network](tensors, (2 * pixels - 1 - shift) / scale) for pixels in (dist, ref)]
        for i, (x, y) in enumerate(zip(*taps, strict=True)):
            difference = (_normalised(x) - _normalised(y)).square()
            layers.append((difference * tensors[f"lin{i}"][:, None, None]).sum(1).mean((1, 2)))
    return layers


def _normalised(features):
    """The feature vectors of each position, scaled to length 1 over the channels."""
    length = root(features.square().sum(1, keepdim=True))
    return features / (length + 1e-10)


def _convolve(tensors, name, x, **how):
    return F.relu(F.conv2d(x, tensors[f"features.{name}.weight"], tensors[f"features.{name}.bias"], **how))


# Each yields the tapped activations. The numbers are indices into torchvision's `features`; the classifiers never run.

def _alexnet(w, x):
    yield (x := _convolve(w, 0, x, stride=4, padding=2))
    yield (x := _convolve(w, 3, F.max_pool2d(x, 3, 2), padding=2))
    yield (x := _convolve(w, 6, F.max_pool2d(x, 3, 2), padding=1))
    yield (x := _convolve(w, 8, x, padding=1))
    yield _convolve(w, 10, x, padding=1)


def _vgg16(w, x):
    for block in ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28)):
        x = F.max_pool2d(x, 2) if block[0] else x
        for place in block:
            x = _convolve(w, place, x, padding=1)
        yield x


def _squeezenet(w, x):
    def fire(place, x):
        x = _convolve(w, f"{place}.squeeze", x)
        return torch.cat([_convolve(w, f"{place}.expand1x1", x), _convolve(w, f"{place}.expand3x3", x, padding=1)], 1)

    def pool(x):
        return F.max_pool2d(x, 3, 2, ceil_mode=True)

    yield (x := _convolve(w, 0, x, stride=2))
    yield (x := fire(4, fire(3, pool(x))))
    yield (x := fire(7, fire(6, pool(x))))
    yield (x := fire(9, pool(x)))
    yield (x := fire(10, x))
    yield (x := fire(11, x))
    yield fire(12, x)


FEATURES = {"alex": _alexnet, "vgg": _vgg16, "squeeze": _squeezenet}
