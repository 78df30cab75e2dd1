"""Stable Diffusion 3 and UltraEdit against diffusers: random-weight folders written by save_pretrained, same seeds, same
pictures.

tests/support/small_sd3.py makes the folders, and says how their weights are scaled so that agreement means something.
"""

import json
import re
import shutil
import warnings
import weakref

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

diffusers = pytest.importorskip("diffusers", reason="the oracle, diffusers, is not installed")
transformers = pytest.importorskip("transformers", reason="the oracle's text encoders, transformers, are not installed")

import small_sd3  # noqa: E402
from photographs import smooth  # noqa: E402
from test_checkpoints import hub  # noqa: E402, F401 (a fixture)
from test_editors import assert_other, assert_same, change, difference  # noqa: E402
from test_single_files import inverted, published  # noqa: E402, F401 (published is a fixture)

import sifm_min  # noqa: E402
from sifm_min import editors, images  # noqa: E402
from sifm_min.editors import StableDiffusion3, UltraEdit, load_editor  # noqa: E402
from sifm_min.models import checkpoints  # noqa: E402
from sifm_min.models.mmdit import MMDiT  # noqa: E402
from sifm_min.models.vae import AutoencoderKL  # noqa: E402

SQUARE, WIDE = (64, 64), (80, 48)                           # (width, height): 4 x 4 tokens, and 3 x 5, off the table's centre
RED, HAT = "a red sky", "a face with a top hat, 2 of them!!!"
LONG = "a very long story of a red house and a blue house " * 12
SINGLE = "as in a single file"                              # with a larger VAE, and tests of its own
CONFIGS = [config for config in small_sd3.CONFIGS if config != SINGLE]


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return small_sd3.write_tokenizers(tmp_path_factory.mktemp("tokenizers"))


@pytest.fixture(scope="module")
def folders(words, tmp_path_factory):
    """config -> (diffusers' pipeline, our editor from the folder it wrote), each made once."""
    made = {}

    def get(config="as published", **options):
        key = config, *options.items()
        if key not in made:
            pipeline = small_sd3.pipeline(config, tokenizers=words, **options)
            made[key] = pipeline, load_editor(small_sd3.write(pipeline, tmp_path_factory.mktemp("editor")), device="cpu")
        return made[key]
    return get


@pytest.fixture(scope="module")
def small(folders):
    """The quickest pair."""
    return folders("another VAE, short prompts")


@pytest.fixture
def folder(folders, tmp_path):
    """A copy of a good folder, to be spoiled."""
    return shutil.copytree(folders()[1].checkpoint.folder, tmp_path / "editor")


def theirs(pipeline, image, prompt, *, seed=0, steps=3, strength=0.6, guidance=7.0, negative_prompt=None):
    """diffusers' edit. A batch gets one generator for each picture, as its documentation advises for reproducibility."""
    batch = isinstance(prompt, list)
    width, height = (image[0] if batch else image).size
    generator = [torch.Generator().manual_seed(seed) for _ in prompt] if batch else torch.Generator().manual_seed(seed)
    negative = [negative_prompt] * len(prompt) if batch and negative_prompt else negative_prompt
    found = pipeline(prompt=prompt, image=image, height=height, width=width, num_inference_steps=steps, strength=strength,
                     guidance_scale=guidance, negative_prompt=negative, generator=generator).images
    return found if batch else found[0]


def without_t5(pipeline):
    made = diffusers.StableDiffusion3Img2ImgPipeline(**pipeline.components | {"text_encoder_3": None, "tokenizer_3": None})
    made.set_progress_bar_config(disable=True)
    return made


def close(ours, oracle, tolerance=1e-5):
    torch.testing.assert_close(ours, oracle, rtol=0, atol=tolerance * oracle.abs().max().item())


# ----------------------------------------------------------------------------------------------------------- the oracle

@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the prompt")             # CLIP reads only 20 tokens in one config, and HAT has more
@pytest.mark.parametrize("config", CONFIGS)
def test_edit_is_the_published_pipeline(config, folders):
    pipeline, editor = folders(config)
    assert type(editor) is StableDiffusion3 and (editor.text_encoders.t5_tokenizer is None) == (config == "without T5")
    for size, strength, seed in ((SQUARE, 0.3, 0), (SQUARE, 0.6, 1), (SQUARE, 1.0, 2), (WIDE, 0.3, 3), (WIDE, 0.6, 4),
                                 (WIDE, 1.0, 5)):
        edited = editor.edit(smooth(*size), HAT, seed=seed, steps=4, strength=strength)
        assert_same(edited, theirs(pipeline, smooth(*size), HAT, seed=seed, steps=4, strength=strength))
        values = np.asarray(edited)
        assert values.std() > 20 and np.isin(values, (0, 255)).mean() < 0.1             # neither flat nor saturated


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS)
def test_the_comparison_would_see_what_is_left_out(config, folders):
    """Each input of the edit moves the oracle's picture: an editor that ignored it could not agree."""
    pipeline, _ = folders(config)
    image = smooth(*SQUARE)
    plain = theirs(pipeline, image, RED)
    assert_other(plain, theirs(pipeline, image, HAT))
    assert_other(plain, theirs(pipeline, image, RED, seed=1))
    assert_other(plain, theirs(pipeline, smooth(*SQUARE, seed=1), RED))
    assert_other(plain, theirs(pipeline, image, RED, guidance=3))
    assert_other(plain, theirs(pipeline, image, RED, strength=0.3))
    assert_other(plain, theirs(pipeline, image, RED, steps=6))
    assert_other(plain, theirs(pipeline, image, RED, negative_prompt="blue"))
    if pipeline.text_encoder_3:
        assert_other(plain, theirs(without_t5(pipeline), image, RED))


