"""The SD 1.x / InstructPix2Pix U-Net: predicts the noise in a noisy latent, given a timestep and a text.

Reads the `unet/` of timbrooks/instruct-pix2pix and MudeHui/HQ-Edit (8 input channels: noisy latent and image latent)
and of every SD 1.x (4), and of the shipped miniature. Parameters carry the names of the published files, so loading is
a plain match by name. Papers: Rombach et al. 2022, section 3.3; Brooks et al. 2023, section 3.2.

`UNet.walk` is the whole forward pass, on one screen; the classes above it are its layers.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from .config import EMA, LAYERS, Config, shown
from .lean import Conv2d, GroupNorm, NormSiLU, Prepared, gated_gelu, tapped

# Keys of the published config.json that are not fields of `UNetConfig` and change nothing at inference.
HARMLESS = EMA | {
    "sample_size": "the training resolution; the network takes any",
    "dropout": "training only",
    "addition_embed_type_num_heads": "of an embedding that exists only with addition_embed_type",
}
# Keys that are not fields, and their implemented values, in the spellings that files use.
IMPLEMENTED = {
    "act_fn": ("silu", "swish"),
    "attention_type": ("default",),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "downsample_padding": (1,),
    "mid_block_scale_factor": (1,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "resnet_out_scale_factor": (1,),
    "resnet_time_scale_shift": ("default",),
    "time_embedding_type": ("positional",),
} | dict.fromkeys((
    "center_input_sample", "class_embeddings_concat", "dual_cross_attention", "mid_block_only_cross_attention",
    "only_cross_attention", "resnet_skip_time_act", "upcast_attention",
), (False, None)) | dict.fromkeys((
    "addition_embed_type", "addition_time_embed_dim", "class_embed_type", "cross_attention_norm", "encoder_hid_dim",
    "encoder_hid_dim_type", "num_attention_heads", "num_class_embeds", "projection_class_embeddings_input_dim",
    "reverse_transformer_layers_per_block", "time_cond_proj_dim", "time_embedding_act_fn", "time_embedding_dim",
    "timestep_post_act",
), (None,))
# The implemented block types; True for those with attention.
DOWN_BLOCKS = {"DownBlock2D": False, "CrossAttnDownBlock2D": True}
UP_BLOCKS = {"UpBlock2D": False, "CrossAttnUpBlock2D": True}
PER_BLOCK = ("attention_head_dim", "transformer_layers_per_block")          # one number is for all resolutions

TRANSFORMER_NORM_EPS = 1e-6                         # of the GroupNorm before a transformer, whatever norm_eps says


@dataclass(frozen=True, kw_only=True)
class UNetConfig(Config):
    """`unet/config.json`. Values per resolution are finest first, except `up_block_types`, which are in running order.

    Defaults are those of the published class, for files that are older than the option.
    """

    FILE: ClassVar = "the U-Net's config.json"
    NETWORK: ClassVar = "the U-Net"
    HARMLESS: ClassVar = HARMLESS
    IMPLEMENTED: ClassVar = IMPLEMENTED
    RANGE: ClassVar = {"layers_per_block": LAYERS, "transformer_layers_per_block": LAYERS, "norm_eps": (0, 1)}
    LEVELS: ClassVar = "block_out_channels"

    block_out_channels: tuple[int, ...]             # channels per resolution
    down_block_types: tuple[str, ...]
    up_block_types: tuple[str, ...]
    cross_attention_dim: int                        # channels of the text context
    in_channels: int = 4
    out_channels: int = 4
    layers_per_block: int = 2                       # residual blocks per resolution going down; going up, one more
    # The number of heads, not their width: a misnomer that every published file keeps.
    attention_head_dim: int | tuple[int, ...] = 8
    transformer_layers_per_block: int | tuple[int, ...] = 1
    use_linear_projection: bool = False             # a transformer's proj_in and proj_out are stored as [C, C]
    norm_num_groups: int = 32
    norm_eps: float = 1e-5                          # of the residual blocks and of conv_norm_out
    flip_sin_to_cos: bool = True
    freq_shift: float = 0

    def __post_init__(self):
        super().__post_init__()
        for key in ("block_out_channels", "down_block_types", "up_block_types", *PER_BLOCK):
            value = getattr(self, key)
            if type(value) is int:
                value = (value,) * len(self.block_out_channels)
            if not value or len(value) != len(self.block_out_channels):
                raise self.refusal(f"sets {key} to {shown(value)}, not to one value for each of the "
                                   f"{len(self.block_out_channels)} block_out_channels")
            object.__setattr__(self, key, value)
        for fault in self._faults():
            raise self.refusal(fault)

    def _faults(self):
        """Yield each contradiction between the values, as the end of a sentence about the file."""
        for key, known in (("down_block_types", DOWN_BLOCKS), ("up_block_types", UP_BLOCKS)):
            for kind in getattr(self, key):
                if kind not in tuple(known):
                    yield f"has {kind!r} in {key}; only {' and '.join(known)} are implemented"
        widths = self.block_out_channels
        for level, (width, heads) in enumerate(zip(widths, self.attention_head_dim, strict=True)):
            attends = (level == len(widths) - 1 or DOWN_BLOCKS[self.down_block_types[level]]
                       or UP_BLOCKS[self.up_block_types[-1 - level]])
            if width % self.norm_num_groups:
                yield f"has {width} in block_out_channels, which norm_num_groups {self.norm_num_groups} does not divide"
            if attends and width % heads:
                yield f"has {width} in block_out_channels, which {heads} heads (attention_head_dim) do not divide"
        if widths[0] % 2 or self.freq_shift >= widths[0] // 2:
            yield (f"begins block_out_channels with {widths[0]}, which does not split into sines and cosines of a "
                   f"timestep with freq_shift {self.freq_shift}")


def tap_names(config: UNetConfig) -> tuple[str, ...]:
    """Every name that `walk` yields, in execution order: module paths of the published layout, then "out".

    Taps of one resolution have the same height and width. "mid_block" and "mid_block.resnets.1" are one tensor.
    """
    names, last = ["conv_in"], len(config.block_out_channels) - 1

    def block(path, layers, attends):
        for j in range(layers):
            names.append(f"{path}.resnets.{j}")
            if attends:
                names.append(f"{path}.attentions.{j}")

    for i, kind in enumerate(config.down_block_types):
        block(f"down_blocks.{i}", config.layers_per_block, DOWN_BLOCKS[kind])
        if i < last:
            names.append(f"down_blocks.{i}.downsamplers.0")
    names.extend(f"mid_block{layer}" for layer in (".resnets.0", ".attentions.0", ".resnets.1", ""))
    for i, kind in enumerate(config.up_block_types):
        block(f"up_blocks.{i}", config.layers_per_block + 1, UP_BLOCKS[kind])
        if i < last:
            names.append(f"up_blocks.{i}.upsamplers.0")
    return (*names, "out")


def default_taps(config: UNetConfig) -> tuple[str, ...]:
    """`mid_block` and every attention of the first up block that has any: up_blocks.1.attentions.0-2 in SD 1.x."""
    attends = [i for i, kind in enumerate(config.up_block_types) if UP_BLOCKS[kind]]
    layers = range(config.layers_per_block + 1)
    return "mid_block", *(f"up_blocks.{i}.attentions.{j}" for i in attends[:1] for j in layers)


class TimeEmbedding(nn.Module):
    """Sinusoids of the timestep (T, C), two layers to (T, 4C), then the SiLU that every block needs, applied once."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        channels = config.block_out_channels[0]
        self.linear_1 = nn.Linear(channels, 4 * channels)
        self.linear_2 = nn.Linear(4 * channels, 4 * channels)

    def forward(self, timestep):                                            # a number, or a tensor with T of them
        weight, half = self.linear_1.weight, self.config.block_out_channels[0] // 2
        steps = torch.arange(half, dtype=torch.float32, device=weight.device)
        timestep = torch.as_tensor(timestep, device=weight.device).reshape(-1, 1).float()
        # (T, C / 2), in float32 whatever the weights' dtype. The order of operations is that of the published code: it
        # decides the last digits of a frequency, and timesteps up to 1000 multiply that error.
        angle = timestep * torch.exp(-math.log(10000) * steps / (half - self.config.freq_shift))
        waves = (angle.cos(), angle.sin()) if self.config.flip_sin_to_cos else (angle.sin(), angle.cos())
        x = self.linear_1(torch.cat(waves, dim=1).to(weight.dtype))
        return F.silu(self.linear_2(F.silu(x)))


