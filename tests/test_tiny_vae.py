"""The tiny autoencoder against diffusers' AutoencoderTiny: on random weights, and on the published weights in both layouts."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from sifm_min.models import checkpoints, cpu, tiny_vae
from sifm_min.models.tiny_vae import AutoencoderTiny, TinyVAEConfig

diffusers = pytest.importorskip("diffusers", reason="the oracle, diffusers, is not installed")

SMALL = {"encoder_block_out_channels": (16,) * 4, "decoder_block_out_channels": (16,) * 4}
CONFIGS = {
    "4 channels, as SD 1.x": SMALL | {"latent_channels": 4},
    "16 channels, as SD3": SMALL | {"latent_channels": 16},
    "32 channels, as FLUX.2": SMALL | {"latent_channels": 32},
    "3 levels, uneven": {"encoder_block_out_channels": (8,) * 3, "decoder_block_out_channels": (12,) * 3, "latent_channels": 5,
                         "num_encoder_blocks": (2, 0, 1), "num_decoder_blocks": (1, 3, 0), "scaling_factor": 0.7,
                         "shift_factor": 0.2},
    "full width": {"latent_channels": 4},
}
PUBLISHED = {"taesd": 4, "taesdxl": 4, "taesd3": 16, "taef1": 16, "taef2": 32}
DECIBELS = {"taesd": 21, "taesdxl": 21, "taesd3": 27, "taef1": 25, "taef2": 28}      # at least, of the astronaut at 256 pixels


class Pooled(nn.Module):
    """diffusers' block with taef2's pool branch, which diffusers does not have."""

    def __init__(self, inner, width):
        super().__init__()
        self.inner = inner
        self.pool = nn.Sequential(nn.Conv2d(width, 4 * width, 1, bias=False), nn.GroupNorm(4, 4 * width), nn.ReLU(),
                                  nn.Conv2d(4 * width, width, 1, bias=False))

    def forward(self, x):
        return self.inner(x + self.pool(x))

    def state_dict(self, *, destination, prefix, keep_vars):
        self.inner.state_dict(destination=destination, prefix=prefix, keep_vars=keep_vars)
        return self.pool.state_dict(destination=destination, prefix=f"{prefix}pool.", keep_vars=keep_vars)


def oracle(config, seed=0, pool=False):
    """diffusers' network at random weights; no bias is small, and no norm's scale is one."""
    torch.manual_seed(seed)
    network = diffusers.AutoencoderTiny(**config)
    if pool:
        for layers, places in ((network.encoder.layers, (11, 12, 13)), (network.decoder.layers, (2, 3, 4))):
            for place in places:
                layers[place] = Pooled(layers[place], layers[place].conv[0].in_channels)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return network.eval()


def ours_like(theirs, **more):
    network = AutoencoderTiny(TinyVAEConfig.from_json(json.dumps(dict(theirs.config) | more))).to(theirs.dtype)
    network.load_state_dict(theirs.state_dict())
    return network.eval()


def assert_close(ours, theirs, tolerance=1e-5):
    assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
    assert (ours - theirs).abs().max().item() <= tolerance * theirs.abs().max().item()


def assert_parity(ours, theirs, pixels, tolerance=1e-5):
    """Encoder and decoder agree, and so do the gradients at their inputs."""
    (latent,) = ours.encode(pixels.requires_grad_())
    expected = theirs.encode(pixels).latents
    assert_close(latent, expected, tolerance)
    source = expected.detach().requires_grad_()
    pairs = [(latent, expected, pixels), (ours.decode(source), theirs.decode(source).sample, source)]
    for mine, other, start in pairs:
        assert_close(mine, other, tolerance)
        weight = torch.randn(other.shape, generator=torch.Generator().manual_seed(2)).to(other)
        gradients = [torch.autograd.grad((y * weight).sum(), start)[0] for y in (mine, other)]
        assert gradients[1].abs().max() > 0
        assert_close(*gradients, tolerance)


def draw(height, width, dtype=torch.float32):
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(1)).to(dtype) * 2 - 1


@pytest.mark.parametrize(("size", "dtype", "tolerance"), [((24, 40), torch.float32, 1e-5), ((21, 35), torch.float32, 1e-5),
                                                          ((24, 40), torch.float64, 1e-10)], ids=["even", "odd", "double"])
@pytest.mark.parametrize("name", CONFIGS)
def test_parity_with_diffusers(name, size, dtype, tolerance):
    theirs = oracle(CONFIGS[name]).to(dtype)
    assert_parity(ours_like(theirs), theirs, draw(*size, dtype), tolerance)


def test_pool_branch_is_added_before_the_block():
    theirs = oracle(CONFIGS["32 channels, as FLUX.2"], pool=True)
    ours = ours_like(theirs, use_midblock_gn=True)
    assert sum(".pool." in name for name in ours.state_dict()) == 24
    assert_parity(ours, theirs, draw(24, 40))
    assert_parity(ours.double(), theirs.double(), draw(24, 40, torch.float64), 1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_loads_strictly_what_save_pretrained_writes(name, tmp_path):
    theirs = oracle(CONFIGS[name])
    theirs.save_pretrained(tmp_path / "vae")
    checkpoint = checkpoints.open_checkpoint(tmp_path, ["vae"])
    ours = checkpoint.load(AutoencoderTiny, "vae")
    assert ours.factor == 2 ** (len(theirs.config.num_encoder_blocks) - 1)
    assert (ours.config.scaling_factor, ours.config.shift_factor) == (theirs.config.scaling_factor, theirs.config.shift_factor)
    assert_parity(ours, theirs, draw(24, 40))
    file = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    state["encoder.layers.0.weights"] = state.pop("encoder.layers.0.weight")
    save_file(state, file)
    with pytest.raises(checkpoints.Unfit, match=r"missing encoder.layers.0.weight; unexpected encoder.layers.0.weights"):
        checkpoints.open_checkpoint(tmp_path, ["vae"]).load(AutoencoderTiny, "vae")


def test_original_names_are_those_of_diffusers():
    """The lists of layers written out: the author's decoder begins with the bound, which has no tensors."""
    theirs = oracle(CONFIGS["full width"])
    for half, first in (("encoder", 0), ("decoder", 1)):
        layers = getattr(theirs, half).layers
        original = nn.Sequential(*[nn.Identity()] * first, *layers)
        names = {AutoencoderTiny.original_name(half, name): tensor for name, tensor in original.state_dict().items()}
        expected = {name: tensor for name, tensor in theirs.state_dict().items() if name.startswith(half)}
        assert names.keys() == expected.keys() and all(names[name] is not None for name in names)
        assert all(torch.equal(names[name], expected[name]) for name in names)