@pytest.mark.parametrize("guidance", [1.0, 0.5, 12.0])
@pytest.mark.parametrize("negative", ["", "blue, night"])
def test_guidance_on_and_off_and_a_negative_prompt(guidance, negative, folders):
    pipeline, editor = folders("as SD3.5 medium")
    options = {"guidance": guidance, "negative_prompt": negative, "steps": 4, "seed": 7}
    ours = editor.edit(smooth(*WIDE), RED, **options)
    assert_same(ours, theirs(pipeline, smooth(*WIDE), RED, **options))
    if negative:
        unheard = ours == editor.edit(smooth(*WIDE), RED, **options | {"negative_prompt": ""})
        assert unheard == (guidance <= 1)                    # without guidance the negative prompt is not used


@pytest.mark.parametrize("strength, steps", [(0.8, 5), (0.35, 9), (0.999, 3), (0.2, 5), (0.1, 9)])
def test_strengths_and_steps_that_do_not_divide(strength, steps, small):
    pipeline, editor = small
    taken = []
    ours = editor.edit(smooth(*SQUARE), RED, steps=steps, strength=strength, on_step=lambda i, n: taken.append((i, n)))
    assert_same(ours, theirs(pipeline, smooth(*SQUARE), RED, steps=steps, strength=strength))
    assert taken == [(i, pipeline.num_timesteps) for i in range(pipeline.num_timesteps)]
    assert taken == [(0, 1)] or strength * steps >= 1       # less than one step is one, as in the pipeline


@pytest.mark.slow
def test_lists_of_pictures_and_prompts(folders):
    pipeline, editor = folders()
    pictures, prompts = [smooth(*WIDE, seed=1), smooth(*WIDE, seed=2), smooth(*WIDE, seed=3)], [RED, HAT, ""]
    for options in ({}, {"guidance": 1.0}, {"negative_prompt": "blue"}):
        ours = editor.edit(pictures, prompts, seed=3, steps=3, **options)
        for one, other in zip(ours, theirs(pipeline, pictures, prompts, seed=3, steps=3, **options), strict=True):
            assert_same(one, other)
    assert_same(ours[1], editor.edit(pictures[1], prompts[1], seed=3, steps=3, negative_prompt="blue"))


@pytest.mark.slow
@pytest.mark.parametrize("config", ["as published", "as SD3.5 medium"])
def test_half_precision_variants_in_shards(config, words, tmp_path):
    """As the published T5 lies there: both kinds of index, the variant's being preferred."""
    pipeline = small_sd3.pipeline(config, tokenizers=words, seed=1)
    networks = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    folder = small_sd3.write(small_sd3.pipeline(config, tokenizers=words, seed=2), tmp_path, max_shard_size="20KB")
    for network in networks:
        network.half()
    small_sd3.write(pipeline, folder, variant="fp16", max_shard_size="20KB")
    for network in networks:
        network.float()
    for part in ("text_encoder_3/model.safetensors", "transformer/diffusion_pytorch_model.safetensors"):
        table = json.loads((folder / f"{part}.index.fp16.json").read_text())["weight_map"]
        assert len(set(table.values())) > 1 and (folder / f"{part}.index.json").exists()
    editor = load_editor(folder, device="cpu")
    assert_same(editor.edit(smooth(*WIDE), HAT, steps=3), theirs(pipeline, smooth(*WIDE), HAT, steps=3))
    assert editor.transformer.proj_out.weight.dtype == torch.float32 and len(editor.provenance()["weights"]) > 8
    assert all(".fp16" in name for name in editor.provenance()["weights"])


@pytest.mark.slow
def test_the_published_vocabularies(shared, tmp_path):
    source = shared / "data" / "tokenizers"
    for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        shutil.copytree(source / f"sd3_{name}", tmp_path / name)
        if name != "tokenizer_3":
            for file in ("vocab.json", "merges.txt"):
                shutil.copy(source / "clip" / file, tmp_path / name)
    pipeline = small_sd3.pipeline(tokenizers=tmp_path)
    folder = small_sd3.write(pipeline, tmp_path / "editor")
    shutil.rmtree(folder / "tokenizer_3")
    shutil.copytree(tmp_path / "tokenizer_3", folder / "tokenizer_3")                    # spiece.model, and its older json
    editor = load_editor(folder, device="cpu")
    for prompt in ("Ωmega éà ﬁ 日本 👍🏽 <|endoftext|> detailed!!!", LONG):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert_same(editor.edit(smooth(*SQUARE), prompt, steps=2), theirs(pipeline, smooth(*SQUARE), prompt, steps=2))


# ----------------------------------------------------------------------------------------------------------- the prompts

@pytest.mark.parametrize("config", CONFIGS)
def test_context_is_the_pipelines(config, folders):
    pipeline, editor = folders(config)
    prompts = [RED, "", HAT, "ΣΑΣ éà 日本 👍🏽", LONG]
    states, _, pooled, _ = pipeline.encode_prompt(prompts, None, None, do_classifier_free_guidance=False)
    with pytest.warns(UserWarning, match="the rest is cut off"):
        ours = load_editor(editor.checkpoint.folder, device="cpu").context(prompts)
    close(ours.states, states)
    close(ours.pooled, pooled)
    length = small_sd3.CONFIGS[config]["length"]
    assert ours.states.shape == (5, length + 256, editor.config.joint_attention_dim)
    assert ours.states[:, length:].any() == (config != "without T5")                     # zeros in its place
    # Each encoder says something else, and of each prompt something else.
    first = sum(given["hidden_size"] for given in small_sd3.CONFIGS[config]["clips"])
    assert not ours.states[:, :length, first:].any()
    for part in (ours.states[:, :length, :first], ours.pooled):
        assert len({tuple(row.flatten().tolist()) for row in part}) == 5


