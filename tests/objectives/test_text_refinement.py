"""TDAE's text refinement: the gradient by the text, the direction and reach of its steps, and when it happens."""

import pytest
import torch
from photographs import smooth

import sifm_min
from sifm_min import images
from sifm_min.editors.text import Text
from sifm_min.objectives.text_refinement import refine_text

PROMPTS = ["make it night", "make her a witch"]
METHODS = ["sifm", "semantic-attack"]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module", params=["InstructPix2Pix", "SD3", "FLUX.1 Kontext"])
def editor(request, tiny_folders):
    """In float64, and its pooled text is seen to stay."""
    return sifm_min.load_editor(tiny_folders[request.param], device="cpu", dtype=torch.float64, vae_dtype=torch.float64)


@pytest.fixture
def double(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)         # which objectives sum in


def pictures(editor):
    x = images.to_pixels(smooth(editor.working_size, editor.working_size)).double()
    return x, (x + 0.03 * torch.randn(x.shape, generator=seeded(1)).sign().double()).clamp(0, 1)


def made(method, editor, x_orig, contexts, generator):
    prompts = {"prompts": PROMPTS[:len(contexts)]} if method != "sifm" else {}
    return sifm_min.METHODS[method](editor, x_orig, contexts, generator=generator, timesteps=2, **prompts)


def states(context):
    context = getattr(context, "value", context)
    return context.states if isinstance(context, Text) else context


def moved_to(context, states):
    return context._replace(states=states) if isinstance(context, Text) else states


def value(found):
    return (found[0] if isinstance(found, tuple) else found).item()


