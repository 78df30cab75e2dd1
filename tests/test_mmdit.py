"""The MMDiT against diffusers' SD3Transformer2DModel on random weights, and against the published names and shapes."""

import inspect
import json
from dataclasses import MISSING, asdict, fields, replace

import pytest
import torch
import torch.nn.functional as F
from faults import Wrong
from parity import assert_close, assert_gradients_close, gradients, varied

from sifm_min.models import mmdit, modulation
from sifm_min.models.config import EMA
from sifm_min.models.mmdit import MMDiT, MMDiTConfig, default_taps, tap_names

diffusers = pytest.importorskip("diffusers", reason="the oracle, diffusers, is not installed")


def config(**given) -> MMDiTConfig:
    """That config, with the width of the text stream as it has to be."""
    return MMDiTConfig(caption_projection_dim=given["num_attention_heads"] * given["attention_head_dim"], **given)


CONFIGS = {
    "SD3, narrow": config(num_layers=3, num_attention_heads=4, attention_head_dim=8, joint_attention_dim=24,
                          pooled_projection_dim=20, pos_embed_max_size=12),
    "SD3.5 medium, narrow": config(num_layers=4, num_attention_heads=4, attention_head_dim=8, joint_attention_dim=24,
                                   pooled_projection_dim=20, pos_embed_max_size=14, qk_norm="rms_norm",
                                   dual_attention_layers=(0, 1)),
    "UltraEdit": config(num_layers=2, num_attention_heads=2, attention_head_dim=16, joint_attention_dim=12,
                        pooled_projection_dim=10, pos_embed_max_size=9, in_channels=32),
    "UltraEdit with a mask": config(num_layers=2, num_attention_heads=2, attention_head_dim=16, joint_attention_dim=12,
                                    pooled_projection_dim=10, pos_embed_max_size=9, in_channels=48),
    "a token per pixel, dual to the end": config(num_layers=3, num_attention_heads=3, attention_head_dim=4,
                                                 joint_attention_dim=10, pooled_projection_dim=6, pos_embed_max_size=11,
                                                 in_channels=5, out_channels=4, patch_size=1,
                                                 dual_attention_layers=(0, 2)),
    "one block, patches of 3": config(num_layers=1, num_attention_heads=1, attention_head_dim=12, joint_attention_dim=8,
                                      pooled_projection_dim=8, pos_embed_max_size=10, in_channels=4, out_channels=2,
                                      patch_size=3, qk_norm="rms_norm", dual_attention_layers=(0,)),
}
SMALL = "a token per pixel, dual to the end"        # small, and nothing in it is equal by accident
SIZES = {"square": (4, 4), "wide": (3, 8), "tall": (7, 2)}                  # in patches; crops of every parity


def oracle(config: MMDiTConfig, seed: int = 0):
    """diffusers' network at random weights; no scale is one, no bias zero, and the attention is far from uniform."""
    torch.manual_seed(seed)
    network = diffusers.SD3Transformer2DModel(sample_size=config.pos_embed_max_size * config.patch_size // 2,
                                              **asdict(config))
    return varied(network, ("to_q", "to_k", "add_q", "add_k", "norm1", "norm_out"))


def ours_like(theirs, **changes) -> MMDiT:
    network = MMDiT(replace(MMDiTConfig.from_json(theirs.to_json_string()), **changes)).to(theirs.dtype)
    network.load_state_dict(theirs.state_dict())
    return network.eval()


def inputs(config, size="wide", batch=2, dtype=torch.float32):
    """Noisy latent, timestep, context and pooled text, in the order of our arguments."""
    generator = torch.Generator().manual_seed(1)
    shapes = ((config.in_channels, *(side * config.patch_size for side in SIZES[size])),
              (7, config.joint_attention_dim), (config.pooled_projection_dim,))
    latent, context, pooled = (torch.randn(batch, *shape, generator=generator, dtype=dtype).requires_grad_()
                               for shape in shapes)
    return latent, torch.tensor([999.5, 421, 3, 77][:batch]), context, pooled


