"""Measure how fast parts of this project are, each beside a peer where one is installed, in one run on the same threads.

    python tools/bench.py metrics                       the distances, beside piq: one pair, and a batch of 16, at 512x512
    python tools/bench.py metrics --threads 1 --repeat 9 --backward
    python tools/bench.py memory                        one SIFM step on Stable Diffusion 3 at full size, random weights
    python tools/bench.py step                          one SIFM step, beside a naive one on diffusers; so are edit and load
    python tools/bench.py convolutions                  torch's convolutions beside the kernels of models/cpu.py
    python tools/bench.py judge                         a run of 1,000 samples, 16 in flight, a service that takes 1 s a call

A subcommand is a function that takes the parsed arguments, and an entry in `main`. Calls of this project and of the peer
alternate, after one warm-up each. A time is the least of --repeat calls: on a shared machine the others include the load of
other processes. `ratio` is the peer's time divided by this project's: above 1, this project is faster.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
import weakref
from functools import lru_cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]
import bench_convolutions  # noqa: E402
import bench_editors  # noqa: E402
from bench_measuring import wait  # noqa: E402

from sifm_min import images, metrics  # noqa: E402
from sifm_min.judging.edits import read_edits  # noqa: E402
from sifm_min.judging.panels import Panel  # noqa: E402
from sifm_min.judging.run import run  # noqa: E402
from sifm_min.metrics import backbones  # noqa: E402
from sifm_min.models import mmdit  # noqa: E402
from sifm_min.models.mmdit import MMDiT, MMDiTConfig  # noqa: E402
from sifm_min.models.vae import AutoencoderKL, VAEConfig  # noqa: E402

# -------------------------------------------------------------------------------------------------------------- metrics

def bench_metrics(args):
    piq = peer("piq")
    ours = {
        "psnr": metrics.psnr,
        "ssim": metrics.ssim,
        "ssim, downsampled": lambda dist, ref: metrics.ssim(dist, ref, downsample=True),
        "vifp": metrics.vifp,
        "fsim": lambda dist, ref: metrics.fsim(dist, ref, chromatic=False),
        "fsimc": metrics.fsim,
        "lpips alex": lambda dist, ref: metrics.lpips(dist, ref, weights=random_weights("alex")),
    }
    theirs = {
        "psnr": lambda dist, ref: piq.psnr(dist, ref, reduction="none"),
        "ssim": lambda dist, ref: piq.ssim(dist, ref, downsample=False, reduction="none"),
        "ssim, downsampled": lambda dist, ref: piq.ssim(dist, ref, reduction="none"),
        "vifp": lambda dist, ref: piq.vif_p(dist, ref, reduction="none"),
        "fsim": lambda dist, ref: piq.fsim(dist, ref, chromatic=False, reduction="none"),
        "fsimc": lambda dist, ref: piq.fsim(dist, ref, reduction="none"),
    } if piq else {}
    print(f"{args.size}x{args.size} RGB, float32, {args.device}, {'with' if args.backward else 'without'} the gradient")
    print(f"milliseconds{' of CPU time' if args.cpu_time else ''} a call, the least of {args.repeat}")
    for batch in (1, args.batch):
        dist, ref = (pixels.to(args.device) for pixels in photographs(batch, args.size))
        print(f"\n{'batch of ' + str(batch):20}{'ours':>10}{'piq':>10}{'ratio':>8}{'differ by':>12}")
        for name in args.only or ours:
            if name not in ours:
                raise SystemExit(f"--only {name}: choose from {', '.join(ours)}")
            calls = [with_gradient(call) if args.backward else call for call in (ours[name], theirs.get(name)) if call]
            times, values = race([partial(call, dist, ref) for call in calls], args)
            row = f"{name:20}{1e3 * times[0]:10.1f}"
            if len(calls) > 1:
                apart = (values[0] - values[1]).abs().max().item()
                row += f"{1e3 * times[1]:10.1f}{times[1] / times[0]:8.2f}{apart:12.1e}"
            print(row, flush=True)


def photographs(batch, size):
    """(distorted, reference), (B,3,size,size): noise with the spectrum of a photograph, and the same with a perturbation."""
    generator = torch.Generator().manual_seed(0)
    frequency = torch.hypot(torch.fft.fftfreq(size)[:, None], torch.fft.rfftfreq(size)).clamp(min=1 / size)
    spectrum = torch.fft.rfft2(torch.randn(batch, 3, size, size, generator=generator)) / frequency
    ref = torch.fft.irfft2(spectrum, s=(size, size))
    low, high = ref.amin((2, 3), keepdim=True), ref.amax((2, 3), keepdim=True)
    ref = (ref - low) / (high - low)
    return (ref + 8 / 255 * torch.randn(ref.shape, generator=generator).sign()).clamp(0, 1), ref


@lru_cache
def random_weights(network):
    """LPIPS' network with random convolutions: as fast as with the published ones, without a download."""
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator) / 10
               for name, shape in backbones.NETWORKS[network].shapes.items()}
    return metrics.LPIPSWeights(network, tensors | metrics.linear_layers(network), "", False, None)


