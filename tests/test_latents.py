"""The editor without a denoiser: `load_editor("latents")`, its method, its report and its preview.

The autoencoders have random weights and the published shapes, except in the last tests, which read the published ones.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from test_latent_spaces import home, network, write_authors  # noqa: F401 (home is a fixture)

import sifm_min
from sifm_min import cli, edit, evaluate, images, immunize
from sifm_min.editors import latents, load_editor
from sifm_min.models import latent_spaces
from sifm_min.models.checkpoints import Unavailable
from sifm_min.models.latent_spaces import SPACES

NAMES = ("sd1", "sd3")
SHIPPED = latent_spaces.COPIES


def photo(width, height, seed=0):
    colours = np.random.default_rng(seed).integers(0, 256, (6, 5, 3), np.uint8)
    return Image.fromarray(colours).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the files of two spaces, in the author's layout."""
    made = tmp_path_factory.mktemp("given")
    for seed, name in enumerate(NAMES):
        write_authors(made, SPACES[name], network(SPACES[name], seed))
    return made


@pytest.fixture(scope="module")
def editor(folder):
    return load_editor(f"latents:{folder}", device="cpu")


@pytest.fixture
def run(tmp_path, monkeypatch, capfd):
    """Runs a command in an empty folder: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def command(module, *argv):
        code = module.main([str(word) for word in argv])
        return code, *capfd.readouterr()
    return command


def shift_by_hand(space, one, other):
    """RMS of the change over the standard deviation, of arrays."""
    a, b = (space.encode(pixels).double().numpy() for pixels in (one, other))
    return np.sqrt(((a - b) ** 2).mean()) / b.std(ddof=1)


# ------------------------------------------------------------------------------------------------------------ the method

def test_objective_is_the_sum_of_the_logarithms_of_the_shifts(editor):
    """Its value and its gradient, which is made space by space, against the formula written out and followed at once."""
    x = images.to_pixels(photo(40, 32))
    generator = torch.Generator().manual_seed(0)
    objective = latents.latent(editor, x, [], generator=generator)
    x_imu = (x + 0.03 * torch.randn(x.shape, generator=generator).sign()).clamp(0, 1).requires_grad_()
    loss, terms = objective(x_imu, 0)
    by_hand = [shift_by_hand(space, x_imu.detach(), x) for space in editor.spaces]
    assert [*terms] == ["sd1", "sd3"] == [space.name for space in editor.spaces]
    np.testing.assert_allclose([term.item() for term in terms.values()], by_hand, rtol=1e-4)
    assert loss.item() == pytest.approx(-np.log(by_hand).sum(), rel=1e-4)
    (found,) = torch.autograd.grad(loss, x_imu)
    whole = sum((((space.encode(x_imu) - (z := space.encode(x))).square().mean()).sqrt() / z.std()).log()
                for space in editor.spaces)
    (expected,) = torch.autograd.grad(-whole, x_imu)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * expected.abs().max().item())
    assert objective.passes(7) == {"encoder_forward": 16, "encoder_backward": 14, "denoiser_forward": 0, "denoiser_backward": 0}


def test_steps_take_turns_between_the_sizes(editor, monkeypatch):
    """A picture of 48 pixels: 16 and 32 are sizes below it, 64 and 128 are its own size, and that once."""
    seen = []
    monkeypatch.setattr(editor.spaces[0].network, "encode", lambda pixels: seen.append(tuple(pixels.shape[2:])) or (
        type(editor.spaces[0].network).encode(editor.spaces[0].network, pixels)))
    x = images.to_pixels(photo(48, 32))
    objective = latents.latent(editor, x, [], generator=torch.Generator(), sizes=(16, 32, 64, 128))
    assert editor.frames(48, 32, (16, 32, 64, 128)) == [(8, 16), (16, 32), (32, 48)]
    losses = [objective((x + 0.02).clamp(0, 1).requires_grad_(), step)[0].item() for step in range(4)]
    # At the first step of each size also the original's latents.
    assert seen == [(8, 16)] * 2 + [(16, 32)] * 2 + [(32, 48)] * 2 + [(8, 16)] and losses[0] == losses[3] != losses[1]
    assert objective.passes(2)["encoder_forward"] == 2 * 2 + 2 * 2


def test_spaces_take_turns_at_every_size(editor, folder):
    """Three spaces, two a step: in six steps of two sizes each space has two steps at each size."""
    three = latents.Latents([*editor.spaces, *load_editor("latents:miniature", device="cpu").spaces])
    x = images.to_pixels(photo(48, 32))
    objective = latents.latent(three, x, [], generator=torch.Generator(), sizes=(16, 32), spaces_per_step=2)
    terms = [[*objective((x + 0.02).clamp(0, 1).requires_grad_(), step)[1]] for step in range(6)]
    for at_one_size in (terms[0::2], terms[1::2]):
        assert at_one_size == [["sd1", "sd3"], ["sd1", "miniature"], ["sd3", "miniature"]]
    assert objective.passes(6) == {"encoder_forward": 6 + 12, "encoder_backward": 12, "denoiser_forward": 0,
                                   "denoiser_backward": 0}
    for wrong in (0, 3):
        with pytest.raises(ValueError, match=f"spaces_per_step {wrong}: this editor has 2 latent spaces"):
            latents.latent(editor, x, [], generator=torch.Generator(), spaces_per_step=wrong)


def test_latents_of_the_original_are_computed_once(folder, monkeypatch):
    """By the loop, and not again by the report and the preview, which has the immunized picture's from the report."""
    editor, seen = load_editor(f"latents:{folder}", device="cpu"), []
    network = editor.spaces[0].network
    monkeypatch.setattr(network, "encode", lambda pixels: seen.append(torch.is_grad_enabled()) or (
        type(network).encode(network, pixels)))
    picture = photo(48, 40)
    result = sifm_min.immunize(picture, editor, steps=3)
    # The original once, three steps, the immunized picture and noise; all three after each of two purifiers.
    assert seen.count(True) == 3 and seen.count(False) == 1 + 2 + 2 * 3
    decoded = [editor.decodings(image) for image in (picture, result.image)]
    assert len(seen) == 12 and decoded[0][0][0] == "sd1"
    editor.decodings(photo(48, 40, seed=1))
    assert len(seen) == 13