def output(theirs, latent, timestep, context, pooled):
    return theirs(latent, encoder_hidden_states=context, pooled_projections=pooled, timestep=timestep).sample


def leaves(arguments):
    """The arguments that have a gradient."""
    return arguments[0], *arguments[2:]


def assert_parity(ours, theirs, size="wide"):
    """The predictions agree, and so do the gradients at the latent, the context and the pooled text."""
    arguments = inputs(theirs.config, size, dtype=theirs.dtype)
    pair = ours(*arguments), output(theirs, *arguments)
    assert_close(*pair)
    assert None not in gradients(pair[1], leaves(arguments))
    assert_gradients_close(*pair, leaves(arguments))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", CONFIGS)
def test_parity_with_diffusers(name, size):
    theirs = oracle(CONFIGS[name])
    assert_parity(ours_like(theirs), theirs, size)


@pytest.mark.parametrize("name", [name for name in CONFIGS if not CONFIGS[name].qk_norm])
def test_parity_in_double(name):
    theirs = oracle(CONFIGS[name]).double()         # not where it normalises queries: it squares them in float32
    assert_parity(ours_like(theirs), theirs)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (11, 11), (11, 1), (10, 5), (2, 11), (1, 10)])
def test_every_crop_of_the_position_table(height, width):
    theirs = oracle(CONFIGS[SMALL]).double()
    with torch.no_grad():                           # the published table is smooth, and the same across and down
        theirs.pos_embed.pos_embed.copy_(torch.randn_like(theirs.pos_embed.pos_embed))
    latent, *others = inputs(theirs.config, dtype=torch.float64)
    latent = torch.randn(2, theirs.config.in_channels, height, width, dtype=torch.float64)
    assert_close(ours_like(theirs)(latent, *others), output(theirs, latent, *others))


def test_timesteps_of_every_form():
    theirs = oracle(CONFIGS[SMALL])
    ours = ours_like(theirs)
    latent, _, context, pooled = (x.detach() for x in inputs(theirs.config))
    for timestep in (981, 0, 12.5, torch.tensor(981), torch.tensor(12.5), torch.tensor([981]), torch.tensor([981, 12]),
                     torch.tensor([0.25, 999.75], dtype=torch.float64)):
        expected = output(theirs, latent, torch.as_tensor(timestep).reshape(-1).expand(2), context, pooled)
        assert_close(ours(latent, timestep, context, pooled), expected)


@pytest.mark.parametrize("name", ["SD3.5 medium, narrow", SMALL])
def test_weights_get_their_gradients(name):
    theirs = oracle(CONFIGS[name])
    ours, arguments = ours_like(theirs), inputs(theirs.config)
    for network, velocity in ((ours, ours(*arguments)), (theirs, output(theirs, *arguments))):
        network.zero_grad()
        velocity.square().mean().backward()
    expected = dict(theirs.named_parameters())
    largest = max(parameter.grad.abs().max() for parameter in expected.values())
    for name, parameter in ours.named_parameters():
        if name.endswith("k.bias") or name.endswith("k_proj.bias"):         # moves every score alike: zero to rounding
            continue
        assert parameter.grad.shape == expected[name].grad.shape
        assert (parameter.grad - expected[name].grad).abs().max() <= 1e-5 * largest


@pytest.mark.parametrize("name", ["SD3.5 medium, narrow", SMALL])
def test_one_text_serves_a_batch_of_timesteps(name):
    ours = ours_like(oracle(CONFIGS[name]).double())
    latent, timestep, context, pooled = inputs(ours.config, batch=3, dtype=torch.float64)
    one = [x[:1].detach().requires_grad_() for x in (context, pooled)]
    many = [x.detach().expand(3, *x.shape[1:]).clone().requires_grad_() for x in one]
    for when in (timestep, 421.0, timestep[1]):     # a timestep each, or the same for all
        short, long = ours(latent, when, *one), ours(latent, torch.as_tensor(when).expand(3), *many)
        assert_close(short, long)
        for mine, other in zip(torch.autograd.grad(short.square().sum(), one),
                               torch.autograd.grad(long.square().sum(), many), strict=True):
            assert_close(mine, other.sum(0, keepdim=True))
    mixed = ours(latent, timestep, one[0], many[1])                         # either of the two may be one
    assert_close(mixed, ours(latent, timestep, many[0], one[1]))
    found = ours.features(latent, timestep, *one, taps=[*ours.tap_names, *ours.probs_names])
    assert {len(x) for x in found.values()} == {3}


