"""models/checkpoints.py: loading against files that safetensors, diffusers and transformers wrote, and fetching against
a hub of our own on the loopback interface, which also misbehaves."""

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import peak_memory
import pytest
import torch
from hub import Hub, break_off, hang, status, text, unless_token
from huggingface_hub import constants, file_download
from safetensors.torch import load_file, save, save_file
from torch import nn

from sifm_min.models import checkpoints
from sifm_min.models.checkpoints import EDITORS, Unavailable, Unfit, open_checkpoint

ALL = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
WITHOUT_T5 = ("transformer", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
SD3 = (*WITHOUT_T5[:4], "text_encoder_3", *WITHOUT_T5[4:6], "tokenizer_3", "scheduler")
ROOT = Path(__file__).resolve().parents[1]
PLAIN, HALF = "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors"


# ----------------------------------------------------------------------------------------------- a network to load into


@dataclass(frozen=True)
class TinyConfig:
    width: int

    @classmethod
    def from_json(cls, text):
        given = {key: value for key, value in json.loads(text).items() if not key.startswith("_")}
        if extra := sorted(given.keys() - {"width"}):
            raise ValueError(f"config.json sets {', '.join(extra)}, which this network does not implement")
        return cls(**given)


class Tiny(nn.Module):
    Config = TinyConfig

    def __init__(self, config):
        super().__init__()
        self.to_q = nn.Linear(config.width, config.width)
        self.conv = nn.Conv2d(3, config.width, 3)
        self.norm = nn.BatchNorm2d(config.width)                # has buffers, one of them of whole numbers

    @staticmethod
    def rename(name):
        return None if name.endswith("position_ids") else name.replace("query.", "to_q.")


def tensors(width=4, seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    state = Tiny(TinyConfig(width)).state_dict()
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in state.items()}


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


@pytest.fixture
def folder(tmp_path):
    """A folder in the published layout whose U-Net is a `Tiny`."""
    write(tmp_path / "unet/config.json", '{"width": 4, "_class_name": "Tiny"}')
    save_file(tensors(), tmp_path / "unet" / PLAIN)
    return tmp_path


def load(folder, **options):
    return open_checkpoint(folder, ["unet"]).load(Tiny, "unet", **options)


def says(caught):
    """The message, after a check that it is one sentence for a person."""
    text = str(caught.value)
    assert "\n" not in text and 20 < len(text) < 600 and "Traceback" not in text, text
    return text


def assert_same(state, expected):
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert state[name].dtype == tensor.dtype and torch.equal(state[name], tensor), name


# -------------------------------------------------------------------------------------------------------------- loading


def test_load_gives_the_files_tensors_bit_for_bit(folder):
    network = load(folder)
    assert_same(network.state_dict(), tensors())
    assert not network.training and not any(p.requires_grad for p in network.parameters())
    assert not any(t.is_meta for t in (*network.parameters(), *network.buffers()))
    assert network.to_q(torch.ones(1, 4)).shape == (1, 4)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("asked", [None, torch.float16, torch.bfloat16, torch.float32])
def test_dtype_is_the_files_unless_asked_and_whole_numbers_stay(folder, stored, asked):
    save_file(tensors(dtype=stored), folder / "unet" / PLAIN)
    state = load(folder, dtype=asked).state_dict()
    assert_same(state, {n: t.to(asked or stored) if t.is_floating_point() else t
                        for n, t in tensors(dtype=stored).items()})
    assert state["norm.num_batches_tracked"].dtype == torch.int64


class Blocks(nn.Module):
    """Parts in parts, as the networks have them, and a parameter of its own."""

    Config = TinyConfig

    def __init__(self, config):
        super().__init__()
        self.scale = nn.Parameter(torch.empty(config.width))
        self.first = nn.Linear(config.width, config.width)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(config.width, config.width, 3), nn.GroupNorm(2, config.width))
                                    for _ in range(3))

    def forward(self, x, upto=3):                            # (B, width)
        x = self.first(x) * self.scale
        for block in self.blocks[:upto]:
            x = block(x[:, :, None, None].expand(-1, -1, 3, 3)).flatten(1)
        return x


@pytest.fixture
def blocks(tmp_path):
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet/config.json").write_text('{"width": 4}')
    torch.manual_seed(0)
    network = Blocks(TinyConfig(4))
    nn.init.ones_(network.scale)
    save_file(network.state_dict(), tmp_path / "unet" / PLAIN)
    return open_checkpoint(tmp_path, ["unet"]), network.eval()


def test_lazy_parts_are_read_when_they_first_run(blocks):
    checkpoint, expected = blocks
    network, x = checkpoint.load(Blocks, "unet", lazily=True), torch.rand(2, 4)
    assert {name for name, tensor in network.state_dict().items() if not tensor.is_meta} == {"scale"}
    torch.testing.assert_close(network(x, upto=1), expected(x, upto=1).detach())
    meta = {name for name, tensor in network.state_dict().items() if tensor.is_meta}
    assert meta == {name for name in network.state_dict() if name.startswith(("blocks.1.", "blocks.2."))}
    network.blocks[1][0](torch.rand(1, 4, 3, 3))             # a layer alone, and then the block that it is in
    for _ in range(2):
        torch.testing.assert_close(network(x), expected(x).detach())
    assert not any(weight.requires_grad for weight in network.parameters()) and not network.training
    assert all(torch.equal(tensor, expected.state_dict()[name]) for name, tensor in network.state_dict().items())
    assert not any(part._forward_pre_hooks for part in network.modules() if not isinstance(part, nn.ModuleList))


def test_lazily_dtype_device_and_layout_are_as_asked(blocks):
    network = blocks[0].load(Blocks, "unet", dtype=torch.bfloat16, lazily=True)
    network(torch.rand(2, 4).bfloat16())
    assert {weight.dtype for weight in network.parameters()} == {torch.bfloat16}
    assert network.blocks[0][0].weight.is_contiguous(memory_format=torch.channels_last)


def test_lazily_a_network_may_change_its_dtype_before_it_is_read(blocks):
    checkpoint, expected = blocks
    network, x = checkpoint.load(Blocks, "unet", lazily=True).double(), torch.rand(2, 4).double()
    torch.testing.assert_close(network(x), expected.double()(x).detach())
    assert {weight.dtype for weight in network.parameters()} == {torch.float64}


def test_lazy_misfits_are_told_at_once_and_lost_files_later(blocks):
    checkpoint, _ = blocks
    network = checkpoint.load(Blocks, "unet", lazily=True)
    (checkpoint.folder / "unet" / PLAIN).unlink()
    with pytest.raises(Unavailable, match="can no longer be read .*changed after it was opened"):
        network(torch.rand(2, 4))
    save_file({"scale": torch.ones(4)}, checkpoint.folder / "unet" / PLAIN)
    with pytest.raises(Unfit, match="missing first"):
        checkpoint.load(Blocks, "unet", lazily=True)


def test_load_puts_tensors_on_the_device(folder):
    assert {t.device.type for t in load(folder, device="meta").state_dict().values()} == {"meta"}
    if torch.cuda.is_available():
        network = load(folder, device="cuda", dtype=torch.float16)
        assert {t.device.type for t in network.state_dict().values()} == {"cuda"}
        assert torch.equal(network.to_q.weight.cpu(), tensors()["to_q.weight"].half())


