"""The U-Net against diffusers' UNet2DConditionModel on random weights, and against the published names and shapes."""

import inspect
import json
from dataclasses import asdict, fields, replace

import pytest
import torch
import torch.nn.functional as F
from faults import Wrong
from parity import assert_close, assert_gradients_close, gradients, varied
from torch import nn

from sifm_min.models import lean, unet
from sifm_min.models.config import EMA
from sifm_min.models.unet import UNet, UNetConfig, default_taps, tap_names

diffusers = pytest.importorskip("diffusers", reason="the oracle, diffusers, is not installed")

DOWN, CROSS_DOWN, UP, CROSS_UP = "DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"
CONFIGS = {
    "InstructPix2Pix, narrow": UNetConfig(
        block_out_channels=(16, 32, 64, 64), down_block_types=(CROSS_DOWN, CROSS_DOWN, CROSS_DOWN, DOWN),
        up_block_types=(UP, CROSS_UP, CROSS_UP, CROSS_UP), cross_attention_dim=24, in_channels=8, norm_num_groups=8),
    "miniature": UNetConfig(
        block_out_channels=(64, 96, 96), down_block_types=(DOWN, CROSS_DOWN, CROSS_DOWN),
        up_block_types=(CROSS_UP, CROSS_UP, UP), cross_attention_dim=96, in_channels=8, layers_per_block=1,
        attention_head_dim=4, norm_num_groups=8),
    "heads and depths per resolution, linear": UNetConfig(
        block_out_channels=(20, 40, 60), down_block_types=(CROSS_DOWN, DOWN, CROSS_DOWN),
        up_block_types=(CROSS_UP, UP, CROSS_UP), cross_attention_dim=12, layers_per_block=1,
        attention_head_dim=(2, 8, 3), transformer_layers_per_block=(1, 3, 2), use_linear_projection=True,
        norm_num_groups=4, norm_eps=1e-6),
    "sines first, attention going up only": UNetConfig(
        block_out_channels=(10, 24), down_block_types=(DOWN, DOWN), up_block_types=(CROSS_UP, UP),
        cross_attention_dim=8, in_channels=3, out_channels=5, layers_per_block=3, attention_head_dim=3,
        norm_num_groups=2, norm_eps=1e-3, flip_sin_to_cos=False, freq_shift=1),
    "one resolution": UNetConfig(
        block_out_channels=(8,), down_block_types=(CROSS_DOWN,), up_block_types=(UP,), cross_attention_dim=16,
        layers_per_block=1, attention_head_dim=2, norm_num_groups=4),
}
SMALL = "heads and depths per resolution, linear"   # small, and nothing in it is equal by accident
SIZES = {"even": (16, 8), "odd": (11, 13)}


def oracle(config: UNetConfig, seed: int = 0):
    """diffusers' network at random weights; no scale is one, no bias zero, and the attention is far from uniform."""
    torch.manual_seed(seed)
    network = diffusers.UNet2DConditionModel(**asdict(config))
    return varied(network)


def ours_like(theirs, **changes) -> UNet:
    config = UNetConfig.from_json(theirs.to_json_string())
    network = UNet(replace(config, **changes)).to(theirs.dtype)
    network.load_state_dict(theirs.state_dict())
    return network.eval()


