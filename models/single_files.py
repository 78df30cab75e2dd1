"""The published single files of Stable Diffusion 3: the name of each of their tensors in the diffusers layout.

`sd3_medium.safetensors` holds the transformer and the VAE; `..._incl_clips` also the two CLIP text encoders, and
`..._incl_clips_t5xxlfp16` or `..._t5xxlfp8` T5 as well. SD3.5's files use the same names. This file knows names and
shapes only: `places` says where a tensor goes, and `config` describes the network of these shapes, as a config.json would.
The tables read: name in the file, without prefix: name in the diffusers layout.

Files called fp8_scaled hold a weight as float8 beside one number, by which it is to be multiplied.
"""

import math
import re
from typing import NamedTuple

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


class Place(NamedTuple):
    """The destination of a tensor of a file, and the part of it that goes there."""

    name: str                                       # in the diffusers layout
    third: int | None = None                        # 0, 1, 2: only this third of the rows
    swapped: bool = False                           # the second half of the rows first
    scale: str | None = None                        # the tensor with the number by which this one is multiplied

    def below(self, prefix):
        """The same place for a file in which the scale has this prefix."""
        return self._replace(scale=prefix + self.scale) if self.scale else self

    def shape(self, shape):
        """The shape of the part, or of the whole where it does not divide."""
        return (shape[0] // 3, *shape[1:]) if self.third is not None and shape and shape[0] % 3 == 0 else shape

    def take(self, tensor):
        """The part."""
        if self.third is not None:
            tensor = tensor.chunk(3)[self.third]
        return tensor.roll(len(tensor) // 2, 0) if self.swapped else tensor


def split(names):
    """({component: {name without its prefix: name}}, the names that belong to no component)."""
    parts, unknown = {}, []
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
    if component == "transformer":
        table = _transformer(_count(shapes, "joint_blocks.{}."))
    elif component == "vae":
        table = _vae(_count(shapes, "encoder.down.{}."), _count(shapes, "encoder.down.0.block.{}."))
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
        table |= _both(stored, name, swapped=name == "norm_out.linear")
    for i in range(layers):
        for stored, names in BLOCK.items():
            names = [f"transformer_blocks.{i}.{name}" for name in ((names,) if isinstance(names, str) else names)]
            swapped = i == layers - 1 and stored == "context_block.adaLN_modulation.1"
            table |= _both(f"joint_blocks.{i}.{stored}", *names, swapped=swapped)
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
                level, block, count = f"down.{i}", f"down_blocks.{i}", blocks
                pairs[f"{level}.downsample.conv"] = f"{block}.downsamplers.0.conv"
            else:
                level, block, count = f"up.{i}", f"up_blocks.{levels - 1 - i}", blocks + 1
                pairs[f"{level}.upsample.conv"] = f"{block}.upsamplers.0.conv"
            for j in range(count):
                pairs |= {f"{level}.block.{j}.{a}": f"{block}.resnets.{j}.{b}" for a, b in RESNET.items()}
        for stored, name in pairs.items():
            table |= _both(f"{half}.{stored}", f"{half}.{name}")
    return table


def _both(stored, *names, swapped=False):
    """The weight and the bias of one row of a table."""
    return {
        f"{stored}.{kind}": tuple(Place(f"{name}.{kind}", third if len(names) == 3 else None, swapped)
                                  for third, name in enumerate(names))
        for kind in ("weight", "bias")
    }


def _count(shapes, pattern):
    """The count of different numbers at {} in the names that begin with the pattern."""
    before, after = pattern.split("{}")
    found = (name[len(before):].split(after)[0] for name in shapes if name.startswith(before))
    return len({number for number in found if number.isdecimal()})


def config(component, shapes):
    """The component's config.json as a dict; raises KeyError or ValueError for the shapes of another network."""
    given = dict(CONFIGS[component])
    if component == "transformer":
        width, channels, patch, _ = shapes["x_embedder.proj.weight"]
        text, context = shapes["context_embedder.weight"]
        head, = shapes.get("joint_blocks.0.x_block.attn.ln_q.weight", (HEAD,))
        layers = _count(shapes, "joint_blocks.{}.")
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
        levels = _count(shapes, "encoder.down.{}.")
        given |= {
            "in_channels": shapes["encoder.conv_in.weight"][1], "out_channels": shapes["decoder.conv_out.weight"][0],
            "latent_channels": shapes["decoder.conv_in.weight"][1],
            "layers_per_block": _count(shapes, "encoder.down.0.block.{}."),
            "block_out_channels": [shapes[f"encoder.down.{i}.block.0.conv1.weight"][0] for i in range(levels)],
            "down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels,
        }
    elif component == "text_encoder_3":
        inner, width = shapes["encoder.block.0.layer.0.SelfAttention.q.weight"]
        buckets, heads = shapes["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
        given |= {
            "d_model": width, "num_heads": heads, "d_kv": inner // heads, "relative_attention_num_buckets": buckets,
            "num_layers": _count(shapes, "encoder.block.{}."), "vocab_size": shapes["shared.weight"][0],
            "d_ff": shapes["encoder.block.0.layer.1.DenseReluDense.wi_0.weight"][0],
        }
    else:
        words, width = shapes["text_model.embeddings.token_embedding.weight"]
        given |= {
            "vocab_size": words, "hidden_size": width, "num_attention_heads": max(width // HEAD, 1),
            "num_hidden_layers": _count(shapes, "text_model.encoder.layers.{}."),
            "intermediate_size": shapes["text_model.encoder.layers.0.mlp.fc1.weight"][0],
            "max_position_embeddings": shapes["text_model.embeddings.position_embedding.weight"][0],
            # clip_l has no projection; its pooled vector is used directly
            "architectures": ["CLIPTextModel"],
        }
        if "text_projection.weight" in shapes:
            given |= {"architectures": ["CLIPTextModelWithProjection"],
                      "projection_dim": shapes["text_projection.weight"][0]}
    return given
