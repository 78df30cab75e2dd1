"""On a pretended CUDA device: what a step reads and copies, precision, memory that ends, and which rank runs where."""

import json
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from pretended_gpu import PretendedGPU

import sifm_min
from sifm_min import cli, edit, evaluate, images, immunize, memory
from sifm_min.editors import precision
from sifm_min.experiments import workers
from sifm_min.files import weight_digests
from sifm_min.models import checkpoints

METHODS = {"sifm": {"timesteps": 2}, "photoguard-encoder": {}, "photoguard-diffusion": {"unroll": 2, "resample": False},
           "editshield": {}, "semantic-attack": {"timesteps": 2}, "sds": {}, "mist": {}, "ace": {},
           "danp": {"timesteps": 2}, "diffusionguard": {}, "tdae": {"timesteps": 2},
           "sifm-output": {"timesteps": 2}}


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

@pytest.mark.slow
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


@pytest.mark.parametrize("options", [{"method": "tdae", "timesteps": 1, "budget": "texture"}, {"blur": 1.0, "timesteps": 1},
                                     {"timesteps": 1, "budget": "texture", "editors": 2}], ids=str)
def test_mask_and_texture_budget_meet_the_picture_on_its_device(options, gpu, tiny_folder, tmp_path):
    """Both are read on the CPU."""
    mask = Image.new("L", picture().size)
    mask.paste(255, (0, 0, 20, 32))
    mask.save(tmp_path / "mask.png")
    options = dict(options)
    editors = [sifm_min.load_editor(tiny_folder, device="cuda", dtype=torch.float32) for _ in range(options.pop("editors", 1))]
    result = sifm_min.immunize(picture(), editors, "make it night", steps=2, mask=tmp_path / "mask.png", **options)
    assert result.report["linf_steps"] > 0


@pytest.mark.slow
def test_a_step_of_sifm_sends_nothing_new(gpu):
    editor = sifm_min.load_editor("miniature-sd3", device="cuda", dtype=torch.float32)
    sent = []
    sifm_min.immunize(picture(150, 100), editor, "night", steps=3, timesteps=2, on_step=lambda *step: (
        sent.append({**gpu.sent, **gpu.copies}), gpu.forget()))
    assert sent[0] and sent[1:] == [{}, {}]


@pytest.mark.slow
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
    plain, scaled = network(x.to(dtype)).float(), precision.in_dtype(dtype, network, x)
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
        outputs = precision.in_dtype(torch.float16, network, x)
        a, b = outputs.values() if isinstance(outputs, dict) else outputs
        (gradient,) = torch.autograd.grad(1e-9 * a.sum() + 1e-7 * b.sum(), x)
        assert torch.allclose(gradient, 2e-9 + 2e-7 * x.detach(), rtol=2e-3, atol=1e-11)
    (gradient,) = torch.autograd.grad(0 * precision.in_dtype(torch.float16, torch.exp, x).sum(), x)
    assert torch.equal(gradient, torch.zeros(9))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sifm", "photoguard-encoder", "photoguard-diffusion", "semantic-attack", "mist", "ace",
                                    "danp", "diffusionguard"])
def test_float16_signs_agree_with_float32(method, tiny_folder, monkeypatch):
    """The gradient of every method, its loss made as small as that of a large picture."""
    def signs(dtype):
        editor = sifm_min.load_editor(tiny_folder, device="cpu", dtype=dtype, vae_dtype=dtype)
        pixels = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        options = {"prompts": ["night"]} if method in ("semantic-attack", "danp") else {}
        objective = sifm_min.METHODS[method](editor, pixels, editor.contexts(["night"]), **options, **METHODS[method],
                                             generator=torch.Generator().manual_seed(1))
        noise = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(2))
        x = (pixels + 0.03 * noise.sign()).clamp(0, 1).requires_grad_()
        loss = objective(x, 0)
        return torch.autograd.grad(1e-6 * (loss[0] if isinstance(loss, tuple) else loss), x)[0].sign()

    assert (signs(torch.float16) == signs(torch.float32)).float().mean() >= 0.98


@pytest.mark.parametrize(("capability", "dtype"), [((9, 0), torch.bfloat16), ((8, 0), torch.bfloat16), ((7, 5), torch.float16)])
def test_the_card_decides_the_default_dtype(capability, dtype, tiny_folder):
    with PretendedGPU(capability=capability):
        assert sifm_min.load_editor(tiny_folder).dtype == dtype


@pytest.mark.slow
def test_float32_is_not_tf32_inside_an_edit_and_a_step(gpu, tiny_folder, monkeypatch):
    editor = sifm_min.load_editor(tiny_folder, device="cuda", dtype=torch.float32)
    seen, encode = [], editor.vae.encode
    monkeypatch.setattr(editor.vae, "encode", lambda pixels: seen.append(tf32()) or encode(pixels))

    def tf32():
        conv = getattr(torch.backends.cudnn, "conv", None)
        return conv.fp32_precision if conv else torch.backends.cudnn.allow_tf32

    before = tf32()
    editor.edit(picture(), "night")
    sifm_min.immunize(picture(), editor, "night", steps=1, timesteps=1)
    assert set(seen) in ({"ieee"}, {False}) and tf32() == before not in seen