@pytest.mark.slow
@pytest.mark.parametrize("method", ["latent", "photoguard-encoder", "editshield"])
def test_methods_for_encoders_move_every_space(method, editor):
    """More than noise of the same budget, or in PhotoGuard's case towards zero."""
    picture = photo(48, 40)
    result = sifm_min.immunize(picture, editor, method=method, steps=12, seed=1)
    assert result.report["method"] == method and result.report["linf_steps"] <= 7 and result.report["prompts"] == []
    before, after = images.to_pixels(picture), images.to_pixels(result.image)
    for space, found in zip(editor.spaces, result.report["shifts"], strict=True):
        assert (found["space"], found["size"]) == (space.name, [48, 40])
        assert found["shift"] == pytest.approx(shift_by_hand(space, after, before), rel=1e-4)
        assert 0 < found["noise"] < 1
        if method == "photoguard-encoder":
            assert space.encode(after).norm() < space.encode(before).norm()
        else:
            assert found["shift"] > 1.3 * found["noise"]
    assert result.report["passes"]["denoiser_forward"] == 0


def test_noise_beside_the_shift_is_the_noise_control(editor):
    """Without steps the shift is that of the random start, which is the same uniform noise."""
    result = sifm_min.immunize(photo(48, 40), editor, method="noise", seed=4)
    for found in result.report["shifts"]:
        assert found["shift"] == pytest.approx(found["noise"], rel=1e-6)


def test_zero_start_and_grey_pictures(editor):
    with pytest.raises(ValueError, match="no gradient at this picture"):
        sifm_min.immunize(photo(32, 32), editor, steps=1, init="zero")
    result = sifm_min.immunize(photo(32, 32).convert("L"), editor, steps=2)
    assert result.image.mode == "L" and result.report["method"] == "latent"


@pytest.mark.slow
@pytest.mark.parametrize("size", [(1, 1), (3, 200), (2100, 9)])
def test_pictures_of_any_size(size, editor):
    result = sifm_min.immunize(photo(*size), editor, steps=1)
    assert result.image.size == size and result.report["linf_steps"] <= 7
    assert len(result.report["shifts"]) == len(editor.frames(*size)) * 2
    assert all(np.isfinite([found["shift"], found["noise"]]).all() for found in result.report["shifts"])


@pytest.mark.slow
def test_low_memory_gives_the_same_picture(editor):
    picture = photo(48, 40)
    for value in (True, False):
        editor.checkpointing = value
        assert [space.network.checkpointing for space in editor.spaces] == [value] * 2
    fast, low = (sifm_min.immunize(picture, editor, steps=3, memory=memory).image for memory in ("fast", "low"))
    assert np.array_equal(np.asarray(fast), np.asarray(low)) and not editor.checkpointing


