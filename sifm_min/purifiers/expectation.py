"""The expectation over purifiers (EOT, Athalye et al. 2018): a method's loss on pictures that a random purifier has changed.

    L(x')  =  mean over tau of L_method( tau(x'), tau(x) )       one tau drawn at every step, for both pictures

`purify_steps` does it for any method: at every step the method takes tau(x) for its original. This costs what the method
computes from its original, once a step; a method that does not look at the original costs what it costs without purifiers.
"""

import torch


def purify_steps(build, x_orig, draws, generator, name):
    """The objective of a method that expects purifiers.

    build(x_orig) -> the method's objective. It is called at every step, with `generator` in the state of the first call: it
      has the same noise each time. What the objective draws in a step continues from step to step.
    An objective that keeps a state between steps has `see(x_orig)`, which is called instead. One that does not compare with
      the original has `see` None.
    x_orig: (1,3,H,W) in [0,1]. draws() -> the next purifier. name: of the method, for errors.
    The objective has `drawn`, the list of the purifiers of all steps so far.
    """
    before = generator.get_state()
    purify = draws()
    inner = build(_seen(purify, x_orig))
    if inner is None:
        raise ValueError(f"{name} has no objective, so it cannot expect purifiers: leave robust out")
    rebuilt, see = not hasattr(inner, "see"), getattr(inner, "see", None)
    count = getattr(inner, "passes", None)

    def objective(x_imu, step):
        nonlocal inner, purify
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
    if count:
        compares = rebuilt or see
        objective.passes = lambda steps: ({part: steps * once for part, once in count(1).items()} if compares and steps
                                          else count(steps))
    return objective


def _seen(purify, x_orig):
    with torch.no_grad():
        return purify(x_orig)
