"""PSNR, SSIM and VIFp: distances of the pixels themselves and of their local means and variances."""

import math

import torch

from .pixels import centred, checked, each_picture, gaussian, luma, quotient, reduced, window_mean

# ----------------------------------------------------------------------------------------------------------------- PSNR

def psnr(dist, ref):
    """Peak signal-to-noise ratio in dB, (B,): 10 log10(1 / MSE), the MSE over all pixels and channels of a picture.

    No epsilon is added, so the value does not stop at 80 or 100 dB as in other implementations: equal pictures give inf,
    with a gradient of zero. Equals scikit-image's, and torchmetrics' of one picture.
    """
    dist, ref = checked(dist, ref)
    mse = (dist - ref).square().mean((1, 2, 3))
    different = mse > 0
    return torch.where(different, -10 * torch.log10(torch.where(different, mse, 1.0)), math.inf)


# ----------------------------------------------------------------------------------------------------------------- SSIM

WINDOW, SIGMA, K1, K2 = 11, 1.5, 0.01, 0.03


def ssim(dist, ref, *, downsample=False):
    """Structural similarity, (B,), 1 for equal pictures: the mean over the map of each RGB channel, then over channels.

    As Wang et al. 2004 (doi:10.1109/TIP.2003.819861) define it: Gaussian window 11x11 of sigma 1.5, population
    (co)variances, K1 0.01, K2 0.03, only windows wholly inside the picture, and no downsampling first. Equals the
    authors' `ssim_index.m`, scikit-image's with Gaussian weights, and piq's `downsample=False`. With `downsample` the
    picture is first reduced as piq does by default, to about 256 pixels; that moves the value by up to 0.18. Pictures
    below 11 pixels a side are refused.
    """
    dist, ref = checked(dist, ref, smallest=WINDOW)
    if downsample and (factor := round(min(dist.shape[2:]) / 256)) > 1:
        dist, ref = reduced(dist, factor), reduced(ref, factor)
    return each_picture(_ssim, dist, ref)


def _ssim(dist, ref):
    channels = [_ssim_map(x, y).mean((1, 2)) for x, y in zip(dist.unbind(1), ref.unbind(1), strict=True)]
    return torch.stack(channels).mean(0)


def _ssim_map(x, y):
    """The SSIM of every window of two planes (B,H,W) -> (B,H-10,W-10)."""
    # Moments are taken about each plane's mean: E[x^2] - E[x]^2 of the raw values loses digits on flat areas.
    mean_x, mean_y = (plane.detach().mean((1, 2), keepdim=True) for plane in (x, y))
    x, y = x - mean_x, y - mean_y
    window = gaussian(WINDOW, SIGMA)
    mu_x, mu_y = window_mean(x, window), window_mean(y, window)
    sigma_xx = window_mean(x * x, window) - mu_x * mu_x
    sigma_yy = window_mean(y * y, window) - mu_y * mu_y
    sigma_xy = window_mean(x * y, window) - mu_x * mu_y
    mu_x, mu_y = mu_x + mean_x, mu_y + mean_y
    luminance = (2 * mu_x * mu_y + K1**2) / (mu_x * mu_x + mu_y * mu_y + K1**2)
    return luminance * (2 * sigma_xy + K2**2) / (sigma_xx + sigma_yy + K2**2)


# ----------------------------------------------------------------------------------------------------------------- VIFp

SIGMA_NN, VARIANCE_FLOOR = 2.0, 1e-10            # for values in 0..255: variance of the eye's noise; below this, flat


def vifp(dist, ref):
    """Visual information fidelity in the pixel domain, (B,), of the luma: 1 for equal pictures, 0 for nothing kept.

    **Not symmetric**: the share of the information in `ref` (the edit of the original) that is still in `dist`. Values
    above 1 are correct where contrast was raised. As in `vifp_mscale.m`, the authors' release (the paper, Sheikh and
    Bovik 2006, doi:10.1109/TIP.2005.859378, defines VIF on wavelets): four scales, noise variance 2 on 0..255, whole windows;
    the luma is BT.601's, not rounded. Equals piq's `vif_p` and torchmetrics' on that luma; torchmetrics and sewar
    average RGB channels instead; `vifp` of each channel as a (B,1,H,W) gives their value. A flat `ref` holds no
    information: nan, unless `dist` equals it. Pictures below 41 pixels a side are refused.
    """
    return each_picture(_vifp, *checked(dist, ref, smallest=41))


def _vifp(dist, ref):
    # Only variances and covariances enter, so each picture may be centred, which keeps the digits of float32.
    x, y = 255 * luma(centred(ref)), 255 * luma(centred(dist))
    kept = total = 0
    for size in (17, 9, 5, 3):
        window = gaussian(size, size / 5)
        if size < 17:
            x, y = window_mean(x, window)[:, ::2, ::2], window_mean(y, window)[:, ::2, ::2]
        mu_x, mu_y = window_mean(x, window), window_mean(y, window)
        sigma_xx = (window_mean(x * x, window) - mu_x * mu_x).clamp(min=0)
        sigma_yy = (window_mean(y * y, window) - mu_y * mu_y).clamp(min=0)
        sigma_xy = window_mean(x * y, window) - mu_x * mu_y
        # dist = gain * ref + noise of variance sigma_vv. The gain is 0 where one side is flat, or where the covariance is
        # negative. The release also guards the other quantities; with a gain of 0 those guards change nothing.
        gain = sigma_xy / (sigma_xx + VARIANCE_FLOOR)
        seen = (gain > 0) & (sigma_xx >= VARIANCE_FLOOR) & (sigma_yy >= VARIANCE_FLOOR)
        gain = torch.where(seen, gain, 0)
        sigma_vv = (sigma_yy - gain * sigma_xy).clamp(min=VARIANCE_FLOOR)
        sigma_xx = torch.where(sigma_xx >= VARIANCE_FLOOR, sigma_xx, 0)
        kept = kept + torch.log1p(gain * gain * sigma_xx / (sigma_vv + SIGMA_NN)).sum((1, 2))
        total = total + torch.log1p(sigma_xx / SIGMA_NN).sum((1, 2))
    return quotient(kept, total, dist, ref)
