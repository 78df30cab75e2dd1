"""The baselines against their formulas, written out slowly over diffusers' networks in double precision; what they cost;
and their effect: within 20 steps on a small random editor, within 60 in a real latent space.

The references share nothing with ours but the weights and the order of draws: one evaluation for every timestep, hooks
for attention, and no gradient at all, only differences of the loss along random directions.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
import tae
import torch
import torch.nn.functional as F
from PIL import Image

diffusers = pytest.importorskip("diffusers", reason="the oracle, diffusers, is not installed")
pytest.importorskip("transformers", reason="the oracle's text encoder, transformers, is not installed")

import attacked_editors  # noqa: E402
import small_editors  # noqa: E402
from attacked_editors import seeded, small_pair  # noqa: E402
from finite_differences import assert_slopes  # noqa: E402

from sifm_min import METHODS, baselines, images  # noqa: E402
from sifm_min.pgd import pgd  # noqa: E402

PROMPTS = ["make the sky red", "add a top hat"]
T = [900, 621, 333, 50]
# Every form of every method: name -> (method, options).
FORMS = {f"{method} {variant}": (method, {"variant": variant}) for method, variants in {
    "photoguard-encoder": ("zero", "grey"), "editshield": ("eot", "plain", "released"), "sds": ("minus", "plus"),
    "mist": ("fused", "textural", "semantic"), "ace": ("ace+", "ace")}.items() for variant in variants}
FORMS |= {"photoguard-diffusion": ("photoguard-diffusion", {"unroll": 2}),
          "photoguard-diffusion, two draws": ("photoguard-diffusion", {"unroll": 2, "repeats": 2, "resample": False}),
          "semantic-attack": ("semantic-attack", {"timesteps": T}),
          "semantic-attack on a word, in batches": ("semantic-attack", {"timesteps": T, "batch": 3, "content": "a red hat"})}


editor, contexts = attacked_editors.editor, attacked_editors.contexts     # fixtures


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return small_pair(tmp_path_factory, double=True)


@pytest.fixture(scope="module")
def x_orig():
    return (0.05 + 0.9 * torch.rand(1, 3, 8, 8, generator=seeded(3))).double().repeat_interleave(4, 2).repeat_interleave(4, 3)


def moved(x, seed=5, eps=0.03):
    return x + torch.empty(x.shape).uniform_(-eps, eps, generator=seeded(seed)).to(x)


def made(method, editor, x_orig, contexts, seed=7, **options):
    """The objective, of a method named as users name it."""
    texts = {"prompts": PROMPTS[:len(contexts)]} if method in ("semantic-attack", "danp", "tdae") else {}
    return METHODS[method](editor, x_orig, contexts, generator=seeded(seed), **texts, **options)


def loss_of(found):
    return found[0] if isinstance(found, tuple) else found


# --------------------------------------------------------------------------------------- the formulas, as they are printed

class Reference:
    """The losses over diffusers' networks. stream: the generator, drawn from in the order in which ours draws."""

    def __init__(self, pipeline, x_orig, stream, step=0):
        self.pipeline, self.x_orig, self.stream = pipeline, x_orig, stream
        self.alphas_cumprod = diffusers.DDPMScheduler(**small_editors.BETAS).alphas_cumprod.double()
        self.c, self.nothing = self.text(PROMPTS[step]), self.text("")

    def text(self, prompt):
        tokens = self.pipeline.tokenizer(prompt, padding="max_length", return_tensors="pt",
                                         max_length=self.pipeline.tokenizer.model_max_length)
        return self.pipeline.text_encoder(tokens.input_ids).last_hidden_state

    def E(self, x):
        return self.pipeline.vae.encode(2 * x - 1).latent_dist.mode()

    def z(self, x):
        return self.pipeline.vae.config.scaling_factor * self.E(x)

    def randn(self, x, count=1):
        return torch.randn((count, *self.E(x).shape[1:]), generator=self.stream).double()

    def noised(self, x, t, eta):
        kept = self.alphas_cumprod[t]
        return kept.sqrt() * self.z(x) + (1 - kept).sqrt() * eta

    def eps(self, x, t, eta):
        z_t = self.noised(x, t, eta)
        return self.pipeline.unet(torch.cat([z_t, self.E(x)], 1), t, encoder_hidden_states=self.c).sample

    def draw(self, lowest=0):
        t = torch.randint(lowest, 1000, (1,), generator=self.stream)
        return t, self.randn(self.x_orig)

    def pattern(self):
        return baselines.pattern(self.x_orig)

    def photoguard_encoder(self, variant):
        target = self.z(torch.full_like(self.x_orig, 0.5)) if variant == "grey" else torch.zeros(())
        return lambda x: (self.z(x) - target).square().sum().sqrt()

    def editshield(self, variant):
        if variant == "plain":
            return lambda x: -(self.E(x) - self.E(self.x_orig)).square().mean()
        if variant == "eot":
            tau = baselines.transformation(self.x_orig, self.stream)
            return lambda x: -(self.E(tau(x)) - self.E(tau(self.x_orig))).square().mean()
        (s, eta_s), (t, eta) = self.draw(), self.draw()
        aim = torch.cat([self.noised(self.x_orig, s, eta_s), self.E(self.x_orig)], 1)
        return lambda x: (0.1 * (x - self.x_orig).square().mean()
                          - (torch.cat([self.noised(x, t, eta), self.E(x)], 1) - aim).square().mean())

    def sds(self, variant):
        """The product of z with the residual at the first picture asked about, which is frozen there."""
        t, eta = self.draw()
        frozen = []

        def loss(x):
            frozen.append(self.eps(x, t, eta) - eta) if not frozen else None
            return (self.z(x) * frozen[0]).sum() * (1 if variant == "minus" else -1)
        return loss

    def mist(self, variant):
        t, eta = self.draw() if variant != "textural" else (None, None)

        def loss(x):
            textural = (self.z(x) - self.z(self.pattern())).square()
            if variant == "textural":
                return textural.mean()
            error = (self.eps(x, t, eta) - eta).square().mean()
            # As released, at this latent's size instead of 16384 elements.
            elements = textural.numel()
            return -error if variant == "semantic" else (textural.sum() - 1e4 * elements / 16384 * error) / elements
        return loss

    def ace(self, variant):
        t, eta = self.draw(lowest=600)

        def loss(x):
            score = (self.eps(x, t, eta) - self.z(self.pattern())).square().mean()
            return score + (100 * (self.z(x) - self.z(self.pattern())).square().mean() if variant == "ace+" else 0)
        return loss

    def photoguard_diffusion(self, unroll, repeats=1, resample=True):
        bank = self.randn(self.x_orig, repeats)
        return lambda x: sum((2 * self.short_edit(x, eta[None], unroll) - 1).square().sum().sqrt() for eta in bank) / repeats

    def short_edit(self, x, eta, steps):
        """Euler's method on the noise levels of evenly spaced timesteps, with guidance over text and picture."""
        E = self.E(x)
        timesteps = np.linspace(999, 0, steps)
        sigmas = ((1 - self.alphas_cumprod) / self.alphas_cumprod).sqrt().numpy()
        sigmas = [*np.interp(timesteps, np.arange(1000), sigmas), 0.0]
        latent = eta * sigmas[0]
        for t, sigma, following in zip(timesteps, sigmas, sigmas[1:], strict=False):
            noisy = latent / math.sqrt(sigma**2 + 1)
            full, image_only, neither = (
                self.pipeline.unet(torch.cat([noisy, condition], 1), torch.tensor(t, dtype=torch.float32),
                                   encoder_hidden_states=c).sample
                for condition, c in ((E, self.c), (E, self.nothing), (torch.zeros_like(E), self.nothing)))
            noise = neither + 7.5 * (full - image_only) + 1.5 * (image_only - neither)
            latent = latent + noise * (following - sigma)
        return self.pipeline.vae.decode(latent / self.pipeline.vae.config.scaling_factor).sample / 2 + 0.5

    def semantic_attack(self, timesteps, batch=None, content=None):
        text = content or PROMPTS[0]
        self.c = self.text(text)
        ids = self.pipeline.tokenizer(text).input_ids                        # start, words, end
        columns = list(range(1, len(ids) - 1))
        bank = self.randn(self.x_orig, len(timesteps))

        def attention(x, t, eta):
            total = 0
            for q, k, heads, size in self.queries_and_keys(x, t, eta[None]):
                scores = torch.einsum("qhd,khd->hqk", *(part[0].unflatten(-1, (heads, -1)) for part in (q, k)))
                probs = torch.softmax(scores / math.sqrt(q.shape[-1] // heads), -1).mean(0)[:, columns].sum(-1)
                total = total + F.interpolate(probs.reshape(1, 1, *size), size=(4, 4), mode="bicubic")[0, 0]
            return total

        clean = sum(attention(self.x_orig, t, eta) for t, eta in zip(timesteps, bank, strict=True)) / len(timesteps)
        mask = clean > clean.mean()
        assert 0 < mask.sum() < mask.numel()
        return lambda x: sum(attention(x, t, eta)[mask].abs().mean()
                             for t, eta in zip(timesteps, bank, strict=True)) / len(timesteps)

    def queries_and_keys(self, x, t, eta):
        """Of every attention to the text: queries, keys, heads, (height, width)."""
        seen, handles = {}, []
        for name, module in self.pipeline.unet.named_modules():
            if name.endswith("attn2"):
                for part in (module.to_q, module.to_k):
                    handles.append(part.register_forward_hook(
                        lambda layer, args, out, key=(name, module.heads): seen.setdefault(key, []).append(out)))
        self.eps(x, t, eta)
        for handle in handles:
            handle.remove()
        assert len(seen) == 7
        for (_, heads), (q, k) in seen.items():
            side = math.isqrt(q.shape[1])
            yield q, k, heads, (side, side)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_loss_and_gradient_are_the_formulas(form, pair, contexts, x_orig):
    """Value by value, and the gradient along random directions by differences of the reference's loss."""
    pipeline, editor = pair
    method, options = FORMS[form]
    x = moved(x_orig).requires_grad_(True)
    loss = loss_of(made(method, editor, x_orig, contexts[:1], **options)(x, 0))
    (gradient,) = torch.autograd.grad(loss, x)
    with torch.no_grad():
        reference = getattr(Reference(pipeline, x_orig, seeded(7)), method.replace("-", "_"))(**options)
        value = reference(x)
        if method != "sds":                                  # which has no loss; see below
            assert loss.item() == pytest.approx(value.item(), rel=1e-5)
        assert_slopes(reference, x, gradient)


def test_sds_reports_the_residual_and_skips_the_jacobian(pair, contexts, x_orig):
    pipeline, editor = pair
    x = moved(x_orig).requires_grad_(True)
    up, down = (made("sds", editor, x_orig, contexts[:1], variant=variant)(x, 0) for variant in ("plus", "minus"))
    reference = Reference(pipeline, x_orig, seeded(7))
    t, eta = reference.draw()
    residual = reference.eps(x, t, eta) - eta
    assert down.item() == -up.item() == pytest.approx(residual.square().mean().item(), rel=1e-5)
    one, other = (torch.autograd.grad(loss, x)[0] for loss in (up, down))
    assert torch.equal(one, -other) and one.any()
    through = torch.autograd.grad(residual.square().sum() / 2, x)[0]         # with the denoiser's Jacobian: another way
    assert torch.cosine_similarity(through.flatten(), other.flatten(), 0) < 0.99


def test_the_short_edit_is_diffusers_euler_edit(pair, contexts, x_orig):
    """In single precision, with the published pipeline: the ancestral editor is unrolled without its noise."""
    pipeline, editor = pair
    parts = {name: part for name, part in pipeline.components.items() if name != "scheduler"}
    euler = diffusers.EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    theirs = diffusers.StableDiffusionInstructPix2PixPipeline(**parts, scheduler=euler, requires_safety_checker=False)
    theirs.set_progress_bar_config(disable=True)
    eta = torch.randn((1, 4, 4, 4), generator=seeded(1)).double()
    expected = theirs(PROMPTS[0], x_orig, num_inference_steps=4, latents=eta, output_type="pt").images
    with torch.no_grad():
        nothing = editor.context([""])
        ours = baselines.short_edit(editor, editor.encode(x_orig), eta, contexts[0], nothing, 4)
        other = baselines.short_edit(editor, editor.encode(x_orig), eta, contexts[1], nothing, 4)
    assert expected.std() > 0.05 and (ours - other).abs().max() > 0.01
    assert (ours.clamp(0, 1) - expected).abs().max() < 1e-3


# ---------------------------------------------------------------------------------------------------------- random draws

def drawn(objective, x, steps):
    return [loss_of(objective(x, step)).item() for step in range(steps)]


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_one_seed_gives_one_run_without_the_global_stream(form, editor, contexts, x_orig):
    method, options = FORMS[form]
    state, x = torch.get_rng_state(), moved(x_orig)
    first, again, other = (drawn(made(method, editor, x_orig, contexts[:1], seed, **options), x, 2) for seed in (7, 7, 8))
    assert torch.equal(torch.get_rng_state(), state) and first == again
    fixed = method == "photoguard-encoder" or options.get("variant") in ("plain", "textural")      # nothing is drawn
    bank = method == "semantic-attack" or options.get("resample") is False                         # once for all steps
    assert (first == other) == fixed
    assert (len(set(first)) == 1) == (fixed or bank)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "lowest"), [("mist", 0), ("sds", 0), ("ace", 600)])
