"""Several editors and one perturbation: the joint gradient, its scales, reports, previews, options and memory."""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny_editor
import tiny_sd3
import torch
from photographs import photo, smooth
from pretended_gpu import PretendedGPU

import sifm_min
from sifm_min import cli, images, immunize
from sifm_min.editors import Several
from sifm_min.immunizing import joint, shares
from sifm_min.pgd import pgd

PROMPT = "make it night"
FEW = {"steps": 3, "timesteps": 2}


@pytest.fixture(scope="module")
def sd3_folder(tmp_path_factory):
    return tiny_sd3.write(tmp_path_factory.mktemp("tiny-sd3-"), seed=3)


@pytest.fixture(scope="module")
def sd3(sd3_folder):
    return sifm_min.load_editor(sd3_folder, device="cpu")


@pytest.fixture(scope="module")
def encoders(tiny_folder):
    return sifm_min.load_editor(f"latents:{tiny_folder}", device="cpu")


def pixels_of(result):
    return np.asarray(result.image.convert("RGB")).astype(int)


def without_times(report):
    times = ("seconds", "loop_seconds", "peak_memory_bytes")
    return {key: value for key, value in report.items() if key not in times}


# -- one editor is as before -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_one_editor_is_the_loop_by_hand(tiny, mode):
    """The picture equals that of the method, the loop and the rounding, called one after the other."""
    image = smooth(40, 30).convert(mode)
    result = sifm_min.immunize(image, tiny, PROMPT, seed=5, **FEW)
    picture, generator = images.picture(image), torch.Generator().manual_seed(5)
    original = images.to_pixels(picture.image)
    objective = sifm_min.METHODS["sifm"](tiny, original, tiny.contexts([PROMPT]), generator=generator, timesteps=2, batch=2)
    delta = pgd(original[:, :picture.channels], lambda x, step: objective(x.expand(-1, 3, -1, -1), step), 0.03, steps=3,
                step_size=1 / 255, generator=generator)
    assert np.array_equal(pixels_of(result), np.asarray(images.quantize(picture, delta, 0.03).convert("RGB")))


def test_a_list_of_one_is_that_editor(tiny):
    image = smooth(40, 30)
    one, other = (sifm_min.immunize(image, editor, PROMPT, **FEW) for editor in (tiny, [tiny]))
    assert np.array_equal(pixels_of(one), pixels_of(other)) and without_times(one.report) == without_times(other.report)
    assert "editors" not in one.report and "any_prompt" not in one.report


