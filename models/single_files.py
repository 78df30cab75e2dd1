"""The published single files: the name of each of their tensors in the diffusers layout. FLUX's names are in `flux_files.py`.

`sd3_medium.safetensors` holds the transformer and the VAE; `..._incl_clips` also the two CLIP text encoders, and
`..._incl_clips_t5xxlfp16` or `..._t5xxlfp8` T5 as well. SD3.5's files use the same names. This file knows names and
shapes only: `places` says where a tensor goes, and `config` describes the network of these shapes, as a config.json would.
The tables read: name in the file, without prefix: name in the diffusers layout.

Files called fp8_scaled hold a weight as float8 beside one number, by which it is to be multiplied.
"""

import math
import re
from typing import NamedTuple

from . import flux_files
from .places import Place, both, count

PREFIXES = {
    "transformer": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text_encoder": "text_encoders.clip_l.transformer.",
    "text_encoder_2": "text_encoders.clip_g.transformer.",
    "text_encoder_3": "text_encoders.t5xxl.transformer.",
}
STANDALONE = {                                      # the text encoders as files of their own, best first: no prefix
    "text_encoder": ("clip_l.safetensors",),
    "text_encoder_2": ("clip_g.safetensors",),
    "text_encoder_3": ("t5xxl_fp16.safetensors", "t5xxl_fp8_e4m3fn_scaled.safetensors", "t5xxl_fp8_e4m3fn.safetensors"),
}
# Tensors outside all components that change nothing: CLIP's temperature in the comparison with pictures.
HARMLESS = re.compile(r"text_encoders\.\w+\.logit_scale")
SCALES = (".scale_weight", ".weight_scale")         # LAYER.<this>: the number by which LAYER.weight is multiplied
UNUSED = (".scale_input", ".input_scale")           # for products in float8, which this project does not compute
MARK = "scaled_fp8"                                 # the tensor that marks a file of this kind

# Each name stands for a .weight and a .bias. Three names get a third of the rows each.
TRANSFORMER = {
    "x_embedder.proj": "pos_embed.proj",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "context_embedder": "context_embedder",
    "final_layer.adaLN_modulation.1": "norm_out.linear",                        # its halves swapped, see `places`
    "final_layer.linear": "proj_out",
}
BLOCK = {                                           # joint_blocks.N.<left>: transformer_blocks.N.<right>
    "x_block.adaLN_modulation.1": "norm1.linear",
    "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "x_block.attn.ln_q": "attn.norm_q",                                         # SD3.5
    "x_block.attn.ln_k": "attn.norm_k",                                         # SD3.5
    "x_block.attn.proj": "attn.to_out.0",
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),            # SD3.5 medium
    "x_block.attn2.ln_q": "attn2.norm_q",                                       # SD3.5 medium
    "x_block.attn2.ln_k": "attn2.norm_k",                                       # SD3.5 medium
    "x_block.attn2.proj": "attn2.to_out.0",                                     # SD3.5 medium
    "x_block.mlp.fc1": "ff.net.0.proj",
    "x_block.mlp.fc2": "ff.net.2",
    "context_block.adaLN_modulation.1": "norm1_context.linear",                 # the last block's with halves swapped
    "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "context_block.attn.ln_q": "attn.norm_added_q",                             # SD3.5
    "context_block.attn.ln_k": "attn.norm_added_k",                             # SD3.5
    "context_block.attn.proj": "attn.to_add_out",
    "context_block.mlp.fc1": "ff_context.net.0.proj",
    "context_block.mlp.fc2": "ff_context.net.2",
}
HALF = {                                            # of the VAE: encoder.<left>: encoder.<right>; decoder alike
    "conv_in": "conv_in",
    "norm_out": "conv_norm_out",
    "conv_out": "conv_out",
}
MIDDLE = {"block_1": "resnets.0", "attn_1": "attentions.0", "block_2": "resnets.1"}         # mid.<left>: mid_block.<right>
ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
RESNET = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2", "nin_shortcut": "conv_shortcut"}

