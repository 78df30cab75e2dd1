"""The transformers of FLUX.1 and FLUX.2: predict the velocity of a noisy latent, given a text and a reference picture.

`Flux1` reads the `transformer/` of black-forest-labs/FLUX.1-Kontext-dev, `Flux2` that of FLUX.2-klein-4B and its base. They
are one network that differs by configuration: biases, modulation (of each block, or one for all), feed-forward, guidance
embedding and rotary positions. Parameters carry the names of the published files, so loading is a plain match by name.
Papers: Black Forest Labs 2025, "FLUX.1 Kontext" (arXiv 2506.15742), section 3; Esser et al. 2024 (arXiv 2403.03206) for the
double blocks; Dehghani et al. 2023 (arXiv 2302.05442) for the single ones; Su et al. 2021 (arXiv 2104.09864) for rotation.

`Flux.walk` is the whole forward pass, on one screen; the classes above it are its layers. The sequence is always text, target,
reference. In double blocks text and pictures have their own weights and meet in the attention; single blocks treat all alike.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from .config import EMA, LARGEST, LAYERS, Config, shown
from .lean import Prepared, tapped
from .modulation import NORM_EPS, FeedForward, Modulation, TwoLayers, normed, waves

HALF_LIMIT = 65504.0                                # the largest number of float16; activations are held below it


@dataclass(frozen=True, kw_only=True)
class FluxConfig(Config):
    """`transformer/config.json`, the keys of both; defaults are those of the published classes."""

    FILE: ClassVar = "the transformer's config.json"
    NETWORK: ClassVar = "the transformer"
    HARMLESS: ClassVar = EMA
    IMPLEMENTED: ClassVar = {"patch_size": (1,), "eps": (NORM_EPS,)}
    RANGE: ClassVar = {"num_layers": LAYERS, "num_single_layers": LAYERS, "mlp_ratio": (0.01, 100), "rope_theta": (2, LARGEST)}

    num_layers: int                                 # double blocks
    num_single_layers: int
    num_attention_heads: int
    attention_head_dim: int                         # channels per head; their product is the width of all streams
    joint_attention_dim: int                        # channels of the text context
    in_channels: int                                # of a token, which is 2 x 2 positions of the latent
    out_channels: int
    guidance_embeds: bool                           # the guidance is an input
    axes_dims_rope: tuple[int, ...]                 # channels per head that each coordinate rotates

    def __post_init__(self):
        super().__post_init__()
        axes, total = self.axes_dims_rope, self.attention_head_dim
        if len(axes) != self.AXES or sum(axes) != total or any(channels % 2 for channels in axes):
            raise self.refusal(f"sets axes_dims_rope to {shown(list(self.axes_dims_rope))}, not to {self.AXES} even numbers "
                               f"with the sum attention_head_dim, {self.attention_head_dim}")

    @property
    def width(self) -> int:
        """Channels of all streams."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def inner(self) -> int:
        """Channels inside a feed-forward."""
        return int(self.width * self.mlp_ratio)

    @classmethod
    def translated(cls, given):
        """`out_channels` null or absent is the number of input channels."""
        if given.get("out_channels") is None:
            return given | {"out_channels": given.get("in_channels", cls.in_channels)}
        return given


@dataclass(frozen=True, kw_only=True)
class Flux1Config(FluxConfig):
    """Of FLUX.1 [dev] and Kontext: a pooled text, a modulation in each block, coordinates (picture, row, column)."""

    AXES: ClassVar = 3
    REFERENCE: ClassVar = 1                         # the reference's first coordinate; the target's is 0
    TEXT_COUNTS: ClassVar = False                   # all text tokens stand at the origin
    BIAS: ClassVar = True
    SHARED: ClassVar = False
    EMBEDDING: ClassVar = "time_text_embed"         # its name in files
    timestep_guidance_channels: ClassVar = 256
    mlp_ratio: ClassVar = 4.0
    rope_theta: ClassVar = 10_000

    num_layers: int = 19
    num_single_layers: int = 38
    num_attention_heads: int = 24
    attention_head_dim: int = 128
    joint_attention_dim: int = 4096
    in_channels: int = 64
    out_channels: int = 64
    guidance_embeds: bool = False
    axes_dims_rope: tuple[int, ...] = (16, 56, 56)
    pooled_projection_dim: int = 768