def test_other_spellings_dropped_names_and_1x1_convolutions(folder):
    state = tensors()
    renamed = {name.replace("to_q.", "query."): tensor for name, tensor in state.items()}
    renamed["query.weight"] = renamed["query.weight"][:, :, None, None].contiguous()
    renamed["embeddings.position_ids"] = torch.arange(7)
    save_file(renamed, folder / "unet" / PLAIN)
    assert_same(load(folder).state_dict(), state)


def without(*names):
    return lambda state: {name: tensor for name, tensor in state.items() if name not in names}


def plus(**extra):
    return lambda state: state | {name.replace("__", "."): tensor for name, tensor in extra.items()}


@pytest.mark.parametrize("change, words", [
    (without("conv.bias"), ["1 missing, 0 unexpected, 0 wrong", "missing conv.bias"]),
    (plus(conv__gate=torch.ones(1)), ["0 missing, 1 unexpected", "unexpected conv.gate"]),
    (plus(conv__bias=torch.ones(5)), ["conv.bias is [5], expected [4]"]),
    (plus(conv__weight=torch.ones(4, 3, 3, 3, 1)), ["conv.weight is [4, 3, 3, 3, 1], expected [4, 3, 3, 3]"]),
    (plus(to_q__weight=torch.ones(4, 4, 1)), ["to_q.weight is [4, 4, 1], expected [4, 4]"]),
    (plus(conv__bias=torch.ones(4, dtype=torch.int64)), ["conv.bias holds I64, expected a float type"]),
    (plus(norm__num_batches_tracked=torch.tensor(1.0)), ["num_batches_tracked holds F32, expected whole numbers"]),
    (plus(query__bias=torch.ones(4)), ["query.bias", "both stand for to_q.bias"]),
    (lambda state: {"model." + n: t for n, t in state.items()},
     ["9 missing, 9 unexpected", "missing to_q.weight", "unexpected model.conv.bias", "and 13 more"]),
    (lambda state: {}, ["9 missing"]),
], ids=["missing", "extra", "misshapen", "one-axis-more", "not-1x1", "whole-for-float", "float-for-whole", "twice",
        "prefix", "empty"])
def test_misfit_names_the_tensors_and_reads_none(folder, monkeypatch, change, words):
    save_file(change(tensors()), folder / "unet" / PLAIN)
    real, reads = checkpoints.safe_open, []

    class Watched:
        def __init__(self, *args, **kwargs):
            self.real = real(*args, **kwargs)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

        def __getattr__(self, name):
            reads.append(name)
            return getattr(self.real, name)

    monkeypatch.setattr(checkpoints, "safe_open", Watched)
    with pytest.raises(ValueError) as caught:                   # Unfit is both: a wrong value, and no weights
        load(folder)
    assert isinstance(caught.value, Unavailable)
    text = says(caught)
    assert all(word in text for word in [*words, "unet", "Tiny"]), text
    assert reads and "get_tensor" not in reads


def shard(folder, state, names, index="diffusion_pytorch_model.safetensors.index.json"):
    """Write `state` in shards called `names`, with its index."""
    table = {tensor: names[i % len(names)] for i, tensor in enumerate(sorted(state))}
    for name in set(names):
        save_file({t: state[t] for t, file in table.items() if file == name}, folder / "unet" / name)
    write(folder / "unet" / index, json.dumps({"metadata": {"total_size": 1}, "weight_map": table}))


def test_the_half_precision_variant_is_preferred(folder):
    save_file(tensors(seed=1, dtype=torch.float16), folder / "unet" / HALF)
    assert load(folder).to_q.weight.dtype == torch.float16
    (folder / "unet" / HALF).unlink()
    assert load(folder).to_q.weight.dtype == torch.float32


def test_several_variants_without_a_plain_file_are_told(folder):
    names = [f"diffusion_pytorch_model.{variant}.safetensors" for variant in ("bf16", "non_ema")]
    (folder / "unet" / PLAIN).rename(folder / "unet" / names[0])
    assert_same(load(folder).state_dict(), tensors())
    save_file(tensors(seed=1), folder / "unet" / names[1])
    with pytest.raises(Unfit) as caught:
        load(folder)
    assert all(word in says(caught) for word in [*names, str(folder), "moving the others out of unet/"])
    (folder / "unet" / names[1]).rename(folder / "unet" / PLAIN)                # the plain one before an unknown variant
    assert_same(load(folder).state_dict(), tensors(seed=1))


@pytest.mark.parametrize("index, names", [
    ("diffusion_pytorch_model.safetensors.index.json", ["d-00001-of-00002.safetensors", "x.safetensors"]),
    ("diffusion_pytorch_model.safetensors.index.fp16.json", ["d.fp16-00001-of-00002.safetensors", "x.safetensors"]),
    ("model.safetensors.index.json", ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]),
    ("model.safetensors.index.bf16.json", ["model.bf16-00001-of-00002.safetensors", "model.bf16-00002-of-00002.safetensors"]),
    ("diffusion_pytorch_model.bf16.safetensors.index.json",         # by hand; the shards as older diffusers names them
     [f"diffusion_pytorch_model-0000{i}-of-00002.bf16.safetensors" for i in (1, 2)]),
    ("model.safetensors.index.fp16.json", ["m.fp16-00001-of-00002.safetensors", "m.fp16-00002-of-00002.safetensors"]),
])
def test_shards_are_found_through_their_index_alone(folder, index, names):
    (folder / "unet" / PLAIN).unlink()
    shard(folder, tensors(), names, index)
    save_file({"stray": torch.ones(1)}, folder / "unet" / "stray-00003-of-00003.safetensors")       # not in the index
    checkpoint = open_checkpoint(folder, ["unet"])
    assert_same(checkpoint.load(Tiny, "unet").state_dict(), tensors())
    assert list(checkpoint.hashes()) == sorted(f"unet/{name}" for name in names)


@pytest.mark.parametrize("content, word", [
    ('{"weight_map": {"conv.bias": "../secret.safetensors"}}', "'../secret.safetensors'"),
    ('{"weight_map": {"conv.bias": "/etc/passwd.safetensors"}}', "'/etc/passwd.safetensors'"),
    ('{"weight_map": {"conv.bias": "..\\\\secret.safetensors"}}', "secret.safetensors'"),
    ('{"weight_map": {"conv.bias": "weights.bin"}}', "'weights.bin'"),
    ('{"weight_map": {"conv.bias": "a.safetensors\\n"}}', "beside its index"),
    ('{"weight_map": {"conv.bias": 3}}', "no weight_map"),
    ('{"weight_map": []}', "no weight_map"),
    ('{"metadata": {}}', "no weight_map"),
    ('{"weight_map": {', "not valid JSON"),
    ('{"weight_map": {"conv.bias": "gone.safetensors"}}', "lists the shard gone.safetensors"),
])
def test_a_bad_index_is_refused(folder, content, word):
    save_file(tensors(), folder / "secret.safetensors")
    (folder / "unet" / PLAIN).unlink()
    write(folder / "unet/diffusion_pytorch_model.safetensors.index.json", content)
    with pytest.raises(Unavailable) as caught:
        load(folder)
    assert word in says(caught) and ".index.json" in says(caught)


def test_a_tensor_in_the_wrong_shard_or_in_two_is_told(folder):
    (folder / "unet" / PLAIN).unlink()
    shard(folder, tensors(), ["a.safetensors", "b.safetensors"])
    whole = load_file(folder / "unet/a.safetensors") | {"conv.weight": tensors()["conv.weight"]}
    save_file(whole | load_file(folder / "unet/b.safetensors"), folder / "unet/a.safetensors")
    with pytest.raises(Unfit, match="both stand for"):
        load(folder)