class ResidualBlock(nn.Module):
    """x + f(x, timestep), with a 1x1 convolution on the x path where the number of channels changes."""

    def __init__(self, in_channels: int, out_channels: int, config: UNetConfig):
        super().__init__()
        groups, eps = config.norm_num_groups, config.norm_eps
        self.norm1 = NormSiLU(groups, in_channels, eps=eps)
        self.conv1 = Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(4 * config.block_out_channels[0], out_channels)
        self.norm2 = NormSiLU(groups, out_channels, eps=eps)
        self.conv2 = Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def prepare(self, temb):                                                # (T, 4C) -> (T, out, 1, 1)
        """The shift that the timestep adds to each channel."""
        return self.time_emb_proj(temb)[:, :, None, None]

    def forward(self, x, shift):                                            # (B, in, h, w) -> (B, out, h, w)
        y = self.conv1(self.norm1(x))
        y = self.conv2(self.norm2(y + shift))
        return y + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Attention(nn.Module):
    """Attention of tokens of `width` channels to one another, or to a text of `context_dim` channels."""

    def __init__(self, width: int, context_dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context_dim, width, bias=False)
        self.to_v = nn.Linear(context_dim, width, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])              # a list, because files say to_out.0

    def split(self, tokens):                                                # (B, L, C) -> (B, heads, L, head_dim)
        return tokens.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def keys_values(self, context):
        """(keys, values) of the context, each (B, heads, L, head_dim)."""
        return self.split(self.to_k(context)), self.split(self.to_v(context))

    def forward(self, x, keys_values, *, want_probs=False):                 # (B, tokens, C), (B or 1, heads, L, head_dim)
        """(attended values (B, tokens, C), probabilities (B, heads, tokens, L), or None unless `want_probs`)."""
        q = self.split(self.to_q(x))
        k, v = (part.expand(len(x), -1, -1, -1) for part in keys_values)
        probs = None
        if want_probs:                              # fused attention does not give them
            probs = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(dim=-1)
            seen = probs @ v
        else:
            # Fused on a CPU too: there it is measured as fast as a plain softmax(q k^T) v or faster, forward and
            # backward, from 16 tokens to 4096, and it never holds the (tokens, L) matrix.
            seen = F.scaled_dot_product_attention(q, k, v)
        return self.to_out[0](seen.transpose(1, 2).flatten(2)), probs