@dataclass(frozen=True, kw_only=True)
class Flux2Config(FluxConfig):
    """Of FLUX.2: one modulation for all blocks of a kind, gated feed-forwards, no bias, coordinates (picture, row, column,
    position in the text)."""

    AXES: ClassVar = 4
    REFERENCE: ClassVar = 10
    TEXT_COUNTS: ClassVar = True
    BIAS: ClassVar = False
    SHARED: ClassVar = True
    EMBEDDING: ClassVar = "time_guidance_embed"
    pooled_projection_dim: ClassVar = 0

    num_layers: int = 8
    num_single_layers: int = 48
    num_attention_heads: int = 48
    attention_head_dim: int = 128
    joint_attention_dim: int = 15360
    in_channels: int = 128
    out_channels: int = 128
    guidance_embeds: bool = True
    axes_dims_rope: tuple[int, ...] = (32, 32, 32, 32)
    timestep_guidance_channels: int = 256
    mlp_ratio: float = 3.0
    rope_theta: int = 2000


def _blocks(config: FluxConfig) -> tuple[str, ...]:
    """The module paths of all blocks, in execution order."""
    return (*(f"transformer_blocks.{i}" for i in range(config.num_layers)),
            *(f"single_transformer_blocks.{i}" for i in range(config.num_single_layers)))


def tap_names(config: FluxConfig) -> tuple[str, ...]:
    """Every name that `walk` yields for an edit, in execution order: per block the target's tokens (B, N, width) under the
    block's module path, the reference's under the same with ".reference", the text's with ".context"; then "out"."""
    return (*(f"{block}{stream}" for block in _blocks(config) for stream in ("", ".reference", ".context")), "out")


