"""The miniature's samples, its two judges, and the shipped editors as a newcomer meets them."""

import json
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

import sifm_min
from sifm_min import miniature
from sifm_min.miniature import consensus, drawing, world
from sifm_min.miniature.verdict import Verdict

SAMPLES = 60


@pytest.fixture(scope="module")
def samples():
    return miniature.samples(SAMPLES, seed=5)


def share(judge, samples, picture):
    return sum(judge(sample, picture(sample)).obeyed for sample in samples) / len(samples)


def noisy(image, strength):
    pixels = np.asarray(image, np.float32) + np.random.default_rng(0).normal(0, 255 * strength, (64, 64, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@pytest.mark.slow
def test_samples_have_what_the_design_promises(samples):
    sample = samples[0]
    assert sample.image.size == sample.target.size == (64, 64) and sample.image.mode == "RGB"
    assert len(sample.unseen_prompts) == len(sample.unseen_captions) == 5 and sample.prompt not in sample.unseen_prompts
    assert {s.category for s in samples} == {"portrait", "landscape", "artwork"}
    assert all(s.target_caption and s.mask.mean() >= 0.03 for s in samples)
    again = miniature.samples(3, seed=5)
    assert [s.prompt for s in again] == [s.prompt for s in samples[:3]]
    assert np.array_equal(again[0].image, sample.image)


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="held-out or train"):
        miniature.samples(1, split="test")


@pytest.mark.slow
@pytest.mark.parametrize("name", miniature.judges)
def test_the_exact_target_is_obeyed_and_the_source_is_not(samples, name):
    judge = miniature.judges[name]
    assert share(judge, samples, lambda s: s.target) >= 0.95
    assert share(judge, samples, lambda s: s.image) <= 0.05
    assert all(judge(s, s.image).semantic_mismatch for s in samples[:20] if not judge(s, s.image).obeyed)


@pytest.mark.parametrize("name", miniature.judges)
def test_another_instruction_done_is_a_mismatch(samples, name):
    judge = miniature.judges[name]
    assert share(judge, samples, lambda s: s.unseen[0].target) <= 0.10


@pytest.mark.parametrize("name", miniature.judges)
@pytest.mark.parametrize("damage", ["noise", "blend", "blur"])
def test_a_destroyed_target_is_degraded(samples, name, damage):
    spoil = {"noise": lambda s: noisy(s.target, 0.35), "blur": lambda s: s.target.filter(ImageFilter.GaussianBlur(9)),
             "blend": lambda s: Image.blend(s.target, samples[(samples.index(s) + 1) % SAMPLES].image, 0.6)}[damage]
    found = [miniature.judges[name](s, spoil(s)) for s in samples]
    enough = 0.70 if damage == "blur" else 0.85              # the oracle forgives blur where the whole picture is one colour
    assert sum(v.success for v in found) >= enough * SAMPLES
    if damage == "noise":
        assert sum(v.perceptual_degradation for v in found) >= 0.85 * SAMPLES


@pytest.mark.slow
@pytest.mark.parametrize("name", miniature.judges)
def test_slight_softness_and_grain_are_forgiven(samples, name):
    judge = miniature.judges[name]
    assert share(judge, samples, lambda s: noisy(s.target, 0.02)) >= 0.90
    soft = {"reducing": Image.Resampling.BOX, "enlarging": Image.Resampling.BICUBIC}
    softened = share(judge, samples, lambda s: s.target.resize((48, 48), soft["reducing"]).resize((64, 64), soft["enlarging"]))
    assert softened >= 0.85


def elsewhere(scene, rng):
    """The scene as img2img may well draw it: in another pose, with another skin."""
    values = {"skin": rng.choice(world.ATTRIBUTES["portrait"]["skin"])} if scene.category == "portrait" else {}
    return drawing.render(replace(scene, jitter=tuple(rng.uniform(-1, 1) for _ in scene.jitter)).changed(values))


@pytest.mark.slow
@pytest.mark.parametrize("name", miniature.caption_judges)
def test_judges_of_img2img_allow_for_another_pose_alone(samples, name):
    judge, rng, few = miniature.caption_judges[name], random.Random(0), samples[:16]
    assert share(judge, few, lambda s: elsewhere(s.instruction.target, rng)) >= 0.9
    assert share(judge, few, lambda s: elsewhere(s.instruction.scene, rng)) <= 0.1
    assert share(judge, few, lambda s: s.unseen[0].target) <= 0.1
    assert share(judge, few, lambda s: noisy(elsewhere(s.instruction.target, rng), 0.35)) == 0


def test_the_judges_of_an_editor_are_those_of_its_kind(samples):
    captions, instructions = SimpleNamespace(kind="img2img"), SimpleNamespace(kind="instruct")
    assert miniature.judges_of(captions) is miniature.caption_judges and miniature.judges_of(instructions) is miniature.judges
    assert miniature.prompt_of(samples[0], captions) == samples[0].target_caption
    assert miniature.prompt_of(samples[0], instructions) == samples[0].prompt
    other = elsewhere(next(s for s in samples if s.category == "landscape").instruction.target, random.Random(3))
    sample = next(s for s in samples if s.category == "landscape")
    assert miniature.judge(sample, other, captions).obeyed and not miniature.judge(sample, other).obeyed


def test_the_consensus_is_strict(samples, monkeypatch):
    yes, no = Verdict.of(True, False), Verdict.of(False, False)
    for verdicts, success, obeyed in (((yes, yes), True, False), ((no, no), False, True), ((yes, no), False, False)):
        monkeypatch.setattr(consensus, "judges", {str(i): lambda s, e, v=v: v for i, v in enumerate(verdicts)})
        found = miniature.judge(samples[0], samples[0].image)
        assert (found.success, found.obeyed) == (success, obeyed)


def test_pictures_of_any_size_and_mode_are_judged(samples):
    sample = samples[0]
    assert miniature.judge(sample, sample.target.resize((256, 256), Image.Resampling.BICUBIC)).obeyed
    assert not miniature.judge(sample, sample.target.convert("L")).obeyed or sample.kind == "black and white"


def test_hidden_attributes_are_not_asked_about():
    scene = world.random_scene(world.generator(0, "t"),
                               "portrait").changed({"hat": "top hat", "haircut": "bald", "hair": "black"})
    assert not {"hair", "haircut", "person"} & world.visible_attributes(scene)
    assert world.visible_attributes(scene.changed({"style": "negative"})) == {"style"}


# -- the shipped editors ----------------------------------------------------------------------------------------------------

MODELS = Path(sifm_min.models.__file__).parent


SHIPPED = ("miniature", "miniature-plain", "miniature-sd3")


@pytest.mark.slow
@pytest.mark.parametrize("name", SHIPPED)
def test_the_shipped_editor_loads_like_a_real_folder(name):
    by_name, by_folder = sifm_min.load_editor(name), sifm_min.load_editor(str(MODELS / name))
    image = miniature.samples(1, seed=1)[0].image
    assert np.array_equal(by_name.edit(image, "make it night", steps=2),
                          by_folder.edit(image, "make it night", steps=2))
    assert "protects nothing" in by_name.notice and by_name.working_size == 64
    assert by_name.provenance()["weights"]


def test_the_shipped_folders_are_small_and_their_hashes_hold():
    import hashlib
    sizes = {name: sum(f.stat().st_size for f in (MODELS / name).rglob("*") if f.is_file()) for name in SHIPPED}
    assert sizes["miniature"] + sizes["miniature-plain"] <= 20e6 and sizes["miniature-sd3"] <= 20e6
    for name in SHIPPED:
        for line in (MODELS / name / "SHA256SUMS").read_text().splitlines():
            digest, file = line.split("  ")
            assert hashlib.sha256((MODELS / name / file).read_bytes()).hexdigest() == digest


def test_both_editors_share_all_but_the_encoder():
    from safetensors.torch import load_file
    tuned, plain = (load_file(MODELS / name / "vae/diffusion_pytorch_model.safetensors")
                    for name in ("miniature", "miniature-plain"))
    differ = {key.split(".")[0] for key in tuned if not torch.equal(tuned[key], plain[key])}
    assert differ == {"encoder", "quant_conv"}


def test_the_shipped_tokenizer_is_small_and_takes_any_text():
    vocabulary = json.loads((MODELS / "miniature/tokenizer/vocab.json").read_text(encoding="utf-8"))
    assert len(vocabulary) <= 2000
    editor = sifm_min.load_editor("miniature")
    for text in ("", "make the sky red", "über-façade 🦊 \u200b 12345", "x" * 500):
        (ids,) = editor.tokenizer([text])
        assert len(ids) == editor.text_encoder.config.max_position_embeddings and max(ids) < len(vocabulary)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["miniature", "miniature-sd3"])