@pytest.mark.parametrize("harm, words", [
    (lambda folder: (folder / "m-2.safetensors").unlink(), ["lists the shard m-2.safetensors, which is not there"]),
    (lambda folder: cut(-7)(folder / "m-2.safetensors"), ["m-2.safetensors is cut short or damaged", "fetch it again"]),
    (lambda folder: save_file(load_file(folder / "m-1.safetensors") | {"norm.bias": torch.ones(5)},
                              folder / "m-1.safetensors"), ["norm.bias is [5], expected [4]", "1 wrong"]),
    (lambda folder: save_file({}, folder / "m-1.safetensors"), ["5 missing, 0 unexpected, 0 wrong"]),
], ids=["missing", "truncated", "misshapen", "empty"])
def test_a_bad_shard_is_told(folder, harm, words):
    (folder / "unet" / PLAIN).unlink()
    shard(folder, tensors(), ["m-1.safetensors", "m-2.safetensors"], "model.safetensors.index.fp16.json")
    harm(folder / "unet")
    with pytest.raises(Unavailable) as caught:
        load(folder)
    assert all(word in says(caught) for word in words), says(caught)


def test_the_index_of_the_published_t5_is_read(shared, folder):
    """Its half-precision variant puts fp16 before the number of the shard, and after the word index."""
    (folder / "unet" / PLAIN).unlink()
    table = json.loads((shared / "data/checkpoints/sd3_t5_xxl.shards_fp16.json").read_text())
    shards = [f"model.fp16-0000{i}-of-00002.safetensors" for i in (1, 2)]
    write(folder / "unet/model.safetensors.index.fp16.json", json.dumps({"weight_map": table.get("weight_map", table)}))
    write(folder / "unet/model.safetensors.index.json", '{"weight_map": {"a": "model-00001-of-00002.safetensors"}}')
    with pytest.raises(Unavailable, match=f"index.fp16.json lists the shard {shards[0]}, which is not there"):
        load(folder)
    for name in shards:
        write(folder / "unet" / name, b"")
    assert open_checkpoint(folder, ["unet"]).files[1:] == (
        "unet/model.safetensors.index.fp16.json", *(f"unet/{name}" for name in shards))


def cut(length):
    return lambda path: path.write_bytes(path.read_bytes()[:length])


def as_folder(path):
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("harm, words", [
    (cut(-1), ["cut short or damaged", "fetch it again"]),
    (cut(40), ["cut short or damaged"]),
    (cut(0), ["cut short or damaged"]),
    (lambda path: path.write_bytes(path.read_bytes() + b"tail"), ["cut short or damaged"]),
    (lambda path: path.write_bytes(b"\xff" * 4000), ["cut short or damaged"]),
    (lambda path: path.write_bytes(b"\n<!DOCTYPE html><title>Sign in</title>" * 40), ["a web page", "fetch it again"]),
    (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\nsize 9\n"), ["git lfs pull"]),
    (as_folder, ["is a folder where a file"]),
], ids=["last-byte", "header", "empty", "appended", "noise", "html", "lfs-pointer", "folder"])
def test_damaged_weights_are_told_with_their_path(folder, harm, words):
    path = folder / "unet" / PLAIN
    harm(path)
    with pytest.raises(Unavailable) as caught:
        load(folder)
    assert str(path) in says(caught) and all(word in says(caught) for word in words), says(caught)


def test_unreadable_files_are_told(folder, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")       # the tests may run as root, who may read every file

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "safe_open", refuse)
        with pytest.raises(Unavailable, match="Permission denied") as caught:
            load(folder)
        assert PLAIN in says(caught)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", refuse)
        with pytest.raises(Unavailable, match=r"config\.json cannot be read: Permission denied"):
            load(folder)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "iterdir", refuse)
        with pytest.raises(Unavailable, match="unet cannot be read: Permission denied"):
            load(folder)


@pytest.mark.parametrize("harm, words", [
    (lambda path: path.unlink(), ["has no unet/config.json", "save_pretrained"]),
    (lambda path: path.write_text('{"width": 4,'), ["not valid JSON"]),
    (lambda path: path.write_text("[" * 100_000), ["not valid JSON"]),
    (lambda path: path.write_text("[4]"), ["holds a JSON list"]),
    (lambda path: path.write_bytes(b'{"width": "\xff"}'), ["not text in UTF-8"]),
    (as_folder, ["is a folder where a file is expected"]),
    (lambda path: path.write_text('{"width": 4, "depth": 2}'), ["sets depth", "does not implement"]),
    (lambda path: path.write_text('{"width": "wide"}'), ["config.json"]),
    (lambda path: path.write_text('{"width": -4}'), ["config.json does not describe a Tiny"]),
    (lambda path: path.write_text('{}'), ["config.json", "width"]),
], ids=["missing", "cut", "deep", "list", "binary", "folder", "unknown-key", "text-for-number", "negative", "empty"])
def test_a_bad_config_is_told_with_its_path(folder, harm, words):
    harm(folder / "unet/config.json")
    with pytest.raises(Unavailable) as caught:
        load(folder)
    assert all(word in says(caught) for word in ["unet", *words]), says(caught)


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "pytorch_model.bin", "model.ckpt", "a.msgpack"])
def test_pickles_are_refused_with_the_command_that_converts_them(folder, name):
    (folder / "unet" / PLAIN).rename(folder / "unet" / name)
    with pytest.raises(Unavailable) as caught:
        load(folder)
    assert f"unet/{name}" in says(caught) and "refused" in says(caught)
    assert f"P.from_pretrained('{folder}').save_pretrained('converted')" in says(caught)


@pytest.mark.parametrize("present, component, word", [
    ([], "unet", "no unet/config.json"),
    (["unet/config.json"], "unet", "no weights in unet/"),
    (["unet/config.json", "unet/other.safetensors"], "unet", "no weights in unet/"),
    (["unet/config.json", "unet/other.safetensors"], "unet", "the files there are other.safetensors"),
    (["tokenizer/vocab.json"], "tokenizer", "vocab.json and merges.txt, or tokenizer.json"),
    (["tokenizer/merges.txt"], "tokenizer", "vocab.json and merges.txt, or tokenizer.json"),
    ([], "tokenizer", "vocab.json and merges.txt, or tokenizer.json"),
    ([], "scheduler", "no scheduler/scheduler_config.json"),
])
def test_missing_files_of_a_folder_are_named_on_opening(tmp_path, present, component, word):
    for name in present:
        write(tmp_path / name, "{}")
    with pytest.raises(Unavailable) as caught:
        open_checkpoint(tmp_path, [component])
    assert word in says(caught) and str(tmp_path) in says(caught)


@pytest.mark.parametrize("component, files", [
    ("tokenizer", ["vocab.json", "merges.txt"]), ("tokenizer_2", ["tokenizer.json"]),
    ("tokenizer_3", ["tokenizer.json"]), ("tokenizer_3", ["spiece.model"])])
def test_all_kinds_of_tokenizer_files_will_do(tmp_path, component, files):
    for name in files:
        write(tmp_path / component / name, "{}")
    assert open_checkpoint(tmp_path, [component]).files == tuple(f"{component}/{name}" for name in files)
    beside = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
    for name in beside:
        write(tmp_path / component / name, "{}")
    assert open_checkpoint(tmp_path, [component]).files == tuple(f"{component}/{name}" for name in (*beside, *files))


NONE, THERE = [None, None], ["transformers", "T5EncoderModel"]


