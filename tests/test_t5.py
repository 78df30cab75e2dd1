"""T5's encoder against transformers' T5EncoderModel on random weights, and against the published names and shapes."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from sifm_min.models import checkpoints, t5
from sifm_min.models.checkpoints import Checkpoint, Unavailable, Unfit
from sifm_min.models.t5 import T5Config, T5Encoder

transformers = pytest.importorskip("transformers", reason="the oracle, transformers, is not installed")

SMALL = {"vocab_size": 60, "d_model": 24, "d_kv": 8, "d_ff": 40, "num_layers": 3, "num_heads": 3,
         "relative_attention_num_buckets": 32, "relative_attention_max_distance": 128, "layer_norm_epsilon": 1e-6,
         "feed_forward_proj": "gated-gelu"}
CONFIGS = {
    "as T5 XXL": SMALL,
    "heads narrower than the model": SMALL | {"num_heads": 5, "d_kv": 3},
    "heads wider than the model": SMALL | {"num_heads": 4, "d_kv": 12, "num_layers": 2},
    "few buckets": SMALL | {"relative_attention_num_buckets": 6, "relative_attention_max_distance": 11},
    "many buckets, one layer": SMALL | {"relative_attention_num_buckets": 50, "relative_attention_max_distance": 300,
                                        "num_layers": 1, "num_heads": 1},
    "another eps": SMALL | {"layer_norm_epsilon": 0.3},
    "version 1.0": SMALL | {"feed_forward_proj": "relu", "num_layers": 2},
}
PUBLISHED = {"sd3_t5_xxl": 219, "sd3_t5_xxl_standalone": 220}


def oracle(numbers, seed=0):
    """transformers' network at random weights; no scale is one, and the attention is far from uniform."""
    torch.manual_seed(seed)
    network = transformers.T5EncoderModel(transformers.T5Config(**numbers))
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "relative_attention_bias" in name:
                parameter.copy_(torch.randn_like(parameter) * 2)
            elif parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
            else:
                parameter.copy_(torch.randn_like(parameter) * (1.5 if "shared" in name else 0.2))
    return network.eval()


def saved_and_loaded(theirs, folder):
    """Ours, from the folder that today's transformers writes: its config, its file, its names."""
    theirs.save_pretrained(folder)
    network = T5Encoder(T5Config.from_json((folder / "config.json").read_text()))
    network.load_state_dict({T5Encoder.rename(name): t for name, t in load_file(folder / "model.safetensors").items()})
    return network.eval()


