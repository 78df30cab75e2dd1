"""The FLUX transformers against diffusers' on random weights, and against the published names and shapes."""

import inspect
import json
from dataclasses import asdict, fields
from functools import partial

import parity
import pytest
import torch
import torch.nn.functional as F
from faults import Wrong
from parity import gradients, varied
from test_mmdit import Saved

from sifm_min.models import flux, modulation
from sifm_min.models.config import EMA
from sifm_min.models.flux import Flux1, Flux1Config, Flux2, Flux2Config, default_taps, tap_names

diffusers = pytest.importorskip("diffusers", reason="the oracle, diffusers, is not installed")

SMALL = {"num_layers": 2, "num_single_layers": 3, "num_attention_heads": 2, "attention_head_dim": 12}
CONFIGS = {
    "Kontext, narrow": Flux1Config(**SMALL | {"num_attention_heads": 4}, joint_attention_dim=20, pooled_projection_dim=10,
                                   in_channels=16, out_channels=16, guidance_embeds=True, axes_dims_rope=(4, 4, 4)),
    "FLUX.1 schnell, uneven axes": Flux1Config(**SMALL, joint_attention_dim=9, pooled_projection_dim=7, in_channels=8,
                                               out_channels=6, axes_dims_rope=(2, 4, 6)),
    "FLUX.1, one block of each": Flux1Config(num_layers=1, num_single_layers=1, num_attention_heads=3, attention_head_dim=8,
                                             joint_attention_dim=6, pooled_projection_dim=5, in_channels=4, out_channels=4,
                                             guidance_embeds=True, axes_dims_rope=(4, 2, 2)),
    "klein, narrow": Flux2Config(**SMALL | {"attention_head_dim": 16}, joint_attention_dim=24, in_channels=16, out_channels=16,
                                 guidance_embeds=False, axes_dims_rope=(4, 4, 4, 4)),
    "FLUX.2 [dev], uneven axes": Flux2Config(**SMALL, joint_attention_dim=10, in_channels=8, out_channels=5, mlp_ratio=2.5,
                                             axes_dims_rope=(2, 4, 4, 2), rope_theta=500, timestep_guidance_channels=32),
    "FLUX.2, one block of each": Flux2Config(num_layers=1, num_single_layers=1, num_attention_heads=3, attention_head_dim=8,
                                             joint_attention_dim=6, in_channels=4, out_channels=4, guidance_embeds=False,
                                             axes_dims_rope=(2, 2, 2, 2)),
}
BOTH = ("Kontext, narrow", "klein, narrow")
GRIDS = {"square": ((3, 3), (3, 3)), "wide, another reference": ((2, 5), (4, 3)), "no picture": ((4, 2), None)}
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-6}       # of the largest value; the oracle rotates in float32
assert_close = partial(parity.assert_close, tolerance=TOLERANCE)
assert_gradients_close = partial(parity.assert_gradients_close, tolerance=TOLERANCE)


def is_flux1(config):
    return isinstance(config, Flux1Config)


def oracle(config, seed=0):
    """diffusers' network at random weights; no scale is one, no bias zero, and the attention is far from uniform."""
    torch.manual_seed(seed)
    network = getattr(diffusers, "FluxTransformer2DModel" if is_flux1(config) else "Flux2Transformer2DModel")(**asdict(config))
    return varied(network, ("to_q", "to_k", "add_q", "add_k", "norm1", "norm.", "norm_out", "modulation"))


def ours_like(theirs):
    kind = Flux1 if type(theirs).__name__ == "FluxTransformer2DModel" else Flux2
    network = kind(kind.Config.from_json(theirs.to_json_string())).to(theirs.dtype)
    network.load_state_dict(theirs.state_dict())
    return network.eval()