def inputs(config, size=SIZES["even"], batch=2, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    latent = torch.randn(batch, config.in_channels, *size, generator=generator, dtype=dtype)
    context = torch.randn(batch, 7, config.cross_attention_dim, generator=generator, dtype=dtype)
    return latent.requires_grad_(), torch.tensor([999, 421, 3, 77][:batch]), context.requires_grad_()


def assert_parity(ours, theirs, size=SIZES["even"]):
    """The predictions agree, and so do the gradients at the latent and at the context."""
    latent, timestep, context = inputs(theirs.config, size, dtype=theirs.dtype)
    pair = ours(latent, timestep, context), theirs(latent, timestep, context).sample
    assert_close(*pair)
    assert None not in gradients(pair[1], (latent, context))
    assert_gradients_close(*pair, (latent, context))


@pytest.mark.slow
@pytest.mark.parametrize(("size", "dtype"), [("even", torch.float32), ("odd", torch.float32), ("odd", torch.float64)],
                         ids=["even", "odd", "double"])
@pytest.mark.parametrize("name", CONFIGS)
def test_parity_with_diffusers(name, size, dtype):
    theirs = oracle(CONFIGS[name]).to(dtype)
    assert_parity(ours_like(theirs), theirs, SIZES[size])


@pytest.mark.slow
def test_timesteps_of_every_form():
    theirs = oracle(CONFIGS[SMALL])
    ours = ours_like(theirs)
    latent, _, context = (x.detach() for x in inputs(theirs.config))
    for timestep in (981, 0, 12.5, torch.tensor(981), torch.tensor(12.5), torch.tensor([981]), torch.tensor([981, 12]),
                     torch.tensor([0.25, 999.75], dtype=torch.float64)):
        assert_close(ours(latent, timestep, context), theirs(latent, timestep, context).sample)


def test_weights_get_their_gradients():
    theirs = oracle(CONFIGS["miniature"])
    ours = ours_like(theirs)
    for network, prediction in ((ours, ours(*inputs(ours.config))), (theirs, theirs(*inputs(ours.config)).sample)):
        network.zero_grad()
        prediction.square().mean().backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert_close(parameter.grad, expected[name].grad)


def test_one_text_serves_a_batch_of_timesteps():
    ours = ours_like(oracle(CONFIGS[SMALL]))
    latent, timestep, context = inputs(ours.config)
    one = context[:1].detach().requires_grad_()
    many = one.detach().repeat(2, 1, 1).requires_grad_()
    short, long = ours(latent, timestep, one), ours(latent, timestep, many)
    assert_close(short, long)
    short.square().sum().backward()
    long.square().sum().backward()
    assert_close(one.grad, many.grad.sum(0, keepdim=True))


# ------------------------------------------------------------------------------------------------- faults must be seen

def halves_swapped(self, x):
    gate, x = self.proj(x).chunk(2, dim=-1)
    return x * F.gelu(gate)


def not_normed_for_text(self, x, text, want_probs=False):
    y = self.norm1(x)
    x = x + self.attn1(y, self.attn1.keys_values(y))[0]
    seen, probs = self.attn2(x, text, want_probs=want_probs)
    x = x + seen
    return x + self.ff(self.norm3(x)), probs


def skips_first(parts, dim):
    same = len(parts) == 2 and parts[0].ndim == 4 and parts[0].shape == parts[1].shape
    return torch.cat(parts[::-1] if same else parts, dim=dim)


FAULTS = {                                          # each is one plausible mistake: where, what, and its wrong value
    "the transformer's epsilon": (unet, "TRANSFORMER_NORM_EPS", 1e-5),
    "another activation": (unet, "F", Wrong(F, silu=F.gelu)),
    "activation of the residual blocks": (lean.NormSiLU, "forward", lambda self, x: F.gelu(nn.GroupNorm.forward(self, x))),
    "approximate GELU": (lean, "F", Wrong(F, gelu=lambda x: F.gelu(x, approximate="tanh"))),
    "halves of the gate swapped": (unet.GEGLU, "forward", halves_swapped),
    "a norm forgotten": (unet.TransformerBlock, "forward", not_normed_for_text),
    "unscaled attention": (unet, "F", Wrong(F, scaled_dot_product_attention=lambda q, k, v: (
        F.scaled_dot_product_attention(q, k, v, scale=1.0)))),
    "values for keys": (unet.Attention, "keys_values", lambda self, context: (
        self.split(self.to_v(context)), self.split(self.to_k(context)))),
    "heads interleaved": (unet.Attention, "split", lambda self, tokens: (
        tokens.unflatten(-1, (-1, self.heads)).permute(0, 3, 1, 2))),
    "bilinear upsampling": (unet.Upsample, "forward", lambda self, x, size: (
        self.conv(F.interpolate(x, size=size, mode="bilinear")))),
    "one-sided padding": (unet.Downsample, "forward", lambda self, x: (
        F.conv2d(F.pad(x, (0, 1, 0, 1)), self.conv.weight, self.conv.bias, stride=2))),
    "skips before features": (unet, "torch", Wrong(torch, cat=skips_first)),
    "frequencies in double": (unet, "torch", Wrong(torch, arange=lambda n, dtype, device: (
        torch.arange(n, dtype=torch.float64, device=device)))),
}
WRONG_CONFIGS = [{"flip_sin_to_cos": False}, {"freq_shift": 1}, {"norm_eps": 1e-5}, {"norm_num_groups": 2},
                 {"attention_head_dim": (4, 8, 3)}, {"attention_head_dim": (2, 8, 6)}]


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_parity_sees(fault, monkeypatch):
    """The comparison above is worth something only if it fails on a wrong network."""
    theirs = oracle(CONFIGS[SMALL]).double()
    assert_parity(ours_like(theirs), theirs)
    monkeypatch.setattr(*FAULTS[fault])
    with pytest.raises(AssertionError):
        assert_parity(ours_like(theirs), theirs)


@pytest.mark.slow
@pytest.mark.parametrize("changes", WRONG_CONFIGS, ids=str)
def test_parity_sees_a_wrong_config(changes):
    theirs = oracle(CONFIGS[SMALL])                 # in float32: these are seen by far
    with pytest.raises(AssertionError):
        assert_parity(ours_like(theirs, **changes), theirs)


# ----------------------------------------------------------------------------------------------------------------- taps

@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", CONFIGS)
def test_every_tap_is_what_a_hook_of_that_name_sees(name, size):
    theirs = oracle(CONFIGS[name])
    ours = ours_like(theirs)
    seen, latent_etc = {}, inputs(theirs.config, SIZES[size])
    for tap in ours.tap_names:
        def hook(module, args, out, tap=tap):
            seen[tap] = out[0] if isinstance(out, tuple) else out           # theirs: attentions return tuples
        theirs.get_submodule("conv_out" if tap == "out" else tap).register_forward_hook(hook)
    theirs(*latent_etc)
    found = ours.features(*latent_etc, taps=ours.tap_names)
    assert list(found) == list(ours.tap_names)
    for tap, activation in found.items():
        assert_close(activation, seen[tap])
    for tap in ("mid_block", ours.tap_names[-3]):   # live: the gradient arrives at the input, and it is theirs
        mine, other = (torch.autograd.grad(each[tap].square().sum(), latent_etc[0], retain_graph=True)[0]
                       for each in (found, seen))
        assert other.abs().max() > 0
        assert_close(mine, other)


@pytest.mark.parametrize("name", CONFIGS)
def test_tap_names_are_what_walk_yields_and_walk_leaves_it_alone(name):
    ours = UNet(CONFIGS[name])
    arguments = [x.detach() for x in inputs(ours.config)]
    before = [x.clone() for x in arguments]
    with torch.no_grad():                           # where an operation in place would raise no error
        yielded = [(tap, x, x.clone()) for tap, x in ours.walk(*arguments)]
        prediction = ours(*arguments)
    assert tuple(tap for tap, _, _ in yielded) == ours.tap_names == tap_names(ours.config)
    assert all(torch.equal(x, copy) for _, x, copy in yielded)
    assert all(torch.equal(x, copy) for x, copy in zip(arguments, before, strict=True))
    assert yielded[-1][0] == "out" and torch.equal(yielded[-1][1], prediction)


@pytest.mark.slow
def test_features_stop_after_the_last_tap():
    ours = UNet(CONFIGS["miniature"])
    arguments = inputs(ours.config, (4, 4))
    expected = dict(ours.walk(*arguments))
    names = [tap for tap in ours.tap_names if tap != "mid_block"]           # a container: nothing of its own runs

    class Ran(Exception):
        pass

    def raises(*_):
        raise Ran

    for last, after in zip(names, names[1:], strict=False):
        handle = ours.get_submodule("conv_out" if after == "out" else after).register_forward_pre_hook(raises)
        found = ours.features(*arguments, taps=[last, "conv_in"])
        assert list(found) == list(dict.fromkeys(["conv_in", last]))        # in execution order, each once
        assert torch.equal(found[last], expected[last])
        with pytest.raises(Ran):                    # so it would have been noticed
            ours.features(*arguments, taps=[after])
        handle.remove()
    assert ours.features(*arguments, taps=["mid_block"])["mid_block"].equal(expected["mid_block.resnets.1"])


@pytest.mark.parametrize(("taps", "sentence"), [
    ([], "no taps are given"),
    (["mid_block", "up_blocks.7"], "unknown tap 'up_blocks.7'"),
    (["mid_block.resnets.2"], "unknown tap 'mid_block.resnets.2'"),
    ("mid_block", "unknown tap '_'"),
], ids=str)
def test_wrong_taps_are_one_sentence_before_anything_runs(taps, sentence):
    ours = UNet(CONFIGS[SMALL])
    with pytest.raises(ValueError, match=sentence) as caught:
        ours.features(None, None, None, taps=taps)
    assert "\n" not in str(caught.value) and "conv_in" in str(caught.value)


# ------------------------------------------------------------------------------------------------------- attention maps

def their_maps(theirs, arguments):
    """Name of ours -> softmax(q k^T / sqrt(d)) of the queries and keys that hooks see in their attn2."""
    seen, found = {}, {}
    for name, module in theirs.named_modules():
        if name.endswith("attn2"):
            for part in ("to_q", "to_k"):
                def hook(module, args, out, key=(name, part)):
                    seen[key] = out
                getattr(module, part).register_forward_hook(hook)
    theirs(*arguments)
    for name, module in theirs.named_modules():
        if name.endswith("attn2"):
            q, k = (torch.stack(seen[name, part].chunk(module.heads, -1), 1) for part in ("to_q", "to_k"))
            scores = torch.einsum("bhid,bhjd->bhij", q, k) * (q.shape[-1] ** -0.5)
            weights = (scores - scores.amax(-1, keepdim=True)).exp()
            found[f"{name}.probs"] = weights / weights.sum(-1, keepdim=True)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_attention_maps_are_those_of_their_queries_and_keys(name):
    theirs = oracle(CONFIGS[name])
    ours, arguments = ours_like(theirs), inputs(theirs.config, SIZES["odd"])
    expected = their_maps(theirs, arguments)
    found = ours.features(*arguments, taps=ours.probs_names)
    assert list(found) == list(ours.probs_names)
    assert found.keys() == expected.keys() and not set(found) & set(ours.tap_names)
    for tap, probs in found.items():
        assert_close(probs, expected[tap])
        torch.testing.assert_close(probs.sum(-1), torch.ones(probs.shape[:-1]))
        assert probs.std() > 1e-3                   # far from uniform, or any order of tokens would do
    last = ours.probs_names[-1]                     # live
    mine, other = (torch.autograd.grad(each[last][..., 2].square().sum(), arguments[0])[0] for each in (found, expected))
    assert other.abs().max() > 0
    assert_close(mine, other)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_wanted_maps_change_nothing_else(name):
    """Explicit and fused attention agree to rounding; what is not wanted is not yielded, and is the same to the bit."""
    theirs = oracle(CONFIGS[name]).double()
    ours, arguments = ours_like(theirs), inputs(theirs.config, dtype=torch.float64)
    fused = dict(ours.walk(*arguments))
    assert tuple(fused) == ours.tap_names
    explicit = list(ours.walk(*arguments, wanted=ours.probs_names))
    order = [tap for tap, _ in explicit]
    assert len(order) == len(set(order)) and set(order) == {*ours.tap_names, *ours.probs_names}
    for tap, x in explicit:
        if tap in fused:
            assert_close(x, fused[tap])
        else:                                       # each before the output of its transformer
            assert order.index(tap) < order.index(tap.split(".transformer_blocks")[0])
    for tap in ours.probs_names[:2]:                # in single precision, one map and one activation
        single, arguments32 = ours_like(oracle(CONFIGS[name])), [x.float() for x in arguments]
        mixed = single.features(*arguments32, taps=[tap, "out"])
        assert list(mixed) == [tap, "out"]
        assert_close(mixed["out"], single(*arguments32))


def test_features_stop_after_a_map():
    ours = UNet(CONFIGS[SMALL])
    ran = []
    ours.mid_block.resnets[1].register_forward_pre_hook(lambda *_: ran.append(True))
    ours.features(*inputs(ours.config), taps=["mid_block.attentions.0.transformer_blocks.0.attn2.probs"])
    assert not ran


def test_default_taps(shared):
    sd = UNetConfig.from_json((shared / "data" / "checkpoints" / "ip2p_unet.config.json").read_text())
    assert default_taps(sd) == ("mid_block", *(f"up_blocks.1.attentions.{j}" for j in range(3)))
    assert default_taps(CONFIGS["miniature"]) == ("mid_block", "up_blocks.0.attentions.0", "up_blocks.0.attentions.1")
    assert default_taps(CONFIGS["one resolution"]) == ("mid_block",)
    for config in (sd, *CONFIGS.values()):
        assert set(default_taps(config)) <= set(tap_names(config))
    assert len(tap_names(sd)) == len(set(tap_names(sd))) == 47


# -------------------------------------------------------------------------------------------------------- prepared once

@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["miniature", SMALL])
def test_prepared_values_are_computed_once_and_unchanged(name, checkpointing):
    ours = ours_like(oracle(CONFIGS[name])).requires_grad_(False)
    ours.checkpointing = checkpointing
    latent, timestep, context = inputs(ours.config)
    context = context.detach()[:1]                  # one text for a batch
    taps = [*ours.tap_names, *ours.probs_names]
    expected = ours.features(latent, timestep, context, taps=taps)
    times, text = ours.prepare_timestep(timestep), ours.prepare_context(context)
    ran = []
    for path, part in ours.named_modules():
        if path.endswith(("time_embedding", "time_emb_proj", "attn2.to_k", "attn2.to_v")):
            part.register_forward_pre_hook(lambda *_, path=path: ran.append(path))
    assert set(ours.features(latent, times, text, taps=["conv_in", "down_blocks.0.resnets.0"])) and len(ran) == 1
    for _ in range(2):                              # what no tap needed was not computed; now all is, and once
        found = ours.features(latent, times, text, taps=taps)
        assert all(torch.equal(found[tap], expected[tap]) for tap in taps)
        assert torch.equal(*(torch.autograd.grad(each["out"].square().sum(), latent, retain_graph=True)[0]
                             for each in (found, expected)))
    parts = sum(isinstance(part, unet.ResidualBlock) for part in ours.modules()) + 2 * len(ours.probs_names)
    assert len(ran) == len(set(ran)) == parts
    assert_close(ours(latent, times, context), expected["out"])             # each of the two by itself
    assert_close(ours(latent, timestep, text), expected["out"])