def default_taps(config: FluxConfig) -> tuple[str, ...]:
    """The target's tokens after every third single block from n/4 to 4n/5: 9, 12 ... 30 of Kontext's 38. Neighbours add to
    the same stream, and all of them would take three times the memory."""
    count = config.num_single_layers
    return tuple(f"single_transformer_blocks.{i}" for i in range(count // 4, count * 4 // 5 + 1, 3) if i < count)


class Places(NamedTuple):
    """Places of the tokens. cos, sin: of their rotation, (N, head_dim / 2), float32; text, target: numbers of tokens."""

    cos: torch.Tensor
    sin: torch.Tensor
    text: int
    target: int


def coordinates(config: FluxConfig, text: int, grids, device) -> torch.Tensor:
    """Coordinates (N, axes) of the tokens. text: their number; grids: (rows, columns) of the target and of the reference."""
    counted = torch.arange(text, device=device)[:, None]
    parts = [torch.cat([counted.new_zeros(text, config.AXES - 1), counted if config.TEXT_COUNTS else 0 * counted], 1)]
    for first, grid in zip((0, config.REFERENCE), grids, strict=False):     # there may be no reference
        rest = [torch.arange(side, device=device) for side in (*grid, *[1] * (config.AXES - 3))]
        parts.append(torch.cartesian_prod(torch.full((1,), first, device=device), *rest))
    return torch.cat(parts)


def rotation(config: FluxConfig, coordinates: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines (N, head_dim / 2), float32, of angles that are computed in float64."""
    angles = []
    for channels, places in zip(config.axes_dims_rope, coordinates.double().T, strict=True):
        powers = torch.arange(0, channels, 2, dtype=torch.float64, device=places.device) / channels
        angles.append(places[:, None] / config.rope_theta**powers)
    angles = torch.cat(angles, 1)
    return angles.cos().float(), angles.sin().float()


def rotated(x, places: Places):
    """Rotate neighbouring pairs of channels of x (B, heads, N, d) by their token's angles, in float32 or wider."""
    first, second = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = places.cos, places.sin
    return torch.stack([first * cos - second * sin, second * cos + first * sin], -1).flatten(-2).to(x.dtype)


def attend(q, k, v, places: Places, want_probs: bool, want_mass: bool):
    """(values (B, N, width), probs, mass) of attention of all tokens to all; q, k, v: (B, heads, N, d), q and k normed.

    probs (B, heads, target, text), or None: the attention of each target token to each text token. mass (B,), or None: the
    share of the target's attention that goes to the reference, averaged over heads and target tokens. Fused attention keeps
    no map, so the share is read off a second fused call, whose values are 1 at the reference's tokens and 0 at all others.
    """
    q, k = rotated(q, places), rotated(k, places)
    seen = F.scaled_dot_product_attention(q, k, v)
    probs = mass = None
    pictures = places.text + places.target
    if want_probs or want_mass:
        q = q[:, :, places.text:pictures]
    if want_probs:
        probs = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(dim=-1)[..., :places.text]
    if want_mass:
        is_reference = (torch.arange(k.shape[2], device=k.device) >= pictures).to(v.dtype)
        ones = is_reference[:, None].expand(v.shape).contiguous()           # fused kernels take no other layout
        share = F.scaled_dot_product_attention(q, k, ones)[..., 0]
        mass = share.to(torch.promote_types(share.dtype, torch.float32)).mean((1, 2))
    return seen.transpose(1, 2).flatten(2), probs, mass


def by_head(tokens, config: FluxConfig):
    """(B, N, width) -> (B, heads, N, head_dim)."""
    return tokens.unflatten(-1, (config.num_attention_heads, -1)).transpose(1, 2)


def bounded(x):
    """x; in float16, held within its finite numbers."""
    return x.clamp(-HALF_LIMIT, HALF_LIMIT) if x.dtype == torch.float16 else x


def gated_silu(x):
    """SwiGLU (Shazeer 2020): SiLU of the first half of the channels times the second half."""
    gate, x = x.chunk(2, dim=-1)
    return F.silu(gate) * x


class GatedFeedForward(nn.Module):
    """Two layers with SwiGLU between them."""

    def __init__(self, config: FluxConfig):
        super().__init__()
        self.linear_in = nn.Linear(config.width, 2 * config.inner, bias=config.BIAS)
        self.linear_out = nn.Linear(config.inner, config.width, bias=config.BIAS)

    def forward(self, x):
        return self.linear_out(gated_silu(self.linear_in(x)))


class JointAttention(nn.Module):
    """Attention of text and pictures to both, each with its own weights."""

    def __init__(self, config: FluxConfig):
        super().__init__()
        self.config = config

        def linears(count):
            return [nn.Linear(config.width, config.width, bias=config.BIAS) for _ in range(count)]

        self.to_q, self.to_k, self.to_v, self.add_q_proj, self.add_k_proj, self.add_v_proj, self.to_add_out = linears(7)
        self.to_out = nn.ModuleList(linears(1))                             # a list, because files say to_out.0
        self.norm_q, self.norm_k, self.norm_added_q, self.norm_added_k = (
            nn.RMSNorm(config.attention_head_dim, eps=NORM_EPS) for _ in range(4))

    def forward(self, x, context, places, want_probs, want_mass):           # (B, N, C), (B, L, C)
        def heads(to, tokens, norm=None):
            tokens = by_head(to(tokens), self.config)
            return norm(tokens) if norm else tokens

        text = (heads(self.add_q_proj, context, self.norm_added_q), heads(self.add_k_proj, context, self.norm_added_k),
                heads(self.add_v_proj, context))
        pictures = heads(self.to_q, x, self.norm_q), heads(self.to_k, x, self.norm_k), heads(self.to_v, x)
        q, k, v = (torch.cat(pair, dim=2) for pair in zip(text, pictures, strict=True))
        seen, probs, mass = attend(q, k, v, places, want_probs, want_mass)
        return self.to_out[0](seen[:, places.text:]), self.to_add_out(seen[:, :places.text]), probs, mass


class DoubleBlock(nn.Module):
    """Attention over both streams, then a feed-forward for each; every part is shifted, scaled and gated."""

    def __init__(self, config: FluxConfig):
        super().__init__()
        if not config.SHARED:
            self.norm1, self.norm1_context = Modulation(config.width, 6), Modulation(config.width, 6)
        self.attn = JointAttention(config)
        self.ff, self.ff_context = (GatedFeedForward(config) if config.SHARED else FeedForward(config.width) for _ in range(2))

    def prepare(self, temb):                                                # (B, C)
        """The modulation of both streams, where it is the block's own."""
        return self.norm1(temb), self.norm1_context(temb)

    def forward(self, x, context, modulation, places, want_probs=False, want_mass=False):
        """(x (B, N, C), context (B, L, C), probs, mass) after the block; the last two as `attend` returns them."""
        (shift, scale, gate, ff_shift, ff_scale, ff_gate), text = modulation
        text_shift, text_scale, text_gate, text_ff_shift, text_ff_scale, text_ff_gate = text
        seen, text_seen, probs, mass = self.attn(normed(x, shift, scale), normed(context, text_shift, text_scale), places,
                                                 want_probs, want_mass)
        x = x + gate * seen
        x = x + ff_gate * self.ff(normed(x, ff_shift, ff_scale))
        context = context + text_gate * text_seen
        context = context + text_ff_gate * self.ff_context(normed(context, text_ff_shift, text_ff_scale))
        return x, bounded(context), probs, mass


class SingleAttention(nn.Module):
    """The weights of a single block's attention; in FLUX.2 they are fused with those of its feed-forward."""

    def __init__(self, config: FluxConfig):
        super().__init__()
        width, inner = config.width, config.inner
        self.norm_q, self.norm_k = (nn.RMSNorm(config.attention_head_dim, eps=NORM_EPS) for _ in range(2))
        if config.SHARED:
            self.to_qkv_mlp_proj = nn.Linear(width, 3 * width + 2 * inner, bias=config.BIAS)
            self.to_out = nn.Linear(width + inner, width, bias=config.BIAS)
        else:
            self.to_q, self.to_k, self.to_v = (nn.Linear(width, width, bias=config.BIAS) for _ in range(3))


class SingleBlock(nn.Module):
    """Attention and feed-forward side by side on the tokens of text and pictures: one norm, one output layer, one gate."""

    def __init__(self, config: FluxConfig):
        super().__init__()
        self.config, width = config, config.width
        self.attn = SingleAttention(config)
        if not config.SHARED:
            self.norm = Modulation(width, 3)
            self.proj_mlp = nn.Linear(width, config.inner)
            self.proj_out = nn.Linear(width + config.inner, width)

    def prepare(self, temb):
        """The modulation, where it is the block's own."""
        return self.norm(temb)

    def forward(self, tokens, modulation, places, want_probs=False, want_mass=False):
        """(tokens (B, L + N, C), probs, mass) after the block; the last two as `attend` returns them."""
        shift, scale, gate = modulation
        x, attn, width = normed(tokens, shift, scale), self.attn, self.config.width
        if self.config.SHARED:
            q, k, v, inner = attn.to_qkv_mlp_proj(x).split([width, width, width, 2 * self.config.inner], dim=-1)
            inner, out = gated_silu(inner), attn.to_out
        else:
            q, k, v = attn.to_q(x), attn.to_k(x), attn.to_v(x)
            inner, out = F.gelu(self.proj_mlp(x), approximate="tanh"), self.proj_out
        q, k, v = (by_head(part, self.config) for part in (q, k, v))
        seen, probs, mass = attend(attn.norm_q(q), attn.norm_k(k), v, places, want_probs, want_mass)
        return bounded(tokens + gate * out(torch.cat([seen, inner], dim=-1))), probs, mass


class VectorEmbedding(nn.Module):
    """Timestep, guidance and pooled text, as far as the network takes them, as one vector per picture."""

    def __init__(self, config: FluxConfig):
        super().__init__()
        self.waves, bias = config.timestep_guidance_channels, config.BIAS
        self.timestep_embedder = TwoLayers(self.waves, config.width, bias=bias)
        self.guidance_embedder = TwoLayers(self.waves, config.width, bias=bias) if config.guidance_embeds else None
        self.text_embedder = TwoLayers(config.pooled_projection_dim, config.width) if config.pooled_projection_dim else None

    def forward(self, timestep, guidance, pooled, dtype):                   # (T,), (T,) or None, (B or 1, P) or None
        # The published code rounds both to the weights' dtype before it multiplies them by 1000.
        vector = self.timestep_embedder(waves((timestep.to(dtype) / 1000).to(dtype) * 1000, self.waves).to(dtype))
        if self.guidance_embedder is not None:
            vector = vector + self.guidance_embedder(waves(guidance.to(dtype) * 1000, self.waves).to(dtype))
        return vector if self.text_embedder is None else vector + self.text_embedder(pooled)


class Flux(nn.Module):
    """Both transformers. `checkpointing`: recompute blocks in the backward pass, which saves memory. `streaming`: hold the
    weights of one block at a time, where the network is read in parts (first_use.py)."""

    STREAMED = "transformer_blocks", "single_transformer_blocks"
    checkpointing = streaming = False

    def __init__(self, config: FluxConfig):
        super().__init__()
        self.config, width = config, config.width
        self.add_module(config.EMBEDDING, VectorEmbedding(config))
        if config.SHARED:
            self.double_stream_modulation_img = Modulation(width, 6, bias=config.BIAS)
            self.double_stream_modulation_txt = Modulation(width, 6, bias=config.BIAS)
            self.single_stream_modulation = Modulation(width, 3, bias=config.BIAS)
        self.x_embedder = nn.Linear(config.in_channels, width, bias=config.BIAS)
        self.context_embedder = nn.Linear(config.joint_attention_dim, width, bias=config.BIAS)
        self.transformer_blocks = nn.ModuleList(DoubleBlock(config) for _ in range(config.num_layers))
        self.single_transformer_blocks = nn.ModuleList(SingleBlock(config) for _ in range(config.num_single_layers))
        self.norm_out = Modulation(width, 2, bias=config.BIAS)
        self.proj_out = nn.Linear(width, config.out_channels, bias=config.BIAS)

    @property
    def tap_names(self) -> tuple[str, ...]:
        return tap_names(self.config)

    @property
    def probs_names(self) -> tuple[str, ...]:
        """Names of the attention maps of the text. `walk` yields only those that `wanted` names: they cost memory and time."""
        return tuple(f"{block}.attn.probs" for block in _blocks(self.config))

    @property
    def mass_names(self) -> tuple[str, ...]:
        """Names of the shares of attention that go to the reference. `walk` yields only those that `wanted` names."""
        return tuple(f"{block}.attn.mass" for block in _blocks(self.config))

    def vector(self, timestep, pooled=None, guidance=None):
        """The vector (B, width) of timestep, guidance and pooled text that modulates every block."""
        if self.config.guidance_embeds and guidance is None or self.config.pooled_projection_dim and pooled is None:
            lacking = "guidance" if self.config.guidance_embeds and guidance is None else "pooled text"
            raise ValueError(f"this transformer takes a {lacking}, and none is given")
        dtype = self.x_embedder.weight.dtype
        device = timestep.device if pooled is None and isinstance(timestep, torch.Tensor) else getattr(pooled, "device", None)
        timestep = torch.as_tensor(timestep, device=device).reshape(-1)
        guidance = None if guidance is None else torch.as_tensor(guidance, device=timestep.device).reshape(-1)
        return getattr(self, self.config.EMBEDDING)(timestep, guidance, pooled, dtype)

    def prepare_timestep(self, timestep, pooled=None, guidance=None) -> Prepared:
        """Compute once how timesteps, pooled text and guidance modulate every block. Pass the result as `timestep` to many
        calls, without the other two."""
        return Prepared.for_many(self, self.vector(timestep, pooled, guidance))

    def prepare_context(self, context: torch.Tensor) -> Prepared:
        """Embed a text once. Pass the result as `context` to many calls."""
        return Prepared.for_many(self, self.context_embedder(context))

    def walk(self, noisy_latent: torch.Tensor, reference: torch.Tensor | None, timestep, context: torch.Tensor | Prepared,
             pooled: torch.Tensor | None = None, guidance=None, *, wanted: Iterable[str] = ()
             ) -> Iterator[tuple[str, torch.Tensor]]:
        """Run the network, yielding (name, activation) in execution order; the last item is ("out", velocity).

        noisy_latent: (B, in_channels, rows, columns), a token for each position: a latent in which 2 x 2 positions became
        channels. reference: a picture's clean latent, likewise, (B or 1, in_channels, its rows, its columns); None: no
        picture, and no tokens of one. timestep: 0 to 1000 (sigma times 1000), a number or a tensor with one or B of them;
        guidance likewise. context: (B, L, joint_attention_dim), or (1, L, ...) for one text; pooled likewise, (B or 1, P).
        Timestep with pooled and guidance, and context, may be prepared, by the two methods above.
        wanted: which of `probs_names` and `mass_names` to yield too, see `attend`. Activations are live: graph attached,
        never detached or cast.
        """
        pictures = [noisy_latent] if reference is None else [noisy_latent, reference.expand(len(noisy_latent), -1, -1, -1)]
        x = torch.cat([picture.flatten(2) for picture in pictures], 2).transpose(1, 2)
        x = self.x_embedder(x)                                                      # (B, N, width)
        if not isinstance(timestep, Prepared):
            timestep = Prepared(self.vector(torch.as_tensor(timestep, device=x.device), pooled, guidance))
        context = context.value if isinstance(context, Prepared) else self.context_embedder(context)
        context = context.expand(len(x), -1, -1)                                    # (B, L, width)
        text, grids = context.shape[1], [picture.shape[-2:] for picture in pictures]
        target = grids[0].numel()
        places = Places(*rotation(self.config, coordinates(self.config, text, grids, x.device)), text, target)
        wanted, shared = frozenset(wanted), self.config.SHARED

        def run(block, name, *inputs):
            extras = f"{name}.attn.probs" in wanted, f"{name}.attn.mass" in wanted
            if self.checkpointing and torch.is_grad_enabled():
                return checkpoint(block, *inputs, places, *extras, use_reentrant=False)
            return block(*inputs, places, *extras)

        def found(name, seen, aside, text_seen, probs, mass):
            yield from ((f"{name}.attn.{kind}", extra) for kind, extra in (("probs", probs), ("mass", mass))
                        if extra is not None)
            yield name, seen
            if aside.shape[1]:
                yield f"{name}.reference", aside
            yield f"{name}.context", text_seen

        for i, block in enumerate(self.transformer_blocks):
            name = f"transformer_blocks.{i}"
            vectors = ((timestep[self.double_stream_modulation_img], timestep[self.double_stream_modulation_txt]) if shared
                       else timestep[block])
            x, context, *extras = run(block, name, x, context, vectors)
            yield from found(name, x[:, :target], x[:, target:], context, *extras)

        tokens, end = torch.cat([context, x], 1), text + target                     # (B, L + N, width)
        for i, block in enumerate(self.single_transformer_blocks):
            name = f"single_transformer_blocks.{i}"
            vectors = timestep[self.single_stream_modulation if shared else block]
            tokens, *extras = run(block, name, tokens, vectors)
            yield from found(name, tokens[:, text:end], tokens[:, end:], tokens[:, :text], *extras)

        scale, shift = self.norm_out(timestep.value)                                # files have the scale first
        x = self.proj_out(normed(tokens[:, text:end], shift, scale))
        yield "out", x.transpose(1, 2).unflatten(2, grids[0])                          # (B, out_channels, rows, columns)

    def forward(self, noisy_latent: torch.Tensor, reference: torch.Tensor | None, timestep, context: torch.Tensor | Prepared,
                pooled: torch.Tensor | None = None, guidance=None) -> torch.Tensor:
        """The predicted velocity, noise minus clean latent, at the target: (B, out_channels, rows, columns)."""
        for _, activation in self.walk(noisy_latent, reference, timestep, context, pooled, guidance):
            velocity = activation                                                   # the last one
        return velocity

    def features(self, noisy_latent: torch.Tensor, reference: torch.Tensor | None, timestep, context: torch.Tensor | Prepared,
                 pooled: torch.Tensor | None = None, guidance=None, *, taps: Iterable[str]) -> dict[str, torch.Tensor]:
        """The tapped activations, {name: tensor}. Stops after the last of them: later blocks do not run."""
        taps, known = set(taps), (*self.tap_names, *self.probs_names, *self.mass_names)
        if not taps:
            raise ValueError(f"no taps are given; this transformer has {len(known)}, from {known[0]!r} to {known[-1]!r}")
        if unknown := sorted(taps.difference(known)):
            raise ValueError(f"unknown tap {unknown[0]!r}; this transformer has {', '.join(known)}")
        if reference is None and (absent := sorted(tap for tap in taps if tap.endswith((".reference", ".mass")))):
            raise ValueError(f"the tap {absent[0]!r} is of a reference picture, and none is given")
        wanted = taps.difference(self.tap_names)
        return tapped(self.walk(noisy_latent, reference, timestep, context, pooled, guidance, wanted=wanted), taps)


class Flux1(Flux):
    """The published FluxTransformer2DModel."""

    Config = Flux1Config


class Flux2(Flux):
    """The published Flux2Transformer2DModel."""

    Config = Flux2Config
