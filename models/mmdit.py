"""The multimodal diffusion transformer of Stable Diffusion 3: predicts the velocity of a noisy latent, given a text.

Reads the `transformer/` of stabilityai/stable-diffusion-3-medium-diffusers (16 input channels), of UltraEdit (32, or 48
with a mask: the noisy latent and image latents), of stable-diffusion-3.5-medium (dual attention in its first blocks,
normalised queries and keys), and of the shipped miniature. Parameters carry the names of the published files, so loading
is a plain match by name. Paper: Esser et al. 2024 (arXiv 2403.03206), section 4 and figure 2.

`MMDiT.walk` is the whole forward pass, on one screen; the classes above it are its layers. Image tokens and text tokens
are two streams with their own weights, which meet in every block's attention.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from .config import EMA, LAYERS, Config, shown
from .lean import Prepared, tapped
from .modulation import NORM_EPS, FeedForward, Modulation, TwoLayers, normed, waves

# Keys of the published config.json that are not fields of `MMDiTConfig`.
HARMLESS = EMA | {"sample_size": "decides the position table, which is in the file"}

WAVES = 256                                         # sines and cosines that a timestep becomes


@dataclass(frozen=True, kw_only=True)
class MMDiTConfig(Config):
    """`transformer/config.json`. Defaults are those of the published class, for files that are older than the option."""

    FILE: ClassVar = "the transformer's config.json"
    NETWORK: ClassVar = "the transformer"
    HARMLESS: ClassVar = HARMLESS
    RANGE: ClassVar = {"num_layers": LAYERS, "dual_attention_layers": (0, LAYERS[1])}

    num_layers: int
    num_attention_heads: int
    attention_head_dim: int                         # channels per head; their product is the width of both streams
    joint_attention_dim: int                        # channels of the text context
    pooled_projection_dim: int                      # channels of the pooled text
    pos_embed_max_size: int                         # side of the position table, in patches
    caption_projection_dim: int
    in_channels: int = 16
    out_channels: int = 16
    patch_size: int = 2                             # latent pixels per token and side
    dual_attention_layers: tuple[int, ...] = ()     # blocks with a second attention, of the image tokens alone
    qk_norm: str | None = None                      # None, or "rms_norm" over each head's queries and keys

    def __post_init__(self):
        super().__post_init__()
        if any(block >= self.num_layers for block in self.dual_attention_layers):
            raise self.refusal(f"sets dual_attention_layers to {shown(list(self.dual_attention_layers))}, not to numbers of "
                               f"its {self.num_layers} blocks")
        if self.qk_norm not in (None, "rms_norm"):
            raise self.refusal(f"sets qk_norm to {shown(self.qk_norm)}; only None and 'rms_norm' are implemented")
        if self.caption_projection_dim != self.width:
            raise self.refusal(f"sets caption_projection_dim to {self.caption_projection_dim}, and "
                               f"{self.num_attention_heads} heads of {self.attention_head_dim} are {self.width} channels")

    @property
    def width(self) -> int:
        """Channels of both streams."""
        return self.num_attention_heads * self.attention_head_dim

    @classmethod
    def translated(cls, given):
        """`out_channels` null is the number of input channels."""
        same = {"out_channels": given.get("in_channels", cls.in_channels)}
        return given | same if given.get("out_channels", 0) is None else given


def tap_names(config: MMDiTConfig) -> tuple[str, ...]:
    """Every name that `walk` yields, in execution order: per block the image tokens under the block's module path and
    the text tokens under the same with ".context" (the last block has none), then "out".

    All image taps share the shape (B, tokens, width), and all text taps the shape (B, L, width).
    """
    names = []
    for i in range(config.num_layers):
        names += [f"transformer_blocks.{i}", f"transformer_blocks.{i}.context"]
    return (*names[:-1], "out")


def default_taps(config: MMDiTConfig) -> tuple[str, ...]:
    """The image tokens after blocks n/2 to n-2: 12 to 22 of the published 24. The last block is left out: it is close
    to the output."""
    first = config.num_layers // 2
    return tuple(f"transformer_blocks.{i}" for i in range(first, max(config.num_layers - 1, first + 1)))


class PatchEmbedding(nn.Module):
    """Patches as tokens, each with its position embedding, from the centre of a square table."""

    def __init__(self, config: MMDiTConfig):
        super().__init__()
        self.side = config.pos_embed_max_size
        self.proj = nn.Conv2d(config.in_channels, config.width, config.patch_size, stride=config.patch_size)
        # A fixed table, which files store with the weights.
        self.register_buffer("pos_embed", torch.empty(1, self.side**2, config.width))

    def forward(self, latent):                                              # (B, C, h, w) -> (B, tokens, width)
        x = self.proj(latent)
        height, width = x.shape[-2:]
        top, left = (self.side - height) // 2, (self.side - width) // 2
        table = self.pos_embed.unflatten(1, (self.side, self.side))
        table = table[:, top:top + height, left:left + width].flatten(1, 2)
        # Contiguous, or every residual sum after this would keep the convolution's strides.
        return x.flatten(2).transpose(1, 2).contiguous() + table.to(x.dtype)


class TimeTextEmbedding(nn.Module):
    """Timestep and pooled text as one vector per picture, which modulates every block."""

    def __init__(self, config: MMDiTConfig):
        super().__init__()
        self.timestep_embedder = TwoLayers(WAVES, config.width)
        self.text_embedder = TwoLayers(config.pooled_projection_dim, config.width)

    def forward(self, timestep, pooled):                                    # a number or (T,); (B or 1, P) -> (B, width)
        timestep = waves(torch.as_tensor(timestep, device=pooled.device), WAVES).to(pooled.dtype)
        return self.timestep_embedder(timestep) + self.text_embedder(pooled)


class Attention(nn.Module):
    """Attention of the image tokens to one another or, if `joint`, of both streams to both, each with its own weights."""

    def __init__(self, config: MMDiTConfig, *, joint: bool, answers_text: bool = False):
        super().__init__()
        width = config.width
        self.heads = config.num_attention_heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])              # a list, because files say to_out.0
        if joint:
            self.add_q_proj, self.add_k_proj, self.add_v_proj = (nn.Linear(width, width) for _ in range(3))
        self.to_add_out = nn.Linear(width, width) if answers_text else None

        def norm(wanted):
            return nn.RMSNorm(config.attention_head_dim, eps=NORM_EPS) if wanted and config.qk_norm else None

        self.norm_q, self.norm_k = norm(True), norm(True)
        self.norm_added_q, self.norm_added_k = norm(joint), norm(joint)

    def split(self, tokens, norm=None):                                     # (B, L, C) -> (B, heads, L, head_dim)
        tokens = tokens.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return norm(tokens) if norm else tokens

    def forward(self, x, context=None, *, want_probs=False):                # (B, N, C), (B, L, C)
        """(x (B,N,C), context (B,L,C) or None, probs (B,heads,N,L) or None): the attended values of both streams.

        probs, with `want_probs`: the attention of each image token to each text token, of a softmax over all N + L.
        """
        q, k, v = (self.split(to(x), norm) for to, norm in
                   ((self.to_q, self.norm_q), (self.to_k, self.norm_k), (self.to_v, None)))
        if context is not None:
            text = (self.split(to(context), norm) for to, norm in
                    ((self.add_q_proj, self.norm_added_q), (self.add_k_proj, self.norm_added_k), (self.add_v_proj, None)))
            q, k, v = (torch.cat(pair, dim=2) for pair in zip((q, k, v), text, strict=True))
        probs, count = None, x.shape[1]
        if want_probs:                              # fused attention does not give them
            probs = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(dim=-1)
            seen, probs = probs @ v, probs[:, :, :count, count:]
        else:
            seen = F.scaled_dot_product_attention(q, k, v)
        seen = seen.transpose(1, 2).flatten(2)
        answer = self.to_add_out(seen[:, count:]) if self.to_add_out is not None else None
        return self.to_out[0](seen[:, :count]), answer, probs


class JointBlock(nn.Module):
    """Attention over both streams, then a feed-forward for each; every part is shifted, scaled and gated by `temb`.

    The last block (`final`) reads the text tokens and returns none, because nothing after it needs them.
    """

    def __init__(self, config: MMDiTConfig, *, dual: bool, final: bool):
        super().__init__()
        width = config.width
        self.norm1 = Modulation(width, 9 if dual else 6)
        self.norm1_context = Modulation(width, 2 if final else 6)
        self.attn = Attention(config, joint=True, answers_text=not final)
        self.attn2 = Attention(config, joint=False) if dual else None
        self.ff = FeedForward(width)
        self.ff_context = None if final else FeedForward(width)

    def prepare(self, temb):                                                # (B, C)
        """The modulation of both streams. It takes a third of the block's weights and does not depend on the tokens."""
        return self.norm1(temb), self.norm1_context(temb)

    def forward(self, x, context, modulation, want_probs=False):            # (B, N, C), (B, L, C), as `prepare` makes it
        """(x, context, probs) after the block; context is None in the last block, probs None unless `want_probs`."""
        image, text = modulation
        shift, scale, gate, ff_shift, ff_scale, ff_gate, *second = image
        if self.ff_context is None:
            text_scale, text_shift = text                                   # here the files have the scale first
        else:
            text_shift, text_scale, text_gate, text_ff_shift, text_ff_scale, text_ff_gate = text

        seen, text_seen, probs = self.attn(normed(x, shift, scale), normed(context, text_shift, text_scale),
                                           want_probs=want_probs)
        y = x + gate * seen
        if self.attn2 is not None:
            shift2, scale2, gate2 = second
            y = y + gate2 * self.attn2(normed(x, shift2, scale2))[0]
        x = y + ff_gate * self.ff(normed(y, ff_shift, ff_scale))

        if self.ff_context is None:
            return x, None, probs
        context = context + text_gate * text_seen
        context = context + text_ff_gate * self.ff_context(normed(context, text_ff_shift, text_ff_scale))
        return x, context, probs


