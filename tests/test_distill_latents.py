"""tools/distill_latents.py: training on a few pictures, resuming, and what ships."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_latent_spaces import network, write_authors

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
import distill_latents as tool  # noqa: E402

from sifm_min.models import latent_spaces  # noqa: E402
from sifm_min.models.latent_spaces import SPACES  # noqa: E402
from sifm_min.models.tiny_vae import AutoencoderTiny  # noqa: E402

SHIPPED = [name for name in tool.COPIED if (latent_spaces.COPIES / name).is_dir()]


@pytest.fixture
def photos(tmp_path):
    """A folder of four pictures with LICENSES.jsonl: three to train on."""
    folder, rows = tmp_path / "photos", []
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i, (use, category) in enumerate([("train", "people"), ("train", "artworks"), ("train", "people"),
                                         ("evaluate", "people"), ("evaluate", "landscapes"), ("evaluate", "artworks")]):
        Image.fromarray(rng.integers(0, 256, (130, 120 + i, 3), np.uint8)).save(folder / f"{i}.png")
        rows.append({"id": f"p{i}", "file": f"{i}.png", "use": use, "category": category, "source": f"archive:{i}",
                     "path": "a/b", "title": f"title {i}", "author": "An Author", "licence": "CC0-1.0"})
    (folder / "LICENSES.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def command(photos, tmp_path, monkeypatch):
    """The tool with networks of few layers and small batches, in a folder of its own."""
    monkeypatch.setattr(tool, "BLOCKS", {"num_encoder_blocks": (0, 0, 0, 1), "num_decoder_blocks": (1, 0, 0, 0)})
    monkeypatch.setattr(tool, "BATCH", 3)
    monkeypatch.setattr(tool, "CROP", 16)
    monkeypatch.setattr(latent_spaces, "COPIES", tmp_path / "latents")
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)              # the other tests keep theirs
    weights = write_authors(tmp_path / "weights", SPACES["sd3"], network(SPACES["sd3"]))

    def run(name, *more):
        paths = {"train": ["sd3", "--photos", photos, "--weights", weights],
                 "export": ["sd3", "--photos", photos], "measure": ["sd3", "--photos", photos, "--weights", weights],
                 "card": []}[name]
        tool.main([name, *map(str, [*paths, "--work", tmp_path / "work", *more])])

    return run


def state(tmp_path, half):
    return torch.load(tmp_path / "work" / f"sd3-{half}.pt", weights_only=True)


def test_training_resumes_and_what_ships_loads_in_diffusers(command, tmp_path, capsys):
    diffusers = pytest.importorskip("diffusers")
    command("train", "--encoder-steps", 2, "--decoder-steps", 1)
    first = state(tmp_path, "encoder")["network"]
    command("train", "--encoder-steps", 4, "--decoder-steps", 2)
    assert "goes on at step 2 of 4" in capsys.readouterr().out
    assert state(tmp_path, "encoder")["step"] == 4 and state(tmp_path, "decoder")["step"] == 2
    assert any((first[name] != tensor).any() for name, tensor in state(tmp_path, "encoder")["network"].items())
    command("export")
    folder = latent_spaces.COPIES / "sd3"
    assert json.loads((folder / tool.TRAINING).read_text()) == {"encoder": 4, "decoder": 2}
    ours = latent_spaces.open_copy(folder, SPACES["sd3"]).network(dtype=torch.float32)
    peer = diffusers.AutoencoderTiny.from_pretrained(folder, torch_dtype=torch.float32)
    pixels = torch.rand(1, 3, 32, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        latent = ours.encode(pixels)[0]
        torch.testing.assert_close(latent, peer.encode(pixels).latents, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours.decode(latent), peer.decode(latent).sample, rtol=1e-5, atol=1e-5)
    rows = [json.loads(line) for line in (folder.parent / "ATTRIBUTIONS.jsonl").read_text().splitlines()]
    assert [row["title"] for row in rows] == ["title 0", "title 1", "title 2"]           # those of training alone
    assert set(rows[0]) == {"source", "path", "title", "author", "licence"}


def test_training_goes_on_from_a_copy(command, tmp_path):
    command("train", "--encoder-steps", 1, "--decoder-steps", 1)
    command("export")
    with pytest.raises(SystemExit, match="is of a run with --start None: remove it, or choose another --work"):
        command("train", "--encoder-steps", 2, "--start", latent_spaces.COPIES / "sd3")
    copied = latent_spaces.open_copy(latent_spaces.COPIES / "sd3", SPACES["sd3"]).network(dtype=torch.float32).state_dict()
    for half in ("encoder", "decoder"):
        (tmp_path / "work" / f"sd3-{half}.pt").unlink()
    command("train", "--encoder-steps", 0, "--decoder-steps", 1, "--start", latent_spaces.COPIES / "sd3")
    for name, tensor in state(tmp_path, "decoder")["network"].items():
        assert (tensor - copied[f"decoder.{name}"]).abs().max() < 3 * tool.RATE / tool.WARM_UP       # one small step away


def test_figures_of_a_copy_that_equals_its_teacher(command, tmp_path, monkeypatch):
    open_copy = latent_spaces.open_copy
    monkeypatch.setattr(latent_spaces, "open_copy",
                        lambda folder, space: latent_spaces.open_folder(tmp_path / "weights", space))
    command("train", "--encoder-steps", 1, "--decoder-steps", 1)
    command("measure", "--images", 2, "--size", 32, "--steps", 2)
    command("measure", "--images", 3, "--size", 32, "--steps", 2)
    rows = [json.loads(line) for line in (tmp_path / "work" / "sd3-measured.jsonl").read_text().splitlines()]
    assert [row["photograph"] for row in rows] == ["p3", "p4", "p5"]                     # one of each category, none twice
    for row in rows:
        assert row["latent error"] < 1e-3 and row["correlation"] > 0.9999
        assert row["PSNR teacher"] == pytest.approx(row["PSNR pupil"])
        for made in tool.MADE:
            for purifier in ("none", "JPEG 75"):
                assert row[f"{made}, teacher, {purifier}"] == pytest.approx(row[f"{made}, pupil, {purifier}"])
        assert row["teacher, teacher, none"] > row["noise, teacher, none"]
    (latent_spaces.COPIES / "sd3").mkdir(parents=True)
    (latent_spaces.COPIES / "sd3" / tool.TRAINING).write_text('{"encoder": 1, "decoder": 1}')
    command("card")
    text = (latent_spaces.COPIES / "README.md").read_text()
    command("measure", "--images", 1, "--size", 24, "--steps", 2)
    rows = [json.loads(line) for line in (tmp_path / "work" / "sd3-measured.jsonl").read_text().splitlines()]
    assert [row["photograph"] for row in rows] == ["p3", "p4", "p5", "p3"]               # of another size: measured anew
    monkeypatch.setattr(latent_spaces, "open_copy", open_copy)
    command("export")
    with pytest.raises(SystemExit, match="is of an earlier copy of sd3: measure this one first"):
        command("card")
    assert "Trained for 1 steps of 3 pairs (encoder) and 1 of 3 crops (decoder) in the last run. 3 photographs." in text
    assert "| made on ours: the teacher's shift over its white box | at least .70 | 1.00 |" in text


def test_attack_keeps_the_budget_on_8_bits_and_beats_noise():
    encoder = network(SPACES["sd1"]).encoder.requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(2, 3, 32, 32, generator=generator).mul(255).round() / 255
    y = tool.attack(encoder, x, generator)
    levels = (y - x) * 255
    assert levels.abs().max() < 7.001 and (levels - levels.round()).abs().max() < 1e-3
    noise = tool.on_8_bits(x, torch.empty_like(x).uniform_(-tool.EPS, tool.EPS, generator=generator))
    with torch.no_grad():
        moved, by_noise = ((encoder(picture) - encoder(x)).square().mean().sqrt() for picture in (y, noise))
    assert moved > 1.5 * by_noise


def test_pairs_hold_the_teachers_latents(photos, monkeypatch):
    monkeypatch.setattr(tool, "CROP", 16)
    teacher, pupil = (network(SPACES["sd1"], seed).encoder.requires_grad_(False) for seed in (0, 1))
    pairs = tool.Pairs(tool.photographs(photos, "train"), teacher)
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    x, y, of_x, of_y = pairs.batch(tool.KINDS, pupil, rng, generator)
    assert x.shape == (tool.BATCH, 3, 16, 16) and len(pairs.kept) == tool.BATCH
    torch.testing.assert_close(of_x, teacher(x), rtol=1e-3, atol=1e-3)                  # x is kept on 8 bits
    torch.testing.assert_close(of_y, teacher(y), rtol=1e-3, atol=1e-3)
    assert ((y - x).abs() * 255).max() < 7.6
    pairs.batch(tool.KINDS, pupil, rng, generator)
    assert pairs.count == len(pairs.kept) == tool.BATCH + tool.FRESH


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_copies_are_small_and_whole(name):
    assert "sd1" in SHIPPED
    copy = latent_spaces.copy_of(SPACES[name]).network()
    for half in (copy.encoder, copy.decoder):
        assert sum(p.numel() * p.element_size() for p in half.parameters()) < 3e6
    assert isinstance(copy, AutoencoderTiny) and copy.config.latent_channels == SPACES[name].channels
    rows = [json.loads(line) for line in (latent_spaces.COPIES / "ATTRIBUTIONS.jsonl").read_text().splitlines()]
    assert len(rows) > 300 and all(row["licence"] and row["source"] for row in rows)
