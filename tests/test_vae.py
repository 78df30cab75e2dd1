"""The autoencoder against diffusers' AutoencoderKL on random weights, and against the published names and shapes."""

import json
from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sifm_min.models import lean, vae
from sifm_min.models.vae import AutoencoderKL, VAEConfig

diffusers = pytest.importorskip("diffusers", reason="the oracle, diffusers, is not installed")

CONFIGS = {
    "4 channels, as SD 1.5": VAEConfig(block_out_channels=(16, 32, 32, 32), layers_per_block=2, latent_channels=4,
                                       norm_num_groups=8),
    "16 channels, as SD3": VAEConfig(block_out_channels=(16, 16, 32, 32), layers_per_block=2, latent_channels=16,
                                     norm_num_groups=8, scaling_factor=1.5305, shift_factor=0.0609,
                                     use_quant_conv=False, use_post_quant_conv=False),
    "3 blocks, 1 layer, 1 group": VAEConfig(block_out_channels=(8, 12, 20), layers_per_block=1, latent_channels=4,
                                            norm_num_groups=1),
    "3 blocks, 1 layer, 2 groups": VAEConfig(block_out_channels=(8, 12, 20), layers_per_block=1, latent_channels=4,
                                             norm_num_groups=2, use_quant_conv=False),
    "no attention": VAEConfig(block_out_channels=(8, 16), layers_per_block=1, latent_channels=3, norm_num_groups=4,
                              mid_block_add_attention=False, use_post_quant_conv=False),
    "1 block, 4 colours": VAEConfig(block_out_channels=(8,), layers_per_block=3, latent_channels=4, norm_num_groups=8,
                                    in_channels=4, out_channels=1),
}
SIZES = [(24, 40), (21, 35)]                        # 3 x 5 latents at factor 8; and sides that no factor divides
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}                     # of the largest value; double sees details


def oracle(config: VAEConfig, seed: int = 0):
    """diffusers' network at random weights; no scale is one, no bias zero, and the attention is far from uniform."""
    torch.manual_seed(seed)
    blocks = len(config.block_out_channels)
    network = diffusers.AutoencoderKL(down_block_types=["DownEncoderBlock2D"] * blocks,
                                      up_block_types=["UpDecoderBlock2D"] * blocks, **asdict(config))
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif "to_q" in name or "to_k" in name:
                parameter.mul_(3)
    return network.eval()


def ours_like(theirs) -> AutoencoderKL:
    network = AutoencoderKL(VAEConfig.from_json(json.dumps(dict(theirs.config)))).to(theirs.dtype)
    network.load_state_dict(theirs.state_dict())
    return network.eval()


def assert_close(ours, theirs):
    assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
    assert (ours - theirs).abs().max().item() <= TOLERANCE[ours.dtype] * theirs.abs().max().item()


def assert_parity(ours, theirs, size=SIZES[0]):
    """Encoder and decoder agree, and so do the gradients at their inputs."""
    torch.manual_seed(1)
    pixels = torch.rand(2, theirs.config.in_channels, *size, dtype=theirs.dtype) * 2 - 1
    latent = torch.randn(2, theirs.config.latent_channels, 5, 7, dtype=theirs.dtype)
    pixels, latent = pixels.requires_grad_(), latent.requires_grad_()
    posterior = theirs.encode(pixels).latent_dist
    pairs = [*zip(ours.encode(pixels), (posterior.mean, posterior.logvar), strict=True),
             (ours.decode(latent), theirs.decode(latent).sample)]
    for (mine, other), source in zip(pairs, (pixels, pixels, latent), strict=True):
        assert_close(mine, other)
        weight = torch.randn_like(other)
        gradients = [torch.autograd.grad((y * weight).sum(), source, retain_graph=True)[0] for y in (mine, other)]
        assert gradients[1].abs().max() > 0
        assert_close(*gradients)


@pytest.mark.parametrize(("size", "dtype"), [(SIZES[0], torch.float32), (SIZES[1], torch.float32),
                                             (SIZES[0], torch.float64)], ids=["even", "odd", "double"])
@pytest.mark.parametrize("name", CONFIGS)
def test_parity_with_diffusers(name, size, dtype):
    theirs = oracle(CONFIGS[name]).to(dtype)
    assert_parity(ours_like(theirs), theirs, size)