def inputs(config, grids="wide, another reference", batch=2, dtype=torch.float32):
    """The arguments of our networks; those with a gradient are leaves."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(batch, *shape, generator=generator, dtype=dtype).requires_grad_()

    target, reference = GRIDS[grids]
    arguments = {"noisy_latent": draw(config.in_channels, *target),
                 "reference": draw(config.in_channels, *reference) if reference else None,
                 "timestep": torch.tensor([999.5, 421, 3, 77][:batch]), "context": draw(7, config.joint_attention_dim)}
    if is_flux1(config):
        arguments["pooled"] = draw(config.pooled_projection_dim)
    if config.guidance_embeds:
        arguments["guidance"] = torch.tensor([2.5, 3.75, 1, 8][:batch])
    return arguments


def output(theirs, noisy_latent, reference, timestep, context, pooled=None, guidance=None):
    """Their velocity at the target, called as their pipelines do."""
    def tokens(latent):
        return latent.flatten(2).transpose(1, 2)

    def ids(first, rows, columns):
        return torch.tensor([[first, i, j, 0] for i in range(rows) for j in range(columns)])

    flux1, rows, columns = pooled is not None, *noisy_latent.shape[-2:]
    pictures, places = [tokens(noisy_latent)], [ids(0, rows, columns)]
    if reference is not None:
        pictures.append(tokens(reference))
        places.append(ids(1 if flux1 else 10, *reference.shape[-2:]))
    length = context.shape[1]
    text = torch.zeros(length, 3) if flux1 else torch.tensor([[0, 0, 0, i] for i in range(length)])
    places = torch.cat(places)[:, :3] if flux1 else torch.cat(places)
    more = {"pooled_projections": pooled} if flux1 else {}
    out = theirs(hidden_states=torch.cat(pictures, 1), encoder_hidden_states=context, timestep=timestep / 1000,
                 guidance=guidance, img_ids=places.float(), txt_ids=text.float(), **more).sample
    return out[:, :rows * columns].transpose(1, 2).unflatten(2, (rows, columns))


def leaves(arguments):
    return [x for x in arguments.values() if x is not None and x.requires_grad]


def assert_parity(ours, theirs, config, grids="wide, another reference"):
    """The velocities agree, and so do the gradients at the latent, the reference, the context and the pooled text."""
    arguments = inputs(config, grids, dtype=theirs.dtype)
    pair = ours(**arguments), output(theirs, **arguments)
    assert_close(*pair)
    assert None not in gradients(pair[1], leaves(arguments))
    assert_gradients_close(*pair, leaves(arguments))


@pytest.mark.parametrize("grids", GRIDS)
@pytest.mark.parametrize("name", CONFIGS)
def test_parity_with_diffusers(name, grids):
    theirs = oracle(CONFIGS[name])
    assert_parity(ours_like(theirs), theirs, CONFIGS[name], grids)


@pytest.mark.parametrize("name", BOTH)
def test_no_picture_is_no_tokens_and_zeros_are_a_picture(name):
    ours = ours_like(oracle(CONFIGS[name]))
    arguments = inputs(CONFIGS[name], "no picture")
    black = torch.zeros_like(arguments["noisy_latent"])
    assert (ours(**arguments) - ours(**arguments | {"reference": black})).abs().max() > 1e-3


@pytest.mark.parametrize("name", BOTH)
def test_one_text_and_one_reference_serve_a_batch(name):
    ours = ours_like(oracle(CONFIGS[name]).double())
    arguments = inputs(CONFIGS[name], batch=3, dtype=torch.float64)
    one = arguments | {key: arguments[key][:1] for key in ("reference", "context", "pooled", "guidance") if key in arguments}
    many = one | {key: one[key].expand(3, *one[key].shape[1:]) for key in one if key not in ("noisy_latent", "timestep")}
    assert_close(ours(**one), ours(**many))
    for when in (421, 421.0, torch.tensor(421.0)):
        assert_close(ours(**one | {"timestep": when}), ours(**many | {"timestep": torch.full((3,), 421.0)}))


# ------------------------------------------------------------------------------------------------- faults must be seen

def mean_of_both(q, k, v, places, want_probs, want_mass):
    """Attention without rotation."""
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2), None, None


def swapped(function):
    return lambda *arguments: function(*arguments)[::-1]


def halves(x, places):
    first, second = x.chunk(2, -1)
    return torch.cat([first * places.cos - second * places.sin, second * places.cos + first * places.sin], -1)


FAULTS = {                                          # each is one plausible mistake: where, what, and its wrong value
    "another epsilon": (modulation, "NORM_EPS", 1e-4),
    "no rotation": (flux, "attend", mean_of_both),
    "rotation of halves": (flux, "rotated", halves),
    "sines for cosines": (flux, "rotation", swapped(flux.rotation)),
    "the reference at the target's place": (Flux1Config, "REFERENCE", 0),
    "the reference of FLUX.2 at 1": (Flux2Config, "REFERENCE", 1),
    "text that counts in FLUX.1": (Flux1Config, "TEXT_COUNTS", True),
    "text at the origin in FLUX.2": (Flux2Config, "TEXT_COUNTS", False),
    "the gate's other half": (flux, "gated_silu", lambda x: x.chunk(2, -1)[0] * F.silu(x.chunk(2, -1)[1])),
    "exact GELU": (flux, "F", Wrong(F, gelu=lambda x, approximate: F.gelu(x))),
    "unscaled attention": (flux, "F", Wrong(F, scaled_dot_product_attention=lambda q, k, v: (
        F.scaled_dot_product_attention(q, k, v, scale=1.0)))),
    "heads interleaved": (flux, "by_head", lambda tokens, config: (
        tokens.unflatten(-1, (-1, config.num_attention_heads)).permute(0, 3, 1, 2))),
    "scale and shift exchanged": (flux, "normed", lambda x, shift, scale: modulation.normed(x, scale, shift)),
}
OF_ONE = {"the reference at the target's place": BOTH[:1], "the reference of FLUX.2 at 1": BOTH[1:], "exact GELU": BOTH[:1],
          "text that counts in FLUX.1": BOTH[:1], "text at the origin in FLUX.2": BOTH[1:], "the gate's other half": BOTH[1:]}


@pytest.mark.parametrize("fault", FAULTS)
def test_parity_sees(fault, monkeypatch):
    """The comparison above is worth something only if it fails on a wrong network."""
    right = {name: oracle(CONFIGS[name]) for name in OF_ONE.get(fault, BOTH)}
    monkeypatch.setattr(*FAULTS[fault])
    for name, theirs in right.items():
        with pytest.raises(AssertionError):
            assert_parity(ours_like(theirs), theirs, CONFIGS[name])


# ----------------------------------------------------------------------------------------------------------------- taps

def their_taps(theirs, arguments):
    """Name of ours -> what a hook on their module of that path sees."""
    seen, flux1 = {}, "pooled" in arguments
    target, length = arguments["noisy_latent"].shape[-2:].numel(), arguments["context"].shape[1]

    def keep(tap, text, pictures):
        seen.update({tap: pictures[:, :target], f"{tap}.reference": pictures[:, target:], f"{tap}.context": text})

    for kind in ("transformer_blocks", "single_transformer_blocks"):
        for i, block in enumerate(getattr(theirs, kind)):
            def hook(module, args, out, tap=f"{kind}.{i}"):
                keep(tap, *(out if isinstance(out, tuple) else (out[:, :length], out[:, length:])))
            block.register_forward_hook(hook)
    seen["out"] = output(theirs, **arguments)
    assert flux1 == hasattr(theirs, "time_text_embed")
    return seen


@pytest.mark.parametrize("name", CONFIGS)
def test_every_tap_is_what_a_hook_of_that_name_sees(name):
    theirs = oracle(CONFIGS[name])
    ours, arguments = ours_like(theirs), inputs(CONFIGS[name])
    expected = their_taps(theirs, arguments)
    found = ours.features(**arguments, taps=ours.tap_names)
    assert list(found) == list(ours.tap_names) == list(expected) == list(tap_names(CONFIGS[name]))
    for tap, activation in found.items():
        assert_close(activation, expected[tap])
        assert_gradients_close(activation, expected[tap], leaves(arguments))        # live: the gradient arrives at the input


@pytest.mark.parametrize("name", BOTH)
def test_features_stop_after_the_last_tap(name):
    ours, arguments = ours_like(oracle(CONFIGS[name])), inputs(CONFIGS[name])
    expected = dict(ours.walk(**arguments, wanted=[*ours.probs_names, *ours.mass_names]))
    blocks = {f"{kind}.{i}": block for kind in ("transformer_blocks", "single_transformer_blocks")
              for i, block in enumerate(getattr(ours, kind))}

    class Ran(Exception):
        pass

    def raises(*_):
        raise Ran

    for block, after in zip(blocks, [*list(blocks.values())[1:], ours.norm_out], strict=True):
        handle = after.register_forward_pre_hook(raises)
        for end in ("", ".reference", ".context", ".attn.probs", ".attn.mass"):
            last = f"{block}{end}"
            found = ours.features(**arguments, taps=[last, "transformer_blocks.0"])
            assert set(found) == {"transformer_blocks.0", last}
            torch.testing.assert_close(found[last], expected[last])
        with pytest.raises(Ran):                    # so it would have been noticed
            ours.features(**arguments, taps=[block, "out"])
        handle.remove()


@pytest.mark.parametrize(("taps", "reference", "sentence"), [
    ([], 1, "no taps are given"),
    (["transformer_blocks.9"], 1, "unknown tap 'transformer_blocks.9'"),
    (["single_transformer_blocks.0.reference"], None, "'single_transformer_blocks.0.reference' is of a reference picture"),
    (["transformer_blocks.0.attn.mass"], None, "'transformer_blocks.0.attn.mass' is of a reference picture"),
], ids=str)
def test_wrong_taps_are_one_sentence_before_anything_runs(taps, reference, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        Flux2(CONFIGS["klein, narrow"]).features(None, reference, None, None, taps=taps)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("absent", "sentence"), [("guidance", "takes a guidance"), ("pooled", "takes a pooled text")])
def test_an_absent_input_is_one_sentence(absent, sentence):
    config = CONFIGS["Kontext, narrow"]
    with pytest.raises(ValueError, match=sentence):
        Flux1(config)(**inputs(config) | {absent: None})


def test_default_taps(shared):
    for (kind, manifest), blocks in zip(MANIFESTS, ((9, 12, 15, 18, 21, 24, 27, 30), (5, 8, 11, 14)), strict=True):
        config = kind.Config.from_json((shared / "data" / "checkpoints" / f"{manifest}.config.json").read_text())
        assert default_taps(config) == tuple(f"single_transformer_blocks.{i}" for i in blocks)
    for config in CONFIGS.values():
        assert default_taps(config) and set(default_taps(config)) <= set(tap_names(config))


# ------------------------------------------------------------------------------------------------ attention and memory

def explicit_maps(ours, arguments):
    """Block -> softmax(q k^T / sqrt(d)) of all tokens, from what the fused attention was given: (B, heads, N, N)."""
    seen = []

    def record(q, k, v):
        seen.append((q, k))
        return F.scaled_dot_product_attention(q, k, v)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flux, "F", Wrong(F, scaled_dot_product_attention=record))
        ours(**arguments)
    scores = [torch.einsum("bhid,bhjd->bhij", q, k) / q.shape[-1] ** 0.5 for q, k in seen]
    weights = [(score - score.amax(-1, keepdim=True)).exp() for score in scores]
    return dict(zip([name.removesuffix(".attn.mass") for name in ours.mass_names],
                    (weight / weight.sum(-1, keepdim=True) for weight in weights), strict=True))


@pytest.mark.parametrize("name", CONFIGS)
def test_context_mass_and_maps_are_the_explicit_attention(name):
    ours = ours_like(oracle(CONFIGS[name])).double()
    arguments = inputs(CONFIGS[name], dtype=torch.float64)
    text, target = 7, 10
    expected = explicit_maps(ours, arguments)
    found = ours.features(**arguments, taps=[*ours.probs_names, *ours.mass_names])
    for block, probs in expected.items():
        rows = probs[:, :, text:text + target]
        torch.testing.assert_close(found[f"{block}.attn.probs"], rows[..., :text], rtol=0, atol=1e-12)
        mass = rows[..., text + target:].sum(-1).mean((1, 2))
        torch.testing.assert_close(found[f"{block}.attn.mass"], mass, rtol=0, atol=1e-12)
        assert mass.std() > 1e-5 and rows.std() > 1e-2                      # far from uniform
        pair = (gradients(y, leaves(arguments)) for y in (found[f"{block}.attn.mass"], mass))
        for mine, other in zip(*pair, strict=True):
            assert (mine is None) == (other is None)
            if other is not None:
                torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("name", BOTH)
def test_wanted_maps_change_nothing_else(name):
    ours, arguments = ours_like(oracle(CONFIGS[name])), inputs(CONFIGS[name])
    plain = dict(ours.walk(**arguments))
    more = dict(ours.walk(**arguments, wanted=[*ours.probs_names, *ours.mass_names]))
    assert set(more) == {*ours.tap_names, *ours.probs_names, *ours.mass_names} and tuple(plain) == ours.tap_names
    assert all(torch.equal(more[tap], plain[tap]) for tap in plain)


@pytest.mark.parametrize("name", BOTH)
def test_checkpointing_saves_less_and_changes_nothing(name):
    ours, arguments = ours_like(oracle(CONFIGS[name])).requires_grad_(False), inputs(CONFIGS[name])
    taps = (ours.tap_names[0], ours.probs_names[1], ours.mass_names[-1], "out")
    with Saved() as plain:
        expected = ours.features(**arguments, taps=taps)
    ours.checkpointing = True
    with Saved() as checkpointed:
        found = ours.features(**arguments, taps=taps)
    assert checkpointed.elements < plain.elements / 3
    for tap in taps:
        assert torch.equal(found[tap], expected[tap])
        assert_gradients_close(found[tap], expected[tap], leaves(arguments))


@pytest.mark.parametrize("name", CONFIGS)
def test_prepared_values_are_computed_once_and_unchanged(name):
    ours = ours_like(oracle(CONFIGS[name])).requires_grad_(False)
    arguments = {key: x.detach() if key != "noisy_latent" and x is not None else x for key, x in inputs(CONFIGS[name]).items()}
    expected = ours(**arguments)
    given = {key: arguments.pop(key) for key in ("pooled", "guidance") if key in arguments}
    prepared = arguments | {"timestep": ours.prepare_timestep(arguments["timestep"], **given),
                            "context": ours.prepare_context(arguments["context"])}
    ran = []
    for part in (ours.context_embedder, *(m for m in ours.modules() if isinstance(m, modulation.Modulation))):
        part.register_forward_pre_hook(lambda module, _: ran.append(module))
    for _ in range(2):
        assert torch.equal(ours(**prepared), expected)
    modulations = 3 if not is_flux1(CONFIGS[name]) else 2 * ours.config.num_layers + ours.config.num_single_layers
    assert ran.count(ours.norm_out) == 2 and len(set(ran)) == len(ran) - 1 == modulations + 1


# --------------------------------------------------------------------------------------------- the published file, dtype

MANIFESTS = [(Flux1, "flux_kontext_transformer"), (Flux2, "flux2_klein4b_transformer")]


@pytest.mark.parametrize(("kind", "manifest", "parameters"), [
    (*MANIFESTS[0], 11_901_408_320), (*MANIFESTS[1], 3_875_544_576)])
def test_published_names_and_shapes(kind, manifest, parameters, shared):
    folder = shared / "data" / "checkpoints"
    published = json.loads((folder / f"{manifest}.keys.json").read_text())
    with torch.device("meta"):
        network = kind(kind.Config.from_json((folder / f"{manifest}.config.json").read_text()))
    assert {name: list(tensor.shape) for name, tensor in network.state_dict().items()} == published
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters


@pytest.mark.parametrize("name", BOTH)
def test_bfloat16_stays_close(name):
    """As close to single precision as diffusers' network in bfloat16 is."""
    theirs = oracle(CONFIGS[name])
    arguments = {key: x if x is None or key in ("timestep", "guidance") else x.detach()
                 for key, x in inputs(CONFIGS[name]).items()}
    rounded = {key: x if x is None or key in ("timestep", "guidance") else x.bfloat16() for key, x in arguments.items()}
    with torch.no_grad():
        exact = output(theirs, **arguments)
        # Their pipelines round the timestep as well: 999.5 is 1000 in bfloat16.
        pair = (ours_like(theirs).bfloat16()(**rounded),
                output(theirs.bfloat16(), **rounded | {"timestep": rounded["timestep"].bfloat16()}))
        mine, others = (y.float() - exact for y in pair)
    assert others.norm() <= 0.2 * exact.norm()
    assert mine.norm() <= 1.5 * others.norm()
    assert (pair[0].float() - pair[1].float()).norm() <= others.norm()


