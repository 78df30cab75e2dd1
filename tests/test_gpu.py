"""On a pretended CUDA device: what a step reads and copies, precision, memory that ends, and which rank runs where."""

import pytest
import torch
from PIL import Image
from pretended_gpu import PretendedGPU

import sifm_min
from sifm_min.editors import half

METHODS = {"sifm": {"timesteps": 2}, "photoguard-encoder": {}, "photoguard-diffusion": {"unroll": 2, "resample": False},
           "editshield": {}, "semantic-attack": {"timesteps": 2}, "sds": {}, "mist": {}, "ace": {}}


@pytest.fixture
def gpu():
    with PretendedGPU() as device:
        yield device


def picture(width=40, height=32):
    pixels = torch.rand(height, width, 3, generator=torch.Generator().manual_seed(0)).mul(255).byte().numpy()
    return Image.fromarray(pixels)


# --------------------------------------------------------------------------------------------------- the double is strict

@pytest.mark.parametrize(("call", "error"), [
    (lambda x: x + torch.ones(3), "at least two devices, cuda:0 and cpu"),
    (lambda x: torch.randn(3, device="cuda", generator=torch.Generator()), "for generator but found 'cpu'"),
    (lambda x: x.numpy(), "copy the tensor to host"),
    (lambda x: torch.zeros(2, device="cuda:1"), "invalid device ordinal"),
    (lambda x: torch.zeros(3)[x.long()], "indices should be either on cpu"),
    (lambda x: torch.zeros(10_000, device="cuda"), "CUDA out of memory")])
def test_the_double_refuses_what_cuda_refuses(call, error, gpu):
    x = torch.ones(3, device="cuda")
    gpu.limit = 20_000
    with pytest.raises((RuntimeError, TypeError), match=error):
        call(x)


def test_the_double_counts_reads_copies_and_memory(gpu):
    x = torch.arange(4.0).to("cuda")
    assert (x.device, x.is_cuda, x.cpu().tolist()) == (torch.device("cuda:0"), True, [0, 1, 2, 3])
    assert sum(gpu.copies.values()) == 1 and sum(gpu.reads.values()) == 1
    gpu.forget()
    y = x.requires_grad_() * 2
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert gradient.is_cuda and not gpu.reads and not gpu.copies
    before = gpu.live
    more = torch.zeros(1000, device="cuda")
    assert gpu.live == before + 4000 == gpu.peak
    del more
    assert gpu.live == before
    if y.sum() > 5:
        assert sum(gpu.reads.values()) == 1
    assert torch.ones(2).pin_memory().to("cuda", non_blocking=True).is_cuda and sum(gpu.sent.values()) == 1
    assert not gpu.copies


def test_the_double_leaves_torch_as_it_was():
    before = torch.autograd.grad, torch.cuda.is_available, torch.cuda.init
    with PretendedGPU():
        assert torch.cuda.is_available() and torch.cuda.is_available != before[1]
    assert (torch.autograd.grad, torch.cuda.is_available, torch.cuda.init) == before


# ------------------------------------------------------------------------------------------------------------ inside a step

@pytest.mark.parametrize("method", METHODS)
def test_a_step_reads_the_device_once_and_copies_nothing(method, gpu, tiny_folder):
    editor = sifm_min.load_editor(tiny_folder, device="cuda", dtype=torch.float32)
    seen = []

    def on_step(step, loss, terms):
        assert isinstance(loss, float) and all(isinstance(value, float) for value in terms.values())
        seen.append((sum(gpu.reads.values()), dict(gpu.copies)))
        gpu.forget()

    sifm_min.immunize(picture(), editor, "make it night", method=method, steps=4, on_step=on_step, **METHODS[method])
    assert seen[1:] == [(1, {})] * 3, seen