@pytest.mark.parametrize("index, t5, expected", [
    ({}, True, ALL),
    ({"_class_name": "StableDiffusionInstructPix2PixPipeline", "text_encoder_3": THERE, "tokenizer_3": THERE}, True, ALL),
    ({"_class_name": "StableDiffusion3Pipeline", "text_encoder_3": THERE, "tokenizer_3": THERE}, True, SD3),
    ({"_class_name": "StableDiffusion3Img2ImgPipeline", "text_encoder_3": THERE, "tokenizer_3": THERE}, True, SD3),
    ({"_class_name": "StableDiffusion3InstructPix2PixPipeline", "text_encoder_3": THERE, "tokenizer_3": THERE}, True, SD3),
    ({"_class_name": "StableDiffusion3Pipeline", "text_encoder_3": THERE, "tokenizer_3": THERE}, False, WITHOUT_T5),
    ({"_class_name": "StableDiffusion3Pipeline", "text_encoder_3": NONE, "tokenizer_3": NONE}, True, WITHOUT_T5),
    ({"_class_name": "StableDiffusion3Pipeline", "text_encoder_3": NONE, "tokenizer_3": THERE}, True, WITHOUT_T5),
    ({"_class_name": "StableDiffusion3Pipeline", "text_encoder_3": None, "tokenizer_3": None}, True, WITHOUT_T5),
    ({"_class_name": "StableDiffusion3Pipeline"}, True, WITHOUT_T5),
])
def test_the_components_are_those_that_the_index_names(index, t5, expected):
    assert checkpoints.pipeline_components(index, "here", t5=t5) == expected


@pytest.mark.parametrize("name", ["StableDiffusionXLPipeline", ["StableDiffusion3Pipeline"], None, 3])
def test_another_pipeline_is_told(tmp_path, name):
    write(tmp_path / "model_index.json", json.dumps({"_class_name": name}))
    with pytest.raises(Unfit, match="which is not implemented; implemented are StableDiffusionInstructPix2PixPipeline, ") as e:
        open_checkpoint(tmp_path)
    assert f"{tmp_path} is a {name}" in says(e)


def test_the_index_is_read_and_told_where_it_is_bad(tmp_path):
    assert open_checkpoint(tmp_path, []).index == {} and open_checkpoint(tmp_path, []).components == ()
    write(tmp_path / "model_index.json", '{"a": [1]}')
    assert open_checkpoint(tmp_path, []).index == {"a": [1]}
    for bad in ("{", "[3]"):
        write(tmp_path / "model_index.json", bad)
        for read in (lambda: open_checkpoint(tmp_path, []).index, lambda: open_checkpoint(tmp_path)):
            with pytest.raises(Unfit, match=r"model_index\.json"):
                read()


def test_texts_hashes_and_paths_out_of_the_checkpoint(folder):
    checkpoint = open_checkpoint(str(folder), ["unet"])
    assert (checkpoint.folder, checkpoint.source, checkpoint.revision) == (folder, str(folder), None)
    assert json.loads(checkpoint.text("unet/config.json"))["width"] == 4
    assert checkpoint.has(f"unet/{PLAIN}") and not checkpoint.has("unet") and not checkpoint.has("vae/config.json")
    with pytest.raises(Unavailable, match="is missing"):
        checkpoint.text("vae/config.json")
    write(folder.parent / "secret.txt", "secret")
    for path in ("../secret.txt", "unet/../../secret.txt", str(folder.parent / "secret.txt"), "..\\secret.txt"):
        with pytest.raises(ValueError, match="leads out of the checkpoint"):
            checkpoint.text(path)
        with pytest.raises(ValueError, match="leads out of the checkpoint"):
            checkpoint.has(path)
    assert checkpoint.hashes() == {}                            # nothing loaded yet
    checkpoint.load(Tiny, "unet")
    expected = hashlib.sha256((folder / "unet" / PLAIN).read_bytes()).hexdigest()
    assert checkpoint.hashes() == {f"unet/{PLAIN}": expected}


@pytest.mark.parametrize("source, word", [
    ("", "neither a known editor"),
    ("instruct", f"neither a known editor ({', '.join(EDITORS)})"),
    ("/no/such/folder", "nor a folder that exists"),
    ("./no-such-folder", "nor a folder that exists"),
    ("a/b/c", "nor a hub id"),
    ("../a/b", "neither a known editor"),
    ("https://huggingface.co/timbrooks/instruct-pix2pix", "nor a hub id"),
])
def test_a_source_that_means_nothing(source, word):
    with pytest.raises(ValueError) as caught:
        open_checkpoint(source, ALL, offline=True)
    assert word in says(caught) and not isinstance(caught.value, Unavailable)


def test_a_file_and_a_folder_with_a_revision_are_told(folder):
    with pytest.raises(ValueError, match="is a file; give the folder"):
        open_checkpoint(folder / "unet/config.json", ["unet"])
    with pytest.raises(ValueError, match="is for a hub id"):
        open_checkpoint(folder, ["unet"], revision="main")
    with pytest.raises(ValueError, match="not a commit, tag or branch"):
        open_checkpoint("owner/name", ["unet"], revision="../main")


def test_a_shipped_editor_without_its_weights_is_told(tmp_path, monkeypatch):
    source = checkpoints.Source(name="shipped", licence="none", folder=tmp_path / "gone")
    monkeypatch.setitem(EDITORS, "shipped", source)
    with pytest.raises(Unavailable, match="shipped editor shipped lacks its weights"):
        open_checkpoint("shipped", ALL)


def test_the_table_of_editors():
    assert [name for name in EDITORS if name != "miniature-sd3"] == [
        "miniature", "instruct-pix2pix", "hq-edit", "sd3", "ultraedit", "flux-kontext", "flux-klein"]
    assert all(name == source.name and source.licence for name, source in EDITORS.items())
    assert all((source.folder is None) != (source.hub_id is None) for source in EDITORS.values())
    models = Path(checkpoints.__file__).resolve().parent
    assert EDITORS["miniature"].folder == models / "miniature"
    assert EDITORS["instruct-pix2pix"].revision == "31519b5cb02a7fd89b906d88731cd4d6a7bbf88d"
    assert EDITORS["hq-edit"].hub_id == "MudeHui/HQ-Edit" and EDITORS["hq-edit"].revision is None
    assert ("miniature-sd3" in EDITORS) == (models / "miniature-sd3").is_dir()
    assert [name for name, source in EDITORS.items() if source.gated] == ["sd3", "flux-kontext"]
    assert EDITORS["flux-klein"].licence == "Apache-2.0" and "Non-Commercial" in EDITORS["flux-kontext"].licence
    assert EDITORS["sd3"].hub_id == "stabilityai/stable-diffusion-3-medium-diffusers"
    assert EDITORS["sd3"].revision == "b1148b4028b9ec56ebd36444c193d56aeff7ab56"
    assert EDITORS["ultraedit"].hub_id == "BleachNick/SD3_UltraEdit_freeform" and EDITORS["ultraedit"].revision
    assert all(source.size_without_t5 < source.size for source in (EDITORS["sd3"], EDITORS["ultraedit"]))
    digests = [digest for source in EDITORS.values() for digest in source.files.values()]
    assert digests and all(len(digest) == 64 and int(digest, 16) for digest in digests)


def test_the_published_checksums_are_those_of_the_notes(shared):
    notes = (shared / "reference/checkpoints.md").read_text()
    for file, digest in EDITORS["instruct-pix2pix"].files.items():
        assert any(f"`{file}`" in line and digest in line for line in notes.splitlines()), file


