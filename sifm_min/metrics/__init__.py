"""The five distances of the paper's tables, PSNR, SSIM, VIFp, FSIM and LPIPS; and the visibility of a perturbation.

    from sifm_min import metrics
    metrics.ssim(dist, ref)                                  # (B,3,H,W) or (B,1,H,W) in [0,1] -> (B,)

Every metric takes (distorted, reference): in the paper's protocol the edit of the immunized picture and the edit of the
original. Inputs are floating point. The result has one value per picture and is differentiable in both inputs. The
computation runs in float32 or better, at the pictures' own size. Other inputs raise ValueError. The first lines of each
docstring say how the value is measured and which other implementation has the same value.

This file imports a metric when it is first used, so that commands can read `metrics.backbones` without torch.
"""

__all__ = ["LPIPSWeights", "fsim", "linear_layers", "lpips", "lpips_layers", "lpips_weights", "luma", "psnr", "ssim",
           "texture_budget", "thresholds", "vifp", "visibility"]


def __getattr__(name):
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import convolutions, just_noticeable, perceptual, phase, pixels, structure
    homes = structure, phase, perceptual, convolutions, just_noticeable, pixels
    return next(getattr(home, name) for home in homes if hasattr(home, name))


def __dir__():
    return sorted({*globals(), *__all__})
