"""The gradients of the methods after SIFM, and of what goes around them, against differences in float64 on every editor."""

from dataclasses import replace

import pytest
import torch
from finite_differences import assert_gradient, assert_slopes, seeded_loss

import sifm_min
from sifm_min.objectives import blurred
from sifm_min.objectives.flat_minima import flatten

PROMPT, SIZE = "make it night", (20, 24)                     # (height, width), which every editor resizes
KINDS = ["InstructPix2Pix", "SD3", "UltraEdit", "FLUX.1 Kontext"]
FORMS = {"danp": ("danp", {"timesteps": 2}),
         "danp as printed": ("danp", {"timesteps": 2, "reduction": "literal", "tokens": "all", "batch": 1}),
         "diffusionguard": ("diffusionguard", {}), "tdae": ("tdae", {"timesteps": 2}),
         "sifm-output": ("sifm-output", {"timesteps": 2})}


@pytest.fixture(scope="module", params=KINDS)
def editor(request, tiny_folders):
    """One editor of each kind, in float64."""
    loaded = sifm_min.load_editor(tiny_folders[request.param], device="cpu", dtype=torch.float64, vae_dtype=torch.float64)
    loaded.defaults = replace(loaded.defaults, steps=5)      # of which img2img at strength 0.6 leaves out the first two
    return loaded


@pytest.mark.parametrize("form", FORMS)
def test_gradient_of_a_method_is_a_difference(form, editor, monkeypatch):
    method, options = FORMS[form]
    assert_gradient(editor, method, [PROMPT], SIZE, monkeypatch, **options)


def test_gradient_of_flat_minima_is_a_difference(editor, monkeypatch):
    """Of J + k |J(x') - J(x' + h s)| on an editor, with s held constant: both gradients are of one draw of noise."""
    J, x = seeded_loss(editor, "tdae", [PROMPT], SIZE, monkeypatch, timesteps=2)
    h, k = 0.3, 0.7
    (g,) = torch.autograd.grad(J(x), x)
    s = -g / g.norm()

    def loss(x):
        return (J(x) + k * (J(x) - J(x + h * s)).abs()).detach()

    found, terms = flatten(lambda x, step: J(x), generators=[], radius=h, weight=k)(x, 0)
    torch.testing.assert_close(found.detach(), loss(x.detach().requires_grad_()))
    (gradient,) = torch.autograd.grad(found, x)
    assert terms["flatness"] > 0 and (gradient - g).abs().max() > 1e-3 * g.abs().max()
    assert_slopes(loss, x.detach(), gradient)


def test_gradient_through_the_blur_is_a_difference(editor, monkeypatch):
    """By the tensor that the loop moves, in the box of picture and budget."""
    J, x = seeded_loss(editor, "diffusionguard", [PROMPT], SIZE, monkeypatch)
    x, given = x.detach().clamp(0, 1), []
    monkeypatch.setattr(blurred, "pgd", lambda pixels, objective, eps, **loop: given.append(objective) or 0 * pixels)
    blurred.descend_blurred(x, lambda pixels, step: J(pixels), 0.03, sigma=0.8)
    u = 0.5 + 0.02 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    u.requires_grad_()
    (gradient,) = torch.autograd.grad(given[0](u, 0), u)
    shaped = blurred.blurred_delta((u - 0.5).detach(), 0.8, 0.03, x)
    assert 0.1 < (shaped.abs() == 0.03).double().mean() < 0.5               # some are clipped
    assert_slopes(lambda u: given[0](u, 0).detach(), u.detach(), gradient)


def test_gradient_of_latent_is_a_difference(tiny_folder, monkeypatch):
    """Of encoders alone, through the resize to each of two working sizes."""
    editor = sifm_min.load_editor(f"latents:{tiny_folder}", device="cpu")
    for space in editor.spaces:
        space.network.double()
    for sizes in ((16,), (24,)):
        assert_gradient(editor, "latent", [], (40, 24), monkeypatch, sizes=sizes)