# -------------------------------------------------------------------------------------------------------------- which device

@pytest.mark.slow
def test_an_indexed_device_is_used_from_the_first_call(gpu, tiny_folder):
    editor = sifm_min.load_editor(tiny_folder, device="cuda:0", dtype=torch.float32)
    report = sifm_min.immunize(picture(), editor, "night", steps=1, timesteps=1).report
    assert report["peak_memory_bytes"] > 10_000
    assert report["cpu_kernels"] is None


@pytest.mark.parametrize(("asked", "local", "cards", "device"), [
    (None, "1", 2, "cuda:1"), ("cuda", "1", 2, "cuda:1"), ("cuda", "3", 2, "cuda:1"), (None, "2", 1, "cuda:0"),
    ("cpu", "1", 2, "cpu"), (None, "1", 0, None), ("cuda", None, 2, "cuda")])
def test_each_rank_takes_its_own_card(asked, local, cards, device, monkeypatch, recwarn):
    for name, value in (("LOCAL_RANK", local), ("LOCAL_WORLD_SIZE", "4")):
        monkeypatch.setenv(name, value) if local else monkeypatch.delenv(name, raising=False)
    with PretendedGPU(cards=cards):
        assert cli.place(SimpleNamespace(device=asked))["device"] == device
    shared = local and device not in ("cpu", None) and int(local) >= cards
    assert [str(w.message)[:22] for w in recwarn if "torchrun" in str(w.message)] == ["torchrun started more "] * bool(shared)


def test_ranks_that_would_share_one_named_card_are_refused(gpu, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="torchrun started 2 processes, and all would share this GPU; leave the option out"):
        cli.place(SimpleNamespace(device="cuda:0"))


# ---------------------------------------------------------------------------------------------------------- memory that ends

@pytest.mark.parametrize("message", [
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED", "CUDA error: out of memory",
    "MPS backend out of memory", "HIP out of memory. Tried to allocate"])
def test_every_library_s_form_of_no_memory_counts(message):
    assert memory.is_short(RuntimeError(message))
    assert not memory.is_short(RuntimeError("CUDNN_STATUS_BAD_PARAM")) and not memory.is_short(ValueError(message))


def fails_where(gpu, condition):
    """Let every operation on the card fail for which condition(name, tensors) holds."""
    def before(name, tensors):
        if condition(name, tensors):
            raise torch.OutOfMemoryError("CUDA out of memory")
    gpu.before = before


@pytest.mark.slow
@pytest.mark.parametrize("source", ["tiny", "miniature-sd3"])
def test_text_encoders_that_do_not_fit_run_on_the_cpu(source, gpu, tiny_folder):
    source = tiny_folder if source == "tiny" else source
    editor = sifm_min.load_editor(source, device="cuda", dtype=torch.float32)
    expected = sifm_min.load_editor(source, device="cpu").context(["make it night"])
    fails_where(gpu, lambda name, tensors: name == "embedding")
    with pytest.warns(UserWarning, match="out of memory with text_encoder.* on cuda.*; it runs on the CPU"):
        found = editor.context(["make it night"])
    parts = zip(*([each] if isinstance(each, torch.Tensor) else each for each in (found, expected)), strict=True)
    for ours, theirs in parts:
        assert ours.is_cuda and torch.allclose(ours.cpu(), theirs, atol=1e-5)


@pytest.mark.slow
def test_text_that_fits_nowhere_is_the_documented_error(gpu, tiny_folder, monkeypatch):
    editor = sifm_min.load_editor(tiny_folder, device="cuda", dtype=torch.float32)

    def nowhere(self, ids):
        raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")

    monkeypatch.setattr("sifm_min.models.clip.CLIPText.forward", nowhere)
    with pytest.warns(UserWarning, match="on the CPU"), pytest.raises(ValueError, match="out of memory; .*--no-t5"):
        sifm_min.immunize(picture(), editor, "night", steps=1)


@pytest.mark.slow
def test_an_edit_that_does_not_fit_takes_one_pass_at_a_time(gpu, tiny_folder):
    editor = sifm_min.load_editor(tiny_folder, device="cuda", dtype=torch.float32)
    whole = editor.edit([picture()] * 2, "make it night")
    widths = []

    def convolves(name, tensors):
        if name == "convolution" and tensors[0].shape[1] == 8 and tensors[1].shape == (8, 8, 3, 3):
            widths.append(len(tensors[0]))
            return len(tensors[0]) > 1

    fails_where(gpu, convolves)
    with pytest.warns(UserWarning, match="out of memory with everything at once; going on with one picture and one pass"):
        small = editor.edit([picture()] * 2, "make it night")
    for one, other in zip(small, whole, strict=True):
        difference = (images.to_pixels(one) - images.to_pixels(other)).abs().max().item()
        assert difference <= 1.01 / 255
    assert widths[0] == 6 and set(widths[1:]) == {1}
    widths.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        editor.edit([picture(), picture()], "make it night")
    assert set(widths) == {1}                                # remembered
    fails_where(gpu, lambda name, tensors: name == "convolution")
    with pytest.raises(ValueError, match="out of memory with one picture and one pass .* may help"):
        editor.edit(picture(), "make it night")


