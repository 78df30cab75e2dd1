"""DANP and DiffusionGuard against their formulas, written out slowly over diffusers' networks in double precision, on a small
InstructPix2Pix, a small Stable Diffusion 3 and a small FLUX.1 Kontext. As in test_baselines.py, the references share nothing
with ours but the weights and the order of draws, and have no gradient, only differences of the loss along random
directions."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

diffusers = pytest.importorskip("diffusers", reason="the oracle, diffusers, is not installed")
pytest.importorskip("transformers", reason="the oracle's text encoders, transformers, are not installed")

import small_flux  # noqa: E402
import small_sd3  # noqa: E402
from attacked_editors import loaded_pair, seeded, small_pair  # noqa: E402
from finite_differences import assert_slopes  # noqa: E402
from test_baselines import PROMPTS, Reference, loss_of, made, moved  # noqa: E402
from test_baselines_sd3 import Flow, words  # noqa: E402

from sifm_min.objectives.danp import above_threshold  # noqa: E402
from sifm_min.pgd import pgd  # noqa: E402

T, TEXT = [900, 333], 24                                     # TEXT: the tokens that FLUX is given of T5, for time
FORMS = {"danp": ("danp", {"timesteps": T}),
         "danp as printed, in batches": ("danp", {"timesteps": T, "reduction": "literal", "tokens": "all", "batch": 1,
                                                  "attention_weight": 0.5, "noise_weight": 2.0, "bins": 32}),
         "diffusionguard": ("diffusionguard", {})}


def pixels(scale):
    small = 0.05 + 0.9 * torch.rand(1, 3, 8, 8, generator=seeded(3))
    return small.double().repeat_interleave(scale, 2).repeat_interleave(scale, 3)


@pytest.fixture(scope="module")
def instruct(tmp_path_factory):
    """(pipeline, editor, picture, the class of the reference)."""
    return *small_pair(tmp_path_factory, double=True), pixels(4), Instruct


@pytest.fixture(scope="module")
def flow(tmp_path_factory):
    pipeline = small_sd3.pipeline("as published", tokenizers=small_sd3.write_tokenizers(tmp_path_factory.mktemp("words")))
    pair = loaded_pair(pipeline, small_sd3.write(pipeline, tmp_path_factory.mktemp("editor")), double=True)
    return *pair, pixels(8), Joint


@pytest.fixture(scope="module")
def kontext(tmp_path_factory):
    pipeline = small_flux.kontext(tokenizers=small_sd3.write_tokenizers(tmp_path_factory.mktemp("words")))
    pipeline.save_pretrained(folder := tmp_path_factory.mktemp("editor"))
    pipeline, editor = loaded_pair(pipeline, folder, double=True)
    editor.defaults, editor.text_encoders.length = replace(editor.defaults, size=64), TEXT
    return pipeline, editor, pixels(8), Kontext


# --------------------------------------------------------------------------------------- the formulas, as they are printed

def kapur(maps, bins):
    """The mask of maps (tokens,h,w) by the definition: both sides' entropies at every edge of the histogram."""
    low, high = maps.min().item(), maps.max().item()
    place = [min(int((value - low) / (high - low) * bins), bins - 1) for value in maps.flatten().tolist()]
    p = [place.count(i) / len(place) for i in range(bins)]

    def entropy(part):
        return -sum(q / sum(part) * math.log(q / sum(part)) for q in part if q)
    best = max((entropy(p[:k]) + entropy(p[k:]), -k) for k in range(1, bins) if sum(p[:k]) and sum(p[k:]))
    return torch.tensor([float(i >= -best[1]) for i in place], dtype=maps.dtype).reshape(maps.shape)


class Danp:
    """The loss of DANP from `layers(x, t, eta)`, each layer's attention (positions, tokens) and (height, width)."""

    def att(self, x, t, eta, tokens="content"):
        maps = []
        for probs, size in self.layers(x, t, eta):
            columns = range(probs.shape[1]) if tokens == "all" else self.columns()
            maps.append(torch.stack([F.interpolate(probs[:, n].reshape(1, 1, *size), size=self.E(x).shape[-2:],
                                                   mode="bicubic")[0, 0] for n in columns]))
        return sum(maps) / len(maps)

    def danp(self, timesteps, reduction="balanced", tokens="content", attention_weight=1.0, noise_weight=1.0, bins=128,
             batch=None):
        bank = self.randn(self.x_orig, len(timesteps))
        masks, self.differ = {}, []                          # masks: held constant, from the first picture asked about

        def loss(x):
            total = 0
            for i, (t, eta) in enumerate(zip(timesteps, bank, strict=True)):
                maps, clean = (self.att(picture, t, eta[None], tokens) for picture in (x, self.x_orig))
                if i not in masks:
                    masks[i] = kapur(maps, bins)
                    self.differ.append((masks[i] != kapur(clean, bins)).any())
                inside, outside = ((mask * maps).square().sum() for mask in (masks[i], 1 - masks[i]))
                daa = inside - attention_weight * outside
                noise, clean_noise = self.predicted(x, t, eta[None]), self.predicted(self.x_orig, t, eta[None])
                nba = -(noise - clean_noise).square().sum()
                if reduction == "balanced":
                    daa, nba = daa / clean.square().sum(), nba / clean_noise.square().sum()
                total = total + (daa + noise_weight * nba) / len(timesteps)
            assert all(0 < mask.mean() < 1 for mask in masks.values())
            return total
        return loss


