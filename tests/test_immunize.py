"""The command and the library call, end to end on a tiny random editor: files, budgets, codes and sentences.

How well an edit is defeated is measured elsewhere; here a picture comes back whole, within its budget, or is refused.
"""

import errno
import hashlib
import inspect
import io
import json
import os
import select
import signal
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import tiny_editor
import torch
from hub import Hub, status
from huggingface_hub import constants
from outcomes import files, told
from photographs import photo
from picture_files import icc_header
from PIL import Image

import sifm_min
from sifm_min import baselines, cli, images, immunize, methods, metrics, pgd
from sifm_min.files import contact_sheet, writing
from sifm_min.immunizing import flags
from sifm_min.metrics import just_noticeable
from sifm_min.models import checkpoints

ROOT = Path(__file__).resolve().parents[1]
PROMPT = "make it night"
FEW = ("--steps", "2", "--timesteps", "2")
ENDS = ("_immunized.png", "_preview.png", ".json")
METHODS = ("sifm", "photoguard-encoder", "photoguard-diffusion", "editshield", "semantic-attack", "sds", "mist", "ace",
           "noise", "danp", "diffusionguard", "tdae", "sifm-output", "latent", "decontext")


NOTHING_AROUND = {"flat": False, "refine_text": False, "blur": False}
AROUND = {"tdae": {"flat": {"share": 0.05, "weight": 0.3}, "refine_text": {"every": 10, "rounds": 5, "reach": 0.1},
                   "blur": False}}


@pytest.fixture
def run(loaded_once, tiny_folder):
    """Run the command in this process and in tmp_path, with few steps, on the tiny editor."""
    few = {True: FEW, False: FEW[:2]}                        # the timesteps are SIFM's; another method would refuse them
    return lambda *argv: immunize.main(["--prompt", PROMPT, "--editor", str(tiny_folder), *few["--method" not in argv],
                                        "-o", "out", *argv])


def colours(image):
    return np.asarray(image.convert("RGB")).astype(int)


def report(name="out/a.json"):
    return json.loads(Path(name).read_text())


# -- what a run writes -------------------------------------------------------------------------------------------------

def test_three_files_and_what_the_report_holds(run, tiny, tiny_folder, tmp_path, capsys):
    original = photo("a.png", (40, 30))
    assert run("a.png", "--seed", "3") == cli.OK
    assert sorted(files()) == ["a.json", "a_immunized.png", "a_preview.png"]
    immunized, found = Image.open("out/a_immunized.png"), report()
    difference = np.abs(colours(immunized) - colours(original)).max()
    assert (immunized.size, immunized.mode) == ((40, 30), "RGB") and 0 < difference <= 7
    assert (found["linf_steps"], found["budget_steps"]) == (difference, 7)

    pixels = [torch.tensor(colours(image)).permute(2, 0, 1)[None] / 255 for image in (immunized, original)]
    assert found["psnr"] == pytest.approx(metrics.psnr(*pixels).item(), abs=1e-4)
    assert found["ssim"] == pytest.approx(metrics.ssim(*pixels).item(), abs=1e-6)
    assert [set(step) for step in found["loss"]] == [{"loss", "norm", "dist"}] * 2
    for step in found["loss"]:
        assert step["loss"] == pytest.approx(step["norm"] - 0.1 * step["dist"], abs=1e-6)
    assert found["cpu_kernels"] == []                         # the editor of these tests is too small for any
    assert found["passes"] == {"encoder_forward": 3, "encoder_backward": 2, "denoiser_forward": 6, "denoiser_backward": 4}

    weights = {str(path.relative_to(tiny_folder)): hashlib.sha256(path.read_bytes()).hexdigest()
               for path in tiny_folder.rglob("*.safetensors")}
    assert len(weights) == 3 and found["editor"]["weights"] == weights
    assert found["editor"]["source"] == str(tiny_folder) and found["editor"]["notice"] == tiny_editor.NOTICE
    assert found["editor"]["scheduler"] == "EulerAncestralDiscreteScheduler"
    assert found["versions"]["sifm_min"] == sifm_min.__version__ and found["versions"]["torch"] == torch.__version__
    assert found["versions"]["python"].startswith(f"{sys.version_info[0]}.{sys.version_info[1]}")
    assert (found["method"], found["prompts"], found["picture"]) == ("sifm", [PROMPT], "a.png")
    assert (found["preset"], found["note"]) == ({"name": "protocol"}, "")
    assert found["options"] == {
        "eps": 0.03, "budget": "uniform", "steps": 2, "step_size": 1 / 255, "schedule": "constant", "init": "random", "seed": 3,
        "mask": None, "robust": False, **NOTHING_AROUND,
        "lam": 0.1, "timesteps": [999, 50], "taps": list(tiny.default_taps), "reduction": "balanced",
        "aggregate": "loss-mean", "noisy": "paper", "resample": False, "batch": None}
    assert found["input"] == {"width": 40, "height": 30, "mode": "RGB", "format": "PNG", "frames": 1, "notes": []}
    assert found["seconds"] > found["loop_seconds"] > 0 and found["peak_memory_bytes"] > 1e7

    out, err = capsys.readouterr()
    assert err == f"{tiny_editor.NOTICE}\n"
    assert out == (f"a.png -> out/a_immunized.png: at most {difference}/255 per channel (budget 7/255), "
                   f"PSNR {found['psnr']:.1f} dB, {found['seconds']:.0f} s\n")