@pytest.mark.parametrize("method", METHODS)
def test_gradient_by_the_text_is_a_difference(method, editor, double):
    x_orig, x = pictures(editor)
    contexts = editor.contexts(PROMPTS[:1])
    objective = made(method, editor, x_orig, contexts, seeded(2))

    def loss(e):
        objective.texts[0] = moved_to(contexts[0], e)
        return value(objective(x, 0))

    c = states(contexts[0])
    loss(c)                                                  # the original is seen with c
    leaf = c.clone().requires_grad_()
    objective.leaves[:] = [leaf]
    loss(leaf)
    objective.leaves.clear()
    assert leaf.grad.any()
    for seed in (3, 4):
        along = torch.randn(c.shape, generator=seeded(seed)).double() * leaf.grad.abs() / leaf.grad.abs().max()
        slope = (loss(c + 1e-5 * along) - loss(c - 1e-5 * along)) / 2e-5
        assert slope == pytest.approx((leaf.grad * along).sum().item(), rel=1e-4, abs=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_gradient_by_the_picture_is_the_same_with_leaves(method, editor, double):
    x_orig, x = pictures(editor)
    contexts = editor.contexts(PROMPTS[:1])
    gradients = []
    for leaves in (False, True):
        objective = made(method, editor, x_orig, contexts, seeded(2))
        e = states(contexts[0]).clone().requires_grad_(leaves)
        objective.texts[0], objective.leaves[:] = moved_to(contexts[0], e), [e] if leaves else []
        leaf = x.clone().requires_grad_()
        found = objective(leaf, 0)
        gradients.append(torch.autograd.grad(found[0] if isinstance(found, tuple) else found, leaf)[0])
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("method", METHODS)
def test_the_text_moves_against_the_perturbation(method, editor, double):
    """J rises by every refinement, by M steps of a quarter of the reach, and the base's own value is that of c + d."""
    x_orig, x = pictures(editor)
    contexts, bases = editor.contexts(PROMPTS[:1]), []

    def build(x_orig):
        bases.append(made(method, editor, x_orig, contexts, seeded(2)))
        return bases[-1]

    c = states(contexts[0])
    plain = value(build(x_orig)(x, 0))
    risen = []
    for rounds in (1, 5):
        refined = refine_text(build, editor, contexts, generator=seeded(), rounds=rounds, reach=0.1)(x_orig)
        risen.append(value(refined(x, 0)))
        d = bases[-1].texts[0]
        if isinstance(d, Text):
            assert torch.equal(d.pooled, contexts[0].pooled)
        assert not bases[-1].leaves
    assert plain < risen[0] < risen[1]
    objective = made(method, editor, x_orig, contexts, seeded(2))            # the five rounds once more, by the definition
    objective(x, 0)
    reach, d = 0.1 * c.square().mean().sqrt().item(), torch.zeros_like(c)
    for _ in range(5):
        e = (c + d).requires_grad_()
        objective.texts[0], objective.leaves[:] = moved_to(contexts[0], e), [e]
        objective(x, 0)
        d = (d + reach / 4 * e.grad.sign()).clamp(-reach, reach)
    objective.leaves.clear()
    objective.texts[0] = moved_to(contexts[0], c + d)
    assert d.abs().max().item() == pytest.approx(reach) and value(objective(x, 0)) == pytest.approx(risen[1], rel=1e-12)


def test_each_prompt_is_refined_every_so_many_of_its_turns(tiny):
    """And the original is seen with the text as it was given, the immunized picture with the moved one."""
    contexts, seen = tiny.contexts(PROMPTS), []
    x = images.to_pixels(smooth(32, 32))
    features = tiny.features

    def spy(latent, noisy, timesteps, context, **options):
        seen.append((torch.is_grad_enabled(), states(context).detach()))
        return features(latent, noisy, timesteps, context, **options)

    objective = refine_text(lambda x_orig: made("sifm", tiny, x_orig, contexts, seeded(1)), tiny, contexts, generator=seeded(),
                            every=2, rounds=3)(x)
    tiny.features = spy
    try:
        gradients, texts = [], []
        for step in range(8):
            seen.clear()
            objective((x + 0.02).requires_grad_(), step)
            gradients.append(sum(with_gradient for with_gradient, _ in seen))
            texts.append(seen[-1][1])
            assert all(torch.equal(text, contexts[step % 2]) for with_gradient, text in seen if not with_gradient)
            assert not torch.equal(texts[-1], contexts[step % 2])
    finally:
        del tiny.features
    assert gradients == [4, 4, 1, 1, 4, 4, 1, 1] and objective.refinements(8) == 12
    assert torch.equal(texts[0], texts[2]) and torch.equal(texts[1], texts[3]) and not torch.equal(texts[0], texts[1])


def test_refinement_leaves_the_draws_alone(tiny):
    """The generator and the noise of every step are those of the plain method."""
    x, states_after = images.to_pixels(smooth(32, 32)), []
    for refined in (False, True):
        generator, contexts = seeded(1), tiny.contexts(PROMPTS[:1])

        def build(x_orig, generator=generator, contexts=contexts):
            return sifm_min.METHODS["sifm"](tiny, x_orig, contexts, generator=generator, timesteps=2, resample=True)

        objective = (refine_text(build, tiny, contexts, generator=generator, every=2) if refined else build)(x)
        for step in range(3):
            objective((x + 0.02).requires_grad_(), step)
        states_after.append(generator.get_state())
    assert torch.equal(*states_after)


@pytest.mark.parametrize("robust", [False, True])
def test_the_text_stays_moved_between_refinements(robust, tiny, monkeypatch):
    """With purifiers too, where SIFM is called anew at every step."""
    seen, features = [], tiny.features

    def spy(latent, noisy, timesteps, context, **options):
        if torch.is_grad_enabled():
            seen.append(states(context).detach())
        return features(latent, noisy, timesteps, context, **options)

    monkeypatch.setattr(tiny, "features", spy)
    sifm_min.immunize(smooth(28, 22), tiny, PROMPTS[:1], method="sifm", timesteps=1, steps=3, robust=robust,
                      refine_text={"rounds": 2})
    assert len(seen) == 5 and torch.equal(seen[-1], seen[-2]) and torch.equal(seen[-1], seen[-3])
    assert not torch.equal(seen[-1], seen[0])


def test_content_is_the_text_that_moves(tiny):
    report = sifm_min.immunize(smooth(28, 22), tiny, PROMPTS, method="tdae", timesteps=1, steps=2, content="the sky").report
    assert report["gradient_evaluations"] == 4 + 5           # one text, though there are two prompts


def test_tdae_is_the_semantic_attack_with_both(tiny):
    one, other = (sifm_min.immunize(smooth(28, 22), tiny, PROMPTS[:1], timesteps=1, steps=2, **options) for options in (
        {"method": "tdae"}, {"method": "semantic-attack", "flat": True, "refine_text": True}))
    assert one.image.tobytes() == other.image.tobytes() and one.report["loss"] == other.report["loss"]
    plain = sifm_min.immunize(smooth(28, 22), tiny, PROMPTS[:1], timesteps=1, steps=2, method="tdae", flat=False,
                              refine_text=False)
    assert plain.report["gradient_evaluations"] == 2 and "flatness" not in plain.report["loss"][0]


def test_a_method_without_texts_is_refused_in_a_sentence(tiny):
    def method(editor, x_orig, contexts, *, generator):
        return lambda x_imu, step: x_imu.sum()
    with pytest.raises(ValueError, match="^refine_text needs an objective with texts and leaves, as those of sifm and"):
        sifm_min.immunize(smooth(28, 22), tiny, PROMPTS, method=method, refine_text=True)
