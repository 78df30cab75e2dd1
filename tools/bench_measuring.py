"""The measures of the editors' benches: time, memory, the stages of a step, its FLOPs against the machine's, agreement."""

import contextlib
import ctypes
import gc
import json
import statistics
import sys
import threading
import time
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional as F
from torch.utils import flop_counter

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from sifm_min.models import cpu  # noqa: E402


def status(*keys):
    """Bytes of this process by /proc, in that order; None where there is no such file."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return [int(lines[key].split()[0]) * 1024 for key in keys]
    except (OSError, KeyError):
        return [None] * len(keys)


def glibc(name, *numbers):
    """Call a function of glibc; do nothing where the C library is another."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        getattr(ctypes.CDLL(None), name)(*numbers)


def give_back():
    """Return freed memory to the system; otherwise a call that reuses it would seem to need none."""
    glibc("malloc_trim", 0)


def keep_memory(keeping):
    """Let the allocator keep large free blocks, or return each to the system. To measure memory it must return them from the
    first call on; otherwise the blocks that it keeps decide the peak. To measure time it must keep them, as in normal use:
    new memory costs more time for larger tensors."""
    mmap, trim = -3, -1                                      # glibc's M_MMAP_THRESHOLD and M_TRIM_THRESHOLD
    glibc("mallopt", mmap, 2**25 if keeping else 10**6)      # where its own adapting ends
    glibc("mallopt", trim, 2**26 if keeping else 2**17)


def wait(device):
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def timed(call, device):
    """{"wall", "cpu": seconds; "value"} of a call."""
    gc.collect()
    wait(device)
    wall, cpu = time.perf_counter(), time.process_time()
    value = call()
    wait(device)
    return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu, "value": value}


def most_memory(call, device):
    """Peak bytes of a call above those at rest; None where the system does not report them."""
    gc.collect()
    if device.startswith("cuda"):
        wait(device)
        torch.cuda.reset_peak_memory_stats()
        rest = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - rest
    give_back()
    try:
        Path("/proc/self/clear_refs").write_text("5")        # the peak begins anew
    except OSError:                                          # elsewhere than on Linux
        return None
    (rest,) = status("VmRSS")
    value = call()
    (peak,) = status("VmHWM")
    give_back()
    rest = max(rest, *status("VmRSS"))                       # mapped weights that the system had dropped rest again now
    del value
    return peak - rest


class Watch(threading.Thread):
    """A context that reads every few milliseconds how much memory this process holds, by kind."""

    def __init__(self):
        super().__init__(daemon=True)
        self.ended, self.most, self.anonymous, self.mapped, self.most_anonymous = threading.Event(), 0, None, None, None

    def run(self):
        while not self.ended.wait(0.005):
            whole, anonymous, mapped = status("VmRSS", "RssAnon", "RssFile")
            if whole is None:
                return
            self.most_anonymous = max(self.most_anonymous or 0, anonymous)
            if whole > self.most:
                self.most, self.anonymous, self.mapped = whole, anonymous, mapped

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *error):
        self.ended.set()
        self.join()


def read_from_disk():
    """Bytes that this process read from a disk, not from the page cache; None where the system does not report them."""
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/self/io").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("read_bytes")).split()[1])
    return None


def clock(args):
    """The name of the time to compare: a thread's own CPU time on a shared CPU, else wall time."""
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
    """A context that splits a step over its stages by the count of `meter`: seconds or FLOPs."""

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
    """{stage: FLOPs} of one step: matrix products, convolutions and attention, as torch counts them; convolutions as they
    are defined, also where a CPU finds them with fewer."""
    aten = torch.ops.aten
    fused = {}                                               # which torch counts on GPUs alone
    if hasattr(aten, "_scaled_dot_product_flash_attention_for_cpu"):
        def forward(q, k, v, *args, out_shape=None, **options):
            return flop_counter.sdpa_flop_count(q, k, v)

        def backward(gradient, q, k, v, *args, out_shape=None, **options):
            return flop_counter.sdpa_backward_flop_count(gradient, q, k, v)

        fused = {aten._scaled_dot_product_flash_attention_for_cpu: forward,
                 aten._scaled_dot_product_flash_attention_for_cpu_backward: backward}
    with cpu.kernels(on=False), flop_counter.FlopCounterMode(display=False, custom_mapping=fused) as counter, \
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
        if event.device_type != torch.autograd.DeviceType.CPU:           # a kernel, which counts for what launched it
            continue
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


def rounds_of(calls, args):
    """{key: rounds} of {key: [ours, the peer's]}, both called with the number of the round: the results of `timed`, and in
    the first round "memory". The peer's is called first in every other round."""
    held = {key: [most_memory(partial(call, 0), args.device) for call in pair] for key, pair in calls.items()}
    keep_memory(True)
    rounds = {key: [] for key in calls}
    for i in range(args.repeat):
        for key, pair in calls.items():
            order = list(enumerate(pair))
            found = {n: timed(partial(call, i), args.device) for n, call in (order if i % 2 == 0 else order[::-1])}
            if i == 0:
                found = {n: one | {"memory": held[key][n]} for n, one in found.items()}
            rounds[key].append([found[n] for n, _ in order])
    return rounds


def compared(rounds, keys=("cpu", "wall", "memory")):
    """{"ours", "peer", "ratio": {key: median over the rounds that have it}}, of a ratio the median of the rounds' own."""
    having = {key: [one for one in rounds if key in one[0]] for key in keys}
    found = {side: {key: middle(one[i][key] for one in having[key]) for key in keys}
             for i, side in enumerate(("ours", "peer")[:len(rounds[0])])}
    if "peer" in found:
        found["ratio"] = {key: middle(over(a[key], b[key]) for a, b in having[key]) for key in keys}
    return found


def heads(own):
    return [f"ours, {own} s", "peer", "ratio", "ratio, wall", "ours, MiB over the weights", "peer", "ratio"]


def cells(found, own):
    """The cells under `heads` for a result of `compared`."""
    ours, peer, ratio = (found.get(key, {}) for key in ("ours", "peer", "ratio"))
    return [figure(ours[own]), figure(peer.get(own)), figure(ratio.get(own)), figure(ratio.get("wall")),
            mebibytes(ours["memory"]), mebibytes(peer.get("memory")), figure(ratio.get("memory"))]


def save(args, found):
    found |= {"command": " ".join(["python", "tools/bench.py", *args.argv]), "torch": torch.__version__,
              "threads": torch.get_num_threads(), "device": torch.cuda.get_device_name() if "cuda" in args.device else "cpu"}
    if args.device == "cpu":
        print("\nNothing here was measured on a GPU.")
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=1) + "\n")
    return found