def test_timesteps_are_those_of_training(method, lowest, editor, contexts, x_orig, monkeypatch):
    seen = []
    monkeypatch.setattr(editor, "predict", lambda E, z_t, t, c: seen.append(t.item()) or torch.zeros_like(z_t))
    objective = made(method, editor, x_orig, contexts)
    for step in range(150):
        objective(x_orig, step)
    assert lowest <= min(seen) < lowest + 40 and 960 < max(seen) <= 999


@pytest.mark.slow
@pytest.mark.parametrize("method", ["photoguard-diffusion", "semantic-attack", "sds", "mist", "ace"])
def test_prompts_take_turns(method, editor, contexts, x_orig, monkeypatch):
    asked = []

    def spy(call):
        def spying(condition, z_t, t, context, **options):
            asked.append(next((n for n, known in enumerate(contexts) if torch.equal(context[:1], known)), None))
            return call(condition, z_t, t, context, **options)
        return spying

    for name in ("features", "predict"):
        monkeypatch.setattr(editor, name, spy(getattr(editor, name)))
    options = {"timesteps": [500]} if method == "semantic-attack" else {"unroll": 2} if "diffusion" in method else {}
    objective, x = made(method, editor, x_orig, contexts, **options), moved(x_orig).requires_grad_(True)
    for step in range(3):
        asked.clear()
        objective(x, step)
        assert set(asked) - {None} == {step % 2}


