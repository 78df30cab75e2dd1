"""Projected gradient descent on the pixels of a picture, under an L-infinity budget. No diffusion code here.

One loop for every method: what is minimised is an argument, and so are start, step, mask and generator. The budget here
is on real numbers; `images.quantize` carries it over to the saved file.
"""

import torch

SCHEDULES, INITS = ("constant", "linear"), ("random", "zero")
SMALLEST = 1e-37                                             # in place of a zero below a fraction


def pgd(pixels, objective, eps, *, steps, step_size, schedule="constant", init="random", mask=None, generator=None,
        rms=None, on_step=None):
    """The delta, shaped like `pixels`, with |delta| <= eps and pixels + delta in [0,1], after `steps` descents.

    eps, step_size: numbers above 0; or non-negative tensors that broadcast to `pixels`, a budget and a step for each value.
      Where eps is 0 nothing changes.
    steps 0 gives the start itself: with init "random", the noise control that every method is compared with.
    pixels: (1,C,H,W) in [0,1], native size. A grey picture has C = 1, and an objective that expands it to three,
      so that it stays grey.
    objective(x, step) -> the loss to minimise at x = pixels + delta, a scalar tensor with a graph back to x; or
      (loss, terms), where terms is a dict of numbers or scalar tensors that only `on_step` sees, as numbers. To give a gradient
      g of its own, an objective returns loss.detach() + ((x - x.detach()) * g).sum(), which has the loss's value.
    schedule: "constant", or "linear": from step_size at the first step down to a hundredth of it at the last.
    init: "random", uniform in the budget, drawn from `generator`, or "zero". Where the loss is a distance to the features
      of the picture itself, zero is a stationary point.
    mask: (1,1,H,W) of zeros and ones; delta is zero where it is zero.
    rms: None steps by the sign of the gradient, as the paper does. A number above 0 steps along the gradient by delta / eps, so
      that values which matter little to the loss hardly change; `step_size` weighs the step, whose root mean square is 1
      without it. After each step delta is scaled down until the root mean square of delta / eps is at most this number. Means
      are over the values that may change.
    on_step(step, loss, terms) is called after each step with the loss before it, a float.

    Raises ValueError where an argument is out of range, where the first gradient is zero (nothing would change) and where
    a gradient is not finite.
    """
    _check(pixels, eps, steps, step_size, schedule, init, mask, generator, rms)
    pixels = pixels.detach()
    eps, step_size = (value.to(pixels) if isinstance(value, torch.Tensor) else value for value in (eps, step_size))
    low, high = (-pixels).clamp(min=-eps), (1 - pixels).clamp(max=eps)   # delta's box: the budget and the range at once
    if mask is not None:
        mask = mask.to(pixels)
        low, high = low * mask, high * mask
    whole = None if rms is None else (torch.zeros_like(pixels) + eps) * (1 if mask is None else mask)
    delta = torch.zeros_like(pixels)
    if init == "random":
        most = float(torch.as_tensor(eps, dtype=torch.float64).max())
        start = torch.empty(pixels.shape, device=generator.device).uniform_(-most, most, generator=generator)
        delta = (start.to(pixels) * (eps / most)).clamp(low, high)
    for step in range(steps):
        x = (pixels + delta).requires_grad_(True)
        value = objective(x, step)
        loss, terms = value if isinstance(value, tuple) else (value, {})
        (gradient,) = torch.autograd.grad(loss, x)
        decay = 1 - 0.99 * step / max(steps - 1, 1) if schedule == "linear" else 1
        direction = gradient.sign() if rms is None else _unit(gradient * whole, whole)
        delta = (delta - step_size * decay * direction).clamp(low, high)
        if rms is not None:
            delta = within_rms(delta, whole, rms)
        moved = gradient if mask is None else gradient * mask
        finite, moves, value, *numbers = _numbers(gradient.isfinite().all(), moved.any(), loss, *terms.values())
        if not finite:
            raise ValueError(f"step {step}: the gradient is not finite (loss {value:.4g}); "
                             "a wider dtype, such as float32, may help")
        if step == 0 and not moves:
            raise ValueError("the loss has no gradient at this picture, so nothing would move; a random start, another "
                             "objective or a wider mask may help")
        if on_step:
            on_step(step, value, dict(zip(terms, numbers, strict=True)))
    return delta


