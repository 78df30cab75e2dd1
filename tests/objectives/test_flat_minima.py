"""TDAE's flat minima: the formula on a function whose gradients are known, the draws of both evaluations, and costs."""

import pytest
import torch
from photographs import smooth

import sifm_min
from sifm_min.objectives import flat_minima
from sifm_min.objectives.flat_minima import flatten, radius_in
from sifm_min.pgd import pgd

PROMPT = "make it night"


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def curved():
    """J(x) = x^T A x / 2 + b^T x of pictures (1,3,2,2), its gradient, and a picture; in float64."""
    A = torch.randn(12, 12, generator=seeded(1), dtype=torch.float64)
    A, b = A @ A.T, torch.randn(12, generator=seeded(2), dtype=torch.float64)
    x = torch.rand(1, 3, 2, 2, generator=seeded(3), dtype=torch.float64)

    def J(x):
        return x.flatten() @ A @ x.flatten() / 2 + b @ x.flatten()
    return J, lambda x: (A @ x.flatten() + b).reshape(x.shape), x


@pytest.mark.parametrize("h", [1e-3, 0.4, 3.0])
def test_loss_and_gradient_are_the_formula(h, curved):
    """At small h, where J falls along s, and at a large one beyond the minimum, where it rises and z is negative."""
    J, gradient, x = curved
    k = 0.3
    g = gradient(x)
    s = -g / g.norm()
    z = J(x) - J(x + h * s)
    assert (z > 0) == (h < 1)
    leaf = x.clone().requires_grad_()
    loss, terms = flatten(lambda x, step: (J(x), {"own": 4}), generators=[seeded()], radius=h, weight=k)(leaf, 0)
    (found,) = torch.autograd.grad(loss, leaf)
    torch.testing.assert_close(loss.detach(), J(x) + k * z.abs())
    torch.testing.assert_close(found, (1 + k * z.sign()) * g - k * z.sign() * gradient(x + h * s))
    torch.testing.assert_close(terms["flatness"], z.abs() / h)
    assert terms["own"] == 4

    def objective(x):                                        # with s held constant, by differences
        return J(x) + k * (J(x) - J(x + h * s)).abs()
    along = torch.randn(x.shape, generator=seeded(4), dtype=torch.float64)
    slope = (objective(x + 1e-6 * along) - objective(x - 1e-6 * along)) / 2e-6
    torch.testing.assert_close((found * along).sum(), slope, rtol=1e-5, atol=1e-8)


def test_flatness_is_the_gradients_norm_at_a_small_radius(curved):
    J, gradient, x = curved
    _, terms = flatten(lambda x, step: J(x), generators=[seeded()], radius=1e-6)(x.clone().requires_grad_(), 0)
    torch.testing.assert_close(terms["flatness"], gradient(x).norm(), rtol=1e-4, atol=0)


def test_a_mask_holds_the_neighbour_too(curved):
    J, gradient, x = curved
    mask, seen = torch.tensor([[1.0, 0], [0, 1]])[None, None], []
    flat = flatten(lambda x, step: seen.append(x.detach()) or J(x), generators=[seeded()], radius=0.5, mask=mask)
    flat(x.clone().requires_grad_(), 0)
    moved = seen[1] - seen[0]
    assert not (moved * (1 - mask)).any()
    torch.testing.assert_close(moved, -0.5 * gradient(x) * mask / (gradient(x) * mask).norm())


