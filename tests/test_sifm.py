"""SIFM against Algorithm 1 of the paper, written out slowly over diffusers' networks; and what its speed rests on.

The reference below shares nothing with ours but the weights: one pass through the VAE for every timestep, hooks for the
features, autograd from the loss of each timestep down to the pixels.
"""

import pytest
import torch

diffusers = pytest.importorskip("diffusers", reason="the oracle, diffusers, is not installed")
pytest.importorskip("transformers", reason="the oracle's text encoder, transformers, is not installed")

import attacked_editors  # noqa: E402
import small_editors  # noqa: E402
from attacked_editors import seeded, small_pair  # noqa: E402

from sifm_min import sifm as method  # noqa: E402
from sifm_min.pgd import pgd  # noqa: E402
from sifm_min.sifm import sifm, terms  # noqa: E402

PROMPTS = ["make the sky red", "add a top hat", ""]
T = [900, 621, 333, 50]
MIXED = ["down_blocks.0.attentions.0", "mid_block", "up_blocks.1.attentions.1"]         # of three shapes
EQUAL = ["mid_block", "up_blocks.0.attentions.0", "up_blocks.0.attentions.1"]           # of one


editor, contexts = attacked_editors.editor, attacked_editors.contexts     # fixtures


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return small_pair(tmp_path_factory)


@pytest.fixture(scope="module")
def x_orig():
    """A picture with black and white in it, where the range of pixels ends before the budget does."""
    x = torch.rand(1, 3, 8, 8, generator=seeded(3)).repeat_interleave(4, 2).repeat_interleave(4, 3) * 1.4 - 0.2
    return x.clamp(0, 1)


def moved(x, seed=5):
    """x plus a delta somewhere in the budget."""
    return (x + torch.empty_like(x).uniform_(-0.03, 0.03, generator=seeded(seed))).clamp(0, 1)


# ---------------------------------------------------------------------------------------- Algorithm 1, as it is printed

class Paper:
    """phi, L and the algorithm in the paper's symbols. eta: the noise of each t in T."""

    def __init__(self, pipeline, c, eta, *, T, taps, lam, reduction, aggregate, noisy, resize=lambda x: x):
        self.pipeline, self.c, self.eta, self.T, self.taps, self.lam = pipeline, c, eta, T, taps, lam
        self.reduction, self.aggregate, self.noisy, self.resize = reduction, aggregate, noisy, resize
        self.alphas_cumprod = diffusers.DDPMScheduler(**small_editors.BETAS).alphas_cumprod

    def encoder(self, x):
        return self.pipeline.vae.encode(2 * self.resize(x) - 1).latent_dist.mode()

    def phi(self, x, t, x_orig):
        """[L_1 ... L_M] of Eq. 3, or their mean."""
        found, condition = {}, self.encoder(x)
        z = self.pipeline.vae.config.scaling_factor * (condition if self.noisy == "paper" else self.encoder(x_orig))
        kept = self.alphas_cumprod[t]
        z_t = kept.sqrt() * z + (1 - kept).sqrt() * self.eta[self.T.index(t)]
        handles = [self.pipeline.unet.get_submodule(tap).register_forward_hook(
            lambda module, inputs, output, tap=tap: found.update({tap: output[0] if isinstance(output, tuple) else output}))
            for tap in self.taps]
        self.pipeline.unet(torch.cat([z_t, condition], 1), t, encoder_hidden_states=self.c)
        for handle in handles:
            handle.remove()
        L = [found[tap] for tap in self.taps]
        return L if self.aggregate == "loss-mean" else [sum(L) / len(L)]

    def loss(self, x_imu, t, x_orig, Phi_orig):
        """L_t of Eq. 6, and its two terms."""
        norm = dist = 0.0
        for phi_imu, phi_orig in zip(self.phi(x_imu, t, x_orig), Phi_orig, strict=True):
            l1, mse = phi_imu.abs().sum(), torch.nn.functional.mse_loss(phi_imu, phi_orig)
            if self.reduction in ("relative", "balanced"):
                l1, mse = l1 / phi_orig.abs().sum(), (phi_imu - phi_orig).norm() ** 2 / phi_orig.norm() ** 2
            if self.reduction == "balanced":
                mse = 10 * mse
            norm, dist = norm + l1 / len(Phi_orig), dist + mse / len(Phi_orig)
        return norm - self.lam * dist, norm.item(), dist.item()

    def gradient(self, x_imu, x_orig):
        """g of Algorithm 1, lines 6 to 12, with the mean loss and terms."""
        with torch.no_grad():
            Phi_orig = {t: self.phi(x_orig, t, x_orig) for t in self.T}
        g_total, told = torch.zeros_like(x_imu), torch.zeros(3, dtype=torch.float64)
        for t in self.T:
            x = x_imu.clone().requires_grad_(True)
            L_t, norm, dist = self.loss(x, t, x_orig, Phi_orig[t])
            g_total += torch.autograd.grad(L_t, x)[0]
            told += torch.tensor([L_t.item(), norm, dist])
        return g_total / len(self.T), *(told / len(self.T)).tolist()

    def algorithm_1(self, x_orig, eps, alpha, N):
        """The picture and the gradient after each step."""
        delta, x_imu, told = torch.zeros_like(x_orig), x_orig, []
        for _ in range(N):
            g = self.gradient(x_imu, x_orig)[0]
            delta = (delta - alpha * g.sign()).clamp(-eps, eps)
            x_imu = (x_orig + delta).clamp(0, 1)
            told.append((x_imu, g))
        return told


