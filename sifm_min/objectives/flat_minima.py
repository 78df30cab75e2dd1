"""TDAE's flat minima: any method's loss with a penalty on its slope, so that it stays low around the picture as well.

    s   = - g(x') / || g(x') ||_2                             g the gradient of the method's loss J by the perturbation
    z   = J(x') - J(x' + h s)                                 the same timesteps and noise in both
    L   = J(x') + k |z|;    gradient used   (1 + k sign z) g(x') - k sign z g(x' + h s)

arXiv 2512.14341 (equations 4 to 6), with k = lambda / h = 0.3; no code was released. |z| / h is the norm of g for a small h, so
L is J with the norm of its gradient as a penalty, of weight lambda. It takes two gradients at a step and no second derivative.
The paper does not print h. Here it is a share, 0.05, of the Euclidean norm of the largest perturbation: 1.3 at 512 x 512 pixels
and eps 0.03 on [0,1]. x' + h s is not projected, as in the paper.
"""

import torch

from ..purifiers.expectation import again

WEIGHT, SHARE = 0.3, 0.05


def flatten(objective, *, generators, radius, weight=WEIGHT, mask=None):
    """The objective L of a method's objective J, both as `pgd` takes them: (x, step) -> loss, or (loss, terms).

    generators: those that J draws from; their states are restored between the two evaluations of a step. radius: h, see
      `radius_in`. weight: k. mask: as of `pgd`; the neighbour is displaced only where it is one.
    The terms gain "flatness", |z| / h. J must depend on x, step and generators alone: both evaluations are of one
    function. Its reported loss must be the function whose gradient it has, which excludes SDS.
    """
    def evaluated(x, step):
        x = x.detach().requires_grad_(True)
        value = objective(x, step)
        loss, terms = value if isinstance(value, tuple) else (value, {})
        (gradient,) = torch.autograd.grad(loss, x)
        return loss.detach(), terms, gradient

    def flat(x, step):
        before = [generator.get_state() for generator in generators]
        here, terms, g = evaluated(x, step)
        for generator, state in zip(generators, before, strict=True):
            generator.set_state(state)
        way = g if mask is None else g * mask.to(g)
        length = way.norm()
        s = torch.where(length > 0, -way / length, torch.zeros_like(way))
        there, _, g_there = evaluated(x + radius * s, step)
        z = here - there
        g = g + weight * z.sign() * (g - g_there)
        return here + weight * z.abs() + ((x - x.detach()) * g).sum(), {**terms, "flatness": z.abs() / radius}

    return flat


def radius_in(eps, pixels, share=SHARE, mask=None):
    """h: this share of the Euclidean norm of the largest perturbation of `pixels` that eps and mask allow (as of `pgd`)."""
    room = torch.as_tensor(eps, dtype=torch.float64).cpu().expand(pixels.shape)
    return share * (room if mask is None else room * mask.cpu()).norm().item()


def passes_of_both(objective):
    """passes(steps) of a flat objective: the method's own, and a second evaluation of every step. None if it counts none."""
    once, more = getattr(objective, "passes", None), again(objective)
    if once is None or more is None:
        return None

    def passes(steps):
        first, second = once(steps), more(steps)
        known = isinstance(first, dict) and isinstance(second, dict)
        return {part: count + second.get(part, 0) for part, count in first.items()} if known else "unknown"

    return passes