@pytest.mark.parametrize("method", ["sifm", "photoguard-diffusion", "semantic-attack", "sds", "mist", "ace"])
def test_methods_with_a_denoiser_are_refused(method, editor):
    with pytest.raises(ValueError, match=f"^{method} needs a denoiser, and latents has encoders alone: choose latent, photogu"):
        sifm_min.immunize(photo(32, 32), editor, "a hat", method=method)


@pytest.mark.slow
def test_other_mistakes_are_sentences(editor, folder, run):
    with pytest.raises(ValueError, match="editshield released needs a denoiser"):
        sifm_min.immunize(photo(32, 32), editor, method="editshield", variant="released")
    with pytest.raises(ValueError, match="sizes is empty"):
        sifm_min.immunize(photo(32, 32), editor, sizes=())
    with pytest.raises(ValueError, match="has encoders and no denoiser, so it neither edits"):
        editor.edit(photo(32, 32), "a hat")
    with pytest.raises(ValueError, match="latent is for editors without a denoiser"):
        sifm_min.immunize(photo(32, 32), load_editor("miniature", device="cpu"), "a hat", method="latent")
    photo(32, 32).save("a.png")
    for module, argv in ((edit, ("a.png", "--prompt", "a hat")), (immunize, ("a.png", "--method", "sifm")),
                         (evaluate, ("run", "white-box", "--images", "1"))):
        code, out, err = run(module, *argv, "--editor", f"latents:{folder}", "-o", "out", "--quiet")
        assert code == 2 and out == "" and err.count("\n") == 1 and "denoiser" in err, err
    code, _, err = run(immunize, "--editor", f"latents:{folder}", "-o", "out")
    assert code == 2 and "give at least one picture or folder and -o DIR" in err


@pytest.mark.slow
def test_every_encoder_of_several_is_in_the_report(folder):
    editors = [load_editor(f"latents:{folder / SPACES[name].stem}", device="cpu") for name in place_apart(folder)]
    report = sifm_min.immunize(photo(32, 32), editors, steps=2).report
    assert [found["space"] for found in report["shifts"]] == [space.name for one in editors for space in one.spaces]


def place_apart(folder):
    """The names of the spaces of a folder, each of which has a folder of its own inside then."""
    for name in NAMES:
        inner = folder / SPACES[name].stem
        inner.mkdir(exist_ok=True)
        for half in ("encoder", "decoder"):
            shutil.copy(folder / f"{SPACES[name].stem}_{half}.safetensors", inner)
    return NAMES


@pytest.mark.slow
def test_a_measurement_that_fails_does_not_lose_the_picture(folder, run, monkeypatch):
    def short(*args, **options):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr("sifm_min.editors.shifts.measure_shifts", short)
    photo(32, 32).save("a.png")
    code, out, _ = run(immunize, "a.png", "--editor", f"latents:{folder}", "-o", "out", "--steps", "2", "--no-preview")
    report = json.loads(Path("out/a.json").read_text())
    assert code == cli.OK and Path("out/a_immunized.png").exists() and "shifts" not in report
    assert report["measures_absent"].startswith("out of memory") and "shifts were not measured: out of memory" in out


# ----------------------------------------------------------------------------------------------------------- the command

@pytest.mark.slow
def test_command_needs_no_prompt_and_says_the_shifts(folder, run, editor):
    photo(48, 40).save("a.png")
    argv = ("a.png", "--editor", f"latents:{folder}", "-o", "out", "--steps", "5")
    code, out, err = run(immunize, *argv)
    report = json.loads(Path("out/a.json").read_text())
    assert code == cli.OK and report["method"] == "latent" and len(report["loss"]) == 5
    assert {*report["loss"][0]} == {"loss", "sd1", "sd3"} and report["options"]["sizes"] == [512, 1024]
    for found in report["shifts"]:
        assert f"{found['space']} at 48: shift {found['shift']:.2f} (noise {found['noise']:.2f})" in out
    assert {*report["editor"]["weights"]} == {f"{name}/{SPACES[name].stem}_{half}.safetensors" for name in NAMES
                                              for half in ("encoder", "decoder")}
    assert "distilled copies" in err and "distilled copies" in report["editor"]["notice"]
    immunized = Image.open("out/a_immunized.png")
    assert np.abs(np.asarray(immunized, int) - np.asarray(photo(48, 40), int)).max() == report["linf_steps"] <= 7
    assert "done before, skipped" in run(immunize, *argv)[2]