def assert_agree(pair, contexts, x_orig, *, step=0, batch=None, draws=1, resample=False, resize=lambda x: x, size=(4, 4),
                 **options):
    """The fast objective at some delta: its loss, both terms and its gradient are the reference's."""
    pipeline, editor = pair
    x_imu = moved(x_orig)
    objective = sifm(editor, x_orig, contexts, generator=seeded(7), timesteps=T, batch=batch, resample=resample, **options)
    x = x_imu.clone().requires_grad_(True)
    for earlier in range(draws - 1):
        objective(x, earlier)
    loss, told = objective(x, step)
    (gradient,) = torch.autograd.grad(loss, x)
    stream = seeded(7)
    eta = [torch.randn((len(T), 4, *size), generator=stream) for _ in range(draws)][-1]
    reference = Paper(pipeline, contexts[step % len(contexts)], eta.split(1), T=T, resize=resize, **options)
    expected, value, norm, dist = reference.gradient(x_imu, x_orig)
    assert loss.item() == pytest.approx(value, rel=1e-4)
    assert told == {"norm": pytest.approx(norm, rel=1e-4), "dist": pytest.approx(dist, rel=1e-3)}
    assert dist > 0 and expected.abs().min() < expected.abs().max()
    assert torch.cosine_similarity(gradient.flatten(), expected.flatten(), 0) > 0.9999
    assert gradient.norm() == pytest.approx(expected.norm().item(), rel=1e-3)


OPTIONS = {"taps": MIXED, "lam": 0.1, "reduction": "relative", "aggregate": "loss-mean", "noisy": "paper"}


@pytest.mark.slow
@pytest.mark.parametrize("noisy", method.NOISY)
@pytest.mark.parametrize("aggregate", method.AGGREGATES)
@pytest.mark.parametrize("reduction", method.REDUCTIONS)
def test_the_fast_step_is_algorithm_1s(reduction, aggregate, noisy, pair, contexts, x_orig):
    taps = EQUAL if aggregate == "feature-mean" else MIXED
    lam = 1e4 if reduction == "literal" else 1.0            # so that the distance counts: see the module's docstring
    assert_agree(pair, contexts[:1], x_orig, taps=taps, lam=lam, reduction=reduction, aggregate=aggregate, noisy=noisy)


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 3, 4, 100])
def test_timesteps_in_any_batches(batch, pair, contexts, x_orig):
    assert_agree(pair, contexts[:1], x_orig, batch=batch, **OPTIONS)