def test_a_step_of_sifm_sends_nothing_new(gpu):
    editor = sifm_min.load_editor("miniature-sd3", device="cuda", dtype=torch.float32)
    sent = []
    sifm_min.immunize(picture(150, 100), editor, "night", steps=3, timesteps=2, on_step=lambda *step: (
        sent.append({**gpu.sent, **gpu.copies}), gpu.forget()))
    assert sent[0] and sent[1:] == [{}, {}]


def test_an_edit_reads_only_its_result(gpu, tiny_folder):
    editor = sifm_min.load_editor(tiny_folder, device="cuda", dtype=torch.float32)
    editor.edit(picture(), "make it night")
    gpu.forget()
    editor.edit(picture(), "make it night", on_step=lambda i, n: gpu.reads and pytest.fail(str(gpu.reads)))
    assert sum(gpu.reads.values()) == 2                      # whether it is finite, and the picture
    assert sum(gpu.copies.values()) == 2                     # the picture and the prompt's tokens


# ------------------------------------------------------------------------------------------------------------- half precision

def gradients(dtype, loss):
    """Through a block of many activations in a dtype, with and without `in_dtype`."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Conv2d(4, 64, 3, padding=1), torch.nn.SiLU(), torch.nn.Conv2d(64, 64, 3, padding=1))
    network.to(dtype).requires_grad_(False)
    x = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
    plain, scaled = network(x.to(dtype)).float(), half.in_dtype(dtype, network, x)
    assert torch.equal(plain, scaled.float()) and scaled.dtype == (torch.float32 if dtype == torch.float16 else dtype)
    return [torch.autograd.grad(loss(y.float()), x)[0] for y in (plain, scaled)]


@pytest.mark.parametrize("size", [1e-9, 1e-6, 1.0, 1e6], ids=str)
def test_float16_keeps_small_and_large_gradients(size):
    truth, _ = gradients(torch.float32, lambda y: size * y.square().mean())
    plain, scaled = gradients(torch.float16, lambda y: size * y.square().mean())
    assert scaled.dtype == torch.float32 and (scaled - truth).norm() < 5e-3 * truth.norm()
    if size < 1e-5:
        assert (plain - truth).norm() > 0.1 * truth.norm()   # without the scale they round to nothing


def test_one_scale_suits_several_outputs():
    x = torch.linspace(-1, 1, 9).requires_grad_()
    for network in (lambda x: {"a": 2 * x, "b": x * x}, lambda x: (2 * x, x * x)):
        outputs = half.in_dtype(torch.float16, network, x)
        a, b = outputs.values() if isinstance(outputs, dict) else outputs
        (gradient,) = torch.autograd.grad(1e-9 * a.sum() + 1e-7 * b.sum(), x)
        assert torch.allclose(gradient, 2e-9 + 2e-7 * x.detach(), rtol=2e-3, atol=1e-11)
    (gradient,) = torch.autograd.grad(0 * half.in_dtype(torch.float16, torch.exp, x).sum(), x)
    assert torch.equal(gradient, torch.zeros(9))


@pytest.mark.parametrize("method", ["sifm", "photoguard-encoder", "photoguard-diffusion", "semantic-attack", "mist", "ace"])
def test_float16_signs_agree_with_float32(method, tiny_folder, monkeypatch):
    """The gradient of every method, its loss made as small as that of a large picture."""
    def signs(dtype):
        editor = sifm_min.load_editor(tiny_folder, device="cpu", dtype=dtype, vae_dtype=dtype)
        pixels = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        options = {"prompts": ["night"]} if method == "semantic-attack" else {}
        objective = sifm_min.METHODS[method](editor, pixels, editor.contexts(["night"]), **options, **METHODS[method],
                                             generator=torch.Generator().manual_seed(1))
        noise = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(2))
        x = (pixels + 0.03 * noise.sign()).clamp(0, 1).requires_grad_()
        loss = objective(x, 0)
        return torch.autograd.grad(1e-6 * (loss[0] if isinstance(loss, tuple) else loss), x)[0].sign()

    assert (signs(torch.float16) == signs(torch.float32)).float().mean() >= 0.98
