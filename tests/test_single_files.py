"""models/single_files.py and the loading of single files: every name and operation against the published map, small
random files made by inverting that map, and the converters of diffusers."""

import hashlib
import json
import re
from collections import Counter
from pathlib import Path

import peak_memory
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_checkpoints import hub, says  # noqa: F401 (hub is a fixture)

from sifm_min import weights
from sifm_min.models import single_files
from sifm_min.models.checkpoints import EDITORS, MAIN, Source, Unavailable, Unfit, open_checkpoint
from sifm_min.models.clip import CLIPText
from sifm_min.models.mmdit import MMDiT
from sifm_min.models.sources import STABLE_DIFFUSION_3
from sifm_min.models.t5 import T5Encoder
from sifm_min.models.vae import AutoencoderKL

ROOT = Path(__file__).resolve().parents[1]
DIT, VAE = "model.diffusion_model.", "first_stage_model."
NAMES = {"text_encoder": "clip_l", "text_encoder_2": "clip_g", "text_encoder_3": "t5xxl"}
TOKENIZERS = {"tokenizer": ("vocab.json", "merges.txt"), "tokenizer_2": ("vocab.json", "merges.txt"),
              "tokenizer_3": ("spiece.model",)}

TRANSFORMER = {
    "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 64, "joint_attention_dim": 24,
    "pooled_projection_dim": 20, "pos_embed_max_size": 6, "caption_projection_dim": 128, "in_channels": 16}
NEWER = {                                                       # as SD3.5 medium: both kinds of block, and norms
    "num_layers": 3, "num_attention_heads": 4, "attention_head_dim": 32, "qk_norm": "rms_norm",
    "dual_attention_layers": [0, 1]}
AUTOENCODER = {
    "block_out_channels": [32, 64, 96, 96], "layers_per_block": 2, "latent_channels": 16, "scaling_factor": 1.5305,
    "shift_factor": 0.0609, "use_quant_conv": False, "use_post_quant_conv": False}
CLIP = {
    "vocab_size": 50, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 1,
    "max_position_embeddings": 12, "hidden_act": "quick_gelu", "eos_token_id": 2}
T5 = {
    "vocab_size": 30, "d_model": 8, "d_kv": 3, "d_ff": 10, "num_layers": 2, "num_heads": 2,
    "relative_attention_num_buckets": 4, "feed_forward_proj": "gated-gelu"}


def network(kind, seed=0, **config):
    """A network at random weights that fp16 holds exactly."""
    torch.manual_seed(seed)
    made = kind(kind.Config.from_json(json.dumps(config)))
    with torch.no_grad():
        for tensor in (*made.parameters(), *made.buffers()):
            tensor.copy_(torch.randn_like(tensor).half())
    return made.eval()


def text_encoders():
    return {"text_encoder": network(CLIPText, 2, **CLIP),                       # no projection, as published
            "text_encoder_2": network(CLIPText, 3, **CLIP | {"hidden_act": "gelu", "projection_dim": 24,
                                                             "architectures": ["CLIPTextModelWithProjection"]})}


def t5_tensors(dtype=torch.float16):
    """As the published files have them: the embedding twice."""
    found = {name: tensor.to(dtype) for name, tensor in network(T5Encoder, 4, **T5).state_dict().items()}
    return found | {"encoder.embed_tokens.weight": found["shared.weight"].clone()}


@pytest.fixture(scope="session")
def published(shared):
    """The map of sd3_medium.safetensors: name -> [[diffusers name, operation], ...]."""
    return json.loads((shared / "data/checkpoints/sd3_single.map.json").read_text())