# ------------------------------------------------------------------------------------------------------ shared by them

def peer(name):
    """The package; None, with a remark, where it is not installed."""
    try:
        return __import__(name)
    except ImportError as error:
        print(f"{name} is not compared with: {error}")
        return None


def race(calls, args):
    """The least seconds of each call, taking turns, and their values."""
    clock = time.process_time if args.cpu_time else time.perf_counter
    values, least = [call() for call in calls], [float("inf")] * len(calls)
    for _ in range(args.repeat):
        for i, call in enumerate(calls):
            wait(args.device)
            start = clock()
            call()
            wait(args.device)
            least[i] = min(least[i], clock() - start)
    return least, values


def with_gradient(call):
    def run(dist, ref):
        dist = dist.detach().requires_grad_()
        value = call(dist, ref)
        torch.autograd.grad(value.sum(), dist)
        return value.detach()
    return run


# ---------------------------------------------------------------------------------------------------------------- judge

# The service runs in another process: the tests' server, which delays every answer by this many seconds.
SERVICE = """
import sys; sys.path.insert(0, {tests!r})
from fake_gemini import FakeGemini, after, verdict
with FakeGemini() as server:
    server.script("gemini-2.5-pro", [after({latency}, verdict(True, False))])
    print(server.url(), flush=True)
    sys.stdin.read()
"""


