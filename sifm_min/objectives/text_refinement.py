"""TDAE: the instruction moves so that the loss rises, and the perturbation has to work for that wording too; TDAE as a whole.

    every S steps: d = 0;  M times  d <- clip(d + step sign(gradient of J(x', c + d) by d), -reach, reach)
    until the next time the immunized picture is seen with c + d; the original with c

arXiv 2512.14341, where L = -J grows as the edit is disturbed, and d descends L. c are the states of the text's tokens; of
Stable Diffusion 3 and FLUX.1 the pooled text stays as it is (ours). The paper prints none of the four numbers. Here S = 10,
M = 5, reach = 0.1 of the states' root mean square, because text encoders differ several-fold in scale, and step = reach / 4.
With several prompts each has its own d, made anew every S of its own turns. All evaluations of a step have the same draws.
In float16 the gradients of several batches of timesteps are not on one scale, so the sign of their sum, and with it the result,
may depend on how many timesteps run at once.
"""

from ..baselines import semantic_attack
from ..editors.text import Text
from ..purifiers.expectation import again

EVERY, ROUNDS, REACH = 10, 5, 0.1


def refine_text(build, editor, contexts, *, generator, every=EVERY, rounds=ROUNDS, reach=REACH):
    """A function like build, x_orig -> objective, whose objectives refine their text.

    build's objectives have `texts`, the list of the contexts that the immunized picture is seen with, and `leaves`, a list of
    tensors whose gradients an evaluation adds to their `.grad`; and `contexts`, where these are not the ones given here.
    """
    return lambda x_orig: _refined(build, x_orig, editor, contexts, generator, every, rounds, reach)


def _refined(build, x_orig, editor, contexts, generator, every, rounds, reach):
    first = generator.get_state()
    inner = build(x_orig)
    if not (hasattr(inner, "texts") and hasattr(inner, "leaves")):
        raise ValueError("refine_text needs an objective with texts and leaves, as those of sifm and semantic-attack are")
    contexts = getattr(inner, "contexts", contexts)
    count = len(contexts)
    refreshed = {}                                           # prompt -> its turn when its text was refined

    def refine(x, step, n):
        states = _states(contexts[n])
        most = reach * states.float().square().mean().sqrt().item()
        before, d = generator.get_state(), states.new_zeros(states.shape)
        for _ in range(rounds):
            moved = (states + d).requires_grad_(True)
            inner.texts[n], inner.leaves[:] = _with_states(contexts[n], moved), [moved]
            inner(x, step)
            generator.set_state(before)
            d = (d + most / 4 * moved.grad.sign()).clamp(-most, most)
        inner.leaves.clear()
        inner.texts[n] = editor.prepare_text(_with_states(contexts[n], states + d))

    def objective(x_imu, step):
        turn, n = divmod(step, count)
        if turn % every == 0 and refreshed.get(n) != turn:
            refreshed[n] = turn
            refine(x_imu.detach(), step, n)
        return inner(x_imu, step)

    def see(x_orig):
        nonlocal inner
        if hasattr(inner, "see"):
            return inner.see and inner.see(x_orig)
        texts, now = inner.texts, generator.get_state()
        generator.set_state(first)
        inner = build(x_orig)
        generator.set_state(now)
        inner.texts[:] = texts

    def refinements(steps):
        """The gradients by the text in so many steps."""
        return rounds * sum(-(-len(range(n, steps, count)) // every) for n in range(count))

    objective.see, objective.refinements, objective.note = see, refinements, getattr(inner, "note", "")
    if hasattr(inner, "passes"):
        plain, more = inner.passes, again(inner)
        compares = getattr(inner, "see", see) is not None

        def added(counts, steps):                            # the encoder has no backward pass: x' is held constant
            extra = {part: passes for part, passes in more(refinements(steps)).items() if part != "encoder_backward"}
            return {part: passes + extra.get(part, 0) for part, passes in counts.items()}

        objective.passes = lambda steps: added(plain(steps), steps)
        objective.passes_again = more
        objective.passes_purified = lambda steps: added(
            {part: steps * once for part, once in plain(1).items()} if compares and steps else plain(steps), steps)
    return objective


def _states(context):
    return (context.states if isinstance(context, Text) else context).detach()


def _with_states(context, states):
    return context._replace(states=states) if isinstance(context, Text) else states


def tdae(editor, x_orig, contexts, *, generator, prompts, content=None, timesteps=10, batch=None):
    """TDAE: the Semantic Attack, at flat minima and against a text that moves.

        L = J + 0.3 |J(x') - J(x' + h s)|, J the loss of `semantic_attack` with the text c + d: see flat_minima.py and above

    arXiv 2512.14341 (TPAMI); no code was released. It is put around other methods; the Semantic Attack is one of those that the
    paper reports on both of its editors. Around another method: that method with the options flat and refine_text, which this
    one has unless they are switched off; with any_prompt, which moves no text, it has flat alone.
    content, timesteps, batch: of `semantic_attack`. Cost: encoder 2F 2B, denoiser 2|T|F 2|T|B, and half a step (M / S) for the
    text. native: a zero start.
    """
    return semantic_attack(editor, x_orig, contexts, generator=generator, prompts=prompts, content=content, timesteps=timesteps,
                           batch=batch)