class GEGLU(nn.Module):
    """A linear layer to twice the width; then one half gates the other."""

    def __init__(self, width: int, out: int):
        super().__init__()
        self.proj = nn.Linear(width, 2 * out)

    def forward(self, x):
        return gated_gelu(self.proj(x))


class FeedForward(nn.Module):
    """Two layers, to four times the width and back. The identity replaces the dropout of the published layout."""

    def __init__(self, width: int):
        super().__init__()
        self.net = nn.Sequential(GEGLU(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width))

    def forward(self, x):
        return self.net(x)


class TransformerBlock(nn.Module):
    """Self-attention, attention to the text, feed-forward."""

    def __init__(self, width: int, context_dim: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn1 = Attention(width, width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.attn2 = Attention(width, context_dim, heads)
        self.norm3 = nn.LayerNorm(width)
        self.ff = FeedForward(width)

    def forward(self, x, text, want_probs=False):                           # (B, tokens, C) -> the same, probs or None
        y = self.norm1(x)
        x = x + self.attn1(y, self.attn1.keys_values(y))[0]
        seen, probs = self.attn2(self.norm2(x), text, want_probs=want_probs)
        x = x + seen
        return x + self.ff(self.norm3(x)), probs


def per_token(layer, tokens):
    """Apply a linear layer, or a 1x1 convolution whose weights are stored as [C, C, 1, 1], to tokens (B, L, C). For the
    convolution this saves two changes of memory layout."""
    return F.linear(tokens, layer.weight.flatten(1), layer.bias)


class Transformer(nn.Module):
    """Transformer blocks over all positions of x as tokens, with a residual connection."""

    def __init__(self, width: int, heads: int, layers: int, config: UNetConfig):
        super().__init__()
        self.norm = GroupNorm(config.norm_num_groups, width, eps=TRANSFORMER_NORM_EPS)
        self.proj_in = nn.Linear(width, width) if config.use_linear_projection else Conv2d(width, width, 1)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(width, config.cross_attention_dim, heads) for _ in range(layers))
        self.proj_out = nn.Linear(width, width) if config.use_linear_projection else Conv2d(width, width, 1)

    def prepare(self, context):                                             # (B or 1, L, D)
        """The text's keys and values in each block."""
        return [block.attn2.keys_values(context) for block in self.transformer_blocks]

    def forward(self, x, texts, path, wanted):
        """(x (B, C, h, w) after the blocks, {name: probs (B, heads, h*w, L)} for the names in `wanted`).

        path: of this module, which these names begin with.
        """
        tokens = self.norm(x).flatten(2).transpose(1, 2)                    # (B, C, h, w) -> (B, h*w, C)
        tokens = per_token(self.proj_in, tokens)
        found = {}
        for k, (block, text) in enumerate(zip(self.transformer_blocks, texts, strict=True)):
            want_probs = (name := f"{path}.transformer_blocks.{k}.attn2.probs") in wanted
            tokens, probs = block(tokens, text, want_probs)
            if want_probs:
                found[name] = probs
        tokens = per_token(self.proj_out, tokens)
        return x + tokens.transpose(1, 2).unflatten(2, x.shape[-2:]), found           # (B, h*w, C) -> (B, C, h, w)


class Downsample(nn.Module):
    """A convolution to half the size, rounded up."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x):
        return self.conv(x)


class Upsample(nn.Module):
    """Nearest-neighbour interpolation to `size`, that of the next skip connection, then a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, padding=1)

    def forward(self, x, size):
        return self.conv(F.interpolate(x, size=size, mode="nearest"))