def prompts(rows=3, length=40, seed=1):
    ids = torch.randint(2, 60, (rows, length), generator=torch.Generator().manual_seed(seed))
    ids[1:, length * 2 // 3:] = 0                              # padding, and with it the same token many times
    return ids


def distance(ours, theirs, ids):
    """The largest difference, as a fraction of the largest value."""
    with torch.no_grad():
        a, b = ours(ids), theirs(ids).last_hidden_state
    assert a.shape == b.shape and a.dtype == b.dtype
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.mark.parametrize("name", CONFIGS)
def test_states_equal_transformers(name, tmp_path):
    """Also of texts longer than the largest distance that has a bucket of its own."""
    theirs = oracle(CONFIGS[name])
    ours = saved_and_loaded(theirs, tmp_path)
    for ids in (prompts(), prompts(1, 1, seed=2), prompts(2, 333, seed=3)):
        assert distance(ours, theirs, ids) <= 1e-5


@pytest.mark.parametrize("name", CONFIGS)
def test_buckets_equal_transformers(name):
    ours, offsets = T5Encoder(T5Config(**CONFIGS[name])), torch.arange(-3000, 3001)
    theirs = transformers.models.t5.modeling_t5.T5Attention._relative_position_bucket(
        offsets, True, ours.config.relative_attention_num_buckets, ours.config.relative_attention_max_distance)
    assert torch.equal(ours._buckets(offsets), theirs)
    assert set(theirs.tolist()) <= set(range(ours.config.relative_attention_num_buckets)) and len(set(theirs.tolist())) > 4


def test_gradients_equal_transformers(tmp_path):
    """Of the embeddings that the ids look up, of the bias that all blocks share, and of every weight between."""
    theirs = oracle(CONFIGS["heads narrower than the model"])
    ours = saved_and_loaded(theirs, tmp_path)
    ids = prompts()
    weights = torch.randn(ours(ids).shape, generator=torch.Generator().manual_seed(3))
    (weights * ours(ids)).sum().backward()
    (weights * theirs(ids).last_hidden_state).sum().backward()
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    assert expected.keys() == dict(ours.named_parameters()).keys()
    for name, parameter in ours.named_parameters():
        assert parameter.grad.abs().max() > 1e-4, name
        assert (parameter.grad - expected[name]).abs().max() <= 1e-5 * expected[name].abs().max(), name


def test_gradients_are_those_of_differences():
    """In double, where nothing is rounded to float32 on the way."""
    ours = T5Encoder(T5Config(**SMALL | {"num_layers": 1})).double()
    ids, scale = prompts(2, 7), ours.encoder["block"][0].layer[1]["layer_norm"].weight

    def loss(value):
        return torch.func.functional_call(ours, {"encoder.block.0.layer.1.layer_norm.weight": value}, ids).sum()
    assert torch.autograd.gradcheck(loss, (scale,), eps=1e-6, atol=1e-7)


def only_the_first_block_has_a_bias(network, patch):
    for block in network.encoder["block"][1:]:
        forward = block.forward
        patch.setattr(block, "forward", lambda x, bias, forward=forward: forward(x, bias * 0))


def scaled_attention(network, patch):
    def scaled(q, k, v, attn_mask, scale):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)
    patch.setattr(t5, "F", SimpleNamespace(scaled_dot_product_attention=scaled, gelu=F.gelu, linear=F.linear))


def the_exact_gelu(network, patch):
    patch.setattr(t5, "F", SimpleNamespace(scaled_dot_product_attention=F.scaled_dot_product_attention,
                                           gelu=lambda x, approximate: F.gelu(x), linear=F.linear))


def no_final_norm(network, patch):
    patch.setitem(network.encoder._modules, "final_layer_norm", nn.Identity())


def the_default_eps(network, patch):
    for module in network.modules():
        if isinstance(module, t5.RMSNorm):
            patch.setattr(module, "eps", 1e-6)


def later_is_as_earlier(network, patch):
    buckets = network._buckets
    patch.setattr(network, "_buckets", lambda offsets: buckets(-offsets.abs()))


FAULTS = [only_the_first_block_has_a_bias, scaled_attention, the_exact_gelu, no_final_norm, the_default_eps,
          later_is_as_earlier]


@pytest.mark.parametrize("fault", FAULTS)
def test_the_oracle_sees_a_fault(fault, tmp_path, monkeypatch):
    """The comparison above would be red, by far, had the network this fault."""
    theirs = oracle(CONFIGS["another eps"])
    ours = saved_and_loaded(theirs, tmp_path)
    assert distance(ours, theirs, prompts()) <= 1e-5
    fault(ours, monkeypatch)
    assert distance(ours, theirs, prompts()) > 1e-4


# ------------------------------------------------------------------------------------------------------ half precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close(dtype, tmp_path):
    """To float32, and to transformers in the same precision, which keeps `wo` in float32 for float16."""
    wide = oracle(SMALL)
    ours = saved_and_loaded(wide, tmp_path).to(dtype)
    theirs = transformers.T5EncoderModel.from_pretrained(tmp_path, dtype=dtype).eval()
    ids = prompts(length=200)
    with torch.no_grad():
        half, same, exact = ours(ids), theirs(ids).last_hidden_state, wide(ids).last_hidden_state
    assert half.dtype == same.dtype == dtype
    scale, eps = exact.std(), torch.finfo(dtype).eps
    assert (half - exact).pow(2).mean().sqrt() <= 8 * eps * scale
    assert (half - exact).pow(2).mean() <= 1.2 * (same - exact).pow(2).mean()
    ours(ids).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in ours.parameters())