# ----------------------------------------------------------------------------------------------------------------- cost

@pytest.fixture
def counted(editor, monkeypatch):
    """How many passes of one picture are run through the parts, also those that checkpointing repeats."""
    passes = {}

    def watch(part, owner, name, first_layer):
        passes[f"{part}_forward"] = passes[f"{part}_backward"] = 0
        run = getattr(owner, name)

        def running(first, *rest, **named):
            passes[f"{part}_forward"] += len(first)
            return run(first, *rest, **named)

        def back(gradient):
            passes[f"{part}_backward"] += len(gradient)

        def listen(module, inputs, output):
            if output.requires_grad:
                output.register_hook(back)

        monkeypatch.setattr(owner, name, running)
        return first_layer.register_forward_hook(listen)

    handles = [watch("encoder", editor.vae, "encode", editor.vae.encoder.conv_in),
               watch("denoiser", editor.unet, "walk", editor.unet.conv_in),
               watch("decoder", editor.vae, "decode", editor.vae.decoder.conv_in)]
    yield passes
    for handle in handles:
        handle.remove()


@pytest.mark.slow
@pytest.mark.parametrize(("form", "prompts", "steps"), [*((form, 1, 2) for form in FORMS), ("semantic-attack", 2, 3),
                                                        ("semantic-attack", 2, 1), ("photoguard-diffusion", 2, 1)])