@pytest.mark.slow
@pytest.mark.parametrize("step", [0, 1, 2, 4])
def test_prompts_take_turns(step, pair, contexts, x_orig):
    assert_agree(pair, contexts, x_orig, step=step, **OPTIONS)


@pytest.mark.slow
@pytest.mark.parametrize("lam", [0.0, -2.0, 10.0])
def test_lam_weighs_the_distance(lam, pair, contexts, x_orig):
    assert_agree(pair, contexts[:1], x_orig, **OPTIONS | {"lam": lam})


def test_the_resize_is_part_of_the_path(pair, contexts):
    """A picture of another size is immunized as it is; 45x37 is edited at 40x32."""
    x_orig = torch.rand(1, 3, 37, 45, generator=seeded(8))
    assert_agree(pair, contexts[:1], x_orig, resize=pair[1].resize, size=(4, 5), **OPTIONS)


@pytest.mark.slow
def test_noise_is_redrawn_where_asked(pair, contexts, x_orig):
    """The third step takes the third draw of the generator, for both pictures; without resample it is always the first."""
    assert_agree(pair, contexts[:1], x_orig, step=2, draws=3, resample=True, **OPTIONS)
    with pytest.raises(AssertionError):
        assert_agree(pair, contexts[:1], x_orig, step=2, draws=3, resample=False, **OPTIONS)


@pytest.mark.slow
def test_the_defaults_are_those_of_the_design(pair, contexts, x_orig):
    """10 timesteps over what the editor visits, the taps of its rule, balanced, mean over losses, lam 0.1."""
    pipeline, editor = pair
    x = moved(x_orig).requires_grad_(True)
    loss, told = sifm(editor, x_orig, contexts[:1], generator=seeded(7))(x, 0)
    visited = [999, 894, 788, 683, 577, 472, 366, 261, 155, 50]
    eta = torch.randn((10, 4, 4, 4), generator=seeded(7)).split(1)
    reference = Paper(pipeline, contexts[0], eta, T=visited, **OPTIONS | {"taps": EQUAL, "reduction": "balanced"})
    expected, value, norm, dist = reference.gradient(x.detach(), x_orig)
    assert (loss.item(), told["norm"], told["dist"]) == pytest.approx((value, norm, dist), rel=1e-3)
    assert list(editor.default_taps) == EQUAL
    (gradient,) = torch.autograd.grad(loss, x)
    assert torch.cosine_similarity(gradient.flatten(), expected.flatten(), 0) > 0.9999


@pytest.mark.slow
def test_a_whole_run_is_algorithm_1(pair, contexts, x_orig):
    """Zero start, literal reduction, Eq. 3 to the letter, a constant step: three iterations end at the same picture.

    Both compute in float32 along different paths, so where a gradient is zero to rounding its sign may differ. Compared
    is step by step: where both pictures still agreed, they part only where the reference's gradient is below 1 % of its
    median, and they part in less than 1 % of the values.

    The picture keeps the budget's distance from 0 and 1. Nearer to them the loops differ on purpose: the paper clips
    delta to the budget alone and remembers what clipping the picture undoes, ours forgets it at once.
    """
    pipeline, editor = pair
    x_orig = 0.05 + 0.9 * x_orig
    options = OPTIONS | {"taps": EQUAL, "reduction": "literal", "aggregate": "feature-mean"}
    eps, alpha, N = 0.03, 1 / 255, 3
    objective, told = sifm(editor, x_orig, contexts[:1], generator=seeded(7), timesteps=T, **options), []

    def recorded(x, step):
        told.append(x.detach())
        return objective(x, step)

    delta = pgd(x_orig, recorded, eps, steps=N, step_size=alpha, init="zero")
    told = [*told[1:], x_orig + delta]
    eta = torch.randn((len(T), 4, 4, 4), generator=seeded(7)).split(1)
    reference = Paper(pipeline, contexts[0], eta, T=T, **options).algorithm_1(x_orig, eps, alpha, N)
    together = torch.ones_like(x_orig, dtype=torch.bool)
    for ours, (theirs, g) in zip(told, reference, strict=True):
        parted = together & ((ours - theirs).abs() > 1e-6)
        assert g[parted].abs().max() < 0.01 * g.abs().median() if parted.any() else True
        together &= ~parted
    assert together.float().mean() > 0.99
    assert (told[-1] - x_orig).abs().max() == pytest.approx(3 / 255, abs=1e-6)          # and it went somewhere