class Block(nn.Module):
    """The layers of one resolution, under their published names; `UNet.walk` runs them one by one."""

    def __init__(self, residual_blocks: Iterable[nn.Module], transformers: Iterable[nn.Module]):
        super().__init__()
        self.resnets = nn.ModuleList(residual_blocks)
        self.attentions = nn.ModuleList(transformers)                       # one for each residual block, or none


class UNet(nn.Module):
    """The published UNet2DConditionModel, as far as SD 1.x and its descendants use it.

    `checkpointing`: recompute residual blocks and transformers in the backward pass, which saves memory.
    """

    Config = UNetConfig
    checkpointing = False

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        widths, layers = config.block_out_channels, config.layers_per_block
        coarsest = len(widths) - 1

        def transformers(level, count):
            heads, depth = config.attention_head_dim[level], config.transformer_layers_per_block[level]
            return (Transformer(widths[level], heads, depth, config) for _ in range(count))

        self.conv_in = Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimeEmbedding(config)

        self.down_blocks = nn.ModuleList()
        for level, kind in enumerate(config.down_block_types):
            ins = [widths[max(level - 1, 0)]] + [widths[level]] * (layers - 1)
            block = Block((ResidualBlock(n, widths[level], config) for n in ins),
                          transformers(level, layers if DOWN_BLOCKS[kind] else 0))
            block.downsamplers = nn.ModuleList([Downsample(widths[level])] if level < coarsest else [])
            self.down_blocks.append(block)

        self.mid_block = Block((ResidualBlock(widths[-1], widths[-1], config) for _ in range(2)),
                               transformers(coarsest, 1))

        self.up_blocks = nn.ModuleList()
        for i, kind in enumerate(config.up_block_types):
            level = coarsest - i
            # Channels of each residual block's input, first from the level below; of its skip, last from the level above.
            ins = [widths[min(level + 1, coarsest)]] + [widths[level]] * layers
            skips = [widths[level]] * layers + [widths[max(level - 1, 0)]]
            block = Block((ResidualBlock(n + skip, widths[level], config) for n, skip in zip(ins, skips, strict=True)),
                          transformers(level, layers + 1 if UP_BLOCKS[kind] else 0))
            block.upsamplers = nn.ModuleList([Upsample(widths[level])] if level > 0 else [])
            self.up_blocks.append(block)

        self.conv_norm_out = NormSiLU(config.norm_num_groups, widths[0], eps=config.norm_eps)
        self.conv_out = Conv2d(widths[0], config.out_channels, 3, padding=1)

    @property
    def tap_names(self) -> tuple[str, ...]:
        return tap_names(self.config)

    @property
    def probs_names(self) -> tuple[str, ...]:
        """Names of the attention maps of the text, in execution order. `walk` yields only those that `wanted` names: fused
        attention does not compute them, so each costs memory and time."""
        return tuple(f"{path}.probs" for path, _ in self.named_modules() if path.endswith(".attn2"))

    def prepare_timestep(self, timestep) -> Prepared:
        """Compute once what the timesteps add to every residual block. Pass the result as `timestep` to many calls."""
        return Prepared.for_many(self, self.time_embedding(timestep))

    def prepare_context(self, context: torch.Tensor) -> Prepared:
        """Compute the keys and values of a text once. Pass the result as `context` to many calls."""
        return Prepared.for_many(self, context)

    def walk(self, noisy_latent: torch.Tensor, timestep, context: torch.Tensor | Prepared, *,
             wanted: Iterable[str] = ()) -> Iterator[tuple[str, torch.Tensor]]:
        """Run the network, yielding (name, activation) in execution order; the last item is ("out", prediction).

        noisy_latent: (B, in_channels, h, w), as the scheduler scales it, with the image latent's channels appended
        where the checkpoint has them. timestep: a number, or a tensor with one or B of them. context: (B, L, C), or
        (1, L, C) for one text. Either may be prepared, by the two methods above. wanted: which of `probs_names` to yield
        too, each before its transformer's output: (B, heads, h*w, L), the attention of each position to each text token.
        Names are module paths of the published layout. Activations are live: graph attached, never detached or cast.
        This is a generator so that `features` can stop early without a second block loop.
        """
        temb = timestep if isinstance(timestep, Prepared) else Prepared(self.time_embedding(timestep))      # (1 or B, 4C)
        text = context if isinstance(context, Prepared) else Prepared(context)

        def run(block, *inputs):
            recompute = self.checkpointing and torch.is_grad_enabled()
            return checkpoint(block, *inputs, use_reentrant=False) if recompute else block(*inputs)

        x = self.conv_in(noisy_latent)                                              # (B, widths[0], h, w)
        yield "conv_in", x

        skips = [x]
        for i, block in enumerate(self.down_blocks):
            for j, resnet in enumerate(block.resnets):
                x = run(resnet, x, temb[resnet])
                yield f"down_blocks.{i}.resnets.{j}", x
                if block.attentions:
                    path, attention = f"down_blocks.{i}.attentions.{j}", block.attentions[j]
                    x, probs = run(attention, x, text[attention], path, wanted)
                    yield from probs.items()
                    yield path, x
                skips.append(x)
            if block.downsamplers:
                x = block.downsamplers[0](x)                                        # (B, C, ceil(h / 2), ceil(w / 2))
                yield f"down_blocks.{i}.downsamplers.0", x
                skips.append(x)

        first, attention, second = self.mid_block.resnets[0], self.mid_block.attentions[0], self.mid_block.resnets[1]
        x = run(first, x, temb[first])
        yield "mid_block.resnets.0", x
        x, probs = run(attention, x, text[attention], "mid_block.attentions.0", wanted)
        yield from probs.items()
        yield "mid_block.attentions.0", x
        x = run(second, x, temb[second])
        yield "mid_block.resnets.1", x
        yield "mid_block", x

        for i, block in enumerate(self.up_blocks):
            for j, resnet in enumerate(block.resnets):
                x = run(resnet, torch.cat([x, skips.pop()], dim=1), temb[resnet])
                yield f"up_blocks.{i}.resnets.{j}", x
                if block.attentions:
                    path, attention = f"up_blocks.{i}.attentions.{j}", block.attentions[j]
                    x, probs = run(attention, x, text[attention], path, wanted)
                    yield from probs.items()
                    yield path, x
            if block.upsamplers:
                x = block.upsamplers[0](x, skips[-1].shape[-2:])
                yield f"up_blocks.{i}.upsamplers.0", x

        yield "out", self.conv_out(self.conv_norm_out(x))                           # (B, out_channels, h, w)

    def forward(self, noisy_latent: torch.Tensor, timestep, context: torch.Tensor | Prepared) -> torch.Tensor:
        """The prediction, (B, out_channels, h, w): noise or velocity, as the checkpoint's scheduler config says."""
        for _, activation in self.walk(noisy_latent, timestep, context):
            prediction = activation                                                 # the last one
        return prediction

    def features(self, noisy_latent: torch.Tensor, timestep, context: torch.Tensor | Prepared, *,
                 taps: Iterable[str]) -> dict[str, torch.Tensor]:
        """The tapped activations, {name: tensor}. Stops after the last of them: later blocks do not run.

        taps: from `tap_names`, and from `probs_names`, the attention maps.
        """
        taps, known, maps = set(taps), self.tap_names, self.probs_names
        if not taps:
            raise ValueError(f"no taps are given; this U-Net has {len(known)}, from {known[0]!r} to {known[-1]!r}")
        if unknown := sorted(taps.difference(known, maps)):
            raise ValueError(f"unknown tap {unknown[0]!r}; this U-Net has {', '.join((*known, *maps))}")
        return tapped(self.walk(noisy_latent, timestep, context, wanted=taps.intersection(maps)), taps)
