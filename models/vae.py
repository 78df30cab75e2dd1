"""The KL autoencoder of latent diffusion: pixels to latents at 1/8 of the size, and back.

Reads: the `vae/` of timbrooks/instruct-pix2pix, MudeHui/HQ-Edit and every SD 1.x (4 latent channels, 1x1 convolutions
around the latent), of stabilityai/stable-diffusion-3-medium and FLUX.1 (16 channels, without them), and of FLUX.2 (32
channels, with them). Parameters carry the names of the published files. Paper: Rombach et al. 2022, section 3.1 and
appendix G.

`encode` returns the posterior's mean and log variance, and `decode` takes an unscaled latent, such as that mean. The
diffusion model works on (latent - shift_factor) * scaling_factor; the editor converts. FLUX.2 has statistics in place of
the two numbers: its diffusion model works on `normalised(latent)`, and `denormalised` is the inverse.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from .config import EMA, LAYERS, Config, shown
from .lean import Conv2d, GroupNorm, NormSiLU

# Keys of the published config.json that are not fields of `VAEConfig` and change nothing at inference.
HARMLESS = EMA | {
    "sample_size": "the training resolution; the network is convolutional",
    "force_upcast": "which dtype to run in is the caller's decision",
    "batch_norm_momentum": "training only: how fast the statistics follow",
}
# Keys that are not fields, and their implemented values.
IMPLEMENTED = {"act_fn": ("silu",), "latents_mean": (None,), "latents_std": (None,), "patch_size": ([2, 2], (2, 2))}
PATCH = 2                                           # side of FLUX.2's patches: each latent channel becomes PATCH^2 channels
BLOCK_TYPES = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}

# Older files spell the attention's four layers differently (the fp32 file of SD 1.5, for one).
LEGACY_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}

NORM_EPS = 1e-6                                     # of every GroupNorm; the U-Net's residual blocks use 1e-5


@dataclass(frozen=True, kw_only=True)
class VAEConfig(Config):
    """`vae/config.json`. Defaults are for files that are older than the option."""

    FILE: ClassVar = "the VAE's config.json"
    NETWORK: ClassVar = "the VAE"
    HARMLESS: ClassVar = HARMLESS
    IMPLEMENTED: ClassVar = IMPLEMENTED
    RANGE: ClassVar = {"layers_per_block": LAYERS, "batch_norm_eps": (0, 1)}

    block_out_channels: tuple[int, ...]             # channels per resolution, finest first
    layers_per_block: int                           # residual blocks per resolution; the decoder has one more
    latent_channels: int
    in_channels: int = 3
    out_channels: int = 3
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215
    shift_factor: float | None = None               # None, as files write it, becomes 0.0
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True
    decoder_block_out_channels: tuple[int, ...] | None = None               # None: as many as the encoder's
    batch_norm_eps: float | None = None             # FLUX.2, with statistics in place of scaling_factor and shift_factor

    def __post_init__(self):
        super().__post_init__()
        widths, decoder_widths = self.block_out_channels, self.decoder_block_out_channels or ()
        object.__setattr__(self, "shift_factor", 0.0 if self.shift_factor is None else self.shift_factor)
        if self.batch_norm_eps is not None:
            object.__setattr__(self, "scaling_factor", 1.0)
        if not widths:
            raise self.refusal("sets block_out_channels to an empty list")
        if decoder_widths and len(decoder_widths) != len(widths):
            raise self.refusal(f"has {len(decoder_widths)} decoder_block_out_channels for {len(widths)} block_out_channels")
        if self.scaling_factor <= 0:
            raise self.refusal(f"sets scaling_factor to {self.scaling_factor}, not to a number above 0")
        for key, given in (("block_out_channels", widths), ("decoder_block_out_channels", decoder_widths)):
            if uneven := [width for width in given if width % self.norm_num_groups]:
                raise self.refusal(f"has {uneven[0]} in {key}, which is not a multiple of norm_num_groups "
                                   f"{self.norm_num_groups}")

    @classmethod
    def translated(cls, given):
        """Check the block types and drop them: there is one implementation of each."""
        if given.get("batch_norm_eps") is not None:
            for key in ("scaling_factor", "shift_factor"):
                if given.get(key) is not None:
                    raise cls.refusal(f"sets {key} to {shown(given[key])} beside batch_norm_eps; only one of the two is used")
        widths = given.get("block_out_channels")
        for key, kind in BLOCK_TYPES.items():
            if key in given and isinstance(widths, list) and given[key] != [kind] * len(widths):
                raise cls.refusal(f"sets {key} to {shown(given[key])}; implemented is {kind} for each of its {len(widths)} "
                                  "block_out_channels")
        return {key: value for key, value in given.items() if key not in BLOCK_TYPES}


class ResidualBlock(nn.Module):
    """x + f(x), with a 1x1 convolution on the x path where the number of channels changes."""

    def __init__(self, in_channels: int, out_channels: int, groups: int):
        super().__init__()
        self.norm1 = NormSiLU(groups, in_channels, eps=NORM_EPS)
        self.conv1 = Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = NormSiLU(groups, out_channels, eps=NORM_EPS)
        self.conv2 = Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x):                                                   # (B, in, h, w) -> (B, out, h, w)
        y = self.conv1(self.norm1(x))
        y = self.conv2(self.norm2(y))
        return y + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Attention(nn.Module):
    """Single-head self-attention over all positions, as wide as the features, with a residual connection."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.group_norm = GroupNorm(groups, channels, eps=NORM_EPS)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])        # a list, because files say to_out.0

    def forward(self, x):                                                   # (B, C, h, w) -> (B, C, h, w)
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)              # (B, C, h, w) -> (B, h*w, C)
        q, k, v = (to(tokens).unsqueeze(1) for to in (self.to_q, self.to_k, self.to_v))         # (B, 1, h*w, C)
        tokens = self.to_out[0](F.scaled_dot_product_attention(q, k, v).squeeze(1))
        return x + tokens.transpose(1, 2).unflatten(2, x.shape[-2:])        # (B, h*w, C) -> (B, C, h, w)


