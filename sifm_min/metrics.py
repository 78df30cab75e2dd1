"""How far apart two pictures are: PSNR, SSIM, VIFp, FSIM and LPIPS, the five distances of the paper's tables.

Every metric takes (distorted, reference), in the paper's protocol the edit of the immunized picture and the edit of the
original. Each is (B,3,H,W) or (B,1,H,W), floating point in [0,1]; the result is one value per picture, (B,),
differentiable in both. They compute in float32 or better, at the pictures' own size, and raise ValueError for what is
not two batches of pictures of one shape. Beside every published value belongs how it was measured; the first lines of
each docstring say it, and which other implementation has the same value.
"""

import contextlib
import hashlib
import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch.nn import functional as F

from . import backbones
from .models.checkpoints import Unavailable, Unfit, sha256

ROUNDING = 1e-3                                              # values this far outside [0,1] are clipped, not refused


# ----------------------------------------------------------------------------------------------------------------- PSNR

def psnr(dist, ref):
    """Peak signal-to-noise ratio in dB, (B,): 10 log10(1 / MSE), the MSE over all pixels and channels of a picture.

    Exact, without the epsilon that makes other implementations stop at 80 or 100 dB: equal pictures give inf, with a
    gradient of zero. Equals scikit-image's, and torchmetrics' of one picture.
    """
    dist, ref = _checked(dist, ref)
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
    dist, ref = _checked(dist, ref, smallest=WINDOW)
    if downsample and (factor := round(min(dist.shape[2:]) / 256)) > 1:
        dist, ref = _reduced(dist, factor), _reduced(ref, factor)
    return _each(_ssim, dist, ref)


def _ssim(dist, ref):
    channels = [_ssim_map(x, y).mean((1, 2)) for x, y in zip(dist.unbind(1), ref.unbind(1), strict=True)]
    return torch.stack(channels).mean(0)


def _ssim_map(x, y):
    """The SSIM of every window of two planes (B,H,W) -> (B,H-10,W-10)."""
    # Moments are taken about each plane's mean: E[x^2] - E[x]^2 of the raw values loses digits on flat areas.
    mean_x, mean_y = (plane.detach().mean((1, 2), keepdim=True) for plane in (x, y))
    x, y = x - mean_x, y - mean_y
    window = _gaussian(WINDOW, SIGMA)
    mu_x, mu_y = _blur(x, window), _blur(y, window)
    sigma_xx = _blur(x * x, window) - mu_x * mu_x
    sigma_yy = _blur(y * y, window) - mu_y * mu_y
    sigma_xy = _blur(x * y, window) - mu_x * mu_y
    mu_x, mu_y = mu_x + mean_x, mu_y + mean_y
    luminance = (2 * mu_x * mu_y + K1**2) / (mu_x * mu_x + mu_y * mu_y + K1**2)
    return luminance * (2 * sigma_xy + K2**2) / (sigma_xx + sigma_yy + K2**2)


# ----------------------------------------------------------------------------------------------------------------- VIFp

SIGMA_NN, VARIANCE_FLOOR = 2.0, 1e-10                        # of values in 0..255: the eye's noise; what counts as flat


def vifp(dist, ref):
    """Visual information fidelity in the pixel domain, (B,), of the luma: 1 for equal pictures, 0 for nothing kept.

    **Not symmetric**: how much of what `ref` (the edit of the original) tells the eye, `dist` still tells. Values above
    1 are right where contrast was raised. As in `vifp_mscale.m`, the authors' release (the paper, Sheikh and Bovik 2006,
    doi:10.1109/TIP.2005.859378, defines VIF on wavelets): four scales, noise variance 2 on 0..255, only whole windows;
    the luma is BT.601's, not rounded. Equals piq's `vif_p` and torchmetrics' on that luma; torchmetrics and sewar
    average RGB channels instead, which `vifp` of each channel as a (B,1,H,W) gives. A flat `ref` has nothing to keep:
    nan, unless `dist` equals it. Pictures below 41 pixels a side are refused.
    """
    return _each(_vifp, *_checked(dist, ref, smallest=41))


