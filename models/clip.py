"""CLIP's text transformer: token ids to the text context that a diffusion editor attends to.

Reads `text_encoder` of timbrooks/instruct-pix2pix, MudeHui/HQ-Edit and SD 1.5 (ViT-L/14), and `text_encoder` and
`text_encoder_2` of stabilityai/stable-diffusion-3-medium-diffusers (ViT-L/14 and OpenCLIP bigG, both with projection).
Parameters carry the names of the published files, so loading is a plain match by name.
Paper: Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision", section 2.4.
"""

import json
from dataclasses import MISSING, dataclass, fields
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from .lean import Embedding

PREFIX = "text_model."

# Keys of a published config.json that the numbers do not depend on, each with its reason,
# or with the tuple of values under which that is true (any other value is refused).
IGNORED = {
    "model_type": ("clip_text_model",),
    "is_decoder": (False,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "pruned_heads": ({},),
    "attention_dropout": "training only",
    "dropout": "training only",
    "gradient_checkpointing": "training only",
    "initializer_factor": "training only",
    "initializer_range": "training only",
    "bos_token_id": "the tokenizer's business",
    "pad_token_id": "the tokenizer's business; padding is attended like any token",
    "chunk_size_feed_forward": "memory only",
    "use_cache": "memory only",
    "output_attentions": "what a call returns, in transformers",
    "output_hidden_states": "what a call returns, in transformers",
    "return_dict": "what a call returns, in transformers",
    "id2label": "of a classifier",
    "label2id": "of a classifier",
    "problem_type": "of a classifier",
    "tie_word_embeddings": "of a language model",
    "dtype": "storage; the caller chooses the dtype",
    "torch_dtype": "storage; the caller chooses the dtype",
    "transformers_version": "history",
}


def quick_gelu(x):
    """The sigmoid approximation of GELU that OpenAI trained ViT-L/14 with."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": F.gelu}       # gelu is the exact one, with erf


@dataclass(frozen=True)
class CLIPTextConfig:
    """The numbers of one checkpoint. `projection_dim` is None where the checkpoint has no `text_projection`."""

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
        for field in fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name == "eos_token_id" else 1
            if field.type is int and (type(value) is not int or value < least):
                raise ValueError(f"config.json gives {field.name} {value!r}, expected a whole number from {least}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"config.json gives hidden_size {self.hidden_size}, which is not a multiple of "
                f"num_attention_heads {self.num_attention_heads}"
            )
        if self.hidden_act not in tuple(ACTIVATIONS):
            raise ValueError(
                f"config.json gives hidden_act {self.hidden_act!r}, which this CLIP does not implement; "
                f"it knows {' and '.join(ACTIVATIONS)}"
            )

    @classmethod
    def from_json(cls, text):
        """Read the text of a `config.json`; whatever would change the numbers and is not implemented is refused."""
        given = json.loads(text)
        if not isinstance(given, dict):
            raise ValueError("config.json holds no JSON object")
        given = {key: value for key, value in given.items() if not key.startswith("_")}
        # The class name alone says whether the file holds a projection: both kinds write projection_dim.
        architecture = (given.pop("architectures", None) or ["CLIPTextModel"])[0]
        if architecture not in ("CLIPTextModel", "CLIPTextModelWithProjection"):
            raise ValueError(f"config.json is of a {architecture}, not of a CLIP text transformer")
        if architecture == "CLIPTextModel":
            given.pop("projection_dim", None)
        elif type(given.get("projection_dim")) is not int or given["projection_dim"] < 1:
            raise ValueError(f"config.json is of a {architecture}, but its projection_dim is no whole number from 1")
        for key in given.keys() & IGNORED.keys():
            value, accepted = given.pop(key), IGNORED[key]
            if isinstance(accepted, tuple) and value not in accepted:
                raise ValueError(f"config.json sets {key} to {value!r}, which this CLIP does not implement")
        known = {field.name: field.default is MISSING for field in fields(cls)}
        if extra := sorted(given.keys() - known):
            raise ValueError(f"config.json sets {', '.join(extra)}, which this CLIP does not implement")
        if missing := sorted(name for name, needed in known.items() if needed and name not in given):
            raise ValueError(f"config.json does not set {', '.join(missing)}, which a CLIP text transformer needs")
        return cls(**given)


class TextStates(NamedTuple):
    """What the three kinds of editor read: C is hidden_size, P is projection_dim (C where there is no projection)."""

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
        """A file's tensor name as ours, or None for one that is dropped on purpose."""
        if name.endswith("embeddings.position_ids"):
            return None                                        # 0, 1, 2, ...: a buffer that SD 1.x files carry
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
        """(B,) the first end token of each row. Older configs say `eos_token_id` 2, which no prompt contains: for them
        the end is the highest id, and padding with the same id comes later, as argmax keeps the first."""
        ends = ids if self.config.eos_token_id == 2 else ids == self.config.eos_token_id
        return ends.int().argmax(dim=-1)
