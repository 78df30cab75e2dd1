"""Qwen3's text model, up to the last layer that FLUX.2 [klein] reads: token ids to the text context of its transformer.

Reads `text_encoder` of black-forest-labs/FLUX.2-klein-4B (Qwen3-4B: 36 layers, of which 27 are built and loaded, 3.1 billion
parameters), and the files of any Qwen3ForCausalLM or Qwen3Model with full attention. Parameters carry the names of the
published files, without the prefix `model.` that the first of the two classes writes. Papers: Yang et al. 2025, "Qwen3
Technical Report", section 2; Su et al. 2021 (rotary positions); Ainslie et al. 2023 (grouped queries).

bfloat16 is the right half precision: the network was trained in it.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from .config import LAYERS, TRANSFORMERS, Config, shown
from .lean import Embedding

READ = (9, 18, 27)                                             # klein's context: the states after so many layers, side by side

# Keys of a published config.json that are not fields of `Qwen3Config` and change nothing here.
HARMLESS = TRANSFORMERS | {
    "eos_token_id": "of generating text",
    "tie_word_embeddings": "of the output layer, which is not built",
    "max_position_embeddings": "the training length; rotary positions are computed for any length",
    "sliding_window": "not used where use_sliding_window is off",
    "max_window_layers": "not used where use_sliding_window is off",
}
# Keys that are not fields, and their implemented values.
IMPLEMENTED = {
    "model_type": ("qwen3",),
    "architectures": (["Qwen3ForCausalLM"], ["Qwen3Model"], None),
    "hidden_act": ("silu",),
    "use_sliding_window": (False,),
    "rope_scaling": (None,),
    "is_decoder": (False,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "pruned_heads": ({},),
    "cross_attention_hidden_size": (None,),
}


@dataclass(frozen=True, kw_only=True)
class Qwen3Config(Config):
    """`text_encoder/config.json`. The queries are num_attention_heads * head_dim wide, which need not be hidden_size."""

    FILE: ClassVar = "Qwen3's config.json"
    NETWORK: ClassVar = "Qwen3's text model"
    HARMLESS: ClassVar = HARMLESS
    IMPLEMENTED: ClassVar = IMPLEMENTED
    RANGE: ClassVar = {"num_hidden_layers": LAYERS, "rms_norm_eps": (0, 1), "rope_theta": (1, 1e12)}

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    rope_theta: float                                          # wavelengths of the rotary positions: up to 2 pi times this
    num_key_value_heads: int | None = None                     # None: as many as num_attention_heads
    head_dim: int = 128
    rms_norm_eps: float = 1e-6
    attention_bias: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        if self.num_attention_heads % self.num_key_value_heads:
            raise self.refusal(f"sets num_attention_heads to {self.num_attention_heads}, which is not a multiple of "
                               f"num_key_value_heads {self.num_key_value_heads}")
        if self.head_dim % 2:
            raise self.refusal(f"sets head_dim to {self.head_dim}; rotary positions need an even number")

    @classmethod
    def translated(cls, given):
        """`rope_theta` out of `rope_parameters`, as newer files spell it; the kinds of all layers checked and dropped."""
        given = dict(given)
        if (rope := given.pop("rope_parameters", None)) is not None:
            if not isinstance(rope, dict) or rope.get("rope_type", "default") != "default" or rope.keys() - {
                    "rope_type", "rope_theta"}:
                raise cls.refusal(f"sets rope_parameters to {shown(rope)}; only rope_theta with the rope_type 'default' is "
                                  "implemented")
            given |= {key: value for key, value in rope.items() if key == "rope_theta"}
        kinds = given.pop("layer_types", None)
        if kinds is not None and (not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds)):
            raise cls.refusal(f"sets layer_types to {shown(kinds)}; only 'full_attention' is implemented")
        return given


def rotary(length, width, theta, device):
    """Cosine and sine of each position's angles, (length, width // 2) each, in float32 as in transformers."""
    rates = 1.0 / theta ** (torch.arange(0, width, 2, dtype=torch.float32, device=device) / width)
    angles = torch.arange(length, dtype=torch.float32, device=device)[:, None] * rates
    return angles.cos(), angles.sin()


