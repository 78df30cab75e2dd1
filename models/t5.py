"""T5's encoder, version 1.1: token ids to the text context that SD3's transformer attends to beside CLIP's.

Reads `text_encoder_3` of stabilityai/stable-diffusion-3-medium-diffusers (T5 v1.1 XXL, 4.8 billion parameters), the
standalone t5xxl_*.safetensors, and what transformers writes for any T5EncoderModel with a gated GELU. Parameters carry
the names of the published files, so loading is a plain match by name. Papers: Raffel et al. 2020, "Exploring the Limits
of Transfer Learning", section 2.1; Shazeer 2020, "GLU Variants Improve Transformer", for the gate of version 1.1.

bfloat16 is the dtype to run it in: it has float32's range, which T5 was trained in and needs. float16 has not, and is
made safe by keeping in float32 what outgrows it: see `T5Encoder.forward` and `FeedForward`.
"""

import json
import math
from dataclasses import MISSING, dataclass, fields

import torch
from torch import nn
from torch.nn import functional as F

from .lean import Embedding

# Keys of a published config.json that the numbers do not depend on, each with its reason,
# or with the tuple of values under which that is true (any other value is refused).
IGNORED = {
    "model_type": ("t5",),
    "architectures": (["T5EncoderModel"], None),
    "is_decoder": (False,),
    "add_cross_attention": (False,),
    "pruned_heads": ({},),
    "feed_forward_proj": ("gated-gelu",),                      # must be set: T5 1.0, whose layers differ, is the default
    "dense_act_fn": ("gelu_new",),                             # what gated-gelu means, spelled out: GELU by tanh
    "is_gated_act": (True,),
    "dropout_rate": "training only",
    "classifier_dropout": "training only",
    "gradient_checkpointing": "training only",
    "initializer_factor": "training only",
    "is_encoder_decoder": "of the whole T5; the encoder is the same",
    "num_decoder_layers": "of the decoder",
    "decoder_start_token_id": "of the decoder",
    "scale_decoder_outputs": "of the decoder",
    "tie_word_embeddings": "of the decoder's output",
    "tie_encoder_decoder": "of the decoder",
    "bos_token_id": "the tokenizer's business",
    "eos_token_id": "the tokenizer's business",
    "pad_token_id": "the tokenizer's business; padding is attended like any token",
    "chunk_size_feed_forward": "memory only",
    "use_cache": "memory only",
    "output_past": "memory only",
    "output_attentions": "what a call returns, in transformers",
    "output_hidden_states": "what a call returns, in transformers",
    "return_dict": "what a call returns, in transformers",
    "n_positions": "the training length; positions are relative, so any length runs",
    "task_specific_params": "prompts of T5 1.0's tasks",
    "id2label": "of a classifier",
    "label2id": "of a classifier",
    "problem_type": "of a classifier",
    "dtype": "storage; the caller chooses the dtype",
    "torch_dtype": "storage; the caller chooses the dtype",
    "transformers_version": "history",
}


@dataclass(frozen=True)
class T5Config:
    """The numbers of one checkpoint. The attention is num_heads * d_kv wide, which need not be d_model."""

    vocab_size: int
    d_model: int
    d_kv: int                                                  # width of one head
    d_ff: int
    num_layers: int
    num_heads: int
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128                 # tokens this far apart or farther share a bucket
    layer_norm_epsilon: float = 1e-6

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is int and (type(value) is not int or value < 1):
                raise ValueError(f"config.json gives {field.name} {value!r}, expected a whole number from 1")
        if type(self.layer_norm_epsilon) not in (int, float) or not 0 <= self.layer_norm_epsilon < math.inf:
            raise ValueError(f"config.json gives layer_norm_epsilon {self.layer_norm_epsilon!r}, expected a number from 0")
        buckets, farthest = self.relative_attention_num_buckets, self.relative_attention_max_distance
        if buckets < 4 or buckets % 2:
            raise ValueError(f"config.json gives relative_attention_num_buckets {buckets}, expected an even number from 4")
        if farthest <= buckets // 4:
            raise ValueError(f"config.json gives relative_attention_max_distance {farthest}, which must exceed the "
                             f"{buckets // 4} distances that have buckets of their own")

    @classmethod
    def from_json(cls, text):
        """Read the text of a `config.json`; whatever would change the numbers and is not implemented is refused."""
        given = json.loads(text)
        if not isinstance(given, dict):
            raise ValueError("config.json holds no JSON object")
        given = {key: value for key, value in given.items() if not key.startswith("_")}
        given.setdefault("feed_forward_proj", "relu")          # as T5 1.0 leaves it out
        for key in given.keys() & IGNORED.keys():
            value, accepted = given.pop(key), IGNORED[key]
            if isinstance(accepted, tuple) and value not in accepted:
                raise ValueError(f"config.json sets {key} to {value!r}; only {accepted[0]!r} is implemented")
        known = {field.name: field.default is MISSING for field in fields(cls)}
        if extra := sorted(given.keys() - known):
            raise ValueError(f"config.json sets {', '.join(extra)}, which this T5 does not implement")
        if missing := sorted(name for name, needed in known.items() if needed and name not in given):
            raise ValueError(f"config.json does not set {', '.join(missing)}, which a T5 encoder needs")
        return cls(**given)


