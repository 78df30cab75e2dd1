"""Qwen3's text model against transformers' Qwen3ForCausalLM on random weights, read as FLUX.2's pipeline reads it."""

import json

import pytest
import torch
import torch.nn.functional as F
from faults import Wrong
from safetensors.torch import load_file, save_file
from torch import nn

from sifm_min.models import qwen3
from sifm_min.models.checkpoints import Checkpoint, Unavailable, Unfit
from sifm_min.models.qwen3 import Qwen3Config, Qwen3Text

transformers = pytest.importorskip("transformers", reason="the oracle, transformers, is not installed")
if not hasattr(transformers, "Qwen3ForCausalLM"):
    pytest.skip("this transformers has no Qwen3", allow_module_level=True)

SMALL = {"vocab_size": 60, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 5, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 8, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "max_position_embeddings": 64,
         "use_sliding_window": False}
CONFIGS = {                                                    # and after how many layers the states are read
    "as klein's": (SMALL, (1, 2, 4)),
    "one head of keys for all, biases, to the end": (
        SMALL | {"num_key_value_heads": 1, "num_attention_heads": 3, "head_dim": 10, "attention_bias": True}, (2, 5)),
    "as many heads of keys, large epsilon, low theta": (
        SMALL | {"num_key_value_heads": 4, "rms_norm_eps": 0.2, "rope_theta": 50.0, "num_hidden_layers": 3}, (3,)),
    "27 layers of 28": (SMALL | {"num_hidden_layers": 28, "hidden_size": 16, "vocab_size": 151}, qwen3.READ),
}
# Qwen3-4B's, as published with it.
PUBLISHED = {
    "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 151643,
    "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 2560, "initializer_range": 0.02,
    "intermediate_size": 9728, "max_position_embeddings": 40960, "max_window_layers": 36, "model_type": "qwen3",
    "num_attention_heads": 32, "num_hidden_layers": 36, "num_key_value_heads": 8, "rms_norm_eps": 1e-06,
    "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": True,
    "torch_dtype": "bfloat16", "transformers_version": "4.51.0", "use_cache": True, "use_sliding_window": False,
    "vocab_size": 151936,
}


def oracle(name, seed=0, tied=True):
    """transformers' network at random weights; no scale is one, no bias zero, and the attention is far from uniform."""
    torch.manual_seed(seed)
    network = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**CONFIGS[name][0], tie_word_embeddings=tied))
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
            else:
                parameter.copy_(torch.randn_like(parameter) * 1.5 / parameter.shape[1] ** 0.5)
    return network.eval()


