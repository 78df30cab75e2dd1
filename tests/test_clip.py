"""The CLIP text transformer against transformers' on random weights, and against the published names and shapes."""

import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from sifm_min.models import clip
from sifm_min.models.clip import CLIPText, CLIPTextConfig

transformers = pytest.importorskip("transformers", reason="the oracle, transformers, is not installed")

SMALL = {"vocab_size": 60, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 3,
         "max_position_embeddings": 24, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "eos_token_id": 2,
         "bos_token_id": 57, "pad_token_id": 1, "projection_dim": 24}
CONFIGS = {
    "as SD 1.5": SMALL,
    "as SD3's ViT-L": SMALL | {"projection": True},
    "as SD3's bigG": SMALL | {"projection": True, "projection_dim": 10, "hidden_act": "gelu"},
    "as the miniature": SMALL | {"eos_token_id": 59, "num_hidden_layers": 2, "num_attention_heads": 4},
    "one layer, one head": SMALL | {"num_hidden_layers": 1, "num_attention_heads": 1, "hidden_act": "gelu"},
    "another eps": SMALL | {"layer_norm_eps": 1e-2, "projection": True, "eos_token_id": 7},
}
BIG = {"sd15_clip_l": False, "sd3_clip_l": True, "sd3_clip_g": True}       # published text encoders: projected or not


def oracle(numbers, seed=0):
    """transformers' network at random weights; no scale is one, no bias zero, and the attention is far from uniform."""
    numbers = dict(numbers)
    kind = transformers.CLIPTextModelWithProjection if numbers.pop("projection", False) else transformers.CLIPTextModel
    torch.manual_seed(seed)
    network = kind(transformers.CLIPTextConfig(**numbers))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.ndim == 1 else 0.2))
    return network.eval()


def saved_and_loaded(theirs, folder):
    """Ours, from the folder that today's transformers writes: its config, its file, its names."""
    theirs.save_pretrained(folder)
    network = CLIPText(CLIPTextConfig.from_json((folder / "config.json").read_text()))
    network.load_state_dict({CLIPText.rename(name): t for name, t in load_file(folder / "model.safetensors").items()})
    return network.eval()


def prompts(end=59, rows=4, length=24, seed=1):
    """Start, a text of ids up to 56, end and padding: full rows and short ones."""
    ids = torch.randint(3, 57, (rows, length), generator=torch.Generator().manual_seed(seed))
    ids[:, 0] = 57
    for row in range(rows):
        ids[row, length - 1 - 5 * row:] = end
    return ids


def states(theirs, ids):
    found = theirs(ids, output_hidden_states=True)
    pooled = found.text_embeds if hasattr(found, "text_embeds") else found.pooler_output
    return found.last_hidden_state, found.hidden_states[-2], pooled


def distance(ours, theirs, ids):
    """The largest difference of the three states, as a fraction of each one's largest value."""
    with torch.no_grad():
        pairs = list(zip(ours(ids), states(theirs, ids), strict=True))
    assert all(a.shape == b.shape and a.dtype == b.dtype for a, b in pairs)
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)


@pytest.mark.parametrize("name", CONFIGS)
def test_states_equal_transformers(name, tmp_path):
    theirs = oracle(CONFIGS[name])
    ours = saved_and_loaded(theirs, tmp_path)
    end = CONFIGS[name]["eos_token_id"]
    for ids in (prompts(59 if end == 2 else end), prompts(59 if end == 2 else end, rows=2, length=9, seed=2)):
        assert distance(ours, theirs, ids) <= 1e-5


def test_states_equal_in_double(tmp_path):
    theirs = oracle(CONFIGS["as SD3's bigG"]).double()
    ours = saved_and_loaded(theirs, tmp_path).double()
    assert distance(ours, theirs, prompts()) <= 1e-12


