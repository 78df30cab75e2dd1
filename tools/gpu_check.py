"""Check and measure this project on one CUDA card: one command of at most 8 minutes, which writes one JSON file.

    python tools/gpu_check.py --json gpu.json
    python tools/gpu_check.py --json gpu.json --small       minutes less: the checks, and measures of small editors alone

The checks compare the card with the CPU on small editors with random weights, of both kinds: the loss and the gradient's
signs of every method in float32, bfloat16 and float16; an edit; and the gradient under each memory plan. The measures, at
512x512 in bfloat16 with random weights at full size (InstructPix2Pix, Stable Diffusion 3): loading, one SIFM step at one
timestep and at ten, an edit, and the peak memory of each. A part that has not started when --minutes are over is left out,
and the file lists it. The exit code is 1 if a check failed.
"""

import argparse
import json
import math
import platform
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]
from bench_measuring import wait  # noqa: E402
from bench_peers import FULL, PROMPTS, TOKENS, write_editor  # noqa: E402

import sifm_min  # noqa: E402
from sifm_min import images, memory  # noqa: E402
from sifm_min.editors import load_editor  # noqa: E402
from sifm_min.models.precision import full_float32  # noqa: E402

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# The least share of gradient signs that agree with float32 on the CPU. Small random networks; real ones agree better.
AGREE = {"float32": 0.995, "bfloat16": 0.90, "float16": 0.95}
OPTIONS = {"photoguard-diffusion": {"unroll": 2},
           **{name: {"timesteps": 4} for name in ("sifm", "semantic-attack", "danp", "tdae")}}
SIZE = 64                                                    # of the pictures of the checks
TIMESTEPS = 4                                                # of the step whose memory plans are compared

# As published, narrower: every kind of block. Groups are wide enough for the one position of the coarsest level.
CLIP = {"vocab_size": len(TOKENS), "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2,
        "num_hidden_layers": 2, "projection_dim": 64}
VAE = {"block_out_channels": [32, 64, 64, 64], "layers_per_block": 1, "norm_num_groups": 8}
SMALL = {
    "instruct-pix2pix": {
        "unet": {"block_out_channels": [32, 64, 64, 64], "layers_per_block": 1, "cross_attention_dim": 64,
                 "attention_head_dim": 4, "norm_num_groups": 8},
        "vae": VAE, "text_encoder": CLIP},
    "sd3": {
        "transformer": {"num_layers": 4, "num_attention_heads": 2, "caption_projection_dim": 128, "joint_attention_dim": 128,
                        "pooled_projection_dim": 128},
        "vae": VAE, "text_encoder": CLIP, "text_encoder_2": CLIP},
}


def small(kind):
    return {component: (network, theirs, config | SMALL[kind][component])
            for component, (network, theirs, config) in FULL[kind].items()}


def pixels(size, device):
    """A picture with structure at every scale, (1,3,size,size)."""
    generator = torch.Generator().manual_seed(0)
    found = sum(torch.nn.functional.interpolate(torch.rand(1, 3, n, n, generator=generator), (size, size), mode="bilinear") / n
                for n in (4, 16, size))
    return (found / found.amax()).to(device)


# ------------------------------------------------------------------------------------------------------------------ checks

def gradient(editor, method):
    """(loss, gradient as float32 on the CPU) of a method's objective at a perturbed picture."""
    original = pixels(SIZE, editor.device)
    step = torch.randn(original.shape, generator=torch.Generator().manual_seed(1)).sign().to(original)
    options = OPTIONS.get(method, {}) | ({"prompts": PROMPTS[:1]} if method in ("semantic-attack", "danp", "tdae") else {})
    with torch.no_grad():
        contexts = editor.contexts(PROMPTS[:1])
    with full_float32():
        objective = sifm_min.METHODS[method](editor, original, contexts, generator=torch.Generator().manual_seed(2), **options)
        x = (original + 0.03 * step).clamp(0, 1).requires_grad_()
        value = objective(x, 0)
        loss = value[0] if isinstance(value, tuple) else value
        (found,) = torch.autograd.grad(loss, x)
    return loss.item(), found.cpu().float()


def check(name, ok, **figures):
    return {"name": name, "ok": bool(ok), **figures}


def check_gradients(folder, kind, device, method, reference):
    """One check for each dtype: the loss is near and the signs agree with float32 on the CPU."""
    loss, truth = reference
    for name, dtype in DTYPES.items():
        ours, found = gradient(load_editor(folder, device=device, dtype=dtype), method)
        agree = (found.sign() == truth.sign()).float().mean().item()
        near = math.isclose(ours, loss, rel_tol=1e-3 if name == "float32" else 0.05, abs_tol=1e-4)
        yield check(f"{kind}, {method}, {name}", found.isfinite().all() and agree >= AGREE[name] and near,
                    same_sign=round(agree, 5), loss=ours, loss_on_cpu=loss)


def check_edit(folder, kind, device):
    """The same edit in float32 on both."""
    image = images.to_image(pixels(SIZE, "cpu"))
    ours, theirs = (images.to_pixels(load_editor(folder, device=place, dtype=torch.float32).edit(image, PROMPTS[0], steps=4))
                    for place in (device, "cpu"))
    apart = 255 * (ours - theirs).abs().max().item()
    yield check(f"{kind}, edit, float32", apart <= 2.01, steps_of_255=round(apart, 2))


