"""Measure how fast parts of this project are, each beside a peer where one is installed, in one run on the same threads.

    python tools/bench.py metrics                       the distances, beside piq: one pair, and a batch of 16, at 512x512
    python tools/bench.py metrics --threads 1 --repeat 9 --backward
    python tools/bench.py memory --editor flux-klein    one SIFM step at full size, random weights (default: sd3)
    python tools/bench.py blocks --editor flux-klein    one block of each kind of FLUX, beside diffusers'
    python tools/bench.py step                          one SIFM step, beside a naive one on diffusers; so are edit and load
    python tools/bench.py latents                       one step of --editor latents, beside diffusers' AutoencoderTiny
    python tools/bench.py convolutions                  torch's convolutions beside the kernels of models/cpu.py
    python tools/bench.py judge                         a run of 1,000 samples, 16 in flight, a service that takes 1 s a call

A subcommand is a function that takes the parsed arguments, and an entry in `main`. Calls of this project and of the peer
alternate, after one warm-up each. A time is the least of --repeat calls: on a shared machine the others include the load of
other processes. `ratio` is the peer's time divided by this project's: above 1, this project is faster.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from functools import lru_cache, partial
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]
import bench_blocks  # noqa: E402
import bench_convolutions  # noqa: E402
import bench_editors  # noqa: E402
import bench_latents  # noqa: E402
import bench_memory  # noqa: E402
from bench_measuring import wait  # noqa: E402

from sifm_min import images, metrics  # noqa: E402
from sifm_min.judging.edits import read_edits  # noqa: E402
from sifm_min.judging.panels import Panel  # noqa: E402
from sifm_min.judging.run import run  # noqa: E402
from sifm_min.metrics import backbones  # noqa: E402

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
    command = commands.add_parser("judge", parents=[shared], help="a run against a slow service on the loopback interface")
    command.add_argument("--samples", type=int, default=1000)
    command.add_argument("--size", type=int, default=512)
    command.add_argument("--latency", type=float, default=1.0, metavar="SECONDS")
    command.add_argument("--concurrency", type=int, default=16)
    command.set_defaults(run=bench_judge)
    bench_memory.add(commands, shared)
    bench_blocks.add(commands, shared)
    bench_editors.add(commands, shared)
    bench_convolutions.add(commands, shared)
    bench_latents.add(commands, shared)
    args = parser.parse_args(argv)
    args.argv = sys.argv[1:] if argv is None else argv
    if args.threads:
        torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    args.run(args)


if __name__ == "__main__":
    main()