def test_the_editor_obeys(name):
    editor, samples = sifm_min.load_editor(name), miniature.samples(30, seed=11)
    clean = editor.edit([s.image for s in samples], [miniature.prompt_of(s, editor) for s in samples])
    obeyed = sum(miniature.judge(s, e, editor).obeyed for s, e in zip(samples, clean, strict=True))
    assert obeyed >= 17                                      # over 70 % on 100 (README); this bound is 1.6 sigma below 70 %
    wrong = sum(miniature.judge(s, e, editor).obeyed for s, e in zip(samples, clean[1:] + clean[:1], strict=True))
    assert wrong <= 1


@pytest.mark.slow
def test_diffusers_draws_the_same_picture_from_the_folder():
    diffusers = pytest.importorskip("diffusers", reason="the oracle is diffusers (the test extra)")
    pipeline = diffusers.StableDiffusionInstructPix2PixPipeline.from_pretrained(MODELS / "miniature", torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    editor, sample = sifm_min.load_editor("miniature"), miniature.samples(1, seed=2)[0]
    defaults = editor.defaults
    theirs = pipeline(sample.prompt, image=sample.image, num_inference_steps=defaults.steps, guidance_scale=defaults.guidance,
                      image_guidance_scale=defaults.image_guidance, generator=torch.Generator().manual_seed(4)).images[0]
    ours = editor.edit(sample.image, sample.prompt, seed=4)
    assert np.abs(np.asarray(ours, int) - np.asarray(theirs, int)).max() <= 1


@pytest.mark.slow
def test_diffusers_draws_the_same_picture_from_the_sd3():
    diffusers = pytest.importorskip("diffusers", reason="the oracle is diffusers (the test extra)")
    pipeline = diffusers.StableDiffusion3Img2ImgPipeline.from_pretrained(
        MODELS / "miniature-sd3", text_encoder_3=None, tokenizer_3=None, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    editor, sample = sifm_min.load_editor("miniature-sd3"), miniature.samples(1, seed=2)[0]
    defaults = editor.defaults
    theirs = pipeline(sample.target_caption, image=sample.image, height=64, width=64, strength=defaults.strength,
                      num_inference_steps=defaults.steps, guidance_scale=defaults.guidance,
                      max_sequence_length=defaults.text_length, generator=torch.Generator().manual_seed(4)).images[0]
    ours = editor.edit(sample.image, sample.target_caption, seed=4)
    assert np.abs(np.asarray(ours, int) - np.asarray(theirs, int)).max() <= 1