def _vifp(dist, ref):
    # Only variances and covariances count, so each picture may be centred: float32 then keeps its digits.
    x, y = 255 * luma(_centred(ref)), 255 * luma(_centred(dist))
    kept = total = 0
    for size in (17, 9, 5, 3):
        window = _gaussian(size, size / 5)
        if size < 17:
            x, y = _blur(x, window)[:, ::2, ::2], _blur(y, window)[:, ::2, ::2]
        mu_x, mu_y = _blur(x, window), _blur(y, window)
        sigma_xx = (_blur(x * x, window) - mu_x * mu_x).clamp(min=0)
        sigma_yy = (_blur(y * y, window) - mu_y * mu_y).clamp(min=0)
        sigma_xy = _blur(x * y, window) - mu_x * mu_y
        # dist = gain * ref + noise of variance sigma_vv. No gain where one side is flat, or where they run against each
        # other; the release has a guard for each of the other quantities too, which a gain of 0 makes void.
        gain = sigma_xy / (sigma_xx + VARIANCE_FLOOR)
        seen = (gain > 0) & (sigma_xx >= VARIANCE_FLOOR) & (sigma_yy >= VARIANCE_FLOOR)
        gain = torch.where(seen, gain, 0)
        sigma_vv = (sigma_yy - gain * sigma_xy).clamp(min=VARIANCE_FLOOR)
        sigma_xx = torch.where(sigma_xx >= VARIANCE_FLOOR, sigma_xx, 0)
        kept = kept + torch.log1p(gain * gain * sigma_xx / (sigma_vv + SIGMA_NN)).sum((1, 2))
        total = total + torch.log1p(sigma_xx / SIGMA_NN).sum((1, 2))
    return _share(kept, total, dist, ref)


# ----------------------------------------------------------------------------------------------------------------- FSIM

T1, T2, T3, T4, CHROMA_POWER = 0.85, 160, 200, 200, 0.03     # of values in 0..255
SCALES, ORIENTATIONS, WAVELENGTH, STEP, SIGMA_ON_F = 4, 4, 6, 2, 0.55
THETA_SIGMA, NOISE_K, CUTOFF, SHARPNESS = math.pi / ORIENTATIONS / 1.2, 2, 0.45, 15
YIQ = ((0.299, 0.587, 0.114), (0.596, -0.274, -0.322), (0.211, -0.523, 0.312))


def fsim(dist, ref, *, chromatic=True):
    """Feature similarity, (B,), 1 for equal pictures: FSIMc for RGB; FSIM, of the luma, for grey or not `chromatic`.

    As Zhang et al. 2011 (doi:10.1109/TIP.2011.2109730) and their `FeatureSIM.m` define it, symmetric; pictures are first
    reduced to about 256 pixels a side by the mean of blocks. Equals `FeatureSIM.m` at 512x512 to 1e-5, and piq's
    `fsim`: to 1e-5 for luma, 4e-3 for FSIMc (piq has other digits of YIQ, and takes the modulus where a negative chroma
    similarity has a complex power; the real part is meant). Two flat pictures have no features: nan, unless they are
    equal. Pictures below 8 pixels a side are refused.
    """
    dist, ref = _checked(dist, ref, smallest=8)
    if (factor := int(min(dist.shape[2:]) / 256 + 0.5)) > 1:
        dist, ref = _reduced(dist, factor), _reduced(ref, factor)
    return _each(_fsimc if chromatic and dist.shape[1] == 3 else _fsim, dist, ref)


def _fsim(dist, ref, similarity=1):
    x, y = 255 * luma(dist), 255 * luma(ref)
    pc_x, pc_y = _phase_congruency(x), _phase_congruency(y)
    similarity = similarity * _alike(pc_x, pc_y, T1) * _alike(_gradient(x), _gradient(y), T2)
    pc = torch.maximum(pc_x, pc_y)
    return _share((similarity * pc).sum((1, 2)), pc.sum((1, 2)), dist, ref)


