"""The editor against diffusers' own pipeline: random-weight folders written by save_pretrained, same seeds, same pictures.

tests/support/small_editors.py makes the folders, and says how their weights are scaled so that agreement means something.
"""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

diffusers = pytest.importorskip("diffusers", reason="the oracle, diffusers, is not installed")
pytest.importorskip("transformers", reason="the oracle's text encoder, transformers, is not installed")

import small_editors  # noqa: E402
from photographs import smooth  # noqa: E402

from sifm_min import editors, images  # noqa: E402
from sifm_min.editors import load_editor  # noqa: E402
from sifm_min.models import checkpoints, schedulers  # noqa: E402

SQUARE, WIDE = (64, 64), (80, 48)                           # (width, height): latents of 8x8, and of 6x10, halved unevenly
RED, HAT = "make the sky red", "add a top hat, 2 of them!"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(config, scheduler) -> (diffusers' pipeline, our editor from the folder it wrote), each made once."""
    tokenizer = small_editors.write_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    made, weights = {}, {}

    def get(config="as published", scheduler="Euler ancestral"):
        if (config, scheduler) not in made:
            if config not in weights:
                weights[config] = small_editors.pipeline(config, tokenizer=tokenizer)
            pipeline = diffusers.StableDiffusionInstructPix2PixPipeline(
                **weights[config].components | {"scheduler": small_editors.SCHEDULERS[scheduler]()},
                requires_safety_checker=False)
            pipeline.set_progress_bar_config(disable=True)
            folder = tmp_path_factory.mktemp("editor")
            pipeline.save_pretrained(folder)
            made[config, scheduler] = pipeline, load_editor(folder, device="cpu")
        return made[config, scheduler]
    return get


@pytest.fixture(scope="module")
def small(folders):
    """The quickest pair."""
    return folders("two levels, short prompts")


def theirs(pipeline, image, prompt, *, seed=0, steps=2, guidance=7.5, image_guidance=1.5, negative_prompt=None):
    """diffusers' edit. A batch gets one generator for each picture, as its documentation advises for reproducibility."""
    batch = isinstance(prompt, list)
    generator = [torch.Generator().manual_seed(seed) for _ in prompt] if batch else torch.Generator().manual_seed(seed)
    found = pipeline(prompt, image, num_inference_steps=steps, guidance_scale=guidance,
                     image_guidance_scale=image_guidance, negative_prompt=negative_prompt, generator=generator).images
    return found if batch else found[0]


def difference(one, other):
    """The differences of two pictures, in steps of 1/255."""
    assert (one.size, one.mode) == (other.size, other.mode) == (one.size, "RGB")
    return np.abs(np.asarray(one, np.int16) - np.asarray(other, np.int16))


def assert_same(ours, oracle):
    """Within 1/255 at every pixel; and equal at nearly all, since what differs is rounding."""
    apart = difference(ours, oracle)
    assert apart.max() <= 1 and (apart > 0).mean() < 0.01, (apart.max(), (apart > 0).mean())


def assert_other(one, other):
    """Plainly another picture: equal ones differ by one step of 255 at the most, anywhere."""
    assert difference(one, other).mean() > 1 and difference(one, other).max() > 4, difference(one, other).mean()


# ----------------------------------------------------------------------------------------------------------- the oracle

@pytest.mark.slow
@pytest.mark.parametrize("scheduler", ["Euler ancestral", "DDIM"])
@pytest.mark.parametrize("config", small_editors.CONFIGS)
def test_edit_is_the_published_pipeline(config, scheduler, folders):
    pipeline, editor = folders(config, scheduler)
    for size, steps, seed in ((SQUARE, 2, 0), (SQUARE, 10, 1), (WIDE, 2, 2), (WIDE, 10, 3)):
        image = smooth(*size)
        edited = editor.edit(image, RED, seed=seed, steps=steps)
        assert_same(edited, theirs(pipeline, image, RED, seed=seed, steps=steps))
        values = np.asarray(edited)
        assert values.std() > 20 and np.isin(values, (0, 255)).mean() < 0.1             # neither flat nor saturated


@pytest.mark.slow
@pytest.mark.parametrize("config", small_editors.CONFIGS)
def test_the_comparison_would_see_what_is_left_out(config, folders):
    """Each input of the edit moves the oracle's picture: an editor that ignored it could not agree."""
    pipeline, _ = folders(config)
    image = smooth(*SQUARE)
    plain = theirs(pipeline, image, RED)
    assert_other(plain, theirs(pipeline, image, HAT))
    assert_other(plain, theirs(pipeline, image, RED, seed=1))
    assert_other(plain, theirs(pipeline, smooth(*SQUARE, seed=1), RED))
    assert_other(plain, theirs(pipeline, image, RED, guidance=4))
    assert_other(plain, theirs(pipeline, image, RED, image_guidance=1))
    assert_other(plain, theirs(pipeline, image, RED, negative_prompt="blue"))


GUIDANCE = {"text alone": (4.0, 1.0), "strong": (9.0, 2.5), "off, by the text's": (1.0, 1.5),
            "off, by the picture's": (7.5, 0.9), "off, by both": (0.5, 0.5)}


@pytest.mark.parametrize("how", GUIDANCE)
def test_guidance_on_and_off(how, small):
    pipeline, editor = small
    guidance, image_guidance = GUIDANCE[how]
    image = smooth(*WIDE, seed=4)
    ours = editor.edit(image, HAT, seed=5, steps=3, guidance=guidance, image_guidance=image_guidance)
    assert_same(ours, theirs(pipeline, image, HAT, seed=5, steps=3, guidance=guidance, image_guidance=image_guidance))
    assert_other(ours, editor.edit(image, HAT, seed=5, steps=3))                        # 7.5 and 1.5
    options = {"steps": 1, "guidance": guidance, "image_guidance": image_guidance}
    unheard = editor.edit(image, HAT, negative_prompt="blue", **options) == editor.edit(image, HAT, **options)
    assert unheard == ("off" in how)                        # without guidance the negative prompt is not used


def test_negative_prompt(folders):
    pipeline, editor = folders()
    image = smooth(*SQUARE)
    ours = editor.edit(image, RED, steps=3, negative_prompt="blue, night")
    assert_same(ours, theirs(pipeline, image, RED, steps=3, negative_prompt="blue, night"))
    assert difference(ours, editor.edit(image, RED, steps=3)).mean() > 1


@pytest.mark.parametrize("prompt", ["", "a " * 90, "ΣΑΣ éà 日本 👍🏽", "<|endoftext|> crown"])
def test_prompts_of_every_kind(prompt, small):
    pipeline, editor = small
    assert_same(editor.edit(smooth(*SQUARE), prompt, steps=2), theirs(pipeline, smooth(*SQUARE), prompt, steps=2))


def test_lists_of_pictures_and_prompts(folders):
    pipeline, editor = folders("three levels, linear projections")
    pictures, prompts = [smooth(*WIDE, seed=1), smooth(*WIDE, seed=2)], [RED, HAT]
    ours = editor.edit(pictures, prompts, seed=3, steps=3)
    for one, other in zip(ours, theirs(pipeline, pictures, prompts, seed=3, steps=3), strict=True):
        assert_same(one, other)


@pytest.mark.slow
@pytest.mark.parametrize("steps", [2, 10])
def test_other_samplers_become_euler_ancestral(steps, folders):
    """InstructPix2Pix's own file names PNDM; everybody, its authors included, edits with Euler ancestral."""
    pipeline, editor = folders("two levels, short prompts", "PNDM")
    stored = pipeline.scheduler
    assert type(stored).__name__ == "PNDMScheduler"
    assert editor.provenance()["scheduler"] == "EulerAncestralDiscreteScheduler"
    assert "PNDMScheduler" in editor.provenance()["scheduler_note"]
    assert "Euler ancestral" in editor.provenance()["scheduler_note"]
    ours = editor.edit(smooth(*SQUARE), RED, steps=steps)
    try:
        pipeline.scheduler = diffusers.EulerAncestralDiscreteScheduler.from_config(stored.config)
        assert_same(ours, theirs(pipeline, smooth(*SQUARE), RED, steps=steps))
    finally:
        pipeline.scheduler = stored
    assert_other(ours, theirs(pipeline, smooth(*SQUARE), RED, steps=steps))


@pytest.mark.slow
def test_the_published_vocabulary(shared, tmp_path):
    folder = tmp_path / "tokenizer"
    shutil.copytree(shared / "data" / "tokenizers" / "sd15_tokenizer", folder)
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(shared / "data" / "tokenizers" / "clip" / name, folder)
    pipeline = small_editors.pipeline("two levels, short prompts", tokenizer=folder)
    pipeline.save_pretrained(tmp_path / "editor")
    editor = load_editor(tmp_path / "editor", device="cpu")
    prompt = "Turn her into a cyborg, 8k!!! it's café-style"
    assert_same(editor.edit(smooth(*SQUARE), prompt, steps=2), theirs(pipeline, smooth(*SQUARE), prompt, steps=2))


# ----------------------------------------------------------------------------------------- sizes, modes, batches, seeds

@pytest.mark.parametrize(("size", "frame"), [((61, 97), (96, 56)), ((700, 300), (216, 512)), ((512, 512), (512, 512)),
                                             ((4000, 3000), (384, 512)), ((513, 37), (32, 512)), ((5, 3), (8, 8)),
                                             ((1, 2000), (512, 8))])
def test_the_working_size(size, frame, small):
    """The long side at most 512, each side floored to a multiple of 8, (height, width); nothing is scaled up."""
    _, editor = small
    assert editor.working_size == 512
    assert editor.frame(*size) == frame
    if max(size) < 1000:
        assert editor.resize(torch.zeros(1, 3, *size[::-1])).shape[2:] == frame


def test_the_working_size_may_be_asked_for(small):
    _, editor = small
    assert editor.frame(700, 300, size=256) == (104, 256)
    assert editor.frame(700, 300, size=1024) == (296, 696)


@pytest.mark.parametrize("size", [(61, 97), (100, 30), (5, 3)])
def test_any_size_in_the_same_size_out(size, small):
    """The published pipeline floors the sides as well, and leaves the result at that; ours is brought back."""
    pipeline, editor = small
    ours = editor.edit(smooth(*size), RED, steps=2)
    assert ours.size == size
    height, width = editor.frame(*size)
    if min(size) >= 8:
        oracle = theirs(pipeline, smooth(*size), RED, steps=2)
        assert oracle.size == (width, height)
        apart = difference(ours, oracle.resize(size, Image.Resampling.LANCZOS))
        assert apart.max() <= 2                             # 1/255 before the resize, which may amplify it


def test_a_large_picture_is_edited_small_and_brought_back(small):
    _, editor = small
    large = smooth(300, 190)
    inner = large.resize((64, 40), Image.Resampling.LANCZOS)
    expected = editor.edit(inner, RED, steps=2).resize((300, 190), Image.Resampling.LANCZOS)
    assert difference(editor.edit(large, RED, steps=2, size=64), expected).max() <= 1


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK"])
def test_pictures_of_other_modes(mode, small):
    _, editor = small
    image = smooth(40, 32).convert(mode)
    edited = editor.edit(image, RED, steps=2)
    assert (edited.mode, edited.size) == ("RGB", (40, 32))
    assert_same(edited, editor.edit(image.convert("RGB"), RED, steps=2))


@pytest.mark.slow
def test_a_batch_gives_what_single_calls_give(small):
    """Also for pictures of several sizes: those of one working size make a batch, and the order of the results is kept."""
    _, editor = small
    pictures = [smooth(48, 40, 1), smooth(33, 70, 2), smooth(50, 41, 3)]
    prompts = [RED, HAT, ""]
    together = editor.edit(pictures, prompts, seed=6, steps=3)
    for i, edited in enumerate(together):
        assert_same(edited, editor.edit(pictures[i], prompts[i], seed=6, steps=3))
    assert [p.size for p in together] == [p.size for p in pictures]


def test_one_picture_or_one_prompt_serves_for_all(small):
    _, editor = small
    image, other = smooth(48, 40, 1), smooth(48, 40, 2)
    by_prompt = editor.edit(image, [RED, HAT], steps=2)
    assert_same(by_prompt[1], editor.edit(image, HAT, steps=2))
    assert_other(*by_prompt)
    by_picture = editor.edit([image, other], RED, steps=2)
    assert_same(by_picture[1], editor.edit(other, RED, steps=2))
    assert isinstance(editor.edit([image], [RED], steps=1), list) and isinstance(editor.edit(image, [RED], steps=1), list)


def test_the_seed_decides_and_nothing_else_does(small):
    _, editor = small
    image = smooth(*SQUARE)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    once = editor.edit(image, RED, seed=1, steps=2)
    assert torch.equal(torch.get_rng_state(), state)        # the caller's stream is left alone
    torch.manual_seed(2)
    assert editor.edit(image, RED, seed=1, steps=2) == once
    assert_other(once, editor.edit(image, RED, seed=2, steps=2))
    assert editor.edit(image, RED, steps=2) == editor.edit(image, RED, seed=0, steps=2)


def test_progress_is_told(small):
    _, editor = small
    told = []
    editor.edit(smooth(16, 16), RED, steps=3, on_step=lambda i, count: told.append((i, count)))
    assert told == [(0, 3), (1, 3), (2, 3)]


@pytest.mark.slow
def test_defaults_are_the_published_ones(small):
    _, editor = small
    assert (editor.defaults.steps, editor.defaults.guidance, editor.defaults.image_guidance) == (100, 7.5, 1.5)
    seen = []
    editor.edit(smooth(16, 16), RED, on_step=lambda i, count: seen.append(count))
    assert seen == [100] * 100
    assert (editors.DEFAULTS["hq-edit"].steps, editors.DEFAULTS["hq-edit"].guidance) == (30, 7.0)


WRONG_CALLS = {
    "more pictures than prompts": (lambda: ([smooth(8, 8)] * 3, [RED] * 2), "3 pictures and 2 prompts"),
    "more prompts than pictures": (lambda: ([smooth(8, 8)] * 2, [RED] * 3), "2 pictures and 3 prompts"),
    "no pictures": (lambda: ([], RED), "at least one picture"),
    "no prompts": (lambda: (smooth(8, 8), []), "at least one"),
    "a path": (lambda: ("photo.png", RED), "PIL"),
    "an array": (lambda: (np.zeros((8, 8, 3), np.uint8), RED), "PIL"),
    "a number": (lambda: (3, RED), "PIL"),
    "a list of paths": (lambda: (["photo.png"], [RED]), "PIL"),
    "prompts that are no text": (lambda: (smooth(8, 8), [3]), "prompt"),
    "no prompt": (lambda: (smooth(8, 8), None), "prompt"),
}


@pytest.mark.parametrize("call", WRONG_CALLS)
def test_a_wrong_call_is_one_sentence(call, small):
    _, editor = small
    arguments, named = WRONG_CALLS[call]
    with pytest.raises(ValueError, match=named) as caught:
        editor.edit(*arguments(), steps=1)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_impossible_numbers_of_steps(steps, small):
    with pytest.raises(ValueError, match="denoising steps"):
        small[1].edit(smooth(8, 8), RED, steps=steps)


# ------------------------------------------------------------------------------------------------- what the methods use

def test_encode_and_decode_are_the_vaes(folders):
    """The condition is the posterior's mean, unscaled; decode undoes the scaling and gives [0,1]."""
    pipeline, editor = folders()
    pixels = torch.rand(2, 3, 48, 80)
    mode = pipeline.vae.encode(2 * pixels - 1).latent_dist.mode()
    condition = editor.encode(pixels)
    torch.testing.assert_close(condition, mode, rtol=0, atol=1e-5 * mode.abs().max().item())
    latent = torch.randn(2, 4, 6, 10)
    decoded = pipeline.vae.decode(latent / pipeline.vae.config.scaling_factor).sample / 2 + 0.5
    torch.testing.assert_close(editor.decode(latent), decoded, rtol=0, atol=1e-5)


def test_context_is_the_pipelines(folders):
    pipeline, editor = folders()
    prompts = [RED, "", HAT]
    expected = pipeline._encode_prompt(prompts, torch.device("cpu"), 1, False)
    torch.testing.assert_close(editor.context(prompts), expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    assert [part.shape for part in editor.contexts(prompts)] == [(1, *expected.shape[1:])] * 3
    torch.testing.assert_close(torch.cat(editor.contexts(prompts)), expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("config", small_editors.CONFIGS)
def test_features_are_what_hooks_find_in_the_pipeline(config, folders):
    """During a real edit of theirs: what goes into their U-Net at one step, and what its modules put out."""
    pipeline, editor = folders(config)
    given, found, handles = {}, {}, []
    taps = [*editor.default_taps, "conv_in", "down_blocks.0.resnets.0", editor.tap_names[-2]]

    def keep(name):
        return lambda module, inputs, output: found.update({name: output[0] if isinstance(output, tuple) else output})

    try:
        for name in taps:
            handles.append(pipeline.unet.get_submodule(name).register_forward_hook(keep(name)))
        handles.append(pipeline.unet.register_forward_pre_hook(
            lambda module, inputs, named: given.update(named, sample=inputs[0], timestep=inputs[1]), with_kwargs=True))
        theirs(pipeline, smooth(*WIDE), RED, steps=2)
    finally:
        for handle in handles:
            handle.remove()
    noisy_latent, condition = given["sample"].chunk(2, dim=1)
    context = given["encoder_hidden_states"]
    # Text and picture, picture alone, neither: so the pipeline orders its three passes.
    torch.testing.assert_close(condition[0], editor.encode(images.to_pixels(smooth(*WIDE)))[0], rtol=0, atol=1e-4)
    assert not condition[2].any() and torch.equal(context[1], context[2])
    ours = editor.features(condition, noisy_latent, given["timestep"], context, taps=[*taps, "out"])
    assert set(ours) == {*taps, "out"}
    for name in taps:
        torch.testing.assert_close(ours[name], found[name], rtol=0, atol=1e-5 * found[name].abs().max().item())
    assert torch.equal(ours["out"], editor.predict(condition, noisy_latent, given["timestep"], context))


def test_default_taps_are_in_the_deep_layers(folders):
    assert list(folders()[1].default_taps) == ["mid_block", "up_blocks.1.attentions.0", "up_blocks.1.attentions.1"]
    for config in small_editors.CONFIGS:
        _, editor = folders(config)
        assert set(editor.default_taps) <= set(editor.tap_names)


def test_one_timestep_for_each_of_a_batch(small):
    _, editor = small
    condition, noise = torch.randn(3, 4, 4, 5), torch.randn(3, 4, 4, 5)
    context, timesteps = editor.context([RED, HAT, ""]), torch.tensor([900, 400, 60])
    noisy = editor.noise_latent(condition, noise, timesteps)
    together = editor.predict(condition, noisy, timesteps, context)
    for i in range(3):
        one = slice(i, i + 1)
        torch.testing.assert_close(noisy[one], editor.noise_latent(condition[one], noise[one], timesteps[one]))
        torch.testing.assert_close(together[one], editor.predict(condition[one], noisy[one], timesteps[one], context[one]),
                                   rtol=0, atol=1e-5)


@pytest.mark.parametrize("scheduler", ["Euler ancestral", "DDIM"])
def test_noise_latent_is_the_training_noise(scheduler, folders):
    """sqrt(abar) z + sqrt(1 - abar) eta, with z scaled as the U-Net was trained; for both samplers."""
    _, editor = folders("two levels, short prompts", scheduler)
    ddpm = diffusers.DDPMScheduler(**small_editors.BETAS)
    condition, noise, timesteps = torch.randn(3, 4, 4, 4), torch.randn(3, 4, 4, 4), torch.tensor([999, 500, 3])
    expected = ddpm.add_noise(0.4 * condition, noise, timesteps)
    torch.testing.assert_close(editor.noise_latent(condition, noise, timesteps), expected, rtol=1e-5, atol=1e-6)


def test_timesteps_are_spread_over_what_is_visited(folders):
    _, editor = folders()
    timesteps = editor.timesteps(10)
    assert timesteps.shape == (10,) and timesteps.dtype == torch.int64
    assert timesteps.tolist() == [999, 894, 788, 683, 577, 472, 366, 261, 155, 50]      # 999 to 50, rounded
    assert (timesteps[0], timesteps[-1]) == (999, 50)
    assert editor.timesteps(2).tolist() == [999, 50]
    assert editor.timesteps(1).shape == (1,) and 50 < editor.timesteps(1).item() < 999
    _, ddim = folders("as published", "DDIM")               # leading spacing, offset 1: 991 is the noisiest of 100 steps
    assert ddim.timesteps(3).tolist() == [991, 520, 50]


@pytest.mark.parametrize("count", [0, -3])
def test_no_timesteps_are_refused(count, small):
    with pytest.raises(ValueError, match="timestep"):
        small[1].timesteps(count)


@pytest.mark.parametrize("size", [(61, 97), (300, 190), (64, 48)])
def test_resize_is_the_filter_of_edit(size, small):
    """The attack differentiates through the same resize that an edit makes before it encodes the picture."""
    _, editor = small
    image = smooth(*size, seed=3)
    height, width = editor.frame(*size, size=128)
    expected = images.to_pixels(image.resize((width, height), Image.Resampling.LANCZOS))
    apart = (editor.resize(images.to_pixels(image), size=128) - expected).abs()
    assert apart.max() <= 1.5 / 255 and apart.mean() < 0.5 / 255        # Pillow rounds to 8 bits after each of two passes


def test_the_gradient_reaches_every_pixel(small):
    """Through the resize and the encoder, and as large as a difference quotient says."""
    _, editor = small
    pixels = images.to_pixels(smooth(45, 61, seed=2)) * 0.8 + 0.1
    weight = torch.randn(1, 4, 7, 5, generator=torch.Generator().manual_seed(0))

    def loss(x):
        return (editor.encode(editor.resize(x)) * weight).sum()

    x = pixels.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(loss(x), x)
    assert gradient.shape == pixels.shape and (gradient != 0).float().mean() > 0.99
    direction = gradient.sign() * 2e-3
    quotient = (loss(pixels + direction) - loss(pixels - direction)) / 2
    assert quotient.item() == pytest.approx((gradient * direction).sum().item(), rel=0.02)


def test_the_gradient_passes_through_a_whole_edit(small):
    _, editor = small
    pixels = images.to_pixels(smooth(32, 32)).requires_grad_(True)
    (gradient,) = torch.autograd.grad(editor.sample(pixels, [RED], seeds=[0], steps=2).square().mean(), pixels)
    assert gradient.abs().max() > 0
    assert not any(p.requires_grad for network in (editor.unet, editor.vae, editor.text_encoder)
                   for p in network.parameters())


@pytest.mark.slow
def test_half_precision_is_the_u_nets_and_the_texts_alone(small):
    _, editor = small
    half = load_editor(editor.checkpoint.folder, device="cpu", dtype=torch.bfloat16)
    assert (half.dtype, half.vae_dtype, half.provenance()["dtype"]) == (torch.bfloat16, torch.float32, "bfloat16")
    condition = half.encode(torch.rand(1, 3, 16, 16))
    noisy = half.noise_latent(condition, torch.randn(1, 4, 2, 2), torch.tensor([300]))
    assert condition.dtype == noisy.dtype == torch.float32
    assert half.predict(condition, noisy, torch.tensor([300]), half.context([RED])).dtype == torch.bfloat16
    for scheduler in ("", "DDIM"):
        half.scheduler = editor.scheduler if not scheduler else schedulers.load(json.dumps(
            {"_class_name": "DDIMScheduler", **small_editors.BETAS, "clip_sample": False}))
        single = load_editor(editor.checkpoint.folder, device="cpu")
        single.scheduler = half.scheduler
        one, other = (e.edit(smooth(*SQUARE), RED, steps=2, guidance=2) for e in (half, single))
        assert difference(one, other).mean() < 5            # another prompt's picture is more than 20 away


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_vae_of_half_precision_adds_up_in_single(small, dtype):
    _, single = small
    half = load_editor(single.checkpoint.folder, device="cpu", vae_dtype=dtype)
    assert (half.dtype, half.vae_dtype, half.provenance()["vae_dtype"]) == (torch.float32, dtype, str(dtype).split(".")[1])
    assert single.provenance()["vae_dtype"] == "float32"
    pixels, gradients = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)), []
    for editor in (single, half):
        x = pixels.clone().requires_grad_(True)
        condition = editor.encode(x)
        assert condition.dtype == editor.decode(condition).dtype == torch.float32
        gradients.append(torch.autograd.grad(condition.square().sum(), x)[0].flatten())
    assert half.vae.encoder.conv_in.weight.dtype == dtype and gradients[1].dtype == torch.float32
    assert 0.99 < torch.cosine_similarity(*gradients, dim=0) < 1
    one, other = (editor.edit(smooth(*SQUARE), RED, steps=2, guidance=2) for editor in (half, single))
    assert 0 < difference(one, other).mean() < 2


# -------------------------------------------------------------------------------------------------------------- loading

def test_provenance_says_what_was_loaded(small):
    _, editor = small
    told = editor.provenance()
    assert told["source"] == str(editor.checkpoint.folder) and told["revision"] is None
    assert set(told["weights"]) == {"unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors",
                                    "text_encoder/model.safetensors"}
    assert all(len(digest) == 64 for digest in told["weights"].values())
    assert (told["scheduler"], told["scheduler_note"], told["dtype"], told["device"]) == (
        "EulerAncestralDiscreteScheduler", "", "float32", "cpu")
    json.dumps(told)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["instruct-pix2pix", "hq-edit"])