def inverted(published, transformer, vae):
    """The tensors that a single file would hold. The map's first block and its last, which is another kind, are those of
    two layers; its VAE has as many levels as ours. Written out by hand, so that it is no copy of what it tests."""
    made = {}
    for stored, entries in published.items():
        if "blocks." in stored and not re.search(r"joint_blocks\.(0|23)\.", stored):
            continue
        source = transformer if stored.startswith(DIT) else vae
        parts = [(source[name.replace("transformer_blocks.23.", "transformer_blocks.1.")], operation)
                 for name, operation in entries]
        if len(parts) == 3:
            assert [operation for _, operation in parts] == ["third_0", "third_1", "third_2"]
            tensor = torch.cat([part for part, _ in parts])
        else:
            (tensor, operation), = parts
            half = tensor.shape[0] // 2
            tensor = {"copy": lambda t: t, "squeeze_1x1": lambda t: t[:, :, None, None],
                      "swap_halves": lambda t, h=half: torch.cat([t[h:], t[:h]])}[operation](tensor)
        made[stored.replace("joint_blocks.23.", "joint_blocks.1.")] = tensor.contiguous()
    return made


def contents(published, clips=False, t5=None):
    """(the tensors of a small single file, the networks in it)."""
    networks = {"transformer": network(MMDiT, 0, **TRANSFORMER), "vae": network(AutoencoderKL, 1, **AUTOENCODER)}
    made = inverted(published, networks["transformer"].state_dict(), networks["vae"].state_dict())
    if clips:
        networks |= text_encoders()
        for part in ("text_encoder", "text_encoder_2"):
            prefix = f"text_encoders.{NAMES[part]}.transformer."
            made |= {prefix + name: tensor for name, tensor in networks[part].state_dict().items()}
    if t5 is not None:
        made |= {f"text_encoders.t5xxl.transformer.{name}": tensor for name, tensor in t5_tensors(t5).items()}
    return {name: tensor if tensor.itemsize < 4 else tensor.half() for name, tensor in made.items()}, networks


def write(folder, tensors, name="sd3_medium.safetensors"):
    save_file(tensors, folder / name)
    return folder / name


def with_tokenizers(folder, t5=True):
    for part, names in TOKENIZERS.items():
        if t5 or part != "tokenizer_3":
            (folder / part).mkdir(parents=True)
            for name in names:
                (folder / part / name).write_text("{}")
    return folder


def same(ours, theirs, dtype=torch.float16):
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == dtype and torch.equal(ours[name].float(), tensor.float()), name


# --------------------------------------------------------------------------------------------- against the published map


def test_every_tensor_and_every_operation_is_as_published(published, shared):
    folder = shared / "data/checkpoints"
    shapes = {name: tuple(shape) for name, shape in json.loads((folder / "sd3_single.keys.json").read_text()).items()}
    parts, unknown = single_files.split(shapes)
    assert unknown == [] and {part: len(names) for part, names in parts.items()} == {"transformer": 491, "vae": 244}
    operations = Counter()
    for part, manifest in (("transformer", "sd3_mmdit"), ("vae", "sd3_vae")):
        ours = {name: shapes[stored] for name, stored in parts[part].items()}
        places, made = single_files.places(part, ours), {}
        for name, stored in parts[part].items():
            found = [[place.name, "copy" if place.rows is None else f"third_{place.rows[0]}"] for place in places[name]]
            if places[name][0].swapped:
                found = [[place, "swap_halves"] for place, _ in found]
            # a 1x1 convolution becomes a linear layer where it is loaded, whichever file it comes from
            expected = [[place, "copy" if what == "squeeze_1x1" else what] for place, what in published[stored]]
            assert found == expected, stored
            operations.update(what for _, what in found)
            made |= {place.name: place.shape(ours[name]) for place in places[name]}
        wanted = json.loads((folder / f"{manifest}.keys.json").read_text())
        assert made.keys() == wanted.keys()
        assert all(shape in (tuple(wanted[name]), (*wanted[name], 1, 1)) for name, shape in made.items())
    assert operations == {"copy": 635, "swap_halves": 4, "third_0": 96, "third_1": 96, "third_2": 96}, operations


