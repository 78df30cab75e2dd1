"""The gradient of a method's objective against central differences, in float64."""

import torch

import sifm_min
from sifm_min.methods import parameters_of


def assert_gradient(editor, method, prompts, size, monkeypatch, *, step=1e-5, **options):
    """The gradient at a random picture agrees with central differences along three random directions.

    editor: in float64. size: (height, width). Noise is the same at every call: the generator begins anew.
    """
    value, x = seeded_loss(editor, method, prompts, size, monkeypatch, **options)
    (gradient,) = torch.autograd.grad(value(x), x)
    assert gradient.dtype == torch.float64
    assert_slopes(lambda pixels: value(pixels).detach(), x.detach(), gradient, step)


def seeded_loss(editor, method, prompts, size, monkeypatch, **options):
    """(a method's loss as a function of pixels alone, a random picture (1,3,H,W) that needs a gradient), in float64."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)         # which objectives sum in
    generator, seeds = torch.Generator(), torch.Generator().manual_seed(5)
    x_orig = torch.rand(1, 3, *size, generator=seeds, dtype=torch.float64)
    x = (x_orig + 0.05 * torch.randn(x_orig.shape, generator=seeds, dtype=torch.float64)).requires_grad_()
    texts = {"prompts": prompts} if "prompts" in parameters_of(method) else {}
    objective = sifm_min.METHODS[method](editor, x_orig, editor.contexts(prompts), generator=generator.manual_seed(0), **texts,
                                         **options)
    state = generator.get_state()

    def value(pixels):
        generator.set_state(state)
        loss = objective(pixels, 0)
        return loss[0] if isinstance(loss, tuple) else loss

    return value, x


def assert_slopes(value, x, gradient, step=1e-5):
    """The gradient of `value` at x agrees with central differences along three random directions."""
    seeds = torch.Generator().manual_seed(6)
    for _ in range(3):
        along = torch.randn(x.shape, generator=seeds, dtype=torch.float64)
        along = along * gradient.abs() / gradient.abs().max()               # where the picture matters
        with torch.enable_grad():                                           # objectives differentiate by the latent
            slope = (value(x + step * along) - value(x - step * along)) / (2 * step)
        expected = (gradient * along).sum()
        assert expected.abs() > 1e-8
        assert (slope - expected).abs() <= 1e-4 * expected.abs(), (slope.item(), expected.item())
