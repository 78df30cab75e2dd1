"""Peak memory of one SIFM step on a diffusion transformer at full size, with random weights: `tools/bench.py memory`.

Everything but transformer and VAE encoder is released. With --device cuda the peak is measured. Elsewhere it is counted on
torch's meta device, which computes nothing: the weights and the tensors that autograd keeps at the peak, with fused attention.
Temporary tensors of single operations and the allocator's waste are then left out.
"""

import contextlib
import weakref
from typing import NamedTuple

import torch
import torch.nn.functional as F

from sifm_min.models import flux, mmdit
from sifm_min.models.flux import Flux1, Flux1Config, Flux2, Flux2Config
from sifm_min.models.mmdit import MMDiT, MMDiTConfig
from sifm_min.models.vae import AutoencoderKL, VAEConfig


class Kind(NamedTuple):
    """network, config: of the transformer; module: its file; channels: of the VAE's latent; tokens: of the text."""

    network: type
    config: object
    module: object
    channels: int
    tokens: int


EDITORS = {
    "sd3": Kind(MMDiT, MMDiTConfig(num_layers=24, num_attention_heads=24, attention_head_dim=64, joint_attention_dim=4096,
                                   pooled_projection_dim=2048, pos_embed_max_size=192, caption_projection_dim=1536),
                mmdit, 16, 333),
    "flux-kontext": Kind(Flux1, Flux1Config(guidance_embeds=True), flux, 16, 512),
    "flux-klein": Kind(Flux2, Flux2Config(num_layers=5, num_single_layers=20, num_attention_heads=24, joint_attention_dim=7680,
                                          guidance_embeds=False), flux, 32, 512),
}


def add(commands, shared):
    """Add the subcommand to the parser of bench.py."""
    command = commands.add_parser("memory", parents=[shared], help="peak of one SIFM step at full size")
    command.add_argument("--editor", choices=EDITORS, default="sd3")
    command.add_argument("--size", type=int, default=512, help="of both sides, in pixels (default: %(default)s)")
    command.set_defaults(run=bench)


def bench(args):
    kind, measured = EDITORS[args.editor], args.device.startswith("cuda")
    device = torch.device(args.device if measured else "meta")
    with device:
        vae = AutoencoderKL(VAEConfig(block_out_channels=(128, 256, 512, 512), layers_per_block=2, use_quant_conv=False,
                                      latent_channels=kind.channels, use_post_quant_conv=False))
        denoiser = kind.network(kind.config)
    encoder, denoiser = vae.encoder.requires_grad_(False), denoiser.to(torch.bfloat16).requires_grad_(False)
    taps = kind.module.default_taps(kind.config)
    weights = sum(p.nbytes for network in (encoder, denoiser) for p in (*network.parameters(), *network.buffers()))
    print(f"{args.editor}, {'measured on' if measured else 'counted, not measured, for'} {args.size}x{args.size}, bfloat16 "
          f"(VAE float32), taps to {taps[-1]}; weights {weights / 2**30:.2f} GiB")
    print(f"{'timesteps at once':20}{'checkpointing':>16}{'peak GiB':>12}")
    for count in (1, 4):
        for checkpointing in (False, True):
            denoiser.checkpointing = checkpointing
            peak = peak_of_step(encoder, denoiser, taps, kind, count, args.size, device, measured, weights)
            print(f"{count:<20}{'blocks' if checkpointing else 'none':>16}{peak / 2**30:12.2f}", flush=True)


def peak_of_step(encoder, denoiser, taps, kind, count, size, device, measured, weights):
    """Peak bytes of one step: encode, features at `count` timesteps in one batch, both gradients."""
    pixels = torch.zeros(1, 3, size, size, device=device, requires_grad=True)
    if measured:
        torch.cuda.reset_peak_memory_stats(device)
    kept = Kept()
    with kept if not measured else contextlib.nullcontext():
        latent = encoder(2 * pixels - 1)[:, :kind.channels]
        inner = latent.detach().requires_grad_(True)
        found = denoiser.features(**inputs(kind, inner.expand(count, -1, -1, -1), count, device), taps=taps)
        loss = sum(activation.float().abs().mean() for activation in found.values())
        (gradient,) = torch.autograd.grad(loss, inner)
        del found, loss
        torch.autograd.grad((latent * gradient).sum(), pixels)
    return torch.cuda.max_memory_allocated(device) if measured else weights + kept.most


def inputs(kind, latent, count, device):
    """The arguments of the transformer at a latent (count, C, h, w), which FLUX sees beside a latent of noise."""
    def text(*shape):
        return torch.zeros(1, *shape, device=device, dtype=torch.bfloat16)

    given = {"timestep": torch.full((count,), 500.0, device=device),
             "context": text(kind.tokens, kind.config.joint_attention_dim)}
    if kind.config.pooled_projection_dim:
        given["pooled"] = text(kind.config.pooled_projection_dim)
    if kind.module is not flux:
        return given | {"noisy_latent": latent.to(torch.bfloat16)}
    reference = F.pixel_unshuffle(latent, 2).to(torch.bfloat16)
    if kind.config.guidance_embeds:
        given["guidance"] = torch.full((1,), 2.5, device=device)
    return given | {"noisy_latent": torch.zeros_like(reference), "reference": reference}


class Kept(torch.autograd.graph.saved_tensors_hooks):
    """Count of the bytes that autograd keeps, each storage once, without weights; `most` is the peak."""

    def __init__(self):
        super().__init__(self.keep, lambda kept: kept[0])
        self.users, self.now, self.most = {}, 0, 0

    def __enter__(self):
        self.fused, F.scaled_dot_product_attention = F.scaled_dot_product_attention, fused_attention.apply
        return super().__enter__()

    def __exit__(self, *error):
        F.scaled_dot_product_attention = self.fused
        return super().__exit__(*error)

    def keep(self, tensor):
        if isinstance(tensor, torch.nn.Parameter) or (tensor._base is not None and
                                                      isinstance(tensor._base, torch.nn.Parameter)):
            return tensor, None
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if not self.users.get(key):
            self.now += size
            self.most = max(self.most, self.now)
        self.users[key] = self.users.get(key, 0) + 1
        token = Token()
        weakref.finalize(token, self.drop, key, size)
        return tensor, token

    def drop(self, key, size):
        self.users[key] -= 1
        if not self.users[key]:
            self.now -= size


class Token:
    """A handle that lives as long as autograd keeps its tensor."""


class fused_attention(torch.autograd.Function):
    """The memory of a fused kernel: its inputs, its output, and a number for each query and head. Computes nothing."""

    @staticmethod
    def forward(ctx, q, k, v):
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, torch.empty(q.shape[:3], device=q.device))
        return out

    @staticmethod
    def backward(ctx, gradient):
        q, k, v, *_ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