@pytest.mark.parametrize("name", BOTH)
def test_float16_is_held_at_its_largest_number(name):
    """Of the text's tokens in double blocks and of all tokens in single ones, as in the published code."""
    ours, config = ours_like(oracle(CONFIGS[name])).half(), CONFIGS[name]
    generator = torch.Generator().manual_seed(0)
    x, context = (torch.randn(1, count, config.width, generator=generator).half() for count in (9, 7))
    places = flux.Places(*flux.rotation(config, flux.coordinates(config, 7, [(3, 3)], "cpu")), 7, 9)
    zero, large = torch.zeros(1, 1, config.width).half(), torch.full((1, 1, config.width), 6e4).half()
    with torch.no_grad():
        for parameter in (*ours.transformer_blocks[0].ff_context.parameters(), *ours.single_transformer_blocks[0].parameters()):
            parameter.mul_(8)
        quiet, loud = (zero, zero, zero, zero, zero, zero), (zero, zero, zero, zero, zero, large)
        text = ours.transformer_blocks[0](x, context, (quiet, loud), places)[1]
        tokens = ours.single_transformer_blocks[0](torch.cat([context, x], 1), (zero, zero, large), places)[0]
    for found in (text, tokens):
        assert found.abs().max() == 65504 and not found.isnan().any()