@pytest.mark.slow
def test_preview_shows_what_each_decoder_makes_of_both(folder, run, editor, monkeypatch):
    from sifm_min.files import contact_sheet
    seen, sheet = [], contact_sheet.sheet
    monkeypatch.setattr(contact_sheet, "sheet", lambda columns, **more: seen.extend(columns) or sheet(columns, **more))
    decoded, decodings = [], latents.Latents.decodings
    monkeypatch.setattr(latents.Latents, "decodings", lambda self, image: decoded.append(image) or decodings(self, image))
    photo(48, 40).save("a.png")
    assert run(immunize, "a.png", "--editor", f"latents:{folder}", "-o", "out", "--steps", "1")[0] == cli.OK
    assert [np.asarray(image).tolist() for image in decoded] == [
        np.asarray(Image.open(name)).tolist() for name in ("a.png", "out/a_immunized.png")]
    assert [caption for caption, _ in seen] == ["original", "sd1 decodes", "sd3 decodes", "immunized", "sd1 decodes",
                                                "sd3 decodes", "perturbation x10"]
    for start, name in ((1, "a.png"), (4, "out/a_immunized.png")):
        pixels = images.to_pixels(Image.open(name))
        for space, (_, found) in zip(editor.spaces, seen[start:start + 2], strict=True):
            expected = space.network.decode(space.network.encode(2 * pixels - 1)[0]) / 2 + 0.5
            assert np.abs(np.asarray(found, int) - np.asarray(images.to_image(expected), int)).max() <= 1
    assert Image.open("out/a_preview.png").width > 6 * 384


# --------------------------------------------------------------------------------------------------------------- loading

def test_latents_are_the_spaces_on_this_machine():
    with pytest.raises(Unavailable, match=r"no latent space is on this machine: run `.*weights download latents` once"):
        load_editor("latents", device="cpu")
    with pytest.raises(Unavailable, match="the latent space sd3 is not on this machine"):
        load_editor("latents:sd3", device="cpu")
    for name in ("flux2", "sd1"):
        write_authors(SPACES[name].kept, SPACES[name], network(SPACES[name]))
    assert [space.name for space in load_editor("latents", device="cpu").spaces] == ["sd1", "flux2"]
    assert [space.name for space in load_editor("latents:flux2,sd1", device="cpu").spaces] == ["flux2", "sd1"]


def write_flat(folder, made):
    """A folder in diffusers' layout that names no space."""
    folder.mkdir(parents=True)
    save_file(made.state_dict(), folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps({"latent_channels": made.config.latent_channels}))
    return folder


def test_copies_stand_for_spaces_that_are_not_here():
    made = {name: network(SPACES[name], seed) for seed, name in enumerate(("sd1", "sd3"), 5)}
    for name in made:
        write_flat(latent_spaces.COPIES / name, made[name])
    assert [space.name for space in load_editor("latents", device="cpu").spaces] == ["sd1-copy", "sd3-copy"]
    write_authors(SPACES["sd1"].kept, SPACES["sd1"], network(SPACES["sd1"]))
    assert [space.name for space in load_editor("latents", device="cpu").spaces] == ["sd1", "sd3-copy"]
    assert latents.at_hand()[:2] == ["sd1", "sd3-copy"]
    chosen = load_editor("latents:sd3,sd1,sd1-copy", device="cpu").spaces
    assert [space.name for space in chosen] == ["sd3-copy", "sd1", "sd1-copy"]
    pixels = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(chosen[2].encode(pixels), made["sd1"].encode(2 * pixels - 1)[0])


@pytest.mark.parametrize("name", SPACES)
def test_folder_without_a_name_is_the_space_of_its_marks(name, tmp_path):
    made = network(SPACES[name])
    folder = write_flat(tmp_path / "mine", made)
    if made.config.use_midblock_gn:
        (folder / "config.json").write_text('{"latent_channels": 32, "use_midblock_gn": true}')
    assert [space.name for space in load_editor(f"latents:{folder}", device="cpu").spaces] == [name]
    made.encoder.layers[-1].bias.data += 1                        # marks that nobody knows
    save_file(made.state_dict(), folder / "diffusion_pytorch_model.safetensors")
    assert [space.name for space in load_editor(f"latents:{folder}", device="cpu").spaces] == ["mine"]