def run(layers, x, checkpointing):
    """Run x through the layers. checkpointing: recompute each layer in the backward pass, which saves memory."""
    for layer in layers:
        x = checkpoint(layer, x, use_reentrant=False) if checkpointing and torch.is_grad_enabled() else layer(x)
    return x


class MidBlock(nn.Module):
    """Residual block, attention (if `add_attention`), residual block, at the coarsest resolution."""

    def __init__(self, channels: int, groups: int, add_attention: bool):
        super().__init__()
        self.resnets = nn.ModuleList(ResidualBlock(channels, channels, groups) for _ in range(2))
        self.attentions = nn.ModuleList([Attention(channels, groups)] if add_attention else [])

    def forward(self, x, checkpointing):
        first, second = self.resnets
        return run((first, *self.attentions, second), x, checkpointing)


class Downsample(nn.Module):
    """A convolution to half the size. It pads the right and the bottom only; symmetric padding gives other numbers."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, stride=2)

    def forward(self, x):                                                   # (B, C, h, w) -> (B, C, h // 2, w // 2)
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest-neighbour interpolation to twice the size, then a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):                                                   # (B, C, h, w) -> (B, C, 2h, 2w)
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class DownBlock(nn.Module):
    """Residual blocks at one resolution of the encoder, then a `Downsample`, except at the coarsest."""

    def __init__(self, in_channels: int, out_channels: int, layers: int, groups: int, downsample: bool):
        super().__init__()
        self.resnets = nn.ModuleList(
            ResidualBlock(in_channels if i == 0 else out_channels, out_channels, groups) for i in range(layers))
        self.downsamplers = nn.ModuleList([Downsample(out_channels)] if downsample else [])

    def forward(self, x, checkpointing):
        x = run(self.resnets, x, checkpointing)
        for downsample in self.downsamplers:
            x = downsample(x)
        return x


class UpBlock(nn.Module):
    """Residual blocks at one resolution of the decoder, then an `Upsample`, except at the finest."""

    def __init__(self, in_channels: int, out_channels: int, layers: int, groups: int, upsample: bool):
        super().__init__()
        self.resnets = nn.ModuleList(
            ResidualBlock(in_channels if i == 0 else out_channels, out_channels, groups) for i in range(layers))
        self.upsamplers = nn.ModuleList([Upsample(out_channels)] if upsample else [])

    def forward(self, x, checkpointing):
        x = run(self.resnets, x, checkpointing)
        for upsample in self.upsamplers:
            x = upsample(x)
        return x


class Encoder(nn.Module):
    """Pixels to the posterior's moments, before `quant_conv`."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            DownBlock(widths[max(i - 1, 0)], width, config.layers_per_block, groups, downsample=i < len(widths) - 1)
            for i, width in enumerate(widths))
        self.mid_block = MidBlock(widths[-1], groups, config.mid_block_add_attention)
        self.conv_norm_out = NormSiLU(groups, widths[-1], eps=NORM_EPS)
        self.conv_out = Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x, checkpointing=False):                              # (B, 3, H, W) -> (B, 2 * latent, h, w)
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x, checkpointing)
        x = self.mid_block(x, checkpointing)
        return self.conv_out(self.conv_norm_out(x))