def test_values_that_need_a_gradient_are_not_prepared():
    ours, (_, timestep, context) = ours_like(oracle(CONFIGS[SMALL])), inputs(CONFIGS[SMALL])
    for call in (lambda: ours.prepare_timestep(timestep), lambda: ours.prepare_context(context.detach())):
        with pytest.raises(ValueError, match="freeze the network's weights"):
            call()
    with pytest.raises(ValueError, match="detach the text"):
        ours.requires_grad_(False).prepare_context(context)
    assert ours.prepare_timestep(timestep) and ours.prepare_context(context.detach())


# --------------------------------------------------------------------------------------------- the published file, dtype

def test_published_names_and_shapes(shared):
    folder = shared / "data" / "checkpoints"
    published = json.loads((folder / "ip2p_unet.keys.json").read_text())
    with torch.device("meta"):
        network = UNet(UNetConfig.from_json((folder / "ip2p_unet.config.json").read_text()))
    assert {name: list(tensor.shape) for name, tensor in network.state_dict().items()} == published
    assert sum(parameter.numel() for parameter in network.parameters()) == 859_532_484
    assert not list(network.buffers())              # nothing that a build on meta would leave there


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_weights_decide_the_dtype(dtype):
    ours = UNet(CONFIGS[SMALL]).to(dtype)
    latent, timestep, context = inputs(ours.config, dtype=dtype)
    assert all(x.dtype == dtype for _, x in ours.walk(latent, timestep, context))