# ---------------------------------------------------------------------------------------------------- zero, and descent

def at_zero(editor, x_orig, contexts, **options):
    x = x_orig.clone().requires_grad_(True)
    loss, told = sifm(editor, x_orig, contexts, generator=seeded(7), timesteps=T, **options)(x, 0)
    return torch.autograd.grad(loss, x)[0], told


def test_at_zero_the_norm_is_one_and_the_distance_nothing(editor, contexts, x_orig):
    _, told = at_zero(editor, x_orig, contexts)
    assert told == {"norm": pytest.approx(1), "dist": 0}


def test_at_zero_the_distance_pulls_nowhere(editor, contexts, x_orig):
    """So the first step from a zero start is the norm's alone, whatever lam."""
    one, other = (at_zero(editor, x_orig, contexts, lam=lam)[0] for lam in (0.0, 1e6))
    assert one.any() and torch.equal(one, other)


@pytest.fixture
def distance_alone(monkeypatch):
    """The ablation of Table VI that has no norm term."""
    monkeypatch.setattr(method, "terms", lambda *given: (torch.zeros_like(terms(*given)[0]), terms(*given)[1]))


@pytest.mark.parametrize("reduction", method.REDUCTIONS)
def test_distance_alone_from_zero_is_an_error_and_no_run(reduction, distance_alone, editor, contexts, x_orig):
    objective = sifm(editor, x_orig, contexts, generator=seeded(), timesteps=T, reduction=reduction)
    with pytest.raises(ValueError, match="no gradient"):
        pgd(x_orig, objective, 0.03, steps=3, step_size=1 / 255, init="zero")


def test_distance_alone_from_a_random_start_grows(distance_alone, editor, contexts, x_orig):
    told = []
    objective = sifm(editor, x_orig, contexts[:1], generator=seeded(), timesteps=T, lam=1.0)
    pgd(x_orig, objective, 0.03, steps=8, step_size=1 / 255, generator=seeded(),
        on_step=lambda step, loss, terms: told.append(terms["dist"]))
    assert told[-1] > 1.5 * told[0] > 0


@pytest.mark.slow
@pytest.mark.parametrize("noisy", method.NOISY)
def test_the_loss_goes_down(noisy, editor, contexts, x_orig):
    """Within 20 steps, and both terms go where they should: features fade, and leave the original's."""
    told = []
    objective = sifm(editor, x_orig, contexts[:1], generator=seeded(), timesteps=T, noisy=noisy)
    delta = pgd(x_orig, objective, 0.03, steps=20, step_size=1 / 255, generator=seeded(),
                on_step=lambda step, loss, terms: told.append((loss, terms["norm"], terms["dist"])))
    (loss, norm, dist), (last_loss, last_norm, last_dist) = told[0], told[-1]
    assert last_loss < loss - 0.005 and last_norm < norm and last_dist > dist
    assert delta.abs().max() <= 0.03 + 1e-7
    # More than noise of the same budget does.
    random_norm = objective(moved(x_orig, seed=9), 0)[1]["norm"]
    assert last_norm < random_norm - 0.005


# -------------------------------------------------------------------------------------------------- the noise it shares