def rotated(x, cosine, sine):
    """x (B, heads, L, width) with each pair of channels (i, i + width // 2) turned by its position's angle."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)


class Attention(nn.Module):
    """Causal attention, several query heads to each head of keys and values; queries and keys are normalised per head."""

    def __init__(self, config):
        super().__init__()
        width, bias = config.head_dim, config.attention_bias
        self.width, self.groups = width, config.num_attention_heads // config.num_key_value_heads
        self.q_proj = nn.Linear(config.hidden_size, config.num_attention_heads * width, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * width, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * width, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * width, config.hidden_size, bias=bias)
        self.q_norm = nn.RMSNorm(width, eps=config.rms_norm_eps)
        self.k_norm = nn.RMSNorm(width, eps=config.rms_norm_eps)

    def forward(self, x, mask, cosine, sine):
        q, k, v = (project(x).unflatten(-1, (-1, self.width)) for project in (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = (part.transpose(1, 2) for part in (self.q_norm(q), self.k_norm(k), v))            # (B, heads, L, width)
        q, k = rotated(q, cosine, sine), rotated(k, cosine, sine)
        k, v = (part.repeat_interleave(self.groups, dim=1) for part in (k, v))
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.o_proj(x.transpose(1, 2).flatten(2))                                            # (B, L, C)


class FeedForward(nn.Module):
    """A SiLU gates a second product."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = FeedForward(config)

    def forward(self, x, mask, cosine, sine):
        x = x + self.self_attn(self.input_layernorm(x), mask, cosine, sine)
        return x + self.mlp(self.post_attention_layernorm(x))


class Qwen3Text(nn.Module):
    """Token ids to the states after some of the layers, side by side.

    read: after how many layers, each at least 1, rising. Later layers are not built. After the last layer of the file, the
    states are those after its final norm, as transformers counts.
    """

    Config = Qwen3Config

    def __init__(self, config, read=READ):
        super().__init__()
        if read[-1] > config.num_hidden_layers:
            raise config.refusal(f"sets num_hidden_layers to {config.num_hidden_layers}; the text is read after layer "
                                 f"{read[-1]}")
        self.config, self.read = config, tuple(read)
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(read[-1]))
        whole = read[-1] == config.num_hidden_layers
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps) if whole else None

    def rename(self, name):
        """A file's tensor name as ours, or None for one that is dropped on purpose: it comes after the last layer read."""
        name = name.removeprefix("model.")
        first, _, rest = name.partition(".")
        if name == "lm_head.weight" or name == "norm.weight" and self.norm is None:
            return None
        layer = rest.partition(".")[0]
        if first == "layers" and layer.isdecimal() and len(self.layers) <= int(layer) < self.config.num_hidden_layers:
            return None
        return name

    def forward(self, ids, mask):
        """The context, (B, L, len(read) * hidden_size), in the dtype of the weights.

        ids: (B, L) int64, any L. mask: (B, L), True for tokens and False for padding, which follows them; no position attends
        to padding. The states at padding are returned like any others, as in the published pipeline. A row needs a token.
        """
        x = self.embed_tokens(ids)                                                                  # (B, L, C)
        length = ids.shape[1]
        cosine, sine = (part.to(x.dtype) for part in rotary(length, self.config.head_dim, self.config.rope_theta, ids.device))
        mask = mask.bool()[:, None, None] & torch.ones(length, length, dtype=torch.bool, device=ids.device).tril()
        states = []
        for count, layer in enumerate(self.layers, start=1):
            x = layer(x, mask, cosine, sine)
            if count in self.read:
                states.append(x if self.norm is None or count < len(self.layers) else self.norm(x))
        return torch.cat(states, dim=-1)