def picture(name, side=96):
    """A picture that is flat or nearly so, (1, 3, side, side) in [-1, 1]."""
    pixels = torch.ones(1, 3, side, side)
    if name == "grey":
        return 0.1 * pixels
    if name == "graphic on white":
        pixels[:, 1:, side // 4:side // 2, side // 4:side // 2] = -0.8
        return pixels
    if name == "two colours":
        return pixels * torch.tensor([0.9, -0.4, 0.2])[:, None, None] * (torch.arange(side) - side // 2 + 0.5).sign()
    return 0.1 + torch.randn(pixels.shape, generator=torch.Generator().manual_seed(2)) / 127


@pytest.mark.slow
@pytest.mark.parametrize("name", ["grey", "graphic on white", "two colours", "faint noise"])
def test_flat_pictures_are_encoded_as_exactly_as_by_diffusers(name):
    theirs = oracle(VAEConfig(block_out_channels=(32, 64), layers_per_block=2, latent_channels=4, norm_num_groups=8))
    ours = ours_like(theirs).to(memory_format=torch.channels_last).requires_grad_(False)
    weight = torch.randn(1, 4, 48, 48, generator=torch.Generator().manual_seed(3))

    def found(encode, dtype):
        pixels = picture(name).to(dtype).requires_grad_()
        mean = encode(pixels)
        return mean.detach().double(), torch.autograd.grad(mean, pixels, weight.to(dtype))[0].double()

    mine = found(lambda pixels: ours.encode(pixels)[0], torch.float32)
    other = found(lambda pixels: theirs.encode(pixels).latent_dist.mean, torch.float32)
    theirs.double()
    truth = found(lambda pixels: theirs.encode(pixels).latent_dist.mean, torch.float64)
    for a, b, true in zip(mine, other, truth, strict=True):
        assert (a - true).abs().max() <= 5 * (b - true).abs().max()
    wrong, allowed = ((gradient.sign() != truth[1].sign()).sum() for gradient in (mine[1], other[1]))
    assert wrong <= 5 * allowed + 2


def without_residual(self, x):
    tokens = self.group_norm(x).flatten(2).transpose(1, 2)
    q, k, v = self.to_q(tokens), self.to_k(tokens), self.to_v(tokens)
    tokens = self.to_out[0](F.scaled_dot_product_attention(q, k, v))
    return tokens.transpose(1, 2).unflatten(2, x.shape[-2:])


class Wrong:
    """torch.nn.functional with one function replaced; only our module is given it, so that theirs stays right."""

    def __init__(self, **functions):
        self.functions = functions

    def __getattr__(self, name):
        return self.functions.get(name) or getattr(F, name)


FAULTS = {                                          # each is one plausible mistake: where, what, and its wrong value
    "another epsilon": (vae, "NORM_EPS", 1e-5),
    "another activation": (lean.NormSiLU, "forward", lambda self, x: F.gelu(nn.GroupNorm.forward(self, x))),
    "symmetric padding": (vae.Downsample, "forward", lambda self, x: self.conv(F.pad(x, (1, 0, 1, 0)))),
    "bilinear upsampling": (vae.Upsample, "forward", lambda self, x: self.conv(
        F.interpolate(x, scale_factor=2.0, mode="bilinear"))),
    "attention without residual": (vae.Attention, "forward", without_residual),
    "unscaled attention": (vae, "F", Wrong(scaled_dot_product_attention=lambda q, k, v: F.scaled_dot_product_attention(
        q, k, v, scale=1.0))),
    "keys for queries": (vae, "F", Wrong(scaled_dot_product_attention=lambda q, k, v: F.scaled_dot_product_attention(
        k, q, v))),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_parity_sees(fault, monkeypatch):
    """The comparison above is worth something only if it fails on a wrong network."""
    theirs = oracle(CONFIGS["3 blocks, 1 layer, 2 groups"]).double()
    assert_parity(ours_like(theirs), theirs)
    monkeypatch.setattr(*FAULTS[fault])
    with pytest.raises(AssertionError):
        assert_parity(ours_like(theirs), theirs)


def test_logvar_is_clamped_as_theirs():
    theirs = oracle(CONFIGS["4 channels, as SD 1.5"])
    with torch.no_grad():
        theirs.quant_conv.weight.mul_(3000)
    pixels = torch.rand(1, 3, 24, 40, generator=torch.Generator().manual_seed(0)) * 2 - 1
    logvar = ours_like(theirs).encode(pixels)[1]
    assert (logvar.min(), logvar.max()) == (-30, 20)
    torch.testing.assert_close(logvar, theirs.encode(pixels).latent_dist.logvar, atol=1e-3, rtol=1e-4)


def test_memory_format_does_not_matter():
    ours = ours_like(oracle(CONFIGS["3 blocks, 1 layer, 2 groups"]))
    pixels = torch.randn(2, 3, 32, 24)
    expected = ours.encode(pixels)[0]
    last = ours.to(memory_format=torch.channels_last).encode(pixels.to(memory_format=torch.channels_last))[0]
    assert_close(last, expected)
    assert_close(ours.decode(last), ours.to(memory_format=torch.contiguous_format).decode(expected))


def test_arguments_are_left_alone():
    ours = ours_like(oracle(CONFIGS["no attention"]))
    pixels, latent = torch.randn(1, 3, 16, 16), torch.randn(1, 3, 8, 8)
    before = pixels.clone(), latent.clone()
    ours.encode(pixels)
    ours.decode(latent)
    assert torch.equal(pixels, before[0]) and torch.equal(latent, before[1])


@pytest.mark.parametrize("name", CONFIGS)
def test_reads_what_save_pretrained_writes(name, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    theirs = oracle(CONFIGS[name])
    theirs.save_pretrained(tmp_path)
    config = VAEConfig.from_json((tmp_path / "config.json").read_text())
    assert config == CONFIGS[name]
    ours = AutoencoderKL(config)
    ours.load_state_dict(safetensors.load_file(tmp_path / "diffusion_pytorch_model.safetensors"))
    assert ours.factor == 2 ** (len(config.block_out_channels) - 1)
    latent = torch.randn(1, config.latent_channels, 4, 6)
    assert_close(ours.decode(latent), theirs.decode(latent).sample)


@pytest.mark.parametrize("manifest", ["sd15_vae", "sd15_vae_legacy_names", "sd3_vae"])
def test_published_names_and_shapes(manifest, shared):
    folder = shared / "data" / "checkpoints"
    published = json.loads((folder / f"{manifest}.keys.json").read_text())
    with torch.device("meta"):
        network = AutoencoderKL(VAEConfig.from_json((folder / f"{manifest}.config.json").read_text()))
    ours = {name: list(tensor.shape) for name, tensor in network.state_dict().items()}
    assert {AutoencoderKL.rename(name): shape for name, shape in published.items()} == ours
    assert network.factor == 8
    assert not list(network.buffers())              # nothing that a build on meta would leave there
    config = network.config
    assert (config.scaling_factor, config.shift_factor) == ((1.5305, 0.0609) if "sd3" in manifest else (0.18215, 0.0))


def test_legacy_attention_names_give_the_same_network():
    theirs = oracle(CONFIGS["4 channels, as SD 1.5"])
    legacy = {name.replace("to_q", "query").replace("to_k", "key").replace("to_v", "value")
              .replace("to_out.0", "proj_attn"): tensor for name, tensor in theirs.state_dict().items()}
    assert sum("query" in name for name in legacy) == 4                     # weight and bias, encoder and decoder
    ours = ours_like(oracle(CONFIGS["4 channels, as SD 1.5"], seed=1))
    ours.load_state_dict({AutoencoderKL.rename(name): tensor for name, tensor in legacy.items()})
    assert_parity(ours, theirs)


@pytest.mark.parametrize(("one", "other"), [("query", "key"), ("key", "value"), ("value", "proj_attn")])
def test_a_wrong_legacy_name_is_seen(one, other, monkeypatch):
    swapped = vae.LEGACY_NAMES | {one: vae.LEGACY_NAMES[other], other: vae.LEGACY_NAMES[one]}
    monkeypatch.setattr(vae, "LEGACY_NAMES", swapped)
    with pytest.raises(AssertionError):
        test_legacy_attention_names_give_the_same_network()