def test_every_tensor_of_stable_diffusion_3_5_has_one_place(shared):
    wanted = json.loads((shared / "data/checkpoints/sd35_medium_mmdit.keys.json").read_text())
    table = single_files.places("transformer", {f"joint_blocks.{i}.": None for i in range(24)})
    counts = Counter(place.name for places in table.values() for place in places)
    assert counts.keys() >= wanted.keys() and set(counts.values()) == {1}


@pytest.mark.parametrize("part, kind, manifest, keys", [
    ("transformer", MMDiT, "sd3_mmdit", "sd3_single"),
    ("vae", AutoencoderKL, "sd3_vae", "sd3_single"),
    ("text_encoder", CLIPText, "sd3_clip_l", "sd3_single_text_encoders"),
    ("text_encoder_2", CLIPText, "sd3_clip_g", "sd3_single_text_encoders"),
    ("text_encoder_3", T5Encoder, "sd3_t5_xxl", "sd3_single_text_encoders"),
])
def test_the_shapes_tell_the_published_config(part, kind, manifest, keys, shared):
    """Our class makes of it what it makes of the published config.json, and takes every tensor of the file."""
    folder = shared / "data/checkpoints"
    shapes = {name: tuple(shape) for name, shape in json.loads((folder / f"{keys}.keys.json").read_text()).items()}
    names = single_files.split(shapes)[0][part]
    shapes = {name: shapes[stored] for name, stored in names.items()}
    config = json.loads((folder / f"{manifest}.config.json").read_text())
    if part == "text_encoder":                                  # the single file leaves out its projection
        config |= {"architectures": ["CLIPTextModel"]}
    ours = kind.Config.from_json(json.dumps(single_files.config(part, shapes)))
    assert ours == kind.Config.from_json(json.dumps(config))
    with torch.device("meta"):
        expected = {name: tuple(tensor.shape) for name, tensor in kind(ours).state_dict().items()}
    rename = getattr(kind, "rename", None) or (lambda name: name)
    found = {rename(place.name): place.shape(shapes[name])
             for name, places in single_files.places(part, shapes).items() if name in shapes for place in places}
    found.pop(None, None)
    assert found.keys() == expected.keys()
    assert all(found[name] in (shape, (*shape, 1, 1)) for name, shape in expected.items())


# ------------------------------------------------------------------------------------------------- small files that load


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
def test_a_small_single_file_loads_bit_for_bit(published, tmp_path, dtype):
    tensors, networks = contents(published, clips=True)
    file = write(with_tokenizers(tmp_path, t5=False), tensors)
    checkpoint = open_checkpoint(file)
    assert checkpoint.index["_class_name"] == "StableDiffusion3Pipeline"
    assert checkpoint.components == ("transformer", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2",
                                     "scheduler")                # T5 is not to be had, and can be done without
    for part, theirs in networks.items():
        ours = checkpoint.load(type(theirs), part, dtype=dtype)
        expected = {name: tensor.to(dtype or torch.float16) for name, tensor in theirs.state_dict().items()}
        same(ours.state_dict(), expected, dtype or torch.float16)
        assert not ours.training and not any(p.requires_grad for p in ours.parameters())
        assert checkpoint.check(type(theirs), part) == ours.config
    assert (checkpoint.source, checkpoint.revision, checkpoint.files) == (str(file), None, (file.name,))
    assert checkpoint.hashes() == {file.name: hashlib.sha256(file.read_bytes()).hexdigest()}
    assert json.loads(checkpoint.text("scheduler/scheduler_config.json"))["shift"] == 3.0
    assert checkpoint.has("vae/config.json") and checkpoint.has("tokenizer_2/merges.txt") and checkpoint.has(MAIN)
    assert not checkpoint.has("tokenizer_3/spiece.model") and not checkpoint.has("unet/config.json")
    assert checkpoint.path("tokenizer") == tmp_path / "tokenizer"
    with pytest.raises(ValueError, match="leads out"):
        checkpoint.has("../secret.txt")