WIDE = """
class Network(torch.nn.Module):
    class Config:
        from_json = staticmethod(lambda text: None)

    def __init__(self, config):
        super().__init__()
        for i in range(48):
            self.register_parameter(f"w{i}", torch.nn.Parameter(torch.empty(1024, 1024)))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="counts resident memory as Linux does")
@pytest.mark.parametrize("shards", [1, 3])
def test_peak_memory_is_the_network_plus_one_tensor(tmp_path, shards, forked):
    """Half precision on disk, float32 in memory: to keep the file's pages would take half as much again."""
    write(tmp_path / "unet/config.json", "{}")
    state = {f"w{i}": torch.zeros(1024, 1024, dtype=torch.float16) for i in range(48)}
    if shards == 1:
        save_file(state, tmp_path / "unet" / PLAIN)
    else:
        shard(tmp_path, state, [f"m-{i}.safetensors" for i in range(shards)])
    ran = forked("-c", peak_memory.script(WIDE, "unet"), tmp_path)
    assert not ran.returncode, ran.stderr
    assert 0.9 < float(ran.stdout) < 1.15, ran.stdout           # the network 1; a tensor 0.02, a renewal 0.08


MAPPED = """
import re, sys
from pathlib import Path
from torch import nn
from sifm_min.models.checkpoints import open_checkpoint

class Convolutions(nn.Module):
    class Config:
        from_json = staticmethod(lambda text: None)

    def __init__(self, config):
        super().__init__()
        self.layers = nn.Sequential(*(nn.Conv2d(256, 256, 3) for i in range(16)))
        self.linear = nn.Linear(1024, 1024)

network = open_checkpoint(sys.argv[1], ["unet"]).load(Convolutions, "unet", lazily=True)
for layer in (*network.layers, network.linear):
    layer(layer.weight.new_zeros(1, *((256, 3, 3) if layer is not network.linear else (1024,)), device="cpu"))
held, of_file = 0, False
for line in Path("/proc/self/smaps").read_text().splitlines():
    if re.match("[0-9a-f]+-[0-9a-f]+ ", line):
        of_file = line.endswith(".safetensors")
    elif of_file and line.startswith("Rss:"):
        held += int(line.split()[1]) * 1024
print(held / (1024 * 1025 * 4))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="reads what is mapped as Linux tells it")
def test_copied_tensors_do_not_keep_the_mapping(tmp_path, forked):
    """Weights of convolutions change their layout, biases and matrices stay where they are; each bias would keep the pages of
    the weights that were read beside it."""
    write(tmp_path / "unet/config.json", "{}")
    state = {f"layers.{i}.weight": torch.zeros(256, 256, 3, 3) for i in range(16)}
    state |= {f"layers.{i}.bias": torch.zeros(256) for i in range(16)}
    save_file(state | {"linear.weight": torch.zeros(1024, 1024), "linear.bias": torch.zeros(1024)}, tmp_path / "unet" / PLAIN)
    ran = forked("-c", MAPPED, tmp_path)
    assert not ran.returncode, ran.stderr
    assert 0.5 < float(ran.stdout) < 1.6, ran.stdout            # the matrix 1; the weights of the convolutions 9


@pytest.mark.slow
def test_loading_an_editor_does_not_import_the_compiler(forked):
    """Two seconds and more, of every command, for networks that compile nothing."""
    code = ("import sys, torch, sifm_min; before = 'torch._dynamo' in sys.modules; sifm_min.load_editor('miniature');"
            "sifm_min.load_editor('miniature-sd3'); print(before or 'torch._dynamo' not in sys.modules)")
    ran = forked("-c", code)
    assert ran.stdout == "True\n", ran.stderr


# ------------------------------------------------------------------------------- folders that the real libraries wrote


def unet():
    diffusers = pytest.importorskip("diffusers", reason="writes the folders that are loaded here")
    from sifm_min.models.unet import UNet
    return UNet, diffusers.UNet2DConditionModel(
        in_channels=8, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=16, attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))


def vae():
    diffusers = pytest.importorskip("diffusers", reason="writes the folders that are loaded here")
    from sifm_min.models.vae import AutoencoderKL
    return AutoencoderKL, diffusers.AutoencoderKL(
        block_out_channels=(32, 64), latent_channels=4, down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2)


def text_encoder():
    transformers = pytest.importorskip("transformers", reason="writes the folders that are loaded here")
    from sifm_min.models.clip import CLIPText
    return CLIPText, transformers.CLIPTextModel(transformers.CLIPTextConfig(
        vocab_size=60, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=12))


@pytest.mark.parametrize("shards", [False, True], ids=["one-file", "shards"])
@pytest.mark.parametrize("variant", [None, "fp16", "bf16", "non_ema", "my.own-1"])
@pytest.mark.parametrize("network", [unet, vae, text_encoder])
def test_files_of_save_pretrained_load_bit_for_bit(network, variant, shards, tmp_path):
    torch.manual_seed(0)
    ours, theirs = network()
    component = network.__name__
    theirs = theirs.to({"fp16": torch.float16, "bf16": torch.bfloat16}.get(variant))
    size = sum(tensor.numel() * tensor.element_size() for tensor in theirs.state_dict().values())
    theirs.save_pretrained(tmp_path / component, variant=variant,
                           **{"max_shard_size": f"{size // 2048}KB"} if shards else {})
    files = {path.name for path in (tmp_path / component).iterdir()}
    assert shards == (len(files) > 3) and (not variant or any(variant in name for name in files)), files
    checkpoint = open_checkpoint(tmp_path, [component])
    state = checkpoint.load(ours, component).state_dict()
    expected = theirs.state_dict()
    if component == "text_encoder":                             # in memory, unlike in older files, without the prefix
        expected = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in expected.items()}
    assert_same(state, expected)
    assert set(checkpoint.hashes()) == {f"{component}/{name}" for name in files if name.endswith(".safetensors")}


def test_pickles_of_diffusers_are_refused_and_converted(tmp_path, monkeypatch):
    diffusers = pytest.importorskip("diffusers", reason="writes the pipeline that is loaded here")
    ours, theirs = unet()
    whole = diffusers.DDPMPipeline(unet=theirs, scheduler=diffusers.DDPMScheduler())
    whole.save_pretrained(tmp_path / "pickled", safe_serialization=False)
    with pytest.raises(Unavailable, match="only as a pickle") as caught:
        open_checkpoint(tmp_path / "pickled", ["unet", "scheduler"])
    command = says(caught).split('python -c "')[1].removesuffix('"')
    monkeypatch.chdir(tmp_path)
    exec(command, {})
    checkpoint = open_checkpoint("converted", ["unet", "scheduler"])
    assert_same(checkpoint.load(ours, "unet").state_dict(), theirs.state_dict())


# -------------------------------------------------------------------------------------------------------------- the hub

REPO = "owner/editor"
INDEX = b'{"_class_name": "StableDiffusionInstructPix2PixPipeline"}'


def pipeline(seed=0, **changes):
    """The files of a repository that holds what we need, and much that we do not. `changes`: name -> bytes or None."""
    files = {
        "README.md": b"card", "model_index.json": INDEX,
        "editor-00-22000.ckpt": bytes(9000), "editor-00-22000.safetensors": bytes(9000),
        "safety_checker/config.json": b"{}", "safety_checker/model.safetensors": bytes(9000),
        "feature_extractor/preprocessor_config.json": b"{}",
        "scheduler/scheduler_config.json": b'{"a": 1}',
        "tokenizer/vocab.json": b'{"b": 1}', "tokenizer/merges.txt": b"#version",
        "tokenizer/tokenizer.json": bytes(5000), "tokenizer/tokenizer_config.json": b'{"c": 1}',
        "tokenizer/special_tokens_map.json": b'{"d": 1}',
    }
    for i, (component, base) in enumerate((("unet", PLAIN[:-12]), ("vae", PLAIN[:-12]), ("text_encoder", "model"))):
        files |= {                                              # no two files are the same: the cache would keep one
            f"{component}/config.json": b'{"width": 4}' + b" " * i,
            f"{component}/{base}.safetensors": save(tensors(seed=seed + 10 * i)),
            f"{component}/{base}.fp16.safetensors": save(tensors(seed=seed + 10 * i, dtype=torch.float16)),
            f"{component}/{base}.bin": bytes(9000),
        }
    return {name: content for name, content in (files | changes).items() if content is not None}


NEEDED = {
    "model_index.json", "scheduler/scheduler_config.json",
    "tokenizer/vocab.json", "tokenizer/merges.txt",
    "tokenizer/tokenizer_config.json", "tokenizer/special_tokens_map.json",
    "unet/config.json", "vae/config.json", "text_encoder/config.json",
    f"unet/{HALF}", f"vae/{HALF}", "text_encoder/model.fp16.safetensors",
}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub that huggingface_hub talks to in this process, with an empty cache and no token; it never waits."""
    with Hub() as server:
        for name, value in {
            "ENDPOINT": server.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": False,
            "HF_TOKEN_PATH": str(tmp_path / "token"),
        }.items():
            monkeypatch.setattr(constants, name, value)
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(time, "sleep", lambda seconds: None)
        server.add(REPO, pipeline())
        yield server