def test_known_names_sample_with_euler_ancestral(name, folders, monkeypatch):
    _, stored = folders("two levels, short prompts", "DDIM")
    assert stored.provenance()["scheduler"] == "DDIMScheduler" and stored.provenance()["scheduler_note"] == ""
    asked = []

    def local(source, **options):
        asked.append((source, options))
        return checkpoints.Checkpoint(stored.checkpoint.folder, "a/hub", "c0ffee", stored.checkpoint.files,
                                      known=checkpoints.EDITORS[name])

    monkeypatch.setattr(checkpoints, "open_checkpoint", local)
    editor = load_editor(name, device="cpu", revision="main", offline=True)
    assert asked == [(name, {"revision": "main", "offline": True, "t5": True, "rest": None})]
    told = editor.provenance()
    assert told["scheduler"] == "EulerAncestralDiscreteScheduler" and "DDIMScheduler" in told["scheduler_note"]
    assert (told["name"], told["source"], told["revision"]) == (name, "a/hub", "c0ffee")
    assert editor.defaults == editors.DEFAULTS[name] and editor.defaults.size == 512
    reference, _ = folders("two levels, short prompts")     # the same weights, saved with Euler ancestral
    guidance = editor.defaults.guidance
    assert_same(editor.edit(smooth(*SQUARE), RED, steps=3), theirs(reference, smooth(*SQUARE), RED, steps=3, guidance=guidance))