def test_networks_of_a_single_file_compute_as_the_originals(published, tmp_path):
    """The names could all be right and a half or a third in the wrong place: the outputs say no."""
    tensors, networks = contents(published, clips=True)
    checkpoint = open_checkpoint(write(with_tokenizers(tmp_path, t5=False), tensors))
    torch.manual_seed(5)
    inputs = {"transformer": (torch.randn(1, 16, 8, 4), torch.tensor([500.0]), torch.randn(1, 5, 24), torch.randn(1, 20)),
              "text_encoder": (torch.tensor([[48, 3, 9, 49, 49]]),), "text_encoder_2": (torch.tensor([[48, 3, 9, 49]]),)}
    for part, given in inputs.items():
        ours = checkpoint.load(type(networks[part]), part, dtype=torch.float32)
        found, expected = ours(*given), networks[part].to(memory_format=torch.channels_last)(*given)        # as ours is read
        for a, b in zip(*((f if isinstance(f, tuple) else (f,)) for f in (found, expected)), strict=True):
            assert torch.equal(a, b)
    assert found.pooled.shape == (1, 24)                        # bigG's is projected ...
    unprojected = checkpoint.load(CLIPText, "text_encoder", dtype=torch.float32)
    states = unprojected(inputs["text_encoder"][0])
    assert torch.equal(states.pooled, states.last[:, 3])        # ... and CLIP-L's, without one, is as it is: identity


@pytest.mark.parametrize("stored", [torch.float16, torch.float8_e4m3fn])
@pytest.mark.parametrize("asked", [None, torch.bfloat16, torch.float32])
def test_t5_in_the_file_also_as_float8(published, tmp_path, stored, asked):
    """float8 is how it is stored: nothing computes in it, so without a dtype it comes as bfloat16, which is exact."""
    tensors, _ = contents(published, clips=True, t5=stored)
    checkpoint = open_checkpoint(write(with_tokenizers(tmp_path), tensors))
    assert checkpoint.components[-4:] == ("tokenizer", "tokenizer_2", "tokenizer_3", "scheduler")
    expected = t5_tensors(stored)
    del expected["encoder.embed_tokens.weight"]
    dtype = asked or (torch.bfloat16 if stored.itemsize == 1 else stored)
    same(checkpoint.load(T5Encoder, "text_encoder_3", dtype=asked).state_dict(),
         {name: tensor.to(dtype) for name, tensor in expected.items()}, dtype)
    declined = open_checkpoint(tmp_path / "sd3_medium.safetensors", t5=False)
    assert not {"text_encoder_3", "tokenizer_3"} & set(declined.components) and declined.components[-1] == "scheduler"


def scaled_fp8(tensors, ends, seed=6):
    """(the tensors as a file called fp8_scaled has them, what they stand for in float32).

    Written out here: each matrix as float8 of weight / scale, the scale beside it, and the number for products in float8.
    """
    made, expected = dict(tensors), {name: tensor.float() for name, tensor in tensors.items()}
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in tensors.items():
        if name.endswith(".weight") and tensor.ndim == 2:
            scale = torch.rand((), generator=generator) * 0.01 + 0.001
            made[name] = (tensor.float() / scale).clamp(-400, 400).to(torch.float8_e4m3fn)
            expected[name] = made[name].float() * scale
            made[name.removesuffix("weight") + ends[0]] = scale
            made[name.removesuffix("weight") + ends[1]] = torch.tensor(3.0)
    return made, expected


