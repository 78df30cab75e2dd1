"""Checks of a metric's inputs, and the small filters that several metrics share."""

import math

import torch

ROUNDING = 1e-3                                              # values this far outside [0,1] are clipped, not refused
YIQ = ((0.299, 0.587, 0.114), (0.596, -0.274, -0.322), (0.211, -0.523, 0.312))


def checked(dist, ref, smallest=1):
    """Return both batches in float32 or better, clipped to [0,1]; raise ValueError for anything but two batches of pictures."""
    rounded = False
    for name, pixels in (("dist", dist), ("ref", ref)):
        if not torch.is_tensor(pixels) or not pixels.is_floating_point():
            kind = getattr(pixels, "dtype", type(pixels).__name__)
            raise ValueError(f"{name}: expected a floating-point tensor in [0,1], got {kind}")
        if pixels.ndim != 4 or pixels.shape[1] not in (1, 3) or not pixels.numel():
            raise ValueError(f"{name}: expected pictures (B,3,H,W), or grey ones (B,1,H,W), got {tuple(pixels.shape)}")
        low, high = pixels.detach().aminmax()
        if not (low >= -ROUNDING and high <= 1 + ROUNDING):  # in this form NaN fails too
            raise ValueError(f"{name}: expected values in [0,1], got {low.item():.4g} to {high.item():.4g}")
        rounded = rounded or bool(low < 0) or bool(high > 1)
    if dist.shape != ref.shape:
        raise ValueError(f"the pictures differ in shape: dist {tuple(dist.shape)}, ref {tuple(ref.shape)}")
    if min(dist.shape[2:]) < smallest:
        raise ValueError(f"this metric needs at least {smallest} pixels a side, got {dist.shape[3]}x{dist.shape[2]}")
    dtype = torch.promote_types(torch.promote_types(dist.dtype, ref.dtype), torch.float32)
    dist, ref = dist.to(dtype), ref.to(dtype)
    return (dist.clamp(0, 1), ref.clamp(0, 1)) if rounded else (dist, ref)


def luma(pixels):
    """BT.601 luma, not rounded: (B,3,H,W), or (B,1,H,W) as it is -> (B,H,W)."""
    return mix(pixels, YIQ[0]) if pixels.shape[1] == 3 else pixels[:, 0]


def mix(pixels, weights):
    """The weighted sum of the three channels, (B,3,H,W) -> (B,H,W)."""
    red, green, blue = (weight * channel for weight, channel in zip(weights, pixels.unbind(1), strict=True))
    return red + green + blue


def each_picture(metric, dist, ref):
    """Compute metric(dist, ref) -> (B,). A CPU takes one picture at a time: planes that fit its caches take half the time."""
    if dist.device.type != "cpu" or len(dist) == 1:
        return metric(dist, ref)
    return torch.cat([metric(*pair) for pair in zip(dist.split(1), ref.split(1), strict=True)])


def reduced(pixels, factor):
    """The means of blocks of factor x factor pixels; an incomplete block at the right or the bottom is dropped."""
    height, width = (side // factor * factor for side in pixels.shape[2:])
    # Sums of strided slices: on a CPU some 20 times faster than avg_pool2d.
    rows = sum(pixels[:, :, i:height:factor, :width] for i in range(factor))
    return sum(rows[:, :, :, i::factor] for i in range(factor)) / factor**2


def centred(pixels):
    """Pixels minus the middle of each channel's range: a flat picture becomes exactly 0."""
    low, high = pixels.detach().amin((2, 3), keepdim=True), pixels.detach().amax((2, 3), keepdim=True)
    return pixels - (low + high) / 2


def gaussian(size, sigma):
    """The weights of a Gaussian window; their sum is 1."""
    weights = [math.exp(-((i - size // 2) ** 2) / (2 * sigma**2)) for i in range(size)]
    return [weight / sum(weights) for weight in weights]


def window_mean(plane, window):
    """The weighted mean of every whole window of planes (B,H,W), rows then columns; the window is symmetric.

    Written as sums of shifted planes: a convolution would run in TF32 on a GPU, with three digits.
    """
    half = len(window) // 2
    for dim in (1, 2):
        size = plane.shape[dim] - 2 * half
        blurred = plane.narrow(dim, half, size) * window[half]
        for i in (*range(half), *range(half + 1, len(window))):
            blurred.add_(plane.narrow(dim, i, size), alpha=window[i])        # in place: new memory costs more than the sum
        plane = blurred
    return plane


def root(x):
    """The square root, with a gradient of 0 at 0 instead of nan."""
    return x.clamp(min=tiny(x)).sqrt()


def tiny(x):
    """The smallest positive normal number of the dtype."""
    return torch.finfo(x.dtype).tiny


def quotient(part, whole, dist, ref):
    """part / whole of each picture: exactly 1 for equal pictures, else nan where `whole` is 0."""
    equal = (dist == ref).flatten(1).all(1)
    ratio = part / torch.where(whole > 0, whole, 1)
    return torch.where(equal, 1 + (ratio - ratio.detach()), torch.where(whole > 0, ratio, math.nan))