@pytest.mark.parametrize("factors", [{"wo": 5e4}, {"wi_": 200}, {"shared": 1e4, "SelfAttention.o": 1e4}],
                         ids=["what a layer adds", "the gated product", "the sum, before any layer has widened it"])
def test_float16_survives_what_outgrows_it(factors, tmp_path):
    """States of 1e5 and more, as the XXL encoder has them, though no weight and no attention is out of range."""
    wide = oracle(SMALL)
    with torch.no_grad():
        for name, parameter in wide.named_parameters():
            for part, factor in factors.items():
                parameter.mul_(factor if part in name else 1)
    largest = []
    for name, module in wide.named_modules():
        if name.endswith((".layer.0", ".wo")):
            module.register_forward_hook(lambda module, inputs, output: largest.extend(
                x.abs().max().item() for x in (inputs[0], output[0])))
    ours = saved_and_loaded(wide, tmp_path).half()
    assert all(parameter.isfinite().all() for parameter in ours.parameters())
    with torch.no_grad():
        half, exact = ours(prompts()), wide(prompts()).last_hidden_state
    assert max(largest) > torch.finfo(torch.float16).max
    assert half.isfinite().all() and half.dtype == torch.float16
    assert (half - exact).pow(2).mean().sqrt() <= 0.01 * exact.std()


# --------------------------------------------------------------------------------------------- published names and files


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_names_and_shapes(name, shared):
    """Every tensor of the published file has one place of its shape in ours, and every place is filled."""
    folder = shared / "data" / "checkpoints"
    text = (folder / f"{name}.config.json").read_text()
    published = json.loads((folder / f"{name}.keys.json").read_text())
    with torch.device("meta"):
        network = T5Encoder(T5Config.from_json(text))
    wanted = {key: list(tensor.shape) for key, tensor in network.state_dict().items()}
    assert {T5Encoder.rename(key): shape for key, shape in published.items() if T5Encoder.rename(key)} == wanted
    assert len(published) == PUBLISHED[name] and len(wanted) == 219
    assert sum(tensor.numel() for tensor in network.parameters()) == 4_762_310_656
    assert [key for key in published if T5Encoder.rename(key) is None] == ["encoder.embed_tokens.weight"][:len(published) - 219]


def test_published_numbers_reach_the_network(shared):
    text = (shared / "data" / "checkpoints" / "sd3_t5_xxl.config.json").read_text()
    assert T5Config.from_json(text) == T5Config(
        vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64,
        relative_attention_num_buckets=32, relative_attention_max_distance=128, layer_norm_epsilon=1e-6,
        feed_forward_proj="gated-gelu")


def sharded(theirs, folder, variant=None):
    """The folder of a pipeline whose text_encoder_3 is in several shards; those, as paths."""
    theirs.save_pretrained(folder / "text_encoder_3", max_shard_size="9KB", variant=variant)
    shards = sorted((folder / "text_encoder_3").glob("*.safetensors"))
    assert len(shards) > 3
    return shards


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards_are_loaded(variant, tmp_path):
    """By the names in the index, in float32 and in the published float16 variant."""
    theirs = oracle(CONFIGS["heads wider than the model"])
    expected = theirs(prompts()).last_hidden_state
    shards = sharded(theirs.half() if variant else theirs, tmp_path, variant)
    assert (tmp_path / "text_encoder_3" / f"model.safetensors.index.{'fp16.' if variant else ''}json").exists()
    checkpoint = Checkpoint(tmp_path, "here", None, [])
    ours = checkpoint.load(T5Encoder, "text_encoder_3")
    assert ours.shared.weight.dtype == (torch.float16 if variant else torch.float32)
    found = ours.float()(prompts())
    assert (found - expected).abs().max() <= (0.02 if variant else 1e-5) * expected.abs().max()
    assert sorted(checkpoint.hashes()) == [f"text_encoder_3/{shard.name}" for shard in shards]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="what is mapped is read from Linux' /proc/self/maps")
