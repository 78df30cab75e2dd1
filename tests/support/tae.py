"""The tiny autoencoders of Stable Diffusion 1 and 3 (madebyollin/taesd, MIT): real latent spaces in two megabytes.

    encode = tae.encoder(shared, "taesd")                   # pixels (B,3,H,W) in [0,1] -> latents in the denoiser's scale
    editor = tae.Encoder(shared, "taesd")                   # as much of an editor as the attacks on an encoder ask for

For tests only: their gradients are not those of the full autoencoders, which are thirty times as large.
"""

from safetensors.torch import load_file
from torch import nn

CHANNELS = {"taesd": 4, "taesd3": 16}
SCALES = {"taesd": (0.18215, 0.0), "taesd3": (1.5305, 0.0609)}          # z = scale (E - shift) of the full autoencoder


class Block(nn.Module):
    """relu(x + f(x)), three convolutions at one width."""

    def __init__(self, width):
        super().__init__()
        conv = (nn.Conv2d(width, width, 3, padding=1) for _ in range(3))
        self.conv = nn.Sequential(next(conv), nn.ReLU(), next(conv), nn.ReLU(), next(conv))

    def forward(self, x):
        return (x + self.conv(x)).relu()


def encoder(shared, name, width=64):
    """The encoder, frozen: three times half the size, then the latent's channels. Loaded strictly."""
    layers = [nn.Conv2d(3, width, 3, padding=1), Block(width)]
    for _ in range(3):
        layers += [nn.Conv2d(width, width, 3, padding=1, stride=2, bias=False), *(Block(width) for _ in range(3))]
    network = nn.Sequential(*layers, nn.Conv2d(width, CHANNELS[name], 3, padding=1))
    network.load_state_dict(load_file(shared / "data" / "taesd" / f"{name}_encoder.safetensors"))
    return network.float().requires_grad_(False).eval()


class Encoder:
    """An editor's encoder, and no more of it: what PhotoGuard's and EditShield's attacks on the encoder reach for."""

    def __init__(self, shared, name):
        self.network, (self.scale, self.shift) = encoder(shared, name), SCALES[name]
        self.kind = "instruct" if name == "taesd" else "img2img"

    def resize(self, pixels):
        return pixels

    def encode(self, pixels):
        return self.network(pixels) / self.scale + self.shift

    def scaled(self, condition):
        return (condition - self.shift) * self.scale
