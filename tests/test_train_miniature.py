"""tools/train_miniature.py and train_miniature_sd3.py: pairs, words, resuming, and editors that diffusers loads."""

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from photographs import smooth
from PIL import Image
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
import photograph_check as checking  # noqa: E402
import photograph_pairs as pairs  # noqa: E402
import photograph_words as words  # noqa: E402
import train_miniature as tool  # noqa: E402
import train_miniature_sd3 as tool_sd3  # noqa: E402
import training_run  # noqa: E402

from sifm_min import load_editor  # noqa: E402
from sifm_min.editors import InstructPix2Pix, UltraEdit  # noqa: E402
from sifm_min.models import latent_spaces  # noqa: E402
from sifm_min.models.latent_spaces import SPACES  # noqa: E402
from sifm_min.models.tiny_vae import AutoencoderTiny, TinyVAEConfig  # noqa: E402

MODELS = Path(__file__).parents[1] / "models"
SIZES = (64, 96)
BLOCKS = {"num_encoder_blocks": [0, 0, 0, 1], "num_decoder_blocks": [1, 0, 0, 0],
          "encoder_block_out_channels": [8] * 4, "decoder_block_out_channels": [8] * 4}
FOG, SEPIA = "make it foggy", "make it sepia"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with 34 pictures: 32 to train on, of which two are kept for `check`, and two to evaluate with."""
    folder, rows = tmp_path_factory.mktemp("photos"), []
    for i in range(34):
        smooth(80 + i, 90, seed=i).save(folder / f"{i}.png")
        rows.append({"file": f"{i}.png", "category": "people", "use": "train" if i < 32 else "evaluate"})
    (folder / "LICENSES.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def shrink(monkeypatch, home):
    """Small pictures, few crops, small networks, and small copies of the latent spaces with random weights."""
    monkeypatch.setattr(pairs, "SIZES", SIZES)
    monkeypatch.setattr(pairs, "CROPS", (3, 2))
    for module in (tool, tool_sd3):
        monkeypatch.setattr(module, "SIZES", SIZES)
    monkeypatch.setattr(tool, "BATCH", (3, 2))
    monkeypatch.setattr(latent_spaces, "COPIES", home)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)              # the other tests keep theirs
    for module, name, small in (
            (tool, "TEXT", {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}),
            (tool, "UNET", {"block_out_channels": [8, 16, 16], "cross_attention_dim": 16}),
            (tool_sd3, "MMDIT", {"attention_head_dim": 8, "caption_projection_dim": 32, "joint_attention_dim": 32,
                                 "num_layers": 2, "pooled_projection_dim": 32})):
        monkeypatch.setattr(module, name, getattr(module, name) | small)
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "projection_dim": 16}
    monkeypatch.setattr(tool_sd3, "TEXTS", [config | small for config in tool_sd3.TEXTS])
    for space in ("sd1", "sd3"):
        (home / space).mkdir(parents=True)
        torch.manual_seed(0)
        made = AutoencoderTiny(TinyVAEConfig(latent_channels=SPACES[space].channels, **BLOCKS)).eval()
        with torch.no_grad():                                # latents and pictures with contrast
            made.encoder.layers[-1].weight.mul_(20)
            made.decoder.layers[-1].weight.mul_(3)
            made.decoder.layers[-1].bias.fill_(0.5)
        shipped = json.loads((MODELS / "latents" / space / "config.json").read_text())
        (home / space / "config.json").write_text(json.dumps(shipped | BLOCKS))
        save_file({name: tensor.contiguous() for name, tensor in made.state_dict().items()},
                  home / space / "diffusion_pytorch_model.safetensors")


@pytest.fixture
def small(monkeypatch, tmp_path, folder):
    """Run stages of a tool in a folder of its own: small(tool, *arguments)."""
    shrink(monkeypatch, tmp_path / "latents")

    def run(main, *arguments):
        if main is tool_sd3:
            stages = {stage.__name__: stage for stage in (tool_sd3.data, tool_sd3.text, tool_sd3.mmdit, tool_sd3.export)}
            more = {"stages": stages, "space": "sd3"}
        else:
            more = {}
        tool.main([*map(str, arguments), "--photos", str(folder), "--work", str(tmp_path / "work"), "--chunks", "4",
                   "--text-steps", "2", "--size", "64"], **more)
        return tmp_path / "work"

    return run


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@torch.no_grad()
def bring_to_life(checkpoint):
    """Larger weights, so that text and picture are seen in an edit."""
    state = torch.load(checkpoint, weights_only=True)
    generator = torch.Generator().manual_seed(0)
    for name, weight in state["average"].items():
        if weight.ndim > 1:
            weight.copy_(torch.randn(weight.shape, generator=generator) * weight[0].numel() ** -0.5)
            weight.mul_(3 if "attn2" in name or "context_embedder" in name else 1)
    torch.save(state, checkpoint)


# ------------------------------------------------------------------------------------------------------------- what ships

def test_instruct_pix2pix_ships_as_diffusers_has_it(small, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    from test_editors import assert_other, difference, theirs
    small(tool, "data", "text", "unet", "--steps", 3)
    bring_to_life(tmp_path / "work" / "unet.pt")
    work = small(tool, "export", "--guidance", 3, "--image-guidance", 1.2, "--sampling-steps", 4)
    editor = load_editor(work / "editor", device="cpu")
    assert type(editor) is InstructPix2Pix
    defaults = editor.defaults
    assert (defaults.steps, defaults.guidance, defaults.image_guidance, defaults.size) == (4, 3.0, 1.2, 64)
    pipeline = diffusers.StableDiffusionInstructPix2PixPipeline.from_pretrained(work / "editor", torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    pictures = [theirs(pipeline, smooth(64, 64), prompt, steps=4, guidance=3.0, image_guidance=1.2) for prompt in (FOG, SEPIA)]
    assert_other(*pictures)
    for prompt, picture in zip((FOG, SEPIA), pictures, strict=True):
        assert difference(editor.edit(smooth(64, 64), prompt, seed=0), picture).max() <= 1


def test_stages_out_of_order_are_one_sentence(small, tmp_path):
    with pytest.raises(SystemExit, match="has no text.pt: the stage text comes first"):
        small(tool, "unet", "--steps", 1)
    small(tool, "text")
    with pytest.raises(SystemExit, match="has no pairs of 64 pixels yet: the stage data makes them"):
        small(tool, "unet", "--steps", 1)


def test_export_teaches_nothing_and_dropped_kinds_are_no_pairs(small, tmp_path, monkeypatch):
    work = small(tool, "data", "text", "unet", "--steps", 1)
    before = (work / "text.pt").read_bytes()
    small(tool, "export", "--text-steps", 9)
    assert (work / "text.pt").read_bytes() == before
    chunk = next((work / "chunks").glob("*.pt"))
    made = torch.load(chunk, weights_only=True)
    made["asked"][0] = ("mirrored", "")
    torch.save(made, chunk)
    pool = pairs.read_pools(work)[made["size"]]
    assert sum(map(len, pool.by_kind)) == len(pool.asked) - 1 and (pool.asked == pairs.GONE).sum() == 1


def test_ultraedit_ships_as_its_authors_have_it(small, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    from test_editors import assert_other, difference
    from test_sd3 import ultraedit
    small(tool_sd3, "data", "text", "mmdit", "--steps", 3)
    bring_to_life(tmp_path / "work" / "mmdit.pt")
    work = small(tool_sd3, "export", "--guidance", 3, "--image-guidance", 1.2, "--sampling-steps", 4)
    editor = load_editor(work / "editor", device="cpu")
    assert type(editor) is UltraEdit
    pipeline = diffusers.StableDiffusion3Img2ImgPipeline.from_pretrained(work / "editor", text_encoder_3=None,
                                                                         tokenizer_3=None, torch_dtype=torch.float32)
    pictures = [ultraedit(pipeline, smooth(64, 64), prompt, steps=4, guidance=3.0, image_guidance=1.2, t5_length=0)
                for prompt in (FOG, SEPIA)]
    assert_other(*pictures)
    for prompt, picture in zip((FOG, SEPIA), pictures, strict=True):
        assert difference(editor.edit(smooth(64, 64), prompt, seed=0), picture).max() <= 1


@pytest.mark.skipif("AutoencoderTiny" not in (MODELS / "miniature/vae/config.json").read_text(), reason="not yet shipped")
def test_shipped_instruct_pix2pix_is_diffusers():
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    from test_editors import assert_other, difference, theirs
    editor = load_editor("miniature", device="cpu")
    pipeline = diffusers.StableDiffusionInstructPix2PixPipeline.from_pretrained(MODELS / "miniature", torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    settings = {"guidance": editor.defaults.guidance, "image_guidance": editor.defaults.image_guidance, "steps": 3}
    pictures = [theirs(pipeline, smooth(96, 96), prompt, **settings) for prompt in (FOG, SEPIA)]
    assert_other(*pictures)
    for prompt, picture in zip((FOG, SEPIA), pictures, strict=True):
        assert difference(editor.edit(smooth(96, 96), prompt, size=96, **settings), picture).max() <= 1


@pytest.mark.skipif("AutoencoderTiny" not in (MODELS / "miniature-sd3/vae/config.json").read_text(), reason="not yet shipped")
def test_shipped_ultraedit_is_its_authors_loop():
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    from test_editors import assert_other, difference
    from test_sd3 import ultraedit
    editor = load_editor("miniature-sd3", device="cpu")
    pipeline = diffusers.StableDiffusion3Img2ImgPipeline.from_pretrained(MODELS / "miniature-sd3", text_encoder_3=None,
                                                                         tokenizer_3=None, torch_dtype=torch.float32)
    settings = {"guidance": editor.defaults.guidance, "image_guidance": editor.defaults.image_guidance, "steps": 3}
    pictures = [ultraedit(pipeline, smooth(96, 96), prompt, t5_length=0, **settings) for prompt in (FOG, SEPIA)]
    assert_other(*pictures)
    for prompt, picture in zip((FOG, SEPIA), pictures, strict=True):
        assert difference(editor.edit(smooth(96, 96), prompt, size=96, **settings), picture).max() <= 1


@pytest.mark.parametrize("main, stage, space", [(tool, "unet", "sd1"), (tool_sd3, "mmdit", "sd3")])
def test_autoencoder_is_never_trained(main, stage, space, small, tmp_path):
    work = small(main, "data", "text", stage, "export", "--steps", 2)
    assert bytes_of(work / "editor" / "vae") == bytes_of(tmp_path / "latents" / space)


def test_folder_above_the_limit_is_refused(small, monkeypatch):
    monkeypatch.setattr(tool, "LIMIT", 1000)
    with pytest.raises(ValueError, match="1000 are allowed"):
        small(tool, "data", "text", "unet", "export", "--steps", 1)


# --------------------------------------------------------------------------------------------------------------- training

def test_stages_go_on_where_they_stopped(small, capsys):
    work = small(tool, "data", "text", "unet", "--steps", 2)
    chunks, before = bytes_of(work / "chunks"), torch.load(work / "unet.pt", weights_only=True)
    (work / "chunks" / "0002.pt").unlink()
    small(tool, "data", "text", "unet", "--steps", 5)
    after = torch.load(work / "unet.pt", weights_only=True)
    said = capsys.readouterr().out
    assert "unet goes on at step 2" in said and said.count("chunk 1 of 4") == 1 and said.count("chunk 3 of 4") == 2
    assert (before["step"], after["step"]) == (2, 5) and after["seconds"] > before["seconds"] > 0
    remade = torch.load(work / "chunks" / "0002.pt", weights_only=True)
    assert set(bytes_of(work / "chunks")) == set(chunks) and len(remade["targets"]) > 6
    assert any((before["network"][name] != weight).any() for name, weight in after["network"].items())


def test_rate_rises_stays_and_falls_to_zero_in_time(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(training_run.time, "monotonic", lambda: now[0])
    layer = torch.nn.Linear(1, 1)
    run = training_run.Run(tmp_path / "layer.pt", layer, rate=1.0, minutes=10)
    rates = []
    while not run.done:
        now[0] += 3                                          # 200 steps in ten minutes
        run.descend(layer(torch.ones(1, 1)).sum())
        rates.append(run.optimiser.param_groups[0]["lr"])
    assert run.step == 200 and rates[0] == pytest.approx(1 / 50) and rates[24] == pytest.approx(0.5)
    assert rates[50:79] == [1.0] * 29
    assert rates[139] == pytest.approx(0.5, abs=0.01) and rates[-1] == pytest.approx(0, abs=1e-9)
    again = training_run.Run(tmp_path / "layer.pt", torch.nn.Linear(1, 1), rate=1.0, minutes=20)
    assert again.step == 200 and again.share == pytest.approx(0.5)


def test_average_follows_the_weights_and_is_what_ships(tmp_path):
    layer = torch.nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        layer.weight.zero_()
    run = training_run.Run(tmp_path / "layer.pt", layer, rate=0.1, steps=3)
    weights = []
    for _ in range(3):
        run.descend(-layer(torch.ones(1, 1)).sum())
        weights.append(layer.weight.item())
    average = 0.0
    for step, weight in enumerate(weights, 1):
        average += (1 - (1 + step) / (10 + step)) * (weight - average)
    assert weights[-1] > 1e-3
    for found in (training_run.trained(tmp_path / "layer.pt", torch.nn.Linear(1, 1, bias=False)), run.finished()):
        assert found.weight.item() == pytest.approx(average) and not found.weight.requires_grad


def test_texts_and_pictures_are_left_out_as_often_as_stated(small, monkeypatch):
    work = small(tool, "data", "text")
    monkeypatch.setattr(tool, "BATCH", (400, 100))
    taught = words.teach(work, [tool.TEXT], 2)
    drawn, seen = tool.batches(work, taught, 0), np.zeros(4)
    for step in range(10):
        sources, targets, rows, context, _ = next(drawn)
        assert sources.shape[-1] * 8 == SIZES[step % 5 == 4] and targets.shape == sources.shape
        text, picture = rows != context.empty, sources.flatten(1).any(1)
        seen += [(text & picture).sum(), (~text & picture).sum(), (~text & ~picture).sum(), (text & ~picture).sum()]
    assert seen / seen.sum() == pytest.approx([0.85, 0.05, 0.05, 0.05], abs=0.02)


def test_noise_levels_favour_the_noisy_half():
    found = tool.levels(4000, np.random.default_rng(0))
    assert found.min() >= 0 and found.max() <= 1
    assert (found > 0.5).float().mean() == pytest.approx(0.65 + 0.35 / 2, abs=0.02)


def test_small_crops_stand_at_the_places_of_large_ones():
    from diffusers.models.embeddings import get_2d_sincos_pos_embed
    network = tool_sd3.new_mmdit()
    side, width = network.pos_embed.side, network.config.width
    published = get_2d_sincos_pos_embed(width, side, base_size=side, output_type="pt").float()
    table = network.pos_embed.pos_embed[0]
    torch.testing.assert_close(table, published, rtol=0, atol=1e-5)
    coarse = tool_sd3.positions(network, 2).unflatten(1, (side, side))[0, side // 4:-side // 4, side // 4:-side // 4]
    fine = table.unflatten(0, (side, side))
    angle = (torch.arange(side // 2) * 2 + 0.5)[:, None] * 10000 ** -(torch.arange(width // 4) / (width // 4))
    torch.testing.assert_close(coarse[0, :, :width // 2], torch.cat([angle.sin(), angle.cos()], 1))
    torch.testing.assert_close(coarse[:, 0, width // 2:], torch.cat([angle.sin(), angle.cos()], 1))
    for row, column in ((0, 0), (3, 6)):                     # between the four places that a small crop's token covers
        around = fine[2 * row:2 * row + 2, 2 * column:2 * column + 2].flatten(0, 1)
        assert (around - coarse[row, column]).norm(dim=1).max() < (fine[0, 0] - fine[0, 2]).norm()


# ----------------------------------------------------------------------------------------------------------- pairs, words

def test_pairs_are_latents_of_sources_and_exact_targets(small, folder):
    work = small(tool, "data")
    vae, pools = pairs.autoencoder(work, "sd1"), pairs.read_pools(work)
    assert set(pools) == set(SIZES) and len(pools[64].sources) == 9 and len(pools[96].sources) == 2
    files, rng, counts = pairs.photographs(folder), np.random.default_rng((0, 0)), dict.fromkeys(pairs.KINDS, 0)
    chosen = rng.choice(len(files), 3, replace=False)
    sources, targets, asked = [], [], []
    for file in chosen:
        sources.append(pairs.crop(Image.open(files[file]), 64, rng))
        for place, target in pairs.edits(sources[-1], rng, counts):
            kind, option = pairs.ASKED[place]
            assert kind.applies(sources[-1], option) and (target == kind.target(sources[-1], option)).all()
            targets.append(target)
            asked.append(place)
    first = pools[64]
    assert first.asked[:len(asked)].tolist() == asked
    for found, pictures in ((first.sources[:3], sources), (first.targets[:len(targets)], targets)):
        pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
        with torch.no_grad():
            torch.testing.assert_close(found.float(), vae.encode(2 * pixels - 1)[0], rtol=2e-3, atol=2e-3)


def test_each_kind_is_drawn_equally_often(small):
    pool = pairs.read_pools(small(tool, "data"))[64]
    names = [kind.name for kind, _ in pairs.ASKED]
    present = {names[place] for place in pool.asked.tolist()}
    _, _, places = pool.draw(4000, np.random.default_rng(0))
    counts = [sum(names[place] == name for place in places.tolist()) for name in present]
    assert min(counts) > 0.6 * 4000 / len(present) and max(counts) < 1.5 * 4000 / len(present)
    sources, targets, places = pool.draw(50, np.random.default_rng(1))
    for source, target, place in zip(sources, targets, places, strict=True):
        (row,) = [i for i, held in enumerate(pool.targets.float()) if torch.equal(held, target) and pool.asked[i] == place]
        assert torch.equal(pool.sources[pool.of[row]].float(), source)


def test_photographs_kept_for_check_are_not_trained_on(folder):
    training, kept = pairs.photographs(folder), pairs.photographs(folder, held=True)
    assert [path.name for path in kept] == ["15.png", "31.png"] and len(training) == 30 and not {*training} & {*kept}


def test_held_out_wordings_are_never_trained_on(small):
    trained, places = words.wordings()
    held, _ = words.wordings(held_out=True)
    assert len(places) == len(trained) and not {*trained} & {*held}
    work = small(tool, "text")
    assert words.tokenizer(work).length == words.POSITIONS
    context = words.contexts(work, words.teach(work, [tool.TEXT], 2))
    assert len(context.states) >= len(trained) + 1 and context.empty == len(context.states) - 1
    texts = words.teach(work, [tool.TEXT], 2).texts
    ids = torch.tensor(words.tokenizer(work)([trained[0], ""]))
    with torch.no_grad():
        torch.testing.assert_close(context.states[[0, context.empty]], texts(ids)[0])
    for place, rows in enumerate(context.rows):
        assert {*np.flatnonzero(places.numpy() == place)} <= {*rows}


def test_shortened_texts_keep_two_words_in_their_order():
    texts = SimpleNamespace(start=98, end=99)
    ids = torch.tensor([[98, 1, 2, 3, 4, 99, 99, 99], [98, 7, 99, 99, 99, 99, 99, 99]])
    found = [words.shortened(ids, texts, np.random.default_rng(seed), 0.5) for seed in range(40)]
    lengths = set()
    for rows in found:
        kept = [token for token in rows[0].tolist() if token not in (98, 99)]
        assert rows[0, 0] == 98 and kept == sorted(kept) and rows[0].tolist() == [98, *kept] + [99] * (7 - len(kept))
        assert torch.equal(rows[1], ids[1])
        lengths.add(len(kept))
    assert lengths == {2, 3, 4} and ids[0].tolist() == [98, 1, 2, 3, 4, 99, 99, 99]


def test_text_networks_learn_to_name_the_edits(small, monkeypatch, capsys):
    monkeypatch.setattr(training_run, "DECAY", 0.9)
    monkeypatch.setattr(words, "ASKED", words.ASKED[:3])
    monkeypatch.setattr(words, "RATE", 1e-2)
    monkeypatch.setattr(words, "BATCH", 32)
    words.teach(small(tool, "text"), [tool.TEXT], 250)
    before, _, after, held = re.findall(r"wordings named rightly \(([\d.]+) %\)", capsys.readouterr().out)
    assert float(before) < 60 and float(after) >= 95 and float(held) >= 60


# ------------------------------------------------------------------------------------------------------------------ check

def test_progress_and_residual_of_known_edits():
    rng = np.random.default_rng(0)
    source = rng.random((64, 64, 3), np.float32) * 0.4
    target = source + np.float32(0.5)

    def found(edited):
        return checking.progress_and_residual(source, target, target, edited)

    assert found(target) == pytest.approx((1, 0), abs=1e-6) and found(source) == pytest.approx((0, 1), abs=1e-6)
    assert found(source + np.float32(0.25)) == pytest.approx((0.5, 0.5), abs=1e-5)
    assert found(source - np.float32(0.1)) == pytest.approx((-0.2, 1.2), abs=1e-5)


def test_check_edits_the_photographs_that_were_kept(small, folder, tmp_path, monkeypatch, capsys):
    small(tool, "data", "text", "unet", "export", "--steps", 1)
    asked = [(source, target) for source, target, _ in checking.asked(folder, 4, 64)]
    edits = iter([target for _, target in asked[:3]] + [asked[3][0]])
    real = load_editor(tmp_path / "work" / "editor", device="cpu")
    monkeypatch.setattr(real, "decode", lambda latent: checking.as_tensor(asked[len(seen) - 1][1]))
    seen = []

    def edit(image, prompt, **options):
        seen.append(prompt)
        return checking.as_image(next(edits))

    monkeypatch.setattr(real, "edit", edit)
    monkeypatch.setattr(checking, "load_editor", lambda *given, **more: real)
    small(tool, "check", "--edits", 4, "--sheet", tmp_path / "sheet.png")
    said = capsys.readouterr().out
    assert "trained wordings: 2 of 2 obeyed" in said and "held-out wordings: 1 of 2 obeyed" in said
    trained, held = words.wordings()[0], words.wordings(held_out=True)[0]
    assert {*seen[::2]} <= {*trained} and {*seen[1::2]} <= {*held}
    assert Image.open(tmp_path / "sheet.png").size == (3 * 3 * 64, 2 * 64)
