"""The budget of a perturbation, number by number, and the measures of one that was made.

torch is imported inside the functions: commands read `BUDGETS` before they need it.
"""

BUDGETS = ("uniform", "texture")                             # eps everywhere, the paper's; less where a picture is smooth


def local_budget(picture, eps, budget="uniform"):
    """The budget of an `images.Picture` as `pgd` and `images.quantize` take it.

    budget "uniform": eps itself; "texture": a tensor (1,channels,H,W), see `texture_budget`. Raises ValueError for others.
    """
    if budget not in BUDGETS:
        raise ValueError(f"budget {budget!r}: choose one of {', '.join(BUDGETS)}")
    if budget == "uniform":
        return eps
    from .. import images
    from .just_noticeable import texture_budget
    return texture_budget(images.to_pixels(picture.image)[:, :picture.channels], eps)


def rms_bound(budget):
    """The bound of the root mean square of a perturbation over its budget, as `pgd` takes it: None of "uniform"."""
    if budget == "uniform":
        return None
    from .just_noticeable import RMS
    return RMS


def measured(picture, immunized, eps):
    """The perturbation that an 8-bit picture really has, JSON-ready; eps: a number or a tensor, as `local_budget` returns.

    In steps of 1/255: linf_steps, the largest change; budget_steps and budget_mean_steps, the largest budget of a value and
    the mean; values_beyond_budget: how many values are outside theirs. visibility, psnr (dB) and ssim (None for pictures
    that are too small): of `metrics`.
    """
    import numpy as np

    from .. import images, metrics
    after, before = images.to_pixels(immunized), images.to_pixels(picture.image)
    used, limit = np.broadcast_arrays(images.steps_apart(immunized, picture.image), images.budget(eps))
    return {"linf_steps": int(used.max()), "budget_steps": int(limit.max()), "budget_mean_steps": round(float(limit.mean()), 2),
            "values_beyond_budget": int((used > limit).sum()), "visibility": metrics.visibility(after, before).item(),
            "psnr": metrics.psnr(after, before).item(),
            "ssim": metrics.ssim(after, before).item() if min(picture.image.size) >= 11 else None}