@pytest.fixture
def folder(small, tmp_path):
    """A copy of a good folder, to be spoiled."""
    return shutil.copytree(small[1].checkpoint.folder, tmp_path / "editor")


def change(path, **values):
    given = json.loads(path.read_text())
    path.write_text(json.dumps(given | values))


def without_tensor(folder, part, gone):
    path = folder / part / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor for name, tensor in load_file(path).items() if name != gone}, path)


SPOILED = {
    "another pipeline": (lambda f: change(f / "model_index.json", _class_name="StableDiffusionXLPipeline"),
                         "StableDiffusionXLPipeline.*StableDiffusionInstructPix2PixPipeline"),
    "no U-Net": (lambda f: shutil.rmtree(f / "unet"), "unet"),
    "no weights": (lambda f: (f / "unet" / "diffusion_pytorch_model.safetensors").unlink(), "unet"),
    "a missing tensor": (lambda f: without_tensor(f, "unet", "conv_out.bias"), "missing conv_out.bias"),
    "a VAE of other width": (lambda f: change(f / "vae" / "config.json", block_out_channels=[8, 8, 12, 12]), "vae"),
    "text of other width": (lambda f: change(f / "text_encoder" / "config.json", hidden_size=20), "text_encoder"),
    "an index that is no JSON": (lambda f: (f / "model_index.json").write_text("{"), "model_index.json"),
}


