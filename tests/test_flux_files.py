"""The publisher's single files of FLUX: against diffusers' converters, the published names, and networks that compute."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from sifm_min.editors import load_editor
from sifm_min.models import flux_files, single_files
from sifm_min.models.checkpoints import Unavailable, Unfit, open_checkpoint
from sifm_min.models.flux import Flux1, Flux1Config, Flux2, Flux2Config
from sifm_min.models.places import Place

KINDS = {"flux_kontext_transformer": Flux1, "flux2_klein4b_transformer": Flux2}
SMALL = {
    Flux1: {"num_layers": 2, "num_single_layers": 3, "num_attention_heads": 1, "joint_attention_dim": 20, "in_channels": 12,
            "out_channels": 12, "pooled_projection_dim": 10, "guidance_embeds": True},
    Flux2: {"num_layers": 2, "num_single_layers": 3, "num_attention_heads": 1, "joint_attention_dim": 20, "in_channels": 12,
            "out_channels": 12, "guidance_embeds": False, "mlp_ratio": 1.5, "timestep_guidance_channels": 64},
}
PREFIX = "model.diffusion_model."


def original(state, kind):
    """A state in the publisher's names, from one in the diffusers layout; written by hand, as the publisher has them."""
    made, second = {}, kind is Flux2
    embed = "time_guidance_embed" if second else "time_text_embed"
    outer = {"img_in": "x_embedder", "txt_in": "context_embedder", "final_layer.linear": "proj_out"}
    for stored, name in (("time_in", "timestep"), ("guidance_in", "guidance"), ("vector_in", "text")):
        outer |= {f"{stored}.in_layer": f"{embed}.{name}_embedder.linear_1",
                  f"{stored}.out_layer": f"{embed}.{name}_embedder.linear_2"}
    outer |= {name: name.replace(".lin", ".linear") for name in (
        "double_stream_modulation_img.lin", "double_stream_modulation_txt.lin", "single_stream_modulation.lin")}
    for stored, name in outer.items():
        made |= {f"{stored}.{part}": state[f"{name}.{part}"] for part in ("weight", "bias") if f"{name}.{part}" in state}
    for part in ("weight", "bias"):
        if f"norm_out.linear.{part}" in state:
            scale, shift = state[f"norm_out.linear.{part}"].chunk(2)
            made[f"final_layer.adaLN_modulation.1.{part}"] = torch.cat([shift, scale])

    def put(stored, *names):
        for part in ("weight", "bias"):
            if f"{names[0]}.{part}" in state:
                made[f"{stored}.{part}"] = torch.cat([state[f"{name}.{part}"] for name in names])

    i = 0
    while f"transformer_blocks.{i}.attn.to_q.weight" in state:
        for stream, q, k, v, out, norms, mlp, mod in (
                ("img", "to_q", "to_k", "to_v", "to_out.0", ("norm_q", "norm_k"), "ff", "norm1"),
                ("txt", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", ("norm_added_q", "norm_added_k"), "ff_context",
                 "norm1_context")):
            theirs, ours = f"double_blocks.{i}.{stream}", f"transformer_blocks.{i}"
            put(f"{theirs}_attn.qkv", *(f"{ours}.attn.{name}" for name in (q, k, v)))
            put(f"{theirs}_attn.proj", f"{ours}.attn.{out}")
            put(f"{theirs}_mod.lin", f"{ours}.{mod}.linear")
            for number, name in ((0, "linear_in" if second else "net.0.proj"), (2, "linear_out" if second else "net.2")):
                put(f"{theirs}_mlp.{number}", f"{ours}.{mlp}.{name}")
            for name, norm in zip(("query_norm", "key_norm"), norms, strict=True):
                made[f"{theirs}_attn.norm.{name}.scale"] = state[f"{ours}.attn.{norm}.weight"]
        i += 1
    i = 0
    while f"single_transformer_blocks.{i}.attn.norm_q.weight" in state:
        theirs, ours = f"single_blocks.{i}", f"single_transformer_blocks.{i}"
        if second:
            put(f"{theirs}.linear1", f"{ours}.attn.to_qkv_mlp_proj")
            put(f"{theirs}.linear2", f"{ours}.attn.to_out")
        else:
            put(f"{theirs}.linear1", *(f"{ours}.{name}" for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")))
            put(f"{theirs}.linear2", f"{ours}.proj_out")
            put(f"{theirs}.modulation.lin", f"{ours}.norm.linear")
        for name, norm in (("query_norm", "norm_q"), ("key_norm", "norm_k")):
            made[f"{theirs}.norm.{name}.scale"] = state[f"{ours}.attn.{norm}.weight"]
        i += 1
    return made


def narrow(manifest, shared, blocks=1):
    """A random state of the published names in the first blocks; all rows, but one column: a file is cut by rows alone."""
    published = json.loads((shared / "data/checkpoints" / f"{manifest}.keys.json").read_text())
    generator = torch.Generator().manual_seed(0)
    kept = {name: shape for name, shape in published.items() if "blocks." not in name or int(name.split(".")[1]) < blocks}
    return {name: torch.randn(shape[0], *[1] * (len(shape) - 1), generator=generator) for name, shape in kept.items()}


def placed(stored):
    """The state in the diffusers layout that our table makes of a file's tensors."""
    table = flux_files.table({name: tuple(tensor.shape) for name, tensor in stored.items()})
    made = {}
    for name, tensor in stored.items():
        for place in table[name]:
            assert place.name not in made and place.take(tensor).shape == place.shape(tensor.shape)
            made[place.name] = place.take(tensor)
    return made


def assert_as_converted(manifest, shared):
    utils = pytest.importorskip("diffusers.loaders.single_file_utils", reason="the oracle, diffusers, is not installed")
    convert = {Flux1: "convert_flux_transformer_checkpoint_to_diffusers",
               Flux2: "convert_flux2_transformer_checkpoint_to_diffusers"}[KINDS[manifest]]
    if not hasattr(utils, convert):
        pytest.skip("this diffusers does not convert FLUX.2")
    state = narrow(manifest, shared, blocks=2)
    stored = original(state, KINDS[manifest])
    expected, ours = getattr(utils, convert)(dict(stored)), placed(stored)
    assert ours.keys() == expected.keys() == state.keys()
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


@pytest.mark.parametrize("manifest", KINDS)
def test_every_part_goes_where_diffusers_puts_it(manifest, shared):
    assert_as_converted(manifest, shared)


def without(name):
    return lambda shapes, right=flux_files.table: {stored: tuple(
        place._replace(swapped=False) if name == "swap" else place._replace(rows=(0, *place.rows[1:])) if place.rows and
        name == "rows" else place for place in places) for stored, places in right(shapes).items()}


@pytest.mark.parametrize(("target", "name", "fault"), [
    (flux_files, "table", without("swap")), (flux_files, "table", without("rows")),
    (flux_files, "NORMS", flux_files.NORMS | {"img_attn.norm.query_norm": "attn.norm_k",
                                              "img_attn.norm.key_norm": "attn.norm_q"}),
    (flux_files, "SINGLE_1", flux_files.SINGLE_1 | {"linear1": ("attn.to_k", "attn.to_q", "attn.to_v", "proj_mlp")}),
    (flux_files, "DOUBLE_1", flux_files.DOUBLE_1 | {"txt_mod.lin": "norm1.linear", "img_mod.lin": "norm1_context.linear"}),
], ids=["halves", "rows", "norms", "queries for keys", "streams"])
def test_the_comparison_sees(target, name, fault, shared, monkeypatch):
    monkeypatch.setattr(target, name, fault)
    with pytest.raises(AssertionError):
        assert_as_converted("flux_kontext_transformer", shared)


@pytest.mark.parametrize("manifest", KINDS)
def test_published_names_shapes_and_config(manifest, shared):
    """The full-size file: its names, from the published ones by hand, give those and the published config back."""
    folder, kind = shared / "data/checkpoints", KINDS[manifest]
    published = json.loads((folder / f"{manifest}.keys.json").read_text())
    with torch.device("meta"):
        stored = original({name: torch.empty(shape) for name, shape in published.items()}, kind)
    shapes = {name: tuple(tensor.shape) for name, tensor in stored.items()}
    found = {place.name: list(place.shape(shapes[name])) for name, places in flux_files.table(shapes).items()
             if name in shapes for place in places}
    assert found == published
    config = kind.Config.from_json(json.dumps(flux_files.config(shapes)))
    assert config == kind.Config.from_json((folder / f"{manifest}.config.json").read_text())
    assert single_files.family(shapes).known == {"flux_kontext_transformer": "flux-kontext"}.get(manifest, "flux-klein")


# -- small files -------------------------------------------------------------------------------------------------------

def small(kind, folder, prefix=""):
    """(a network at random weights, its single file)."""
    torch.manual_seed(0)
    config = Flux1Config if kind is Flux1 else Flux2Config
    made = kind(config(**SMALL[kind])).eval()
    stored = {prefix + name: tensor.contiguous() for name, tensor in original(made.state_dict(), kind).items()}
    save_file(stored, folder / "flux.safetensors")
    return made, folder / "flux.safetensors"


def outputs(network, kind):
    generator = torch.Generator().manual_seed(1)
    noisy, reference = (torch.randn(1, 12, rows, 3, generator=generator) for rows in (2, 4))
    context, pooled = torch.randn(1, 5, 20, generator=generator), torch.randn(1, 10, generator=generator)
    with torch.no_grad():
        return network(noisy, reference, 400.0, context, *((pooled, 2.5) if kind is Flux1 else ()))


@pytest.mark.parametrize("lazily", [False, True])
@pytest.mark.parametrize("prefix", ["", PREFIX])
@pytest.mark.parametrize("kind", [Flux1, Flux2])
def test_a_small_file_computes_as_its_network(kind, prefix, lazily, tmp_path):
    made, file = small(kind, tmp_path, prefix)
    checkpoint = open_checkpoint(file, ("transformer",))
    ours = checkpoint.load(kind, "transformer", lazily=lazily)
    assert ours.config == made.config
    torch.testing.assert_close(outputs(ours, kind), outputs(made, kind), atol=1e-5, rtol=1e-5)
    if not lazily:
        assert all(torch.equal(tensor, made.state_dict()[name]) for name, tensor in ours.state_dict().items())
    assert checkpoint.components == ("transformer",) and list(checkpoint.hashes()) == ["flux.safetensors"]
    assert checkpoint.index["_class_name"] == ("FluxKontextPipeline" if kind is Flux1 else "Flux2KleinPipeline")


def test_scaled_float8_is_multiplied_out(tmp_path):
    """One matrix that is cut into four parts: each is float8, times the number beside it."""
    made, file = small(Flux1, tmp_path)
    state, name = load_file(file), "single_blocks.1.linear1"
    state[f"{name}.weight"] = (state[f"{name}.weight"] / 0.01).to(torch.float8_e4m3fn)
    state[f"{name}.scale_weight"] = torch.tensor(0.01)
    save_file(state, file)
    ours = open_checkpoint(file, ("transformer",)).load(Flux1, "transformer", dtype=torch.float32).state_dict()
    expected = (state[f"{name}.weight"].float() * 0.01).split([128, 128, 128, 512])
    for part, tensor in zip(("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"), expected, strict=True):
        assert torch.equal(ours[f"single_transformer_blocks.1.{part}.weight"], tensor)


@pytest.mark.parametrize("distilled", [True, False, None])
def test_other_parts_come_from_a_folder_of_components(distilled, tmp_path):
    """Also whether a klein is distilled, which its file does not tell, and the scheduler, where there is one."""
    _, file = small(Flux2, tmp_path)
    rest = tmp_path / "rest"
    for part in ("vae", "text_encoder", "tokenizer"):
        (rest / part).mkdir(parents=True)
        for name in ("config.json", "vocab.json", "merges.txt"):
            (rest / part / name).write_text("{}")
        save_file({"x": torch.zeros(1)}, rest / part / "model.safetensors")
    if distilled is not None:
        (rest / "model_index.json").write_text(json.dumps({"_class_name": "Flux2KleinPipeline", "is_distilled": distilled}))
    checkpoint = open_checkpoint(file, rest=rest)
    assert checkpoint.components == ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
    assert checkpoint.index.get("is_distilled") is distilled
    assert json.loads(checkpoint.text("scheduler/scheduler_config.json"))["use_dynamic_shifting"] is True
    (rest / "scheduler").mkdir()
    (rest / "scheduler" / "scheduler_config.json").write_text('{"shift": 2.0}')
    assert json.loads(open_checkpoint(file, rest=rest).text("scheduler/scheduler_config.json")) == {"shift": 2.0}


def test_scheduler_of_a_file_is_the_published_one(shared):
    text = (shared / "data/checkpoints/flux_scheduler.config.json").read_text()
    assert single_files.KONTEXT.scheduler == single_files.KLEIN.scheduler == json.loads(text)


def pipelines(kind, folder, monkeypatch):
    """diffusers' pipeline with a transformer whose heads are as wide as the published ones, at random weights."""
    pytest.importorskip("diffusers", reason="it writes the folders")
    import small_flux
    import small_sd3
    wide = {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 1, "attention_head_dim": 128}
    if kind is Flux1:
        monkeypatch.setitem(small_flux.KONTEXT, "wide", small_flux.KONTEXT["as published"] | {
            "transformer": wide | {"axes_dims_rope": (16, 56, 56), "guidance_embeds": True}})
        return small_flux.kontext("wide", tokenizers=small_sd3.write_tokenizers(folder))
    monkeypatch.setitem(small_flux.KLEIN, "wide", small_flux.KLEIN["as published"] | {
        "transformer": wide | {"axes_dims_rope": (32, 32, 32, 32), "guidance_embeds": False}})
    return small_flux.klein("wide", tokenizer=small_flux.write_qwen_tokenizer(folder))


@pytest.mark.parametrize("kind", [Flux1, Flux2])
def test_an_edit_from_a_single_file_is_the_folder_s(kind, tmp_path, monkeypatch):
    """The whole editor: the transformer from the file, all else from the folder of a pipeline, which has one too."""
    from photographs import smooth
    folder = tmp_path / "pipeline"
    pipelines(kind, tmp_path / "words", monkeypatch).save_pretrained(folder)
    stored = original(load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors"), kind)
    save_file({name: tensor.contiguous() for name, tensor in stored.items()}, tmp_path / "flux.safetensors")
    whole, single = load_editor(folder, device="cpu"), load_editor(tmp_path / "flux.safetensors", device="cpu",
                                                                  components=folder)
    assert type(single) is type(whole) and single.defaults == whole.defaults
    assert "flux.safetensors" in single.provenance()["weights"]
    edits = [editor.edit(smooth(64, 64), "make the sky red", steps=2, size=64) for editor in (whole, single)]
    assert max(abs(a - b) for a, b in zip(*(edit.tobytes() for edit in edits), strict=True)) <= 1
    for tensor in ("single_blocks.0.linear1.weight", "final_layer.adaLN_modulation.1.weight"):
        stored[tensor] = stored[tensor].roll(128, 0)
    save_file({name: tensor.contiguous() for name, tensor in stored.items()}, tmp_path / "flux.safetensors")
    wrong = load_editor(tmp_path / "flux.safetensors", device="cpu", components=folder)
    wrong = wrong.edit(smooth(64, 64), "make the sky red", steps=2, size=64)
    assert max(abs(a - b) for a, b in zip(edits[0].tobytes(), wrong.tobytes(), strict=True)) > 5


def changed(change):
    def damage(file):
        state = load_file(file)
        change(state)
        save_file(state, file)
    return damage


DAMAGE = {
    "truncated": (lambda file: file.write_bytes(file.read_bytes()[:-64]), "is cut short or damaged"),
    "a missing tensor": (changed(lambda state: state.pop("single_blocks.0.linear2.weight")),
                         r"1 missing, 0 unexpected, 0 wrong\): missing single_transformer_blocks.0.proj_out.weight"),
    "a missing input layer": (changed(lambda state: state.pop("img_in.weight")), "has no tensor img_in.weight; fetch it again"),
    "another shape": (changed(lambda state: state.update({"single_blocks.0.linear1.weight": torch.zeros(895, 128)})),
                      r"single_blocks.0.linear1.weight is \[895, 128\], expected \[128, 128\]"),
    "a tensor too many": (changed(lambda state: state.update({"double_blocks.0.lora.weight": torch.zeros(1)})),
                          "holds tensors that FLUX.1 does not have: double_blocks.0.lora.weight; .* flux1-kontext-dev"),
    "an inner layer of another shape": (changed(lambda state: state.update({
        "double_blocks.0.img_attn.norm.query_norm.scale": torch.zeros(3, 3)})), "the shapes under  are not those of its trans"),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_file_is_one_sentence(how, tmp_path):
    damage, sentence = DAMAGE[how]
    _, file = small(Flux1, tmp_path)
    damage(file)
    with pytest.raises((Unfit, Unavailable), match=sentence) as caught:
        open_checkpoint(file, ("transformer",)).load(Flux1, "transformer")
    assert "\n" not in str(caught.value)


def test_missing_components_are_named(tmp_path):
    _, file = small(Flux1, tmp_path)
    with pytest.raises(Unavailable, match="has vae, text_encoder, text_encoder_2, tokenizer, tokenizer_2: give components, .*"
                                          "or flux-kontext, from which they are fetched$"):
        open_checkpoint(file)


@pytest.mark.parametrize(("network", "sentence"), [
    (Flux1, "FluxKontextPipeline, which cannot do without T5; do not decline it$"),
    (Flux2, "Flux2KleinPipeline, which has no T5; do not decline it$")], ids=["FLUX.1", "FLUX.2"])
def test_declining_t5_of_a_file_is_one_sentence(network, sentence, tmp_path):
    _, file = small(network, tmp_path)
    with pytest.raises(Unfit, match=sentence):
        open_checkpoint(file, ("transformer",), t5=False)


def test_a_place_takes_what_its_shape_says():
    tensor = torch.arange(14)[:, None]
    assert Place("x", (3, 7, 7)).take(tensor).flatten().tolist() == list(range(6, 14))
    assert Place("x", (3, 7, 7)).shape((14, 1)) == (8, 1) and Place("x", (0, 1, 3)).shape((14, 1)) == (14, 1)
    assert Place("x", swapped=True).take(tensor).flatten().tolist() == [*range(7, 14), *range(7)]