def test_the_preview_is_five_pictures_with_captions(run, tiny, monkeypatch):
    shown, made = [], contact_sheet.sheet
    monkeypatch.setattr(contact_sheet, "sheet",
                        lambda columns, **options: shown.append((columns, options)) or made(columns, **options))
    original = photo("a.png", seed=5)
    assert run("a.png", "--seed", "4") == cli.OK
    [(columns, options)] = shown
    assert [caption for caption, _ in columns] == ["original", f"edited: {PROMPT}", "immunized", f"edited: {PROMPT}",
                                                   "perturbation x10"]
    assert options == {"footer": tiny_editor.NOTICE}
    immunized = Image.open("out/a_immunized.png")
    difference = (128 + 10 * (colours(immunized) - colours(original))).clip(0, 255)
    expected = [original, tiny.edit(original, PROMPT, seed=4), immunized, tiny.edit(immunized, PROMPT, seed=4),
                Image.fromarray(difference.astype(np.uint8))]
    assert not np.array_equal(*(colours(expected[i]) for i in (1, 3)))
    for (caption, picture), image in zip(columns, expected, strict=True):
        assert np.array_equal(colours(picture), colours(image)), caption
    with Image.open("out/a_preview.png") as preview:
        assert np.array_equal(colours(preview), colours(made(columns, **options)))
        scale, gap = 384 // 24, 12                           # as the sheet lays them out: enlarged by a whole factor
        for i, image in enumerate(expected):
            left = gap + i * (24 * scale + gap)
            cell = colours(preview.crop((left, 0, left + 24 * scale, preview.height)))
            big = colours(image).repeat(scale, 0).repeat(scale, 1)
            top = next(y for y in range(len(cell)) if np.array_equal(cell[y:y + len(big)], big))
            assert cell[:top].min() < 128                    # its caption above it


def test_a_transparent_picture_is_shown_alike_before_and_after(run, monkeypatch):
    shown = []
    monkeypatch.setattr(contact_sheet, "sheet", lambda columns, **options: shown.extend(columns) or Image.new("RGB", (9, 9)))
    photo("a.png", mode="RGBA")
    assert run("a.png") == cli.OK
    assert [shown[i][1].mode for i in (0, 2)] == ["RGBA", "RGBA"]


def test_a_budget_of_8_is_used_to_the_8th_step(run):
    original = photo("a.png", (40, 30))
    assert run("a.png", "--eps", "8/255", "--no-preview") == cli.OK
    assert np.abs(colours(Image.open("out/a_immunized.png")) - colours(original)).max() == 8 == report()["linf_steps"]


def test_no_preview(run):
    photo("a.png")
    assert run("a.png", "--no-preview") == cli.OK
    assert sorted(files()) == ["a.json", "a_immunized.png"]


def test_the_memory_plan_is_the_one_asked_for(run):
    photo("a.png")
    for folder, argv, expected in (("1", (), False), ("2", ("--memory", "low"), True)):
        assert run("a.png", "-o", folder, "--no-preview", *argv) == cli.OK
        told = report(f"{folder}/a.json")["memory"]
        assert told["asked"] == (argv or (0, "auto"))[1] and told["checkpointing"] is expected


@pytest.mark.slow
def test_same_seed_same_bytes_other_seed_other_bytes(run):
    photo("a.png")
    written = []
    for folder, seed in (("1", "0"), ("2", "0"), ("3", "1")):
        assert run("a.png", "-o", folder, "--seed", seed) == cli.OK
        written.append([files(folder)[f"a{end}"] for end in ENDS[:2]])
    assert written[0] == written[1]
    assert all(one != other for one, other in zip(written[0], written[2], strict=True))


def test_the_mask_alone_is_perturbed(run):
    original = photo("a.png")
    light = np.zeros((20, 24), np.uint8)
    light[5:12, 3:20] = 255
    Image.fromarray(light).save("mask.png")
    assert run("a.png", "--mask", "mask.png", "--no-preview") == cli.OK
    changed = (colours(Image.open("out/a_immunized.png")) != colours(original)).any(2)
    assert not changed[light == 0].any() and changed[light > 0].mean() > 0.9
    assert report()["options"]["mask"] == "mask.png"
    light[0, 0] = 255
    Image.fromarray(light).save("mask.png")                  # another mask under the same name is another run
    assert run("a.png", "--mask", "mask.png", "--no-preview") == cli.SOME_FAILED


def test_noise_is_the_random_start_and_nothing_else(run):
    original = photo("a.png")
    assert run("a.png", "--method", "noise", "--seed", "9", "--no-preview") == cli.OK
    start = torch.empty(1, 3, 20, 24).uniform_(-0.03, 0.03, generator=torch.Generator().manual_seed(9))
    expected = colours(original) + (start[0].double() * 255).round().clamp(-7, 7).permute(1, 2, 0).numpy()
    assert np.array_equal(colours(Image.open("out/a_immunized.png")), expected.clip(0, 255))
    found = report()
    assert (found["method"], found["loss"], found["options"]["steps"]) == ("noise", [], 0)
    assert list(found["passes"].values()) == [0] * 4


def test_prompts_take_turns(run, tiny, monkeypatch):
    asked, features = [], tiny.features

    def spy(condition, noisy_latent, timesteps, context, **options):
        asked.append((torch.is_grad_enabled(), context.value[:1]))          # prepared: see `editor.prepare_text`
        return features(condition, noisy_latent, timesteps, context, **options)

    monkeypatch.setattr(tiny, "features", spy)
    photo("a.png")
    assert run("a.png", "--prompt", "a cat", "--steps", "3", "--no-preview") == cli.OK
    contexts = [tiny.context([prompt]) for prompt in (PROMPT, "a cat", PROMPT)]
    steps = [context for with_gradient, context in asked if with_gradient]
    assert len(steps) == 3 and all(map(torch.equal, steps, contexts)) and not torch.equal(*contexts[:2])
    assert report()["prompts"] == [PROMPT, "a cat"]


def test_options_reach_the_objective(run, tiny):
    photo("a.png")
    assert run("a.png", "--no-preview", "--lambda", "1/4", "--timesteps", "700,30", "--taps", "mid_block,conv_in",
               "--reduction", "literal", "--noisy", "deploy", "--resample", "--batch", "1", "--schedule", "linear", "--init",
               "zero", "--step-size", "2/255") == cli.OK
    given = {"eps": 0.03, "budget": "uniform", "steps": 2, "seed": 0, "mask": None, "robust": False,
             **NOTHING_AROUND}
    assert report()["options"] == given | {
        "lam": 0.25, "timesteps": [700, 30],
        "taps": ["mid_block", "conv_in"], "reduction": "literal", "aggregate": "loss-mean", "noisy": "deploy", "resample": True,
        "batch": 1, "schedule": "linear", "init": "zero", "step_size": 2 / 255}
    [first, second] = report()["loss"]
    assert first["dist"] == 0 < second["dist"]               # from a zero start the distance begins at zero
    assert report()["passes"] == {"encoder_forward": 3, "encoder_backward": 2, "denoiser_forward": 8,
                                  "denoiser_backward": 4}