@pytest.mark.slow
def test_only_what_is_needed_is_fetched_and_then_never_again(hub):
    checkpoint = open_checkpoint(REPO, ALL)
    assert set(hub.asked()) == NEEDED and set(checkpoint.files) == NEEDED - {"model_index.json"}
    assert checkpoint.revision == hub.refs[REPO, "main"] and checkpoint.source == REPO
    assert_same(checkpoint.load(Tiny, "vae").state_dict(), tensors(seed=10, dtype=torch.float16))
    assert checkpoint.text("model_index.json") == INDEX.decode() and checkpoint.has("tokenizer/merges.txt")
    assert hub.asked().index(f"unet/{HALF}") > hub.asked().index("tokenizer/merges.txt")           # small files first
    hub.log.clear()
    for offline in (None, False, True):
        again = open_checkpoint(REPO, ALL, offline=offline)
        assert (again.folder, again.revision) == (checkpoint.folder, checkpoint.revision)
    assert open_checkpoint(REPO, ALL, revision=checkpoint.revision).folder == checkpoint.folder
    assert hub.log == []


@pytest.mark.slow
def test_main_is_resolved_once_per_revision(hub):
    first = open_checkpoint(REPO, ALL)
    other = hub.add(REPO, pipeline(seed=1))                     # main moves on
    assert hub.refs[REPO, "main"] == other != first.revision
    assert open_checkpoint(REPO, ALL).revision == first.revision
    moved = open_checkpoint(REPO, ALL, revision=other)
    assert moved.revision == other
    assert_same(moved.load(Tiny, "unet").state_dict(), tensors(seed=1, dtype=torch.float16))
    assert_same(open_checkpoint(REPO, ALL).load(Tiny, "unet").state_dict(), tensors(dtype=torch.float16))


@pytest.mark.slow
def test_branch_that_moves_meanwhile_gives_one_commit(hub):
    """The listing is of the old commit, which had shards; the files are of the new one."""
    new = pipeline(seed=1)

    def move(handler):
        if handler.command == "HEAD" and hub.refs[REPO, "main"] != hub.refs.get((REPO, "new")):
            hub.add(REPO, new)
            hub.add(REPO, new, branch="new")
        return False

    hub.add(REPO, {name: content for name, content in pipeline().items() if "fp16" not in name})
    with hub.fault("model_index.json", move):
        checkpoint = open_checkpoint(REPO, ALL)
    assert checkpoint.revision == hub.refs[REPO, "new"]
    assert_same(checkpoint.load(Tiny, "unet").state_dict(), tensors(seed=1, dtype=torch.float16))


@pytest.mark.slow
def test_a_known_editor_is_asked_for_at_its_pin(hub):
    pinned = EDITORS["instruct-pix2pix"]
    hub.add(pinned.hub_id, pipeline(seed=1), commit="0" * 40)
    hub.add(pinned.hub_id, pipeline(), commit=pinned.revision, branch="old")
    assert open_checkpoint("instruct-pix2pix", ALL).revision == pinned.revision
    assert open_checkpoint(pinned.hub_id, ALL).revision == pinned.revision
    assert all(f"/{pinned.revision}" in path for _, path, *_ in hub.log)
    assert open_checkpoint("instruct-pix2pix", ALL, revision="main").revision == "0" * 40


@pytest.mark.slow
def test_more_components_later_fetch_only_themselves(hub):
    open_checkpoint(REPO, ["unet"])
    assert set(hub.asked("GET")) == {"model_index.json", "unet/config.json", f"unet/{HALF}"}
    hub.log.clear()
    open_checkpoint(REPO, ALL)
    assert not {"unet/config.json", f"unet/{HALF}"} & set(hub.asked("GET"))
    assert set(hub.asked("GET")) == NEEDED - {"model_index.json", "unet/config.json", f"unet/{HALF}"}


@pytest.mark.slow
def test_plain_file_is_fetched_without_a_variant(hub):
    files = {name: content for name, content in pipeline().items() if "fp16" not in name}
    hub.add("owner/plain", files)
    assert open_checkpoint("owner/plain", ALL).load(Tiny, "unet").to_q.weight.dtype == torch.float32
    hub.add("owner/tokens", {name: content for name, content in files.items() if name != "tokenizer/vocab.json"})
    assert "tokenizer/tokenizer.json" in open_checkpoint("owner/tokens", ALL).files


def test_shards_on_the_hub_come_by_the_names_in_their_index(hub, tmp_path):
    index = "diffusion_pytorch_model.safetensors.index.fp16.json"
    (tmp_path / "unet").mkdir()
    shard(tmp_path, tensors(), ["x-1.safetensors", "x-2.safetensors"], index)
    shards = {f"unet/{path.name}": path.read_bytes() for path in (tmp_path / "unet").iterdir()}
    hub.add("owner/shards", pipeline(**{f"unet/{HALF}": None, f"unet/{PLAIN}": None}) | shards)
    checkpoint = open_checkpoint("owner/shards", ["unet"])
    assert set(hub.asked("GET")) == {"model_index.json", "unet/config.json", *shards}
    assert_same(checkpoint.load(Tiny, "unet").state_dict(), tensors())
    index = b'{"weight_map": {"to_q.bias": "../../../../token"}}'
    hub.add("owner/evil", pipeline(**{f"unet/{HALF}": None, f"unet/{PLAIN}": None},
                                   **{"unet/diffusion_pytorch_model.safetensors.index.json": index}))
    with pytest.raises(Unfit, match=r"\.\./\.\./\.\./\.\./token"):
        open_checkpoint("owner/evil", ["unet"])