def test_both_evaluations_have_the_same_draws():
    """And after a step the generator is where it is after one evaluation."""
    generator, drawn = seeded(5), []

    def J(x, step):
        drawn.append(torch.randn(2, generator=generator))
        return (x * drawn[-1].sum()).sum()

    flat = flatten(J, generators=[generator], radius=0.1)
    for step in range(3):
        flat(torch.ones(1, 3, 2, 2, requires_grad=True), step)
    plain = seeded(5)
    expected = [torch.randn(2, generator=plain) for _ in range(3)]
    assert all(torch.equal(a, expected[i // 2]) for i, a in enumerate(drawn)) and len(drawn) == 6


def test_a_zero_gradient_moves_nothing():
    x = torch.ones(1, 3, 2, 2, requires_grad=True)
    loss, terms = flatten(lambda x, step: (0 * x).sum(), generators=[seeded()], radius=0.1)(x, 0)
    assert loss.item() == 0 == terms["flatness"].item() and not torch.autograd.grad(loss, x)[0].any()


def test_radius_is_a_share_of_the_largest_perturbation():
    pixels = torch.zeros(1, 3, 512, 512)
    assert radius_in(0.03, pixels) == pytest.approx(0.05 * 0.03 * (3 * 512 * 512) ** 0.5) == pytest.approx(1.33, abs=0.01)
    eps, mask = torch.full((1, 3, 4, 4), 0.02), torch.zeros(1, 1, 4, 4)
    mask[..., 0, 0] = 1
    assert radius_in(eps, pixels[..., :4, :4], 0.5, mask) == pytest.approx(0.5 * 0.02 * 3 ** 0.5)


def test_descent_prefers_the_flatter_of_two_minima():
    """Two minima of equal depth, one a tenth as wide; plain descent takes the near one, which is narrow."""
    def J(x, step):
        u = x.mean(dim=(1, 2, 3))
        return -(torch.exp(-((u - 0.58) / 0.03) ** 2 / 2) + torch.exp(-((u - 0.2) / 0.3) ** 2 / 2)).sum()

    x, ends = torch.full((1, 3, 2, 2), 0.5), {}
    for name, objective in (("plain", J), ("flat", flatten(J, generators=[seeded()], radius=0.15, weight=1.0))):
        ends[name] = (x + pgd(x, objective, 0.3, steps=20, step_size=0.02, init="zero")).mean().item()
    assert abs(ends["plain"] - 0.58) < 0.05 and abs(ends["flat"] - 0.2) < 0.12


# ----------------------------------------------------------------------------------------------------------------- in a run

def run(editor, **options):
    return sifm_min.immunize(smooth(28, 22), editor, [PROMPT], steps=3, seed=5, **options).report


def watched(counts, key, call):
    def running(first, *rest, **named):
        counts[key] += len(first)
        return call(first, *rest, **named)
    return running


def counted(editor, monkeypatch):
    counts = {"encoder_forward": 0, "denoiser_forward": 0}
    for part, owner, name in (("encoder", editor.vae, "encode"), ("denoiser", editor.unet, "walk")):
        monkeypatch.setattr(owner, name, watched(counts, f"{part}_forward", getattr(owner, name)))
    return counts


@pytest.mark.parametrize("robust", [False, True])
@pytest.mark.parametrize("method, options", [
    ("sifm", {"timesteps": 2}), ("sifm", {"timesteps": 2, "resample": True}), ("photoguard-encoder", {}), ("editshield", {}),
    ("semantic-attack", {"timesteps": 2, "refine_text": {"every": 2, "rounds": 2}}), ("danp", {"timesteps": 2})], ids=str)
def test_passes_of_both_evaluations_are_counted(method, options, robust, tiny, monkeypatch):
    counts = counted(tiny, monkeypatch)
    report = run(tiny, method=method, robust=robust, flat=True, **options)
    assert {name: report["passes"][name] for name in counts} == counts
    refinements = 4 if "refine_text" in options else 0
    assert report["gradient_evaluations"] == 6 + refinements and report["passes"]["encoder_backward"] == 6
    assert all("flatness" in step for step in report["loss"])


def test_flat_with_purifiers_has_one_purifier_in_a_step(tiny, monkeypatch):
    """The second evaluation is of the same function: the loss of a step is J + 0.3 |z|, by hand at its two places."""
    from sifm_min.purifiers.draws import Draws
    seen, losses = [], []

    def method(editor, x_orig, contexts, *, generator):
        def objective(x_imu, step):
            seen.append(x_imu.detach())
            losses.append((x_imu - x_orig).square().sum() + 10 * x_imu.sum())
            return losses[-1]
        return objective

    pictures = []
    inner = flat_minima.flatten
    monkeypatch.setattr("sifm_min.objectives.around.flatten", lambda objective, **options: inner(
        lambda x, step: pictures.append(x.detach()) or objective(x, step), **options))
    report = run(tiny, method=method, robust=True, flat=True)
    draws = Draws(True, 5)
    for step, entry in enumerate(report["loss"]):
        purify = draws()
        assert entry["purifier"] == str(purify)
        for i in (2 * step, 2 * step + 1):
            assert torch.equal(seen[i], purify(pictures[i]))
        here, there = (loss.item() for loss in losses[2 * step:2 * step + 2])
        assert entry["loss"] == pytest.approx(here + 0.3 * abs(here - there), rel=1e-5) != pytest.approx(here, rel=1e-5)
    assert len(seen) == 6
