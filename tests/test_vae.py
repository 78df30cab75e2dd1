"""The autoencoder against diffusers' AutoencoderKL and AutoencoderKLFlux2 on random weights, and against the published names
and shapes."""

import json
from dataclasses import asdict

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from faults import Wrong
from parity import assert_close, varied
from torch import nn

from sifm_min.models import lean, vae
from sifm_min.models.checkpoints import Checkpoint, Unfit
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
    "32 channels, as FLUX.2": VAEConfig(block_out_channels=(16, 16, 32, 32), layers_per_block=2, latent_channels=32,
                                        norm_num_groups=8, batch_norm_eps=1e-4),
    "narrow decoder, no quantisation, large epsilon": VAEConfig(
        block_out_channels=(8, 16), layers_per_block=1, latent_channels=3, norm_num_groups=4, batch_norm_eps=0.3,
        decoder_block_out_channels=(4, 12), use_quant_conv=False, use_post_quant_conv=False),
}
FLUX2 = [name for name, config in CONFIGS.items() if config.batch_norm_eps is not None]
SIZES = [(24, 40), (21, 35)]                        # 3 x 5 latents at factor 8; and sides that no factor divides


def oracle(config: VAEConfig, seed: int = 0):
    """diffusers' network at random weights; no scale is one, no bias zero, and the attention is far from uniform."""
    torch.manual_seed(seed)
    blocks = len(config.block_out_channels)
    given = {"down_block_types": ["DownEncoderBlock2D"] * blocks, "up_block_types": ["UpDecoderBlock2D"] * blocks}
    given |= asdict(config)
    for key in ("decoder_block_out_channels", "batch_norm_eps") if config.batch_norm_eps is None else ("scaling_factor",
                                                                                                      "shift_factor"):
        del given[key]                              # the other class's
    if config.batch_norm_eps is None:
        network = diffusers.AutoencoderKL(**given)
    else:
        if not hasattr(diffusers, "AutoencoderKLFlux2"):
            pytest.skip("this diffusers has no FLUX.2")
        network = diffusers.AutoencoderKLFlux2(**given)
        network.bn.running_mean.normal_()
        network.bn.running_var.uniform_(0.1, 4)
    return varied(network)


def ours_like(theirs) -> AutoencoderKL:
    network = AutoencoderKL(VAEConfig.from_json(json.dumps(dict(theirs.config)))).to(theirs.dtype)
    network.load_state_dict(renamed(theirs.state_dict()))
    return network.eval()


def renamed(state):
    return {name: tensor for stored, tensor in state.items() if (name := AutoencoderKL.rename(stored)) is not None}


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