class RMSNorm(nn.Module):
    """Divides by the root mean square, at least in float32; no mean is taken off and no bias added."""

    def __init__(self, config):
        super().__init__()
        self.eps = config.layer_norm_epsilon
        self.weight = nn.Parameter(torch.ones(config.d_model))

    def forward(self, x):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        wide = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.eps)
        return self.weight * wide.to(self.weight.dtype)


class SelfAttention(nn.Module):
    """Softmax(q k + bias) v. The scores are not divided by the root of d_kv: T5's initial weights are smaller instead."""

    def __init__(self, config, has_bias):
        super().__init__()
        inner = config.num_heads * config.d_kv
        self.heads = config.num_heads
        self.q = nn.Linear(config.d_model, inner, bias=False)
        self.k = nn.Linear(config.d_model, inner, bias=False)
        self.v = nn.Linear(config.d_model, inner, bias=False)
        self.o = nn.Linear(inner, config.d_model, bias=False)
        if has_bias:
            self.relative_attention_bias = Embedding(config.relative_attention_num_buckets, config.num_heads)

    def forward(self, x, bias):
        q, k, v = (
            project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)     # (B, L, C) -> (B, heads, L, d_kv)
            for project in (self.q, self.k, self.v)
        )
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)     # no padding mask: see T5Encoder
        return self.o(x.transpose(1, 2).flatten(2))                        # (B, L, C)


class FeedForward(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.wi_0 = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.wi_1 = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.wo = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x):
        gate, value = F.gelu(self.wi_0(x), approximate="tanh"), self.wi_1(x)
        if x.dtype == torch.float16:
            # In the XXL encoder this product, summed over 10240 channels, passes 65504, where float16 ends. The copy of
            # the weights in float32 is of one layer (160 MiB there) and gone with it.
            return F.linear(gate.float() * value.float(), self.wo.weight.float())
        return self.wo(gate * value)


class Block(nn.Module):
    def __init__(self, config, has_bias):
        super().__init__()
        self.layer = nn.ModuleList([
            nn.ModuleDict({"SelfAttention": SelfAttention(config, has_bias), "layer_norm": RMSNorm(config)}),
            nn.ModuleDict({"DenseReluDense": FeedForward(config), "layer_norm": RMSNorm(config)}),
        ])

    def forward(self, x, bias):
        attention, feed_forward = self.layer
        x = x + attention["SelfAttention"](attention["layer_norm"](x), bias)
        return x + feed_forward["DenseReluDense"](feed_forward["layer_norm"](x))


class T5Encoder(nn.Module):
    """Token ids to the last hidden state. There is no attention mask: SD3 attends to padding like to any token.

    The nested containers exist for the published names and compute nothing.
    """

    Config = T5Config

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.shared = Embedding(config.vocab_size, config.d_model)
        self.encoder = nn.ModuleDict({
            # The first block stores the position bias of all.
            "block": nn.ModuleList(Block(config, has_bias=i == 0) for i in range(config.num_layers)),
            "final_layer_norm": RMSNorm(config),
        })

    @staticmethod
    def rename(name):
        """A file's tensor name as ours, or None for one that is dropped on purpose."""
        return None if name == "encoder.embed_tokens.weight" else name         # shared.weight, stored a second time

    def forward(self, ids):
        """`ids`: (B, L) int64, any L. Returns (B, L, d_model), after the final norm, in the dtype of the weights."""
        x = self.shared(ids)                                   # (B, L, C)
        bias = self._position_bias(ids.shape[1], ids.device)
        if x.dtype == torch.float16:
            # What the blocks add up outgrows float16 in the XXL encoder. Each block's norm brings it back to float16.
            x = x.float()
        for block in self.encoder["block"]:
            x = block(x, bias)
        return self.encoder["final_layer_norm"](x)

    def _position_bias(self, length, device):
        """(1, heads, L, L): what is added to the scores of query i and key j; it depends on j - i alone."""
        weight = self.encoder["block"][0].layer[0]["SelfAttention"].relative_attention_bias
        places = torch.arange(length, device=device)
        offsets = places[None, :] - places[:, None]            # (L, L)
        return weight(self._buckets(offsets)).permute(2, 0, 1)[None]

    def _buckets(self, offsets):
        """The bucket of each offset: the upper half for keys that come later. Within a half, short distances have a
        bucket each; longer ones share buckets that widen with the logarithm, the last one without end."""
        half = self.config.relative_attention_num_buckets // 2
        exact = half // 2
        distance = offsets.abs()
        # In float32 and in this order, as transformers does: a distance on the edge of two buckets must round alike.
        growth = torch.log(distance.clamp(min=exact).float() / exact)
        growth = growth / math.log(self.config.relative_attention_max_distance / exact) * (half - exact)
        shared = (exact + growth.long()).clamp(max=half - 1)
        return torch.where(distance < exact, distance, shared) + half * (offsets > 0)
