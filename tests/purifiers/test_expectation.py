"""Methods that expect purifiers: the same draw for both pictures, every method, seeds, costs, and the report."""

import json

import pytest
import torch
from photographs import photo, smooth
from PIL import Image

import sifm_min
from sifm_min import cli, images, immunize
from sifm_min.models.latent_spaces import SPACES
from sifm_min.purifiers import draws, expectation

PROMPTS = ["make it night", "make her a witch"]
OTHERS = [name for name in sifm_min.METHODS if name not in ("noise", "latent", "decontext")]        # those are tested apart
FEW = {name: {"timesteps": 2} for name in ("sifm", "semantic-attack", "danp", "tdae")} | {
    "photoguard-diffusion": {"unroll": 2}}


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """`latents` with one random space."""
    from test_latent_spaces import network, write_authors
    folder = tmp_path_factory.mktemp("space")
    write_authors(folder, SPACES["sd1"], network(SPACES["sd1"], 0))
    return sifm_min.load_editor(f"latents:{folder}", device="cpu")


def run(editor, picture=None, **options):
    options = {"steps": 2, "seed": 5} | FEW.get(options.get("method"), {}) | options
    return sifm_min.immunize(picture or smooth(28, 22), editor, PROMPTS, **options)


def watched(seen):
    """A method that compares with the original, and notes what it is given."""
    def compare(editor, x_orig, contexts, *, generator):
        noise = torch.randn(x_orig.shape, generator=generator)

        def objective(x_imu, step):
            seen.append({"original": x_orig, "immunized": x_imu.detach(), "noise": noise, "step": step,
                         "fresh": torch.randn(1, generator=generator).item()})
            return (x_imu * noise).sum()
        objective.passes = lambda steps: {"encoder_forward": steps + 1, "encoder_backward": steps}
        return objective
    return compare


# ----------------------------------------------------------------------------------------------------- what a method sees

