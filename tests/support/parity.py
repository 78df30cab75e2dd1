"""Comparisons of our networks with the oracle's, on random weights: activations and gradients."""

import torch

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}      # of the largest value; double precision sees details


@torch.no_grad()
def varied(network, sharpened=("to_q", "to_k")):
    """The network in eval mode with no scale of one and no bias of zero, and three times the weights of the `sharpened` parts.

    Random attention is nearly uniform otherwise, and would agree with any other.
    """
    for name, parameter in network.named_parameters():
        if parameter.ndim == 1:
            parameter.add_(0.1 * torch.randn_like(parameter))
        elif any(part in name for part in sharpened):
            parameter.mul_(3)
    return network.eval()


def assert_close(ours, theirs, tolerance=TOLERANCE):
    """Of the same shape and dtype, and within the tolerance of the largest value."""
    assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
    assert (ours - theirs).abs().max().item() <= tolerance[ours.dtype] * theirs.abs().max().item()


def gradients(y, leaves):
    """The gradients of a random projection of y, one for each leaf; None where y does not depend on it."""
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=y.dtype)
    return torch.autograd.grad((y * weight).sum(), leaves, retain_graph=True, allow_unused=True)


def assert_gradients_close(ours, theirs, leaves, tolerance=TOLERANCE):
    """The gradients of both at the same leaves agree, and none is zero."""
    for mine, other in zip(gradients(ours, leaves), gradients(theirs, leaves), strict=True):
        assert (mine is None) == (other is None)
        if other is not None:
            assert other.abs().max() > 0
            assert_close(mine, other, tolerance)