def test_context_of_a_prompt_is_independent_of_the_others(folders):
    editor = load_editor(folders()[1].checkpoint.folder, device="cpu")
    together = editor.context([RED, HAT, RED])
    for again in (editor.context([HAT]), load_editor(editor.checkpoint.folder, device="cpu").context([HAT])):
        close(again.states, together.states[1:2])
        close(again.pooled, together.pooled[1:2])
    assert torch.equal(together.states[0], together.states[2]) and torch.equal(together.pooled[0], together.pooled[2])


def test_cut_prompt_is_one_warning(folders):
    _, editor = folders()
    editor = load_editor(editor.checkpoint.folder, device="cpu")
    clip = "a house " * 20
    for prompt, who in ((clip, ["CLIP reads 77"]), (LONG, ["CLIP reads 77", "T5 reads 256"]), (HAT, []), (clip, [])):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            editor.context([prompt])
        said = [str(warning.message) for warning in said]
        assert len(said) == len(who) and all(words in sentence for words, sentence in zip(who, said, strict=True)), said
        assert all("\n" not in sentence and re.search(r"is \d+ tokens long", sentence) for sentence in said)


@pytest.fixture
def loads(monkeypatch):
    """Notes each network that a checkpoint loads: its component, and which of those before it were still alive."""
    noted, alive, load = [], {}, checkpoints.Checkpoint.load

    def note(self, network_class, component, **options):
        noted.append((component, sorted(name for name, network in alive.items() if network() is not None)))
        network = load(self, network_class, component, **options)
        alive[component] = weakref.ref(network)
        return network

    monkeypatch.setattr(checkpoints.Checkpoint, "load", note)
    return noted


def test_text_encoders_are_released_before_the_transformer(folders, loads):
    editor = load_editor(folders()[1].checkpoint.folder, device="cpu")
    assert loads == [("vae", [])]
    editor.edit(smooth(*SQUARE), RED, steps=1, strength=1.0)
    assert loads[1:] == [("text_encoder", ["vae"]), ("text_encoder_2", ["vae"]), ("text_encoder_3", ["vae"]),
                         ("transformer", ["vae"])]


@pytest.mark.slow
def test_prompts_said_before_are_not_encoded_again(folders, loads):
    editor = load_editor(folders()[1].checkpoint.folder, device="cpu")
    texts = [("text_encoder", ["vae"]), ("text_encoder_2", ["vae"]), ("text_encoder_3", ["vae"])]
    once = editor.context([RED, HAT])
    assert loads[1:] == texts
    assert torch.equal(editor.context([HAT]).states, once.states[1:]) and loads[1:] == texts
    # An edit after that, with the usual negative prompt: only the transformer is read.
    editor.edit(smooth(*SQUARE), RED, steps=1, strength=1.0)
    assert loads[1:] == [*texts, ("transformer", ["vae"])]
    many = [f"{i}" for i in range(editor.text_encoders.KEPT)]
    assert len(editor.context([RED, *many]).states) == len(many) + 1 and len(loads) == 8
    editor.context(many[1:])
    assert len(loads) == 8                                   # the latest are kept,
    editor.context([RED])
    assert len(loads) == 11                                  # the oldest not


def test_contexts_of_several_prompts_read_the_text_encoders_once(folders, loads):
    folder = folders()[1].checkpoint.folder
    loads.clear()                                            # of the pair, where no earlier test has loaded it
    editor = load_editor(folder, device="cpu")
    found = editor.contexts([RED, HAT])
    assert [name for name, _ in loads] == ["vae", "text_encoder", "text_encoder_2", "text_encoder_3"]
    for prompt, context in zip((RED, HAT), found, strict=True):
        for part, expected in zip(context, editor.context([prompt]), strict=True):
            assert torch.equal(part, expected)


@pytest.mark.slow
def test_without_t5_it_is_neither_looked_for_nor_read(folder, folders, loads):
    pipeline, _ = folders()
    for part in ("text_encoder_3", "tokenizer_3"):
        shutil.rmtree(folder / part)
    with pytest.raises(checkpoints.Unavailable, match="text_encoder_3"):
        load_editor(folder, device="cpu")
    editor = load_editor(folder, device="cpu", t5=False)
    oracle = without_t5(pipeline)
    for guidance in (7.0, 1.0):
        assert_same(editor.edit(smooth(*WIDE), HAT, steps=2, guidance=guidance),
                    theirs(oracle, smooth(*WIDE), HAT, steps=2, guidance=guidance))
    assert not any(component == "text_encoder_3" for component, _ in loads)
    assert not any("text_encoder_3" in name for name in editor.provenance()["weights"])


@pytest.mark.slow
def test_from_a_hub_t5_is_fetched_only_if_it_is_wanted(hub, folders):  # noqa: F811
    pipeline, local = folders()
    source = local.checkpoint.folder
    hub.add("owner/sd3", {path.relative_to(source).as_posix(): path.read_bytes() for path in source.rglob("*")
                          if path.is_file()})
    editor = load_editor("owner/sd3", device="cpu", t5=False)
    assert_same(editor.edit(smooth(*SQUARE), RED, steps=2), theirs(without_t5(pipeline), smooth(*SQUARE), RED, steps=2))
    assert editor.provenance()["source"] == "owner/sd3" and len(editor.provenance()["revision"]) == 40
    assert not any("_3/" in name for name in hub.asked())
    editor = load_editor("owner/sd3", device="cpu")
    assert any("text_encoder_3/" in name for name in hub.asked())
    assert_same(editor.edit(smooth(*SQUARE), RED, steps=2), theirs(pipeline, smooth(*SQUARE), RED, steps=2))


# ------------------------------------------------------------------------------------------------- what the methods use