class MMDiT(nn.Module):
    """The published SD3Transformer2DModel. `checkpointing`: recompute blocks in the backward pass, which saves memory."""

    Config = MMDiTConfig
    checkpointing = False

    def __init__(self, config: MMDiTConfig):
        super().__init__()
        self.config = config
        self.pos_embed = PatchEmbedding(config)
        self.time_text_embed = TimeTextEmbedding(config)
        self.context_embedder = nn.Linear(config.joint_attention_dim, config.width)
        self.transformer_blocks = nn.ModuleList(
            JointBlock(config, dual=i in config.dual_attention_layers, final=i == config.num_layers - 1)
            for i in range(config.num_layers))
        self.norm_out = Modulation(config.width, 2)
        self.proj_out = nn.Linear(config.width, config.patch_size**2 * config.out_channels)

    @property
    def tap_names(self) -> tuple[str, ...]:
        return tap_names(self.config)

    @property
    def probs_names(self) -> tuple[str, ...]:
        """Names of the attention maps of the text. `walk` yields only those that `wanted` names: they cost memory and time."""
        return tuple(f"transformer_blocks.{i}.attn.probs" for i in range(self.config.num_layers))

    def prepare_timestep(self, timestep, pooled: torch.Tensor) -> Prepared:
        """Compute once how timesteps and pooled text modulate every block. Pass the result as `timestep` to many calls,
        without `pooled`."""
        return Prepared.for_many(self, self.time_text_embed(timestep, pooled))

    def prepare_context(self, context: torch.Tensor) -> Prepared:
        """Embed a text once. Pass the result as `context` to many calls."""
        return Prepared.for_many(self, self.context_embedder(context))

    def walk(self, noisy_latent: torch.Tensor, timestep, context: torch.Tensor | Prepared,
             pooled: torch.Tensor | None = None, *, wanted: Iterable[str] = ()) -> Iterator[tuple[str, torch.Tensor]]:
        """Run the network, yielding (name, activation) in execution order; the last item is ("out", velocity).

        noisy_latent: (B, in_channels, h, w), h and w multiples of the patch size, with the image latents' channels
        appended where the checkpoint has them. timestep: 0 to 1000 (sigma times 1000), a number or a tensor with one or
        B of them. context: (B, L, joint_attention_dim), or (1, L, ...) for one text; pooled likewise, (B or 1, P). Timestep
        with pooled, and context, may be prepared, by the two methods above.
        wanted: which of `probs_names` to yield too: (B, heads, image tokens, L), the attention of each image token to each
        text token. Activations are live: graph attached, never detached or cast. ValueError for a size that does not fit.
        """
        p, side = self.config.patch_size, self.config.pos_embed_max_size
        h, w = (size // p for size in noisy_latent.shape[-2:])
        if (h * p, w * p) != tuple(noisy_latent.shape[-2:]) or max(h, w) > side:
            raise ValueError(f"a latent of {noisy_latent.shape[-2]} x {noisy_latent.shape[-1]} does not fit: sides are "
                             f"multiples of {p}, up to {side * p}")
        x = self.pos_embed(noisy_latent)                                            # (B, h*w, width)
        temb = timestep if isinstance(timestep, Prepared) else Prepared(self.time_text_embed(timestep, pooled))
        context = context.value if isinstance(context, Prepared) else self.context_embedder(context)
        context = context.expand(len(x), -1, -1)                                    # (B, L, width)

        for i, block in enumerate(self.transformer_blocks):
            want_probs = (name := f"transformer_blocks.{i}.attn.probs") in wanted
            if self.checkpointing and torch.is_grad_enabled():
                x, context, probs = checkpoint(block, x, context, temb[block], want_probs, use_reentrant=False)
            else:
                x, context, probs = block(x, context, temb[block], want_probs)
            if want_probs:
                yield name, probs
            yield f"transformer_blocks.{i}", x
            if context is not None:
                yield f"transformer_blocks.{i}.context", context

        scale, shift = self.norm_out(temb.value)
        x = self.proj_out(normed(x, shift, scale)).unflatten(-1, (p, p, -1)).unflatten(1, (h, w))   # (B, h, w, p, p, out)
        yield "out", x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)        # (B, out, h*p, w*p)

    def forward(self, noisy_latent: torch.Tensor, timestep, context: torch.Tensor | Prepared,
                pooled: torch.Tensor | None = None) -> torch.Tensor:
        """The predicted velocity, noise minus clean latent: (B, out_channels, h, w)."""
        for _, activation in self.walk(noisy_latent, timestep, context, pooled):
            velocity = activation                                                   # the last one
        return velocity

    def features(self, noisy_latent: torch.Tensor, timestep, context: torch.Tensor | Prepared,
                 pooled: torch.Tensor | None = None, *, taps: Iterable[str]) -> dict[str, torch.Tensor]:
        """The tapped activations, {name: tensor}. Stops after the last of them: later blocks do not run."""
        taps, known = set(taps), (*self.tap_names, *self.probs_names)
        if not taps:
            raise ValueError(f"no taps are given; this transformer has {len(known)}, from {known[0]!r} to {known[-1]!r}")
        if unknown := sorted(taps.difference(known)):
            raise ValueError(f"unknown tap {unknown[0]!r}; this transformer has {', '.join(known)}")
        return tapped(self.walk(noisy_latent, timestep, context, pooled, wanted=taps.intersection(self.probs_names)), taps)