@pytest.mark.parametrize("method", METHODS[1:-2])             # and those for other kinds of editors
def test_every_method_writes_its_picture_and_what_it_took(run, tiny, method):
    original = photo("a.png")
    assert run("a.png", "--method", method, "--no-preview") == cli.OK
    found = report()
    assert np.abs(colours(Image.open("out/a_immunized.png")) - colours(original)).max() == found["linf_steps"] <= 7
    assert (found["method"], found["preset"], found["note"]) == (method, {"name": "protocol"}, "")
    assert found["options"] == {
        "eps": 0.03, "budget": "uniform", "steps": 0 if method == "noise" else 2, "step_size": 1 / 255, "schedule": "constant",
        "init": "random", "seed": 0, "mask": None, "robust": False, **AROUND.get(method, NOTHING_AROUND),
        **{name: found["options"][name] for name in methods.options_of(method)}}
    assert all(type(count) is int for count in found["passes"].values())
    evaluations = {"tdae": 2}.get(method, 1) * found["options"]["steps"]
    assert len(found["loss"]) == found["options"]["steps"] and found["passes"]["encoder_backward"] == evaluations
    assert found["gradient_evaluations"] == evaluations + {"tdae": 5}.get(method, 0)


def half_smooth(name="a.png", mode="RGB"):
    """A picture of 24x20, random colours on its left and flat on its right, and the budget of each of its values."""
    values = colours(photo(name)).astype(np.uint8)
    values[:, 12:] = 140
    Image.fromarray(values).convert(mode).save(name)
    picture = images.read(name)
    return picture.image, images.budget(metrics.texture_budget(images.to_pixels(picture.image)[:, :picture.channels], 0.03))


@pytest.mark.parametrize("method", METHODS[:-2])              # without those for other kinds of editors
def test_texture_budget_holds_for_every_value_and_method(run, method):
    original, limit = half_smooth()
    assert limit[:, 16:].max() <= 3 and limit[:, :10].min() == 7
    assert run("a.png", "--method", method, "--budget", "texture", "--steps", "2", "--no-preview") == cli.OK
    used, found = images.steps_apart(Image.open("out/a_immunized.png"), original), report()
    assert (used <= limit).all() and (used > 0).mean() > 0.5
    assert found["options"]["budget"] == "texture" and found["values_beyond_budget"] == 0
    assert (found["budget_steps"], found["linf_steps"]) == (7, used.max())
    assert found["budget_mean_steps"] == pytest.approx(limit.mean(), abs=0.01)
    one, other = (images.to_pixels(Image.open(name)) for name in ("out/a_immunized.png", "a.png"))
    assert found["visibility"] == pytest.approx(metrics.visibility(one, other).item(), rel=1e-6)


@pytest.mark.parametrize("budget, rms", [("uniform", None), ("texture", just_noticeable.RMS)])
def test_budget_decides_the_direction_of_steps(run, monkeypatch, budget, rms):
    seen, descend = [], pgd.pgd
    monkeypatch.setattr(pgd, "pgd", lambda *args, **loop: seen.append(loop["rms"]) or descend(*args, **loop))
    half_smooth()
    assert run("a.png", "--budget", budget, "--no-preview") == cli.OK
    assert seen == [rms]