@pytest.mark.parametrize("config", ["as published", "another VAE, short prompts"])
def test_encode_scaled_and_decode_are_the_vaes(config, folders):
    pipeline, editor = folders(config)
    pixels = torch.rand(2, 3, 48, 80)
    mode = pipeline.vae.encode(2 * pixels - 1).latent_dist.mode()
    condition, given = editor.encode(pixels), pipeline.vae.config
    close(condition, mode)
    close(editor.scaled(condition), (mode - given.shift_factor) * given.scaling_factor)
    latent = torch.randn_like(mode)
    decoded = pipeline.vae.decode(latent / given.scaling_factor + given.shift_factor).sample / 2 + 0.5
    close(editor.decode(latent), decoded)
    assert given.shift_factor and not torch.allclose(editor.scaled(condition), mode * given.scaling_factor, atol=1e-2)


def test_noise_latent_is_what_the_scheduler_adds(folders):
    pipeline, editor = folders()
    condition, noise = torch.randn(3, 16, 4, 4), torch.randn(3, 16, 4, 4)
    pipeline.scheduler.set_timesteps(7)
    timesteps = pipeline.scheduler.timesteps[[1, 3, 6]]
    expected = pipeline.scheduler.scale_noise(editor.scaled(condition), timesteps, noise)
    close(editor.noise_latent(condition, noise, timesteps), expected, 1e-6)
    sigma = torch.tensor([0.9, 0.25, 0.0]).reshape(3, 1, 1, 1)                           # and at timesteps of no plan
    expected = sigma * noise + (1 - sigma) * editor.scaled(condition)
    close(editor.noise_latent(condition, noise, torch.tensor([900, 250, 0])), expected, 1e-6)


def test_the_noise_that_a_velocity_means(folders):
    _, editor = folders()
    condition, noise, timesteps = torch.randn(4, 16, 4, 4), torch.randn(4, 16, 4, 4), torch.tensor([1000, 814, 300, 9])
    noisy = editor.noise_latent(condition, noise, timesteps)
    close(editor.noise_prediction(noise - editor.scaled(condition), noisy, timesteps), noise)
    at_once = editor.noise_prediction(torch.zeros_like(noisy), noisy, timesteps)
    assert torch.equal(at_once, noisy)


def test_timesteps_lie_in_what_the_strength_visits(folder, folders):
    _, editor = folders()
    visited = editor.plan().timesteps
    assert (len(visited), round(visited[0].item(), 2)) == (30, 813.85)                   # 50 steps at 0.6
    assert editor.timesteps(10).tolist() == [813, 728, 643, 559, 474, 389, 304, 220, 135, 50]
    for strength, steps in ((0.3, 50), (1.0, 20), (0.6, 28), (0.02, 50), (1.0, 1)):
        change(folder / "model_index.json", _sifm_min={"defaults": {"strength": strength, "steps": steps}})
        editor = load_editor(folder, device="cpu")
        for count in (1, 2, 7):
            found, visited = editor.timesteps(count), editor.plan().timesteps
            assert found.shape == (count,) and found.dtype == torch.int64
            assert found.max() <= visited.max() and found.min() >= min(50, int(visited.max()))
            assert sorted(found.tolist(), reverse=True) == found.tolist()
    with pytest.raises(ValueError, match="timestep"):
        editor.timesteps(0)


@pytest.mark.parametrize("config", CONFIGS)
def test_features_are_what_hooks_find_in_the_pipeline(config, folders):
    """During a real edit of theirs: what goes into their transformer at one step, and what its blocks put out."""
    pipeline, editor = folders(config)
    given, found, handles = {}, {}, []

    def keep(name):
        def note(module, inputs, outputs):
            text, image = outputs
            found.update({name: image, f"{name}.context": text})
        return note

    try:
        for i, block in enumerate(pipeline.transformer.transformer_blocks):
            handles.append(block.register_forward_hook(keep(f"transformer_blocks.{i}")))
        handles.append(pipeline.transformer.register_forward_hook(
            lambda module, inputs, named, output: given.update(named, out=output[0]), with_kwargs=True))
        theirs(pipeline, smooth(*WIDE), RED, steps=3)
    finally:
        for handle in handles:
            handle.remove()
    noisy_latent, timestep, out = given["hidden_states"], given["timestep"], given["out"]
    context = editors.Text(given["encoder_hidden_states"], given["pooled_projections"])
    asked = editor.context(["", RED])                        # negative first, as the pipeline orders its two passes
    close(asked.states, context.states)
    close(asked.pooled, context.pooled)
    ours = editor.features(None, noisy_latent, timestep, context, taps=editor.tap_names)
    assert set(ours) == set(editor.tap_names) == {name for name, x in found.items() if x is not None} | {"out"}
    for name in editor.tap_names[:-1]:
        close(ours[name], found[name])
    close(ours["out"], out)
    assert torch.equal(ours["out"], editor.predict(None, noisy_latent, timestep, context))
    assert set(editor.default_taps) <= set(editor.tap_names)


def test_default_taps_are_in_the_second_half(folders):
    assert list(folders()[1].default_taps) == ["transformer_blocks.2"]                   # of 4: n/2 to n-2


def test_one_timestep_each_and_one_context_for_a_batch(small):
    _, editor = small
    condition, noise = torch.randn(3, 6, 8, 12), torch.randn(3, 6, 8, 12)
    contexts, timesteps = editor.context([RED, HAT, ""]), torch.tensor([900, 400, 60])
    noisy = editor.noise_latent(condition, noise, timesteps)
    together = editor.predict(condition, noisy, timesteps, contexts)
    for i, prompt in enumerate((RED, HAT, "")):
        one = slice(i, i + 1)
        alone = editor.predict(condition[one], noisy[one], timesteps[one], editor.context([prompt]))
        close(together[one], alone)
    shared_by_all = editor.predict(condition, noisy, timesteps, editor.context([HAT]))
    close(shared_by_all[1], together[1])
    assert not torch.allclose(shared_by_all[0], together[0], atol=1e-2)