@pytest.mark.parametrize("lazily", [False, True])
@pytest.mark.parametrize("ends", [("scale_weight", "scale_input"), ("weight_scale", "input_scale")], ids="/".join)
def test_scaled_float8_is_multiplied_out(published, tmp_path, ends, lazily):
    tensors, networks = contents(published, clips=True, t5=torch.float16)
    tensors, expected = scaled_fp8(tensors, ends)
    tensors |= {DIT + "scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn),
                "text_encoders.clip_l.logit_scale": torch.tensor(4.6)}
    checkpoint = open_checkpoint(write(with_tokenizers(tmp_path), tensors))
    state = checkpoint.load(MMDiT, "transformer", dtype=torch.float32, lazily=lazily)
    if lazily:
        state(torch.randn(1, 16, 8, 4), torch.tensor([500.0]), torch.randn(1, 5, 24), torch.randn(1, 20))
    state = state.state_dict()
    qkv = expected[DIT + "joint_blocks.0.x_block.attn.qkv.weight"]
    for name, third in zip(("to_q", "to_k", "to_v"), qkv.chunk(3), strict=True):
        assert torch.equal(state[f"transformer_blocks.0.attn.{name}.weight"], third), name
    last = expected[DIT + "final_layer.adaLN_modulation.1.weight"]
    assert torch.equal(state["norm_out.linear.weight"], torch.cat([last[128:], last[:128]]))
    t5 = checkpoint.load(T5Encoder, "text_encoder_3", dtype=torch.float32).state_dict()
    name = "encoder.block.1.layer.0.SelfAttention.q.weight"
    assert torch.equal(t5[name], expected[f"text_encoders.t5xxl.transformer.{name}"])
    assert checkpoint.load(T5Encoder, "text_encoder_3").state_dict()[name].dtype == torch.bfloat16
    assert checkpoint.load(CLIPText, "text_encoder").state_dict().keys() == networks["text_encoder"].state_dict().keys()


def test_scaled_t5_beside_a_single_file_is_read(published, tmp_path):
    file = write(with_tokenizers(tmp_path), contents(published, clips=True)[0])
    tensors, expected = scaled_fp8(t5_tensors(), ("scale_weight", "scale_input"))
    write(tmp_path, tensors | {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}, "t5xxl_fp8_e4m3fn_scaled.safetensors")
    state = open_checkpoint(file).load(T5Encoder, "text_encoder_3", dtype=torch.float32).state_dict()
    del expected["encoder.embed_tokens.weight"]
    same(state, expected, torch.float32)


def test_a_scale_that_is_no_number_or_has_no_weight_is_told(published, tmp_path):
    name = DIT + "joint_blocks.0.x_block.attn.qkv.scale_weight"
    for wrong in ({name: torch.ones(384)}, {DIT + "joint_blocks.0.gate.scale_weight": torch.tensor(1.0)}):
        file = write(tmp_path, contents(published)[0] | wrong)
        with pytest.raises(Unfit, match="tensors that Stable Diffusion 3 does not have.*scaled float8, such as sd3_medium"):
            open_checkpoint(file)


def save_component(folder, part, made):
    """A text encoder in the diffusers layout."""
    (folder / part).mkdir(parents=True, exist_ok=True)
    config = {**CLIP, "hidden_act": made.config.hidden_act} | (
        {"projection_dim": made.config.projection_dim, "architectures": ["CLIPTextModelWithProjection"]}
        if made.config.projection_dim else {})
    (folder / part / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.half() for name, tensor in made.state_dict().items()}, folder / part / "model.safetensors")


