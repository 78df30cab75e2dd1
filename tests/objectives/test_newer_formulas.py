"""DANP and DiffusionGuard against their formulas, written out slowly over diffusers' networks in double precision, on a small
InstructPix2Pix and a small Stable Diffusion 3. As in test_baselines.py, the references share nothing with ours but the weights
and the order of draws, and have no gradient, only differences of the loss along random directions."""

import math

import pytest
import torch
import torch.nn.functional as F

diffusers = pytest.importorskip("diffusers", reason="the oracle, diffusers, is not installed")
pytest.importorskip("transformers", reason="the oracle's text encoders, transformers, are not installed")

import small_sd3  # noqa: E402
from attacked_editors import assert_slopes, loaded_pair, seeded, small_pair  # noqa: E402
from test_baselines import PROMPTS, Reference, loss_of, made, moved  # noqa: E402
from test_baselines_sd3 import Flow, words  # noqa: E402

from sifm_min.objectives.danp import above_threshold  # noqa: E402

T = [900, 333]
FORMS = {"danp": ("danp", {"timesteps": T}),
         "danp as printed, in batches": ("danp", {"timesteps": T, "reduction": "literal", "tokens": "all", "batch": 1,
                                                  "attention_weight": 0.5, "noise_weight": 2.0, "bins": 32}),
         "diffusionguard": ("diffusionguard", {}), "diffusionguard of 7": ("diffusionguard", {"noisiest_of": 7})}


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

    def danp(self, timesteps, reduction="balanced", tokens="content", attention_weight=1.0, noise_weight=1.0, bins=128,
             batch=None):
        bank = self.randn(self.x_orig, len(timesteps))
        masks = {}                                           # held constant, from the first picture asked about

        def att(x, t, eta):
            maps = []
            for probs, size in self.layers(x, t, eta[None]):
                columns = range(probs.shape[1]) if tokens == "all" else self.columns()
                side = self.E(x).shape[-2:]
                maps.append(torch.stack([F.interpolate(probs[:, n].reshape(1, 1, *size), size=side, mode="bicubic")[0, 0]
                                         for n in columns]))
            return sum(maps) / len(maps)

        def loss(x):
            total = 0
            for i, (t, eta) in enumerate(zip(timesteps, bank, strict=True)):
                maps, clean = att(x, t, eta), att(self.x_orig, t, eta)
                if i not in masks:
                    masks[i] = kapur(maps, bins)
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

    def diffusionguard(self, noisiest_of=4):
        scheduler = diffusers.EulerAncestralDiscreteScheduler.from_config(self.pipeline.scheduler.config)
        scheduler.set_timesteps(noisiest_of)
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

    def diffusionguard(self, noisiest_of=4):
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(self.pipeline.scheduler.config)
        scheduler.set_timesteps(noisiest_of)
        sigma = scheduler.sigmas.double()[int(noisiest_of - min(noisiest_of * 0.6, noisiest_of))]      # as img2img skips
        eta = self.randn(self.x_orig)
        return lambda x: -self.velocity((1 - sigma) * self.z(x) + sigma * eta, 1000 * sigma, self.c).norm()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["instruct", "flow"])
@pytest.mark.parametrize("form", FORMS)
def test_loss_and_gradient_are_the_formulas(form, kind, request):
    pipeline, editor, x_orig, reference_class = request.getfixturevalue(kind)
    method, options = FORMS[form]
    x = moved(x_orig).requires_grad_(True)
    loss = loss_of(made(method, editor, x_orig, [editor.context(PROMPTS[:1])], **options)(x, 0))
    (gradient,) = torch.autograd.grad(loss, x)
    with torch.no_grad():
        reference = getattr(reference_class(pipeline, x_orig, seeded(7)), method)(**options)
        assert loss.item() == pytest.approx(reference(x.detach()).item(), rel=1e-5)
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