def test_resampled_noise_is_the_same_for_both_pictures(editor, contexts, x_orig):
    """At delta 0 the distance stays nothing however often the noise is drawn anew; and it is drawn anew."""
    objective = sifm(editor, x_orig, contexts[:1], generator=seeded(), timesteps=T, reduction="literal", resample=True)
    norms = [objective(x_orig, step) for step in range(3)]
    assert all(told["dist"] == 0 for _, told in norms)
    assert len({told["norm"] for _, told in norms}) == 3


def test_one_bank_of_noise_otherwise(editor, contexts, x_orig):
    x, stream = moved(x_orig), seeded()
    objective = sifm(editor, x_orig, contexts[:1], generator=stream, timesteps=T)
    first, state = objective(x, 0)[1], stream.get_state()
    assert objective(x, 5)[1] == first and torch.equal(stream.get_state(), state)
    assert sifm(editor, x_orig, contexts[:1], generator=seeded(), timesteps=T)(x, 0)[1] == first
    assert sifm(editor, x_orig, contexts[:1], generator=seeded(1), timesteps=T)(x, 0)[1] != first


def test_the_global_stream_is_left_alone(editor, contexts, x_orig):
    state = torch.get_rng_state()
    sifm(editor, x_orig, contexts, generator=seeded(), timesteps=T, resample=True)(x_orig, 1)
    assert torch.equal(torch.get_rng_state(), state)


# ----------------------------------------------------------------------------------------------------------------- cost

@pytest.fixture
def counted(editor, monkeypatch):
    """How many single-picture passes are run, and how often at once."""
    passes = dict.fromkeys(["encodes", "encoder_forward", "encoder_backward", "denoises", "denoiser_forward",
                            "denoiser_backward"], 0)

    def backward(kind):
        def count(module, inputs, output):
            if output.requires_grad:
                output.register_hook(lambda gradient: passes.update({kind: passes[kind] + len(gradient)}))
        return count

    def count(kind, forward, function):
        def counting(first, *rest, **named):
            passes[kind] += 1
            passes[forward] += len(first)
            return function(first, *rest, **named)
        return counting

    monkeypatch.setattr(editor.vae, "encode", count("encodes", "encoder_forward", editor.vae.encode))
    monkeypatch.setattr(editor.unet, "features", count("denoises", "denoiser_forward", editor.unet.features))
    handles = [editor.vae.encoder.conv_in.register_forward_hook(backward("encoder_backward")),
               editor.unet.conv_in.register_forward_hook(backward("denoiser_backward"))]
    yield passes
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize(("prompts", "batch", "resample", "steps"), [(1, None, False, 3), (2, 3, False, 3), (3, 1, False, 2),
                                                                     (1, None, True, 3)])