def test_passes_of_a_run_are_counted_rightly(form, prompts, steps, counted, editor, contexts, x_orig):
    method, options = FORMS[form]
    objective = made(method, editor, x_orig, contexts[:prompts], **options)
    pgd(x_orig, objective, 0.03, steps=steps, step_size=1 / 255, generator=seeded())
    told = objective.passes(steps)
    assert counted == {"decoder_forward": 0, "decoder_backward": 0} | told
    assert told.keys() >= {"encoder_forward", "encoder_backward", "denoiser_forward", "denoiser_backward"}


def test_an_edit_without_guidance_costs_one_evaluation_in_a_step(counted, editor, contexts, x_orig, monkeypatch):
    monkeypatch.setattr(editor, "defaults", replace(editor.defaults, guidance=1.0))
    objective = made("photoguard-diffusion", editor, x_orig, contexts[:1], unroll=3)
    pgd(x_orig, objective, 0.03, steps=2, step_size=1 / 255, generator=seeded())
    assert counted == objective.passes(2) and counted["denoiser_backward"] == 6


def test_on_a_miniature_the_unrolled_edit_is_not_run_twice(counted, editor, contexts, x_orig, monkeypatch):
    runs = {}
    monkeypatch.setattr(editor, "frame", lambda width, height, size=None: (height, width))
    for miniature in (False, True):
        monkeypatch.setattr(type(editor), "is_small", miniature)
        objective = made("photoguard-diffusion", editor, x_orig, contexts[:1], unroll=3)
        counted.update(dict.fromkeys(counted, 0))
        loss = objective(moved(x_orig).requires_grad_(True), 0)
        loss.backward()
        assert counted["denoiser_forward"] == objective.passes(1)["denoiser_forward"]
        runs[miniature] = counted["denoiser_forward"], loss.item()
    assert runs[True][0] * 2 == runs[False][0] and runs[True][1] == pytest.approx(runs[False][1], rel=1e-12)