def test_text_encoders_come_from_a_folder_of_components(published, tmp_path):
    tensors, networks = contents(published)
    (tmp_path / "single").mkdir()
    file, rest = write(tmp_path / "single", tensors), with_tokenizers(tmp_path / "rest", t5=False)
    for part, made in text_encoders().items():
        save_component(rest, part, made)
    (rest / "scheduler").mkdir()
    (rest / "scheduler/scheduler_config.json").write_text('{"shift": 2.0}')
    checkpoint = open_checkpoint(file, rest=rest)
    for part, made in (networks | text_encoders()).items():
        assert checkpoint.check(type(made), part) is not None
        same(checkpoint.load(type(made), part).state_dict(), made.half().state_dict())
    assert json.loads(checkpoint.text("scheduler/scheduler_config.json")) == {"shift": 2.0}       # the folder's own
    assert set(checkpoint.hashes()) == {file.name, "text_encoder/model.safetensors", "text_encoder_2/model.safetensors"}
    with pytest.raises(Unavailable, match="neither .* has text_encoder, text_encoder_2, tokenizer, tokenizer_2"):
        open_checkpoint(file)                                   # in its own folder there is nothing else
    with pytest.raises(Unavailable, match="has text_encoder_3, tokenizer_3: give components.*; or decline T5"):
        open_checkpoint(file, STABLE_DIFFUSION_3, rest=rest)


@pytest.mark.parametrize("where", ["", "text_encoders"])
def test_text_encoders_as_files_of_their_own(published, tmp_path, where):
    """As they lie beside the published single file; their config too is read off their shapes."""
    tensors, _ = contents(published)
    file = write(with_tokenizers(tmp_path), tensors)
    (tmp_path / where).mkdir(exist_ok=True)
    for part, made in text_encoders().items():
        save_file({n: t.half() for n, t in made.state_dict().items()}, tmp_path / where / f"{NAMES[part]}.safetensors")
    checkpoint = open_checkpoint(file)
    assert "text_encoder_3" not in checkpoint.components
    save_file(t5_tensors(torch.float8_e4m3fn), tmp_path / where / "t5xxl_fp8_e4m3fn.safetensors")
    checkpoint = open_checkpoint(file)
    for part, made in text_encoders().items():
        same(checkpoint.load(CLIPText, part).state_dict(), made.half().state_dict())
    assert checkpoint.load(T5Encoder, "text_encoder_3").state_dict()["shared.weight"].dtype == torch.bfloat16
    assert set(checkpoint.hashes()) == {"clip_l.safetensors", "clip_g.safetensors", "t5xxl_fp8_e4m3fn.safetensors"}


@pytest.mark.slow
def test_components_come_from_the_hub_and_only_those_that_lack(published, tmp_path, hub, monkeypatch):  # noqa: F811
    tensors, _ = contents(published, clips=True)
    file = write(tmp_path, tensors)
    monkeypatch.setitem(EDITORS, "sd3", Source(name="sd3", licence="", hub_id="owner/sd3"))
    index = {"_class_name": "StableDiffusion3Pipeline", "text_encoder_3": ["transformers", "T5EncoderModel"],
             "tokenizer_3": ["transformers", "T5TokenizerFast"]}
    hub.add("owner/sd3", {
        MAIN: json.dumps(index).encode(), "scheduler/scheduler_config.json": b'{"shift": 3.0}',
        "transformer/config.json": b"{}", "transformer/diffusion_pytorch_model.safetensors": bytes(900),
        "tokenizer/vocab.json": b"{}", "tokenizer/merges.txt": b"#a", "tokenizer_2/vocab.json": b"{} ",
        "tokenizer_2/merges.txt": b"#b"})
    checkpoint = open_checkpoint(file, t5=False, rest="sd3")
    assert set(hub.asked("GET")) == {MAIN, "scheduler/scheduler_config.json", "tokenizer/vocab.json",
                                     "tokenizer/merges.txt", "tokenizer_2/vocab.json", "tokenizer_2/merges.txt"}
    assert (checkpoint.path("tokenizer_2") / "merges.txt").read_text() == "#b"
    with pytest.raises(Unavailable, match="owner/sd3 has no text_encoder_3/config.json"):         # wanted by default
        open_checkpoint(file, rest="sd3")


# ---------------------------------------------------------------------------------------------------------- what is wrong