def test_memory_format_does_not_matter():
    theirs = oracle(CONFIGS[SMALL])
    latent, timestep, context = inputs(theirs.config)
    ours = ours_like(theirs).to(memory_format=torch.channels_last)
    assert_close(ours(latent.to(memory_format=torch.channels_last), timestep, context),
                 theirs(latent, timestep, context).sample)


# --------------------------------------------------------------------------------------------------------------- config

@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_reads_what_save_pretrained_writes(name, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    theirs = oracle(CONFIGS[name])
    theirs.save_pretrained(tmp_path)
    ours = UNet(UNetConfig.from_json((tmp_path / "config.json").read_text()))
    assert ours.config == CONFIGS[name]
    ours.load_state_dict(safetensors.load_file(tmp_path / "diffusion_pytorch_model.safetensors"))
    latent, timestep, context = inputs(ours.config)
    assert_close(ours(latent, timestep, context), theirs(latent, timestep, context).sample)


def test_every_option_of_theirs_is_decided_on():
    options = inspect.signature(diffusers.UNet2DConditionModel.__init__).parameters
    options = {name: option.default for name, option in options.items() if name != "self"}
    ours = {field.name: field.default for field in fields(UNetConfig)}
    harmless = unet.HARMLESS.keys() - EMA.keys()
    assert options.keys() == ours.keys() | unet.IMPLEMENTED.keys() | harmless
    assert not (ours.keys() & unet.IMPLEMENTED.keys() or unet.IMPLEMENTED.keys() & harmless)
    made = UNetConfig.from_json(json.dumps(options))
    assert made.attention_head_dim == (8, 8, 8, 8) and made.transformer_layers_per_block == (1, 1, 1, 1)
    bare = {key: options[key] for key in
            ("block_out_channels", "down_block_types", "up_block_types", "cross_attention_dim")}
    assert UNetConfig.from_json(json.dumps(bare)) == made                 # our defaults are theirs


BASE = {"block_out_channels": [8, 16], "down_block_types": [CROSS_DOWN, DOWN], "up_block_types": [UP, CROSS_UP],
        "cross_attention_dim": 8, "attention_head_dim": 2, "norm_num_groups": 4, "layers_per_block": 1}


def test_heads_need_divide_only_where_there_is_attention():
    text = json.dumps(BASE | {"down_block_types": [DOWN, DOWN], "up_block_types": [CROSS_UP, UP], "attention_head_dim": 16})
    UNet(UNetConfig.from_json(text))