def check_plans(folder, kind, device):
    """Every memory plan gives the same gradient."""
    editor = load_editor(folder, device=device, dtype=torch.float32)
    original, first = images.to_image(pixels(SIZE, "cpu")), None
    for plan in memory.plans("auto", editor, TIMESTEPS):
        editor.checkpointing = plan.checkpointing
        try:
            with torch.no_grad():
                contexts = editor.contexts(PROMPTS[:1])
            start = images.to_pixels(original).to(device)
            objective = sifm_min.METHODS["sifm"](editor, start, contexts, generator=torch.Generator().manual_seed(2),
                                                 timesteps=TIMESTEPS, batch=plan.batch)
            x = (start * 0.9).requires_grad_()
            with full_float32():
                (found,) = torch.autograd.grad(objective(x, 0)[0], x)
        finally:
            editor.checkpointing = False
        first = found if first is None else first
        agree = (found.sign() == first.sign()).float().mean().item()
        yield check(f"{kind}, memory plan: {plan}", agree >= 0.995, same_sign=round(agree, 5))


# ---------------------------------------------------------------------------------------------------------------- measures

def timed(call, device, repeat):
    """(least seconds, peak bytes on the device above those at rest) of a call, after a warm-up."""
    call()
    wait(device)
    torch.cuda.reset_peak_memory_stats(device)
    rests, least = torch.cuda.memory_allocated(device), math.inf
    for _ in range(repeat):
        started = time.perf_counter()
        call()
        wait(device)
        least = min(least, time.perf_counter() - started)
    return {"seconds": round(least, 5), "peak_bytes": torch.cuda.max_memory_allocated(device), "resting_bytes": rests}


def measure(folder, kind, device, size, steps, repeat):
    """Loading to the end of the first step, a SIFM step, and an edit."""
    started = time.perf_counter()
    editor = load_editor(folder, device=device, dtype=torch.bfloat16)
    original = pixels(size, device)
    with torch.no_grad():
        contexts = editor.contexts(PROMPTS[:1])
    x = (original * 0.95).requires_grad_()
    found = {"editor": kind, "size": size}
    with full_float32():
        for count in (1, 10):
            objective = sifm_min.METHODS["sifm"](editor, original, contexts, generator=torch.Generator().manual_seed(0),
                                                 timesteps=count)

            def step(objective=objective):
                return torch.autograd.grad(objective(x, 0)[0], x)

            if count == 1:
                step()
                wait(device)
                found["load_and_first_step_seconds"] = round(time.perf_counter() - started, 3)
            found[f"step_of_{count}"] = timed(step, device, repeat)
    image = images.to_image(original.cpu())
    edit = timed(lambda: editor.edit(image, PROMPTS[0], steps=steps), device, repeat=1)
    return found | {"edit": edit | {"steps": steps}}


# --------------------------------------------------------------------------------------------------------------------- run

def run(args):
    started, device = time.perf_counter(), torch.device(args.device)
    found = {
        "device": torch.cuda.get_device_name(device), "torch": torch.__version__, "python": platform.python_version(),
        "sifm_min": sifm_min.__version__, "checks": [], "measures": [], "left_out": [],
    }

    def in_time(name):
        if time.perf_counter() - started < 60 * args.minutes:
            return True
        found["left_out"].append(name)
        return False

    def tell(line):
        print(f"{time.perf_counter() - started:6.1f} s  {line}", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        for kind in SMALL:
            place = Path(folder) / kind
            place.mkdir()
            write_editor(place, kind, networks=small(kind))
            on_cpu = load_editor(place, device="cpu", dtype=torch.float32)
            parts = [("edit", lambda place=place, kind=kind: check_edit(place, kind, device)),
                     ("memory plans", lambda place=place, kind=kind: check_plans(place, kind, device))]
            for method in args.methods:
                parts.append((method, lambda place=place, kind=kind, method=method, on_cpu=on_cpu: check_gradients(
                    place, kind, device, method, gradient(on_cpu, method))))
            for name, part in parts:
                if in_time(f"{kind}, {name}"):
                    for one in part():
                        found["checks"].append(one)
                        tell(f"{'ok    ' if one['ok'] else 'FAILED'} {one['name']} "
                             f"{ {key: value for key, value in one.items() if key not in ('name', 'ok')} }")
        for kind in FULL:
            if not in_time(f"{kind}, measures"):
                continue
            place = Path(folder) / kind
            if not args.small:
                place = Path(folder) / f"{kind}-full"
                place.mkdir()
                write_editor(place, kind, dtype=torch.bfloat16)
            found["measures"].append(measure(place, kind, device, SIZE if args.small else 512, args.denoising_steps,
                                             args.repeat))
            tell(json.dumps(found["measures"][-1]))
    found["seconds"] = round(time.perf_counter() - started, 1)
    Path(args.json).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    failed = [one["name"] for one in found["checks"] if not one["ok"]]
    tell(f"{len(found['checks']) - len(failed)} checks passed, {len(failed)} failed, {len(found['left_out'])} parts left out; "
         f"written to {args.json}")
    return 1 if failed else 0


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", required=True, metavar="FILE", help="where everything found is written")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--minutes", type=float, default=6.5, help="no part starts later (default: 6.5)")
    parser.add_argument("--small", action="store_true", help="measure the small editors, not those at full size")
    parser.add_argument("--denoising-steps", type=int, default=10, help="of the edit that is measured (default: 10)")
    parser.add_argument("--repeat", type=int, default=3, help="of these steps the fastest counts (default: 3)")
    parser.add_argument("--methods", type=lambda text: text.split(","), help="comma-separated (default: all)",
                        default=[name for name in sifm_min.METHODS if name not in ("noise", "latent", "decontext")])
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("torch finds no CUDA card here")
    return run(args)


if __name__ == "__main__":
    sys.exit(main())