class Saved:
    """How many bytes are kept for a backward pass, from the outside: what checkpointing throws away does not count."""

    def __enter__(self):
        self.bytes = 0
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor)
        self.hooks.__enter__()
        return self

    def _keep(self, tensor):
        self.bytes += tensor.numel() * tensor.element_size()
        return tensor

    def __exit__(self, *error):
        self.hooks.__exit__(*error)


def test_memory_of_the_unrolled_edit_is_independent_of_steps(editor, contexts, x_orig):
    eta = torch.randn((1, 4, 4, 4), generator=seeded()).double()
    E = editor.encode(x_orig).detach().requires_grad_(True)
    with torch.no_grad():
        nothing = editor.context([""])
    with Saved() as one:
        editor.predict(E, eta, torch.tensor(500), contexts[0])
    kept = {}
    for steps in (2, 12):
        with Saved() as saved:
            baselines.short_edit(editor, E, eta, contexts[0], nothing, steps)
        kept[steps] = saved.bytes
    assert one.bytes > 50_000 and (kept[12] - kept[2]) / 10 < 0.01 * one.bytes


@pytest.mark.slow
def test_the_draws_of_an_edit_are_gone_before_the_next(editor, contexts, x_orig):
    """So that memory does not grow with `repeats` either: outside the loop over draws only the encoder's graph is left."""
    kept = {}
    for repeats in (1, 4):
        objective = made("photoguard-diffusion", editor, x_orig, contexts[:1], unroll=2, repeats=repeats)
        loss = objective(moved(x_orig).requires_grad_(True), 0)
        nodes, seen = [loss.grad_fn], set()
        while nodes:
            if (node := nodes.pop()) is not None and node not in seen:
                seen.add(node)
                nodes += [following for following, _ in node.next_functions]
        kept[repeats] = len(seen)
    assert kept[1] == kept[4]


def test_weights_get_no_gradient(editor, contexts, x_orig):
    for method in METHODS.keys() - {"noise", "sifm", "latent", "decontext"}:
        x = moved(x_orig).requires_grad_(True)
        loss_of(made(method, editor, x_orig, contexts[:1])(x, 0)).backward()
        assert x.grad.any(), method
        for network in (editor.unet, editor.vae, editor.text_encoder):
            assert all(p.grad is None and not p.requires_grad for p in network.parameters()), method