# ------------------------------------------------------------------------------------------------- faults must be seen

def from_the_corner(self, latent):
    x = self.proj(latent)
    table = self.pos_embed.unflatten(1, (self.side, self.side))[:, :x.shape[2], :x.shape[3]]
    return x.flatten(2).transpose(1, 2) + table.flatten(1, 2)


def across_for_down(self, latent):
    x = self.proj(latent)
    top, left = ((self.side - size) // 2 for size in x.shape[-2:])
    table = self.pos_embed.unflatten(1, (self.side, self.side)).transpose(1, 2)
    return x.flatten(2).transpose(1, 2) + table[:, top:top + x.shape[2], left:left + x.shape[3]].flatten(1, 2)


right_normed = mmdit.normed
FAULTS = {                                          # each is one plausible mistake: where, what, and its wrong value
    "another epsilon": (modulation, "NORM_EPS", 1e-5),
    "another activation": (modulation, "F", Wrong(F, silu=F.gelu)),
    "exact GELU": (modulation, "F", Wrong(F, gelu=lambda x, approximate: F.gelu(x))),
    "unscaled attention": (mmdit, "F", Wrong(F, scaled_dot_product_attention=lambda q, k, v: (
        F.scaled_dot_product_attention(q, k, v, scale=1.0)))),
    "heads interleaved": (mmdit.Attention, "split", lambda self, tokens, norm=None: (
        tokens.unflatten(-1, (-1, self.heads)).permute(0, 3, 1, 2))),
    "scale and shift exchanged": (mmdit, "normed", lambda x, shift, scale: right_normed(x, scale, shift)),
    "no one in the scale": (mmdit, "normed", lambda x, shift, scale: right_normed(x, shift, scale - 1)),
    "no SiLU before the modulation": (mmdit.Modulation, "forward", lambda self, temb: (
        self.linear(temb).unsqueeze(1).chunk(self.count, dim=-1))),
    "positions from the corner": (mmdit.PatchEmbedding, "forward", from_the_corner),
    "across for down": (mmdit.PatchEmbedding, "forward", across_for_down),
    "sines first": (modulation, "torch", Wrong(torch, cat=lambda parts, dim: (
        torch.cat(parts[::-1] if dim == 1 else parts, dim=dim)))),
    "frequencies in double": (modulation, "torch", Wrong(torch, arange=lambda n, dtype, device: (
        torch.arange(n, dtype=torch.float64, device=device)))),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_parity_sees(fault, monkeypatch):
    """The comparison above is worth something only if it fails on a wrong network."""
    theirs = oracle(CONFIGS[SMALL]).double()
    assert_parity(ours_like(theirs), theirs)
    monkeypatch.setattr(*FAULTS[fault])
    with pytest.raises(AssertionError):
        assert_parity(ours_like(theirs), theirs)


# ----------------------------------------------------------------------------------------------------------------- taps

def their_taps(theirs, arguments):
    """Name of ours -> what a hook on their module of that path sees: their blocks return (text, image)."""
    seen = {}
    for i, block in enumerate(theirs.transformer_blocks):
        def hook(module, args, out, tap=f"transformer_blocks.{i}"):
            text, seen[tap] = out
            if text is not None:
                seen[f"{tap}.context"] = text
        block.register_forward_hook(hook)
    seen["out"] = output(theirs, *arguments)
    return seen


@pytest.mark.parametrize("name", CONFIGS)
def test_every_tap_is_what_a_hook_of_that_name_sees(name):
    theirs = oracle(CONFIGS[name])
    ours, arguments = ours_like(theirs), inputs(theirs.config)
    expected = their_taps(theirs, arguments)
    found = ours.features(*arguments, taps=ours.tap_names)
    assert list(found) == list(ours.tap_names) == list(expected)
    for tap, activation in found.items():
        assert_close(activation, expected[tap])
        assert_gradients_close(activation, expected[tap], leaves(arguments))        # live: the gradient arrives at the input


@pytest.mark.parametrize("name", CONFIGS)
def test_tap_names_are_what_walk_yields_and_walk_leaves_it_alone(name):
    ours = ours_like(oracle(CONFIGS[name]))
    arguments = [x.detach() for x in inputs(ours.config)]
    before = [x.clone() for x in arguments]
    with torch.no_grad():                           # where an operation in place would raise no error
        yielded = [(tap, x, x.clone()) for tap, x in ours.walk(*arguments)]
        velocity = ours(*arguments)
    assert tuple(tap for tap, _, _ in yielded) == ours.tap_names == tap_names(ours.config)
    assert all(torch.equal(x, copy) for _, x, copy in yielded)
    assert all(x.is_contiguous() for _, x, _ in yielded[:-1])               # for speed: no result depends on it
    assert all(torch.equal(x, copy) for x, copy in zip(arguments, before, strict=True))
    assert yielded[-1][0] == "out" and torch.equal(yielded[-1][1], velocity)


@pytest.mark.parametrize("name", ["SD3, narrow", "SD3.5 medium, narrow"])
def test_features_stop_after_the_last_tap(name):
    ours = ours_like(oracle(CONFIGS[name]))
    arguments = inputs(ours.config)
    expected = dict(ours.walk(*arguments, wanted=ours.probs_names))
    modules = [*ours.transformer_blocks, ours.norm_out]

    class Ran(Exception):
        pass

    def raises(*_):
        raise Ran

    for i, after in enumerate(modules[1:]):
        handle = after.register_forward_pre_hook(raises)
        block = f"transformer_blocks.{i}"
        for last in {block, f"{block}.context", f"{block}.attn.probs"}.intersection(expected):
            found = ours.features(*arguments, taps=[last, "transformer_blocks.0"])
            assert set(found) == {"transformer_blocks.0", last}
            torch.testing.assert_close(found[last], expected[last])
        with pytest.raises(Ran):                    # so it would have been noticed
            ours.features(*arguments, taps=[block, "out"])
        handle.remove()
    found = ours.features(*arguments, taps=["out", "transformer_blocks.1.context", "out", "transformer_blocks.0"])
    assert list(found) == ["transformer_blocks.0", "transformer_blocks.1.context", "out"]   # as executed, each once


@pytest.mark.parametrize(("taps", "sentence"), [
    ([], "no taps are given"),
    (["transformer_blocks.1", "transformer_blocks.7"], "unknown tap 'transformer_blocks.7'"),
    (["transformer_blocks.2.context"], "unknown tap 'transformer_blocks.2.context'"),       # the last block has none
    (["transformer_blocks.0.attn2.probs"], "unknown tap 'transformer_blocks.0.attn2.probs'"),
    ("out", "unknown tap 'o'"),
], ids=str)
def test_wrong_taps_are_one_sentence_before_anything_runs(taps, sentence):
    ours = MMDiT(CONFIGS[SMALL])
    with pytest.raises(ValueError, match=sentence) as caught:
        ours.features(None, None, None, None, taps=taps)
    assert "\n" not in str(caught.value) and "transformer_blocks.0" in str(caught.value)


def test_default_taps(shared):
    folder = shared / "data" / "checkpoints"
    for manifest in ("sd3_mmdit", "sd35_medium_mmdit", "ultraedit_freeform_mmdit"):
        config = MMDiTConfig.from_json((folder / f"{manifest}.config.json").read_text())
        assert default_taps(config) == tuple(f"transformer_blocks.{i}" for i in range(12, 23))
        assert len(tap_names(config)) == len(set(tap_names(config))) == 48
    assert default_taps(CONFIGS["SD3.5 medium, narrow"]) == ("transformer_blocks.2",)
    assert default_taps(CONFIGS["one block, patches of 3"]) == ("transformer_blocks.0",)
    for config in CONFIGS.values():
        assert set(default_taps(config)) <= set(tap_names(config))


# ------------------------------------------------------------------------------------------------ attention and memory

def their_maps(theirs, arguments):
    """Name of ours -> of softmax(q k^T / sqrt(d)) over both streams, the part in which image tokens look at text tokens.

    q and k are what hooks see in their attention, after its norms where it has them.
    """
    seen, found = {}, {}
    sources = {"to_q": "norm_q", "to_k": "norm_k", "add_q_proj": "norm_added_q", "add_k_proj": "norm_added_k"}
    for i, block in enumerate(theirs.transformer_blocks):
        for part, norm in sources.items():
            module = getattr(block.attn, part) if getattr(block.attn, norm) is None else getattr(block.attn, norm)

            def hook(module, args, out, key=(i, part)):
                seen[key] = out
            module.register_forward_hook(hook)
    output(theirs, *arguments)
    for i, block in enumerate(theirs.transformer_blocks):
        q, k_image, k_text = (x if x.ndim == 4 else torch.stack(x.chunk(block.attn.heads, -1), 1)
                              for x in (seen[i, part] for part in ("to_q", "to_k", "add_k_proj")))
        scores = [torch.einsum("bhid,bhjd->bhij", q, k) * (q.shape[-1] ** -0.5) for k in (k_text, k_image)]
        weights = [(each - scores[0].amax(-1, keepdim=True)).exp() for each in scores]
        found[f"transformer_blocks.{i}.attn.probs"] = weights[0] / sum(each.sum(-1, keepdim=True) for each in weights)
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_attention_maps_are_those_of_their_queries_and_keys(name):
    theirs = oracle(CONFIGS[name])
    ours, arguments = ours_like(theirs), inputs(theirs.config)
    expected = their_maps(theirs, arguments)
    found = ours.features(*arguments, taps=ours.probs_names)
    assert list(found) == list(ours.probs_names) == list(expected)
    for tap, probs in found.items():
        assert probs.shape == (2, ours.config.num_attention_heads, 24, 7)   # 3 x 8 patches, 7 words
        assert_close(probs, expected[tap])
        assert probs.sum(-1).max() < 1              # the rest went to the image
        assert probs.std() > 1e-3                   # far from uniform, or any order of tokens would do
        assert_gradients_close(probs, expected[tap], leaves(arguments))


@pytest.mark.parametrize("name", CONFIGS)
def test_wanted_maps_change_nothing_else(name):
    """Explicit and fused attention agree to rounding; what is not wanted is not yielded, and is the same to the bit."""
    ours = ours_like(oracle(CONFIGS[name]).double())
    arguments = inputs(ours.config, dtype=torch.float64)
    fused = dict(ours.walk(*arguments))
    explicit = list(ours.walk(*arguments, wanted=ours.probs_names))
    order = [tap for tap, _ in explicit]
    assert len(order) == len(set(order)) and set(order) == {*ours.tap_names, *ours.probs_names}
    for tap, x in explicit:
        if tap in fused:
            assert_close(x, fused[tap])
        else:                                       # each just before the output of its block
            assert order[order.index(tap) + 1] == tap.removesuffix(".attn.probs")
    assert_gradients_close(explicit[-1][1], fused["out"], leaves(arguments))
    last = ours.probs_names[-1]                     # one map leaves the blocks before it as they were
    for tap, x in ours.walk(*arguments, wanted=[last]):
        if tap == last:
            break
        assert torch.equal(x, fused[tap])


class Saved:
    """Counts what autograd keeps for the backward pass, as a context manager: how many tensors, and their elements."""

    def __init__(self):
        self.count = self.elements = 0
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda tensor: tensor)

    def pack(self, tensor):
        self.count, self.elements = self.count + 1, self.elements + tensor.numel()
        return tensor

    def __enter__(self):
        self.hooks.__enter__()
        return self

    def __exit__(self, *error):
        self.hooks.__exit__(*error)


@pytest.mark.parametrize("name", CONFIGS)
def test_checkpointing_saves_less_and_changes_nothing(name):
    ours = ours_like(oracle(CONFIGS[name]))
    arguments = inputs(ours.config)
    taps = (ours.tap_names[0], ours.probs_names[-1], "out")
    with Saved() as plain:
        expected = ours.features(*arguments, taps=taps)
    ran = []
    for block in ours.transformer_blocks:
        block.register_forward_pre_hook(lambda *_: ran.append(True))
    ours.checkpointing = True
    with Saved() as checkpointed:
        found = ours.features(*arguments, taps=taps)
    depth = ours.config.num_layers
    assert checkpointed.count < plain.count and checkpointed.elements < plain.elements
    # A block keeps its arguments, and what in training its modulation is made of; the rest is before and after them.
    assert checkpointed.count <= 9 * depth + 40
    assert len(ran) == depth
    for tap in taps:
        assert torch.equal(found[tap], expected[tap])
        assert_gradients_close(found[tap], expected[tap], leaves(arguments))
    assert len(ran) > depth                         # run again, in the backward pass
    for network in (ours, ours_like(oracle(CONFIGS[name]))):
        network.zero_grad()
        network(*arguments).square().sum().backward()
    for mine, other in zip(ours.parameters(), network.parameters(), strict=True):
        assert torch.equal(mine.grad, other.grad)
    with torch.no_grad():                           # nothing to recompute
        ran.clear()
        assert_close(ours(*arguments), expected["out"])
        assert len(ran) == depth


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["SD3.5 medium, narrow", SMALL])
def test_prepared_values_are_computed_once_and_unchanged(name, checkpointing):
    ours = ours_like(oracle(CONFIGS[name])).requires_grad_(False)
    ours.checkpointing = checkpointing
    latent, timestep, context, pooled = inputs(ours.config)
    context, pooled = context.detach()[:1], pooled.detach()[:1]             # one text for a batch
    taps = [*ours.tap_names, *ours.probs_names]
    expected = ours.features(latent, timestep, context, pooled, taps=taps)
    times, text = ours.prepare_timestep(timestep, pooled), ours.prepare_context(context)
    ran = []
    for part in (ours.time_text_embed, ours.context_embedder, *(m for m in ours.modules() if isinstance(m, mmdit.Modulation))):
        part.register_forward_pre_hook(lambda module, _: ran.append(module))
    for _ in range(2):
        found = ours.features(latent, times, text, taps=taps)
        assert all(torch.equal(found[tap], expected[tap]) for tap in taps)
        assert torch.equal(*(torch.autograd.grad(each["out"].square().sum(), latent, retain_graph=True)[0]
                             for each in (found, expected)))
    assert ran.count(ours.norm_out) == 2 and len(set(ran)) == len(ran) - 1 == 2 * ours.config.num_layers + 1
    assert_close(ours(latent, times, context), expected["out"])             # each of the two by itself
    assert_close(ours(latent, timestep, text, pooled), expected["out"])