@pytest.mark.parametrize("change, words", [
    (lambda t: t | {DIT + "joint_blocks.0.x_block.gate": torch.ones(1)},
     ["tensors that Stable Diffusion 3 does not have: model.diffusion_model.joint_blocks.0.x_block.gate;"]),
    (lambda t: t | {f"lora.{i}": torch.ones(1) for i in range(5)}, ["lora.0, lora.1, lora.2 and 2 more"]),
    (lambda t: t | {VAE + "encoder.mid.attn_2.q.weight": torch.ones(1)}, ["first_stage_model.encoder.mid.attn_2.q.weight"]),
    (lambda t: {n: x for n, x in t.items() if "joint_blocks" not in n}, ["is not a single file of Stable Diffusion 3"]),
    (lambda t: {"unet.weight": torch.ones(1)}, ["is not a single file", "or the folder of a whole pipeline"]),
    (lambda t: {n: x for n, x in t.items() if "x_embedder" not in n}, ["has no tensor", DIT + "x_embedder.proj.weight"]),
    (lambda t: t | {DIT + "x_embedder.proj.weight": torch.ones(2)}, ["the shapes under model.diffusion_model."]),
], ids=["unknown", "many", "vae", "not-sd3", "a-network", "no-embedder", "flat"])
def test_tensors_of_no_single_file_are_named_in_one_error(published, tmp_path, change, words):
    file = write(with_tokenizers(tmp_path), change(contents(published, clips=True)[0]))
    with pytest.raises(Unfit) as caught:
        open_checkpoint(file)
    assert all(word in says(caught) for word in [str(file), *words]), says(caught)


@pytest.mark.parametrize("name, shape, words", [
    (DIT + "joint_blocks.0.x_block.attn.qkv.weight", (385, 128), "[385, 128], expected [128, 128]"),
    (DIT + "joint_blocks.0.x_block.attn.qkv.bias", (387,), "[129], expected [128]"),
    (DIT + "final_layer.adaLN_modulation.1.bias", (257,), "[257], expected [256]"),
    (DIT + "joint_blocks.1.context_block.mlp.fc1.bias", (512,), "unexpected model.diffusion_model.joint_blocks.1."),
    (DIT + "joint_blocks.0.x_block.mlp.fc1.bias", None, "missing transformer_blocks.0.ff.net.0.proj.bias"),
])
def test_a_tensor_of_the_wrong_shape_is_told(published, tmp_path, name, shape, words):
    tensors, _ = contents(published, clips=True)
    tensors = {n: t for n, t in tensors.items() if n != name} | ({name: torch.ones(shape)} if shape else {})
    checkpoint = open_checkpoint(write(with_tokenizers(tmp_path), tensors), t5=False)
    with pytest.raises(Unfit) as caught:
        checkpoint.load(MMDiT, "transformer")
    assert words in says(caught) and "sd3_medium.safetensors/transformer does not fit MMDiT" in says(caught)


def test_other_faults_of_a_single_file(published, tmp_path):
    file = write(with_tokenizers(tmp_path), contents(published)[0])
    with pytest.raises(Unavailable) as caught:
        open_checkpoint(file)
    for word in (str(file), str(tmp_path), "text_encoder, text_encoder_2:", "or sd3",
                 "sd3_medium_incl_clips.safetensors"):
        assert word in says(caught), says(caught)
    checkpoint = open_checkpoint(file, ["transformer", "vae"])  # no more was asked for
    with pytest.raises(Unavailable, match="has no text_encoder"):
        checkpoint.load(CLIPText, "text_encoder")
    with pytest.raises(ValueError, match="which is a file"):
        open_checkpoint(file, rest=file)
    with pytest.raises(ValueError, match="is for a hub id"):
        open_checkpoint(file, revision="main")
    with pytest.raises(ValueError, match="are for a single file that lacks them"):
        open_checkpoint(tmp_path, rest=tmp_path)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(Unfit, match="cut short or damaged"):
        open_checkpoint(file, ["transformer"])


