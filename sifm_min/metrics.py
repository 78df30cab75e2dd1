"""How far apart two pictures are: PSNR and SSIM.

Every metric takes (distorted, reference), each (B,3,H,W), floating point in [0,1], and returns one value per picture,
(B,), differentiable in both. They compute in float32 or better, at the pictures' own size and in RGB, and raise
ValueError for what is not two batches of pictures of one shape. Beside every published value belongs how it was
measured; the first lines of each docstring say it.
"""

import math

import torch

ROUNDING = 1e-3                                              # values this far outside [0,1] are clipped, not refused


# ----------------------------------------------------------------------------------------------------------------- PSNR

def psnr(dist, ref):
    """Peak signal-to-noise ratio in dB, (B,): 10 log10(1 / MSE), the MSE over all pixels and channels of a picture.

    Exact, without the epsilon that makes other implementations stop at 80 or 100 dB: equal pictures give inf, with a
    gradient of zero.
    """
    dist, ref = _checked(dist, ref)
    mse = (dist - ref).square().mean((1, 2, 3))
    different = mse > 0
    return torch.where(different, -10 * torch.log10(torch.where(different, mse, 1.0)), math.inf)


# ----------------------------------------------------------------------------------------------------------------- SSIM

WINDOW, SIGMA, K1, K2 = 11, 1.5, 0.01, 0.03


def ssim(dist, ref):
    """Structural similarity, (B,), 1 for equal pictures: the mean over the map of each RGB channel, then over channels.

    As Wang et al. 2004 (doi:10.1109/TIP.2003.819861) define it: Gaussian window 11x11 of sigma 1.5, population
    (co)variances, K1 0.01, K2 0.03, only windows wholly inside the picture, and no downsampling first (piq and `ssim.m`
    downsample by default, which moves the value by up to 0.18). Pictures below 11 pixels a side are refused.
    """
    dist, ref = _checked(dist, ref, smallest=WINDOW)
    channels = [_ssim_map(x, y).mean((1, 2)) for x, y in zip(dist.unbind(1), ref.unbind(1), strict=True)]
    return torch.stack(channels).mean(0)


def _ssim_map(x, y):
    """The SSIM of every window of two planes (B,H,W) -> (B,H-10,W-10)."""
    # Moments are taken about each plane's mean: E[x^2] - E[x]^2 of the raw values loses digits on flat areas.
    mean_x, mean_y = (plane.detach().mean((1, 2), keepdim=True) for plane in (x, y))
    x, y = x - mean_x, y - mean_y
    mu_x, mu_y = _blur(x), _blur(y)
    sigma_xx = _blur(x * x) - mu_x * mu_x
    sigma_yy = _blur(y * y) - mu_y * mu_y
    sigma_xy = _blur(x * y) - mu_x * mu_y
    mu_x, mu_y = mu_x + mean_x, mu_y + mean_y
    luminance = (2 * mu_x * mu_y + K1**2) / (mu_x * mu_x + mu_y * mu_y + K1**2)
    return luminance * (2 * sigma_xy + K2**2) / (sigma_xx + sigma_yy + K2**2)


def _blur(plane):
    """The Gaussian mean of every whole window of planes (B,H,W) -> (B,H-10,W-10), rows then columns.

    Written as sums of shifted planes: a convolution would run in TF32 on a GPU, with three digits.
    """
    half = WINDOW // 2
    weights = [math.exp(-((i - half) ** 2) / (2 * SIGMA**2)) for i in range(WINDOW)]
    total = sum(weights)
    for dim in (1, 2):
        size = plane.shape[dim] - 2 * half
        blurred = plane.narrow(dim, half, size) * (weights[half] / total)
        for i in range(half):                                # the window is symmetric: two shifts share a weight
            pair = plane.narrow(dim, i, size) + plane.narrow(dim, WINDOW - 1 - i, size)
            blurred = torch.add(blurred, pair, alpha=weights[i] / total)
        plane = blurred
    return plane


# --------------------------------------------------------------------------------------------------------------- inputs

def _checked(dist, ref, smallest=1):
    """Both batches in float32 or better, clipped to [0,1]; ValueError for what is not two batches of RGB pictures."""
    for name, pixels in (("dist", dist), ("ref", ref)):
        if not torch.is_tensor(pixels) or not pixels.is_floating_point():
            kind = getattr(pixels, "dtype", type(pixels).__name__)
            raise ValueError(f"{name}: expected a floating-point tensor in [0,1], got {kind}")
        if pixels.ndim != 4 or pixels.shape[1] != 3 or not pixels.numel():
            raise ValueError(f"{name}: expected RGB pictures (B,3,H,W), got {tuple(pixels.shape)}")
        low, high = pixels.detach().aminmax()
        if not (low >= -ROUNDING and high <= 1 + ROUNDING):  # written so that NaN fails too
            raise ValueError(f"{name}: expected values in [0,1], got {low.item():.4g} to {high.item():.4g}")
    if dist.shape != ref.shape:
        raise ValueError(f"the pictures differ in shape: dist {tuple(dist.shape)}, ref {tuple(ref.shape)}")
    if min(dist.shape[2:]) < smallest:
        raise ValueError(f"this metric needs at least {smallest} pixels a side, got {dist.shape[3]}x{dist.shape[2]}")
    dtype = torch.promote_types(torch.promote_types(dist.dtype, ref.dtype), torch.float32)
    return dist.to(dtype).clamp(0, 1), ref.to(dtype).clamp(0, 1)