@pytest.mark.parametrize("how", SPOILED)
def test_a_folder_that_does_not_fit_is_one_sentence(how, folder):
    spoil, named = SPOILED[how]
    load_editor(folder, device="cpu")
    spoil(folder)
    with pytest.raises((ValueError, checkpoints.Unavailable), match=named) as caught:
        load_editor(folder, device="cpu")
    assert "\n" not in str(caught.value)


def test_a_text_to_image_u_net_is_refused(small, folder):
    """Stable Diffusion's own U-Net, 4 channels in: it cannot see the picture. Also without a model_index.json."""
    pipeline, _ = small
    torch.manual_seed(0)
    diffusers.UNet2DConditionModel.from_config(pipeline.unet.config, in_channels=4).save_pretrained(folder / "unet")
    (folder / "model_index.json").unlink()
    with pytest.raises(ValueError, match="takes 4 channels; an instruction editor takes 8"):
        load_editor(folder, device="cpu")


def test_networks_that_do_not_belong_together_are_refused(folders, folder):
    other, _ = folders("as published")
    shutil.rmtree(folder / "text_encoder")
    other.text_encoder.save_pretrained(folder / "text_encoder")
    with pytest.raises(ValueError, match="attends to 16 channels of text, the text encoder has 24"):
        load_editor(folder, device="cpu")


