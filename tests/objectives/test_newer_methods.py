"""The direction of DANP, DiffusionGuard, TDAE and SIFM at the output: within 20 steps they go where they should, on noise not
optimised."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from photographs import smooth

import sifm_min
from sifm_min import images
from sifm_min.objectives.around import choose
from sifm_min.objectives.danp import above_threshold, upsampled
from sifm_min.pgd import pgd

PROMPT = "make it night"
T = [900, 333]


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module", params=["InstructPix2Pix", "SD3", "UltraEdit", "FLUX.1 Kontext"])
def editor(request, tiny_folders):
    loaded = sifm_min.load_editor(tiny_folders[request.param], device="cpu")
    loaded.defaults = replace(loaded.defaults, steps=5)      # of which img2img at strength 0.6 leaves out the first two
    return loaded


def made(editor, method, x_orig, seed, options):
    return sifm_min.METHODS[method](editor, x_orig, editor.contexts([PROMPT]), generator=seeded(seed), **options)


def start_and_end(editor, method, x_orig, options):
    return from_start(x_orig, made(editor, method, x_orig, 7, options))


def from_start(x_orig, objective):
    """The random start that all methods share, and the picture after 20 steps from it."""
    return [x_orig + pgd(x_orig, objective, 0.03, steps=steps, step_size=1 / 255, generator=seeded(1)) for steps in (0, 20)]


def seen(editor, x, etas):
    """([attention to the prompt's words (tokens,h,w)], [prediction]) of a picture, one each for every eta and timestep."""
    E, columns = editor.encode(x), editor.word_positions(PROMPT)
    maps, predictions = [], []
    for eta in etas:
        for t in T:
            t = torch.tensor([t])
            found = editor.features(E, editor.noise_latent(E, eta, t), t, editor.contexts([PROMPT])[0],
                                    taps=[*editor.probs_names, "out"])
            predictions.append(found.pop("out"))
            maps.append(sum(upsampled(probs.mean(1)[..., columns], E.shape[-2:]) for probs in found.values())[0])
    return maps, predictions


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"noise_weight": 0.0}], ids=["both terms", "attention alone"])
def test_danp_moves_attention_and_prediction(options, editor):
    """Attention falls where the original's is high, against the rest, and predictions move away: on average over noise.

    The loss itself need not fall. Its mask is chosen anew from the maps at every step, and jumps with them.
    """
    x_orig = images.to_pixels(smooth(editor.working_size, editor.working_size))
    with torch.enable_grad():
        pictures = start_and_end(editor, "danp", x_orig, {"timesteps": T, "prompts": [PROMPT], **options})
    etas = torch.randn((8, 1, *editor.encode(x_orig).shape[1:]), generator=seeded(98))
    (clean, plain), *others = (seen(editor, x, etas) for x in (x_orig, *pictures))
    masks = [above_threshold(one[None], 128)[0] for one in clean]
    assert all(0 < mask.mean() < 1 for mask in masks)
    daa = [sum(((2 * mask - 1) * one.square()).sum() / origin.square().sum() for mask, one, origin in zip(
        masks, maps, clean, strict=True)) for maps, _ in others]
    assert daa[1] < daa[0]
    moved = [sum((one - origin).norm() for one, origin in zip(predictions, plain, strict=True)) for _, predictions in others]
    assert moved[1] > (1.2 if not options else 1) * moved[0]


def test_diffusionguard_refuses_a_start_without_the_picture(editor):
    """By img2img; in other editors the picture enters beside the noise."""
    before = editor.defaults
    editor.defaults = replace(before, strength=1.0)
    try:
        with (pytest.raises(ValueError, match="pure noise and has nothing of the picture") if editor.kind == "img2img"
              else nullcontext()):
            sifm_min.METHODS["diffusionguard"](editor, torch.zeros(1, 3, 16, 16), [], generator=None)
    finally:
        editor.defaults = before


@torch.no_grad()
def test_diffusionguard_enlarges_the_first_prediction(editor):
    """The norm of the denoiser's prediction at the first step of an edit grows, on average over noise.

    A random network answers to each draw in a way of its own.
    """
    x_orig = images.to_pixels(smooth(editor.working_size, editor.working_size))
    with torch.enable_grad():
        pictures = start_and_end(editor, "diffusionguard", x_orig, {})
    plan, context, norms = editor.plan_at(*x_orig.shape[2:]), editor.contexts([PROMPT])[0], []
    for E in map(editor.encode, pictures):
        etas = torch.randn((24, 1, *E.shape[1:]), generator=seeded(99))
        norms.append(sum(editor.predict(E, plan.scale_input(editor.first_latent(E, eta, plan), 0), plan.timesteps[:1], context)
                         .norm() for eta in etas))
    assert norms[1] > norms[0]


@pytest.mark.slow
@torch.no_grad()
def test_tdae_lowers_the_attention_to_the_words(editor):
    """With flat minima and a text that moves, the attention to the text as given falls where the original's is high."""
    x_orig, generator = images.to_pixels(smooth(editor.working_size, editor.working_size)), seeded(7)
    contexts, around = editor.contexts([PROMPT]), choose("tdae")

    def build(x_orig):
        return sifm_min.METHODS["tdae"](editor, x_orig, contexts, generator=generator, prompts=[PROMPT], timesteps=T)

    with torch.enable_grad():
        objective = around.build(build, "tdae", editor, contexts, generator)(x_orig)
        pictures = from_start(x_orig, around.flattened(objective, [generator], 0.03, x_orig))
    etas = torch.randn((4, 1, *editor.encode(x_orig).shape[1:]), generator=seeded(98))
    clean, *maps = (sum(one.sum(0) for one in seen(editor, x, etas)[0]) for x in (x_orig, *pictures))
    start, end = (one[clean > clean.mean()].mean() for one in maps)
    assert end < start and objective.refinements(20) == 10


@torch.no_grad()
def test_sifm_at_the_output_moves_the_prediction(editor):
    """What the denoiser predicts in an edit goes away from the original's, on average over noise."""
    x_orig = images.to_pixels(smooth(editor.working_size, editor.working_size))
    with torch.enable_grad():
        pictures = start_and_end(editor, "sifm-output", x_orig, {})
    etas = torch.randn((8, 1, *editor.encode(x_orig).shape[1:]), generator=seeded(98))
    clean, *others = (seen(editor, x, etas)[1] for x in (x_orig, *pictures))
    start, end = (sum((one - origin).norm() for one, origin in zip(other, clean, strict=True)) for other in others)
    assert end > 1.2 * start


def test_sifm_at_the_output_is_sifm_with_its_choices(editor):
    """Loss and gradient are those of SIFM with the stated tap, weight, noise and timesteps."""
    x_orig = images.to_pixels(smooth(editor.working_size, editor.working_size))
    found = []
    for method, options in (("sifm-output", {}), ("sifm", {
            "taps": ["out"], "lam": 1000.0, "timesteps": 4, "noisy": "paper" if editor.kind == "img2img" else "deploy"})):
        x = (x_orig + 0.01).clamp(0, 1).requires_grad_()
        loss, terms = made(editor, method, x_orig, 7, options)(x, 0)
        found.append((loss.detach(), *terms.values(), *torch.autograd.grad(loss, x)))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True)) and found[0][2] > 0