# ------------------------------------------------------------------------------------------------------ where they lead

def panel(pipeline, x, measure):
    """The mean of measure(reference, x, t, eta) over timesteps and noises that no run has seen."""
    reference = Reference(pipeline, x, seeded(99))
    with torch.no_grad():
        found = [measure(reference, x, *reference.draw(lowest=300)).item() for _ in range(12)]
    return sum(found) / len(found)


def shift(reference, x, x_orig):
    return (reference.E(x) - reference.E(x_orig)).square().mean().sqrt().item()


@pytest.mark.slow
@pytest.mark.parametrize(("method", "options", "quantity", "way"), [
    ("photoguard-encoder", {}, "norm", -1), ("photoguard-encoder", {"variant": "grey"}, "from grey", -1),
    ("editshield", {}, "shift", 1), ("editshield", {"variant": "plain"}, "shift", 1),
    ("mist", {"variant": "textural"}, "from pattern", -1), ("mist", {"variant": "semantic"}, "error", 1),
    ("mist", {}, "from pattern", -1), ("ace", {"variant": "ace"}, "score", -1), ("ace", {}, "from pattern", -1),
    ("sds", {}, "score's product", -1), ("sds", {"variant": "plus"}, "score's product", 1),
    ("photoguard-diffusion", {"unroll": 2}, "from grey edit", -1), ("semantic-attack", {"timesteps": T}, "attention", -1),
], ids=str)
def test_within_20_steps_it_goes_where_its_paper_says(method, options, quantity, way, pair, contexts, x_orig):
    """Further than the random start that all methods share, measured on noise and timesteps that were not optimised."""
    pipeline, editor = pair
    objective = made(method, editor, x_orig, contexts[:1], **options)
    start, end = (x_orig + pgd(x_orig, objective, 0.03, steps=steps, step_size=1 / 255, generator=seeded(1))
                  for steps in (0, 20))
    reference = Reference(pipeline, x_orig, seeded(99))
    fixed = (reference.semantic_attack(T) if quantity == "attention" else
             reference.photoguard_diffusion(2) if quantity == "from grey edit" else None)
    target = reference.z(reference.pattern())
    measures = {
        "norm": lambda x: reference.z(x).norm(),
        "from grey": lambda x: (reference.z(x) - reference.z(torch.full_like(x, 0.5))).norm(),
        "shift": lambda x: (reference.E(x) - reference.E(x_orig)).norm(),
        "from pattern": lambda x: (reference.z(x) - target).norm(),
        "error": lambda x: panel(pipeline, x, lambda r, x, t, eta: (r.eps(x, t, eta) - eta).square().mean()),
        "score": lambda x: panel(pipeline, x, lambda r, x, t, eta: (r.eps(x, t, eta) - target).square().mean()),
        "score's product": lambda x: panel(pipeline, x, lambda r, x, t, eta: (
            r.z(x) * (r.eps(start, t, eta) - eta)).sum()),
        "from grey edit": fixed, "attention": fixed,
    }
    with torch.no_grad():
        before, after = (float(measures[quantity](x)) for x in (start, end))
    assert way * (after - before) > 0.002 * abs(before), (before, after)


# --------------------------------------------------------------------------------------------------- their odds and ends

def sharp(size=(48, 64)):
    """A picture with edges and one bright dot, (1,3,H,W)."""
    pixels = torch.zeros(1, 3, *size)
    pixels[..., 10:30, 20:40] = torch.tensor([1.0, 0.5, 0.2]).view(1, 3, 1, 1)
    pixels[..., 40, 50] = 1
    return pixels


def kinds(count=60):
    """Transformations by kind, told apart by what they do to a picture."""
    found = {"none": [], "crop": [], "blur": [], "rotate": []}
    for seed in range(count):
        state = seeded(seed)
        kind = list(found)[torch.randint(4, (1,), generator=state).item()]
        found[kind].append((torch.rand(3, generator=state).tolist(), baselines.transformation(sharp(), seeded(seed))))
    return found


