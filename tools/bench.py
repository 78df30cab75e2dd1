"""Measure how fast parts of this project are, each beside a peer where one is installed, in one run on the same threads.

    python tools/bench.py metrics                       the distances, beside piq: one pair, and a batch of 16, at 512x512
    python tools/bench.py metrics --threads 1 --repeat 9 --backward

A subcommand is a function that takes the parsed arguments, and an entry in `main`. Times are the least of --repeat calls
that alternate between ours and the peer's, after one that warms both up: on a shared machine the least is what a call
costs, and the rest is what the neighbours do. `ratio` is the peer's time over ours: above 1, ours is faster.
"""

import argparse
import sys
import time
from functools import lru_cache, partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from sifm_min import backbones, metrics  # noqa: E402

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
    """(distorted, reference), (B,3,size,size): noise of a photograph's spectrum, and the same with a perturbation."""
    generator = torch.Generator().manual_seed(0)
    frequency = torch.hypot(torch.fft.fftfreq(size)[:, None], torch.fft.rfftfreq(size)).clamp(min=1 / size)
    spectrum = torch.fft.rfft2(torch.randn(batch, 3, size, size, generator=generator)) / frequency
    ref = torch.fft.irfft2(spectrum, s=(size, size))
    low, high = ref.amin((2, 3), keepdim=True), ref.amax((2, 3), keepdim=True)
    ref = (ref - low) / (high - low)
    return (ref + 8 / 255 * torch.randn(ref.shape, generator=generator).sign()).clamp(0, 1), ref


@lru_cache
def random_weights(network):
    """LPIPS' network with random convolutions: as fast as the published ones, and no download."""
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator) / 10
               for name, shape in backbones.NETWORKS[network].shapes.items()}
    return metrics.LPIPSWeights(network, tensors | metrics.linear_layers(network), "", False, None)


# ------------------------------------------------------------------------------------------------------ shared by them

def peer(name):
    """The package, or None, saying so, where it is not installed."""
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


def wait(device):
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def with_gradient(call):
    def run(dist, ref):
        dist = dist.detach().requires_grad_()
        value = call(dist, ref)
        torch.autograd.grad(value.sum(), dist)
        return value.detach()
    return run


def main():
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
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    args.run(args)


if __name__ == "__main__":
    main()