# -- the sum of the losses ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("rms, norm, size", [(None, 1, lambda g: g.abs().sum()), (0.6, 2, lambda g: g.square().sum().sqrt())])
def test_joint_gradient_is_the_sum_over_the_scales(tiny_folder, sd3_folder, monkeypatch, rms, norm, size):
    """In float64: the gradient of the sum equals the sum of the gradients over scales measured by hand, as does the loss."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    wide = {"device": "cpu", "dtype": torch.float64, "vae_dtype": torch.float64}
    editors = [sifm_min.load_editor(folder, **wide) for folder in (tiny_folder, sd3_folder)]
    group, steps = Several(editors), {"steps": joint.MEASURED, "step_size": 1 / 255, "rms": rms}
    drawn = torch.Generator().manual_seed(1)
    original = torch.rand(1, 3, 40, 30, generator=drawn, dtype=torch.float64)
    x = (original + 0.02 * torch.randn(original.shape, generator=drawn, dtype=torch.float64)).clamp(0, 1).requires_grad_()

    def make(share, generator):
        return sifm_min.METHODS["sifm"](share.editor, original, share.contexts, generator=generator, timesteps=3)

    _, _, parts = shares.shares_of(group, "sifm", "protocol", None, {"timesteps": 3})
    parts = shares.told(parts, [PROMPT], None)
    loss, terms = (objective := joint.joint_objective(group, parts, make, 7, lambda own, generator: pgd(
        original, own, 0.03, **steps, generator=generator), 1.0, norm))(x, 0)
    (found,) = torch.autograd.grad(loss, x)

    expected, value = torch.zeros_like(x), 0.0
    for share in parts:
        norms, own = [], make(share, generator := torch.Generator().manual_seed(7))

        def counted(pixels, step, own=own, norms=norms):
            result = own(pixels, step)[0]
            norms.append(size(torch.autograd.grad(result, pixels, retain_graph=True)[0]))
            return result

        pgd(original, counted, 0.03, **steps, generator=generator)
        scale = sum(norms) / 4
        single = make(share, torch.Generator().manual_seed(7))(x, 0)[0]
        (gradient,) = torch.autograd.grad(single, x)
        expected, value = expected + gradient / scale, value + single.detach() / scale
        assert objective.scales[share.name] == pytest.approx(scale.item(), rel=1e-9)
        assert terms[f"{share.name}: loss"].item() == pytest.approx(single.item(), rel=1e-9)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-15)
    assert loss.item() == pytest.approx(value.item(), rel=1e-9)


def test_no_editor_outweighs_the_others(tiny, sd3):
    """An editor whose loss is a thousand times as large changes the picture no more than before."""
    def scaled(editor, x_orig, contexts, *, generator, factor=1.0):
        inner = sifm_min.METHODS["photoguard-encoder"](editor, x_orig, contexts, generator=generator)
        return lambda x, step: factor * inner(x, step)

    made = [sifm_min.immunize(smooth(40, 30), [tiny, sd3], PROMPT, method=scaled, steps=3, each=[{"factor": factor}, {}])
            for factor in (1.0, 1000.0)]
    assert np.array_equal(*map(pixels_of, made))
    small, large = ([one["scale"] for one in result.report["editors"]] for result in made)
    assert large[0] == pytest.approx(1000 * small[0], rel=1e-5) and large[1] == pytest.approx(small[1], rel=1e-5)


def test_one_perturbation_moves_both_editors(tiny, sd3):
    """Each editor's own loss falls, further than by a perturbation for the other one alone."""
    image, options = smooth(40, 30), {"method": "editshield", "variant": "plain", "steps": 12}

    def moved(result, editor):
        with torch.no_grad():
            before, after = (editor.encode(editor.resize(images.to_pixels(one))) for one in (image, result.image))
        return (after - before).square().mean().item()

    both, first, second = (sifm_min.immunize(image, editors, PROMPT, **options) for editors in ([tiny, sd3], tiny, sd3))
    for name in both.report["editors"]:
        losses = [step[f"{name['called']}: loss"] for step in both.report["loss"]]
        assert losses[-1] < losses[0]
    assert moved(both, tiny) > 1.2 * moved(second, tiny) and moved(both, sd3) > 1.2 * moved(first, sd3)


# -- what a report holds -----------------------------------------------------------------------------------------------

def test_report_lists_the_editors(tiny, sd3, encoders):
    names = Several([tiny, sd3, encoders]).names
    result = sifm_min.immunize(smooth(40, 30), [tiny, sd3, encoders], PROMPT, **FEW)
    found = result.report["editors"]
    assert "editor" not in result.report and [one["called"] for one in found] == names and len(set(names)) == 3
    for one, editor in zip(found, (tiny, sd3, encoders), strict=True):
        assert {key: one[key] for key in editor.provenance()} == editor.provenance() and one["weights"] and one["scale"] > 0
    assert [one["method"] for one in found] == ["sifm", "sifm", "latent"]
    assert found[0]["options"]["taps"] == list(tiny.default_taps) != found[1]["options"]["taps"] == list(sd3.default_taps)
    assert found[0]["options"]["timesteps"] == tiny.timesteps(2).tolist() != found[1]["options"]["timesteps"]
    assert "lam" not in result.report["options"] and found[2]["options"] == {"sizes": (512, 1024), "spaces_per_step": None}
    assert set(result.report["loss"][0]) >= {"loss", *(f"{name}: loss" for name in names), f"{names[1]}: dist"}
    assert result.report["shifts"] and result.report["linf_steps"] <= 7
    passes = result.report["passes"]                         # 3 steps, and 3 measured ones: a loop has no more
    assert passes["encoder_backward"] == 2 * (3 + 3 + 3) and passes["denoiser_backward"] == 2 * (2 * 3 + 2 * 3)