def test_texture_budget_of_a_grey_picture_with_a_mask(run):
    original, limit = half_smooth(mode="L")
    Image.fromarray(np.arange(480, dtype=np.uint8).reshape(20, 24) // 240 * 255).save("mask.png")
    assert run("a.png", "--budget", "texture", "--mask", "mask.png", "--no-preview") == cli.OK
    used = images.steps_apart(Image.open("out/a_immunized.png"), original)
    assert Image.open("out/a_immunized.png").mode == "L" and (used <= limit).all() and used[10:].any()
    assert not used[:10].any()


def test_noise_of_a_texture_budget_is_scaled_to_it(run):
    original, limit = half_smooth()
    assert run("a.png", "--method", "noise", "--budget", "texture", "--seed", "9", "--no-preview") == cli.OK
    unit = torch.empty(1, 3, 20, 24).uniform_(-1, 1, generator=torch.Generator().manual_seed(9))
    expected = colours(original) + (unit[0].permute(1, 2, 0).numpy() * limit).round()
    found = colours(Image.open("out/a_immunized.png"))
    assert np.abs(found - expected.clip(0, 255)).max() <= 1 and (found == expected.clip(0, 255)).mean() > 0.99


def test_file_beyond_the_local_budget_is_not_written(run, monkeypatch, capsys):
    half_smooth()
    quantize = images.quantize
    monkeypatch.setattr(images, "quantize", lambda picture, delta, eps: quantize(picture, 0 * delta + 7 / 255, 7 / 255))
    assert run("a.png", "--budget", "texture", "--no-preview") == cli.SOME_FAILED
    assert "decodes to 7/255 from the original, the budget is" in capsys.readouterr().err
    assert files() == {}


def test_another_budget_is_another_run(run):
    half_smooth()
    assert run("a.png", "--no-preview") == cli.OK
    assert run("a.png", "--budget", "texture", "--no-preview") == cli.SOME_FAILED
    assert run("a.png", "--budget", "texture", "--no-preview", "--overwrite") == cli.OK
    written = files()
    assert run("a.png", "--budget", "texture", "--no-preview") == cli.OK and files() == written


@pytest.mark.parametrize("method, argv, options", [
    ("photoguard-diffusion", ("--unroll", "2", "--repeats", "2", "--no-resample"),
     {"unroll": 2, "repeats": 2, "resample": False}),
    ("semantic-attack", ("--content", "the sky", "--timesteps", "700,30", "--batch", "1"),
     {"content": "the sky", "timesteps": [700, 30], "batch": 1}),
    ("ace", ("--variant", "ace"), {"variant": "ace"}),
])
def test_options_of_the_baselines_reach_them(run, method, argv, options):
    photo("a.png")
    assert run("a.png", "--no-preview", "--method", method, "--steps", "1", *argv) == cli.OK
    found = report()["options"]
    assert {name: found[name] for name in methods.options_of(method)} == options


def test_options_of_command_and_methods_are_the_same():
    assert set(flags.OPTIONS) == {name for method in METHODS for name in methods.options_of(method)}


@pytest.mark.parametrize("method", [method for method in baselines.NATIVE if method != "decontext"])    # refused here
def test_native_preset_is_the_original_without_its_budget(run, monkeypatch, method):
    photo("a.png")
    native, used = baselines.NATIVE[method], []
    monkeypatch.setattr(pgd, "pgd", lambda pixels, objective, eps, **loop: used.append((eps, loop)) or 0 * pixels)
    assert immunize.main(["a.png", "--prompt", PROMPT, "--editor", "tiny", "--method", method, "--preset", "native",
                          "--no-preview", "-o", "out"]) == cli.OK
    [(eps, loop)], found = used, report()
    assert {name: loop[name] for name in methods.PROTOCOL} == {
        name: native.settings.get(name, value) for name, value in methods.PROTOCOL.items()}
    assert eps == found["options"]["eps"] == 0.03 and found["options"]["budget"] == "uniform"
    assert found["preset"] == {"name": "native", "source": native.source, "budget": native.budget}
    assert found["options"] | native.settings == found["options"]


def test_arguments_win_over_the_preset(run):
    photo("a.png")
    assert run("a.png", "--method", "editshield", "--preset", "native", "--variant", "plain", "--init", "random", "--eps",
               "8/255", "--no-preview") == cli.OK
    found = report()["options"]
    assert (found["variant"], found["init"], found["steps"], found["step_size"]) == ("plain", "random", 2, 0.001)
    assert found["eps"] == 8 / 255


def test_taps_list(run, tiny, capsys):
    assert run("--taps", "list") == cli.OK
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(tiny.tap_names)
    assert [line.split()[0] for line in lines if line.endswith("  (default)")] == list(tiny.default_taps)
    assert run("--taps", "list", "--json") == cli.OK
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert records == [{"tap": name, "default": name in tiny.default_taps} for name in tiny.tap_names]
    assert files() == {}


# -- every kind of input -----------------------------------------------------------------------------------------------

ICC, GREY_ICC = icc_header(), icc_header("GRAY")


def turned_photograph(path):
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "a camera"
    y, x = np.mgrid[:800, :1200]
    Image.fromarray(np.stack([x % 256, y % 256, (x + y) // 8], -1).astype(np.uint8)).save(path, exif=exif, icc_profile=ICC)
    return np.rot90(colours(Image.open(path)), -1), "RGB"


def sixteen_bits(path):
    values = np.random.default_rng(1).integers(0, 65536, (20, 24), np.uint16)
    Image.fromarray(values).save(path)
    return (values[..., None] >> 8).repeat(3, 2).astype(int), "L"


def palette_frames(path):
    first, second = (photo(path, seed=seed).quantize(16) for seed in (1, 2))
    first.save(path, save_all=True, append_images=[second])
    return colours(first), "RGB"


def plain(size=(24, 20), mode="RGB", back=None, **options):
    def make(path):
        photo(path, size, mode, **options)
        return colours(Image.open(path)), back or mode
    return make


def one_bit(path):
    image = photo(path, mode="L").point(lambda value: 255 * (value > 99), "1")
    image.save(path)
    return colours(image), "L"


@pytest.mark.slow
@pytest.mark.parametrize("name, make", [
    ("photograph.jpg", turned_photograph), ("transparent.png", plain(mode="RGBA", icc_profile=ICC)),
    ("deep.png", sixteen_bits), ("frames.gif", palette_frames), ("grey.jpg", plain(mode="L", icc_profile=GREY_ICC)),
    ("strip.png", plain((37, 513))), ("lying.png", plain((513, 37))), ("speck.png", plain((1, 1))),
    ("grey_transparent.png", plain(mode="LA")), ("print.jpg", plain(mode="CMYK", back="RGB")), ("fax.png", one_bit),
])
def test_every_kind_of_picture_comes_back_as_it_was(run, name, make):
    expected, mode = make(name)
    steps = () if name != "photograph.jpg" else ("--steps", "1")
    assert run(name, "--no-preview", *steps) == cli.OK
    immunized, source = Image.open(f"out/{Path(name).stem}_immunized.png"), Image.open(name)
    assert (immunized.mode, immunized.size) == (mode, expected.shape[1::-1])
    difference = np.abs(colours(immunized) - expected).max()
    assert 0 < difference <= 7 and difference == report(f"out/{Path(name).stem}.json")["linf_steps"]
    if "A" in mode:
        assert immunized.getchannel("A").tobytes() == source.getchannel("A").tobytes()
    assert immunized.info.get("icc_profile") == (source.info.get("icc_profile") if source.mode != "CMYK" else None)
    assert not immunized.getexif()                           # the picture is turned already, and the camera is private


# -- the library call --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA"])
def test_a_pil_picture_comes_back_in_its_size_and_mode(tiny, tmp_path, mode):
    image = photo(tmp_path / "a.png", mode=mode)
    profile = image.info["icc_profile"] = GREY_ICC if mode in ("L", "LA") else ICC
    before = image.tobytes()
    result = sifm_min.immunize(image, tiny, [PROMPT], steps=1, timesteps=1)
    assert (result.image.mode, result.image.size, result.image.info["icc_profile"]) == (mode, image.size, profile)
    assert 0 < images.steps_used(image, result.image) == result.report["linf_steps"] <= 7
    assert image.tobytes() == before
    assert json.loads(json.dumps(result.report, allow_nan=False)) == result.report


def test_picture_path_and_name_give_the_same(tiny, tmp_path):
    image = photo(tmp_path / "a.png")
    inputs = [image, images.read(tmp_path / "a.png"), tmp_path / "a.png", str(tmp_path / "a.png")]
    seen = []
    results = [sifm_min.immunize(given, tiny, PROMPT, steps=1, timesteps=1,
                                 on_step=lambda step, loss, terms: seen.append((step, loss, terms))) for given in inputs]
    assert len({result.image.tobytes() for result in results}) == 1
    assert [step for step, *_ in seen] == [0] * 4
    assert seen[0][1:] == (results[0].report["loss"][0]["loss"], {name: results[0].report["loss"][0][name]
                                                                   for name in ("norm", "dist")})


def test_the_empty_prompt_is_a_prompt_to_the_library(tiny, tmp_path):
    assert sifm_min.immunize(photo(tmp_path / "a.png"), tiny, "", steps=1, timesteps=1).report["prompts"] == [""]


@pytest.mark.parametrize("options, says", [
    ({"prompts": []}, "at least one prompt"),
    ({"method": "magic"}, "method 'magic': choose one of sifm, photoguard-encoder, "),
    ({"preset": "fast"}, "preset 'fast': choose one of protocol, native"),
    ({"preset": "native"}, "sifm has no preset 'native'"),
    ({"magic": 1}, "sifm has no option magic; its options are lam, timesteps, taps,"),
    ({"method": "noise", "timesteps": None, "lam": 1}, "noise has no option lam; its options are those of the loop"),
    ({"method": "mist", "timesteps": None, "variant": "literal"}, "variant 'literal': choose one of fused, textural, semantic"),
    ({"eps": 300}, "eps 300"), ({"eps": 0.001}, "eps 0.001"), ({"eps": -0.03}, "eps -0.03"), ({"eps": float("nan")}, "eps nan"),
    ({"steps": -1}, "steps -1"), ({"step_size": 0}, "step_size 0"), ({"schedule": "cosine"}, "schedule 'cosine'"),
    ({"init": "one"}, "init 'one'"), ({"reduction": "sum"}, "reduction 'sum'"), ({"aggregate": "max"}, "aggregate 'max'"),
    ({"noisy": "both"}, "noisy 'both'"), ({"taps": ["nowhere"]}, "tap 'nowhere'"),
    ({"timesteps": 0}, "timestep"), ({"timesteps": []}, "timestep"), ({"timesteps": [1000]}, "timestep 1000"),
    ({"timesteps": [-1, 5]}, "timestep -1"), ({"batch": 0}, "batch"), ({"batch": -1}, "batch"),
    ({"mask": "nowhere.png"}, "nowhere.png: no such file"), ({"mask": "wide.png"}, "the mask is 25x20, the picture 24x20"),
    ({"mask": "dark.png"}, "dark.png: the mask is all dark"),
    ({"image": "nowhere.png"}, "nowhere.png: no such file"), ({"image": Image.new("F", (9, 9))}, "mode F"),
    ({"image": np.zeros((9, 9, 3))}, "ndarray"), ({"editor": "miniature"}, "load_editor"),
])
def test_caller_mistakes_are_value_errors_of_one_sentence(tiny, tmp_path, monkeypatch, options, says):
    monkeypatch.chdir(tmp_path)
    photo("wide.png", (25, 20))
    Image.new("L", (24, 20)).save("dark.png")
    given = {"image": photo("a.png"), "editor": tiny, "prompts": PROMPT, "steps": 1, "timesteps": 1} | options
    with pytest.raises(ValueError) as caught:
        sifm_min.immunize(**given)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_the_module_is_the_function():
    assert callable(sifm_min.immunize) and sifm_min.immunize is sys.modules["sifm_min.immunize"]
    assert list(inspect.signature(sifm_min.immunize).parameters)[:3] == ["image", "editor", "prompts"]


def test_methods_is_a_mapping():
    assert tuple(sifm_min.METHODS) == METHODS and len(sifm_min.METHODS) == len(METHODS)
    assert all(callable(objective) and objective.__name__ == name.replace("-", "_")
               for name, objective in sifm_min.METHODS.items())
    assert "magic" not in sifm_min.METHODS and sifm_min.METHODS.get("magic") is None
    with pytest.raises(KeyError):
        sifm_min.METHODS["magic"]


# -- mistakes ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("argv, says", [
    (("a.png", "--eps", "300"), "--eps: 300 is no budget"), (("a.png", "--eps", "0.001"), "--eps: 0.001 is no budget"),
    (("a.png", "--prompt", ""), "--prompt: the text is empty"), (("a.png", "--prompt", " \n"), "--prompt: the text is empty"),
    (("a.png", "--timesteps", "0"), "--timesteps"), (("a.png", "--timesteps", "1000,"), "1000 is no timestep"),
    (("a.png", "--timesteps", "many"), "--timesteps"), (("a.png", "--steps", "0"), "--steps"),
    (("a.png", "--taps", "mid_block,nowhere"), "--taps nowhere"), (("a.png", "--batch", "0"), "--batch"),
    (("a.png", "--method", "magic"), "--method"), (("a.png", "--variant", "grey"), "sifm has no option variant"),
    (("a.png", "--method", "mist", "--lam", "1"), "mist has no option lam; its options are variant"),
    (("a.png", "--preset", "native"), "sifm has no preset 'native'; those that have one are photoguard-encoder,"),
    (("a.png", "--preset", "fast"), "--preset"), (("a.png", "--editor", "nonsense"), "'nonsense' is neither"),
    (("a.png", "--editor", "a.png"), "a.png is a file"), (("a.png", "--seed", "-1"), "--seed"),
    (("a.png", "--device", "cuda:63"), "--device cuda:63"), (("a.png", "--mask", "no.png"), "no.png: no such file"),
    (("a.png", "--mask", "dark.png"), "dark.png: the mask is all dark"), (("a.png", "--mask", "."), "is a folder"),
    ((), "give at least one picture"), (("",), "the name is empty"), (("a.png", "-o", ""), "the name is empty"),
    (("empty",), "empty: no pictures in this folder"),
    (("a.png", "a.jpg"), "would both write a_immunized.png"), (("a.png", "sub/a.png"), "would both write a_immunized.png"),
])
def test_a_usage_error_is_one_sentence_and_touches_nothing(run, capsys, argv, says):
    photo("a.png"), photo("a.jpg"), photo("sub/a.png"), Image.new("L", (24, 20)).save("dark.png")
    Path("empty").mkdir()
    Path("empty/notes.txt").write_text("nothing")
    assert run(*argv) == cli.USAGE
    assert says in told(capsys) and not Path("out").exists()


@pytest.mark.parametrize("argv", [["a.png", "-o", "out"], ["a.png", "--prompt", PROMPT], ["--prompt", PROMPT, "-o", "out"]])
def test_picture_prompt_and_folder_are_needed(tmp_path, monkeypatch, capsys, argv):
    monkeypatch.chdir(tmp_path)
    assert immunize.main(argv) == cli.USAGE
    assert "at least one picture or folder, --prompt TEXT and -o DIR" in told(capsys)


@pytest.mark.parametrize("fault", ["offline", "gated", "no server", "not shipped"])
def test_weights_that_cannot_be_had_are_code_3(run, tmp_path, monkeypatch, capsys, fault):
    photo("a.png")
    with Hub() as hub:
        for name, value in {"ENDPOINT": hub.url, "HF_HUB_CACHE": str(tmp_path / "cache"),
                            "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
                            "HF_TOKEN_PATH": str(tmp_path / "token"), "HF_HUB_OFFLINE": fault == "offline"}.items():
            monkeypatch.setattr(constants, name, value)
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.delenv(name, raising=False)
        hub.faults["/"] = status(401, error="GatedRepo", message="Access is restricted.")
        if fault == "no server":
            hub.__exit__()
        name = "owner/editor"
        if fault == "not shipped":
            name, absent = "miniature", checkpoints.Source(name="miniature", licence="", folder=tmp_path / "nowhere")
            monkeypatch.setitem(checkpoints.EDITORS, name, absent)
        assert run("a.png", "--editor", name) == cli.UNAVAILABLE
    says = {"offline": "offline nothing is fetched", "gated": "owner/editor is gated and no token is set",
            "no server": "cannot be fetched", "not shipped": "the shipped editor miniature lacks its weights"}[fault]
    assert says in told(capsys) and not Path("out").exists()


def bomb(path):
    """A PNG whose header promises ten thousand million pixels."""
    encoded = io.BytesIO()
    Image.new("RGB", (8, 8)).save(encoded, "PNG")
    head = b"IHDR" + struct.pack(">II", 100_000, 100_000) + encoded.getvalue()[24:29]
    Path(path).write_bytes(encoded.getvalue()[:12] + head + struct.pack(">I", zlib.crc32(head)) + encoded.getvalue()[33:])


def test_unreadable_pictures_are_told_and_the_others_done(run, capsys):
    photo("in/good.png"), photo("in/zebra.png", seed=1), photo("in/cut.jpg", (200, 200))
    Path("in/cut.jpg").write_bytes(Path("in/cut.jpg").read_bytes()[:3000])
    Path("in/text.png").write_text("I am not a picture.")
    Path("in/hollow.png").touch()
    bomb("in/bomb.png")
    assert run("in", "missing.png", "--no-preview", "--json") == cli.SOME_FAILED
    assert sorted(files()) == ["good.json", "good_immunized.png", "zebra.json", "zebra_immunized.png"]
    out, err = capsys.readouterr()
    records = [json.loads(line) for line in out.splitlines()]
    bad = ["in/bomb.png", "in/cut.jpg", "in/hollow.png", "in/text.png", "missing.png"]
    assert [record["file"] for record in records if "error" in record] == bad
    assert [record["immunized"] for record in records if "error" not in record] == ["good_immunized.png",
                                                                                   "zebra_immunized.png"]
    lines = err.splitlines()[1:]                             # after the editor's notice
    assert [line.startswith("error: ") for line in lines[:5]] == [True] * 5
    assert lines[5] == "2 of 7 pictures done, 5 failed:"
    assert [line.removeprefix("error: ") for line in lines[:5]] == [line.strip() for line in lines[6:]]
    for name, sentence in zip(bad, lines[:5], strict=True):
        assert sentence.count(name) == 1
    assert "million pixels" in lines[0] and "damaged" in lines[1] and "Traceback" not in err


def test_a_mask_of_another_size_belongs_to_its_picture(run, capsys):
    photo("a.png"), photo("b.png", (30, 20)), Image.new("L", (30, 20), 255).save("mask.png")
    assert run("a.png", "b.png", "--mask", "mask.png", "--no-preview") == cli.SOME_FAILED
    assert sorted(files()) == ["b.json", "b_immunized.png"]
    assert "a.png: mask.png: the mask is 30x20, the picture 24x20; make them equal" in capsys.readouterr().err


# -- where results go --------------------------------------------------------------------------------------------------

def test_an_output_that_is_a_file(run, capsys):
    photo("a.png")
    Path("out").write_text("mine")
    assert run("a.png") == cli.SOME_FAILED
    assert told(capsys) == "error: out is a file; results need a folder\n" and Path("out").read_text() == "mine"


def test_unwritable_output_is_told_before_the_work(run, monkeypatch, capsys):
    def refuse(*args, **options):
        raise PermissionError(errno.EACCES, "Permission denied")
    monkeypatch.setattr(writing.tempfile, "TemporaryFile", refuse)
    monkeypatch.setattr(sys.modules["sifm_min.immunize"], "immunize", lambda *args, **options: pytest.fail("it worked"))
    photo("a.png")
    assert run("a.png") == cli.SOME_FAILED
    assert told(capsys) == "error: out: permission denied\n"


@pytest.mark.slow
@pytest.mark.parametrize("written", [0, 1, 3])               # files of the second picture that still fit
def test_a_full_disk_ends_the_run_and_leaves_nothing_half(run, monkeypatch, capsys, written):
    for name in "abc":
        photo(f"in/{name}.png", seed=ord(name))
    assert run("in/a.png") == cli.OK
    first, left, sync = files(), [written], os.fsync

    def full(descriptor):
        if not left[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        left[0] -= 1
        return sync(descriptor)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        capsys.readouterr()
        assert run("in") == cli.SOME_FAILED
    kept = {"b.json", "b_immunized.png"} if written == 3 else set()      # finished, and only its preview did not fit
    assert files().keys() == first.keys() | kept and files() | first == files()          # c was not begun
    err = capsys.readouterr().err
    assert "no space left on device; free some space and run the same command again" in err
    assert "1 of 3 pictures done" in err and "Traceback" not in err
    assert run("in") == cli.OK
    assert len(files()) == 9 and files() | first == files()


@pytest.mark.parametrize("name, content", [
    ("a_immunized.png", b"mine"), ("a_preview.png", b"mine"), ("a.json", b"mine"), ("a.json", b'{"mine": 1}'),
    ("a.json", b"[]"), ("a.json", b"\xff\xfe"), ("a.json", b"")])
def test_somebody_elses_files_are_not_overwritten_unless_asked(run, capsys, name, content):
    photo("a.png")
    Path("out").mkdir()
    Path("out", name).write_bytes(content)
    assert run("a.png", "--quiet") == cli.SOME_FAILED
    assert told(capsys) == (f"error: a.png: out/{name} exists, from another picture or other options; add --overwrite or "
                            "choose another folder\n")
    assert files() == {name: content}
    assert run("a.png", "--overwrite") == cli.OK
    assert len(files()) == 3 and report()["finished"] and content not in files().values()


@pytest.mark.slow
def test_a_second_run_does_only_what_is_not_done(run, capsys):
    photo("in/a.png"), photo("in/b.png", seed=1)
    assert run("in") == cli.OK
    before = files()
    capsys.readouterr()
    assert run("in") == cli.OK
    out, err = capsys.readouterr()
    assert out == "" and "in/a.png: done before, skipped\nin/b.png: done before, skipped\n" in err
    assert files() == before
    for end in ENDS[:2]:                                     # what was deleted since is done again, and nothing else
        Path(f"out/a{end}").unlink()
        assert run("in") == cli.OK
        out, err = capsys.readouterr()
        assert out.startswith("in/a.png -> out/a_immunized.png: ") and out.count("\n") == 1
        assert "in/b.png: done before, skipped" in err
        assert sorted(files()) == sorted(before)
        assert all(files()[name] == before[name] for name in before if name != "a.json")


def test_files_of_another_program_are_left_alone(run, monkeypatch, capsys):
    photo("a.png")
    quantize = images.quantize
    monkeypatch.setattr(images, "quantize", lambda *args: (Path("out/a_immunized.png").write_text("theirs"),
                                                           quantize(*args))[1])
    assert run("a.png") == cli.SOME_FAILED
    assert "out/a_immunized.png exists" in capsys.readouterr().err and files() == {"a_immunized.png": b"theirs"}


@pytest.mark.parametrize("change", [("--seed", "1"), ("--eps", "8/255"), ("--prompt", "a cat"), ("--taps", "mid_block")])
def test_other_options_are_another_run(run, capsys, change):
    photo("a.png")
    assert run("a.png", "--no-preview") == cli.OK
    before = files()
    assert run("a.png", "--no-preview", *change) == cli.SOME_FAILED
    assert "add --overwrite or choose another folder" in capsys.readouterr().err and files() == before
    assert run("a.png", "--no-preview", *change, "--overwrite") == cli.OK
    assert files().keys() == before.keys() and files()["a_immunized.png"] != before["a_immunized.png"]


def test_another_picture_or_other_weights_are_another_run(run, tiny, monkeypatch, capsys):
    photo("a.png")
    assert run("a.png", "--no-preview") == cli.OK
    with monkeypatch.context() as patched:
        patched.setattr(tiny, "checkpoint", type("Other", (), {"hashes": lambda self, digest=None: {"unet": "0" * 64},
                                                                "configuration": tiny.checkpoint.configuration})())
        assert run("a.png", "--no-preview") == cli.SOME_FAILED
    photo("a.png", seed=1)
    assert run("a.png", "--no-preview") == cli.SOME_FAILED
    assert capsys.readouterr().err.count("from another picture or other options") == 2


@pytest.mark.slow
def test_results_beside_the_pictures_are_not_immunized_again(run, capsys):
    photo("in/a.png"), photo("in/b.png", seed=1)
    assert run("in", "-o", "in") == cli.OK
    before = files("in")
    assert len(before) == 8
    assert run("in", "-o", "in") == cli.OK
    assert files("in") == before
    Path("in/a.png").unlink(), Path("in/b.png").unlink()
    capsys.readouterr()
    assert run("in", "-o", "in") == cli.USAGE
    assert "nothing in this folder but earlier results" in told(capsys)
    assert run("in/a_immunized.png") == cli.OK               # who names one, means it
    assert "a_immunized_immunized.png" in files()


def test_an_input_is_never_overwritten(run, capsys):
    photo("in/a.png"), photo("in/a_immunized.png", seed=1)
    before = files("in")
    assert run("in/a.png", "in/a_immunized.png", "-o", "in", "--overwrite") == cli.USAGE
    assert "in/a_immunized.png" in told(capsys) and files("in") == before


@pytest.mark.slow
def test_odd_names(run, capsys):
    names = ["портрет 写真 é.png", "with  two spaces.png", "-dash.png", "dots.tar.png", "%(prog)s{}.PNG", ".hidden.png"]
    for i, name in enumerate(names):
        photo(f"in.png/{name}", seed=i)                      # a folder whose name ends like a picture's
    Path("in.png/inner.png").mkdir()
    os.symlink("loop.png", "in.png/loop.png")
    os.symlink("with  two spaces.png", "in.png/link.png")
    os.symlink(".", "in.png/again")
    assert run("in.png", "in.png/", "./in.png/-dash.png", str(Path("in.png").resolve()), "--no-preview") == cli.SOME_FAILED
    err = capsys.readouterr().err
    assert "6 of 7 pictures done, 1 failed:" in err and "in.png/again, in.png/inner.png" in err
    stems = [Path(name).stem for name in names[:-1]] + ["link"]
    assert sorted(files()) == sorted(stem + end for stem in stems for end in (ENDS[0], ENDS[2]))
    assert report("out/портрет 写真 é.json")["picture"] == "in.png/портрет 写真 é.png"
    assert run("in.png/loop.png") == cli.SOME_FAILED
    assert "in.png/loop.png: no such file" in capsys.readouterr().err


# -- streams -----------------------------------------------------------------------------------------------------------

def test_json_lines(run, capsys):
    photo("in/a.png"), photo("in/b.png", seed=1)
    assert run("in", "--json", "--no-preview") == cli.OK
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [record["picture"] for record in records] == ["in/a.png", "in/b.png"]
    for record in records:
        assert {"finished", "picture", "immunized", "input", "editor", "method", "note", "prompts", "preset", "options",
                "linf_steps", "budget_steps", "budget_mean_steps", "values_beyond_budget", "visibility", "psnr", "ssim",
                "passes", "gradient_evaluations", "seconds", "loop_seconds", "peak_memory_bytes", "cpu_kernels", "memory",
                "versions"} == record.keys()
    assert run("in", "--json", "--no-preview", "--quiet") == cli.OK
    out, err = capsys.readouterr()                           # a second run names them too: a script sees all its pictures
    assert err == "" and [json.loads(line) for line in out.splitlines()] == [
        record | {"skipped": True} for record in records]


def test_quiet_is_quiet(run, capsys):
    photo("in/a.png"), photo("in/b.png", seed=1)
    assert run("in", "--quiet") == cli.OK
    out, err = capsys.readouterr()
    assert err == "" and len(out.splitlines()) == 2
    assert run("in", "--quiet") == cli.OK
    assert capsys.readouterr() == ("", "")


def test_every_picture_falls_to_one_of_the_ranks(run, monkeypatch, capsys):
    for i in range(5):
        photo(f"in/{i}.png", (9, 9), seed=i)
    shares = []
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "3")
        assert run("in", "--method", "noise", "--no-preview", "--json", "--quiet") == cli.OK
        shares.append([json.loads(line)["picture"] for line in capsys.readouterr().out.splitlines()])
    assert sorted(sum(shares, [])) == [f"in/{i}.png" for i in range(5)] and max(map(len, shares)) == 2
    assert len(files()) == 10


@pytest.mark.parametrize("rank, size", [("2", None), ("3", "3"), ("-1", "2"), ("x", "2"), ("0", "x"), ("0", "0")])
def test_a_rank_that_makes_no_sense_skips_no_picture_in_silence(run, monkeypatch, capsys, rank, size):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", size) if size else monkeypatch.delenv("WORLD_SIZE", raising=False)
    for i in range(3):
        photo(f"in/{i}.png", (9, 9), seed=i)
    code = run("in", "--method", "noise", "--no-preview", "--quiet")
    if size is None:                                         # no torchrun has set this one
        assert code == cli.OK and len(files()) == 6
    else:
        assert code == cli.USAGE and "RANK" in told(capsys) and not files()


# -- stopped on the way ------------------------------------------------------------------------------------------------

def test_interrupted_between_the_files_of_a_picture(run, monkeypatch, capsys):
    def interrupt(*args, **options):
        raise KeyboardInterrupt
    photo("in/a.png"), photo("in/b.png", seed=1)
    assert run("in/a.png") == cli.OK
    before = files()
    monkeypatch.setattr(images, "write_checked", interrupt)
    assert run("in") == cli.INTERRUPTED
    assert "interrupted; what is finished is whole" in capsys.readouterr().err and files() == before


HELD = """
import os, signal, sifm_min
built = []

def held(editor, x_orig, contexts, *, generator, timesteps=2, batch=None):
    objective = sifm_min.METHODS["sifm"](editor, x_orig, contexts, generator=generator, timesteps=timesteps, batch=batch)
    built.append(objective)
    if "UNDER_WAY" not in os.environ or len(built) < 2:
        return objective

    def holding(x_imu, step):
        if step == 1:
            os.write(os.open(os.environ["UNDER_WAY"], os.O_WRONLY), b"x")
            while True:
                signal.pause()
        return objective(x_imu, step)
    return holding
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_folder_run_is_stopped_and_killed_and_finishes_later(run, tiny_folder, tmp_path, monkeypatch, capsys, forked):
    """Each child makes one picture and holds in the second step of the next one, which it says through a named pipe."""
    names = [f"in/{name}.png" for name in "abcd"]
    for i, name in enumerate(names):
        photo(name, (24 + i, 20), seed=i)                    # of one size they would be done at once
    Path("held_method.py").write_text(HELD)
    monkeypatch.syspath_prepend(tmp_path)
    options = ["--prompt", PROMPT, "--editor", str(tiny_folder), "--method", "held_method:held", "--steps", "3", "--no-preview",
               "-o", "out"]
    os.mkfifo("under_way")
    whole = {}
    for count, (kill, code) in enumerate(((signal.SIGINT, cli.INTERRUPTED), (signal.SIGKILL, -signal.SIGKILL)), 1):
        pipe = [os.open("under_way", way) for way in (os.O_RDONLY | os.O_NONBLOCK, os.O_WRONLY)]      # open: never at its end
        child = forked.start("-m", "sifm_min.immunize", "in", "--json", *options, cwd=tmp_path,
                             env=os.environ | {"PYTHONPATH": str(ROOT), "UNDER_WAY": "under_way"})
        assert pipe[0] in select.select([pipe[0], child.ends], [], [])[0], child.wait().stderr
        for end in pipe:
            os.close(end)
        os.kill(child.pid, kill)
        done = child.wait()
        assert done.returncode == code and "Traceback" not in done.stderr
        assert [line["picture"] for line in map(json.loads, done.stdout.splitlines()) if "skipped" not in line] == [
            names[count - 1]]
        assert whole.items() <= files().items() and not any(name.endswith(".part") for name in files())
        whole = files()
        assert set(whole) == {f"{Path(name).stem}{end}" for name in names[:count] for end in (ENDS[0], ENDS[2])}
        for name in names[:count]:
            images.write_checked("again.png", Image.open(f"out/{Path(name).stem}_immunized.png"), images.read(name), 0.03,
                                 overwrite=True)
    assert immunize.main(["in", *options]) == cli.OK
    assert capsys.readouterr().err.count("done before, skipped") == 2
    assert len(files()) == 8 and whole.items() <= files().items()