@pytest.mark.slow
def test_a_folder_without_an_index_is_taken_for_what_it_holds(folder):
    (folder / "model_index.json").unlink()
    assert load_editor(folder, device="cpu").edit(smooth(16, 16), RED, steps=1).size == (16, 16)


@pytest.mark.slow
def test_a_shipped_editor_carries_its_defaults_and_its_notice(folder):
    change(folder / "model_index.json", _sifm_min={
        "defaults": {"steps": 20, "guidance": 3.0, "image_guidance": 1.2, "size": 64}, "notice": "Only a toy."})
    editor = load_editor(folder, device="cpu")
    assert (editor.defaults.steps, editor.defaults.guidance, editor.defaults.image_guidance) == (20, 3.0, 1.2)
    assert editor.working_size == 64 and editor.notice == editor.provenance()["notice"] == "Only a toy."
    assert editor.frame(33, 20) == (32, 64) and editor.frame(640, 640) == (64, 64)      # smaller pictures are scaled up
    assert_same(editor.edit(smooth(64, 64), RED), editor.edit(smooth(64, 64), RED, steps=20, guidance=3, image_guidance=1.2))


def test_a_name_that_is_none_is_one_sentence():
    with pytest.raises(ValueError, match="'instructpix2pix' is neither a known editor .*instruct-pix2pix") as caught:
        load_editor("instructpix2pix", device="cpu")
    assert "\n" not in str(caught.value)