def test_the_weights_command_takes_a_single_file(published, tmp_path, capsys):
    file = write(tmp_path, contents(published)[0])
    assert weights.main(["verify", str(file)]) == 0
    told = capsys.readouterr()
    assert hashlib.sha256(file.read_bytes()).hexdigest() in told.out and "1 files" in told.err
    assert weights.main(["list", str(file), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["state"], record["bytes"], record["source"]) == ("complete", file.stat().st_size, str(file))
    file.write_bytes(file.read_bytes()[:-9])
    assert weights.main(["verify", str(file)]) == 3
    assert "cut short or damaged" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- against the converters


def made_from_places(part, kind, config):
    """A random single file's tensors of one component, named and shaped by our own table."""
    theirs = network(kind, 7, **config).state_dict()
    counts = {f"joint_blocks.{i}.": None for i in range(config.get("num_layers", 0))} | {
        name: None for level in range(len(config.get("block_out_channels", ())))
        for name in (f"encoder.down.{level}.", *(f"encoder.down.0.block.{j}." for j in range(2)))}
    made = {}
    for stored, places in single_files.places(part, counts).items():
        if all(place.name in theirs for place in places):
            shapes = [theirs[place.name].shape for place in places]
            made[stored] = torch.randn(sum(shape[0] for shape in shapes), *shapes[0][1:]).half()
    return made


@pytest.mark.parametrize("config", [TRANSFORMER, TRANSFORMER | NEWER], ids=["sd3", "sd3.5"])
def test_the_transformer_is_what_diffusers_converts(config, tmp_path):
    converters = pytest.importorskip("diffusers.loaders.single_file_utils", reason="the oracle, diffusers, is not there")
    stored = made_from_places("transformer", MMDiT, config)
    file = write(tmp_path, {DIT + name: tensor for name, tensor in stored.items()})
    ours = open_checkpoint(file, ["transformer"]).load(MMDiT, "transformer")
    assert ours.config == MMDiT.Config.from_json(json.dumps(config))
    left = {DIT + name: tensor for name, tensor in stored.items()}
    same(ours.state_dict(), converters.convert_sd3_transformer_checkpoint_to_diffusers(left))
    assert left == {}                                           # the converter knew every one of them too


def test_the_vae_is_what_diffusers_converts(tmp_path):
    converters = pytest.importorskip("diffusers.loaders.single_file_utils", reason="the oracle, diffusers, is not there")
    stored = {VAE + name: tensor for name, tensor in made_from_places("vae", AutoencoderKL, AUTOENCODER).items()}
    for name in stored:
        if re.search(r"attn_1\.(q|k|v|proj_out)\.weight", name):
            stored[name] = stored[name][:, :, None, None].contiguous()
    block = made_from_places("transformer", MMDiT, TRANSFORMER)
    file = write(tmp_path, stored | {DIT + name: tensor for name, tensor in block.items()})
    ours = open_checkpoint(file, ["vae"]).load(AutoencoderKL, "vae")
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    same(ours.state_dict(), converters.convert_ldm_vae_checkpoint(load_file(file), blocks))
    assert ours.config == AutoencoderKL.Config.from_json(json.dumps(AUTOENCODER))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="counts resident memory as Linux does")
def test_peak_memory_is_the_network_plus_one_tensor(tmp_path, forked):
    config = TRANSFORMER | {"num_attention_heads": 8, "caption_projection_dim": 512, "num_layers": 5}
    torch.manual_seed(0)
    stored = made_from_places("transformer", MMDiT, config)
    file = write(tmp_path, {DIT + name: tensor for name, tensor in stored.items()})
    network = "from sifm_min.models.mmdit import MMDiT as Network\n"
    ran = forked("-c", peak_memory.script(network, "transformer"), file)
    assert not ran.returncode, ran.stderr
    assert 0.9 < float(ran.stdout) < 1.35, ran.stdout           # the network 1; a fused tensor 0.02, a renewal 0.17