def test_robust_and_texture_go_with_several(tiny, sd3, monkeypatch):
    options, norms, make = {"robust": True, "budget": "texture", "mask": None, **FEW}, [], joint.joint_objective
    monkeypatch.setattr(joint, "joint_objective", lambda *args, norm: norms.append(norm) or make(*args, norm=norm))
    both = sifm_min.immunize(smooth(40, 30), [tiny, sd3], PROMPT, **options)
    single = sifm_min.immunize(smooth(40, 30), sd3, PROMPT, **options)
    drawn = [[step["purifier"] for step in result.report["loss"]] for result in (both, single)]
    assert drawn[0] == drawn[1] and len(set(drawn[0])) > 1
    assert both.report["options"]["budget"] == "texture" and both.report["linf_steps"] > 0
    assert norms == [2]                                      # of scales where steps go along the gradient


def test_scales_are_of_whole_steps_whatever_the_schedule(tiny, sd3):
    """A schedule that falls would be over before the measured steps are."""
    scales = [[editor["scale"] for editor in sifm_min.immunize(smooth(40, 30), [tiny, sd3], PROMPT, schedule=schedule, steps=4,
                                                               timesteps=1).report["editors"]]
              for schedule in ("constant", "linear")]
    assert scales[0] == scales[1]


def test_report_has_the_text_of_every_editor(tiny, sd3, tmp_path):
    """An img2img editor is told descriptions, and draws from as many texts as differ for it."""
    own = tmp_path / "mine.txt"
    own.write_text("make it red\nadd a lake\ta lake\nmake it night\tnight\n")
    report = sifm_min.immunize(smooth(40, 30), [tiny, sd3], PROMPT, any_prompt=own, steps=5, timesteps=1).report
    names = [editor["called"] for editor in report["editors"]]
    texts = [{step["prompt"][name] for step in report["loss"]} for name in names]
    assert texts == [{PROMPT, "make it red", "add a lake", ""}, {PROMPT, "make it red", "a lake", "night", ""}]


def test_grey_picture_within_a_mask(tiny, sd3, tmp_path):
    mask = np.zeros((30, 40), np.uint8)
    mask[:, :20] = 255
    from PIL import Image
    Image.fromarray(mask).save(tmp_path / "mask.png")
    image = smooth(40, 30).convert("L")
    result = sifm_min.immunize(image, [tiny, sd3], PROMPT, mask=tmp_path / "mask.png", **FEW)
    changed = np.asarray(result.image).astype(int) - np.asarray(image).astype(int)
    assert result.image.mode == "L" and changed[:, :20].any() and not changed[:, 20:].any()


def test_each_editor_may_have_its_own_words(tiny, sd3, monkeypatch):
    told = {}
    for name, editor in {"tiny": tiny, "sd3": sd3}.items():
        monkeypatch.setattr(editor, "contexts", lambda texts, name=name, real=editor.contexts: (
            told.setdefault(name, list(texts)), real(texts))[1])
    own = [{"prompts": ["make it night"]}, {"prompts": "a night", "timesteps": 1}]
    result = sifm_min.immunize(smooth(40, 30), [tiny, sd3], each=own, **FEW)
    assert told == {"tiny": ["make it night"], "sd3": ["a night"]}
    assert [len(one["options"]["timesteps"]) for one in result.report["editors"]] == [2, 1]
    with pytest.raises(ValueError, match="at least one prompt"):
        sifm_min.immunize(smooth(40, 30), [tiny, sd3], each=[own[0], {}], **FEW)


def test_noise_for_several_is_the_noise_control(tiny, sd3):
    both, single = (sifm_min.immunize(smooth(40, 30), editors, PROMPT, method="noise") for editors in ([tiny, sd3], tiny))
    assert np.array_equal(pixels_of(both), pixels_of(single))