def test_both_pictures_get_the_same_draw(tiny):
    """From zero in steps too small for float32 the pictures stay equal, and are the original after the draw of the report."""
    seen = []
    picture = smooth(28, 22).point(lambda value: 60 + value // 2)
    report = run(tiny, picture, method=watched(seen), robust=True, steps=8, step_size=1e-11, init="zero").report
    row = draws.Draws(True, seed=5)
    for step, (at, loss) in enumerate(zip(seen, report["loss"], strict=True)):
        purify = row()
        assert (at["step"], loss["purifier"]) == (step, str(purify))
        assert torch.equal(at["original"], purify(images.to_pixels(picture)))
        assert torch.equal(at["immunized"], at["original"])
    assert len({loss["purifier"] for loss in report["loss"]}) > 4


def test_a_method_has_its_noise_and_its_draws_unchanged(tiny):
    plain, robust = [], []
    run(tiny, method=watched(plain), steps=5)
    run(tiny, method=watched(robust), steps=5, robust=True)
    for one, other in zip(plain, robust, strict=True):
        assert torch.equal(one["noise"], other["noise"]) and one["fresh"] == other["fresh"]
    assert len({at["fresh"] for at in plain}) == 5


@pytest.mark.parametrize("method, options", [(name, {}) for name in OTHERS] + [
    ("sifm", {"resample": True}), ("photoguard-diffusion", {"resample": False}), ("editshield", {"variant": "released"}),
    ("semantic-attack", {"content": "man"})], ids=str)
def test_draws_of_nothing_change_nothing(tiny, monkeypatch, method, options):
    """Noise, prompts in turn, resampling and state are those of the plain run, to the byte, step after step."""
    monkeypatch.setattr(draws, "KINDS", (draws.KINDS[0], draws.KINDS[-1]))
    plain, robust = (run(tiny, method=method, robust=robust, steps=3, **options) for robust in (False, True))
    assert [step.pop("purifier") for step in robust.report["loss"]] == ["none"] * 3
    assert robust.report["loss"] == plain.report["loss"]
    assert robust.image.tobytes() == plain.image.tobytes()


@pytest.mark.parametrize("method", OTHERS)
def test_every_method_runs_and_depends_on_the_draws(tiny, method):
    plain, one, same, other = (run(tiny, method=method, robust=robust, seed=seed)
                               for robust, seed in ((False, 5), (True, 5), (True, 5), (True, 6)))
    assert one.image.tobytes() == same.image.tobytes() != plain.image.tobytes()
    assert other.image.tobytes() != one.image.tobytes()
    assert one.report["linf_steps"] <= 7 and one.report["note"] == plain.report["note"]
    assert plain.report["options"]["robust"] is False and "purifier" not in plain.report["loss"][0]


def test_every_method_of_encoders_runs(encoders):
    for method in ("latent", "photoguard-encoder", "editshield"):
        report = run(encoders, method=method, robust="cleaner", steps=2, seed=0).report
        assert "cleaner" in {step["purifier"] for step in report["loss"]}
        assert report["options"]["robust"]["cleaner"] == {"share": 0.1667}


# ---------------------------------------------------------------------------------------------------------- state and cost

def test_state_is_kept_by_a_method_that_sees_anew(tiny):
    """`see` gives it each original in turn; without it the method is called anew, and `see` None calls nothing."""
    def method(kind, calls):
        def stateful(editor, x_orig, contexts, *, generator):
            calls.append("built")
            now, momentum = x_orig, 0.0

            def see(x_orig):
                nonlocal now
                now = x_orig
                calls.append("seen")

            def objective(x_imu, step):
                nonlocal momentum
                momentum = momentum / 2 + 1
                return (x_imu - now).square().sum(), {"momentum": momentum}
            if kind != "rebuilt":
                objective.see = see if kind == "seen" else None
            return objective
        return stateful

    found = {}
    for kind in ("rebuilt", "seen", "blind"):
        calls = []
        report = run(tiny, method=method(kind, calls), robust=True, steps=3).report
        found[kind] = calls, [step["momentum"] for step in report["loss"]]
    assert found == {"rebuilt": (["built"] * 3, [1, 1, 1]), "seen": (["built", "seen", "seen"], [1, 1.5, 1.75]),
                     "blind": (["built"], [1, 1.5, 1.75])}


@pytest.mark.parametrize("method", OTHERS)
def test_passes_are_those_that_were_made(tiny, monkeypatch, method):
    """Counted at the networks, and in the report."""
    counts = {"encoder_forward": 0, "denoiser_forward": 0}
    encode, walk = tiny.vae.encode, tiny.unet.walk

    def counted_encode(pixels):
        counts["encoder_forward"] += len(pixels)
        return encode(pixels)

    def counted_walk(latent, *rest, **options):
        counts["denoiser_forward"] += len(latent)
        return walk(latent, *rest, **options)
    monkeypatch.setattr(tiny.vae, "encode", counted_encode)
    monkeypatch.setattr(tiny.unet, "walk", counted_walk)
    for robust in (False, True):
        counts.update(dict.fromkeys(counts, 0))
        report = run(tiny, method=method, steps=3, robust=robust).report
        assert {name: report["passes"][name] for name in counts} == counts
    if method == "sifm":
        assert report["passes"] == {"encoder_forward": 6, "encoder_backward": 3, "denoiser_forward": 12, "denoiser_backward": 6}


# ------------------------------------------------------------------------------------------------------ pictures and errors

def test_grey_pictures_and_masks_stay_what_they_are(tiny, tmp_path):
    mask = Image.new("L", (28, 22))
    mask.paste(255, (4, 3, 20, 15))
    mask.save(tmp_path / "mask.png")
    for mode in ("L", "RGB"):
        grey = smooth(28, 22).convert("L").convert(mode)
        result = run(tiny, grey, robust=True, steps=4, mask=tmp_path / "mask.png")
        assert result.image.mode == mode
        before, after = images.to_pixels(grey), images.to_pixels(result.image)
        assert torch.equal(after[:, 0], after[:, 1]) and torch.equal(after[:, 0], after[:, 2])
        changed = (after != before).any(1)[0]
        assert changed[3:15, 4:20].float().mean() > 0.5 and changed.sum() == changed[3:15, 4:20].sum()


def test_zero_gradient_at_the_first_step_is_still_an_error(encoders):
    with pytest.raises(ValueError, match="no gradient at this picture"):
        run(encoders, method="latent", robust=True, init="zero")


@pytest.mark.parametrize("options, says", [
    ({"method": "noise", "robust": True}, "^noise has no objective, so it cannot expect purifiers: leave robust out$"),
    ({"robust": "jpeg"}, "^robust 'jpeg': give True, or \"cleaner\" for AdverseCleaner among the purifiers$"),
])
def test_refusals_are_one_sentence(tiny, options, says):
    with pytest.raises(ValueError, match=says):
        run(tiny, **options)


def test_draws_are_before_the_editors_resize(tiny, monkeypatch):
    """A purifier works at the picture's own size, 60 x 44, and not at the editor's 32."""
    sizes = []
    monkeypatch.setattr(draws.Draw, "__call__", lambda self, pixels: sizes.append(tuple(pixels.shape[2:])) or pixels)
    run(tiny, smooth(60, 44), robust=True)
    assert sizes == [(44, 60)] * 4


# --------------------------------------------------------------------------------------------------------------- commands

def test_command_writes_a_report_and_resumes(loaded_once, tiny_folder, capsys):
    photo("a.png", (28, 22))
    argv = ["a.png", "--prompt", "make it night", "--editor", str(tiny_folder), "--steps", "3", "--timesteps", "1",
            "-o", "out", "--no-preview"]
    assert immunize.main([*argv, "--robust"]) == cli.OK
    with open("out/a.json") as file:
        report = json.load(file)
    assert report["options"]["robust"] == draws.stated(True)
    assert all(step["purifier"] for step in report["loss"])
    assert immunize.main([*argv, "--robust"]) == cli.OK and "done before" in capsys.readouterr().err
    assert immunize.main(argv) != cli.OK, "a plain run is another run"
    assert immunize.main([*argv, "--robust-cleaner", "--overwrite"]) == cli.OK
    with open("out/a.json") as file:
        assert "cleaner" in json.load(file)["options"]["robust"]


def test_wrapper_needs_no_editor():
    """The objective alone, by hand: loss, gradient through the purifier, and the passes of a method that counts none."""
    x = images.to_pixels(smooth(16, 12))
    objective = expectation.purify_steps(lambda x_orig: lambda x_imu, step: (x_imu - x_orig).abs().sum(), x,
                                         lambda: draws.Draw(draws.KINDS[3], 1.0), torch.Generator(), "mine")
    x_imu = (0.5 * x).requires_grad_()
    loss = objective(x_imu, 0)
    expected = (draws.blurred(0.5 * x, 1.0) - draws.blurred(x, 1.0)).abs().sum()
    torch.testing.assert_close(loss, expected)
    assert torch.autograd.grad(loss, x_imu)[0].any() and objective.drawn == ["blur 1"] and not hasattr(objective, "passes")