FAULTS = {                                          # each is one plausible mistake: where, what, and its wrong value
    "another epsilon": (vae, "NORM_EPS", 1e-5),
    "another activation": (lean.NormSiLU, "forward", lambda self, x: F.gelu(nn.GroupNorm.forward(self, x))),
    "symmetric padding": (vae.Downsample, "forward", lambda self, x: self.conv(F.pad(x, (1, 0, 1, 0)))),
    "bilinear upsampling": (vae.Upsample, "forward", lambda self, x: self.conv(
        F.interpolate(x, scale_factor=2.0, mode="bilinear"))),
    "attention without residual": (vae.Attention, "forward", without_residual),
    "unscaled attention": (vae, "F", Wrong(F, scaled_dot_product_attention=lambda q, k, v: F.scaled_dot_product_attention(
        q, k, v, scale=1.0))),
    "keys for queries": (vae, "F", Wrong(F, scaled_dot_product_attention=lambda q, k, v: F.scaled_dot_product_attention(
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
    theirs = oracle(CONFIGS[name])
    theirs.save_pretrained(tmp_path)
    config = VAEConfig.from_json((tmp_path / "config.json").read_text())
    assert config == CONFIGS[name]
    ours = AutoencoderKL(config)
    ours.load_state_dict(renamed(safetensors.torch.load_file(tmp_path / "diffusion_pytorch_model.safetensors")))
    assert ours.factor == 2 ** (len(config.block_out_channels) - 1)
    latent = torch.randn(1, config.latent_channels, 4, 6)
    assert_close(ours.decode(latent), theirs.decode(latent).sample)


@pytest.mark.parametrize(("manifest", "scale"), [("sd15_vae", (0.18215, 0.0)), ("sd15_vae_legacy_names", (0.18215, 0.0)),
                                                 ("sd3_vae", (1.5305, 0.0609)), ("flux1_vae", (0.3611, 0.1159)),
                                                 ("flux2_vae", (1.0, 0.0))])
def test_published_names_and_shapes(manifest, scale, shared):
    folder = shared / "data" / "checkpoints"
    published = json.loads((folder / f"{manifest}.keys.json").read_text())
    if manifest == "flux2_vae" and not hasattr(diffusers, "AutoencoderKLFlux2"):
        pytest.skip("this diffusers has no FLUX.2")
    file = folder / f"{manifest}.config.json"       # FLUX.2's was not seen; its class's defaults describe it
    with torch.device("meta"):
        text = file.read_text() if file.exists() else json.dumps(dict(diffusers.AutoencoderKLFlux2().config))
        network = AutoencoderKL(VAEConfig.from_json(text))
    ours = {name: list(tensor.shape) for name, tensor in network.state_dict().items()}
    assert renamed(published) == ours
    assert network.factor == 8
    assert not list(network.buffers())              # nothing that a build on meta would leave there
    assert (network.config.scaling_factor, network.config.shift_factor) == scale


# -- FLUX.2's statistics -----------------------------------------------------------------------------------------------

def assert_same_latents(ours, theirs):
    """Ours is the pipeline's way from the autoencoder to the transformer, and back; and so are its gradients."""
    pipeline = pytest.importorskip("diffusers.pipelines.flux2.pipeline_flux2_klein", reason="this diffusers has no klein")
    pipeline = pipeline.Flux2KleinPipeline
    generator = torch.Generator().manual_seed(2)
    latent = torch.randn(2, theirs.config.latent_channels, 4, 6, generator=generator, dtype=theirs.dtype).requires_grad_()
    mean, deviation = theirs.bn.running_mean, (theirs.bn.running_var + theirs.config.batch_norm_eps).sqrt()
    expected = theirs.bn(pipeline._patchify_latents(latent))
    weight = torch.randn(expected.shape, generator=generator, dtype=theirs.dtype)
    for mine, other in [(ours.normalised(latent), expected),
                        (ours.denormalised(expected), latent)]:
        assert_close(mine, other)
    back = pipeline._unpatchify_latents(weight * deviation[:, None, None] + mean[:, None, None])
    assert_close(ours.denormalised(weight), back)
    gradients = [torch.autograd.grad((y * weight).sum(), latent)[0] for y in (ours.normalised(latent), expected)]
    assert_close(*gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", FLUX2)
def test_normalised_latents_are_the_pipeline_s(name, dtype):
    theirs = oracle(CONFIGS[name]).to(dtype)
    assert_same_latents(ours_like(theirs), theirs)


def without_epsilon(self, x, inverse=False):
    mean, deviation = self.running_mean[:, None, None], self.running_var.sqrt()[:, None, None]
    return x * deviation + mean if inverse else (x - mean) / deviation


def columns_first(x, side):
    return F.pixel_unshuffle(x.mT, side).mT


@pytest.mark.parametrize("fault", [
    (vae.Statistics, "forward", without_epsilon),
    (vae.Statistics, "forward", lambda self, x, inverse=False: x),
    (vae, "F", Wrong(F, pixel_unshuffle=columns_first)),
    (vae, "F", Wrong(F, pixel_shuffle=lambda x, side: F.pixel_shuffle(x.mT, side).mT)),
], ids=["no epsilon", "no statistics", "columns before rows", "columns before rows, back"])
def test_the_comparison_of_latents_sees(fault, monkeypatch):
    theirs = oracle(CONFIGS["narrow decoder, no quantisation, large epsilon"]).double()
    monkeypatch.setattr(*fault)
    with pytest.raises(AssertionError):
        assert_same_latents(ours_like(theirs), theirs)


def test_statistics_are_read_with_the_first_latent(tmp_path):
    """As an editor loads it, part by part; a file without them is refused, and so is one with a scale beside them."""
    theirs = oracle(CONFIGS["32 channels, as FLUX.2"])
    theirs.save_pretrained(tmp_path / "vae")
    (tmp_path / "model_index.json").write_text("{}")
    files = ["vae/config.json", "vae/diffusion_pytorch_model.safetensors"]
    ours = Checkpoint(tmp_path, "flux2", None, files).load(AutoencoderKL, "vae", lazily=True)
    assert ours.bn.running_mean.is_meta
    latent = torch.randn(1, 32, 2, 2, generator=torch.Generator().manual_seed(0))
    assert_close(ours.denormalised(ours.normalised(latent)), latent)
    assert torch.equal(ours.bn.running_var, theirs.bn.running_var)

    state = safetensors.torch.load_file(tmp_path / files[1])
    safetensors.torch.save_file({name: tensor for name, tensor in state.items() if "bn." not in name}, tmp_path / files[1])
    with pytest.raises(Unfit, match="2 missing, 0 unexpected, 0 wrong.*missing bn.running_mean"):
        Checkpoint(tmp_path, "flux2", None, files).load(AutoencoderKL, "vae")


@pytest.mark.parametrize(("change", "sentence"), [
    ({"scaling_factor": 0.3611}, "sets scaling_factor to 0.3611 beside batch_norm_eps"),
    ({"shift_factor": 0.1159}, "sets shift_factor to 0.1159 beside batch_norm_eps"),
    ({"patch_size": [1, 1]}, r"sets patch_size to \[1, 1\]; only \[2, 2\] is implemented"),
    ({"batch_norm_eps": -1}, "sets batch_norm_eps to -1, not to a number from 0 to 1"),
    ({"decoder_block_out_channels": [8]}, "has 1 decoder_block_out_channels for 4 block_out_channels"),
    ({"decoder_block_out_channels": [8, 8, 8, 9]}, "has 9 in decoder_block_out_channels, .* norm_num_groups 8"),
])
def test_statistics_that_are_not_implemented_are_refused(change, sentence):
    given = dict(oracle(CONFIGS["32 channels, as FLUX.2"]).config)
    with pytest.raises(ValueError, match=f"^the VAE's config.json {sentence}"):
        VAEConfig.from_dict(given | change)


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