@pytest.mark.slow
def test_an_editors_autoencoder_is_a_space(folder, tiny_folder, monkeypatch):
    """By a folder and by a known name; of an editor nothing else is read."""
    whole = load_editor(tiny_folder, device="cpu")
    write_authors(SPACES["sd1"].kept, SPACES["sd1"], network(SPACES["sd1"]))
    editor = load_editor(f"latents:sd1,{tiny_folder},miniature", device="cpu")
    assert [space.name for space in editor.spaces] == ["sd1", tiny_folder.name, "miniature"]
    assert [space.tiny for space in editor.spaces] == [True, False, True]
    pixels = images.to_pixels(photo(32, 32))
    torch.testing.assert_close(editor.spaces[1].encode(pixels), whole.scaled(whole.encode(pixels)), rtol=0, atol=1e-5)
    torch.testing.assert_close(editor.spaces[1].decode(whole.scaled(whole.encode(pixels))),
                               whole.decode(whole.scaled(whole.encode(pixels))), rtol=0, atol=1e-5)
    result = sifm_min.immunize(photo(32, 32), editor, steps=2)
    assert [found["space"] for found in result.report["shifts"]] == ["sd1", tiny_folder.name, "miniature"]
    assert not any(file.startswith(f"{tiny_folder.name}/unet") for file in result.report["editor"]["weights"])


def test_two_folders_of_one_name_are_called_as_they_were_written(tiny_folder, tmp_path):
    for place in ("a", "b"):
        shutil.copytree(tiny_folder / "vae", tmp_path / place / "main" / "vae")
        shutil.copytree(tiny_folder / "vae", tmp_path / place / "sd1" / "vae")
    names = [str(tmp_path / place / "main") for place in ("a", "b")]
    assert [space.name for space in load_editor(f"latents:{','.join(names)}", device="cpu").spaces] == names
    with pytest.raises(ValueError, match="twice; name each once"):
        load_editor(f"latents:{names[0]},{names[0]}", device="cpu")
    (space,) = load_editor(f"latents:{tmp_path / 'a' / 'sd1'}", device="cpu").spaces     # not the published space
    assert space.name == str(tmp_path / "a" / "sd1")


def test_copies_say_that_they_are_copies():
    shutil.copytree(SHIPPED / "sd1", latent_spaces.COPIES / "sd1")
    copy, folder = (load_editor(f"latents:{item}", device="cpu") for item in ("sd1-copy", latent_spaces.COPIES / "sd1"))
    assert "copies of these" in copy.notice and "download latents" in copy.notice
    assert folder.spaces[0].name == str(latent_spaces.COPIES / "sd1")                    # and not sd1, the published one


def test_latents_are_scaled_and_shifted_as_the_config_says(tiny_folder, tmp_path):
    shutil.copytree(tiny_folder / "vae", tmp_path / "other" / "vae")
    file = tmp_path / "other" / "vae" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"scaling_factor": 1.7, "shift_factor": 0.3}))
    (space,) = load_editor(f"latents:{tmp_path / 'other'}", device="cpu").spaces
    pixels = images.to_pixels(photo(32, 32))
    latent = space.network.encode(2 * pixels - 1)[0]
    torch.testing.assert_close(space.encode(pixels), (latent - 0.3) * 1.7)
    torch.testing.assert_close(space.decode(space.encode(pixels)), space.network.decode(latent) / 2 + 0.5)


@pytest.mark.parametrize(("source", "kind", "words"), [
    ("latents:sd9", ValueError, "latents: 'sd9' is none of sd1, sdxl, sd3, flux1, flux2; as an editor, 'sd9' is neither"),
    ("latents:", Unavailable, "no latent space is on this machine"),
    ("latents:miniature,", ValueError, "latents: '' is none of sd1"),
    ("latents:miniature,miniature", ValueError, "has the latent space miniature twice"),
    ("latents:{empty}", Unavailable, "has neither an editor's vae/ nor files of a tiny autoencoder"),
])
def test_wrong_items_are_sentences(source, kind, words, tmp_path):
    with pytest.raises(kind, match=words) as caught:
        load_editor(source.format(empty=tmp_path), device="cpu")
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="revision and components are for one editor"):
        load_editor("latents", revision="main")


# ------------------------------------------------------------------------------------------------------- the real spaces

@pytest.mark.slow
def test_real_spaces_are_moved_far_beyond_noise(shared):
    """A photograph at 64 pixels, five published spaces at once, 8 steps; figures of a longer run are 2 to 3 times noise."""
    editor = load_editor(f"latents:{shared / 'data' / 'taesd'}", device="cpu")
    assert [space.name for space in editor.spaces] == [*SPACES]
    picture = Image.open(shared / "data" / "photos" / "astronaut.png").convert("RGB").crop((150, 20, 278, 148)).resize((64, 64))
    report = sifm_min.immunize(picture, editor, steps=8, step_size=2 / 255).report
    for found in report["shifts"]:
        assert found["shift"] > 1.3 * found["noise"] > 0.1, found