@pytest.mark.parametrize("name", ["as SD 1.5", "as SD3's bigG"])
def test_gradients_equal_transformers(name, tmp_path):
    """Of the embeddings that the ids look up, and of every weight between them and the three states."""
    theirs = oracle(CONFIGS[name])
    ours = saved_and_loaded(theirs, tmp_path)
    ids, weigh = prompts(), torch.Generator().manual_seed(3)
    weights = [torch.randn(state.shape, generator=weigh) for state in ours(ids)]
    for network, found in ((ours, ours(ids)), (theirs, states(theirs, ids))):
        network.zero_grad()
        sum((w * state).sum() for w, state in zip(weights, found, strict=True)).backward()
    expected = {CLIPText.rename(key): parameter.grad for key, parameter in theirs.named_parameters()}
    assert expected["text_model.embeddings.token_embedding.weight"].abs().max() > 1
    for key, parameter in ours.named_parameters():
        # relative to the largest of its kind, as a key's bias has none but rounding errors
        assert (parameter.grad - expected[key]).abs().max() <= 1e-5 * max(1, expected[key].abs().max()), key


def layers(network):
    return network.text_model["encoder"]["layers"]


def the_other_gelu(network, patch):
    for layer in layers(network):
        patch.setattr(layer.mlp, "activation", F.gelu)


def no_final_norm(network, patch):
    patch.setitem(network.text_model._modules, "final_layer_norm", nn.Identity())


def the_default_eps(network, patch):
    for module in network.modules():
        if isinstance(module, nn.LayerNorm):
            patch.setattr(module, "eps", 1e-5)


def fewer_heads(network, patch):
    for layer in layers(network):
        patch.setattr(layer.self_attn, "heads", 1)


def no_causal_mask(network, patch):
    def full(q, k, v, is_causal):
        return F.scaled_dot_product_attention(q, k, v)
    patch.setattr(clip, "F", SimpleNamespace(scaled_dot_product_attention=full))


def no_positions(network, patch):
    patch.setattr(network.text_model["embeddings"]["position_embedding"], "weight", nn.Parameter(torch.zeros(24, 24)))


def pooled_at_the_last_token(network, patch):
    patch.setattr(network, "_end", lambda ids: torch.full((len(ids),), ids.shape[1] - 1))


FAULTS = [the_other_gelu, no_final_norm, the_default_eps, fewer_heads, no_causal_mask, no_positions,
          pooled_at_the_last_token]


@pytest.mark.parametrize("fault", FAULTS)
def test_the_oracle_sees_a_fault(fault, tmp_path, monkeypatch):
    """The comparison above would be red, by far, had the network this fault."""
    theirs = oracle(CONFIGS["another eps"])
    ours = saved_and_loaded(theirs, tmp_path)
    assert distance(ours, theirs, prompts(7)) <= 1e-5
    fault(ours, monkeypatch)
    assert distance(ours, theirs, prompts(7)) > 1e-3


def test_a_token_sees_the_ones_before_it_and_padding_is_a_token(tmp_path):
    ours = saved_and_loaded(oracle(SMALL), tmp_path)
    ids = prompts()
    other = ids.clone()
    other[:, -1] = 30                                          # the last of the padding
    before, after = ours(ids).last, ours(other).last
    assert torch.equal(before[:, :-1], after[:, :-1])
    assert not torch.allclose(before[:, -1], after[:, -1])
    assert torch.equal(other[:, :-1], ids[:, :-1])


@pytest.mark.parametrize("eos", [2, 5, 40])
def test_pooled_position_is_that_of_transformers(eos, tmp_path):
    """2 means the highest id; any other, its first place, also where a higher id (an added token) is in the row."""
    theirs = oracle(SMALL | {"eos_token_id": eos})
    ours = saved_and_loaded(theirs, tmp_path)
    ids = torch.tensor([
        [57, 8, 9, 40, 40, 40], [57, 8, 5, 9, 40, 5], [57, 59, 5, 40, 59, 3], [57, 8, 9, 10, 11, 12],
        [2, 40, 5, 2, 1, 2],
    ])
    assert distance(ours, theirs, ids) <= 1e-5
    places = {2: [0, 0, 1, 0, 1], 5: [0, 2, 2, 0, 2], 40: [3, 4, 3, 0, 1]}[eos]
    found = ours(ids)
    assert torch.equal(found.pooled, found.last[torch.arange(5), torch.tensor(places)])


