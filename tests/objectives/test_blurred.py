"""BlurGuard's blur: the perturbation against the sum written out, its strength, and the box on the saved file."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from photographs import photo, smooth
from PIL import Image

import sifm_min
from sifm_min import cli, images, immunize, metrics
from sifm_min.objectives.blurred import blurred_delta, descend_blurred

PROMPT = "make it night"


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(shape, eps, seed=1):
    return torch.empty(shape, dtype=torch.float64).uniform_(-eps, eps, generator=seeded(seed))


@pytest.mark.parametrize("sigma", [0.6, 1.3])
def test_perturbation_is_the_sum_written_out(sigma):
    """Gaussian weights over three standard deviations, edges repeated, then the gain, and the box of budget, range and mask."""
    pixels = torch.rand(1, 3, 5, 6, generator=seeded(2)).double()
    pixels[..., :2] = pixels[..., :2].round()                # black and white, where the range ends
    u, eps = noise(pixels.shape, 0.03), 0.02 + noise(pixels.shape, 0.01, 3).abs()
    mask = (torch.rand(1, 1, 5, 6, generator=seeded(4)) > 0.3).double()
    radius = math.ceil(3 * sigma)
    weights = {(i, j): math.exp(-(i * i + j * j) / (2 * sigma * sigma))
               for i in range(-radius, radius + 1) for j in range(-radius, radius + 1)}
    whole = sum(weights.values())
    gain = whole / math.sqrt(sum(w * w for w in weights.values()))
    expected = torch.zeros_like(u)
    for c in range(3):
        for y in range(5):
            for x in range(6):
                total = sum(w / whole * u[0, c, min(max(y + i, 0), 4), min(max(x + j, 0), 5)].item()
                            for (i, j), w in weights.items())
                low, high = (max(-eps[0, c, y, x].item(), -pixels[0, c, y, x].item()),
                             min(eps[0, c, y, x].item(), 1 - pixels[0, c, y, x].item()))
                expected[0, c, y, x] = min(max(gain * total, low), high) * mask[0, 0, y, x]
    torch.testing.assert_close(blurred_delta(u, sigma, eps, pixels, mask), expected, rtol=1e-9, atol=1e-12)


def test_gradient_is_a_difference():
    pixels = torch.full((1, 3, 4, 5), 0.5, dtype=torch.float64)
    u = noise(pixels.shape, 0.01).requires_grad_()
    assert torch.autograd.gradcheck(lambda u: blurred_delta(u, 0.8, 0.2, pixels), (u,))


def test_blurred_noise_is_as_strong_as_noise_and_smooth():
    pixels = torch.full((1, 1, 200, 200), 0.5, dtype=torch.float64)
    u = noise(pixels.shape, 0.03)
    for sigma in (0.5, 1.0, 3.0):
        delta = blurred_delta(u, sigma, 0.5, pixels)
        assert delta.std().item() == pytest.approx(u.std().item(), rel=0.1)
    step = [(d[..., 1:] - d[..., :-1]).std() / d.std() for d in (u, delta)]
    assert step[0] > 1.3 and step[1] < 0.4                   # of neighbours, at sigma 3


# ----------------------------------------------------------------------------------------------------------------- in a run

def test_a_run_goes_down_with_a_blurred_perturbation(tiny):
    result = sifm_min.immunize(smooth(40, 40), tiny, PROMPT, method="photoguard-encoder", steps=20, blur=1.0)
    losses = [step["loss"] for step in result.report["loss"]]
    assert losses[-1] < losses[0] and result.report["options"]["blur"] == 1.0
    plain = sifm_min.immunize(smooth(40, 40), tiny, PROMPT, method="photoguard-encoder", steps=20)
    rough = []
    for image in (result.image, plain.image):
        delta = np.asarray(image, float) - np.asarray(smooth(40, 40), float)
        rough.append((np.diff(delta, axis=1).std() + np.diff(delta, axis=0).std()) / delta.std())
    assert rough[0] < 0.75 * rough[1]


def test_noise_has_the_blur_of_the_methods(tiny):
    picture = smooth(40, 40).point(lambda value: 60 + value // 2)
    result = sifm_min.immunize(picture, tiny, PROMPT, method="noise", blur=1.0, seed=9)
    u = torch.empty(1, 3, 40, 40).uniform_(-0.03, 0.03, generator=seeded(9))
    expected = blurred_delta(u, 1.0, 0.03, images.to_pixels(picture))
    found = np.asarray(result.image, int) - np.asarray(picture, int)
    assert np.array_equal(found, (255 * expected[0].double()).round().clamp(-7, 7).permute(1, 2, 0).numpy().astype(int))


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_box_holds_on_the_saved_file_with_everything_on(mode, loaded_once, tiny_folder):
    """Blurred, flat, with purifiers, a refined text, a texture budget, a mask and a decaying step: every decoded value."""
    values = np.asarray(photo("a.png", (28, 22))).copy()
    values[:, 14:] = 140
    values[:4] = 255
    Image.fromarray(values).convert(mode).save("a.png")
    mask = np.full((22, 28), 255, np.uint8)
    mask[5:12, 3:20] = 0
    Image.fromarray(mask).save("mask.png")
    assert immunize.main(["a.png", "--prompt", PROMPT, "--editor", str(tiny_folder), "--method", "tdae", "--steps", "3",
                          "--timesteps", "1", "--blur", "1.5", "--robust", "--budget", "texture", "--mask", "mask.png",
                          "--schedule", "linear", "--init", "zero", "--no-preview", "-o", "out"]) == cli.OK
    original, after = images.read("a.png"), Image.open("out/a_immunized.png")
    limit = images.budget(metrics.texture_budget(images.to_pixels(original.image)[:, :original.channels], 0.03))
    used = images.steps_apart(after, original.image)
    assert after.mode == mode and (used <= limit).all() and used.max() >= 3 and not used[mask == 0].any()
    report = json.loads(Path("out/a.json").read_text())
    assert report["values_beyond_budget"] == 0 and report["options"]["blur"] == 1.5


@pytest.mark.parametrize("masked", [False, True])
def test_a_texture_budget_bounds_the_blurred_perturbation(masked):
    """An even u is not weakened by the blur, and then made stronger: without the bound each value would reach its budget."""
    pixels, eps = torch.full((1, 3, 24, 24), 0.5), torch.full((1, 3, 24, 24), 0.03)
    eps[..., :12] = 0.01
    mask = None if not masked else (torch.arange(24) < 16).float().expand(1, 1, 24, 24)
    delta = descend_blurred(pixels, lambda x, step: x.sum(), eps, sigma=1.0, mask=mask, rms=0.5, steps=20, step_size=eps / 7,
                            init="zero")
    share = (delta / eps)[..., :16] if masked else delta / eps
    assert share.square().mean().sqrt().item() == pytest.approx(0.5, rel=1e-4)
    assert not masked or not delta[..., 16:].any()


def test_a_file_beyond_its_box_is_not_written(loaded_once, tiny_folder, monkeypatch, capsys):
    """The check on the decoded file does not rest on the clip: without both of the loop's clips the run fails."""
    photo("a.png")
    monkeypatch.setattr("sifm_min.objectives.blurred.blurred_delta", lambda u, *rest: 9 * u)
    monkeypatch.setattr(images, "quantize", lambda picture, delta, eps: Image.fromarray(
        (np.asarray(picture.image, float) + 255 * delta[0].permute(1, 2, 0).numpy()).clip(0, 255).astype(np.uint8)))
    assert immunize.main(["a.png", "--prompt", PROMPT, "--editor", str(tiny_folder), "--method", "noise", "--blur", "1",
                          "--no-preview", "-o", "out"]) == cli.SOME_FAILED
    assert "the budget is 7/255" in capsys.readouterr().err and not Path("out/a_immunized.png").exists()
