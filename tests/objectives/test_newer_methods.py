"""The direction of DANP and DiffusionGuard: within 20 steps they go where their papers say, on noise not optimised."""

import pytest
import tiny_sd3
import torch
from photographs import smooth

import sifm_min
from sifm_min import images
from sifm_min.pgd import pgd

PROMPT = "make it night"
T = [900, 333]


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module", params=["InstructPix2Pix", "SD3"])
def editor(request, tiny_folder, tmp_path_factory):
    folder = tiny_folder if request.param == "InstructPix2Pix" else tiny_sd3.write(tmp_path_factory.mktemp("sd3"))
    return sifm_min.load_editor(folder, device="cpu")


def made(editor, method, x_orig, seed, options):
    return sifm_min.METHODS[method](editor, x_orig, editor.contexts([PROMPT]), generator=seeded(seed), **options)


def start_and_end(editor, method, x_orig, options):
    """The random start that all methods share, and the picture after 20 steps from it."""
    objective = made(editor, method, x_orig, 7, options)
    return [x_orig + pgd(x_orig, objective, 0.03, steps=steps, step_size=1 / 255, generator=seeded(1)) for steps in (0, 20)]


def test_danp_moves_attention_and_prediction(editor):
    x_orig = images.to_pixels(smooth(editor.working_size, editor.working_size))
    options = {"timesteps": T, "prompts": [PROMPT]}
    pictures = start_and_end(editor, "danp", x_orig, options)
    losses = [made(editor, "danp", x_orig, 99, options)(x.clone().requires_grad_(), 0)[0].item() for x in pictures]
    assert losses[1] < losses[0]
    shape, t = editor.encode(x_orig).shape, torch.tensor([T[1]])
    eta = torch.randn(shape, generator=seeded(98))

    def seen(x):
        with torch.no_grad():
            E = editor.encode(x)
            found = editor.features(E, editor.noise_latent(E, eta, t), t, editor.contexts([PROMPT])[0],
                                    taps=[*editor.probs_names, "out"])
        prediction = found.pop("out")
        return torch.cat([probs.flatten() for probs in found.values()]), prediction

    for original, start, end in zip(seen(x_orig), *map(seen, pictures), strict=True):
        assert (end - original).norm() > 1.2 * (start - original).norm()


def test_diffusionguard_enlarges_the_first_prediction(editor):
    """On average over noise: a random network answers to each draw in a way of its own."""
    x_orig = images.to_pixels(smooth(editor.working_size, editor.working_size))
    start, end = [sum(-objective(x.clone().requires_grad_(), step).item() for step in range(24))
                  for x in start_and_end(editor, "diffusionguard", x_orig, {})
                  for objective in [made(editor, "diffusionguard", x_orig, 99, {})]]
    assert end > start