def bench_judge(args):
    os.environ["JUDGE_KEY"] = "none"
    tests = str(Path(__file__).resolve().parents[1] / "tests" / "support")
    service = subprocess.Popen([sys.executable, "-c", SERVICE.format(tests=tests, latency=args.latency)], text=True,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with tempfile.TemporaryDirectory() as folder:
        folder, url, rows = Path(folder), service.stdout.readline().strip(), []
        one = images.to_image(photographs(1, args.size)[0])
        for i in range(args.samples):                        # 50 originals; every edit differs in one pixel
            if i < 50:
                one.putpixel((0, 0), (i, 0, 0))
                one.save(folder / f"original{i}.png", compress_level=1)
            one.putpixel((1, 1), (i % 256, i // 256, 0))
            one.save(folder / f"edited{i}.png", compress_level=1)
            rows.append({"sample_id": str(i), "image_id": str(i % 50), "prompt_id": str(i), "original": f"original{i % 50}.png",
                         "edited": f"edited{i}.png", "prompt": "make her a witch", "arm": "sifm"})
        (folder / "edits.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        spec = {"provider": "gemini", "model": "gemini-2.5-pro", "base_url": url, "key_env": "JUDGE_KEY"}
        (folder / "panel.json").write_text(json.dumps({"id": "bench", "date": "2026-11-21", "judges": [spec]}))
        panel, samples = Panel.load(folder / "panel.json"), read_edits(folder / "edits.jsonl")
        for name in ("asking", "again, all known"):
            started, cpu = time.perf_counter(), time.process_time()
            found = run(panel, samples, folder / "out", concurrency=args.concurrency, accept=True)
            seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
            if [record.sample_id for record in found.records] != [row["sample_id"] for row in rows]:
                raise SystemExit("the records are not in the manifest's order")
            calls = found.summary["calls"]
            print(f"{name}: {args.samples} samples of {args.size}x{args.size} in {seconds:.1f} s, {cpu:.1f} s of CPU; the "
                  f"service alone needs {calls * args.latency / args.concurrency:.1f} s for {calls} calls", flush=True)
    service.communicate()


# --------------------------------------------------------------------------------------------------------------- memory

def bench_memory(args):
    """Peak memory of one SIFM step on Stable Diffusion 3 medium, everything but transformer and VAE encoder released.

    With --device cuda it is measured. Elsewhere it is counted on torch's meta device, which computes nothing: the weights and
    the tensors that autograd keeps at the peak, with fused attention. Temporary tensors of single operations and the
    allocator's waste are then left out.
    """
    measured = args.device.startswith("cuda")
    device = torch.device(args.device if measured else "meta")
    with device:
        vae = AutoencoderKL(VAEConfig(block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=16,
                                      use_quant_conv=False, use_post_quant_conv=False))
        denoiser = MMDiT(MMDiTConfig(num_layers=24, num_attention_heads=24, attention_head_dim=64, joint_attention_dim=4096,
                                     pooled_projection_dim=2048, pos_embed_max_size=192, caption_projection_dim=1536))
    encoder, denoiser = vae.encoder.requires_grad_(False), denoiser.to(torch.bfloat16).requires_grad_(False)
    taps = mmdit.default_taps(denoiser.config)
    weights = sum(p.nbytes for network in (encoder, denoiser) for p in (*network.parameters(), *network.buffers()))
    print(f"{'measured on' if measured else 'counted, not measured, for'} {args.size}x{args.size}, bfloat16 (VAE float32), "
          f"taps to {taps[-1]}; weights {weights / 2**30:.2f} GiB")
    print(f"{'timesteps at once':20}{'checkpointing':>16}{'peak GiB':>12}")
    for count in (1, 4):
        for checkpointing in (False, True):
            denoiser.checkpointing = checkpointing
            peak = peak_of_step(encoder, denoiser, taps, count, args.size, device, measured, weights)
            print(f"{count:<20}{'blocks' if checkpointing else 'none':>16}{peak / 2**30:12.2f}", flush=True)


def peak_of_step(encoder, denoiser, taps, count, size, device, measured, weights):
    """Peak bytes of one step: encode, features at `count` timesteps in one batch, both gradients."""
    pixels = torch.zeros(1, 3, size, size, device=device, requires_grad=True)
    text = torch.zeros(1, 333, denoiser.config.joint_attention_dim, device=device, dtype=torch.bfloat16)
    pooled = torch.zeros(1, denoiser.config.pooled_projection_dim, device=device, dtype=torch.bfloat16)
    timesteps = torch.full((count,), 500.0, device=device)
    if measured:
        torch.cuda.reset_peak_memory_stats(device)
    kept = Kept()
    with kept if not measured else contextlib.nullcontext():
        latent = encoder(2 * pixels - 1)[:, :denoiser.config.in_channels]
        inner = latent.detach().requires_grad_(True)
        found = denoiser.features(inner.expand(count, -1, -1, -1).to(torch.bfloat16), timesteps, text, pooled, taps=taps)
        loss = sum(activation.float().abs().mean() for activation in found.values())
        (gradient,) = torch.autograd.grad(loss, inner)
        del found, loss
        torch.autograd.grad((latent * gradient).sum(), pixels)
    return torch.cuda.max_memory_allocated(device) if measured else weights + kept.most


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


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--threads", type=int, help="of torch (default: its own choice)")
    shared.add_argument("--device", default="cpu")
    shared.add_argument("--repeat", type=int, default=5)
    shared.add_argument("--cpu-time", action="store_true", help="count CPU seconds, not the clock's: where others compute too")
    command = commands.add_parser("metrics", parents=[shared], help="the five distances, beside piq")
    command.add_argument("--size", type=int, default=512)
    command.add_argument("--batch", type=int, default=16)
    command.add_argument("--backward", action="store_true", help="with the gradient of the first argument")
    command.add_argument("--only", type=lambda text: text.split(","), help="such as vifp,fsim")
    command.set_defaults(run=bench_metrics)
    command = commands.add_parser("memory", parents=[shared], help="one SIFM step on Stable Diffusion 3 at full size")
    command.add_argument("--size", type=int, default=512)
    command.set_defaults(run=bench_memory)
    command = commands.add_parser("judge", parents=[shared], help="a run against a slow service on the loopback interface")
    command.add_argument("--samples", type=int, default=1000)
    command.add_argument("--size", type=int, default=512)
    command.add_argument("--latency", type=float, default=1.0, metavar="SECONDS")
    command.add_argument("--concurrency", type=int, default=16)
    command.set_defaults(run=bench_judge)
    bench_editors.add(commands, shared)
    bench_convolutions.add(commands, shared)
    args = parser.parse_args(argv)
    args.argv = sys.argv[1:] if argv is None else argv
    if args.threads:
        torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    args.run(args)


if __name__ == "__main__":
    main()
