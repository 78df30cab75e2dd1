"""FLUX.2 klein from a folder, against diffusers' Flux2KleinPipeline with random weights: equal pictures from equal seeds."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

diffusers = pytest.importorskip("diffusers", reason="the oracle, diffusers, is not installed")
transformers = pytest.importorskip("transformers", reason="the oracle's text encoder, transformers, is not installed")
if not hasattr(diffusers, "Flux2KleinPipeline") or not hasattr(transformers, "Qwen3ForCausalLM"):
    pytest.skip("these oracles have no FLUX.2", allow_module_level=True)

import small_flux  # noqa: E402
from faults import Wrong  # noqa: E402
from finite_differences import assert_gradient  # noqa: E402
from photographs import smooth  # noqa: E402
from test_editors import assert_other, assert_same  # noqa: E402

import sifm_min  # noqa: E402
from sifm_min import images  # noqa: E402
from sifm_min.editors import FluxKlein, FluxKleinBase, load_editor  # noqa: E402
from sifm_min.editors import flux as flux_editors  # noqa: E402
from sifm_min.editors.guidance import UNGUIDED  # noqa: E402
from sifm_min.models.checkpoints import Unfit  # noqa: E402

SQUARE, WIDE = (64, 64), (96, 64)                            # (width, height)
RED, HAT = "make the sky red", "a face with a top hat, 2 of them!!!"
LONG = "a very long story of a red house and a blue house " * 60
SMALL = "as published"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """name -> (diffusers' pipeline, the folder it wrote, our editor from it), each made once."""
    made, tokenizer = {}, small_flux.write_qwen_tokenizer(tmp_path_factory.mktemp("qwen"))

    def get(name=SMALL):
        if name not in made:
            pipeline = small_flux.klein(name, tokenizer=tokenizer)
            pipeline.save_pretrained(folder := tmp_path_factory.mktemp("klein"))
            made[name] = pipeline, folder, load_editor(folder, device="cpu")
        return made[name]
    return get


def theirs(pipeline, image, prompt, *, seed=0, steps=3, guidance=1.0):
    return pipeline(image=image, prompt=prompt, num_inference_steps=steps, guidance_scale=guidance,
                    generator=torch.Generator().manual_seed(seed)).images[0]


# ----------------------------------------------------------------------------------------------------------- the oracle

@pytest.mark.slow
@pytest.mark.parametrize("name", small_flux.KLEIN)
def test_edit_is_the_published_pipelines(name, folders):
    pipeline, _, editor = folders(name)
    assert type(editor) is (FluxKlein if name == SMALL else FluxKleinBase)
    guided = {} if name == SMALL else {"guidance": 3.0}
    for size, prompt, options in ((SQUARE, RED, {"guidance": 1.0}), (WIDE, HAT, {"steps": 4, "seed": 1} | guided)):
        options = {"steps": 3} | options
        edited = editor.edit(smooth(*size), prompt, **options)
        assert_same(edited, theirs(pipeline, smooth(*size), prompt, **options))
        values = np.asarray(edited)
        assert values.std() > 15 and np.isin(values, (0, 255)).mean() < 0.3             # neither flat nor saturated


@pytest.mark.slow
def test_oracle_sees_everything_that_goes_in(folders):
    """Otherwise two editors that ignored their inputs would agree."""
    pipeline, _, _ = folders("base, another width")
    plain = theirs(pipeline, smooth(*SQUARE), RED)
    for image, prompt, options in ((smooth(*SQUARE, seed=3), RED, {}), (smooth(*SQUARE), HAT, {}),
                                   (smooth(*SQUARE), RED, {"seed": 1}), (smooth(*SQUARE), RED, {"guidance": 4.0})):
        with pytest.raises(AssertionError):
            assert_same(theirs(pipeline, image, prompt, **options), plain)


def across(x, side):
    """Patches whose channels are in the order column, row."""
    return F.pixel_unshuffle(x.transpose(2, 3), side).transpose(2, 3)


FAULTS = {                                                   # each is one plausible mistake: where, what, and its wrong value
    "FLUX.1's shift of the noise levels": (FluxKlein, "mu", lambda self, tokens, steps: self.scheduler.mu(tokens)),
    "patches across": (flux_editors, "F", Wrong(F, pixel_unshuffle=across)),
    "a reference without statistics": (FluxKlein, "scaled", lambda self, image_latent: image_latent),
    "cut at the corner": (FluxKlein, "fitted", lambda self, picture, size=None: picture.crop((0, 0, 64, 64))),
    "no guidance": (FluxKleinBase, "guide", lambda self, guidance=None: UNGUIDED),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_parity_sees(fault, folders, monkeypatch):
    """The comparison above is worth something only if it fails on a wrong editor."""
    pipeline, _, editor = folders("base, another width")
    options = {"steps": 2, "guidance": 4.0}
    expected = theirs(pipeline, smooth(78, 70), RED, **options).resize((78, 70), Image.Resampling.LANCZOS)
    assert_same(editor.edit(smooth(78, 70), RED, **options), expected)
    monkeypatch.setattr(*FAULTS[fault])
    with pytest.raises(AssertionError):
        assert_same(editor.edit(smooth(78, 70), RED, **options), expected)


@pytest.mark.slow
def test_text_cut_at_its_limit(folders):
    pipeline, _, editor = folders()
    with pytest.warns(UserWarning, match="Qwen3 reads 512"):
        edited = editor.edit(smooth(*SQUARE), LONG, steps=1)
    assert_same(edited, theirs(pipeline, smooth(*SQUARE), LONG, steps=1))
    assert_other(edited, theirs(pipeline, smooth(*SQUARE), RED, steps=1))


@pytest.mark.slow
def test_sides_are_cut_and_the_output_keeps_the_shape(folders):
    """The pipeline returns what is left of the picture; ours is stretched over the whole of it."""
    pipeline, _, editor = folders()
    picture = smooth(75, 85)
    expected = theirs(pipeline, picture, RED, steps=1)
    assert expected.size == (64, 80)
    assert_same(editor.edit(picture, RED, steps=1), expected.resize((75, 85), Image.Resampling.LANCZOS))


def test_frames_and_fitted_pictures_are_the_pipelines(folders):
    pipeline, _, editor = folders()
    processor = pipeline.image_processor
    for size in ((64, 64), (511, 64), (1024, 1024), (1030, 1024), (2000, 1500), (400, 2900)):
        picture = smooth(*size)
        whole = processor._resize_if_exceeds_area(picture)
        width, height = (side // 16 * 16 for side in whole.size)
        expected = processor.preprocess(whole, height=height, width=width, resize_mode="crop")[0] / 2 + 0.5
        assert editor.frame(*size) == (height, width)
        assert (images.to_pixels(editor.fitted(picture))[0] - expected).abs().max() < 1e-6
    resized = editor.resize(images.to_pixels(smooth(200, 150)), 64)         # differentiable, the same to rounding
    assert (resized - images.to_pixels(editor.fitted(smooth(200, 150), 64))).abs().max() < 1.01 / 255


@pytest.mark.parametrize("size", [(63, 100), (100, 10), (600, 70)])
def test_a_picture_of_odd_shape_is_one_sentence(size, folders):
    _, _, editor = folders()
    with pytest.raises(ValueError, match=f"a picture of {size[0]} x {size[1]} pixels: FLUX.2 takes sides of at") as caught:
        editor.edit(Image.new("RGB", size), RED)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_guidance_of_the_distilled_one_is_ignored_with_a_warning(folders):
    pipeline, _, editor = folders()
    with pytest.warns(UserWarning, match="is distilled: guidance 5.0 is ignored"):
        edited = editor.edit(smooth(*SQUARE), RED, steps=2, guidance=5.0)
    assert_same(edited, theirs(pipeline, smooth(*SQUARE), RED, steps=2, guidance=5.0))


# ------------------------------------------------------------------------------------------------- what methods rely on

def test_image_latents_are_the_vaes_mean_in_patches(folders):
    _, _, editor = folders()
    pixels = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    E, mean = editor.encode(pixels), editor.vae.encode(2 * pixels - 1)[0]
    torch.testing.assert_close(E, F.pixel_unshuffle(mean, 2))
    torch.testing.assert_close(editor.scaled(E), editor.vae.normalised(mean))
    torch.testing.assert_close(editor.decode(editor.scaled(E)), editor.vae.decode(mean) / 2 + 0.5, rtol=1e-4, atol=1e-4)


def test_words_stand_between_the_chats_tokens(folders):
    _, _, editor = folders()
    tokenizer = editor.text_encoders.tokenizer
    (ids,), _ = tokenizer([HAT], 512)
    assert [ids[i] for i in editor.word_positions(HAT)] == tokenizer.encode(HAT)
    assert editor.word_positions(LONG)[-1] == 511


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sifm", "photoguard-encoder", "photoguard-diffusion", "editshield", "semantic-attack",
                                    "sds", "mist", "ace", "danp", "diffusionguard", "tdae", "sifm-output", "decontext"])
def test_every_method_runs(method, folders):
    _, folder, _ = folders()
    editor = load_editor(folder, device="cpu")
    editor.defaults = replace(editor.defaults, size=64, steps=2)
    options = {"sifm": {"timesteps": 2}, "photoguard-diffusion": {"unroll": 2}, "semantic-attack": {"timesteps": 2},
               "danp": {"timesteps": 2}, "tdae": {"timesteps": 2}, "editshield": {"variant": "released"}}.get(method, {})
    result = sifm_min.immunize(smooth(66, 64), editor, [RED], method=method, steps=2, **options)
    moved = np.abs(np.asarray(result.image, int) - np.asarray(smooth(66, 64), int))
    assert 0 < moved.max() <= 7
    if method == "decontext":
        assert result.report["passes"]["denoiser_backward"] == 2


def test_a_folder_that_does_not_fit_is_one_sentence(folders, tmp_path):
    _, folder, _ = folders()
    shutil.copytree(folder, copy := tmp_path / "copy")
    config = copy / "transformer" / "config.json"
    given = json.loads(config.read_text())
    for change, words in (({"in_channels": 12}, "x_embedder.weight is"), ({"joint_attention_dim": 24}, "expected .32, 24."),
                          ({"guidance_embeds": True}, "missing time_guidance_embed.guidance_embedder")):
        config.write_text(json.dumps(given | change))
        with pytest.raises(Unfit, match=words) as caught:
            load_editor(copy, device="cpu")
        assert "\n" not in str(caught.value)
    config.write_text(json.dumps(given))
    text = copy / "text_encoder" / "config.json"
    text.write_text(json.dumps(json.loads(text.read_text()) | {"num_hidden_layers": 9, "layer_types": None}))
    with pytest.raises(Unfit, match="the text is read after layer 27"):
        load_editor(copy, device="cpu")
    shutil.rmtree(copy / "vae")
    shutil.copytree(folders("base, another VAE")[1] / "vae", copy / "vae")
    with pytest.raises(Unfit, match="16 channels and gives 16; with this VAE it has to take and give 24|read after layer 27"):
        load_editor(copy, device="cpu")


@pytest.mark.slow
@pytest.mark.parametrize(("method", "options"), [("sifm", {"timesteps": 2}), ("decontext", {}), ("danp", {"timesteps": 2}),
                                                 ("diffusionguard", {}), ("tdae", {"timesteps": 2})], ids=str)
def test_gradient_agrees_with_finite_differences(method, options, folders, monkeypatch):
    editor = load_editor(folders()[1], device="cpu", dtype=torch.float64, vae_dtype=torch.float64)
    editor.defaults = replace(editor.defaults, size=64)
    assert_gradient(editor, method, [RED], (64, 64), monkeypatch, **options)


@pytest.mark.slow
def test_low_memory_holds_one_block_and_changes_nothing(folders):
    small_flux.assert_streams(folders()[1], RED, 64)
