"""CLIP's text transformer: token ids to the text context that a diffusion editor attends to.

Reads `text_encoder` of timbrooks/instruct-pix2pix, MudeHui/HQ-Edit and SD 1.5 (ViT-L/14), and `text_encoder` and
`text_encoder_2` of stabilityai/stable-diffusion-3-medium-diffusers (ViT-L/14 and OpenCLIP bigG, both with projection).
Parameters carry the names of the published files, so loading is a plain match by name.
Paper: Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision", section 2.4.
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from .config import LARGEST, LAYERS, TRANSFORMERS, Config, shown
from .lean import Embedding

PREFIX = "text_model."

# Keys of a published config.json that are not fields of `CLIPTextConfig` and change nothing at inference.
HARMLESS = TRANSFORMERS | {"tie_word_embeddings": "of a language model"}
# Keys that are not fields, and their implemented values.
IMPLEMENTED = {
    "model_type": ("clip_text_model",),
    "is_decoder": (False,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "pruned_heads": ({},),
    "cross_attention_hidden_size": (None,),
}


def quick_gelu(x):
    """The sigmoid approximation of GELU that OpenAI trained ViT-L/14 with."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": F.gelu}       # gelu is the exact one, with erf


@dataclass(frozen=True, kw_only=True)
class CLIPTextConfig(Config):
    """`text_encoder/config.json`. `projection_dim` is None where the checkpoint has no `text_projection`."""

    FILE: ClassVar = "CLIP's config.json"
    NETWORK: ClassVar = "CLIP's text transformer"
    HARMLESS: ClassVar = HARMLESS
    IMPLEMENTED: ClassVar = IMPLEMENTED
    RANGE: ClassVar = {"num_hidden_layers": LAYERS, "layer_norm_eps": (0, 1), "eos_token_id": (0, LARGEST)}

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    hidden_act: str
    layer_norm_eps: float = 1e-5
    eos_token_id: int = 49407                                  # 2 is a historical error that files keep: see `_end`
    projection_dim: int | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.hidden_size % self.num_attention_heads:
            raise self.refusal(f"sets hidden_size to {self.hidden_size}, which is not a multiple of num_attention_heads "
                               f"{self.num_attention_heads}")
        if self.hidden_act not in ACTIVATIONS:
            raise self.refusal(f"sets hidden_act to {shown(self.hidden_act)}; implemented are {' and '.join(ACTIVATIONS)}")

    @classmethod
    def translated(cls, given):
        """Drop `projection_dim` for a class without projection: transformers writes the key for both classes."""
        kinds = given.get("architectures") or ["CLIPTextModel"]
        if kinds not in (["CLIPTextModel"], ["CLIPTextModelWithProjection"]):
            raise cls.refusal(f"sets architectures to {shown(kinds)}, not to a CLIPTextModel or CLIPTextModelWithProjection")
        dropped = {"architectures"} if kinds == ["CLIPTextModelWithProjection"] else {"architectures", "projection_dim"}
        if "projection_dim" not in dropped and given.get("projection_dim") is None:
            raise cls.refusal("is of a CLIPTextModelWithProjection and sets no projection_dim")
        return {key: value for key, value in given.items() if key not in dropped}


class TextStates(NamedTuple):
    """The states that editors use: C is hidden_size, P is projection_dim (C where there is no projection)."""

    last: torch.Tensor                                         # (B, L, C) after the final LayerNorm: SD 1.x
    penultimate: torch.Tensor                                  # (B, L, C) before the last layer, not normed: SD3
    pooled: torch.Tensor                                       # (B, P) `last` at the end token, projected: SD3


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x):
        q, k, v = (
            project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)     # (B, L, C) -> (B, heads, L, head_dim)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        x = F.scaled_dot_product_attention(q, k, v, is_causal=True)        # no padding mask: padding is attended
        return self.out_proj(x.transpose(1, 2).flatten(2))                 # (B, L, C)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.activation = ACTIVATIONS[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x):
        return self.fc2(self.activation(self.fc1(x)))


class Layer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = Attention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x):
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class CLIPText(nn.Module):
    """Token ids to `TextStates`. The nested containers exist for the published names and compute nothing."""

    Config = CLIPTextConfig

    def __init__(self, config):
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.text_model = nn.ModuleDict({
            "embeddings": nn.ModuleDict({
                "token_embedding": Embedding(config.vocab_size, width),
                "position_embedding": Embedding(config.max_position_embeddings, width),
            }),
            "encoder": nn.ModuleDict({"layers": nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))}),
            "final_layer_norm": nn.LayerNorm(width, eps=config.layer_norm_eps),
        })
        if config.projection_dim is not None:
            self.text_projection = nn.Linear(width, config.projection_dim, bias=False)

    @staticmethod
    def rename(name):
        """Translate a tensor's name from a published file; None for a tensor that no layer uses."""
        if name.endswith("embeddings.position_ids"):
            return None                                        # 0, 1, 2, ...: a buffer that SD 1.x files carry
        if name == "logit_scale":
            return None                                        # scales the similarity to pictures, which is not computed here
        if name.startswith((PREFIX, "text_projection.")):
            return name
        return PREFIX + name                                   # transformers 5 saves CLIPTextModel without the prefix

    def forward(self, ids):
        """`ids`: (B, L) int64, L at most max_position_embeddings; each row holds the end token."""
        model, length = self.text_model, ids.shape[1]
        if length > self.config.max_position_embeddings:
            raise ValueError(f"{length} tokens, but this CLIP has {self.config.max_position_embeddings} positions")
        embeddings, places = model["embeddings"], torch.arange(length, device=ids.device)
        x = embeddings["token_embedding"](ids) + embeddings["position_embedding"](places)                # (B, L, C)
        for layer in model["encoder"]["layers"]:
            penultimate, x = x, layer(x)
        last = model["final_layer_norm"](x)
        pooled = last[torch.arange(len(ids), device=ids.device), self._end(ids)]           # (B, C)
        if self.config.projection_dim is not None:
            pooled = self.text_projection(pooled)              # (B, P)
        return TextStates(last, penultimate, pooled)

    def _end(self, ids):
        """The position of the first end token in each row, (B,). Older configs set `eos_token_id` to 2, which no prompt
        contains. For them the end token is the highest id; where padding has the same id, argmax keeps the first."""
        ends = ids if self.config.eos_token_id == 2 else ids == self.config.eos_token_id
        return ends.int().argmax(dim=-1)
