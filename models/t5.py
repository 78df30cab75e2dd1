"""T5's encoder, versions 1.0 and 1.1: token ids to the text context that SD3's transformer attends to beside CLIP's.

Reads `text_encoder_3` of stabilityai/stable-diffusion-3-medium-diffusers (T5 v1.1 XXL, 4.8 billion parameters), the
standalone t5xxl_*.safetensors, and the files of any T5EncoderModel with a gated GELU (version 1.1) or a ReLU (1.0).
Parameters carry the names of the published files, so loading is a plain match by name. Papers: Raffel et al. 2020, "Exploring
the Limits of Transfer Learning", section 2.1; Shazeer 2020, "GLU Variants Improve Transformer", for the gate of version 1.1.

bfloat16 is the right half precision: it has the range of float32, in which T5 was trained. Values that overflow float16 are
kept in float32: see `T5Encoder.forward` and `FeedForward`.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from .config import LAYERS, TRANSFORMERS, Config, shown
from .lean import Embedding

# Keys of a published config.json that are not fields of `T5Config`: they change nothing at inference ...
HARMLESS = TRANSFORMERS | dict.fromkeys((
    "decoder_start_token_id", "num_decoder_layers", "scale_decoder_outputs", "tie_encoder_decoder", "tie_word_embeddings",
), "of the decoder") | {
    "is_encoder_decoder": "of the whole T5; the encoder is the same",
    "eos_token_id": "of the tokenizer",
    "n_positions": "the training length; positions are relative, so any length runs",
}
# ... or only these values are implemented.
IMPLEMENTED = {
    "model_type": ("t5",),
    "architectures": (["T5EncoderModel"], None),
    "is_decoder": (False,),
    "add_cross_attention": (False,),
    "pruned_heads": ({},),
    "cross_attention_hidden_size": (None,),
}
# The feed-forward layers: version 1.1's with its gate, and version 1.0's. In transformers the second and third column follow
# from the first; files spell them out.
FEED_FORWARDS = {"gated-gelu": ("gelu_new", True), "relu": ("relu", False)}


@dataclass(frozen=True, kw_only=True)
class T5Config(Config):
    """`text_encoder_3/config.json`. The attention is num_heads * d_kv wide, which need not be d_model."""

    FILE: ClassVar = "T5's config.json"
    NETWORK: ClassVar = "T5's encoder"
    HARMLESS: ClassVar = HARMLESS
    IMPLEMENTED: ClassVar = IMPLEMENTED
    RANGE: ClassVar = {"num_layers": LAYERS, "layer_norm_epsilon": (0, 1)}

    vocab_size: int
    d_model: int
    d_kv: int                                                  # width of one head
    d_ff: int
    num_layers: int
    num_heads: int
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128                 # tokens this far apart or farther share a bucket
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: str = "relu"                            # files of version 1.0 leave it out
    dense_act_fn: str | None = None                            # None: as feed_forward_proj implies
    is_gated_act: bool | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.feed_forward_proj not in FEED_FORWARDS:
            raise self.refusal(f"sets feed_forward_proj to {shown(self.feed_forward_proj)}; implemented are "
                               f"{' and '.join(FEED_FORWARDS)}")
        for key, implied in zip(("dense_act_fn", "is_gated_act"), FEED_FORWARDS[self.feed_forward_proj], strict=True):
            if getattr(self, key) not in (None, implied):
                raise self.refusal(f"sets {key} to {shown(getattr(self, key))}; with feed_forward_proj "
                                   f"{self.feed_forward_proj!r} only {implied!r} is implemented")
            object.__setattr__(self, key, implied)
        buckets, farthest = self.relative_attention_num_buckets, self.relative_attention_max_distance
        if buckets < 4 or buckets % 2:
            raise self.refusal(f"sets relative_attention_num_buckets to {buckets}, not to an even number from 4")
        if farthest <= buckets // 4:
            raise self.refusal(f"sets relative_attention_max_distance to {farthest}, which must exceed the {buckets // 4} "
                               "distances that have buckets of their own")


class RMSNorm(nn.Module):
    """Division by the root mean square, at least in float32; no mean is subtracted and no bias added."""

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
    """Version 1.1: a GELU (by tanh) gates a second product. Version 1.0: a ReLU of one product."""

    def __init__(self, config):
        super().__init__()
        self.is_gated = config.is_gated_act
        for name in ("wi_0", "wi_1") if self.is_gated else ("wi",):
            setattr(self, name, nn.Linear(config.d_model, config.d_ff, bias=False))
        self.wo = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x):
        # In the XXL encoder the sums over 10240 channels exceed 65504, the largest float16, so they are made in float32. Only
        # one layer's weights are copied to float32 at a time (160 MiB in XXL).
        wide = torch.float32 if x.dtype == torch.float16 else x.dtype
        if self.is_gated:
            y = F.gelu(self.wi_0(x), approximate="tanh").to(wide) * self.wi_1(x).to(wide)
        else:
            y = F.relu(self.wi(x)).to(wide)
        return self.wo(y) if wide == x.dtype else F.linear(y, self.wo.weight.to(wide))


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
    """Token ids to the last hidden state. There is no attention mask: SD3 attends to padding as to any token.

    The nested containers exist for the published names and compute nothing.
    """

    Config = T5Config

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.shared = Embedding(config.vocab_size, config.d_model)
        self.encoder = nn.ModuleDict({
            # The first block stores the position bias of all blocks.
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
            # The sum over the blocks overflows float16 in the XXL encoder. Each block's norm returns float16.
            x = x.float()
        for block in self.encoder["block"]:
            x = block(x, bias)
        return self.encoder["final_layer_norm"](x)

    def _position_bias(self, length, device):
        """The bias of the scores, (1, heads, L, L); for query i and key j it depends on j - i alone."""
        weight = self.encoder["block"][0].layer[0]["SelfAttention"].relative_attention_bias
        places = torch.arange(length, device=device)
        offsets = places[None, :] - places[:, None]            # (L, L)
        return weight(self._buckets(offsets)).permute(2, 0, 1)[None]

    def _buckets(self, offsets):
        """The bucket of each offset; later keys have the upper half of the buckets.

        Within a half each short distance has its own bucket. Longer ones share buckets of logarithmic width; the last bucket
        has no upper end.
        """
        half = self.config.relative_attention_num_buckets // 2
        exact = half // 2
        distance = offsets.abs()
        # In float32 and in transformers' order, so that a distance between two buckets rounds the same way.
        growth = torch.log(distance.clamp(min=exact).float() / exact)
        growth = growth / math.log(self.config.relative_attention_max_distance / exact) * (half - exact)
        shared = (exact + growth.long()).clamp(max=half - 1)
        return torch.where(distance < exact, distance, shared) + half * (offsets > 0)