def test_the_transformations_are_what_they_are_called():
    """Against Pillow and scipy, at the strengths that the docstring states; each comes about as often as the others."""
    ndimage = pytest.importorskip("scipy.ndimage")
    pixels, found = sharp(), kinds()
    assert all(8 <= len(of_kind) <= 25 for of_kind in found.values())
    assert all(torch.equal(tau(pixels), pixels) for _, tau in found["none"])
    height, width = pixels.shape[2:]
    for (a, _, _), tau in found["blur"]:
        expected = ndimage.gaussian_filter(pixels.double().numpy(), (0, 0, 0.5 + a, 0.5 + a), mode="nearest", radius=4)
        assert np.abs(tau(pixels).numpy() - expected).max() < 1e-6
    for (a, b, c), tau in found["crop"]:
        share = 0.8 + 0.2 * a
        left, top = width * (1 - share) * b, height * (1 - share) * c
        box = (left, top, left + width * share, top + height * share)
        expected = [Image.fromarray(band.numpy()).resize((width, height), Image.Resampling.BILINEAR, box) for band in pixels[0]]
        assert np.abs(tau(pixels)[0].numpy() - np.stack(expected)).max() < 0.12          # at edges, by its own antialiasing
    y, x = torch.meshgrid(torch.arange(height) - (height - 1) / 2, torch.arange(width) - (width - 1) / 2, indexing="ij")
    for (a, _, _), tau in found["rotate"]:
        angle = math.radians(5) * (2 * a - 1)
        ramp = tau((0.5 + x / 200).expand(1, 3, -1, -1))[0, 0]               # what was at x is now where it was turned to
        expected = 0.5 + (x * math.cos(angle) - y * math.sin(angle)) / 200
        assert (ramp - expected)[8:-8, 8:-8].abs().max() < 1e-4


def test_the_pattern_is_words_of_high_contrast_at_any_size():
    pixels = baselines.pattern(torch.zeros(1, 3, 512, 512))
    assert pixels.shape == (1, 3, 512, 512) and set(pixels.unique().tolist()) == {0.0, 1.0}
    assert 0.2 < pixels.mean() < 0.3 and 0.4 < pixels.std() < 0.45
    tile = pixels[..., :64, :171]
    assert (pixels[..., 64:128, :171] != tile).float().mean() < 0.02         # eight rows of it
    assert (pixels[..., :64, 171:342] != tile).float().mean() < 0.05         # three columns
    assert baselines.pattern(torch.zeros(1, 3, 40, 24)).shape == (1, 3, 40, 24)
    assert not torch.equal(pixels, pixels.flip(2)) and not torch.equal(pixels, pixels.flip(3))


@pytest.mark.parametrize(("text", "words"), [("make the sky red", None), ("A top hat.", None), ("word " * 60, 22)])
def test_words_stand_between_start_and_end(text, words, pair, editor):
    ids = pair[0].tokenizer(text, truncation=True).input_ids
    assert editor.word_positions(text) == list(range(1, len(ids) - 1))
    assert words in (None, len(ids) - 2)