# -- what is refused ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("options", "says"), [
    ({"method": "decontext"}, "decontext reduces the attention.*tiny"),
    ({"method": "latent"}, "latent is for editors without a denoiser"),
    ({"noisy": "deploy"}, "noisy deploy of sifm is for instruction editors"),
    ({"each": [{"taps": ["nowhere"]}, {}]}, "nowhere"),
    ({"each": [{}]}, "each has options for 1 editors, and there are 2"),
    ({"each": [{"eps": 0.1}, {}]}, "eps is the same for all editors, so it cannot be given for editor 1 alone"),
    ({"each": [{}, {"variant": "x"}]}, "sifm has no option variant"),
    ({"spaces_per_step": 1}, "sifm has no option spaces_per_step")])
def test_refusals_name_the_editor(tiny, sd3, options, says):
    with pytest.raises(ValueError, match=says) as raised:
        sifm_min.immunize(smooth(40, 30), [tiny, sd3], PROMPT, steps=1, **options)
    if "method" in options or "noisy" in options:
        name = Several([tiny, sd3]).names["noisy" in options]
        assert name in str(raised.value)


def test_a_list_without_editors_or_with_one_twice(tiny):
    for editors, says in (([], "at least one editor"), ([tiny, tiny], "given twice"), ([tiny, "sd3"], "is a name; load it")):
        with pytest.raises(ValueError, match=says):
            sifm_min.immunize(smooth(40, 30), editors, PROMPT)


# -- memory ------------------------------------------------------------------------------------------------------------

def test_low_memory_holds_one_editor_at_a_time(tiny_folder, sd3_folder):
    """On a pretended card: while an editor works no weight of the other is there, and the picture is the same."""
    image = smooth(40, 30)
    with PretendedGPU():
        editors = [sifm_min.load_editor(folder, device="cuda", dtype=torch.float32) for folder in (tiny_folder, sd3_folder)]
        fast, seen, real = sifm_min.immunize(image, editors, PROMPT, memory="fast", **FEW), [], type(editors[0]).posterior

        def there(editor):
            return any(not weight.is_meta and weight.device.type == "cuda" for network in editor.networks
                       for weight in network.parameters())

        for editor, other in (editors, editors[::-1]):
            editor.posterior = lambda pixels, editor=editor, other=other: (
                seen.append((there(other), (moments := real(editor, pixels), there(editor))[1])), moments)[1]
        low = sifm_min.immunize(image, editors, PROMPT, memory="low", **FEW)
        for editor in editors:
            del editor.posterior
        assert seen and set(seen) == {(False, True)}
        assert np.array_equal(pixels_of(fast), pixels_of(low))
        for editor in editors:                               # whoever waits comes back when it is used
            assert editor.edit(image, PROMPT).size == image.size and there(editor)


def test_editors_come_back_with_the_same_weights(tiny_folder):
    with PretendedGPU():
        editor = sifm_min.load_editor(tiny_folder, device="cuda", dtype=torch.float32)
        editor.edit(smooth(40, 30), PROMPT)
        before = {name: weight.cpu() for name, weight in editor.unet.named_parameters()}
        editor.wait()
        assert all(weight.device.type == "cpu" for weight in editor.unet.parameters())
        editor.come()
        for name, weight in editor.unet.named_parameters():
            assert weight.device.type == "cuda" and torch.equal(weight.cpu(), before[name]) and not weight.requires_grad


# -- the command -------------------------------------------------------------------------------------------------------

@pytest.fixture
def run(tiny_folder, sd3_folder, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)

    def command(*argv, editors=(tiny_folder, sd3_folder)):
        chosen = [word for editor in editors for word in ("--editor", str(editor))]
        code = immunize.main([*chosen, "--steps", "2", "-o", "out", *argv])
        return code, *capfd.readouterr()
    return command


