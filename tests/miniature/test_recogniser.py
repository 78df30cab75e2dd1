"""The recogniser: its classes and thresholds, its shipped weights, and the tool that trains it."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from photographs import smooth
from PIL import Image
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import damages  # noqa: E402
import train_recogniser as tool  # noqa: E402
import training_run  # noqa: E402

from sifm_min import images  # noqa: E402
from sifm_min.miniature import deciding, recogniser, thresholds  # noqa: E402
from sifm_min.miniature.kinds import KINDS  # noqa: E402
from sifm_min.miniature.recogniser import Recogniser, classes  # noqa: E402
from sifm_min.miniature.verdict import Verdict  # noqa: E402

SAMPLE = SimpleNamespace(image=smooth(40, 40), kind="frame", option="white")


def test_every_kind_with_every_option_is_a_class_of_its_own():
    wanted = 1 + sum(len(kind.options) for kind in KINDS.values())
    assert len(set(classes())) == len(classes()) == wanted
    assert {"unchanged", "night", "frame: white"} <= set(classes())


def test_the_network_scores_every_class_and_stays_small():
    network = Recogniser(len(classes()))
    scores, damage = network(torch.rand(2, 3, 128, 128), torch.rand(2, 3, 128, 128))
    assert scores.shape == (2, len(classes())) and damage.shape == (2,)
    assert sum(p.numel() for p in network.parameters()) <= 400_000


def test_the_network_sees_both_pictures_and_where_they_differ():
    torch.manual_seed(0)
    network = Recogniser(8).eval()
    source, edit = torch.rand(1, 3, 128, 128), torch.rand(1, 3, 128, 128)
    spots = [edit.clone(), edit.clone()]
    spots[0][..., :32, :32], spots[1][..., -32:, -32:] = 1, 1
    answers = [network(a, b)[0] for a, b in ((edit, source), (edit, edit), (spots[0], source), (spots[1], source))]
    assert all((one - other).abs().max() > 1e-4 for i, one in enumerate(answers) for other in answers[:i])


@pytest.mark.parametrize(("asked", "damage", "mismatch", "degraded"), [
    (thresholds.ASKED, thresholds.DAMAGED, False, False), (thresholds.ASKED - 0.01, 0, True, False),
    (1, thresholds.DAMAGED + 0.01, False, True)])
def test_a_verdict_follows_the_thresholds(monkeypatch, asked, damage, mismatch, degraded):
    answer = dict.fromkeys(classes(), 0.0) | {"frame: white": asked, "frame: wooden": 1 - asked}
    monkeypatch.setattr(recogniser, "read_edit", lambda source, edited: (answer, damage))
    assert recogniser.recognise(SAMPLE, smooth(40, 40)) == Verdict.of(mismatch, degraded)


def test_two_judges_decide_and_a_split_is_neither(monkeypatch):
    assert list(deciding.judges) == ["exact oracle", "recogniser"]
    said = {"one": Verdict.of(False, True), "other": Verdict.of(False, False)}
    monkeypatch.setattr(deciding, "judges", {name: lambda sample, edited, v=v: v for name, v in said.items()})
    assert deciding.judge(SAMPLE, None) == Verdict(False, False, False, False)


def test_texture_grows_in_flat_parts_and_falls_under_blur():
    pixels = images.to_pixels(smooth(128, 128, seed=3))
    plain = recogniser.texture(pixels)
    assert plain.shape == (1, 2 * recogniser.BANDS * (1 + len(recogniser.QUANTILES)))
    grained = recogniser.texture(damages.noise(pixels, 0.08, torch.Generator().manual_seed(0)))
    low = slice(2, 4)                                        # of the finest octave: the tenth part of light and of colour
    assert (grained - plain)[0, low].min() > 0.5
    assert (recogniser.texture(damages.blur(grey_checks(), 3, None)) - recogniser.texture(grey_checks()))[0, :2].min() < -1


def grey_checks():
    return (torch.arange(128).add(torch.arange(128)[:, None]).div(3, rounding_mode="floor") % 2).float().expand(1, 3, 128, 128)


def test_standardised_features_have_no_mean_and_unit_deviation():
    features = torch.randn(500, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([1, 10, 0]) + 5
    layer = recogniser.Standardised(3)
    layer.set(features)
    found = layer(features)
    assert found.mean(0).abs().max() < 1e-4 and found.std(0).tolist() == pytest.approx([1, 1, 0], abs=0.02)


# --------------------------------------------------------------------------------------------------------- weights, files

@pytest.fixture
def weights(tmp_path, monkeypatch):
    """A path to write weights to, which the recogniser then reads."""
    monkeypatch.setattr(recogniser, "WEIGHTS", tmp_path / "model.safetensors")
    recogniser.load_recogniser.cache_clear()
    yield recogniser.WEIGHTS
    recogniser.load_recogniser.cache_clear()


def write(path, names, network=None):
    network = network or Recogniser(len(names))
    save_file(network.state_dict(), path, metadata={"format": "pt", "classes": json.dumps(names)})
    return network


def test_reading_pairs_scores_with_the_names_in_the_file(weights):
    torch.manual_seed(0)
    names = classes()[::-1]                                  # the file's order is the network's, whatever KINDS' order is
    network = write(weights, names).eval()
    source, edit = smooth(200, 200, seed=1), smooth(200, 200, seed=2)
    pixels = [images.to_pixels(picture.resize((128, 128), Image.Resampling.LANCZOS)) for picture in (edit, source)]
    with torch.no_grad():
        scores, damage = network(*pixels)
    found, level = recogniser.read_edit(source, edit)
    assert list(found) == names and list(found.values()) == pytest.approx(scores[0].softmax(0).tolist(), abs=1e-3)
    assert level == pytest.approx(damage.sigmoid().item(), abs=1e-2)


def test_missing_weights_are_named(weights):
    with pytest.raises(FileNotFoundError, match="train_recogniser"):
        recogniser.load_recogniser()


def test_weights_of_other_kinds_are_refused(weights):
    write(weights, ["unchanged", "night"])
    with pytest.raises(ValueError, match="other kinds of edit"):
        recogniser.load_recogniser()


def test_the_shipped_weights_know_the_kinds_and_no_more():
    network, names = recogniser.load_recogniser()
    assert set(names) == set(classes()) and not any(p.requires_grad for p in network.parameters())
    assert recogniser.WEIGHTS.stat().st_size < 1_000_000
    assert {tensor.dtype for tensor in load_file(recogniser.WEIGHTS).values()} == {torch.float16}


# --------------------------------------------------------------------------------------------------------------- training

@pytest.fixture
def photos(tmp_path):
    """A folder of four pictures with LICENSES.jsonl: two to train on."""
    folder, rows = tmp_path / "photos", []
    for i, use in enumerate(("train", "train", "evaluate", "evaluate")):
        folder.mkdir(exist_ok=True)
        smooth(150, 140 + i, seed=i).save(folder / f"{i}.png")
        rows.append({"id": f"p{i}", "file": f"{i}.png", "use": use, "category": "people"})
    (folder / "LICENSES.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_training_resumes_and_exports_what_the_judge_reads(photos, tmp_path, weights, monkeypatch, capsys):
    monkeypatch.setattr(tool, "FULL", 64)
    monkeypatch.setattr(tool, "PART", 2)
    asked, applies = [], tool.photosets.marked
    monkeypatch.setattr(tool.photosets, "marked", lambda folder, use: asked.append(use) or applies(folder, use))

    def run(*stages, steps):
        tool.main([*stages, "--photos", str(photos), "--work", str(tmp_path / "work"), "--to", str(weights), "--crops", "3",
                   "--autoencoded", "1", "--batch", "6", "--scored", "24", "--score-steps", "3", "--steps", str(steps)])
        return torch.load(tmp_path / "work" / tool.STATE)["average"] if "train" in stages else None

    whole = run("data", "train", steps=4)
    (tmp_path / "work" / tool.STATE).unlink()
    monkeypatch.setattr(tool, "draw", None)                  # the pictures are there already
    monkeypatch.setattr(training_run, "SAVE_EVERY", -1)      # seconds: every step
    save, stopped = training_run.save, []

    def stopping(value, path):
        save(value, path)
        if value.get("step") == 2 and not stopped:
            stopped.append(True)
            raise KeyboardInterrupt

    monkeypatch.setattr(training_run, "save", stopping)
    with pytest.raises(KeyboardInterrupt):
        run("data", "train", steps=4)
    resumed = run("train", "score", "export", steps=4)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert set(asked) == {"train"}                           # no evaluation photograph was looked at
    network, names = recogniser.load_recogniser()
    assert names == classes() and torch.allclose(network.stem.weight, whole["stem.weight"], atol=1e-3)
    assert network.damage[0].mean.abs().max() > 0           # of the pictures scored


def test_drawn_pictures_are_the_exact_results(photos):
    source, found = next(tool.draw([photos / "0.png"], 0, 1, 64, 3))
    assert len(found) == 3 and len({label for label, _ in found}) == 3
    for label, target in found:
        kind, _, option = classes()[label].partition(": ")
        wanted = KINDS[kind].target(source.permute(1, 2, 0).numpy(), option)
        assert torch.equal(target, torch.from_numpy(wanted).permute(2, 0, 1))


# ----------------------------------------------------------------------------------------------------------------- damage

def test_levels_are_a_half_at_the_limit():
    assert [damages.level(x, 3) for x in (0, 1.5, 3, 6, 9)] == [0, 0.25, 0.5, 1, 1]


def measured(name, strength):
    """The RMS that a damage of this name and strength does to a picture."""
    pixels = images.to_pixels(smooth(128, 128, seed=4)) * 0.4 + 0.3
    found = damages.PIXELS[name][0](pixels, strength, torch.Generator().manual_seed(0))
    assert found.shape == pixels.shape and found.min() >= 0 and found.max() <= 1
    return (found - pixels).square().mean().sqrt().item()


@pytest.mark.parametrize("name", damages.PIXELS)
def test_every_damage_grows_with_its_strength(name):
    limit = damages.PIXELS[name][1]
    assert 0 < measured(name, limit / 2) < measured(name, limit) < measured(name, 2 * limit)


@pytest.mark.parametrize("name", ["texture", "stains"])
def test_false_texture_has_the_stated_rms(name):
    assert measured(name, 0.05) == pytest.approx(0.05, rel=0.05)


def test_noise_of_a_smaller_picture_is_the_mean_of_it():
    assert measured("noise", 0.08) == pytest.approx(0.04, rel=0.05)                  # 128 of 256 pixels


@pytest.mark.parametrize("smooth_noise", [False, True])
def test_latent_noise_is_a_share_of_the_latents_deviation(smooth_noise):
    latent = 3 * torch.randn(2, 4, 32, 32, generator=torch.Generator().manual_seed(1))
    added = damages.latent_noise(latent, 0.5, torch.Generator().manual_seed(0), smooth_noise) - latent
    assert added.std((1, 2, 3)).tolist() == pytest.approx([1.5, 1.5], rel=0.05)
    jump = (added[..., 1:] - added[..., :-1]).std() / added.std()
    assert jump < 0.8 if smooth_noise else jump > 1.3