def test_values_that_need_a_gradient_are_not_prepared():
    ours, (_, timestep, context, pooled) = ours_like(oracle(CONFIGS[SMALL])), inputs(CONFIGS[SMALL])
    for frozen, last in ((False, context.detach()), (True, context)):
        ours.requires_grad_(not frozen)
        with pytest.raises(ValueError, match="freeze the network's weights and detach the text"):
            ours.prepare_context(last)
    with pytest.raises(ValueError, match="detach the text"):
        ours.prepare_timestep(timestep, pooled)
    assert ours.prepare_timestep(timestep, pooled.detach())


# --------------------------------------------------------------------------------------------- the published file, dtype

@pytest.mark.parametrize(("manifest", "parameters"), [
    ("sd3_mmdit", 2_028_328_000), ("sd35_medium_mmdit", 2_243_171_520),
    ("ultraedit_freeform_mmdit", 2_028_328_000 + 98_304), ("ultraedit_w_mask_mmdit", 2_028_328_000 + 196_608)])
def test_published_names_and_shapes(manifest, parameters, shared):
    folder = shared / "data" / "checkpoints"
    published = json.loads((folder / f"{manifest}.keys.json").read_text())
    with torch.device("meta"):
        network = MMDiT(MMDiTConfig.from_json((folder / f"{manifest}.config.json").read_text()))
    assert {name: list(tensor.shape) for name, tensor in network.state_dict().items()} == published
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters
    assert [name for name, _ in network.named_buffers()] == ["pos_embed.pos_embed"]         # and that one is in the file


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_weights_decide_the_dtype(dtype, checkpointing):
    ours = ours_like(oracle(CONFIGS["SD3.5 medium, narrow"])).to(dtype)
    ours.checkpointing = checkpointing
    arguments = inputs(ours.config, dtype=dtype)
    assert all(x.dtype == dtype for _, x in ours.walk(*arguments, wanted=ours.probs_names))
    assert all(gradient.dtype == dtype for gradient in gradients(ours(*arguments), leaves(arguments)))