class Decoder(nn.Module):
    """Latents, after `post_quant_conv`, to pixels."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths = (config.decoder_block_out_channels or config.block_out_channels)[::-1]     # coarsest first
        groups = config.norm_num_groups
        self.conv_in = Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], groups, config.mid_block_add_attention)
        self.up_blocks = nn.ModuleList(
            UpBlock(widths[max(i - 1, 0)], width, config.layers_per_block + 1, groups, upsample=i < len(widths) - 1)
            for i, width in enumerate(widths))
        self.conv_norm_out = NormSiLU(groups, widths[-1], eps=NORM_EPS)
        self.conv_out = Conv2d(widths[-1], config.out_channels, 3, padding=1)

    def forward(self, x, checkpointing=False):                              # (B, latent, h, w) -> (B, 3, H, W)
        x = self.mid_block(self.conv_in(x), checkpointing)
        for block in self.up_blocks:
            x = block(x, checkpointing)
        return self.conv_out(self.conv_norm_out(x))


class Statistics(nn.Module):
    """Mean and variance of each channel of a patched latent: a batch norm after training, and its inverse.

    They are parameters here, so that a network on the meta device has no other tensors than those that a file fills.
    """

    def __init__(self, channels: int, eps: float):
        super().__init__()
        self.eps = eps
        self.running_mean = nn.Parameter(torch.zeros(channels))
        self.running_var = nn.Parameter(torch.ones(channels))

    def forward(self, x, inverse=False):                                    # (B, C, h, w) -> the same shape
        deviation = (self.running_var + self.eps).sqrt()
        mean, deviation = (part.to(x.dtype)[:, None, None] for part in (self.running_mean, deviation))
        return x * deviation + mean if inverse else (x - mean) / deviation


class AutoencoderKL(nn.Module):
    """Encoder, decoder, and the optional 1x1 convolutions between them and the latent; for FLUX.2 its statistics.

    `checkpointing`: recompute residual blocks and attention in the backward pass, which saves memory.
    """

    Config = VAEConfig
    checkpointing = False

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        latent = config.latent_channels
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = Conv2d(2 * latent, 2 * latent, 1) if config.use_quant_conv else None
        self.post_quant_conv = Conv2d(latent, latent, 1) if config.use_post_quant_conv else None
        self.bn = None if config.batch_norm_eps is None else Statistics(PATCH**2 * latent, config.batch_norm_eps)

    @property
    def factor(self) -> int:
        """Pixels per latent position along one side: 8 in every published file."""
        return 2 ** (len(self.config.block_out_channels) - 1)

    def encode(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and log variance, each (B, latent_channels, H // factor, W // factor), of (B, 3, H, W) in [-1, 1].

        Neither is scaled or shifted. A sample is mean + exp(logvar / 2) * noise, with the caller's noise.
        """
        moments = self.encoder(pixels, self.checkpointing)
        if self.quant_conv is not None:
            moments = self.quant_conv(moments)
        mean, logvar = moments.chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        """Pixels, (B, 3, h * factor, w * factor), nominally in [-1, 1] and not clamped, of an unscaled latent."""
        if self.post_quant_conv is not None:
            latent = self.post_quant_conv(latent)
        return self.decoder(latent, self.checkpointing)

    def normalised(self, latent: torch.Tensor) -> torch.Tensor:
        """FLUX.2's latent for its transformer, (B, 4 * latent_channels, h // 2, w // 2), of an unscaled one (B, C, h, w).

        Each patch of 2x2 positions becomes one, whose channels are in the order channel, row, column. Each channel then
        gets a mean of 0 and a deviation of 1. h and w must be even.
        """
        return self.bn(F.pixel_unshuffle(latent, PATCH))

    def denormalised(self, latent: torch.Tensor) -> torch.Tensor:
        """The inverse of `normalised`: the unscaled latent that `decode` takes."""
        return F.pixel_shuffle(self.bn(latent, inverse=True), PATCH)

    @staticmethod
    def rename(name: str) -> str | None:
        """Translate a tensor's name from a published file, in either spelling of the attention's layers.

        None for the counter of a batch norm's training steps, which no result depends on.
        """
        if name == "bn.num_batches_tracked":
            return None
        return ".".join(LEGACY_NAMES.get(part, part) for part in name.split("."))
