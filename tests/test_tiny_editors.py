"""Editors whose `vae/` is an AutoencoderTiny, against diffusers' pipelines with the same: equal pictures from equal seeds."""

import json

import numpy as np
import pytest
import torch

diffusers = pytest.importorskip("diffusers", reason="the oracle, diffusers, is not installed")
pytest.importorskip("transformers", reason="the oracle's text encoders, transformers, are not installed")

import small_editors  # noqa: E402
import small_sd3  # noqa: E402
import test_editors  # noqa: E402
import test_sd3  # noqa: E402
from photographs import smooth  # noqa: E402
from test_editors import HAT, RED, SQUARE, WIDE, assert_other, assert_same  # noqa: E402

from sifm_min.editors import load_editor  # noqa: E402
from sifm_min.models.checkpoints import Unfit  # noqa: E402
from sifm_min.models.tiny_vae import AutoencoderTiny  # noqa: E402

# As published, and as no published file has it: pipelines scale and shift a tiny autoencoder's latents as they do any other's.
SCALES = {"as published": {}, "scaled and shifted": {"scaling_factor": 0.6, "shift_factor": 0.3}}


@torch.no_grad()
def tiny_vae(channels, **factors):
    """diffusers' AutoencoderTiny with random weights: latents of the size that the denoiser expects, pictures with contrast."""
    torch.manual_seed(5)
    width = (16,) * 4
    vae = diffusers.AutoencoderTiny(encoder_block_out_channels=width, decoder_block_out_channels=width,
                                    latent_channels=channels, **factors).eval().requires_grad_(False)
    pixels = torch.rand(4, 3, 8, 8).repeat_interleave(8, 2).repeat_interleave(8, 3) * 2 - 1
    rescale(vae.encoder.layers[-1], vae.encode(pixels).latents, 0, 1 / vae.config.scaling_factor)
    rescale(vae.decoder.layers[-1], vae.decode(4 * torch.randn(4, channels, 8, 8)).sample / 2 + 0.5, 0.5, 0.2)
    return vae


def rescale(layer, output, mean, std):
    """Scale a last layer so that each channel of its output has this mean and standard deviation."""
    scale = std / output.std((0, 2, 3))
    layer.weight.mul_(scale[:, None, None, None])
    layer.bias.mul_(scale).add_(mean - output.mean((0, 2, 3)) * scale)


@pytest.fixture(scope="module")
def instruct(tmp_path_factory):
    """name of SCALES -> (diffusers' pipeline, our editor from the folder it wrote)."""
    made = small_editors.pipeline(tokenizer=small_editors.write_tokenizer(tmp_path_factory.mktemp("tokenizer")))

    def get(scale):
        pipeline = diffusers.StableDiffusionInstructPix2PixPipeline(
            **made.components | {"vae": tiny_vae(4, **SCALES[scale])}, requires_safety_checker=False)
        pipeline.set_progress_bar_config(disable=True)
        pipeline.save_pretrained(folder := tmp_path_factory.mktemp("editor"))
        return pipeline, load_editor(folder, device="cpu")
    return get


@pytest.fixture(scope="module")
def img2img(tmp_path_factory):
    made = small_sd3.pipeline(tokenizers=small_sd3.write_tokenizers(tmp_path_factory.mktemp("tokenizers")))

    def get(scale):
        pipeline = diffusers.StableDiffusion3Img2ImgPipeline(**made.components | {"vae": tiny_vae(16, **SCALES[scale])})
        pipeline.set_progress_bar_config(disable=True)
        return pipeline, load_editor(small_sd3.write(pipeline, tmp_path_factory.mktemp("editor")), device="cpu")
    return get


@pytest.mark.slow
@pytest.mark.parametrize("scale", SCALES)
def test_instruct_pix2pix_is_the_published_pipeline(scale, instruct):
    pipeline, editor = instruct(scale)
    assert isinstance(editor.vae, AutoencoderTiny)
    for size, steps, seed in ((SQUARE, 3, 0), (WIDE, 6, 1)):
        edited = editor.edit(smooth(*size), RED, seed=seed, steps=steps)
        assert_same(edited, test_editors.theirs(pipeline, smooth(*size), RED, seed=seed, steps=steps))
        values = np.asarray(edited)
        assert values.std() > 20 and np.isin(values, (0, 255)).mean() < 0.2             # neither flat nor saturated
    assert_other(edited, test_editors.theirs(pipeline, smooth(*WIDE, seed=3), RED, seed=1, steps=6))


@pytest.mark.slow
@pytest.mark.parametrize("scale", SCALES)
def test_sd3_is_the_published_pipeline(scale, img2img):
    """Nothing is drawn for the latent: the noise of the edit is the generator's first draw."""
    pipeline, editor = img2img(scale)
    assert isinstance(editor.vae, AutoencoderTiny)
    for size, strength, seed in ((SQUARE, 0.3, 0), (WIDE, 0.6, 1), (SQUARE, 1.0, 2)):
        edited = editor.edit(smooth(*size), HAT, seed=seed, steps=4, strength=strength)
        assert_same(edited, test_sd3.theirs(pipeline, smooth(*size), HAT, seed=seed, steps=4, strength=strength))
        values = np.asarray(edited)
        assert values.std() > 20 and np.isin(values, (0, 255)).mean() < 0.2
    assert_other(edited, test_sd3.theirs(pipeline, smooth(*SQUARE), HAT, seed=3, steps=4, strength=1.0))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_gradient_reaches_the_picture_in_every_dtype(dtype, instruct):
    folder = instruct("as published")[1].checkpoint.folder
    exact, editor = (load_editor(folder, device="cpu", dtype=torch.float32, vae_dtype=kind) for kind in (torch.float64, dtype))
    assert editor.vae_dtype == dtype
    pixels = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    true, found = (torch.autograd.grad(one.encode(pixels).square().mean(), pixels)[0] for one in (exact, editor))
    assert (true.sign() == found.sign()).double().mean() > {torch.float32: 0.999, torch.float16: 0.97}.get(dtype, 0.9)


@pytest.mark.slow
def test_file_of_another_class_is_refused(instruct, tmp_path):
    """An AutoencoderTiny that calls itself AutoencoderKL, and one with another activation."""
    pipeline, _ = instruct("as published")
    pipeline.save_pretrained(tmp_path)
    file = tmp_path / "vae" / "config.json"
    given = json.loads(file.read_text())
    for change, words in (({"_class_name": "AutoencoderKL"}, "does not describe a AutoencoderKL"),
                          ({"act_fn": "gelu"}, "sets act_fn to 'gelu'; only 'relu' is implemented")):
        file.write_text(json.dumps(given | change))
        with pytest.raises(Unfit, match=words):
            load_editor(tmp_path, device="cpu")