@pytest.mark.parametrize("name", CONFIGS)
def test_bfloat16_stays_close(name):
    """As close to single precision as diffusers' network in bfloat16 is."""
    theirs = oracle(CONFIGS[name])
    arguments = [x.detach() for x in inputs(theirs.config)]
    rounded = [arguments[0].bfloat16(), arguments[1], *(x.bfloat16() for x in arguments[2:])]
    with torch.no_grad():
        exact = output(theirs, *arguments)
        pair = ours_like(theirs).bfloat16()(*rounded), output(theirs.bfloat16(), *rounded)
        ours, theirs = (y.float() - exact for y in pair)
    assert theirs.norm() <= 0.05 * exact.norm()
    assert ours.norm() <= 1.5 * theirs.norm()


def test_memory_format_does_not_matter():
    theirs = oracle(CONFIGS["SD3, narrow"])
    latent, *others = inputs(theirs.config)
    ours = ours_like(theirs).to(memory_format=torch.channels_last)
    assert_close(ours(latent.to(memory_format=torch.channels_last), *others), output(theirs, latent, *others))


@pytest.mark.parametrize(("size", "named"), [
    ((8, 7), "8 x 7"), ((9, 8), "9 x 8"), ((1, 8), "1 x 8"),                # no multiples of the patch
    ((26, 8), "26 x 8"), ((8, 26), "8 x 26"),                               # larger than the table of 12 patches
])
def test_a_latent_that_does_not_fit_is_refused(size, named):
    ours = MMDiT(CONFIGS["SD3, narrow"])
    _, *others = inputs(ours.config)
    with pytest.raises(ValueError, match=f"a latent of {named} does not fit: .* multiples of 2, up to 24$"):
        ours(torch.zeros(2, 16, *size), *others)