def saved_and_loaded(theirs, folder, read):
    """Ours, from the folder that today's transformers writes: its config, its file, its names."""
    theirs.save_pretrained(folder)
    network = Qwen3Text(Qwen3Config.from_json((folder / "config.json").read_text()), read)
    state = {network.rename(name): tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    state.pop(None, None)
    network.load_state_dict(state)
    return network.to(theirs.dtype).eval()


def prompts(rows=3, length=20, seed=1):
    """Ids and mask of texts of several lengths; what stands at the padding matters too, for its states are returned."""
    ids = torch.randint(2, 60, (rows, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        ids[row, length // (row + 1):] = 0
        mask[row, length // (row + 1):] = 0
    return ids, mask


def expected(theirs, ids, mask, read):
    """The states as `Flux2KleinPipeline._get_qwen3_prompt_embeds` joins them."""
    found = theirs(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False).hidden_states
    joined = torch.stack([found[k] for k in read], dim=1)
    return joined.permute(0, 2, 1, 3).reshape(*ids.shape, -1)


def distance(ours, theirs, ids, mask, read):
    """The largest difference, as a fraction of the largest value."""
    with torch.no_grad():
        a, b = ours(ids, mask), expected(theirs, ids, mask, read)
    assert a.shape == b.shape and a.dtype == b.dtype
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", CONFIGS)
def test_states_equal_transformers(name, attention, tmp_path):
    theirs, read = oracle(name), CONFIGS[name][1]
    theirs.set_attn_implementation(attention)
    ours = saved_and_loaded(theirs, tmp_path, read)
    for ids, mask in (prompts(), prompts(1, 1, seed=2), prompts(2, 77, seed=3)):
        assert distance(ours, theirs, ids, mask, read) <= 1e-5


def test_states_equal_the_pipeline_s(tmp_path):
    """Through the pipeline's own function; a stub of a tokenizer gives it the ids."""
    klein = pytest.importorskip("diffusers.pipelines.flux2.pipeline_flux2_klein", reason="this diffusers has no FLUX.2")
    theirs = oracle("27 layers of 28")
    ours = saved_and_loaded(theirs, tmp_path, qwen3.READ)
    ids, mask = prompts(2)

    class Tokenizer:
        def apply_chat_template(self, messages, **options):
            return messages[0]["content"]

        def __call__(self, text, **options):
            return {"input_ids": ids[int(text)][None], "attention_mask": mask[int(text)][None]}

    with torch.no_grad():
        theirs = klein.Flux2KleinPipeline._get_qwen3_prompt_embeds(theirs, Tokenizer(), ["0", "1"])
        ours = ours(ids, mask)
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_gradients_equal_transformers(tmp_path):
    """Of every weight up to the last layer read, and of the embeddings that the ids look up."""
    theirs, read = oracle("as klein's", tied=False), (1, 2, 4)
    ours = saved_and_loaded(theirs, tmp_path, read)
    ids, mask = prompts()
    weights = torch.randn(ours(ids, mask).shape, generator=torch.Generator().manual_seed(3))
    (weights * ours(ids, mask)).sum().backward()
    (weights * expected(theirs, ids, mask, read)).sum().backward()
    gradients = {ours.rename(name): parameter.grad for name, parameter in theirs.named_parameters()}
    assert gradients.keys() - {None} == dict(ours.named_parameters()).keys()
    for name, parameter in ours.named_parameters():
        assert parameter.grad.abs().max() > 1e-4, name
        assert (parameter.grad - gradients[name]).abs().max() <= 1e-5 * gradients[name].abs().max(), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_close_as_transformers(dtype, tmp_path):
    theirs, read = oracle("as klein's"), (1, 2, 4)
    ids, mask = prompts(4, 200)
    with torch.no_grad():
        truth = expected(theirs, ids, mask, read)
        ours = saved_and_loaded(theirs, tmp_path, read).to(dtype)(ids, mask)
        half = expected(theirs.to(dtype), ids, mask, read)
    assert ours.dtype == half.dtype == dtype
    assert (ours - truth).square().mean() <= 1.2 * (half - truth).square().mean() < 0.01 * truth.square().mean()


def test_padding_changes_nothing_before_it(tmp_path):
    ours = saved_and_loaded(oracle("as klein's"), tmp_path, (1, 2, 4))
    ids, mask = prompts(1)
    with torch.no_grad():
        assert (ours(F.pad(ids, (0, 9)), F.pad(mask, (0, 9)))[:, :20] - ours(ids, mask)).abs().max() <= 1e-5


# -- the comparison sees -----------------------------------------------------------------------------------------------

def interleaved(x, cosine, sine):
    first, second = x[..., ::2], x[..., 1::2]
    return torch.stack([first * cosine - second * sine, second * cosine + first * sine], -1).flatten(-2)


def unmasked(q, k, v, attn_mask):
    return F.scaled_dot_product_attention(q, k, v)


def only_causal(q, k, v, attn_mask):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def only_padding(q, k, v, attn_mask):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask[:, :, -1:])


def repeated(self, x, mask, cosine, sine):
    """The heads of keys in the order 0 1 0 1, not 0 0 1 1."""
    q, k, v = (project(x).unflatten(-1, (-1, self.width)) for project in (self.q_proj, self.k_proj, self.v_proj))
    q, k, v = (part.transpose(1, 2) for part in (self.q_norm(q), self.k_norm(k), v))
    k, v = (part.repeat(1, self.groups, 1, 1) for part in (qwen3.rotated(k, cosine, sine), v))
    x = F.scaled_dot_product_attention(qwen3.rotated(q, cosine, sine), k, v, attn_mask=mask)
    return self.o_proj(x.transpose(1, 2).flatten(2))


FAULTS = {
    "pairs of neighbours turned": (qwen3, "rotated", interleaved),
    "turned the other way": (qwen3, "rotated", lambda x, cosine, sine, right=qwen3.rotated: right(x, cosine, -sine)),
    "another theta": (qwen3, "rotary", lambda length, width, theta, device, right=qwen3.rotary: right(
        length, width, 2 * theta, device)),
    "no positions": (qwen3, "rotated", lambda x, cosine, sine: x),
    "no mask": (qwen3, "F", Wrong(F, scaled_dot_product_attention=unmasked)),
    "no mask for padding": (qwen3, "F", Wrong(F, scaled_dot_product_attention=only_causal)),
    "no causal mask": (qwen3, "F", Wrong(F, scaled_dot_product_attention=only_padding)),
    "groups of heads in another order": (qwen3.Attention, "forward", repeated),
    "another activation": (qwen3, "F", Wrong(F, silu=F.gelu)),
    "gate and value exchanged": (qwen3.FeedForward, "forward", lambda self, x: self.down_proj(
        F.silu(self.up_proj(x)) * self.gate_proj(x))),
    "norms without their weights": (nn.RMSNorm, "forward", lambda self, x: F.rms_norm(
        x, self.normalized_shape, None, self.eps)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_parity_sees(fault, monkeypatch, tmp_path):
    theirs, read = oracle("as klein's"), (1, 2, 4)
    ours = saved_and_loaded(theirs, tmp_path, read)
    assert distance(ours, theirs, *prompts(), read) <= 1e-5
    monkeypatch.setattr(*FAULTS[fault])
    assert distance(ours, theirs, *prompts(), read) > 1e-4


# -- files -------------------------------------------------------------------------------------------------------------

def in_shards(folder, name="27 layers of 28", tied=True):
    theirs = oracle(name, tied=tied)
    theirs.save_pretrained(folder / "text_encoder", max_shard_size="30KB")
    files = [f"text_encoder/{path.name}" for path in sorted((folder / "text_encoder").iterdir())]
    assert sum("model-0" in file for file in files) > 2
    return theirs, Checkpoint(folder, "klein", None, files)


@pytest.mark.parametrize("tied", [True, False])
def test_sharded_folder_is_read(tied, tmp_path):
    """Only what is used: neither the last layers nor the output layer, which a file may store on its own."""
    theirs, checkpoint = in_shards(tmp_path, tied=tied)
    for lazily in (False, True):
        ours = checkpoint.load(Qwen3Text, "text_encoder", lazily=lazily)
        assert len(ours.layers) == 27 and ours.norm is None
        assert distance(ours, theirs, *prompts(), qwen3.READ) <= 1e-5


def test_files_without_a_prefix_are_read(tmp_path):
    theirs = oracle("27 layers of 28")
    theirs.model.save_pretrained(tmp_path / "text_encoder")
    stored = tmp_path / "text_encoder" / "model.safetensors"
    assert "embed_tokens.weight" in load_file(stored)
    checkpoint = Checkpoint(tmp_path, "klein", None, ["text_encoder/config.json", "text_encoder/model.safetensors"])
    assert distance(checkpoint.load(Qwen3Text, "text_encoder"), theirs, *prompts(), qwen3.READ) <= 1e-5


def alter(folder, change):
    """Change the tensors of the shard that holds layer 3."""
    for path in folder.glob("text_encoder/model-*.safetensors"):
        state = load_file(path)
        if "model.layers.3.mlp.up_proj.weight" in state:
            save_file(change(state), path, metadata={"format": "pt"})


BAD = {
    "a missing tensor": (lambda state: {k: v for k, v in state.items() if k != "model.layers.3.mlp.up_proj.weight"}, Unfit,
                         "1 missing, 0 unexpected, 0 wrong.*: missing layers.3.mlp.up_proj.weight"),
    "another shape": (lambda state: state | {"model.layers.3.mlp.up_proj.weight": torch.zeros(40, 17)}, Unfit,
                      r"up_proj.weight is \[40, 17\], expected \[40, 16\]"),
    "a tensor too many": (lambda state: state | {"model.layers.3.mlp.bias": torch.zeros(1)}, Unfit,
                          "unexpected model.layers.3.mlp.bias"),
    "a layer that the config does not count": (lambda state: state | {"model.layers.28.mlp.up_proj.weight": torch.zeros(1)},
                                               Unfit, "unexpected model.layers.28.mlp"),
}


@pytest.mark.parametrize("how", BAD)
def test_shards_that_do_not_fit_are_refused(how, tmp_path):
    change, kind, sentence = BAD[how]
    _, checkpoint = in_shards(tmp_path)
    alter(tmp_path, change)
    with pytest.raises(kind, match=sentence) as caught:
        checkpoint.load(Qwen3Text, "text_encoder")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("how", "sentence"), [("gone", "lists the shard .*, which is not there"),
                                               ("cut", "is cut short or damaged")])
def test_a_shard_that_is_damaged_is_one_sentence(how, sentence, tmp_path):
    _, checkpoint = in_shards(tmp_path)
    shard = sorted(tmp_path.glob("text_encoder/model-*.safetensors"))[1]
    if how == "gone":
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[:-64])
    with pytest.raises((Unavailable, Unfit), match=sentence):
        checkpoint.load(Qwen3Text, "text_encoder")


def test_published_config_and_size():
    """Qwen3-4B has 4,022,468,096 parameters; klein reads 3.11 billion of them. Names and shapes are transformers'."""
    config = Qwen3Config.from_json(json.dumps(PUBLISHED))
    with torch.device("meta"):
        whole, ours = Qwen3Text(config, (36,)), Qwen3Text(config)
        theirs = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**PUBLISHED))
    assert sum(parameter.numel() for parameter in whole.parameters()) == 4_022_468_096
    assert sum(parameter.numel() for parameter in ours.parameters()) == pytest.approx(3.11e9, rel=0.002)
    for network in (whole, ours):
        shapes = {network.rename(name): tensor.shape for name, tensor in theirs.state_dict().items()}
        shapes.pop(None)
        assert shapes == {name: tensor.shape for name, tensor in network.state_dict().items()}
        assert not list(network.buffers())                     # nothing that a build on meta would leave there


@pytest.mark.parametrize(("change", "sentence"), [
    ({"num_hidden_layers": 26}, "sets num_hidden_layers to 26; the text is read after layer 27"),
    ({"num_key_value_heads": 5}, "sets num_attention_heads to 32, which is not a multiple of num_key_value_heads 5"),
    ({"head_dim": 127}, "sets head_dim to 127; rotary positions need an even number"),
    ({"model_type": "qwen2"}, "sets model_type to 'qwen2'; only 'qwen3' is implemented"),
    ({"architectures": ["Qwen3ForSequenceClassification"]}, "sets architectures to"),
    ({"hidden_act": "gelu"}, "sets hidden_act to 'gelu'; only 'silu' is implemented"),
    ({"use_sliding_window": True}, "sets use_sliding_window to True; only False is implemented"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "sets layer_types to .*; only 'full_attention' is implemented"),
    ({"rope_scaling": {"rope_type": "yarn"}}, "sets rope_scaling to .*; only None is implemented"),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, "sets rope_parameters to .*; only rope_theta"),
    ({"rope_parameters": {"rope_theta": 1e6, "factor": 4}}, "sets rope_parameters to .*; only rope_theta"),
    ({"rope_theta": 0}, "sets rope_theta to 0, not to a number from 1"),
    ({"rms_norm_eps": -1}, "sets rms_norm_eps to -1, not to a number from 0 to 1"),
    ({"num_experts": 8}, "sets num_experts, which Qwen3's text model here does not implement"),
])
def test_a_config_that_is_not_implemented_is_refused(change, sentence):
    with pytest.raises(ValueError, match=f"^Qwen3's config.json {sentence}") as caught, torch.device("meta"):
        Qwen3Text(Qwen3Config.from_json(json.dumps(PUBLISHED | change)))
    assert "\n" not in str(caught.value)


def test_newer_spelling_of_the_config_is_read():
    older = Qwen3Config.from_json(json.dumps(PUBLISHED))
    newer = {key: value for key, value in PUBLISHED.items() if key not in ("rope_theta", "rope_scaling")}
    newer |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1000000}, "layer_types": ["full_attention"] * 36}
    assert Qwen3Config.from_json(json.dumps(newer)) == older
    assert Qwen3Config.from_json(transformers.Qwen3Config(**PUBLISHED).to_json_string()) == older