def test_pickles_on_the_hub_are_refused_and_not_fetched(hub):
    hub.add("owner/pickled", {name: c for name, c in pipeline().items() if not name.endswith(".safetensors")})
    with pytest.raises(Unavailable) as caught:
        open_checkpoint("owner/pickled", ALL)
    assert "P.from_pretrained('owner/pickled').save_pretrained('converted')" in says(caught)
    assert not [name for name in hub.asked() if name.endswith((".bin", ".ckpt"))]
    hub.add("owner/flat", {"model.safetensors": bytes(900)})
    with pytest.raises(Unavailable, match=r"owner/flat has no model_index\.json"):
        open_checkpoint("owner/flat", ALL)


GATE = {"error": "GatedRepo", "message": "Access to model owner/editor is restricted."}


def stable_diffusion_3(t5=THERE):
    """The files of a repository like SD3's: T5 in shards of two precisions, tokenizers of two kinds, and more."""
    index = {"_class_name": "StableDiffusion3Pipeline", "text_encoder_3": t5, "tokenizer_3": t5}
    files = {"model_index.json": json.dumps(index).encode(), "scheduler/scheduler_config.json": b'{"shift": 3.0}'}
    names = ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")
    for i, name in enumerate(names if t5 == THERE else names[:-1]):
        files[f"{name}/config.json"] = b'{"width": 4}' + b" " * i
        state = tensors(seed=i, dtype=torch.float16)
        if name != "text_encoder_3":
            files[f"{name}/{'model' if 'text' in name else PLAIN[:-12]}.safetensors"] = save(state)
            continue
        for variant, start in ((".fp16", "model.fp16"), ("", "model")):
            table = {tensor: f"{start}-0000{1 + j % 2}-of-00002.safetensors" for j, tensor in enumerate(state)}
            files[f"{name}/model.safetensors.index{variant}.json"] = json.dumps({"weight_map": table}).encode()
            files |= {f"{name}/{shard}": save({n: state[n] + bool(variant) for n, s in table.items() if s == shard})
                      for shard in set(table.values())}
    for name in ("tokenizer", "tokenizer_2"):
        files |= {f"{name}/vocab.json": name.encode(), f"{name}/merges.txt": b"#" + name.encode()}
    if t5 == THERE:
        files |= {"tokenizer_3/tokenizer.json": b"{}", "tokenizer_3/spiece.model": bytes(900),
                  "tokenizer_3/tokenizer_config.json": b'{"c": 3}'}
    return files


T5_FILES = {"text_encoder_3/config.json", "text_encoder_3/model.safetensors.index.fp16.json",
            "text_encoder_3/model.fp16-00001-of-00002.safetensors", "text_encoder_3/model.fp16-00002-of-00002.safetensors",
            "tokenizer_3/tokenizer.json", "tokenizer_3/tokenizer_config.json"}
OTHERS = {"model_index.json", "scheduler/scheduler_config.json", "transformer/config.json", f"transformer/{PLAIN}",
          "vae/config.json", f"vae/{PLAIN}", "text_encoder/config.json", "text_encoder/model.safetensors",
          "text_encoder_2/config.json", "text_encoder_2/model.safetensors", "tokenizer/vocab.json",
          "tokenizer/merges.txt", "tokenizer_2/vocab.json", "tokenizer_2/merges.txt"}


@pytest.mark.slow
def test_stable_diffusion_3_is_fetched_whole_or_without_t5(hub):
    hub.add("owner/sd3", stable_diffusion_3())
    checkpoint = open_checkpoint("owner/sd3", t5=False)
    assert set(hub.asked("GET")) == OTHERS and checkpoint.components == WITHOUT_T5
    hub.log.clear()
    assert open_checkpoint("owner/sd3", t5=False).components == WITHOUT_T5 and hub.log == []
    with pytest.raises(Unavailable, match="owner/sd3 has no text_encoder_3/config.json"):
        open_checkpoint("owner/sd3", offline=True)
    checkpoint = open_checkpoint("owner/sd3")
    assert set(hub.asked("GET")) == T5_FILES and checkpoint.components == SD3
    assert checkpoint.index["_class_name"] == "StableDiffusion3Pipeline"
    state = {n: t + 1 for n, t in tensors(seed=4, dtype=torch.float16).items()}
    assert_same(checkpoint.load(Tiny, "text_encoder_3").state_dict(), state)
    assert checkpoint.path("tokenizer_3") == checkpoint.folder / "tokenizer_3"
    with pytest.raises(Unavailable, match="weights download owner/none --no-t5` once"):
        open_checkpoint("owner/none", t5=False, offline=True)


@pytest.mark.slow
def test_t5_is_not_asked_for_in_a_pipeline_without_it(hub):
    hub.add("owner/small", stable_diffusion_3(NONE))
    assert open_checkpoint("owner/small").components == WITHOUT_T5 and set(hub.asked("GET")) == OTHERS


def test_pipeline_not_implemented_costs_its_index_alone(hub):
    hub.add("owner/xl", pipeline(**{"model_index.json": b'{"_class_name": "StableDiffusionXLPipeline"}'}))
    for offline in (False, True):
        with pytest.raises(Unavailable, match="^owner/xl is a StableDiffusionXLPipeline, which is not implemented"):
            open_checkpoint("owner/xl", offline=offline)
    assert set(hub.asked("GET")) == {"model_index.json"}


@pytest.mark.slow
@pytest.mark.parametrize("code", [401, 403])
@pytest.mark.parametrize("token", [None, "hf_wrong"])
def test_the_gate_before_stable_diffusion_3_is_told(hub, monkeypatch, code, token):
    source = EDITORS["sd3"]
    hub.add(source.hub_id, stable_diffusion_3(), commit=source.revision)
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    with hub.fault("/resolve/", status(code, **GATE)), pytest.raises(Unavailable) as caught:
        open_checkpoint("sd3")
    whose = "the token in use has no access" if token else "no token is set"
    where = f"{hub.url}/{source.hub_id}"
    assert f"{source.hub_id} is gated and {whose}: accept its licence at {where}, set HF_TOKEN" in says(caught)
    assert open_checkpoint("sd3", t5=False).revision == source.revision




@pytest.mark.slow
def test_the_gate_before_kontext_is_told(hub):
    source = EDITORS["flux-kontext"]
    hub.add(source.hub_id, {"model_index.json": b'{"_class_name": "FluxKontextPipeline"}'}, commit="a1" * 20)
    with hub.fault("/resolve/", status(401, **GATE)), pytest.raises(Unavailable) as caught:
        open_checkpoint("flux-kontext")
    assert f"{source.hub_id} is gated and no token is set: accept its licence at" in says(caught)


@pytest.mark.slow
@pytest.mark.parametrize("part, fault, words", [
    ("/resolve/", status(401, **GATE), ["is gated and no token is set", "/owner/editor", "HF_TOKEN"]),
    ("/", status(401, **GATE), ["is gated and no token is set"]),
    ("/", status(401), ["refuses for owner/editor access: set HF_TOKEN"]),
    ("/", status(401, error="RepoNotFound"), ["has no repository owner/editor that this account may see", "HF_TOKEN"]),
    ("/", status(404, error="RepoNotFound"), ["has no repository owner/editor", "check the name"]),
    ("/", status(404, error="RevisionNotFound"), ["has no revision main"]),
    ("/resolve/", status(404, error="EntryNotFound"), ["lists a file that it does not hand out"]),
    ("/", status(403, message="Forbidden"), ["refuses for owner/editor access"]),
    ("/", status(403, message="Access to this resource is disabled."), ["refuses", "see http"]),
    ("/", status(429), ["answered 429", "try again later"]),
    ("/", status(500), ["answered 500", "try again later"]),
    ("/", status(503), ["answered 503"]),
    ("/resolve/", status(500), ["answered 500"]),
    (HALF, status(500), ["answered 500", "what is complete is kept"]),
    ("/", text("<html>Please sign in to the network</html>"), ["cannot be fetched", "proxy"]),
    ("/api/", text('{"id": "owner/editor"}'), ["owner/editor"]),
    ("/api/", text('[]'), ["cannot be fetched"]),
    ("/resolve/", text("<html>Please sign in to the network</html>"), ["cannot be fetched", "owner/editor"]),
    (HALF, break_off(0), ["cannot be fetched", "what is complete is kept"]),
], ids=["gated-files", "gated", "no-token", "hidden", "no-repository", "no-revision", "no-file", "forbidden",
        "disabled", "too-many", "500", "503", "500-files", "500-weights", "login-page", "no-listing", "no-object",
        "login-page-files", "always-breaks-off"])
