"""FLUX.1 Kontext from a folder, against diffusers' FluxKontextPipeline with random weights: equal pictures from equal seeds."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

diffusers = pytest.importorskip("diffusers", reason="the oracle, diffusers, is not installed")
pytest.importorskip("transformers", reason="the oracle's text encoders, transformers, are not installed")

import small_flux  # noqa: E402
import small_sd3  # noqa: E402
from faults import Wrong  # noqa: E402
from finite_differences import assert_gradient  # noqa: E402
from photographs import smooth  # noqa: E402
from test_editors import assert_other, assert_same  # noqa: E402

import sifm_min  # noqa: E402
from sifm_min import images  # noqa: E402
from sifm_min.editors import Editor, FluxKontext, load_editor  # noqa: E402
from sifm_min.editors import flux as flux_editors  # noqa: E402
from sifm_min.models.checkpoints import Unavailable, Unfit  # noqa: E402
from sifm_min.objectives.decontext import decontext  # noqa: E402

SQUARE, WIDE = (64, 64), (80, 48)                            # (width, height), both of Kontext's shapes, scaled to 64
RED, HAT = "make the sky red", "a face with a top hat, 2 of them!!!"
LONG = "a very long story of a red house and a blue house " * 60
SMALL = "as published"


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return small_sd3.write_tokenizers(tmp_path_factory.mktemp("tokenizers"))


@pytest.fixture(scope="module")
def folders(words, tmp_path_factory):
    """name -> (diffusers' pipeline, the folder it wrote, our editor from it), each made once."""
    made = {}

    def get(name=SMALL):
        if name not in made:
            pipeline = small_flux.kontext(name, tokenizers=words)
            pipeline.save_pretrained(folder := tmp_path_factory.mktemp("kontext"))
            made[name] = pipeline, folder, load_editor(folder, device="cpu")
        return made[name]
    return get


def theirs(pipeline, image, prompt, *, seed=0, steps=3, guidance=2.5, true_guidance=1.0, negative_prompt=None, size=None):
    """diffusers' edit at the picture's own size, or at `size` (width, height)."""
    width, height = size or image.size
    return pipeline(image=image, prompt=prompt, height=height, width=width, max_area=width * height, num_inference_steps=steps,
                    guidance_scale=guidance, true_cfg_scale=true_guidance, negative_prompt=negative_prompt,
                    generator=torch.Generator().manual_seed(seed), _auto_resize=False).images[0]


# ----------------------------------------------------------------------------------------------------------- the oracle

@pytest.mark.slow
@pytest.mark.parametrize("name", small_flux.KONTEXT)
def test_edit_is_the_published_pipelines(name, folders):
    pipeline, _, editor = folders(name)
    assert type(editor) is FluxKontext
    for size, prompt, options in ((SQUARE, RED, {"steps": 3}), (WIDE, HAT, {"steps": 4, "seed": 1, "guidance": 4.0}),
                                  (WIDE, RED, {"steps": 2, "true_guidance": 3.0, "negative_prompt": HAT})):
        edited = editor.edit(smooth(*size), prompt, size=64, **options)
        assert_same(edited, theirs(pipeline, smooth(*size), prompt, **options))
        values = np.asarray(edited)
        assert values.std() > 15 and np.isin(values, (0, 255)).mean() < 0.3             # neither flat nor saturated


@pytest.mark.slow
def test_oracle_sees_everything_that_goes_in(folders):
    """Otherwise two editors that ignored their inputs would agree."""
    pipeline, _, _ = folders()
    plain = theirs(pipeline, smooth(*SQUARE), RED)
    for image, prompt, options in ((smooth(*SQUARE, seed=3), RED, {}), (smooth(*SQUARE), HAT, {}),
                                   (smooth(*SQUARE), RED, {"seed": 1}), (smooth(*SQUARE), RED, {"guidance": 8.0}),
                                   (smooth(*SQUARE), RED, {"true_guidance": 3.0, "negative_prompt": HAT})):
        assert_other(theirs(pipeline, image, prompt, **options), plain)


def across(x, side):
    """Patches whose channels are in the order column, row."""
    return F.pixel_unshuffle(x.transpose(2, 3), side).transpose(2, 3)


FAULTS = {                                                   # each is one plausible mistake: where, what, and its wrong value
    "another shift of the noise levels": (FluxKontext, "mu", lambda self, tokens, steps: 1.15),
    "patches across": (flux_editors, "F", Wrong(F, pixel_unshuffle=across)),
    "an unscaled reference": (FluxKontext, "scaled", lambda self, image_latent: image_latent),
    "the default guidance": (FluxKontext, "predictor", lambda self, guidance=None: self.predict),
    "noise of another seed": (FluxKontext, "draws", lambda self, seeds, shape: Editor.draws(self, [1], shape)),
    "a pooled text of zeros": (FluxKontext, "_vectors", lambda self, context, guidance=None: {
        "pooled": 0 * context.pooled, "guidance": guidance}),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_parity_sees(fault, folders, monkeypatch):
    """The comparison above is worth something only if it fails on a wrong editor."""
    pipeline, _, editor = folders()
    options = {"steps": 2, "guidance": 8.0}
    monkeypatch.setattr(*FAULTS[fault])
    edited = editor.edit(smooth(*SQUARE), RED, size=64, **options)
    with pytest.raises(AssertionError):
        assert_same(edited, theirs(pipeline, smooth(*SQUARE), RED, **options))


@pytest.mark.slow
def test_text_cut_at_its_limits(folders):
    pipeline, _, editor = folders()
    with pytest.warns(UserWarning, match="T5 reads 512"):
        edited = editor.edit(smooth(*SQUARE), LONG, steps=1, size=64)
    assert_same(edited, theirs(pipeline, smooth(*SQUARE), LONG, steps=1))
    assert_other(edited, theirs(pipeline, smooth(*SQUARE), RED, steps=1))


@pytest.mark.slow
def test_a_batch_is_single_edits(folders):
    _, _, editor = folders()
    pictures, options = [smooth(*SQUARE), smooth(*WIDE, seed=2)], {"steps": 2, "size": 64, "true_guidance": 2.0}
    both = editor.edit(pictures, [RED, HAT], **options)
    for picture, prompt, found in zip(pictures, (RED, HAT), both, strict=True):
        assert_same(found, editor.edit(picture, prompt, **options))


def test_shapes_are_the_publishers_the_output_the_pictures(folders):
    """At the full size: the seventeen shapes of the pipeline, for whatever comes; its own output would be 1024 x 1024."""
    from diffusers.pipelines.flux.pipeline_flux_kontext import PREFERRED_KONTEXT_RESOLUTIONS as PUBLISHED
    _, _, editor = folders()
    for width, height in (*PUBLISHED, (4000, 3000), (100, 900), (513, 511), (3000, 10), (1600, 900)):
        nearest = min((abs(width / height - w / h), w, h) for w, h in PUBLISHED)[1:]
        assert editor.frame(width, height) == nearest[::-1]
    edited = editor.edit(smooth(90, 40), RED, steps=1, size=32)
    assert edited.size == (90, 40)


def test_resize_is_the_edits_lanczos(folders):
    _, _, editor = folders()
    picture = smooth(100, 70)
    fitted = images.to_pixels(editor.fitted(picture, 64))
    resized = editor.resize(images.to_pixels(picture), 64)
    assert (fitted - resized).abs().max() < 1.6 / 255         # Pillow rounds between the two passes


# ------------------------------------------------------------------------------------------------- what methods rely on

def one(editor, size=(32, 32)):
    """An image latent, noise, a timestep and a context, in float32."""
    generator = torch.Generator().manual_seed(0)
    E = editor.encode(torch.rand(1, 3, *size, generator=generator))
    return E, torch.randn(E.shape, generator=generator), torch.tensor([800.0]), editor.context([RED])


def test_no_picture_is_no_tokens(folders):
    """As diffusers' pipeline without an image: the transformer alone, on the target's tokens."""
    pipeline, _, editor = folders()
    E, noise, t, context = one(editor)
    velocity = editor.predict(None, noise, t, context)
    tokens = pipeline._pack_latents(noise, 1, *noise.shape[1:])
    ids = pipeline._prepare_latent_image_ids(1, 2, 2, "cpu", torch.float32)
    expected = pipeline.transformer(tokens, context.states, context.pooled, t / 1000, ids, torch.zeros(512, 3),
                                    torch.tensor([2.5])).sample
    expected = pipeline._unpack_latents(expected, 32, 32, 8)
    torch.testing.assert_close(velocity, expected, rtol=1e-4, atol=1e-4)
    for picture in (torch.zeros_like(E), E):
        assert (editor.predict(picture, noise, t, context) - velocity).abs().max() > 1e-2


def test_prepared_inputs_change_nothing(folders):
    _, _, editor = folders()
    E, noise, t, context = one(editor)
    taps = [*editor.default_taps, *editor.probs_names, "out"]
    plain = editor.features(E, noise, t, context, taps=taps)
    text, times = editor.prepare_text(context), editor.prepare_timesteps(t, context)
    assert all(torch.equal(found, plain[tap]) for tap, found in editor.features(E, noise, times, text, taps=taps).items())


def test_context_mass_is_a_share_that_depends_on_the_picture(folders):
    _, _, editor = folders()
    E, noise, t, context = one(editor)
    E = E.detach().requires_grad_()
    mass = editor.context_mass(E, noise, t, context, blocks=editor.context_blocks)
    assert mass.shape == (len(editor.context_blocks), 1) == (2, 1)
    assert mass.min() > 0 and mass.max() < 1
    assert torch.autograd.grad(mass.sum(), E)[0].abs().max() > 0


def test_words_stand_among_t5s_tokens(folders):
    _, _, editor = folders()
    tokens = editor.text_encoders.t5_tokenizer.count(RED)
    assert editor.word_positions(RED) == [*range(tokens - 1)]               # the last one is the end of the text
    assert len(editor.word_positions(LONG)) == 511


def test_text_encoders_are_gone_before_the_transformer_is_read(folders):
    _, folder, _ = folders()
    editor, order = load_editor(folder, device="cpu"), []
    load = editor.checkpoint.load
    editor.checkpoint.load = lambda network, part, **options: order.append(part) or load(network, part, **options)
    editor.edit(smooth(32, 32), RED, steps=1, size=32)
    assert order == ["text_encoder", "text_encoder_2", "transformer"]
    assert not any(isinstance(value, torch.nn.Module) for value in vars(editor.text_encoders).values())


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sifm", "photoguard-encoder", "photoguard-diffusion", "editshield", "semantic-attack",
                                    "sds", "mist", "ace", "danp", "diffusionguard", "tdae", "sifm-output", "decontext"])