def test_one_shard_is_mapped_at_a_time(tmp_path, monkeypatch):
    """Where the dtype is converted; the one before may still be there while the first tensor of the next is read."""
    shards, seen = sharded(oracle(SMALL), tmp_path), []
    real = checkpoints.safe_open

    def mapped():
        maps = Path("/proc/self/maps").read_text()
        return [shard for shard in shards if str(shard) in maps]

    class Watched:
        def __init__(self, file, framework):
            self.file, self.opened = file, real(file, framework=framework)

        def __enter__(self):
            return self.opened.__enter__()

        def __exit__(self, *error):
            return self.opened.__exit__(*error)

        def get_tensor(self, name):
            tensor = self.opened.get_tensor(name)
            seen.append((self.file, mapped()))
            return tensor

    monkeypatch.setattr(checkpoints, "safe_open", Watched)
    network = Checkpoint(tmp_path, "here", None, []).load(T5Encoder, "text_encoder_3", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in network.parameters()} == {torch.bfloat16}
    assert list(dict(seen)) == shards and len(seen) == len(network.state_dict())
    before = None
    for file, there in seen:
        assert there == [file] if file == before else file in there and len(there) <= 2
        before = file
    assert mapped() == []


def test_a_missing_and_a_truncated_shard_are_told(tmp_path):
    shards = sharded(oracle(SMALL), tmp_path)
    whole = shards[1].read_bytes()
    shards[1].write_bytes(whole[:-7])
    with pytest.raises(Unfit, match=f"{shards[1].name} is cut short or damaged"):
        Checkpoint(tmp_path, "here", None, []).load(T5Encoder, "text_encoder_3")
    shards[1].unlink()
    with pytest.raises(Unavailable, match=f"lists the shard {shards[1].name}, which is not there"):
        Checkpoint(tmp_path, "here", None, []).load(T5Encoder, "text_encoder_3")


def test_an_embedding_stored_twice_is_read_once(tmp_path):
    theirs = oracle(SMALL)
    theirs.save_pretrained(tmp_path / "text_encoder_3")
    file = tmp_path / "text_encoder_3" / "model.safetensors"
    state = load_file(file)
    assert "encoder.embed_tokens.weight" not in state
    save_file(state | {"encoder.embed_tokens.weight": state["shared.weight"].clone()}, file)
    ours = Checkpoint(tmp_path, "here", None, []).load(T5Encoder, "text_encoder_3")
    assert distance(ours, theirs, prompts()) <= 1e-5


def test_a_meta_build_leaves_nothing_on_meta():
    config = T5Config(**SMALL)
    with torch.device("meta"):
        network = T5Encoder(config)
    network.load_state_dict(T5Encoder(config).state_dict(), assign=True)
    assert not any(tensor.is_meta for tensor in (*network.parameters(), *network.buffers()))
    assert network(prompts()).shape == (3, 40, 24)


# ------------------------------------------------------------------------------------------------------------ the config


def config_text(**changes):
    numbers = SMALL | {"architectures": ["T5EncoderModel"], "model_type": "t5"} | changes
    return json.dumps({key: value for key, value in numbers.items() if value is not ...})


@pytest.mark.parametrize("use_diff", [True, False])
def test_configs_of_transformers_are_accepted(use_diff):
    """Also the long form, with every default spelled out."""
    written = transformers.T5Config(**SMALL).to_json_string(use_diff=use_diff)
    assert T5Config.from_json(written) == T5Config(**SMALL)
