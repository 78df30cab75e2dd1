"""The benches of whole editors, each beside diffusers on the same weights; tools/bench.py is their command.

    step    one SIFM step, beside Algorithm 1 of the paper as one would write it on diffusers' networks (`Naive`)
    edit    an edit, beside diffusers' pipeline with the same scheduler
    load    cold files to the first SIFM step, each side in a process of its own

The two sides take turns in one process; a ratio is ours over theirs within a round, and what is printed are medians over
the rounds. Memory is what a call holds at its worst moment over what rested before it. What is not measured says so.
"""

import contextlib
import gc
import json
import os
import statistics
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional as F
from torch.utils import flop_counter

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]
from bench_peers import DTYPES, PROMPTS, Naive, Ours, peer_lacks, picture, weights  # noqa: E402

from sifm_min.editors import load_editor  # noqa: E402

# ----------------------------------------------------------------------------------------------------------- measuring

def status(*keys):
    """Bytes of this process by /proc, in that order; None where there is no such file."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return [int(lines[key].split()[0]) * 1024 for key in keys]
    except (OSError, KeyError):
        return [None] * len(keys)


def measured(call, device):
    """{"wall", "cpu": seconds, "memory": bytes at the worst moment over those at rest, or None; "value"} of a call."""
    gc.collect()
    cuda, rest = device.startswith("cuda"), None
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        rest = torch.cuda.memory_allocated()
    else:
        with contextlib.suppress(OSError):                   # elsewhere than on Linux
            Path("/proc/self/clear_refs").write_text("5")    # the peak begins anew
            (rest,) = status("VmRSS")
    wall, cpu = time.perf_counter(), time.process_time()
    value = call()
    if cuda:
        torch.cuda.synchronize()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peak = torch.cuda.max_memory_allocated() if cuda else status("VmHWM")[0]
    return {"wall": wall, "cpu": cpu, "memory": None if None in (rest, peak) else peak - rest, "value": value}


def clock(args):
    """Which of the two times is looked at: a thread's own on a shared CPU, else the wall's."""
    return "cpu" if args.device == "cpu" and args.threads == 1 else "wall"


def meter(args):
    if args.device.startswith("cuda"):
        return lambda: torch.cuda.synchronize() or time.perf_counter()
    return time.process_time if clock(args) == "cpu" else time.perf_counter


def peak_rates(args, dtype):
    """FLOP/s of this machine as it is now: the best of a few large matrix products, and of a few 3x3 convolutions."""
    cuda = args.device.startswith("cuda")
    side, batch = (8192, 16) if cuda else (1536, 1)
    make = partial(torch.ones, device=args.device, dtype=dtype)
    now, best = meter(args), {"mm": 0.0, "conv": 0.0}
    cases = [("mm", torch.mm, make(side, side), make(side, side), 2 * side**3)]
    for channels, size in ((128, 128), (256, 64), (512, 32)):
        for layout in (torch.contiguous_format, torch.channels_last):
            cases.append(("conv", partial(F.conv2d, padding=1), make(batch, channels, size, size).to(memory_format=layout),
                          make(channels, channels, 3, 3).to(memory_format=layout), 18 * batch * (channels * size) ** 2))
    with torch.no_grad():
        for kind, call, a, b, flops in cases:
            for _ in range(6):
                start = now()
                call(a, b)
                best[kind] = max(best[kind], flops / max(now() - start, 1e-9))
    return best


class Stages:
    """While it is entered, splits a step of ours over its stages, by what `meter` counts: seconds, or FLOPs."""

    def __init__(self, ours, meter):
        self.ours, self.meter, self.spent, self.stage = ours, meter, {}, "other"

    def during(self, stage, call):
        def run(*args, **options):
            name = stage or ("VAE backward" if self.stage == "other" else "denoiser backward")
            before = self.enter(name)
            try:
                return call(*args, **options)
            finally:
                self.enter(before)
        return run

    def enter(self, stage):
        now = self.meter()
        self.spent[self.stage] = self.spent.get(self.stage, 0) + now - self.at
        before, self.at, self.stage = self.stage, now, stage
        return before

    def __enter__(self):
        ours, editor = self.ours, self.ours.editor
        self.before = torch.autograd.grad, ours.objective
        editor.encode, editor.features = (self.during(name, call) for name, call in (
            ("VAE forward", editor.encode), ("denoiser forward", editor.features)))
        ours.objective = self.during("objective", ours.objective)
        torch.autograd.grad = self.during(None, torch.autograd.grad)     # inside the objective the denoiser's, then the VAE's
        self.at = self.meter()
        return self

    def __exit__(self, *error):
        self.enter("other")
        torch.autograd.grad, self.ours.objective = self.before
        del self.ours.editor.encode, self.ours.editor.features
        self.spent["other"] += self.spent.pop("objective", 0)


def count_flops(ours, x):
    """{stage: FLOPs} of one step: matrix products, convolutions and attention, as torch counts them."""
    aten = torch.ops.aten
    fused = {}                                               # which torch counts on GPUs alone
    if hasattr(aten, "_scaled_dot_product_flash_attention_for_cpu"):
        def forward(q, k, v, *args, out_shape=None, **options):
            return flop_counter.sdpa_flop_count(q, k, v)

        def backward(gradient, q, k, v, *args, out_shape=None, **options):
            return flop_counter.sdpa_backward_flop_count(gradient, q, k, v)

        fused = {aten._scaled_dot_product_flash_attention_for_cpu: forward,
                 aten._scaled_dot_product_flash_attention_for_cpu_backward: backward}
    with flop_counter.FlopCounterMode(display=False, custom_mapping=fused) as counter, \
            Stages(ours, counter.get_total_flops) as stages:
        ours(x, 0)
    return stages.spent


KINDS = {"attention": ("attention", "flash", "softmax"), "convolution": ("conv",), "matrix product": ("mm", "linear"),
         "normalisation": ("norm",), "copies and layout": ("copy", "clone", "cat", "fill", "zero", "pad", "empty")}


def profile(ours, x, device):
    """({kind of operation: share of the time}, [(operation that is no convolution or matrix product, share), ...])."""
    from torch.profiler import ProfilerActivity
    cuda = device.startswith("cuda")
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU] +
                                [ProfilerActivity.CPU] * cuda) as found:
        ours(x, 0)
    spent = {}
    for event in found.key_averages():
        name = event.key.removeprefix("aten::")
        spent[name] = spent.get(name, 0) + (event.self_device_time_total if cuda else event.self_cpu_time_total)
    total, shares, lost = sum(spent.values()) or 1, dict.fromkeys((*KINDS, "element-wise and other"), 0.0), []
    for name, time_spent in sorted(spent.items(), key=lambda item: -item[1]):
        kind = next((kind for kind, words in KINDS.items() if any(word in name for word in words)), "element-wise and other")
        shares[kind] += time_spent / total
        if kind not in ("attention", "convolution", "matrix product"):
            lost.append((name, time_spent / total))
    return shares, lost[:8]


def agreement(a, b):
    """(cosine, share of equal signs) of two gradients."""
    a, b = (g.double().flatten().cpu() for g in (a, b))
    return F.cosine_similarity(a, b, dim=0).item(), (a.sign() == b.sign()).double().mean().item()


def table(head, rows):
    """Print rows as Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    print("\n" + "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines), flush=True)


def figure(value, digits=2):
    return "not measured" if value is None else f"{value:.{digits}f}"


def mebibytes(value):
    return figure(None if value is None else value / 2**20, 0)


def percent(value):
    return "not measured" if value is None else f"{100 * value:.1f} %"


def middle(values):
    """The median; None where something was not measured."""
    values = list(values)
    return None if not values or None in values else statistics.median(values)


def over(a, b):
    return a / b if a is not None and b else None


def save(args, found):
    found |= {"command": " ".join(["python", "tools/bench.py", *args.argv]), "torch": torch.__version__,
              "threads": torch.get_num_threads(), "device": torch.cuda.get_device_name() if "cuda" in args.device else "cpu",
              "malloc_mmap_threshold": os.environ.get("MALLOC_MMAP_THRESHOLD_")}
    if args.device == "cpu":
        print("\nNothing here was measured on a GPU.")
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=1) + "\n")
    return found