def _fsimc(dist, ref):
    i_x, q_x, i_y, q_y = (255 * _mix(pixels, weights) for pixels in (dist, ref) for weights in YIQ[1:])
    chroma = _alike(i_x, i_y, T3) * _alike(q_x, q_y, T4)
    # The real part of chroma ** 0.03, which is complex where hues are opposed.
    power = chroma.abs().clamp(min=_tiny(chroma)) ** CHROMA_POWER
    return _fsim(dist, ref, torch.where(chroma < 0, math.cos(CHROMA_POWER * math.pi), 1.0) * power)


def _alike(x, y, constant):
    return (2 * x * y + constant) / (x * x + y * y + constant)


def _gradient(plane):
    """The magnitude of the Scharr gradient of planes (B,H,W), zero around them."""
    plane = F.pad(plane, (1, 1, 1, 1)) / 16
    across = plane[:, :, 2:] - plane[:, :, :-2]
    across = 3 * (across[:, :-2] + across[:, 2:]) + 10 * across[:, 1:-1]
    down = plane[:, 2:] - plane[:, :-2]
    down = 3 * (down[:, :, :-2] + down[:, :, 2:]) + 10 * down[:, :, 1:-1]
    return _root(across * across + down * down)


def _phase_congruency(plane):
    """How well the frequencies of planes (B,H,W) agree in phase at each pixel, 0 to 1: Kovesi's `phasecong2`."""
    low, high = plane.detach().amin((1, 2), keepdim=True), plane.detach().amax((1, 2), keepdim=True)
    spectrum = torch.fft.fft2(plane - (low + high) / 2)      # the filters ignore the mean; a flat plane is exactly 0
    energy = amplitude = 0
    for filters, noise in zip(*_filters(*plane.shape[1:], plane.dtype, plane.device), strict=True):     # orientations
        response = torch.fft.ifft2(spectrum[:, None] * filters)                                         # (B, scale, H, W)
        even, odd = response.real.contiguous(), response.imag.contiguous()
        squares = even * even + odd * odd
        sum_even, sum_odd = even.sum(1), odd.sum(1)
        squared = sum_even * sum_even + sum_odd * sum_odd
        size = _root(squared) + 1e-4                         # of the sum, whose direction is the mean phase
        astray = (even * (sum_odd / size)[:, None] - odd * (sum_even / size)[:, None]).abs().sum(1)
        threshold = noise * _root(_median(squares[:, 0].flatten(1)))[:, None, None]
        energy = energy + (squared / size - astray - threshold).clamp(min=0)
        amplitude = amplitude + _root(squares).sum(1)
    return energy / amplitude                                # `_root` keeps the amplitude above 0