# Published settings that do not follow from shapes.
HEAD = 64                                           # channels per attention head of every SD3 and of both CLIPs
CONFIGS = {
    "transformer": {"_class_name": "SD3Transformer2DModel", "sample_size": 128},
    "vae": {"_class_name": "AutoencoderKL", "act_fn": "silu", "norm_num_groups": 32, "scaling_factor": 1.5305,
            "shift_factor": 0.0609, "use_quant_conv": False, "use_post_quant_conv": False},
    "text_encoder": {"model_type": "clip_text_model", "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
                     "eos_token_id": 2},
    "text_encoder_2": {"model_type": "clip_text_model", "hidden_act": "gelu", "layer_norm_eps": 1e-5, "eos_token_id": 2},
    "text_encoder_3": {"model_type": "t5", "architectures": ["T5EncoderModel"], "dense_act_fn": "gelu_new",
                       "feed_forward_proj": "gated-gelu", "is_gated_act": True, "layer_norm_epsilon": 1e-6,
                       "relative_attention_max_distance": 128},
    "scheduler": {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0},
}


class Family(NamedTuple):
    """One kind of single file."""

    title: str
    known: str                                      # the editor whose other components fit
    pipeline: str
    example: str                                    # a published file
    scheduler: dict                                 # its scheduler_config.json, where no components have one


DYNAMIC = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0, "base_shift": 0.5,
           "max_shift": 1.15, "base_image_seq_len": 256, "max_image_seq_len": 4096, "use_dynamic_shifting": True}
SD3 = Family("Stable Diffusion 3", "sd3", "StableDiffusion3Pipeline", "sd3_medium.safetensors", CONFIGS["scheduler"])
KONTEXT = Family("FLUX.1", "flux-kontext", "FluxKontextPipeline", "flux1-kontext-dev.safetensors", DYNAMIC)
KLEIN = Family("FLUX.2", "flux-klein", "Flux2KleinPipeline", "flux-2-klein-4b.safetensors", DYNAMIC)


def family(names):
    """The `Family` of a file with these names, None where it is of none."""
    whole = PREFIXES["transformer"]
    if any(name.startswith(f"{whole}joint_blocks.") for name in names):
        return SD3
    bare = {name.removeprefix(whole) for name in names}
    if not any(name.startswith("double_blocks.") for name in bare):
        return None
    return KLEIN if flux_files.is_second(bare) else KONTEXT


def split(names):
    """({component: {name without its prefix: name}}, the names that belong to no component)."""
    parts, unknown = {}, []
    if family(names) in (KONTEXT, KLEIN):                       # a transformer alone, with the prefix or without
        prefix = PREFIXES["transformer"] if any(name.startswith(PREFIXES["transformer"]) for name in names) else ""
        found = {name.removeprefix(prefix): name for name in names if name.startswith(prefix)}
        return {"transformer": found}, [name for name in names if not name.startswith(prefix)]
    for name in names:
        component = next((part for part, prefix in PREFIXES.items() if name.startswith(prefix)), None)
        if component is None:
            if not HARMLESS.fullmatch(name):
                unknown.append(name)
        else:
            parts.setdefault(component, {})[name.removeprefix(PREFIXES[component])] = name
    return parts, unknown


def places(component, shapes):
    """{name: the places of its parts} of every tensor that the component can have. shapes: name -> shape, without prefixes."""
    scales = {name: f"{name.removesuffix(end)}.weight" for name, shape in shapes.items() for end in SCALES
              if name.endswith(end) and math.prod(shape) == 1}
    if component == "transformer" and any(name.startswith("double_blocks.") for name in shapes):
        table = flux_files.table(shapes)
    elif component == "transformer":
        table = _transformer(count(shapes, "joint_blocks.{}."))
    elif component == "vae":
        table = _vae(count(shapes, "encoder.down.{}."), count(shapes, "encoder.down.0.block.{}."))
    else:                                                       # the text encoders keep their names
        table = {name: (Place(name),) for name in shapes if not name.endswith(SCALES)}
    for scale, weight in scales.items():
        if weight in table.keys() & shapes.keys():
            table[weight] = tuple(place._replace(scale=scale) for place in table[weight])
            table[scale] = ()
    return table | {name: () for name in shapes if name == MARK or name.endswith(UNUSED)}


def _transformer(layers):
    """The file's modulation before a last linear layer is (shift, scale), the diffusers layout's (scale, shift)."""
    table = {"pos_embed": (Place("pos_embed.pos_embed"),)}
    for stored, name in TRANSFORMER.items():
        table |= both(stored, name, swapped=name == "norm_out.linear")
    for i in range(layers):
        for stored, names in BLOCK.items():
            names = [f"transformer_blocks.{i}.{name}" for name in ((names,) if isinstance(names, str) else names)]
            swapped = i == layers - 1 and stored == "context_block.adaLN_modulation.1"
            table |= both(f"joint_blocks.{i}.{stored}", *names, swapped=swapped)
    return table