def within_rms(delta, whole, rms):
    """delta, scaled down until the root mean square of delta / whole is at most rms; whole: the budget of each value."""
    return delta * (rms / _rms(delta.detach() / whole.clamp(min=SMALLEST), whole)).clamp(max=1)


def _rms(values, budget):
    """The root mean square, above zero, of values at those places where the budget is not zero; elsewhere they are zero."""
    return (values.square().sum() / (budget > 0).sum()).sqrt().clamp(min=SMALLEST)


def _unit(values, budget):
    """The values over their root mean square; zeros stay zeros."""
    values = values / values.abs().max().clamp(min=SMALLEST)             # squares of small numbers would be zero
    return values / _rms(values, budget)


def _numbers(*values):
    """Scalar tensors as numbers (numbers stay), in one read at the end of a step: each read waits for the device."""
    tensors = [value.detach().reshape(()) for value in values if isinstance(value, torch.Tensor)]
    kind = torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
    read = iter(torch.stack([tensor.to(kind) for tensor in tensors]).tolist())
    return [next(read) if isinstance(value, torch.Tensor) else value for value in values]


def _broadcasts(shape, whole):
    """True where a tensor of this shape broadcasts to the whole shape."""
    return len(shape) <= len(whole) and all(one in (1, other) for one, other in zip(shape[::-1], whole[::-1], strict=False))


def _range(value):
    """(least, most) of a number or of a tensor; nan if there is one."""
    value = torch.as_tensor(value, dtype=torch.float64)
    return value.min().item(), value.max().item()


def _check(pixels, eps, steps, step_size, schedule, init, mask, generator, rms):
    if pixels.ndim != 4 or len(pixels) != 1 or not (pixels.detach().min() >= 0 and pixels.detach().max() <= 1):
        raise ValueError(f"pixels must be (1,C,H,W) in [0,1], got {tuple(pixels.shape)}, "
                         f"{pixels.min().item():.4g} to {pixels.max().item():.4g}")
    for value, name in ((eps, "eps"), (step_size, "step_size")):
        if isinstance(value, torch.Tensor) and not _broadcasts(value.shape, pixels.shape):
            raise ValueError(f"{name}'s shape {tuple(value.shape)} does not fit the pixels: expected {tuple(pixels.shape)}")
    least, most = _range(eps)
    if not 0 <= least <= most <= 1 or most == 0:
        raise ValueError(f"eps {most:g}: the budget is a fraction of the pixel range, such as 0.03 or 8/255")
    least, most = _range(step_size)
    if steps < 0 or not 0 <= least <= most < float("inf") or most == 0:
        raise ValueError(f"steps {steps}, step_size {step_size}: steps cannot be negative, and step_size must be positive")
    if rms is not None and not 0 < rms < float("inf"):
        raise ValueError(f"rms {rms}: it is a share of the budget above 0, such as 0.6")
    for value, known, name in ((schedule, SCHEDULES, "schedule"), (init, INITS, "init")):
        if value not in known:
            raise ValueError(f"{name} {value!r}: choose one of {', '.join(known)}")
    if init == "random" and generator is None:
        raise ValueError("init 'random' draws from a generator: pass one, seeded")
    if mask is not None:
        size = (1, 1, *pixels.shape[2:])
        if tuple(mask.shape) != size:
            raise ValueError(f"the mask's shape {tuple(mask.shape)} does not fit the picture: expected {size}")
        if not ((mask == 0) | (mask == 1)).all() or not mask.any():
            raise ValueError("the mask must be zeros and ones, and have a one somewhere")