@pytest.mark.parametrize(("method", "options", "says"), [
    ("photoguard-encoder", {"variant": "black"}, "variant 'black': choose one of zero, grey"),
    ("editshield", {"variant": "adam"}, "choose one of eot, plain, released"), ("sds", {"variant": "-"}, "one of minus, plus"),
    ("mist", {"variant": "both"}, "choose one of fused, textural, semantic"),
    ("ace", {"variant": "lora"}, r"choose one of ace\+, ace"),
    ("photoguard-diffusion", {"unroll": 1}, "unroll 1"), ("photoguard-diffusion", {"repeats": 0}, "repeats 0"),
    ("semantic-attack", {"timesteps": []}, "at least one timestep"), ("semantic-attack", {"batch": 0}, "at least one timestep"),
    ("semantic-attack", {"content": " "}, "this prompt has none"), ("semantic-attack", {"timesteps": [1000]}, "timestep 1000"),
], ids=str)
def test_a_wrong_option_is_one_sentence(method, options, says, editor, contexts, x_orig):
    with pytest.raises(ValueError, match=says) as caught:
        made(method, editor, x_orig, contexts[:1], **options)(x_orig, 0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("variant", ["eot", "plain"])
def test_run_without_a_gradient_is_refused(variant, editor, contexts, x_orig):
    """From delta = 0 a shift has nowhere to go; what the released code minimises does, by its noise."""
    def run(variant):
        objective = made("editshield", editor, x_orig, contexts, variant=variant)
        return pgd(x_orig, objective, 0.03, steps=2, step_size=1 / 255, init="zero")
    with pytest.raises(ValueError, match="no gradient"):
        run(variant)
    assert run("released").any()


def test_native_presets_name_loop_and_options_that_exist():
    from sifm_min import methods
    assert set(baselines.NATIVE) == METHODS.keys() - {"sifm", "sifm-output", "noise", "latent"}
    for method, native in baselines.NATIVE.items():
        loop, own = methods.settings(method, "native")
        assert {**loop, **own} == {**methods.PROTOCOL, **native.settings}
        assert "eps" not in native.settings and native.source and native.budget
    table = {"photoguard-encoder": (1000, 0.01, "linear", "random"), "photoguard-diffusion": (200, 0.003, "constant", "zero"),
             "editshield": (30, 0.001, "constant", "zero"), "semantic-attack": (100, 1 / 255, "constant", "zero"),
             "sds": (100, 1 / 255, "constant", "zero"), "mist": (100, 1 / 255, "constant", "random"),
             "ace": (250, 0.0025, "constant", "zero"), "decontext": (800, 0.0025, "constant", "zero"),
             "danp": (100, 1 / 255, "constant", "zero"), "diffusionguard": (800, 0.00196, "constant", "zero"),
             "tdae": (100, 1 / 255, "constant", "zero")}
    assert {method: tuple(methods.settings(method, "native")[0].values()) for method in baselines.NATIVE} == table


# ------------------------------------------------------------------------------------------------- in a real latent space

class Reached(Exception):
    pass


def photo_of_128(shared, name):
    with Image.open(shared / "data" / "photos" / f"{name}.png") as image:
        return images.to_pixels(image.convert("RGB").resize((128, 128), Image.Resampling.LANCZOS))


def until(met, x, objective):
    """Run at most 60 steps, until met(x'); True if it was met."""
    def checked(x_imu, step):
        if step and step % 5 == 0 and met(x_imu.detach()):
            raise Reached
        return objective(x_imu, step)
    try:
        delta = pgd(x, checked, 0.03, steps=60, step_size=1 / 255, generator=seeded())
    except Reached:
        return True
    return met(x + delta)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "picture"), [("taesd", "astronaut")])
def test_photoguard_starves_a_real_latent_more_than_noise(name, picture, shared):
    """To at most 0.8 of its norm, and at least 0.1 below uniform noise's own ratio, within 60 steps."""
    encoder, x = tae.Encoder(shared, name), photo_of_128(shared, picture)
    with torch.no_grad():
        clean, noise = (encoder.scaled(encoder.encode(pixels)).norm() for pixels in (x, moved(x).clamp(0, 1)))
    goal = min(0.8, noise / clean - 0.1)
    objective = baselines.photoguard_encoder(encoder, x, [], generator=seeded())

    def met(x_imu):
        with torch.no_grad():
            return encoder.scaled(encoder.encode(x_imu)).norm() / clean <= goal
    assert until(met, x, objective)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "picture"), [("taesd", "astronaut")])
def test_editshield_moves_a_real_latent_more_than_signs(name, picture, shared):
    encoder, x = tae.Encoder(shared, name), photo_of_128(shared, picture)

    def shift(x_imu):
        with torch.no_grad():
            return (encoder.encode(x_imu) - clean).square().mean().sqrt()

    with torch.no_grad():
        clean = encoder.encode(x)
    signs = shift((x + 0.03 * torch.randn(x.shape, generator=seeded(5)).sign()).clamp(0, 1))
    objective = baselines.editshield(encoder, x, [], generator=seeded())
    assert until(lambda x_imu: shift(x_imu) >= 2 * signs, x, objective)