def test_every_method_runs(method, folders):
    _, _, editor = folders()
    editor.defaults = replace(editor.defaults, size=32, steps=2)
    options = {"sifm": {"timesteps": 2, "noisy": "deploy"}, "photoguard-diffusion": {"unroll": 2}, "semantic-attack": {
        "timesteps": 2}, "danp": {"timesteps": 2}, "tdae": {"timesteps": 2},
        "editshield": {"variant": "released"}}.get(method, {})
    try:
        result = sifm_min.immunize(smooth(40, 32), editor, [RED], method=method, steps=2, **options)
    finally:
        editor.defaults = FluxKontext.DEFAULTS
    moved = np.abs(np.asarray(result.image, int) - np.asarray(smooth(40, 32), int))
    assert 0 < moved.max() <= 7
    assert result.report["passes"]["encoder_backward"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(("method", "options"), [("sifm", {"timesteps": 2}), ("sifm", {"timesteps": 2, "noisy": "deploy"}),
                                                 ("decontext", {}), ("decontext", {"blocks": 1, "low": 0})], ids=str)
def test_gradient_agrees_with_finite_differences(method, options, folders, monkeypatch):
    editor = load_editor(folders()[1], device="cpu", dtype=torch.float64, vae_dtype=torch.float64)
    editor.defaults = replace(editor.defaults, size=32)
    assert_gradient(editor, method, [RED], (32, 32), monkeypatch, **options)


@pytest.mark.slow
def test_decontext_lessens_the_share_that_it_measures(folders):
    _, folder, _ = folders()
    editor = load_editor(folder, device="cpu")
    editor.defaults = replace(editor.defaults, size=32, steps=2)
    report = sifm_min.immunize(smooth(32, 32), editor, [RED], method="decontext", steps=12, eps=0.1).report
    share = [step["context"] for step in report["loss"]]
    assert sum(share[-3:]) < sum(share[:3])


@pytest.mark.slow
def test_decontext_expects_purifiers_at_the_same_cost(folders, monkeypatch):
    """It never looks at the original, so it is not called anew."""
    _, folder, _ = folders()
    editor = load_editor(folder, device="cpu")
    editor.defaults = replace(editor.defaults, size=32, steps=2)
    prepare, prepared = editor.prepare_text, []
    monkeypatch.setattr(editor, "prepare_text", lambda context: prepared.append(1) or prepare(context))
    plain, robust = (sifm_min.immunize(smooth(32, 32), editor, [RED], method="decontext", steps=2, robust=robust)
                     for robust in (False, True))
    assert len(prepared) == 2
    assert robust.report["passes"] == plain.report["passes"] and robust.image.tobytes() != plain.image.tobytes()
    assert all(step["purifier"] for step in robust.report["loss"])


@pytest.mark.parametrize(("options", "sentence"), [({"blocks": 9}, "blocks 9: from 1 to 3, the number of single blocks"),
                                                   ({"low": 1000}, "low 1000: a timestep from 0 to 999")])
def test_wrong_options_of_decontext_are_one_sentence(options, sentence, folders):
    _, _, editor = folders()
    with pytest.raises(ValueError, match=sentence):
        decontext(editor, None, [], generator=None, **options)


# -------------------------------------------------------------------------------------------------------------- bad input

def copied(folder, target):
    shutil.copytree(folder, target)
    return target


def test_a_folder_that_does_not_fit_is_one_sentence(folders, tmp_path):
    _, folder, _ = folders()
    copy = copied(folder, tmp_path / "copy")
    config = copy / "transformer" / "config.json"
    given = json.loads(config.read_text())
    for change, words in (({"in_channels": 12}, "x_embedder.weight is"), ({"joint_attention_dim": 24}, "expected .36, 24."),
                          ({"axes_dims_rope": [4, 4, 6]}, "3 even numbers"),
                          ({"num_layers": 3}, "missing transformer_blocks.2")):
        config.write_text(json.dumps(given | change))
        with pytest.raises(Unfit, match=words) as caught:
            load_editor(copy, device="cpu")
        assert "\n" not in str(caught.value)
    config.write_text(json.dumps(given))
    weights = copy / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(Unfit, match="cut short or damaged"):
        load_editor(copy, device="cpu")
    shutil.rmtree(copy / "text_encoder_2")
    with pytest.raises(Unavailable, match="text_encoder_2/config.json"):
        load_editor(copy, device="cpu")


@pytest.mark.slow
def test_shards_are_read_and_a_missing_one_is_named(folders, tmp_path):
    pipeline, _, editor = folders()
    pipeline.save_pretrained(tmp_path / "shards", max_shard_size="60KB")
    shards = sorted((tmp_path / "shards" / "transformer").glob("*-of-*.safetensors"))
    assert len(shards) > 1
    assert_same(load_editor(tmp_path / "shards", device="cpu").edit(smooth(32, 32), RED, steps=1, size=32),
                editor.edit(smooth(32, 32), RED, steps=1, size=32))
    shards[-1].unlink()
    with pytest.raises(Unavailable, match=f"lists the shard {shards[-1].name}, which is not there"):
        load_editor(tmp_path / "shards", device="cpu")


@pytest.mark.slow
def test_low_memory_holds_one_block_and_changes_nothing(folders):
    small_flux.assert_streams(folders()[1], RED, 32)


def test_declining_t5_is_one_sentence(folders):
    _, folder, _ = folders()
    with pytest.raises(ValueError, match="FluxKontextPipeline, which cannot do without T5"):
        load_editor(folder, device="cpu", t5=False)


def test_options_of_other_editors_are_refused(folders):
    _, _, editor = folders()
    for option in ("image_guidance", "strength"):
        with pytest.raises(ValueError, match=f"has no {option}; it takes steps, guidance and true_guidance"):
            editor.edit(Image.new("RGB", (32, 32)), RED, **{option: 0.5})