def test_faults_of_the_hub_are_one_sentence(hub, part, fault, words):
    with hub.fault(part, fault), pytest.raises(Unavailable) as caught:
        open_checkpoint(REPO, ALL)
    assert all(word in says(caught) for word in words), says(caught)
    with pytest.raises(Unavailable, match="owner/editor"):
        open_checkpoint(REPO, ALL, offline=True)
    assert open_checkpoint(REPO, ALL).load(Tiny, "unet").to_q.weight.dtype == torch.float16        # the fault is over


@pytest.mark.slow
def test_gated_with_a_token(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with hub.fault("/", unless_token("hf_right", status(403, **GATE))):
        with pytest.raises(Unavailable) as caught:
            open_checkpoint(REPO, ALL)
        assert "is gated and the token in use has no access" in says(caught)
        assert f"{hub.url}/owner/editor" in says(caught) and "hf_wrong" not in says(caught)
    with hub.fault("/", unless_token("hf_right", status(401, message="Invalid credentials in Authorization header"))):
        with pytest.raises(Unavailable, match="refuses for owner/editor the token in use: set HF_TOKEN"):
            open_checkpoint(REPO, ALL)
        monkeypatch.setenv("HF_TOKEN", "hf_right")
        assert open_checkpoint(REPO, ALL).revision
    assert {token for *_, token in hub.log} == {"hf_wrong", "hf_right"}


def test_no_network(hub, monkeypatch):
    hub.__exit__()                                              # the server has stopped
    with pytest.raises(Unavailable) as caught:
        open_checkpoint(REPO, ALL)
    assert "cannot be fetched" in says(caught) and hub.url in says(caught)
    assert "is not in the cache" in str(pytest.raises(Unavailable, open_checkpoint, REPO, ALL, offline=True).value)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(Unavailable) as caught:
        open_checkpoint(REPO, ALL, revision="v1")
    assert "python -m sifm_min.weights download owner/editor --revision v1" in says(caught)


@pytest.mark.slow
def test_a_connection_that_breaks_is_taken_up_where_it_broke(hub, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 50)   # what is on disk when it breaks counts, in such pieces
    content = pipeline()[f"unet/{HALF}"]
    with hub.fault(f"unet/{HALF}", break_off(100, times=2)):
        checkpoint = open_checkpoint(REPO, ALL)
    ranges = [asked for verb, path, asked, _ in hub.log if verb == "GET" and path.endswith(f"unet/{HALF}")]
    assert ranges == [None, "bytes=100-", "bytes=200-"]
    assert (checkpoint.folder / "unet" / HALF).read_bytes() == content


@pytest.mark.slow
def test_interrupted_download_goes_on(hub):
    with hub.fault(f"vae/{HALF}", status(500)), pytest.raises(Unavailable):
        open_checkpoint(REPO, ALL)
    with pytest.raises(Unavailable, match="owner/editor has no weights in vae/"):
        open_checkpoint(REPO, ALL, offline=True)
    hub.log.clear()
    open_checkpoint(REPO, ALL)
    assert set(hub.asked("GET")) == {f"vae/{HALF}", "text_encoder/model.fp16.safetensors"}


@pytest.mark.slow
def test_a_file_whose_content_left_the_cache_is_fetched_again(hub):
    checkpoint = open_checkpoint(REPO, ALL)
    path = checkpoint.folder / "unet" / HALF
    path.resolve().unlink()
    hub.log.clear()
    assert_same(open_checkpoint(REPO, ALL).load(Tiny, "unet").state_dict(), tensors(dtype=torch.float16))
    assert hub.asked("GET") == [f"unet/{HALF}"]


@pytest.mark.slow
def test_full_disk_is_told_before_and_during(hub, monkeypatch):
    usage = shutil.disk_usage("/")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
        with pytest.raises(Unavailable, match=r"GB more, and .* GB left; make room, or point HF_HOME"):
            open_checkpoint(REPO, ALL)
        assert not [name for name in hub.asked("GET") if name.endswith(".safetensors")]

    def full(url, file, **_):
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device", file.name)

    with monkeypatch.context() as patch:
        patch.setattr(file_download, "http_get", full)
        with pytest.raises(Unavailable, match="is full: make room, or point HF_HOME to another disk") as caught:
            open_checkpoint(REPO, ALL)
        assert constants.HF_HUB_CACHE in says(caught)
    assert open_checkpoint(REPO, ALL).load(Tiny, "unet")


def test_a_cache_that_cannot_be_written_is_told(hub, tmp_path):
    (tmp_path / "cache").write_text("a file where the cache's folder should be")
    with pytest.raises(Unavailable, match="cannot be written") as caught:
        open_checkpoint(REPO, ALL)
    assert "HF_HOME" in says(caught)


def outside(hub, code, **environment):
    """Run code in a fresh Python that finds the hub by its environment alone; return what it prints."""
    kept = {name: value for name, value in os.environ.items() if not name.upper().startswith(("HF_", "HUGGING"))}
    code = (f"import sys; from sifm_min.models.checkpoints import *; ALL = {ALL}\ntry:\n {code}\n"
            "except Unavailable as e: print(e)\nassert 'torch' not in sys.modules")      # which takes seconds to load
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60,
                         env=kept | {"HF_ENDPOINT": hub.url} | environment)
    assert "Traceback" not in ran.stderr, ran.stderr
    return ran.stdout.strip()


@pytest.mark.slow
def test_the_environment_is_honoured(hub, tmp_path):
    opened = f"print(open_checkpoint('{REPO}', ALL).folder)"
    home = {"HF_HOME": str(tmp_path / "home")}
    gate = unless_token("hf_abc", status(401, **GATE))
    with hub.fault("/", gate):
        folder = outside(hub, opened, HF_TOKEN="hf_abc", **home)
    assert folder.startswith(str(tmp_path / "home")) and (Path(folder) / "unet" / HALF).exists()
    hub.log.clear()
    assert outside(hub, opened, HF_HUB_OFFLINE="1", **home) == folder
    assert outside(hub, opened, **home) == folder and hub.log == []
    said = outside(hub, opened, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "empty"))
    assert "offline nothing is fetched" in said and hub.log == []
    insist = f"open_checkpoint('{REPO}', ALL, offline=False)"
    said = outside(hub, insist, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "empty"))
    assert "HF_HUB_OFFLINE is set" in said and hub.log == []


@pytest.mark.slow
def test_a_hub_that_does_not_answer_is_given_up(hub, tmp_path):
    with hub.fault("/", hang):
        said = outside(hub, f"open_checkpoint('{REPO}', ALL)", HF_HOME=str(tmp_path), HF_HUB_ETAG_TIMEOUT="1")
    assert "cannot be fetched" in said and "imeout" in said