# ---------------------------------------------------------------------------------------------------------------- step

def bench_step(args):
    with weights(args) as (folder, name):
        editor, lacking, peer = open_sides(args, folder)
        pixels, x = (each.to(args.device) for each in picture(sides_of(editor, args)))
        taps = list(args.taps or (["mid_block"] if "mid_block" in editor.tap_names else editor.default_taps))
        if not lacking and (odd := [tap for tap in taps if tap.endswith(".probs")]):
            lacking = f"{odd[0]} is no module of diffusers'"
        with torch.no_grad():
            contexts = editor.contexts([PROMPTS[i % len(PROMPTS)] + i // len(PROMPTS) * " again" for i in range(args.prompts)])
        rates = {dtype: peak_rates(args, dtype) for dtype in {editor.dtype, editor.vae_dtype}}
        pairs = {}
        for count in args.timesteps:
            T = editor.timesteps(count)
            pairs[count] = [Ours(editor, pixels, contexts, T, taps, **dict(args.option))]
            if not lacking:
                pairs[count].append(Naive(*peer).prepare(pixels, contexts, T, taps))
            for n in range(args.prompts):                    # the original's activations, which later steps have
                pairs[count][0](x, n)
            if count == args.timesteps[0]:
                for side in pairs[count][1:]:
                    side(x, 0)
        rounds = {count: [] for count in args.timesteps}
        for i in range(args.repeat):
            for count, pair in pairs.items():
                turn = pair if i % 2 == 0 else pair[::-1]
                found = {side: measured(partial(side, x, i), args.device) for side in turn}
                rounds[count].append([found[side] for side in pair])
        found = {"bench": "step", "editor": name, "size": pixels.shape[-1], "taps": taps, "prompts": args.prompts,
                 "dtype": args.dtype, "options": dict(args.option), "peer": lacking or f"naive, {args.peer_dtype}",
                 "clock": clock(args), "peak_gflops": {str(dtype).removeprefix("torch."): {
                     kind: rate / 1e9 for kind, rate in best.items()} for dtype, best in rates.items()},
                 "timesteps": {count: one_count(args, pairs[count][0], x, rounds[count], rates) for count in args.timesteps}}
        return tell_step(args, found)


def sides_of(editor, args):
    """The side of the picture: of a miniature its own, whatever was asked for."""
    if args.size and not editor.is_miniature:
        editor.defaults = replace(editor.defaults, size=max(args.size, 512))
    return max(editor.frame(*[args.size or editor.working_size] * 2))


def open_sides(args, folder):
    """(our editor, why there is no peer or "", the arguments of `Naive`)."""
    editor = load_editor(folder, device=args.device, dtype=DTYPES[args.dtype])
    lacking = "asked for ours alone" if args.alone else peer_lacks(editor)
    if lacking:
        print(f"ours alone: {lacking}")
    return editor, lacking, None if lacking else Naive.networks(folder, DTYPES[args.peer_dtype], args.device)


def one_count(args, ours, x, rounds, rates):
    """What was found for one number of timesteps."""
    own = clock(args)
    found = {side: {key: middle(pair[i][key] for pair in rounds) for key in ("cpu", "wall", "memory")}
             for i, side in enumerate(("ours", "peer")[:len(rounds[0])])}
    if "peer" in found:
        found["ratio"] = {key: middle(over(a[key], b[key]) for a, b in rounds) for key in ("cpu", "wall", "memory")}
        found["cosine"], found["same_sign"] = agreement(*(one["value"] for one in rounds[0]))
    if args.profile:
        with Stages(ours, meter(args)) as stages:
            ours(x, 0)
        whole = sum(stages.spent.values())
        found["stages"] = {stage: spent / whole for stage, spent in stages.spent.items()}
        found["gflop"] = {stage: flops / 1e9 for stage, flops in count_flops(ours, x).items()}
        seconds = {stage: 1e9 * flops / max(rates[ours.editor.vae_dtype if "VAE" in stage else ours.editor.dtype].values())
                   for stage, flops in found["gflop"].items()}
        found["floor"] = {"seconds": sum(seconds.values()), "reached": over(sum(seconds.values()), found["ours"][own])}
        found["operations"], found["lost_to"] = profile(ours, x, args.device)
    return found


def tell_step(args, found):
    own = found["clock"]
    print(f"\n{found['editor']}, {found['size']}x{found['size']}, taps {', '.join(found['taps'])}, {found['prompts']} "
          f"prompt(s), {found['dtype']} (VAE float32); peer: {found['peer']}")
    print("this machine's peak, GFLOP/s: " + "; ".join(
        f"{dtype} matrix product {best['mm']:.0f}, 3x3 convolution {best['conv']:.0f}"
        for dtype, best in found["peak_gflops"].items()))
    rows = []
    for count, one in found["timesteps"].items():
        ratio = one.get("ratio", {})
        rows.append([count, figure(one["ours"][own]), *(figure(value) for value in (
            one.get("peer", {}).get(own), ratio.get(own), ratio.get("wall"))), mebibytes(one["ours"]["memory"]),
            mebibytes(one.get("peer", {}).get("memory")), figure(ratio.get("memory")), figure(one.get("cosine"), 6),
            figure(one.get("same_sign"), 5)])
    table(["timesteps", f"ours, {own} s", "peer", "ratio", "ratio, wall", "ours, MiB over the weights", "peer", "ratio",
           "cosine", "same sign"], rows)
    if args.profile:
        names = ["VAE forward", "denoiser forward", "denoiser backward", "VAE backward", "other"]
        table(["timesteps", *names, "GFLOP", "floor, s", "of it reached"],
              [[count, *(percent(one["stages"].get(name, 0)) for name in names), figure(sum(one["gflop"].values()), 1),
                figure(one["floor"]["seconds"]), percent(one["floor"]["reached"])]
               for count, one in found["timesteps"].items()])
        table(["timesteps", *KINDS, "element-wise and other", "the largest that are no matrix product or convolution"],
              [[count, *(percent(share) for share in one["operations"].values()),
                ", ".join(f"{name} {percent(share)}" for name, share in one["lost_to"])]
               for count, one in found["timesteps"].items()])
    return save(args, found)


# ---------------------------------------------------------------------------------------------------------- the command

def steady_memory():
    """Starts this command anew with large blocks returned to the system once they are free: glibc's own habit of keeping
    some of them would decide what peaks. What was set outside stays as it is."""
    if sys.platform == "linux" and "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000"})