@pytest.mark.parametrize("name", BIG)
def test_published_names_and_shapes(name, shared):
    """Every tensor of the published file has one place of its shape in ours, and every place is filled."""
    folder = shared / "data" / "checkpoints"
    text = (folder / f"{name}.config.json").read_text()
    published = json.loads((folder / f"{name}.keys.json").read_text())
    with torch.device("meta"):
        network = CLIPText(CLIPTextConfig.from_json(text))
    wanted = {key: list(tensor.shape) for key, tensor in network.state_dict().items()}
    assert {CLIPText.rename(key): shape for key, shape in published.items() if CLIPText.rename(key)} == wanted
    assert sum(tensor.numel() for tensor in network.parameters()) == json.loads(text)["_manifest"]["parameters"]
    assert ("text_projection.weight" in wanted) == BIG[name]
    dropped = [key for key in published if CLIPText.rename(key) is None]
    assert dropped == [key for key in published if key == "text_model.embeddings.position_ids"]


def test_published_numbers_reach_the_network(shared):
    text = (shared / "data" / "checkpoints" / "sd3_clip_g.config.json").read_text()
    config = CLIPTextConfig.from_json(text)
    assert config == CLIPTextConfig(
        vocab_size=49408, hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20,
        max_position_embeddings=77, hidden_act="gelu", layer_norm_eps=1e-5, eos_token_id=2, projection_dim=1280,
    )


@pytest.mark.parametrize("name", ["as SD 1.5", "as SD3's bigG"])
def test_rename_takes_both_spellings(name):
    """transformers 5 writes CLIPTextModel without the prefix that all published files have."""
    network = CLIPText(CLIPTextConfig.from_json(config_text(name)))
    for key in network.state_dict():
        assert CLIPText.rename(key) == key
        assert CLIPText.rename(key.removeprefix("text_model.")) == key
    for key in ("text_model.embeddings.position_ids", "embeddings.position_ids"):
        assert CLIPText.rename(key) is None


def test_a_meta_build_leaves_nothing_on_meta():
    config = CLIPTextConfig.from_json(config_text("as SD3's bigG"))
    with torch.device("meta"):
        network = CLIPText(config)
    network.load_state_dict(CLIPText(config).state_dict(), assign=True)
    assert not any(tensor.is_meta for tensor in (*network.parameters(), *network.buffers()))
    assert network(prompts()).pooled.shape == (4, 10)


def test_dtype_is_that_of_the_weights():
    network = CLIPText(CLIPTextConfig.from_json(config_text("as SD3's bigG"))).to(torch.bfloat16)
    assert {state.dtype for state in network(prompts())} == {torch.bfloat16}


def test_too_many_tokens_are_refused():
    network = CLIPText(CLIPTextConfig.from_json(config_text("as SD 1.5")))
    with pytest.raises(ValueError, match="25 tokens.*24 positions"):
        network(torch.zeros(1, 25, dtype=torch.long))


def config_text(name, **changes):
    numbers = dict(CONFIGS[name])
    kind = "CLIPTextModelWithProjection" if numbers.pop("projection", False) else "CLIPTextModel"
    numbers |= {"architectures": [kind], "model_type": "clip_text_model"} | changes
    return json.dumps({key: value for key, value in numbers.items() if value is not ...})


@pytest.mark.parametrize("use_diff", [True, False])
def test_configs_of_transformers_are_accepted(use_diff):
    """Also the long form, with every default spelled out."""
    written = transformers.CLIPTextConfig(**SMALL).to_json_string(use_diff=use_diff)
    assert CLIPTextConfig.from_json(written) == CLIPTextConfig.from_json(config_text("as SD 1.5"))
