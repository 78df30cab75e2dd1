"""The bench of convolutions: torch's own beside the CPU kernels, for every shape of InstructPix2Pix's U-Net and VAE.

    python tools/bench.py convolutions --threads 1 --size 256 --pictures 1,4

The shapes are read off the networks as they run on torch's meta device. For each, torch's convolution takes turns with
Winograd's method and with the matrix product, each where it is defined. A ratio is the least time of the CPU kernel over the
least time of torch: below 1, the kernel gains. Times are those of the process, because others compute on a shared machine too.
"""

import json
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]
from bench_measuring import figure, save, table  # noqa: E402
from bench_peers import FULL  # noqa: E402

from sifm_min.models import cpu, winograd  # noqa: E402
from sifm_min.models.lean import Conv2d  # noqa: E402
from sifm_min.models.unet import UNet, UNetConfig  # noqa: E402
from sifm_min.models.vae import AutoencoderKL, VAEConfig  # noqa: E402

NETWORKS = {"unet": (UNet, UNetConfig), "vae": (AutoencoderKL, VAEConfig)}


def shapes(name, network, size, pictures):
    """{(pictures, in, out, height, width of the input, kernel, stride, padding): how many layers} of one pass."""
    found = {}

    def note(layer, inputs, output):
        (x,) = inputs
        key = (*x.shape[:1], layer.in_channels, layer.out_channels, *x.shape[2:], layer.kernel_size[0], layer.stride[0],
               layer.padding[0])
        found[key] = found.get(key, 0) + 1

    for module in network.modules():
        if isinstance(module, Conv2d):
            module.register_forward_hook(note)
    with torch.no_grad(), torch.device("meta"):
        if name == "unet":
            network(torch.empty(pictures, network.config.in_channels, size // 8, size // 8), 500,
                    torch.empty(1, 77, network.config.cross_attention_dim))
        else:
            mean, _ = network.encode(torch.empty(pictures, 3, size, size))
            network.decode(mean)
    return found


def alternating(calls, seconds):
    """{name: the least seconds of a call}: one round to warm up, then at least two, and more until the time is spent."""
    least, spent, rounds = dict.fromkeys(calls, float("inf")), 0.0, 0
    while rounds < 3 or spent < seconds and rounds < 30:
        for name in list(calls)[::1 if rounds % 2 else -1]:
            started = time.process_time()
            calls[name]()
            took = time.process_time() - started
            spent += took
            if rounds:
                least[name] = min(least[name], took)
        rounds += 1
    return least


def measured(key, seconds):
    """{"forward", "gradient": {method: seconds}} of a convolution of that shape, channels-last, in float32."""
    count, ins, outs, height, width, kernel, stride, padding = key
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(shape, generator=generator).contiguous(memory_format=torch.channels_last)
                 for shape in ((count, ins, height, width), (outs, ins, kernel, kernel)))
    bias, steps, pads = torch.randn(outs, generator=generator), (stride, stride), (padding, padding)
    with torch.no_grad():
        y = F.conv2d(x, weight, bias, steps, pads)
        left = (height + 2 * padding - kernel) % stride
        forward = {"torch": partial(F.conv2d, x, weight, bias, steps, pads)}
        gradient = {"torch": partial(F.conv_transpose2d, y, weight, None, steps, pads, left)}
        if kernel == 3 and stride == padding == 1:
            forward["Winograd"] = partial(winograd.convolve, x, weight, bias)
            gradient["Winograd"] = partial(winograd.gradient, y, weight)
        if count * y.shape[2] * y.shape[3] <= 1024:
            forward["product"] = partial(cpu.product, x, weight, bias, steps, pads)
            if stride == 1 and y.shape[2:] == x.shape[2:]:
                gradient["product"] = partial(cpu.product_gradient, y, weight)
        return {"forward": alternating(forward, seconds), "gradient": alternating(gradient, seconds)}


def bench_convolutions(args):
    """Print a row for each shape: how often it occurs, seconds of torch, and the ratios of the kernels."""
    rows, found = [], []
    for name in args.networks:
        network, config = NETWORKS[name]
        kind = config.from_json(json.dumps(FULL["instruct-pix2pix"][name][2]))
        with torch.device("meta"):
            network = network(kind)
        keys = {}
        for pictures in args.pictures if name == "unet" else args.pictures[:1]:
            keys |= shapes(name, network, args.size, pictures)
        for key, layers in keys.items():
            if min(key[1:3]) < 64 or key[5] == 1 and key[0] * key[3] * key[4] > 1024:
                continue
            times = measured(key, args.seconds)
            found.append({"network": name, "shape": key, "layers": layers, "seconds": times})
            ratios = [figure(times[way][kernel] / times[way]["torch"] if kernel in times[way] else None)
                      for way in ("forward", "gradient") for kernel in ("Winograd", "product")]
            count, ins, outs, height, width, kernel, stride, _ = key
            rows.append([name, count, f"{ins} -> {outs}", f"{height}x{width}", f"{kernel}x{kernel}/{stride}", layers,
                         figure(1e3 * times["forward"]["torch"], 1), figure(1e3 * times["gradient"]["torch"], 1), *ratios])
            print(*rows[-1], sep="\t", flush=True)
    table(["network", "pictures", "channels", "size", "kernel", "layers", "torch, ms", "gradient, ms", "Winograd", "product",
           "Winograd, gradient", "product, gradient"], rows)
    save(args, {"rows": found})


def add(commands, shared):
    """The bench's command, among those of tools/bench.py."""
    made = commands.add_parser("convolutions", parents=[shared], help="torch's convolutions beside the CPU kernels")
    made.set_defaults(run=bench_convolutions, threads=1)
    made.add_argument("--size", type=int, default=256, help="side of the picture (default: 256)")
    made.add_argument("--pictures", type=lambda text: [int(n) for n in text.split(",")], default=[1, 4],
                      help="latents at once in the U-Net (default: 1,4); the VAE takes the first number")
    made.add_argument("--networks", type=lambda text: text.split(","), default=["unet", "vae"])
    made.add_argument("--seconds", type=float, default=0.5, help="spent on each shape and direction (default: 0.5)")
    made.add_argument("--json", metavar="FILE", help="write everything found there")
