"""The objective for several editors: the sum of their own losses, each over its own scale.

    L(x') = sum over editors i of  L_i(x') / s_i
    s_i   = mean over the first MEASURED steps made for editor i alone of  the norm of w dL_i / dx'

w is a pixel's step over the largest, and zero outside a mask. Where the loop steps by the sign of the gradient, the norm is the
sum of magnitudes; where it steps along the gradient (`rms` of `pgd`), the Euclidean norm. With `blur` it is that of the
gradient by the picture, before the blur. A step made for editor i alone lowers L_i, to first order, in proportion to this norm:
in units of s_i each editor alone gains as much, and none outweighs the others. The value of a loss is no such scale: SIFM's
passes through zero, and those of SDS and MIST say little about their gradients. The gradient on the picture is all that the
editors share: each has its graph for itself, one after the other.
"""

import torch

from ..methods import checked_loss
from ..purifiers.expectation import again
from .shares import named

MEASURED = 4                                                 # the first steps of each editor alone


def joint_objective(group, shares, make, seed, alone, weight, norm=1):
    """The objective of all shares, an objective like any other.

    group: the `Several`. make(share, generator) -> an editor's own objective. alone(objective, generator) runs the first
    MEASURED steps of a loop, to measure the scales. weight: w, a number or a tensor that broadcasts to the picture. norm: 1
    or 2, of the scales. Every editor's noise is the one of its run alone, from a generator with this seed; `generators` has
    them, the first for the start.
    """
    scales, measured, members, gradients = {}, {}, [], 0
    for share in shares:
        with group.at_work(share.editor), named(share.name):
            scales[share.name], measured[share.name], count = _scale(share, make, seed, alone, weight, norm)
        gradients += count
    generators = [torch.Generator().manual_seed(seed) for _ in shares]
    for share, generator in zip(shares, generators, strict=True):
        with group.at_work(share.editor), named(share.name):
            members.append((share, made := make(share, generator), checked_loss(made, share.method)))

    def objective(x_imu, step):
        total, gradient, terms = 0.0, torch.zeros_like(x_imu), {}
        for share, _, loss in members:
            with group.at_work(share.editor), named(share.name):
                value, g, own = _gradient(loss, x_imu, step, share.editor.device)
            total, gradient = total + value / scales[share.name], gradient + g / scales[share.name]
            terms |= {f"{share.name}: {name}": number for name, number in {"loss": value, **own}.items()}
        return total + ((x_imu - x_imu.detach()) * gradient).sum(), terms          # its value, with this gradient: see pgd.py

    def passes_of(made, steps, before):
        counted = [made.passes(steps), before] if hasattr(made, "passes") else []
        return _sum(counted) if counted else "unknown"

    def passes(steps):
        """Of the loop and of the measured steps, summed over the editors."""
        counted = [passes_of(made, steps, measured[share.name]) for share, made, _ in members]
        return "unknown" if "unknown" in counted else _sum(counted)

    def passes_again(steps):
        """Of a second evaluation of every step, see objectives/flat_minima.py."""
        counted = [count(steps) if (count := again(made)) else "unknown" for _, made, _ in members]
        return "unknown" if "unknown" in counted else _sum(counted)

    def refinements(steps):
        return sum(made.refinements(steps) for _, made, _ in members if hasattr(made, "refinements"))

    objective.generators, objective.scales, objective.passes = generators, scales, passes
    objective.passes_again, objective.refinements, objective.gradients = passes_again, refinements, (len(members), gradients)
    objective.drawn = getattr(members[0][1], "drawn", ())                # the same purifiers for all: they have one seed
    objective.note = "; ".join(f"{share.name}: {made.note}" for share, made, _ in members if getattr(made, "note", ""))
    return objective


def _scale(share, make, seed, alone, weight, norm):
    """(s_i, the passes and gradients that it took) of one editor. Raises ValueError where its gradient is zero."""
    generator, moved = torch.Generator().manual_seed(seed), []
    made = make(share, generator)
    loss = checked_loss(made, share.method)

    def recorded(x, step):
        value, gradient, _ = _gradient(loss, x.expand(-1, 3, -1, -1), step, share.editor.device)
        gradient = gradient.sum(1, keepdim=True) if x.shape[1] == 1 else gradient        # of a grey picture's one channel
        moved.append(torch.linalg.vector_norm(weight * gradient, norm))
        return value + ((x - x.detach()) * gradient).sum()

    alone(recorded, generator)
    passes = made.passes(len(moved)) if hasattr(made, "passes") else {}
    refined = made.refinements(len(moved)) if hasattr(made, "refinements") else 0
    return torch.stack(moved).mean().item() if moved else 1.0, passes, len(moved) + refined


def _gradient(loss, x_imu, step, device):
    """(value, gradient by the picture, terms) of one editor at a picture (1,3,H,W), all on the picture's device."""
    leaf = x_imu.detach().to(device).requires_grad_()
    value, terms = loss(leaf, step)
    (gradient,) = torch.autograd.grad(value, leaf)
    terms = {name: number.detach().to(x_imu.device) if isinstance(number, torch.Tensor) else number
             for name, number in terms.items()}
    return value.detach().to(x_imu), gradient.to(x_imu), terms


def _sum(counts):
    """The sum of counts of passes, dicts of one kind each."""
    return {part: sum(count.get(part, 0) for count in counts) for part in dict.fromkeys(part for one in counts for part in one)}