@pytest.mark.parametrize("name", CONFIGS)
def test_reads_what_save_pretrained_writes(name, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    theirs = oracle(CONFIGS[name])
    theirs.save_pretrained(tmp_path)
    kind = Flux1 if is_flux1(CONFIGS[name]) else Flux2
    ours = kind(kind.Config.from_json((tmp_path / "config.json").read_text()))
    assert ours.config == CONFIGS[name]
    ours.load_state_dict(safetensors.load_file(tmp_path / "diffusion_pytorch_model.safetensors"))


@pytest.mark.parametrize(("kind", "theirs"), [(Flux1, "FluxTransformer2DModel"), (Flux2, "Flux2Transformer2DModel")])
def test_every_option_of_theirs_is_decided_on(kind, theirs):
    options = inspect.signature(getattr(diffusers, theirs).__init__).parameters
    options = {name: option.default for name, option in options.items() if name != "self"}
    ours = {field.name for field in fields(kind.Config)}
    assert options.keys() - kind.Config.IMPLEMENTED.keys() - EMA.keys() == ours
    made = kind.Config.from_json(json.dumps(options))
    assert asdict(made) == {key: options[key] for key in ours} | {"out_channels": options["in_channels"]}
    assert kind.Config.from_json("{}") == made               # our defaults are theirs


@pytest.mark.parametrize(("kind", "given", "sentence"), [
    (Flux1, {"patch_size": 2}, "sets patch_size to 2; only 1 is implemented"),
    (Flux1, {"axes_dims_rope": [64, 64]}, r"sets axes_dims_rope to \[64, 64\], not to 3 even numbers with the sum"),
    (Flux2, {"axes_dims_rope": [31, 33, 32, 32]}, "not to 4 even numbers"),
    (Flux2, {"eps": 1e-5}, "sets eps to 1e-05"),
    (Flux2, {"pooled_projection_dim": 768}, "sets pooled_projection_dim, which the transformer here does not implement"),
    (Flux1, {"num_layers": 0}, "sets num_layers to 0"),
])
def test_config_that_is_not_implemented_is_refused(kind, given, sentence):
    with pytest.raises(ValueError, match=sentence):
        kind.Config.from_json(json.dumps(given))