def test_the_gradient_passes_through_features_and_a_whole_edit(small):
    _, editor = small
    pixels = images.to_pixels(smooth(37, 50)).requires_grad_(True)
    context, timesteps = editor.context([RED]), torch.tensor([700, 200])
    condition = editor.encode(editor.resize(pixels)).expand(2, -1, -1, -1)
    noisy = editor.noise_latent(condition, torch.randn(condition.shape), timesteps)
    found = editor.features(condition, noisy, timesteps, context, taps=editor.default_taps)
    (gradient,) = torch.autograd.grad(sum(x.square().mean() for x in found.values()), pixels)
    assert gradient.shape == pixels.shape and (gradient != 0).float().mean() > 0.99
    pixels = images.to_pixels(smooth(32, 32)).requires_grad_(True)
    (gradient,) = torch.autograd.grad(editor.sample(pixels, [RED], seeds=[0], steps=3).square().mean(), pixels)
    assert gradient.abs().max() > 0
    assert not any(p.requires_grad for network in (editor.transformer, editor.vae) for p in network.parameters())


@pytest.mark.parametrize("size", [(61, 97), (79, 64), (20, 17), (5, 40)])
def test_any_size_in_the_same_size_out(size, folders):
    """Sides are floored to multiples of 16, as the published pipeline asks for; the result is brought back."""
    pipeline, editor = folders()
    ours = editor.edit(smooth(*size), RED, steps=2)
    height, width = editor.frame(*size)
    assert ours.size == size and (width, height) == tuple(max(side // 16 * 16, 16) for side in size)
    small = smooth(*size).resize((width, height), Image.Resampling.LANCZOS)
    oracle = theirs(pipeline, small, RED, steps=2).resize(size, Image.Resampling.LANCZOS)
    assert difference(ours, oracle).max() <= 2              # 1/255 before the resize, which may amplify it


def test_working_sizes(folders, small):
    _, editor = folders()
    assert (editor.multiple, editor.working_size, small[1].multiple) == (16, 512, 16)    # 8 by 2, and 4 by 4
    assert editor.frame(1024, 1024) == (512, 512) and editor.frame(1000, 700) == (352, 512)
    assert editor.frame(530, 100, size=128) == (16, 128) and editor.frame(64, 64) == (64, 64)
    resized = editor.resize(torch.rand(1, 3, 50, 75))
    assert resized.shape == (1, 3, 48, 64)
    large, inner = smooth(300, 190), smooth(300, 190).resize((64, 32), Image.Resampling.LANCZOS)
    expected = editor.edit(inner, RED, steps=2).resize((300, 190), Image.Resampling.LANCZOS)
    assert difference(editor.edit(large, RED, steps=2, size=64), expected).max() <= 1


def test_a_picture_beyond_the_position_table_is_one_sentence(folders):
    _, editor = folders()                                    # 12 tokens a side
    with pytest.raises(ValueError, match="does not fit") as caught:
        editor.edit(smooth(208, 64), RED, steps=1)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_provenance_and_defaults(folders):
    _, editor = folders()
    told = editor.provenance()
    assert set(told["weights"]) == {
        "transformer/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors", "text_encoder_2/model.safetensors", "text_encoder_3/model.safetensors"}
    assert all(len(digest) == 64 for digest in told["weights"].values())
    assert (told["source"], told["revision"]) == (str(editor.checkpoint.folder), None)
    assert (told["scheduler"], told["scheduler_note"], told["dtype"], told["device"]) == (
        "FlowMatchEulerDiscreteScheduler", "", "float32", "cpu")
    json.dumps(told)
    defaults = editor.defaults
    assert (defaults.steps, defaults.guidance, defaults.strength, defaults.size, defaults.text_length) == (
        50, 7.0, 0.6, 512, 256)
    assert editors.DEFAULTS["sd3"] == defaults and editor.kind == "img2img"
    taken = []
    editor.edit(smooth(16, 16), RED, on_step=lambda i, n: taken.append(n))
    assert taken == [30] * 30                                # 50 at 0.6


def test_half_precision_is_the_transformers_and_the_texts_alone(folders):
    _, editor = folders()
    half = load_editor(editor.checkpoint.folder, device="cpu", dtype=torch.bfloat16)
    condition = half.encode(torch.rand(1, 3, 32, 32))
    noisy = half.noise_latent(condition, torch.randn(1, 16, 4, 4), torch.tensor([300]))
    context = half.context([RED])
    assert (half.vae_dtype, condition.dtype, noisy.dtype, *(part.dtype for part in context)) == (
        *[torch.float32] * 3, *[torch.bfloat16] * 2)
    assert half.predict(condition, noisy, torch.tensor([300]), context).dtype == torch.bfloat16
    one, other = (e.sample(images.to_pixels(smooth(32, 32)), [RED], seeds=[0], steps=2, guidance=1.0) for e in (half, half))
    assert torch.equal(one, other) and one.dtype == torch.float32 and one.isfinite().all()
    one, other = (e.encode(torch.full((1, 3, 32, 32), 0.3)) for e in (half, editor))
    assert torch.equal(one, other)


# ---------------------------------------------------------------------------------------------------------- UltraEdit

@torch.no_grad()
def ultraedit(pipeline, image, prompt, *, seed=0, steps=3, guidance=7.5, image_guidance=1.5, negative_prompt="", t5_length=77):
    """An edit as UltraEdit's authors do it, over diffusers' networks and scheduler."""
    vae, transformer, scheduler = pipeline.vae, pipeline.transformer, pipeline.scheduler
    latents, scale = vae.config.latent_channels, vae.config.scaling_factor
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1
    encoded = vae.encode(pixels)
    picture = encoded.latents if "latents" in encoded else encoded.latent_dist.mode()    # neither scaled nor shifted
    extra = [picture]
    if transformer.config.in_channels == 3 * latents:
        extra.append(vae.encode(torch.ones_like(pixels)).latent_dist.mode())            # a white mask, as a picture
    extra = torch.cat(extra, 1)
    texts = [pipeline.encode_prompt(text, None, None, do_classifier_free_guidance=False, max_sequence_length=t5_length)
             for text in (prompt, negative_prompt, negative_prompt)]
    states, pooled = (torch.cat([text[i] for text in texts]) for i in (0, 2))
    extra = torch.cat([extra, extra, torch.zeros_like(extra)])
    guided = guidance > 1 and image_guidance >= 1
    if not guided:
        states, pooled, extra = states[:1], pooled[:1], extra[:1]
    latent = torch.randn(picture.shape, generator=torch.Generator().manual_seed(seed))
    scheduler.set_timesteps(steps)
    for timestep in scheduler.timesteps:
        inputs = torch.cat([latent.expand(len(states), -1, -1, -1), extra], 1)
        velocity = transformer(inputs, states, pooled, timestep.expand(len(states))).sample
        if guided:
            full, image_only, neither = velocity.chunk(3)
            velocity = neither + guidance * (full - image_only) + image_guidance * (image_only - neither)
        latent = scheduler.step(velocity, timestep, latent).prev_sample
    decoded = (vae.decode(latent / scale).sample / 2 + 0.5).clamp(0, 1)                  # nothing was shifted
    return Image.fromarray((decoded[0].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the prompt")
@pytest.mark.parametrize("config, channels", [("as published", 32), ("as published", 48), ("without T5", 48),
                                              ("another VAE, short prompts", 12)])
def test_ultraedit_is_its_authors_loop(config, channels, folders):
    pipeline, editor = folders(config, in_channels=channels)
    assert type(editor) is UltraEdit and editor.kind == "instruct"
    for size, options in ((SQUARE, {}), (WIDE, {"seed": 3, "negative_prompt": "blue"}), (WIDE, {"guidance": 1.0}),
                          (SQUARE, {"image_guidance": 0.9}), (WIDE, {"guidance": 3.0, "image_guidance": 1.0})):
        ours = editor.edit(smooth(*size), HAT, steps=3, **options)
        assert_same(ours, ultraedit(pipeline, smooth(*size), HAT, **options))
        assert np.asarray(ours).std() > 20


@pytest.mark.slow
def test_the_comparison_with_ultraedit_sees_every_input(folders):
    pipeline, _ = folders(in_channels=48)
    image = smooth(*SQUARE)
    plain = ultraedit(pipeline, image, HAT)
    assert_other(plain, ultraedit(pipeline, image, RED))
    assert_other(plain, ultraedit(pipeline, image, HAT, seed=1))
    assert_other(plain, ultraedit(pipeline, smooth(*SQUARE, seed=1), HAT))
    assert_other(plain, ultraedit(pipeline, image, HAT, guidance=4))
    assert_other(plain, ultraedit(pipeline, image, HAT, image_guidance=1))
    assert_other(plain, ultraedit(pipeline, image, HAT, negative_prompt="blue"))


def test_a_batch_of_ultraedit_gives_what_single_calls_give(folders):
    _, editor = folders(in_channels=48)
    pictures, prompts = [smooth(48, 40, 1), smooth(33, 70, 2), smooth(50, 41, 3)], [RED, HAT, ""]
    for i, edited in enumerate(editor.edit(pictures, prompts, seed=6, steps=3)):
        assert_same(edited, editor.edit(pictures[i], prompts[i], seed=6, steps=3))


def test_parts_of_ultraedit_that_methods_use(folders):
    pipeline, editor = folders(in_channels=48)
    pixels = torch.rand(2, 3, 32, 48)
    condition, noise, timesteps = editor.encode(pixels), torch.randn(2, 16, 4, 6), torch.tensor([1000, 250])
    sigma = torch.tensor([1.0, 0.25]).reshape(2, 1, 1, 1)
    close(condition, pipeline.vae.encode(2 * pixels - 1).latent_dist.mode())
    close(editor.scaled(condition), condition * 1.5305, 1e-6)                            # no shift
    noisy = editor.noise_latent(condition, noise, timesteps)
    close(noisy, sigma * noise + (1 - sigma) * condition * 1.5305, 1e-6)
    white = pipeline.vae.encode(torch.ones(1, 3, 32, 48)).latent_dist.mode().expand_as(condition)
    context = editor.context([HAT])
    assert context.states.shape == (1, 77 + 77, 64)          # its pipeline gives T5 as many tokens as CLIP
    inputs = torch.cat([noisy, condition, white], 1)
    expected = pipeline.transformer(inputs, context.states.expand(2, -1, -1), context.pooled.expand(2, -1), timesteps.float())
    close(editor.predict(condition, noisy, timesteps, context), expected.sample)
    tap = editor.default_taps[0]
    found = editor.features(condition, noisy, timesteps, context, taps=[tap, "out"])
    assert set(found) == {tap, "out"} and torch.equal(found["out"], editor.predict(condition, noisy, timesteps, context))
    assert editor.timesteps(3).tolist() == [1000, 525, 50]   # all of them, from pure noise
    defaults = editor.defaults
    assert (defaults.steps, defaults.guidance, defaults.image_guidance) == (50, 7.5, 1.5)
    assert editors.DEFAULTS["ultraedit"] == defaults


def test_ultraedit_by_its_pipelines_name(folders, tmp_path):
    pipeline, editor = folders(in_channels=32)
    folder = shutil.copytree(editor.checkpoint.folder, tmp_path / "editor")
    change(folder / "model_index.json", _class_name="StableDiffusion3InstructPix2PixPipeline")
    named = load_editor(folder, device="cpu")
    assert type(named) is UltraEdit
    assert_same(named.edit(smooth(*SQUARE), RED, steps=2), ultraedit(pipeline, smooth(*SQUARE), RED, steps=2))


def test_each_kind_takes_its_own_options(folders):
    (_, img2img), (_, instruct) = folders(), folders(in_channels=32)
    image = smooth(16, 16)
    assert_same(instruct.edit(image, RED, steps=1, image_guidance=1.5), instruct.edit(image, RED, steps=1))
    assert_other(instruct.edit(image, RED, steps=1, image_guidance=5.0), instruct.edit(image, RED, steps=1))
    assert_other(img2img.edit(image, RED, steps=4, strength=1.0), img2img.edit(image, RED, steps=4))
    with pytest.raises(ValueError, match="has no strength; it takes steps, guidance and image_guidance"):
        instruct.edit(image, RED, strength=0.5)
    with pytest.raises(ValueError, match="has no image_guidance; it takes steps, guidance and strength"):
        img2img.edit(image, RED, image_guidance=1.5)


# -------------------------------------------------------------------------------------------------------- single files

@pytest.mark.slow
@pytest.mark.parametrize("holds", ["transformer and VAE", "CLIP too", "T5 too"])
def test_a_single_file_gives_the_picture_of_the_folder(holds, published, folders, tmp_path):  # noqa: F811
    pipeline, editor = folders(SINGLE)
    source = editor.checkpoint.folder
    tensors = inverted(published, *(load_file(source / part / "diffusion_pytorch_model.safetensors")
                                    for part in ("transformer", "vae")))
    more = {"clip_l": "text_encoder", "clip_g": "text_encoder_2"} if holds != "transformer and VAE" else {}
    for name, part in (more | ({"t5xxl": "text_encoder_3"} if holds == "T5 too" else {})).items():
        stored = load_file(source / part / "model.safetensors")
        if name == "clip_l":
            del stored["text_projection.weight"]             # the identity, and left out
        tensors |= {f"text_encoders.{name}.transformer.{tensor}": value for tensor, value in stored.items()}
    file = tmp_path / "sd3_medium.safetensors"
    save_file(tensors, file)
    components = tmp_path / "components"
    components.mkdir()
    for part in ("tokenizer", "tokenizer_2", "tokenizer_3", "text_encoder", "text_encoder_2", "text_encoder_3"):
        if part not in more.values() and not (holds == "T5 too" and part == "text_encoder_3"):
            shutil.copytree(source / part, components / part)
    alone = load_editor(file, components=components, device="cpu")
    assert type(alone) is StableDiffusion3 and (alone.config, alone.vae.config) == (editor.config, editor.vae.config)
    for network, part in ((MMDiT, "transformer"), (AutoencoderKL, "vae")):
        one, other = (each.checkpoint.load(network, part).state_dict() for each in (alone, editor))
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    for image in (smooth(*SQUARE), smooth(*WIDE)):
        ours = alone.edit(image, HAT, steps=3)
        assert_same(ours, editor.edit(image, HAT, steps=3))
        assert_same(ours, theirs(pipeline, image, HAT, steps=3))
    assert "sd3_medium.safetensors" in alone.provenance()["weights"]
    assert load_editor(file, components=components, device="cpu", t5=False).text_encoders.t5_tokenizer is None
    with pytest.raises(checkpoints.Unavailable, match="give components"):
        load_editor(file, device="cpu")


# ---------------------------------------------------------------------------------------------------------------- SIFM

@pytest.mark.slow
@pytest.mark.parametrize("channels", [None, 48])
def test_sifm_runs_and_lowers_its_loss(channels, folders):
    _, editor = folders(in_channels=channels)
    image = smooth(48, 33)
    result = sifm_min.immunize(image, editor, RED, steps=3)
    assert result.image.size == image.size and 1 <= difference(result.image, image).max() <= 7
    assert result.report["options"]["timesteps"] == editor.timesteps(10).tolist()
    assert result.report["options"]["taps"] == ["transformer_blocks.2"]
    losses = [row["loss"] for row in sifm_min.immunize(image, editor, [RED], steps=10, timesteps=3).report["loss"]]
    assert len(losses) == 10 and losses[-1] < min(losses[0], losses[1]) and np.isfinite(losses).all()
    other = sifm_min.immunize(image, editor, HAT, steps=2, timesteps=3, init="zero").image
    assert other != sifm_min.immunize(image, editor, RED, steps=2, timesteps=3, init="zero").image


@pytest.mark.slow
def test_the_command_immunizes_against_a_folder(folder, tmp_path, capsys):
    change(folder / "model_index.json", _sifm_min={"defaults": {"steps": 3}, "notice": "Only random weights."})
    path, out = tmp_path / "photo.png", tmp_path / "out"
    smooth(48, 33).save(path)
    from sifm_min.immunize import main
    command = [str(path), "--editor", str(folder), "--prompt", RED, "--steps", "2", "--timesteps", "2", "--device", "cpu",
               "-o", str(out)]
    assert main(command) == 0, capsys.readouterr().err
    assert sorted(p.name for p in out.iterdir()) == ["photo.json", "photo_immunized.png", "photo_preview.png"]
    report = json.loads((out / "photo.json").read_text())
    assert report["editor"]["scheduler"] == "FlowMatchEulerDiscreteScheduler" and report["finished"]
    assert 1 <= difference(Image.open(out / "photo_immunized.png"), smooth(48, 33)).max() <= 7
    assert "Only random weights." in capsys.readouterr().err
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    assert main([*command, "--overwrite"]) == 3
    told = capsys.readouterr().err
    assert "has no weights in transformer/" in told and "Traceback" not in told


# ---------------------------------------------------------------------------------------------------------- what is wrong

def rewrite(path, alter):
    state = load_file(path)
    alter(state)
    save_file(state, path)


TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"
SPOILED = {
    "a truncated transformer": (lambda f: (f / TRANSFORMER).write_bytes((f / TRANSFORMER).read_bytes()[:-64]),
                                "diffusion_pytorch_model.safetensors is cut short or damaged"),
    "a truncated T5": (lambda f: (f / "text_encoder_3/model.safetensors").write_bytes(bytes(9)),
                       "text_encoder_3/model.safetensors is cut short or damaged"),
    "a wrong shape": (lambda f: rewrite(f / TRANSFORMER, lambda s: s.update({"proj_out.bias": torch.ones(3)})),
                      r"proj_out.bias is \[3\], expected \[64\]"),
    "a missing tensor": (lambda f: rewrite(f / TRANSFORMER, lambda s: s.pop("context_embedder.bias")),
                         "missing context_embedder.bias"),
    "a tensor of T5 that is missing": (
        lambda f: rewrite(f / "text_encoder_3/model.safetensors", lambda s: s.pop("encoder.final_layer_norm.weight")),
        "missing encoder.final_layer_norm.weight"),
    "a DDIM scheduler": (lambda f: diffusers.DDIMScheduler().save_pretrained(f / "scheduler"),
                         "does not name FlowMatchEulerDiscreteScheduler"),
    "a PNDM scheduler": (lambda f: diffusers.PNDMScheduler(beta_start=0.00085, beta_end=0.012).save_pretrained(f / "scheduler"),
                         "does not name FlowMatchEulerDiscreteScheduler"),
    "FLUX's scheduler": (lambda f: change(f / "scheduler/scheduler_config.json", use_dynamic_shifting=True),
                         "sets use_dynamic_shifting, which is implemented for FLUX alone"),
    "no scheduler": (lambda f: shutil.rmtree(f / "scheduler"), "scheduler_config.json"),
    "no second tokenizer": (lambda f: shutil.rmtree(f / "tokenizer_2"), "tokenizer_2/ needs"),
    "another kind of tokenizer": (lambda f: shutil.copytree(f / "tokenizer", f / "tokenizer_3", dirs_exist_ok=True),
                                  "tokenizer_3"),
    "short prompts for one CLIP": (lambda f: change(f / "tokenizer_2/tokenizer_config.json", model_max_length=30),
                                   "make 77 and 30 tokens of a prompt, the two CLIP have places for 77 and 77"),
    "no CLIP": (lambda f: shutil.rmtree(f / "text_encoder"), "has no text_encoder/config.json"),
    "an index that is no JSON": (lambda f: (f / "model_index.json").write_text("{"), "model_index.json is not valid JSON"),
}


@pytest.mark.parametrize("how", SPOILED)
def test_a_folder_that_does_not_fit_is_one_sentence(how, folder):
    spoil, named = SPOILED[how]
    spoil(folder)
    with pytest.raises((ValueError, checkpoints.Unavailable), match=named) as caught:
        load_editor(folder, device="cpu")
    assert "\n" not in str(caught.value)


def test_a_missing_shard_is_one_sentence(folders, tmp_path):
    pipeline, _ = folders()
    folder = small_sd3.write(pipeline, tmp_path, max_shard_size="30KB")
    load_editor(folder, device="cpu")
    gone = sorted(folder.glob("text_encoder_3/model-*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(checkpoints.Unavailable, match=f"lists the shard {gone.name}, which is not there") as caught:
        load_editor(folder, device="cpu")
    assert "\n" not in str(caught.value)
    assert load_editor(folder, device="cpu", t5=False).text_encoders.t5_tokenizer is None


MIXED = {                                                    # which parts come from which other config
    "another T5": ("as SD3.5 medium", ["text_encoder_3"], "takes 64 channels of text, T5 has 56"),
    "another CLIP": (SINGLE, ["text_encoder"], "takes 44 channels of pooled text, the two CLIP have 84"),
    "CLIP of other projections": ("another VAE, short prompts", ["text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"],
                                  "takes 44 channels of pooled text, the two CLIP have 30"),
    "another VAE": ("another VAE, short prompts", ["vae"],
                    "takes 16 channels and gives 16; with this VAE it has to take 6 and give 6"),
}


@pytest.mark.parametrize("how", MIXED)
def test_networks_that_do_not_belong_together_are_refused(how, folder, folders):
    config, parts, named = MIXED[how]
    other = folders(config)[1].checkpoint.folder
    for part in parts:
        shutil.rmtree(folder / part)
        shutil.copytree(other / part, folder / part)
    with pytest.raises(ValueError, match=named) as caught:
        load_editor(folder, device="cpu")
    assert "\n" not in str(caught.value)


def test_a_transformer_of_other_channels_is_refused(folders, tmp_path):
    _, editor = folders(in_channels=32)
    folder = shutil.copytree(editor.checkpoint.folder, tmp_path / "editor")
    shutil.rmtree(folder / "vae")
    shutil.copytree(folders("another VAE, short prompts")[1].checkpoint.folder / "vae", folder / "vae")
    with pytest.raises(ValueError, match="takes 32 channels and gives 16; with this VAE it has to take 12 or 18 and give 6"):
        load_editor(folder, device="cpu")


WRONG_CALLS = [
    ({"strength": 0}, "strength 0: above 0"), ({"strength": -0.5}, "strength -0.5"), ({"strength": 1.01}, "strength 1.01"),
    ({"strength": 1e-18, "steps": 9}, "strength 1e-18 of 9 denoising steps is less than one step"),
    ({"steps": 0}, "denoising steps"), ({"steps": 1001}, "denoising steps"), ({"image_guidance": 1.5}, "has no image_guidance"),
]


def test_a_wrong_call_is_one_sentence_before_anything_is_read(folders, loads):
    editor = load_editor(folders()[1].checkpoint.folder, device="cpu")
    for options, named in WRONG_CALLS:
        with pytest.raises(ValueError, match=named) as caught:
            editor.edit(smooth(16, 16), "a prompt never said", **options)
        assert "\n" not in str(caught.value) and len(loads) == 1


def test_another_pipelines_folder_without_an_index_is_told(folder):
    (folder / "model_index.json").unlink()
    with pytest.raises(checkpoints.Unavailable, match="unet/config.json"):
        load_editor(folder, device="cpu")
