"""The tiny autoencoder: a distilled copy of a diffusion model's autoencoder, with 1.2 million weights a half.

Reads: the `vae/` that says AutoencoderTiny, such as madebyollin/taesd (latents of SD 1.x and 2.x), taesdxl (SDXL), taesd3
(SD3), taef1 (FLUX.1) and taef2 (FLUX.2). Parameters carry the names of diffusers' files; `original_name` translates the names
of the author's own files. Source: github.com/madebyollin/taesd.

It is deterministic: a latent has no variance. Its latents are in the scale of the diffusion model already, so scaling_factor
is 1 and shift_factor 0 in all published files.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from . import cpu
from .config import EMA, LAYERS, Config
from .lean import Conv2d
from .residual import residual

HARMLESS = EMA | {
    "block_out_channels": "a copy of decoder_block_out_channels, for pipelines that ask for the number of resolutions",
    "force_upcast": "which dtype to run in is the caller's decision",
    "latent_magnitude": "for storing latents as 8-bit pictures, which no pipeline does",
    "latent_shift": "as latent_magnitude",
}
IMPLEMENTED = {"act_fn": ("relu",), "upsample_fn": ("nearest",), "upsampling_scaling_factor": (2,)}

BOUND = 3                                           # the decoder takes latents smoothly into -3 to 3 first
POOL_GROUPS, POOL_WIDTH = 4, 4                      # of the pool branch: groups of its norm, and how many times wider it is


@dataclass(frozen=True, kw_only=True)
class TinyVAEConfig(Config):
    """`vae/config.json`. The defaults are the published network, and stand in for keys that a file leaves out."""

    FILE: ClassVar = "the VAE's config.json"
    NETWORK: ClassVar = "the tiny VAE"
    HARMLESS: ClassVar = HARMLESS
    IMPLEMENTED: ClassVar = IMPLEMENTED
    RANGE: ClassVar = {"num_encoder_blocks": (0, LAYERS[1]), "num_decoder_blocks": (0, LAYERS[1])}

    in_channels: int = 3
    out_channels: int = 3
    encoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)      # finest first; all equal
    decoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)      # coarsest first; all equal
    num_encoder_blocks: tuple[int, ...] = (1, 3, 3, 3)                  # per resolution, finest first
    num_decoder_blocks: tuple[int, ...] = (3, 3, 3, 1)                  # per resolution, coarsest first
    latent_channels: int = 4
    scaling_factor: float = 1.0
    shift_factor: float | None = None               # None becomes 0.0
    use_midblock_gn: bool = False                   # taef2: blocks at the coarsest resolution have a pool branch

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "shift_factor", 0.0 if self.shift_factor is None else self.shift_factor)
        for half in ("encoder", "decoder"):
            name, counts = f"{half}_block_out_channels", f"num_{half}_blocks"
            widths = getattr(self, name)
            if not widths or len(set(widths)) > 1:
                raise self.refusal(f"sets {name} to {list(widths)}; implemented is one width for all resolutions")
            if len(widths) != len(getattr(self, counts)):
                raise self.refusal(f"has {len(widths)} values in {name} and {len(getattr(self, counts))} in {counts}")
        if len(self.num_encoder_blocks) != len(self.num_decoder_blocks):
            raise self.refusal(f"has {len(self.num_encoder_blocks)} resolutions in the encoder and "
                               f"{len(self.num_decoder_blocks)} in the decoder")
        if self.scaling_factor <= 0:
            raise self.refusal(f"sets scaling_factor to {self.scaling_factor}, not to a number above 0")


def convolution(in_channels: int, out_channels: int, **options):
    """A 3x3 convolution that keeps the size, unless it has a stride."""
    return Conv2d(in_channels, out_channels, 3, padding=1, **options)


class Block(nn.Module):
    """relu(x + f(x)), f three convolutions at one width. With a pool branch, x + pool(x) stands for x in both places.

    The pool branch normalises over the whole picture: it is how this convolutional network sees more than a neighbourhood.
    """

    def __init__(self, width: int, pool: bool):
        super().__init__()
        self.conv = nn.Sequential(convolution(width, width), nn.ReLU(), convolution(width, width), nn.ReLU(),
                                  convolution(width, width))
        self.pool = None
        if pool:
            wide = POOL_WIDTH * width
            self.pool = nn.Sequential(nn.Conv2d(width, wide, 1, bias=False), nn.GroupNorm(POOL_GROUPS, wide), nn.ReLU(),
                                      nn.Conv2d(wide, width, 1, bias=False))

    def forward(self, x):                                                   # (B, C, h, w) -> (B, C, h, w)
        if self.pool is not None:
            x = x + self.pool(x)
        return residual(x, self.conv[::2])


def run(layers, x, checkpointing):
    """x through one layer after another; `checkpointing`: blocks are run again on the way back, for memory."""
    for layer in layers:
        again = checkpointing and torch.is_grad_enabled() and isinstance(layer, Block)
        x = checkpoint(layer, x, use_reentrant=False) if again else layer(x)
    return x


def in_strips(layers, x, count, checkpointing):
    """x through 3x3 convolutions and blocks of three, of which the last layer halves the size, in `count` strips of rows.

    Each strip has the rows around it that the convolutions read, so the result is that of x as a whole.
    """
    if count == 1 or not layers:
        return run(layers, x, checkpointing)
    height, parts = x.shape[2], []
    rows = 3 * len(layers) - 4                              # that a result depends on above it: one for each convolution
    margin, out = rows + rows % 2, -(-height // 2)          # even: the strip's rows are halved as the picture's are
    count = min(count, out)
    for i in range(count):
        first, end = out * i // count, out * (i + 1) // count
        low, high = max(2 * first - margin, 0), min(2 * end + margin, height)
        y = run(layers, x[:, :, low:high], checkpointing)
        parts.append(y[:, :, first - low // 2:end - low // 2])
    return torch.cat(parts, 2)


class Encoder(nn.Module):
    """Pixels in [0, 1] to latents."""

    def __init__(self, config: TinyVAEConfig):
        super().__init__()
        width, counts = config.encoder_block_out_channels[0], config.num_encoder_blocks
        layers = []
        for i, count in enumerate(counts):
            layers.append(convolution(width, width, stride=2, bias=False) if i else convolution(config.in_channels, width))
            coarsest = i == len(counts) - 1
            layers += [Block(width, config.use_midblock_gn and coarsest) for _ in range(count)]
        self.layers = nn.ModuleList([*layers, convolution(width, config.latent_channels)])
        self.finest = counts[0] + 2 if len(counts) > 1 else 0               # layers up to the first that halves the size

    def forward(self, x, checkpointing=False):                              # (B, 3, H, W) -> (B, latent, h, w)
        layers = list(self.layers)
        x = in_strips(layers[:self.finest], x, cpu.strips(x), checkpointing)
        return run(layers[self.finest:], x, checkpointing)


class Decoder(nn.Module):
    """Latents to pixels in [0, 1], not clamped."""

    def __init__(self, config: TinyVAEConfig):
        super().__init__()
        width, counts = config.decoder_block_out_channels[0], config.num_decoder_blocks
        layers = [convolution(config.latent_channels, width), nn.ReLU()]
        for i, count in enumerate(counts):
            layers += [Block(width, config.use_midblock_gn and i == 0) for _ in range(count)]
            if i < len(counts) - 1:
                layers += [nn.Upsample(scale_factor=2, mode="nearest"), convolution(width, width, bias=False)]
        self.layers = nn.ModuleList([*layers, convolution(width, config.out_channels)])

    def forward(self, x, checkpointing=False):                              # (B, latent, h, w) -> (B, 3, H, W)
        return run(self.layers, BOUND * torch.tanh(x / BOUND), checkpointing)


class AutoencoderTiny(nn.Module):
    """The two halves, with the interface of `vae.AutoencoderKL`. `checkpointing`: as there."""

    Config = TinyVAEConfig
    checkpointing = False

    def __init__(self, config: TinyVAEConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    @property
    def factor(self) -> int:
        """Pixels per latent position along one side: 8 in every published file."""
        return 2 ** (len(self.config.num_encoder_blocks) - 1)

    def encode(self, pixels: torch.Tensor) -> tuple[torch.Tensor]:
        """The latents of (B, 3, H, W) in [-1, 1], in a tuple of one: `AutoencoderKL` has a log variance beside its mean.

        (B, latent_channels, ceil(H / factor), ceil(W / factor)).
        """
        return (self.encoder((pixels + 1) / 2, self.checkpointing),)

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        """Pixels, (B, 3, h * factor, w * factor), nominally in [-1, 1] and not clamped, of a latent."""
        return 2 * self.decoder(latent, self.checkpointing) - 1

    @staticmethod
    def original_name(half: str, name: str) -> str:
        """The name used here of a tensor in the author's file of the "encoder" or the "decoder".

        There both are lists of layers, and the decoder's first layer is the bound on its latents, which has no tensors.
        """
        number, _, rest = name.partition(".")
        if half == "decoder" and number.isdecimal():
            number = str(int(number) - 1)
        return f"{half}.layers.{number}.{rest}"