class Instruct(Danp, Reference):
    """Over the U-Net: cross-attention, and the noise that it predicts."""

    predicted = Reference.eps

    def columns(self):
        return range(1, len(self.pipeline.tokenizer(PROMPTS[0]).input_ids) - 1)

    def layers(self, x, t, eta):
        for q, k, heads, size in self.queries_and_keys(x, t, eta):
            scores = torch.einsum("qhd,khd->hqk", *(part[0].unflatten(-1, (heads, -1)) for part in (q, k)))
            yield (scores / math.sqrt(q.shape[-1] // heads)).softmax(-1).mean(0), size

    def diffusionguard(self):
        scheduler = diffusers.EulerAncestralDiscreteScheduler.from_config(self.pipeline.scheduler.config)
        scheduler.set_timesteps(100)                         # the published pipeline's
        eta, t = self.randn(self.x_orig), scheduler.timesteps[0]
        z_T = scheduler.scale_model_input(scheduler.init_noise_sigma * eta, t)
        return lambda x: -self.pipeline.unet(torch.cat([z_T, self.E(x)], 1), t, encoder_hidden_states=self.c).sample.norm()


class Joint(Danp, Flow):
    """Over the MMDiT: joint attention of image queries to text keys, and the velocity."""

    def columns(self):
        return words(self.pipeline, PROMPTS[0])

    def predicted(self, x, t, eta):
        return self.velocity(self.noised(x, t, eta), t, self.c)

    def layers(self, x, t, eta):
        seen, blocks = {}, self.pipeline.transformer.transformer_blocks
        handles = [getattr(block.attn, part).register_forward_hook(
            lambda layer, args, out, key=(i, part): seen.update({key: out}))
            for i, block in enumerate(blocks) for part in ("to_q", "to_k", "add_k_proj")]
        self.predicted(x, t, eta)
        for handle in handles:
            handle.remove()
        for i, block in enumerate(blocks):
            q, k, text_k = (seen[i, part][0].unflatten(-1, (block.attn.heads, -1)) for part in ("to_q", "to_k", "add_k_proj"))
            scores = torch.einsum("qhd,khd->hqk", q, torch.cat([k, text_k])) / math.sqrt(q.shape[-1])
            yield scores.softmax(-1)[..., len(q):].mean(0), (4, 4)

    def diffusionguard(self):
        """An edit of strength 0.6 in 50 steps leaves out the 20 noisiest."""
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(self.pipeline.scheduler.config)
        scheduler.set_timesteps(50)
        sigma = scheduler.sigmas.double()[20]
        eta = self.randn(self.x_orig)
        return lambda x: -self.velocity((1 - sigma) * self.z(x) + sigma * eta, 1000 * sigma, self.c).norm()


class Kontext(Joint):
    """Over FLUX: attention of the target's queries to text keys in the joint attention, and the velocity."""

    def text(self, prompt):
        states, pooled, _ = self.pipeline.encode_prompt(prompt, max_sequence_length=TEXT)
        return states.double(), pooled.double()

    def columns(self):
        return range(len(self.pipeline.tokenizer_2(PROMPTS[0]).input_ids) - 1)           # T5 has no start

    def coordinates(self, rows, columns):
        """Of text, target and reference; the reference's first coordinate is 1."""
        places = torch.tensor([[0, row, column] for row in range(rows) for column in range(columns)])
        return torch.zeros(self.c[0].shape[1], 3), torch.cat([places, places + torch.tensor([1, 0, 0])]).double()

    def velocity(self, latent, t, c, x):
        """The reference picture is x. Tokens have 2 x 2 positions of the latent, in the order (channel, row, column)."""
        target, reference = (part.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
                             for part in (latent, self.z(x)))
        text, pictures = self.coordinates(latent.shape[2] // 2, latent.shape[3] // 2)
        t = torch.as_tensor([float(t) / 1000]).double()
        return self.pipeline.transformer(torch.cat([target, reference], 1), *c, t, pictures, text,
                                         torch.tensor([2.5]).double()).sample[:, :target.shape[1]]

    def predicted(self, x, t, eta):
        return self.velocity(self.noised(x, t, eta), t, self.c, x)

    def layers(self, x, t, eta):
        seen, transformer = {}, self.pipeline.transformer
        double = [(block.attn, ("norm_added_q", "norm_q"), ("norm_added_k", "norm_k"))
                  for block in transformer.transformer_blocks]
        single = [(block.attn, ("norm_q",), ("norm_k",)) for block in transformer.single_transformer_blocks]
        handles = [getattr(attn, part).register_forward_hook(lambda layer, args, out: seen.update({layer: out[0]}))
                   for attn, *parts in double + single for part in sum(parts, ())]
        self.predicted(x, t, eta)
        for handle in handles:
            handle.remove()
        side = self.E(x).shape[2] // 2
        cos, sin = transformer.pos_embed(torch.cat(self.coordinates(side, side)))

        def turned(tokens):                                  # (N, heads, d), neighbouring channels as complex numbers
            turn = torch.complex(cos[:, ::2], sin[:, ::2])[:, None]
            return torch.view_as_real(torch.view_as_complex(tokens.unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(-2)

        text = self.c[0].shape[1]
        for attn, *parts in double + single:
            q, k = (turned(torch.cat([seen[getattr(attn, part)] for part in names])) for names in parts)
            scores = torch.einsum("qhd,khd->hqk", q[text:text + side * side], k) / math.sqrt(q.shape[-1])
            yield scores.softmax(-1)[..., :text].mean(0), (side, side)

    def diffusionguard(self):
        """An edit starts at the noise level 1, whatever the number of its steps."""
        eta = self.randn(self.x_orig)
        return lambda x: -self.velocity(eta, 1000, self.c, x).norm()


@pytest.mark.slow
@pytest.mark.parametrize(("form", "kind"), [(form, kind) for kind in ("instruct", "flow", "kontext") for form in FORMS
                                            if (form, kind) != ("danp as printed, in batches", "kontext")])      # for time
def test_loss_and_gradient_are_the_formulas(form, kind, request, monkeypatch):
    if kind == "kontext":                                    # both rotate queries and keys in single precision otherwise
        monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    pipeline, editor, x_orig, reference_class = request.getfixturevalue(kind)
    method, options = FORMS[form]
    x = moved(x_orig, eps=0.1 if form == "danp" else 0.03).requires_grad_(True)
    loss = loss_of(made(method, editor, x_orig, [editor.context(PROMPTS[:1])], **options)(x, 0))
    (gradient,) = torch.autograd.grad(loss, x)
    with torch.no_grad():
        formulas = reference_class(pipeline, x_orig, seeded(7))
        reference = getattr(formulas, method)(**options)
        assert loss.item() == pytest.approx(reference(x.detach()).item(), rel=1e-5)
        if form == "danp":                                   # so that a mask of the original's maps would be seen
            assert any(formulas.differ)
        assert_slopes(reference, x.detach(), gradient)


@pytest.mark.parametrize("maps", [
    torch.rand(2, 3, 5, 5, generator=seeded(1)), torch.rand(1, 1, 30, 30, generator=seeded(2)) ** 6,
    torch.cat([torch.rand(1, 1, 8, 8, generator=seeded(3)), 9 + torch.rand(1, 1, 8, 8, generator=seeded(4))], 3)],
    ids=["even", "skewed", "two heaps"])
def test_threshold_is_kapurs_by_definition(maps):
    for bins in (2, 16, 128):
        assert torch.equal(above_threshold(maps.double(), bins), torch.stack([kapur(one, bins) for one in maps.double()]))


def test_threshold_parts_two_heaps_and_no_constant_map():
    assert not above_threshold(torch.full((1, 2, 4, 4), 0.3)).any()
    heaps = torch.tensor([0.1, 0.11, 0.12, 0.9, 0.91, 0.92]).reshape(1, 1, 2, 3)
    assert above_threshold(heaps, 128).flatten().tolist() == [0, 0, 0, 1, 1, 1]


# ------------------------------------------------------------------------------------------------------ the direction of DANP

@pytest.mark.slow
def test_attention_falls_where_it_was_high(instruct):
    """Within 20 steps, against the rest of the map and the random start, on average over noise that was not optimised.

    The mask is the original's here. The loss has that of the current maps, which jumps from step to step: it need not fall.
    """
    pipeline, editor, x_orig, reference_class = instruct
    objective = made("danp", editor, x_orig, [editor.context(PROMPTS[:1])], timesteps=T, noise_weight=0.0)
    pictures = [x_orig + pgd(x_orig, objective, 0.03, steps=steps, step_size=1 / 255, generator=seeded(1)) for steps in (0, 20)]
    with torch.no_grad():
        reference, daa = reference_class(pipeline, x_orig, seeded(99)), [0, 0]
        for eta in reference.randn(x_orig, 8):
            for t in T:
                clean = reference.att(x_orig, t, eta[None])
                sign = 2 * kapur(clean, 128) - 1
                for i, x in enumerate(pictures):
                    daa[i] += (sign * reference.att(x, t, eta[None]).square()).sum() / clean.square().sum()
    assert daa[1] < daa[0]
