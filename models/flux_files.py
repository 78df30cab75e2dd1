"""The publisher's single files of FLUX's transformers: the name of each of their tensors in the diffusers layout.

`flux1-kontext-dev.safetensors` and `flux-2-klein-4b.safetensors` hold a transformer alone. As in `single_files.py`, this file
knows names and shapes only, and its tables read: name in the file: name in the diffusers layout.
"""

from .places import Place, both, count

FLUX_1 = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "final_layer.adaLN_modulation.1": "norm_out.linear",                        # its halves swapped, see `table`
    "final_layer.linear": "proj_out",
}
FLUX_2 = {
    **{stored: name.replace("time_text_embed", "time_guidance_embed") for stored, name in FLUX_1.items()
       if not stored.startswith("vector_in")},
    "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
    "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
    "single_stream_modulation.lin": "single_stream_modulation.linear",
}
# double_blocks.N.<left>: transformer_blocks.N.<right>. Three names get a third of the rows each.
DOUBLE = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "txt_attn.proj": "attn.to_add_out",
}
DOUBLE_1 = DOUBLE | {
    "img_mod.lin": "norm1.linear", "img_mlp.0": "ff.net.0.proj", "img_mlp.2": "ff.net.2",
    "txt_mod.lin": "norm1_context.linear", "txt_mlp.0": "ff_context.net.0.proj", "txt_mlp.2": "ff_context.net.2",
}
DOUBLE_2 = DOUBLE | {
    "img_mlp.0": "ff.linear_in", "img_mlp.2": "ff.linear_out",
    "txt_mlp.0": "ff_context.linear_in", "txt_mlp.2": "ff_context.linear_out",
}
NORMS = {                                           # of a double block; each stands for a .scale, in our layout a .weight
    "img_attn.norm.query_norm": "attn.norm_q", "img_attn.norm.key_norm": "attn.norm_k",
    "txt_attn.norm.query_norm": "attn.norm_added_q", "txt_attn.norm.key_norm": "attn.norm_added_k",
}
# single_blocks.N.<left>: single_transformer_blocks.N.<right>. FLUX.1's first layer is cut at the width: q, k, v, and 4 widths.
SINGLE_1 = {
    "modulation.lin": "norm.linear",
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": "proj_out",
}
SINGLE_2 = {"linear1": "attn.to_qkv_mlp_proj", "linear2": "attn.to_out"}
SINGLE_NORMS = {"norm.query_norm": "attn.norm_q", "norm.key_norm": "attn.norm_k"}

# Published settings that do not follow from shapes.
AXES_1, AXES_2, THETA_2 = [16, 56, 56], [32, 32, 32, 32], 2000


def is_second(shapes):
    """True for FLUX.2, whose blocks share a modulation."""
    return "double_stream_modulation_img.lin.weight" in shapes


def table(shapes):
    """{name: the places of its parts} of every tensor that a transformer can have; the file's layers are counted.

    The file's last modulation is (shift, scale), the diffusers layout's (scale, shift).
    """
    second = is_second(shapes)
    kinds = ("weight",) if second else ("weight", "bias")
    found = {}
    for stored, name in (FLUX_2 if second else FLUX_1).items():
        found |= both(stored, name, swapped=name == "norm_out.linear", kinds=kinds)
    for stored, name, layers, norms in (
            ("double_blocks", "transformer_blocks", DOUBLE_2 if second else DOUBLE_1, NORMS),
            ("single_blocks", "single_transformer_blocks", SINGLE_2 if second else SINGLE_1, SINGLE_NORMS)):
        for i in range(count(shapes, f"{stored}.{{}}.")):
            for left, right in layers.items():
                names = [f"{name}.{i}.{one}" for one in ((right,) if isinstance(right, str) else right)]
                shares = (1, 1, 1, 4) if len(names) == 4 else None
                found |= both(f"{stored}.{i}.{left}", *names, shares=shares, kinds=kinds)
            found |= {f"{stored}.{i}.{left}.scale": (Place(f"{name}.{i}.{right}.weight"),) for left, right in norms.items()}
    return found


def config(shapes):
    """The transformer's config.json as a dict; raises KeyError or ValueError for the shapes of another network."""
    width, channels = shapes["img_in.weight"]
    head, = shapes["double_blocks.0.img_attn.norm.query_norm.scale"]
    second = is_second(shapes)
    given = {
        "patch_size": 1, "in_channels": channels, "out_channels": shapes["final_layer.linear.weight"][0],
        "num_layers": count(shapes, "double_blocks.{}."), "num_single_layers": count(shapes, "single_blocks.{}."),
        "num_attention_heads": width // head, "attention_head_dim": head, "joint_attention_dim": shapes["txt_in.weight"][1],
        "guidance_embeds": "guidance_in.in_layer.weight" in shapes, "axes_dims_rope": AXES_2 if second else AXES_1,
    }
    if not second:
        return given | {"_class_name": "FluxTransformer2DModel",
                        "pooled_projection_dim": shapes["vector_in.in_layer.weight"][1]}
    return given | {"_class_name": "Flux2Transformer2DModel", "rope_theta": THETA_2, "eps": 1e-6,
                    "timestep_guidance_channels": shapes["time_in.in_layer.weight"][1],
                    "mlp_ratio": shapes["double_blocks.0.img_mlp.2.weight"][1] / width}