def option(text):
    name, _, value = text.partition("=")
    with contextlib.suppress(ValueError):
        return name, json.loads(value)
    return name, value


def add(commands, shared):
    """The benches' commands, among those of tools/bench.py."""
    def command(name, run, what, *, repeat):
        made = commands.add_parser(name, parents=[shared], help=what)
        made.set_defaults(run=run, threads=1, repeat=repeat)
        made.add_argument("--editor", default="instruct-pix2pix", metavar="NAME", help="instruct-pix2pix or sd3, at full size "
                          "with random weights (default: instruct-pix2pix); miniature; or a folder")
        made.add_argument("--folder", help="where the random weights are written and, if they lie there, taken from")
        made.add_argument("--size", type=int, default=256, help="side of the picture (default: 256)")
        made.add_argument("--dtype", default="float32", choices=DTYPES, help="of our denoiser (default: float32)")
        made.add_argument("--peer-dtype", default="float32", choices=DTYPES, help="of all that the peer has")
        made.add_argument("--alone", action="store_true", help="without the peer")
        made.add_argument("--json", metavar="FILE", help="write everything found there")
        return made

    made = command("step", bench_step, "one SIFM step, beside a naive one on diffusers", repeat=3)
    made.add_argument("--timesteps", type=lambda text: [int(n) for n in text.split(",")], default=[1, 4, 10],
                      help="how many, comma-separated (default: 1,4,10)")
    made.add_argument("--prompts", type=int, default=1)
    made.add_argument("--taps", type=lambda text: text.split(","), help="default: mid_block; of a transformer its own")
    made.add_argument("--option", type=option, action="append", default=[], metavar="NAME=VALUE", help="of `sifm`, as batch=2")
    made.add_argument("--no-profile", dest="profile", action="store_false", help="times, memory and agreement alone")