def test_passes_of_a_run(prompts, batch, resample, steps, counted, editor, contexts, x_orig):
    """One encode and one backward through the VAE per step, whatever |T|; the original's features once for each prompt."""
    objective = sifm(editor, x_orig, contexts[:prompts], generator=seeded(), timesteps=T, batch=batch, resample=resample)
    pgd(x_orig, objective, 0.03, steps=steps, step_size=1 / 255, generator=seeded())
    originals = steps if resample else min(prompts, steps)
    at_once = -(-len(T) // (batch or len(T)))
    assert counted == {"encodes": steps + 1, "encoder_forward": steps + 1, "encoder_backward": steps,
                       "denoises": at_once * (steps + originals), "denoiser_forward": len(T) * (steps + originals),
                       "denoiser_backward": len(T) * steps}
    told = objective.passes(steps)                          # what the report says
    assert told == {name: counted[name] for name in told} and len(told) == 4


def test_the_denoiser_stops_after_the_last_tap(editor, contexts, x_orig):
    run, handles = set(), []
    for name, module in editor.unet.named_modules():
        handles.append(module.register_forward_hook(lambda module, inputs, output, name=name: run.add(name)))
    try:
        objective = sifm(editor, x_orig, contexts, generator=seeded(), timesteps=T, taps=["mid_block", "conv_in"])
        objective(x_orig, 0)
    finally:
        for handle in handles:
            handle.remove()
    assert "mid_block.resnets.1" in run
    assert not any(name.startswith(("up_blocks", "conv_norm_out", "conv_out")) for name in run)


def test_weights_get_no_gradient(editor, contexts, x_orig):
    x = moved(x_orig).requires_grad_(True)
    sifm(editor, x_orig, contexts, generator=seeded(), timesteps=T)(x, 0)[0].backward()
    assert x.grad.any()
    for network in (editor.unet, editor.vae):
        assert all(p.grad is None and not p.requires_grad for p in network.parameters())


# ------------------------------------------------------------------------------------------------------------- refusals

WRONG = {
    "reduction": ({"reduction": "median"}, "reduction 'median': choose one of balanced, relative, literal"),
    "aggregate": ({"aggregate": "sum"}, "aggregate 'sum'"),
    "noisy": ({"noisy": "both"}, "noisy 'both'"),
    "tap": ({"taps": ["mid_block", "mid_blok"]}, "mid_blok"),
    "shapes": ({"taps": MIXED, "aggregate": "feature-mean"}, "feature-mean"),
    "no timesteps": ({"timesteps": 0}, "timestep"),
    "an empty list of timesteps": ({"timesteps": []}, "timestep"),
    "a timestep never trained": ({"timesteps": [1000]}, "timestep"),
    "no taps": ({"taps": []}, "tap"),
    "no batch": ({"batch": 0}, "batch"),
    "a negative batch": ({"batch": -1}, "batch"),
}


@pytest.mark.parametrize("option", WRONG)
def test_a_wrong_option_is_one_sentence(option, editor, contexts, x_orig):
    given, named = WRONG[option]
    with pytest.raises(ValueError, match=named) as caught:
        sifm(editor, x_orig, contexts, generator=seeded(), **{"timesteps": T} | given)(x_orig, 0)
    assert "\n" not in str(caught.value)


def test_no_prompt_is_one_sentence(editor, x_orig):
    with pytest.raises(ValueError, match="prompt"):
        sifm(editor, x_orig, [], generator=seeded(), timesteps=T)


def test_half_precision_features_are_compared_in_single(editor, contexts, x_orig, monkeypatch):
    """Sums of half-precision activations overflow, and their means vanish: terms are taken in float32."""
    features, given = editor.features, []

    def half(*inputs, **named):
        return {name: activation.half() for name, activation in features(*inputs, **named).items()}

    monkeypatch.setattr(editor, "features", half)
    monkeypatch.setattr(method, "terms", lambda *phis: given.append(phis) or terms(*phis))
    loss, _ = sifm(editor, x_orig, contexts, generator=seeded(), timesteps=T)(moved(x_orig), 0)
    assert all(a.dtype == torch.float32 for phi in given[0][:2] for a in phi) and loss.isfinite()


def test_terms_are_fractions_of_the_originals():
    phi = torch.full((2, 4, 40, 40), 60.0)
    for reduction, tenths in (("relative", 1), ("balanced", 10)):
        norm, dist = terms([phi, phi], [phi / 2, phi], reduction)
        assert norm.tolist() == [1.5, 1.5] and dist.tolist() == [0.5 * tenths] * 2


@pytest.mark.parametrize("reduction", method.REDUCTIONS)
def test_terms_of_a_batch_are_those_of_each(reduction):
    shapes = (3, 2, 4, 4), (3, 5, 2, 2)
    phi_imu, phi_orig = ([torch.randn(shape, generator=seeded(seed)) for shape in shapes] for seed in (1, 2))
    norm, dist = terms(phi_imu, phi_orig, reduction)
    for i in range(3):
        one = terms([a[i:i + 1] for a in phi_imu], [b[i:i + 1] for b in phi_orig], reduction)
        torch.testing.assert_close((norm[i:i + 1], dist[i:i + 1]), one)