# --------------------------------------------------------------------------------------------------------------- config

@pytest.mark.parametrize("name", CONFIGS)
def test_reads_what_save_pretrained_writes(name, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    theirs = oracle(CONFIGS[name])
    theirs.save_pretrained(tmp_path)
    ours = MMDiT(MMDiTConfig.from_json((tmp_path / "config.json").read_text()))
    assert ours.config == CONFIGS[name]
    ours.load_state_dict(safetensors.load_file(tmp_path / "diffusion_pytorch_model.safetensors"))
    arguments = inputs(ours.config)
    assert_close(ours(*arguments), output(theirs, *arguments))


def test_every_option_of_theirs_is_decided_on():
    options = inspect.signature(diffusers.SD3Transformer2DModel.__init__).parameters
    options = {name: option.default for name, option in options.items() if name != "self"}
    ours = {field.name for field in fields(MMDiTConfig)}
    harmless = mmdit.HARMLESS.keys() - EMA.keys()
    assert options.keys() == ours | harmless and not ours & harmless
    made = MMDiTConfig.from_json(json.dumps(options))
    assert asdict(made) == {key: options[key] for key in ours}
    needed = {field.name: options[field.name] for field in fields(MMDiTConfig) if field.default is MISSING}
    assert MMDiTConfig.from_json(json.dumps(needed)) == made                # our defaults are theirs