def test_command_takes_several_editors(run, tiny, sd3, tiny_folder, sd3_folder):
    photo("a.png", (40, 30))
    first, second = Several([tiny, sd3]).names
    code, out, err = run("a.png", "--prompt", PROMPT, "--timesteps", "2", "--option", "2:taps=transformer_blocks.0")
    assert code == cli.OK, err
    report = json.loads(Path("out/a.json").read_text())
    assert [one["options"]["taps"] for one in report["editors"]] == [list(tiny.default_taps), ["transformer_blocks.0"]]
    assert [one["source"] for one in report["editors"]] == [str(tiny_folder), str(sd3_folder)]
    assert report["asked"]["weights"] == [tiny.provenance()["weights"], sd3.provenance()["weights"]]
    assert err.count(tiny_editor.NOTICE) == 2
    again, _, err = run("a.png", "--prompt", PROMPT, "--timesteps", "2", "--option", "2:taps=transformer_blocks.0")
    assert again == cli.OK and "done before, skipped" in err
    code, _, err = run("a.png", "--prompt", PROMPT, "--timesteps", "2", editors=(sd3_folder, tiny_folder))
    assert code == cli.SOME_FAILED and "from another picture or other options" in err
    code, out, _ = run("--taps", "list")
    assert code == cli.OK and f"{first}: mid_block" in out and f"{second}: transformer_blocks.0" in out


def test_preview_has_a_row_for_each_editor(run, monkeypatch, tiny, sd3):
    from sifm_min.files import contact_sheet
    rows, made = [], contact_sheet.sheet
    monkeypatch.setattr(contact_sheet, "sheet", lambda columns, **options: rows.append([name for name, _ in columns]) or made(
        columns, **options))
    photo("a.png", (40, 30))
    assert run("a.png", "--prompt", PROMPT, "--timesteps", "2")[0] == cli.OK
    names = Several([tiny, sd3]).names
    assert rows == [["original", f"edited, {name}: {PROMPT}", "immunized", f"edited, {name}: {PROMPT}", "perturbation x10"]
                    for name in names]
    from PIL import Image
    with Image.open("out/a_preview.png") as preview:
        assert preview.height > 2 * 300


def test_strength_goes_to_the_editors_that_have_one(run, tiny, sd3, tiny_folder):
    """Its timesteps are those of an edit at this strength; an instruction editor keeps its own; none that has it: refused."""
    photo("a.png", (40, 30))
    argv = ("a.png", "--prompt", PROMPT, "--timesteps", "2", "--no-preview", "--strength", "0.5")
    code, _, err = run(*argv)
    assert code == cli.OK, err
    first, second = json.loads(Path("out/a.json").read_text())["editors"]
    assert first["defaults"]["strength"] == tiny.defaults.strength != second["defaults"]["strength"] == 0.5
    assert first["options"]["timesteps"] == tiny.timesteps(2).tolist()
    assert second["options"]["timesteps"][0] == int(sd3.plan(strength=0.5).timesteps.max()) < int(sd3.plan().timesteps.max())
    code, _, err = run(*argv, editors=(tiny_folder, f"latents:{tiny_folder}"))
    assert code == cli.USAGE and "--strength is for img2img, which" in err and "do not do" in err and err.count("error") <= 1


@pytest.mark.parametrize(("argv", "says"), [
    (("--option", "3:taps=x"), "--option 3:taps=x: there are 2 editors"),
    (("--option", "2:variant=x"), "sifm has no option variant"),
    (("--option", "1:lam=x"), "'x' is not a number"),
    (("--taps", "mid_block"), "--taps mid_block: tiny-sd3"),
    (("--revision", "v1"), "--revision is of one hub repository, and several editors are given: fetch it with `python -m "
                           "sifm_min.weights download ID --revision v1`, and give --editor the folder that this prints"),
    (("--method", "decontext"), "decontext")])
def test_command_refuses_in_a_sentence(run, argv, says):
    photo("a.png", (40, 30))
    code, _, err = run("a.png", "--prompt", PROMPT, "--no-preview", *argv)
    assert code in (cli.USAGE, cli.SOME_FAILED) and says in err and err.count("error:") <= 1
