"""The baselines on Stable Diffusion 3: their rectified-flow forms against the formulas over diffusers' transformer, in double
precision; which of them say that they are ours; and which one is refused."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

diffusers = pytest.importorskip("diffusers", reason="the oracle, diffusers, is not installed")
pytest.importorskip("transformers", reason="the oracle's text encoders, transformers, are not installed")

import attacked_editors  # noqa: E402
import small_sd3  # noqa: E402
from attacked_editors import loaded_pair, seeded  # noqa: E402
from finite_differences import assert_slopes  # noqa: E402
from test_baselines import PROMPTS, Reference, T, loss_of, made, moved  # noqa: E402

from sifm_min import METHODS, baselines  # noqa: E402
from sifm_min.editors import load_editor  # noqa: E402
from sifm_min.pgd import pgd  # noqa: E402

FORMS = {f"{method} {variant}": (method, {"variant": variant}) for method, variants in {
    "photoguard-encoder": ("zero", "grey"), "editshield": ("eot", "plain"), "sds": ("minus", "plus"),
    "mist": ("fused", "textural", "semantic"), "ace": ("ace+", "ace")}.items() for variant in variants}
FORMS |= {"photoguard-diffusion": ("photoguard-diffusion", {"unroll": 2}),
          "semantic-attack": ("semantic-attack", {"timesteps": T}),
          "semantic-attack on a word": ("semantic-attack", {"timesteps": T, "batch": 3, "content": "a red hat"})}
OURS = {"sds", "mist", "ace"}                                # which the paper leaves out on SD3


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    return small_sd3.write_tokenizers(tmp_path_factory.mktemp("tokenizers"))


editor, contexts = attacked_editors.editor, attacked_editors.contexts     # fixtures


@pytest.fixture(scope="module")
def pair(tokenizers, tmp_path_factory):
    pipeline = small_sd3.pipeline("as published", tokenizers=tokenizers)
    return loaded_pair(pipeline, small_sd3.write(pipeline, tmp_path_factory.mktemp("editor")), double=True)


@pytest.fixture(scope="module")
def x_orig():
    return (0.05 + 0.9 * torch.rand(1, 3, 8, 8, generator=seeded(3))).double().repeat_interleave(8, 2).repeat_interleave(8, 3)


def words(pipeline, text):
    """Positions of the text itself: CLIP's between start and end, and T5's behind those 77, before its end."""
    return [*range(1, len(pipeline.tokenizer(text).input_ids) - 1),
            *range(77, 77 + len(pipeline.tokenizer_3(text).input_ids) - 1)]


class Flow(Reference):
    """The same losses, where the denoiser predicts the velocity of (1 - sigma) z + sigma eta and sees nothing else."""

    def __init__(self, pipeline, x_orig, stream):
        self.pipeline, self.x_orig, self.stream = pipeline, x_orig, stream
        self.c, self.nothing = self.text(PROMPTS[0]), self.text("")

    def text(self, prompt):
        states, _, pooled, _ = self.pipeline.encode_prompt(prompt, None, None, do_classifier_free_guidance=False)
        return states.double(), pooled.double()

    def z(self, x):
        config = self.pipeline.vae.config
        return (self.E(x) - config.shift_factor) * config.scaling_factor

    def noised(self, x, t, eta):
        return (1 - t / 1000) * self.z(x) + t / 1000 * eta

    def velocity(self, latent, t, c):
        return self.pipeline.transformer(latent, c[0], c[1], torch.as_tensor([float(t)])).sample

    def eps(self, x, t, eta):
        z_t = self.noised(x, t, eta)
        return z_t + (1 - t / 1000) * self.velocity(z_t, t, self.c)

    def sds(self, variant):
        t, eta = self.draw()
        frozen = []

        def loss(x):
            if not frozen:                                   # (1 - sigma)(v - v*), v* = eta - z
                frozen.append((1 - t / 1000) * (self.velocity(self.noised(x, t, eta), t, self.c) - (eta - self.z(x))))
            return (self.z(x) * frozen[0]).sum() * (1 if variant == "minus" else -1)
        return loss

    def short_edit(self, x, eta, steps):
        """Euler's method on some of the 30 noise levels that a strength of 0.6 leaves of diffusers' 50."""
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(self.pipeline.scheduler.config)
        scheduler.set_timesteps(50)
        sigmas = scheduler.sigmas.double()[20:]
        sigmas = sigmas[[round(30 * i / steps) for i in range(steps + 1)]]
        latent = (1 - sigmas[0]) * self.z(x) + sigmas[0] * eta
        for sigma, following in zip(sigmas, sigmas[1:], strict=False):
            full, without = (self.velocity(latent, 1000 * sigma, c) for c in (self.c, self.nothing))
            latent = latent + (without + 7.0 * (full - without)) * (following - sigma)
        config = self.pipeline.vae.config
        return self.pipeline.vae.decode(latent / config.scaling_factor + config.shift_factor).sample / 2 + 0.5

    def semantic_attack(self, timesteps, batch=None, content=None):
        text = content or PROMPTS[0]
        self.c = self.text(text)
        columns = words(self.pipeline, text)
        bank = self.randn(self.x_orig, len(timesteps))
        blocks = self.pipeline.transformer.transformer_blocks

        def attention(x, t, eta):
            seen = {}
            handles = [getattr(block.attn, part).register_forward_hook(
                lambda layer, args, out, key=(i, part): seen.update({key: out}))
                for i, block in enumerate(blocks) for part in ("to_q", "to_k", "add_k_proj")]
            self.eps(x, t, eta[None])
            for handle in handles:
                handle.remove()
            total = 0
            for i, block in enumerate(blocks):
                q, k, text_k = (seen[i, part][0].unflatten(-1, (block.attn.heads, -1))
                                for part in ("to_q", "to_k", "add_k_proj"))
                scores = torch.einsum("qhd,khd->hqk", q, torch.cat([k, text_k])) / math.sqrt(q.shape[-1])
                probs = scores.softmax(-1)[..., len(q):][..., columns].mean(0).sum(-1)
                total = total + F.interpolate(probs.reshape(1, 1, 4, 4), size=(8, 8), mode="bicubic")[0, 0]
            return total

        clean = sum(attention(self.x_orig, t, eta) for t, eta in zip(timesteps, bank, strict=True)) / len(timesteps)
        mask = clean > clean.mean()
        return lambda x: sum(attention(x, t, eta)[mask].abs().mean()
                             for t, eta in zip(timesteps, bank, strict=True)) / len(timesteps)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_loss_and_gradient_are_the_formulas(form, pair, contexts, x_orig):
    pipeline, editor = pair
    method, options = FORMS[form]
    x = moved(x_orig).requires_grad_(True)
    objective = made(method, editor, x_orig, contexts[:1], **options)
    loss = loss_of(objective(x, 0))
    (gradient,) = torch.autograd.grad(loss, x)
    with torch.no_grad():
        reference = getattr(Flow(pipeline, x_orig, seeded(7)), method.replace("-", "_"))(**options)
        value = reference(x)
        if method != "sds":
            assert loss.item() == pytest.approx(value.item(), rel=1e-5)
        assert_slopes(reference, x, gradient)


def test_words_are_those_of_every_text_encoder_that_there_is(pair, tokenizers, tmp_path):
    pipeline, editor = pair
    for text in (*PROMPTS, "A top hat."):
        assert editor.word_positions(text) == words(pipeline, text)
    long = editor.word_positions("word " * 400)             # both cut it, and keep their end
    assert long == [*range(1, 76), *range(77, 77 + 255)]
    assert editor.word_positions(" ") == []
    alone = load_editor(small_sd3.write(small_sd3.pipeline("without T5", tokenizers=tokenizers), tmp_path), device="cpu")
    assert alone.word_positions(PROMPTS[0]) == [n for n in words(pipeline, PROMPTS[0]) if n < 77]


def test_methods_that_the_paper_leaves_out_have_a_note(pair, contexts, x_orig):
    noted = {method: getattr(made(method, pair[1], x_orig, contexts[:1]), "note", "")
             for method in METHODS if method not in ("noise", "latent", "decontext")}
    assert {method for method, note in noted.items() if "leaves this method out on Stable Diffusion 3" in note} == OURS
    assert "joint attention" in noted["semantic-attack"] and noted["tdae"] == noted["semantic-attack"]
    assert all("the paper has no editor of rectified flow" in noted[method] for method in ("danp", "diffusionguard"))
    assert {method for method, note in noted.items() if not note} == {"sifm", "sifm-output", "photoguard-encoder",
                                                                      "photoguard-diffusion", "editshield"}


def test_options_without_meaning_are_refused_in_one_sentence(pair, contexts, x_orig):
    with pytest.raises(ValueError, match="choose eot or plain") as caught:
        made("editshield", pair[1], x_orig, contexts, variant="released")
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "options", "steps"), [("photoguard-diffusion", {"unroll": 3}, 2), ("semantic-attack",
                          {"timesteps": T}, 2), ("sds", {}, 2), ("mist", {}, 2), ("ace", {}, 2)])
def test_passes_of_a_run_are_counted_rightly(method, options, steps, pair, contexts, x_orig, monkeypatch):
    editor, counted = pair[1], {"denoiser_forward": 0, "denoiser_backward": 0}
    walk = editor.transformer.walk

    def walking(latent, *rest, **named):
        counted["denoiser_forward"] += len(latent)
        return walk(latent, *rest, **named)

    def listen(module, inputs, output):
        if output.requires_grad:
            output.register_hook(lambda gradient: counted.update(
                denoiser_backward=counted["denoiser_backward"] + len(gradient)))

    monkeypatch.setattr(editor.transformer, "walk", walking)
    handle = editor.transformer.pos_embed.register_forward_hook(listen)
    objective = made(method, editor, x_orig, contexts[:1], **options)
    pgd(x_orig, objective, 0.03, steps=steps, step_size=1 / 255, generator=seeded())
    handle.remove()
    told = objective.passes(steps)
    assert counted == {name: told[name] for name in counted}


@pytest.mark.parametrize("strength", [0.3, 0.6, 1.0])
@pytest.mark.parametrize("steps", [1, 4, 7])
def test_the_unrolled_edit_starts_where_an_edit_does(steps, strength, pair, contexts, x_orig, monkeypatch):
    """At the noise level that the strength says, and with as many evaluations as asked for."""
    editor, seen = pair[1], []
    monkeypatch.setattr(editor, "defaults", replace(editor.defaults, strength=strength, guidance=1.0))
    monkeypatch.setattr(editor, "predict", lambda E, z_t, t, c: seen.append(t.item()) or torch.zeros_like(z_t))
    with torch.no_grad():
        E = editor.encode(x_orig)
        baselines.short_edit(editor, E, torch.randn(E.shape, generator=seeded()).to(E), *contexts[:2], steps)
    assert len(seen) == steps and seen[0] == editor.plan().timesteps[0] and np.all(np.diff(seen) < 0)


def test_more_steps_than_an_edit_has_are_refused(pair, contexts, x_orig):
    with pytest.raises(ValueError, match="unroll 31: an edit by this editor has 30 denoising steps"):
        made("photoguard-diffusion", pair[1], x_orig, contexts, unroll=31)