@pytest.mark.slow
def test_a_plan_that_did_not_fit_is_not_tried_again(gpu, tiny_folder):
    editor = sifm_min.load_editor(tiny_folder, device="cuda", dtype=torch.float32)
    batches = []

    def too_many(name, tensors):
        if name == "convolution" and tensors[0].shape[1] == 8 and tensors[1].shape == (8, 8, 3, 3):
            batches.append(len(tensors[0]))
            return len(tensors[0]) > 1

    fails_where(gpu, too_many)
    with pytest.warns(UserWarning, match="going on with one timestep at a time"):
        sifm_min.immunize(picture(), editor, "night", steps=1, timesteps=4)
    assert {1, 2, 4} == set(batches)
    batches.clear()
    sifm_min.immunize(picture(64, 64), editor, "night", steps=1, timesteps=4)
    assert set(batches) == {1}
    batches.clear()
    with pytest.warns(UserWarning, match="out of memory"):   # a smaller picture may fit
        sifm_min.immunize(picture(40, 24), editor, "night", steps=1, timesteps=4)
    assert 4 in batches


# ------------------------------------------------------------------------------------------------------------------- digests

@pytest.fixture
def hashed(monkeypatch):
    """The files that are hashed, those under 64 MiB too."""
    files = []
    monkeypatch.setattr(weight_digests, "LARGE", 0)
    for module in (weight_digests, checkpoints):
        monkeypatch.setattr(module, "sha256", lambda file, real=checkpoints.sha256: files.append(Path(file)) or real(file))
    return files


@pytest.mark.slow
@pytest.mark.parametrize("command", [immunize, edit])
def test_large_weights_are_hashed_once_for_all_runs(tmp_path, tiny_folder, hashed, command):
    picture().save(tmp_path / "a.png")
    out = tmp_path / "out"
    argv = [str(tmp_path / "a.png"), "--prompt", "night", "-o", str(out), "--editor", str(tiny_folder), "--steps", "1",
            "--device", "cpu"]

    def weights():
        return [file for file in hashed if file.suffix == ".safetensors"]
    assert command.main(argv) == 0 and len(weights()) == len(set(weights())) == 3
    report = json.loads((out / ("a.json" if command is immunize else "a_edited.json")).read_text())
    assert {checkpoints.sha256(tiny_folder / name): name for name in report["editor"]["weights"]} == {
        digest: name for name, digest in report["editor"]["weights"].items()}
    hashed.clear()
    assert command.main(argv) == 0 and weights() == []                         # nothing to do, and nothing hashed
    file = next(tiny_folder.glob("unet/*.safetensors"))
    os.utime(file, ns=2 * (time.time_ns(),))                 # touched: it may be another
    assert command.main(argv) == 0 and [path.name for path in weights()] == [file.name]
    (out / weight_digests.NAME).write_text("{")
    assert weight_digests.Digests(out)(file) == checkpoints.sha256(file)


def test_a_rank_without_pictures_hashes_no_weights(tmp_path, tiny_folder, hashed, monkeypatch):
    picture().save(tmp_path / "a.png")
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert immunize.main([str(tmp_path / "a.png"), "--prompt", "night", "-o", str(tmp_path / "out"), "--device", "cpu",
                          "--editor", str(tiny_folder)]) == 0 and hashed == []


@pytest.mark.slow
def test_an_experiment_hashes_weights_once_for_all_runs(tmp_path, tiny_folder, hashed, monkeypatch):
    argv = ["run", "white-box", "--editor", str(tiny_folder), "--images", "1", "--methods", "photoguard-encoder",
            "--steps", "1", "--edit-steps", "2", "--jobs", "1", "-o", str(tmp_path / "out"), "--quiet"]
    monkeypatch.setattr(workers, "rounds", lambda suite, editors: list(editors))     # an editor that is loaded twice
    assert evaluate.main(argv) == 0 and len(hashed) == len(set(hashed)) == 3
    assert evaluate.main(argv) == 0 and len(hashed) == 3
    assert evaluate.main([*argv[:-3], "-o", str(tmp_path / "other"), "--quiet"]) == 0 and len(hashed) == 6


@pytest.mark.slow
def test_processes_that_start_together_hash_once(tmp_path):
    (tmp_path / "weights").write_bytes(bytes(1 << 20))
    code = ("import sys, time; from sifm_min.files import weight_digests as kept; kept.LARGE = 0; own = kept.sha256\n"
            "def slow(file): open(sys.argv[1] + '/hashed', 'a').write('x'); time.sleep(1); return own(file)\n"
            "kept.sha256 = slow; print(kept.Digests(sys.argv[1])(sys.argv[1] + '/weights'))")
    started = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], text=True, stdout=subprocess.PIPE,
                                cwd=Path(__file__).resolve().parents[1]) for _ in range(3)]
    found = {process.communicate()[0] for process in started}
    assert found == {checkpoints.sha256(tmp_path / "weights") + "\n"} and (tmp_path / "hashed").read_text() == "x"