@lru_cache(maxsize=8)
def _filters(height, width, dtype, device):
    """The log-Gabor filters (orientation, scale, H, W) in the order of `fft2`, and each orientation's noise factor.

    The factor times the median response at the finest scale is the energy that noise alone would have: its mean plus
    two deviations, over 1.7, were all of that median noise of a Rayleigh distribution.
    """
    with torch.inference_mode(False), torch.device("cpu"):   # kept for calls that will want gradients
        rows, columns = (torch.fft.ifftshift((torch.arange(n, dtype=torch.float64) - n // 2) / (n - n % 2))
                         for n in (height, width))
        radius = torch.sqrt(rows[:, None] ** 2 + columns**2)
        angle = torch.atan2(-rows[:, None], columns)
        radius[0, 0] = 1
        low_pass = 1 / (1 + (radius / CUTOFF) ** (2 * SHARPNESS))
        bank, factors = [], []
        for orientation in range(ORIENTATIONS):
            towards = orientation * math.pi / ORIENTATIONS
            apart = torch.atan2(torch.sin(angle - towards), torch.cos(angle - towards)).abs()
            spread = torch.exp(-(apart**2) / (2 * THETA_SIGMA**2))
            filters = []
            for scale in range(SCALES):
                log_gabor = torch.exp(-torch.log(radius * WAVELENGTH * STEP**scale) ** 2 / (2 * math.log(SIGMA_ON_F) ** 2))
                log_gabor[0, 0] = 0
                filters.append(log_gabor * low_pass * spread)
            bank.append(torch.stack(filters))
            # White noise of power P at the finest scale adds up, over the scales, to P * `gathered`: by Parseval's
            # theorem, for the even halves of the filters (their values at k and -k, averaged).
            together = sum(filters)
            together = (together + torch.roll(together.flip(0, 1), (1, 1), (0, 1))) / 2
            gathered = together.square().sum() / filters[0].square().sum()
            tau = math.sqrt(gathered / math.log(2))
            factors.append(tau * (math.sqrt(math.pi / 2) + NOISE_K * math.sqrt(2 - math.pi / 2)) / 1.7)
        return torch.stack(bank).to(device, dtype), factors


def _median(values):
    """The median of each row, (B,N) -> (B,); of an even number, the mean of the two in the middle."""
    lower = values.median(1).values
    below = values <= lower[:, None]
    above = values.masked_fill(below, math.inf).amin(1)
    return (lower + torch.where(below.sum(1) > values.shape[1] // 2, lower, above)) / 2


# ---------------------------------------------------------------------------------------------------------------- LPIPS

SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)       # of the backbones' inputs, for pixels in [-1,1]


def lpips(dist, ref, *, network="alex", weights=None):
    """Learned perceptual distance, (B,), 0 for equal pictures: version 0.1 of the `lpips` package, its default network.

    Zhang et al. 2018 (arXiv 1801.03924): features of a backbone trained on ImageNet, normalised over channels, their
    squared differences weighted by the linear layers that ship here, averaged over the picture and summed over layers.
    Equals `lpips.LPIPS(net=...)` on the pictures in [-1,1]. network: "alex", "vgg" (which piq has) or "squeeze".
    The value depends on the size of the pictures, which are not resized. Grey is repeated to RGB.

    weights: a `LPIPSWeights`, or a file that `lpips_weights` takes; by default what `python -m sifm_min.weights download
    lpips` has fetched. Where that is absent it raises `Unavailable`: no other weights stand in for them. Pictures below
    31 pixels a side (vgg: 16, squeeze: 17) are refused.
    """
    if network not in backbones.NETWORKS:
        raise ValueError(f"network {network!r}: choose one of {', '.join(backbones.NETWORKS)}")
    dist, ref = _checked(dist, ref, smallest=backbones.NETWORKS[network].smallest)
    if not isinstance(weights, LPIPSWeights):
        weights = lpips_weights(network, weights)
    return sum(lpips_layers(dist, ref, weights))


def lpips_layers(dist, ref, weights):
    """The summands of `lpips`, one (B,) per tapped layer; weights: a `LPIPSWeights`."""
    tensors = _placed(weights, dist.dtype, dist.device)
    shift, scale = (torch.tensor(v, dtype=dist.dtype, device=dist.device)[:, None, None] for v in (SHIFT, SCALE))
    layers = []
    # Autocast and TF32 would leave three digits.
    with torch.autocast(dist.device.type, enabled=False), _without_tf32(dist.device):
        taps = [FEATURES[weights.network](tensors, (2 * pixels - 1 - shift) / scale) for pixels in (dist, ref)]
        for i, (x, y) in enumerate(zip(*taps, strict=True)):
            difference = (_normalised(x) - _normalised(y)).square()
            layers.append((difference * tensors[f"lin{i}"][:, None, None]).sum(1).mean((1, 2)))
    return layers


def _normalised(features):
    """Feature vectors at each position, of length 1 over the channels."""
    length = _root(features.square().sum(1, keepdim=True))
    return features / (length + 1e-10)


def _convolve(tensors, name, x, **how):
    return F.relu(F.conv2d(x, tensors[f"features.{name}.weight"], tensors[f"features.{name}.bias"], **how))


# Each yields the tapped activations; numbers are the places of torchvision's `features`. The classifiers never run.

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


@contextlib.contextmanager
def _without_tf32(device):
    """Convolutions of a GPU in float32, whatever the process has chosen."""
    if device.type != "cuda":
        yield
        return
    cudnn = torch.backends.cudnn                             # torch 2.9 gave the switch another name
    switch, name, off = (cudnn.conv, "fp32_precision", "ieee") if hasattr(cudnn, "conv") else (cudnn, "allow_tf32", False)
    before = getattr(switch, name)
    setattr(switch, name, off)
    try:
        yield
    finally:
        setattr(switch, name, before)


# ------------------------------------------------------------------------------------------------------- LPIPS' weights

@dataclass(frozen=True, eq=False)                            # hashed by identity: `_placed` keeps copies by it
class LPIPSWeights:
    """A backbone's convolutions and the linear layers over them; float32, on the CPU.

    sha256: over the bytes of the backbone's tensors, weight and bias in torchvision's order, whatever file held them;
    pinned: whether they come from torchvision's file of the pinned hash; file: what they were read from.
    """

    network: str
    tensors: dict
    sha256: str
    pinned: bool
    file: Path


def lpips_weights(network="alex", file=None):
    """The `LPIPSWeights` of a network, read from a file, or from where `python -m sifm_min.weights download` keeps it.

    file: torchvision's .pth, opened only if its hash is the pinned one, or a safetensors file with tensors of the same
    names (`features.0.weight`); others in it are left alone. Raises `Unavailable` where there is none, `Unfit` where
    the file is another.
    """
    backbone = backbones.NETWORKS[network]
    path = backbone.kept if file is None else Path(file)
    if not path.is_file():
        if file is not None:
            raise Unavailable(f"{path}: no such file; LPIPS needs {backbone.file} or its convolutions as safetensors")
        raise Unavailable(f"the weights of LPIPS ({backbone.title}) are not in {path.parent}: run `python -m "
                          f"sifm_min.weights download lpips-{network}` once while online, or give {backbone.file} with "
                          "--weights")
    return _read(backbone, path, path.stat().st_mtime_ns)


@lru_cache(maxsize=4)
def _read(backbone, path, changed):
    with torch.inference_mode(False):                        # kept for calls that will want gradients
        tensors, source, digest = (_safetensors if path.suffix == ".safetensors" else _pickle)(backbone, path)
        for name, shape in backbone.shapes.items():
            found = tensors.get(name)
            if found is None or tuple(found.shape) != shape or not found.is_floating_point():
                what = "is missing" if found is None else f"is {found.dtype} {list(found.shape)}"
                raise Unfit(f"{path} does not hold the convolutions of {backbone.title}: {name} {what}, expected "
                            f"{list(shape)}; fetch {backbone.file} again")
        tensors = {name: tensors[name].detach().float().contiguous() for name in backbone.shapes}
        actual = hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors.values())).hexdigest()
        if digest not in (None, actual):
            raise Unfit(f"{path} is damaged: its tensors are not those that were written; remove it and run `python -m "
                        f"sifm_min.weights download lpips-{backbone.name}` again")
        tensors |= linear_layers(backbone.name)
    return LPIPSWeights(backbone.name, tensors, actual, source == backbone.sha256, path)


def linear_layers(network):
    """The layers that ship with the package: {"lin0": (C,), ...}, float32."""
    with safe_open(backbones.LINEAR, framework="pt") as opened:
        names = [name for name in opened.keys() if name.startswith(f"{network}.")]  # noqa: SIM118 (it is no dict)
        return {name.partition(".")[2]: opened.get_tensor(name) for name in names}


def _safetensors(backbone, path):
    """(tensors, SHA-256 of the file that they were converted from or None, their own SHA-256 when they were or None)."""
    try:
        with safe_open(path, framework="pt") as opened:
            about = opened.metadata() or {}
            names = set(opened.keys()) & backbone.shapes.keys()
            return {name: opened.get_tensor(name) for name in names}, about.get("source_sha256"), about.get("sha256")
    except (SafetensorError, OSError) as error:
        raise Unfit(f"{path} is cut short, damaged or not safetensors ({error}); fetch it again") from None


def _pickle(backbone, path):
    """The same of torchvision's file. Nothing else of this kind is opened: a pickle can run code."""
    if (found := sha256(path)) != backbone.sha256:
        raise Unfit(f"{path} is not {backbone.file}: its SHA-256 is {found}, expected {backbone.sha256}; give that file, "
                    "or safetensors")
    return torch.load(path, map_location="cpu", weights_only=True), found, None


@lru_cache(maxsize=4)
def _placed(weights, dtype, device):
    with torch.inference_mode(False):
        return {name: tensor.to(device, dtype) for name, tensor in weights.tensors.items()}


# ------------------------------------------------------------------------------------------------------- shared by them

def luma(pixels):
    """BT.601 luma, not rounded: (B,3,H,W), or (B,1,H,W) as it is -> (B,H,W)."""
    return _mix(pixels, YIQ[0]) if pixels.shape[1] == 3 else pixels[:, 0]


def _mix(pixels, weights):
    red, green, blue = (weight * channel for weight, channel in zip(weights, pixels.unbind(1), strict=True))
    return red + green + blue


def _each(metric, dist, ref):
    """metric(dist, ref) -> (B,); on a CPU picture by picture: planes that fit its caches take half the time."""
    if dist.device.type != "cpu" or len(dist) == 1:
        return metric(dist, ref)
    return torch.cat([metric(*pair) for pair in zip(dist.split(1), ref.split(1), strict=True)])


def _reduced(pixels, factor):
    """The means of blocks factor x factor; what is left over at the right and the bottom goes."""
    height, width = (side // factor * factor for side in pixels.shape[2:])
    rows = sum(pixels[:, :, i:height:factor, :width] for i in range(factor))             # some 20 times faster than
    return sum(rows[:, :, :, i::factor] for i in range(factor)) / factor**2              # avg_pool2d on a CPU


def _centred(pixels):
    """Pixels minus the middle of each channel's range: a flat picture becomes exactly 0."""
    low, high = pixels.detach().amin((2, 3), keepdim=True), pixels.detach().amax((2, 3), keepdim=True)
    return pixels - (low + high) / 2


def _gaussian(size, sigma):
    """The weights of a window, sum 1."""
    weights = [math.exp(-((i - size // 2) ** 2) / (2 * sigma**2)) for i in range(size)]
    return [weight / sum(weights) for weight in weights]


def _blur(plane, window):
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


def _root(x):
    """The square root, with a gradient of 0 at 0 instead of nan."""
    return x.clamp(min=_tiny(x)).sqrt()


def _tiny(x):
    return torch.finfo(x.dtype).tiny


def _share(part, whole, dist, ref):
    """part / whole of each picture; exactly 1 for equal pictures, else nan where there is nothing to share in."""
    equal = (dist == ref).flatten(1).all(1)
    share = part / torch.where(whole > 0, whole, 1)
    return torch.where(equal, 1 + (share - share.detach()), torch.where(whole > 0, share, math.nan))


# --------------------------------------------------------------------------------------------------------------- inputs

def _checked(dist, ref, smallest=1):
    """Both batches in float32 or better, clipped to [0,1]; ValueError for what is not two batches of pictures."""
    rounded = False
    for name, pixels in (("dist", dist), ("ref", ref)):
        if not torch.is_tensor(pixels) or not pixels.is_floating_point():
            kind = getattr(pixels, "dtype", type(pixels).__name__)
            raise ValueError(f"{name}: expected a floating-point tensor in [0,1], got {kind}")
        if pixels.ndim != 4 or pixels.shape[1] not in (1, 3) or not pixels.numel():
            raise ValueError(f"{name}: expected pictures (B,3,H,W), or grey ones (B,1,H,W), got {tuple(pixels.shape)}")
        low, high = pixels.detach().aminmax()
        if not (low >= -ROUNDING and high <= 1 + ROUNDING):  # written so that NaN fails too
            raise ValueError(f"{name}: expected values in [0,1], got {low.item():.4g} to {high.item():.4g}")
        rounded = rounded or bool(low < 0) or bool(high > 1)
    if dist.shape != ref.shape:
        raise ValueError(f"the pictures differ in shape: dist {tuple(dist.shape)}, ref {tuple(ref.shape)}")
    if min(dist.shape[2:]) < smallest:
        raise ValueError(f"this metric needs at least {smallest} pixels a side, got {dist.shape[3]}x{dist.shape[2]}")
    dtype = torch.promote_types(torch.promote_types(dist.dtype, ref.dtype), torch.float32)
    dist, ref = dist.to(dtype), ref.to(dtype)
    return (dist.clamp(0, 1), ref.clamp(0, 1)) if rounded else (dist, ref)
