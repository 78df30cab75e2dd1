"""The gradient of a method's objective against central differences, in float64."""

import torch

import sifm_min


def assert_gradient(editor, method, prompts, size, monkeypatch, *, step=1e-5, **options):
    """The gradient at a random picture agrees with central differences along three random directions.

    editor: in float64. size: (height, width). Noise is the same at every call: the generator begins anew.
    """
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)         # which objectives sum in
    generator, seeds = torch.Generator(), torch.Generator().manual_seed(5)
    x_orig = torch.rand(1, 3, *size, generator=seeds, dtype=torch.float64)
    x = (x_orig + 0.05 * torch.randn(x_orig.shape, generator=seeds, dtype=torch.float64)).requires_grad_()
    contexts = editor.contexts(prompts)
    objective = sifm_min.METHODS[method](editor, x_orig, contexts, generator=generator.manual_seed(0), **options)
    state = generator.get_state()

    def value(pixels):
        generator.set_state(state)
        loss = objective(pixels, 0)
        return loss[0] if isinstance(loss, tuple) else loss

    (gradient,) = torch.autograd.grad(value(x), x)
    assert gradient.dtype == torch.float64
    for _ in range(3):
        along = torch.randn(x.shape, generator=seeds, dtype=torch.float64)
        along = along * gradient.abs() / gradient.abs().max()               # where the picture matters
        with torch.enable_grad():                                           # objectives differentiate by the latent
            slope = (value(x.detach() + step * along) - value(x.detach() - step * along)) / (2 * step)
        expected = (gradient * along).sum()
        assert expected.abs() > 1e-8
        assert (slope - expected).abs() <= 1e-4 * expected.abs(), (slope.item(), expected.item())