def published(folder, name):
    """The state of a published network, from the author's two files, as float32."""
    return {AutoencoderTiny.original_name(half, key): tensor.float() for half in ("encoder", "decoder")
            for key, tensor in load_file(folder / f"{name}_{half}.safetensors").items()}


def astronaut(shared):
    """(1, 3, 256, 256) in [-1, 1]."""
    picture = Image.open(shared / "data" / "photos" / "astronaut.png").convert("RGB")
    picture = picture.resize((256, 256), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(picture)).float().permute(2, 0, 1)[None] / 127.5 - 1


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_weights_in_both_layouts(name, shared):
    """In diffusers' network, in ours, and a photograph comes back."""
    pool = name == "taef2"
    state = published(shared / "data" / "taesd", name)
    theirs = oracle({"latent_channels": PUBLISHED[name]}, pool=pool)
    own = theirs.state_dict()
    assert own.keys() == state.keys()
    with torch.no_grad():
        for key, tensor in own.items():
            tensor.copy_(state[key])
    ours = AutoencoderTiny(TinyVAEConfig(latent_channels=PUBLISHED[name], use_midblock_gn=pool))
    ours.load_state_dict(state)
    pixels = astronaut(shared)
    assert_parity(ours, theirs, pixels[:, :, 60:124, 100:180].clone())
    with torch.no_grad():
        (latent,) = ours.encode(pixels)
        back = ours.decode(latent).clamp(-1, 1)
    assert latent.shape == (1, PUBLISHED[name], 32, 32) and 0.7 < latent.std() < 1.4        # already in the denoiser's scale
    assert 10 * torch.log10(4 / (back - pixels).square().mean()) > DECIBELS[name]


def test_checkpointing_changes_memory_alone(monkeypatch):
    ours = ours_like(oracle(CONFIGS["16 channels, as SD3"]))
    pixels, counted = draw(24, 40).requires_grad_(), []
    forward = tiny_vae.Block.forward
    monkeypatch.setattr(tiny_vae.Block, "forward", lambda self, x: counted.append(1) or forward(self, x))

    def gradient():
        counted.clear()
        (latent,) = ours.encode(pixels)
        return torch.autograd.grad((latent.square().sum() + ours.decode(latent).square().sum()), pixels)[0], len(counted)

    plain, once = gradient()
    ours.checkpointing = True
    again, twice = gradient()
    assert torch.equal(plain, again) and (once, twice) == (20, 40)


@pytest.mark.parametrize(("blocks", "height", "count"), [(1, 64, 4), (1, 45, 3), (2, 50, 2), (0, 21, 5), (1, 6, 3)])
def test_strips_are_the_whole_picture(monkeypatch, blocks, height, count):
    """The latents and the gradient at the pixels of two pictures at once, whatever the number of strips and their rows."""
    torch.manual_seed(0)
    ours = AutoencoderTiny(TinyVAEConfig(num_encoder_blocks=(blocks, 1), num_decoder_blocks=(1, 1),
                                         encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8)))
    pixels = torch.randn(2, 3, height, 24, requires_grad=True)

    def encode():
        with cpu.record() as kernels:
            (latent,) = ours.encode(pixels)
        return latent.detach(), torch.autograd.grad(latent.square().sum(), pixels)[0], "strips" in kernels

    *whole, cut = encode()
    monkeypatch.setattr(cpu, "STRIP_POSITIONS", -(-2 * height * 24 // count))
    *strips, truly = encode()
    assert (cut, truly) == (False, True)
    for one, other in zip(strips, whole, strict=True):
        assert_close(one, other)


def test_arguments_are_left_alone():
    ours = ours_like(oracle(CONFIGS["4 channels, as SD 1.x"]))
    pixels, latent = draw(16, 16), torch.randn(1, 4, 2, 2)
    before = pixels.clone(), latent.clone()
    ours.encode(pixels)
    ours.decode(latent)
    assert torch.equal(pixels, before[0]) and torch.equal(latent, before[1])
