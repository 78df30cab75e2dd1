"""The expectation over purifiers (EOT, Athalye et al. 2018): a method's loss on pictures that a random purifier has changed.

    L(x')  =  mean over tau of L_method( tau(x'), tau(x) )       one tau drawn at every step, for both pictures

`purify_steps` does it for any method: at every step the method takes tau(x) for its original. This costs what the method
computes from its original, once a step; a method that does not look at the original costs what it costs without purifiers.
"""

import torch

MANY = 10_000                                                # by then an objective has computed all that it computes once


def purify_steps(build, x_orig, draws, generator, name):
    """The objective of a method that expects purifiers.

    build(x_orig) -> the method's objective. It is called at every step, with `generator` in the state of the first call: it
      has the same noise each time. What the objective draws in a step continues from step to step.
    An objective that keeps a state between steps has `see(x_orig)`, which is called instead. One that does not compare with
      the original has `see` None.
    x_orig: (1,3,H,W) in [0,1]. draws() -> the next purifier. name: of the method, for errors.
    The objective has `drawn`, the list of the purifiers of all steps so far. All evaluations of a step have the same purifier.
    """
    before = generator.get_state()
    purify = draws()
    inner = build(_seen(purify, x_orig))
    if inner is None:
        raise ValueError(f"{name} has no objective, so it cannot expect purifiers: leave robust out")
    rebuilt, see = not hasattr(inner, "see"), getattr(inner, "see", None)
    count, more = getattr(inner, "passes", None), again(inner)
    purified = getattr(inner, "passes_purified", None)
    last = None

    def objective(x_imu, step):
        nonlocal inner, purify, last
        if step == last:                                     # a second evaluation, see objectives/flat_minima.py
            return inner(purify(x_imu), step)
        last = step
        if objective.drawn:
            purify = draws()
            if see:
                see(_seen(purify, x_orig))
            elif rebuilt:
                inner = None                                 # what it computed from the original is freed first
                now = generator.get_state()
                generator.set_state(before)
                inner = build(_seen(purify, x_orig))
                generator.set_state(now)
        objective.drawn.append(str(purify))
        return inner(purify(x_imu), step)

    objective.drawn, objective.note = [], getattr(inner, "note", "")
    if hasattr(inner, "refinements"):
        objective.refinements = inner.refinements
    if count:
        compares = rebuilt or see
        objective.passes = purified or (lambda steps: {part: steps * once for part, once in count(1).items()}
                                        if compares and steps else count(steps))
        objective.passes_again = more
    return objective


def again(objective):
    """passes(steps) of one more evaluation in each of so many steps, without what an objective computes once; or None.

    An objective that knows better has `passes_again`. One whose passes in a run with purifiers are not those of its first step,
    times the steps, has `passes_purified`.
    """
    if own := getattr(objective, "passes_again", None):
        return own
    count = getattr(objective, "passes", None)
    if count and not isinstance(count(1), dict):
        return None
    return count and (lambda steps: {part: passes - count(MANY).get(part, 0) for part, passes in count(MANY + steps).items()})


def _seen(purify, x_orig):
    with torch.no_grad():
        return purify(x_orig)