def _vae(levels, blocks):
    """The file counts the decoder's levels from the finest, the diffusers layout from the coarsest."""
    table = {}
    for half in ("encoder", "decoder"):
        pairs = dict(HALF)
        for stored, name in MIDDLE.items():
            inner = ATTENTION if stored == "attn_1" else RESNET
            pairs |= {f"mid.{stored}.{a}": f"mid_block.{name}.{b}" for a, b in inner.items()}
        for i in range(levels):
            if half == "encoder":
                level, block, number = f"down.{i}", f"down_blocks.{i}", blocks
                pairs[f"{level}.downsample.conv"] = f"{block}.downsamplers.0.conv"
            else:
                level, block, number = f"up.{i}", f"up_blocks.{levels - 1 - i}", blocks + 1
                pairs[f"{level}.upsample.conv"] = f"{block}.upsamplers.0.conv"
            for j in range(number):
                pairs |= {f"{level}.block.{j}.{a}": f"{block}.resnets.{j}.{b}" for a, b in RESNET.items()}
        for stored, name in pairs.items():
            table |= both(f"{half}.{stored}", f"{half}.{name}")
    return table


def config(component, shapes):
    """The component's config.json as a dict; raises KeyError or ValueError for the shapes of another network."""
    if component == "transformer" and any(name.startswith("double_blocks.") for name in shapes):
        return flux_files.config(shapes)
    given = dict(CONFIGS[component])
    if component == "transformer":
        width, channels, patch, _ = shapes["x_embedder.proj.weight"]
        text, context = shapes["context_embedder.weight"]
        head, = shapes.get("joint_blocks.0.x_block.attn.ln_q.weight", (HEAD,))
        layers = count(shapes, "joint_blocks.{}.")
        given |= {
            "num_layers": layers, "num_attention_heads": width // head, "attention_head_dim": head, "patch_size": patch,
            "in_channels": channels, "out_channels": shapes["final_layer.linear.weight"][0] // patch**2,
            "caption_projection_dim": text, "joint_attention_dim": context,
            "pooled_projection_dim": shapes["y_embedder.mlp.0.weight"][1],
            "pos_embed_max_size": math.isqrt(shapes["pos_embed"][1]),
        }
        if "joint_blocks.0.x_block.attn.ln_q.weight" in shapes:
            given["qk_norm"] = "rms_norm"
        if dual := [i for i in range(layers) if f"joint_blocks.{i}.x_block.attn2.qkv.weight" in shapes]:
            given["dual_attention_layers"] = dual
    elif component == "vae":
        levels = count(shapes, "encoder.down.{}.")
        given |= {
            "in_channels": shapes["encoder.conv_in.weight"][1], "out_channels": shapes["decoder.conv_out.weight"][0],
            "latent_channels": shapes["decoder.conv_in.weight"][1],
            "layers_per_block": count(shapes, "encoder.down.0.block.{}."),
            "block_out_channels": [shapes[f"encoder.down.{i}.block.0.conv1.weight"][0] for i in range(levels)],
            "down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels,
        }
    elif component == "text_encoder_3":
        inner, width = shapes["encoder.block.0.layer.0.SelfAttention.q.weight"]
        buckets, heads = shapes["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
        given |= {
            "d_model": width, "num_heads": heads, "d_kv": inner // heads, "relative_attention_num_buckets": buckets,
            "num_layers": count(shapes, "encoder.block.{}."), "vocab_size": shapes["shared.weight"][0],
            "d_ff": shapes["encoder.block.0.layer.1.DenseReluDense.wi_0.weight"][0],
        }
    else:
        words, width = shapes["text_model.embeddings.token_embedding.weight"]
        given |= {
            "vocab_size": words, "hidden_size": width, "num_attention_heads": max(width // HEAD, 1),
            "num_hidden_layers": count(shapes, "text_model.encoder.layers.{}."),
            "intermediate_size": shapes["text_model.encoder.layers.0.mlp.fc1.weight"][0],
            "max_position_embeddings": shapes["text_model.embeddings.position_embedding.weight"][0],
            # clip_l has no projection; its pooled vector is used directly
            "architectures": ["CLIPTextModel"],
        }
        if "text_projection.weight" in shapes:
            given |= {"architectures": ["CLIPTextModelWithProjection"],
                      "projection_dim": shapes["text_projection.weight"][0]}
    return given
