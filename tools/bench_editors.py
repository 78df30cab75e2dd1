"""The benches of whole editors, each beside diffusers on the same weights; tools/bench.py is their command.

    step    one SIFM step, beside Algorithm 1 of the paper as one would write it on diffusers' networks (`Naive`)
    edit    an edit, beside diffusers' pipeline with the same scheduler
    load    cold files to the first SIFM step, each side in a process of its own

The two sides take turns, in one process except for `load`. A ratio is this project's value divided by the peer's within a
round; the medians over the rounds are printed. Memory is the peak of a call above the memory at rest, in a call that is not
timed. The floor is the time of the matrix products and of the convolutions by their definition, at this machine's peak speed;
a step whose convolutions use fewer multiplications can be faster than the floor. Values that were not measured are marked.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]
from bench_measuring import (  # noqa: E402
    KINDS,
    Stages,
    Watch,
    agreement,
    cells,
    clock,
    compared,
    count_flops,
    figure,
    heads,
    keep_memory,
    mebibytes,
    meter,
    over,
    peak_rates,
    percent,
    profile,
    read_from_disk,
    rounds_of,
    save,
    status,
    table,
)
from bench_peers import (  # noqa: E402
    DTYPES,
    PROMPTS,
    Naive,
    Ours,
    peer_lacks,
    picture,
    pipeline_class,
    pipeline_contexts,
    pipeline_networks,
    read_networks,
    read_pipeline,
    weights,
)

from sifm_min import memory  # noqa: E402
from sifm_min.editors import load_editor  # noqa: E402

# ---------------------------------------------------------------------------------------------------------------- step

def bench_step(args):
    keep_memory(False)
    with weights(args) as (folder, name):
        editor, lacking, peer = open_sides(args, folder)
        pixels, x = (each.to(args.device) for each in picture(size_of(editor, args)))
        taps = taps_of(editor, args)
        if not lacking and (odd := [tap for tap in taps if tap.endswith(".probs")]):
            lacking = f"{odd[0]} is no module of diffusers'"
        with torch.no_grad():
            contexts = editor.contexts([PROMPTS[i % len(PROMPTS)] + i // len(PROMPTS) * " again" for i in range(args.prompts)])
        rates = {dtype: peak_rates(args, dtype) for dtype in {editor.dtype, editor.vae_dtype}}
        pairs, options = {}, dict(args.option)
        batch = options.pop("batch", None)
        for count in args.timesteps:
            T = editor.timesteps(count)

            def ours(plan, T=T):
                made = Ours(editor, pixels, contexts, T, taps, plan, **options)
                for n in range(args.prompts):                # the original's activations, which later steps have
                    made(x, n)
                return made

            pairs[count] = [memory.run_planned(ours, args.memory, editor, len(T), batch)[0]]
            if not lacking:
                pairs[count].append(Naive(*peer).prepare(pixels, contexts, T, taps))
                if count == args.timesteps[0]:
                    pairs[count][1](x, 0)
        rounds = rounds_of({count: [partial(side, x) for side in pair] for count, pair in pairs.items()}, args)
        found = {"bench": "step", "editor": name, "size": pixels.shape[-1], "taps": taps, "prompts": args.prompts,
                 **dtypes(args), "options": dict(args.option), "peer": lacking or f"naive, {args.peer_dtype}",
                 "clock": clock(args), "peak_gflops": {
                     str(dtype).removeprefix("torch."): {kind: rate / 1e9 for kind, rate in best.items()}
                     for dtype, best in rates.items()},
                 "timesteps": {count: one_count(args, pairs[count][0], x, rounds[count], rates) for count in args.timesteps}}
        return tell_step(args, found)


def size_of(editor, args):
    """The side of the picture; a miniature has a fixed one."""
    if args.size and not editor.is_small:
        editor.defaults = replace(editor.defaults, size=max(args.size, 512))
    return max(editor.frame(*[args.size or editor.working_size] * 2))


def taps_of(editor, args):
    return list(args.taps or (["mid_block"] if "mid_block" in editor.tap_names else editor.default_taps))


def load_ours(folder, args):
    return load_editor(folder, device=args.device, dtype=DTYPES[args.dtype], vae_dtype=DTYPES[args.vae_dtype])


def dtypes(args):
    return {"dtype": args.dtype, "vae_dtype": args.vae_dtype}


def open_sides(args, folder, networks=True):
    """(our editor, the reason why there is no peer or "", the arguments of `Naive` or None)."""
    editor = load_ours(folder, args)
    lacking = "asked for ours alone" if args.alone else peer_lacks(editor)
    if lacking:
        print(f"Ours alone: {lacking}.")
    return editor, lacking, None if lacking or not networks else read_networks(folder, DTYPES[args.peer_dtype], args.device)


def one_count(args, ours, x, rounds, rates):
    """The figures for one number of timesteps."""
    own = clock(args)
    found = {"plan": str(ours.plan), **compared(rounds)}
    if "peer" in found:
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
    print(f"\n{found['editor']}, {found['size']}x{found['size']}, taps {', '.join(found['taps'])}, {found['prompts']} "
          f"prompt(s), {found['dtype']} (VAE {found['vae_dtype']}); peer: {found['peer']}")
    print("this machine's peak, GFLOP/s: " + "; ".join(
        f"{dtype} matrix product {best['mm']:.0f}, 3x3 convolution {best['conv']:.0f}"
        for dtype, best in found["peak_gflops"].items()))
    own = found["clock"]
    table(["timesteps", *heads(own), "cosine", "same sign", "ours runs"], [
        [count, *cells(one, own), figure(one.get("cosine"), 6), figure(one.get("same_sign"), 5), one["plan"]]
        for count, one in found["timesteps"].items()])
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


# ---------------------------------------------------------------------------------------------------------------- edit

def bench_edit(args):
    keep_memory(False)
    with weights(args) as (folder, name):
        editor, lacking, _ = open_sides(args, folder, networks=False)
        pixels, options = picture(size_of(editor, args))[0], {"guidance": editor.defaults.guidance}
        for option in ("image_guidance", "strength"):
            if option in editor.OPTIONS:
                options[option] = getattr(editor.defaults, option)

        def ours():
            with torch.no_grad():
                return editor.sample(pixels, PROMPTS[:1], seeds=[0], steps=args.steps, **options).clamp(0, 1)

        pair = [ours] + ([] if lacking else [pipeline_edit(folder, args, pixels, options)])
        values = [call() for call in pair]                   # which warms both up
        rounds = rounds_of({"edit": [lambda i, call=call: call() for call in pair]}, args)["edit"]
        found = {"bench": "edit", "editor": name, "size": pixels.shape[-1], "steps": args.steps, **options,
                 **dtypes(args), "against": lacking or f"diffusers' pipeline, {args.peer_dtype}", "clock": clock(args),
                 "rounds": args.repeat, **compared(rounds)}
        if not lacking:
            found["apart"] = (values[0].float().cpu() - values[1].float().cpu()).abs().max().item()
        print(f"\n{name}, {found['size']}x{found['size']}, {args.steps} steps, {args.dtype} (VAE {args.vae_dtype}); "
              f"peer: {found['against']}")
        table([*heads(clock(args)), "pictures differ by"], [[*cells(found, clock(args)), figure(found.get("apart"), 6)]])
        return save(args, found)


def pipeline_edit(folder, args, pixels, options):
    """The same edit by diffusers' pipeline, ready to be called."""
    kind = pipeline_class(folder, "StableDiffusion3Img2ImgPipeline" if "strength" in options else None)
    pipeline = read_pipeline(kind, folder, DTYPES[args.peer_dtype], args.device)
    pipeline.set_progress_bar_config(disable=True)
    named = {"guidance": "guidance_scale", "image_guidance": "image_guidance_scale"}
    options = {named.get(name, name): value for name, value in options.items()}
    if "strength" in options:
        options |= {"height": pixels.shape[2], "width": pixels.shape[3]}
    return lambda: pipeline(PROMPTS[0], image=pixels, num_inference_steps=args.steps, output_type="pt",
                            generator=torch.Generator().manual_seed(0), **options).images


# ---------------------------------------------------------------------------------------------------------------- load

def bench_load(args):
    if args.side:
        return one_side(args)
    with weights(args) as (folder, name):
        editor, lacking, _ = open_sides(args, folder, networks=False)
        args.size, taps, timestep = size_of(editor, args), taps_of(editor, args), editor.timesteps(1).item()
        del editor                                           # nothing of the files may stay in memory
        sides, rounds = ["ours"] if lacking else ["ours", "peer"], []
        for i in range(args.repeat):
            order = sides if i % 2 == 0 else sides[::-1]
            found = {side: in_new_process(args, folder, side, taps, timestep) for side in order}
            rounds.append([found[side] for side in sides])
        keys = list(rounds[0][0])
        found = {"bench": "load", "editor": name, "size": args.size, "taps": taps, **dtypes(args), "rounds": args.repeat,
                 "against": lacking or f"from_pretrained of the pipeline and one naive step, {args.peer_dtype}",
                 **compared(rounds, keys)}
        print(f"\n{name}: cold files to the first SIFM step, one timestep at {args.size}x{args.size}, taps {', '.join(taps)}, "
              f"{args.dtype} (VAE {args.vae_dtype}), every side in a new process; peer: {found['against']}")
        table(["", *sides, *([] if lacking else ["ratio"])], [
            [key if key.startswith("seconds") else f"{key}, MiB",
             *(figure(found[side][key]) if key.startswith("seconds") else mebibytes(found[side][key]) for side in sides),
             *([] if lacking else [figure(found["ratio"][key])])] for key in keys])
        return save(args, found)


def in_new_process(args, folder, side, taps, timestep):
    """The result of `one_side` after the files' pages were dropped from memory, with the seconds that Python's start takes."""
    if hasattr(os, "posix_fadvise"):
        for path in (path for path in Path(folder).rglob("*") if path.is_file()):
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    options = {"side": side, "editor": folder, "size": args.size, "dtype": args.dtype, "vae-dtype": args.vae_dtype,
               "peer-dtype": args.peer_dtype,
               "device": args.device, "threads": args.threads, "taps": ",".join(taps), "timestep": timestep}
    started = time.perf_counter()
    done = subprocess.run([sys.executable, str(Path(__file__).with_name("bench.py")), "load",
                           *(f"--{name}={value}" for name, value in options.items())], text=True, stdout=subprocess.PIPE)
    if done.returncode:
        raise SystemExit(f"the process of {side} ended with {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1]) | {"seconds with imports": time.perf_counter() - started}


def one_side(args):
    """Load the editor in args.editor, take one SIFM step, and print its cost as JSON; runs in another process."""
    folder, T = Path(args.editor), torch.tensor([args.timestep])
    pixels, x = (each.to(args.device) for each in picture(args.size))
    if args.side == "ours":
        def load():
            return load_ours(folder, args)

        def step(editor):
            size_of(editor, args)
            with torch.no_grad():
                contexts = editor.contexts(PROMPTS[:1])
            (plan, *_) = memory.plans("auto", editor, 1)
            return Ours(editor, pixels, contexts, T, args.taps, plan)(x, 0)
    else:
        kind = pipeline_class(folder)

        def load():
            return read_pipeline(kind, folder, DTYPES[args.peer_dtype], args.device)

        def step(pipeline):
            return Naive(*pipeline_networks(pipeline, folder)).prepare(pixels, pipeline_contexts(pipeline, PROMPTS[0]), T,
                                                                       args.taps)(x, 0)
    imported, read = status("VmHWM")[0], read_from_disk()
    with Watch() as watch:
        started, cpu = time.perf_counter(), time.process_time()
        loaded = load()
        seconds, at_load = time.perf_counter() - started, status("VmHWM")[0]
        step(loaded)
        whole, cpu = time.perf_counter() - started, time.process_time() - cpu
    peak = status("VmHWM")[0]
    started = time.perf_counter()
    step(loaded)
    warm = time.perf_counter() - started
    print(json.dumps({
        "seconds to the end of the first step": whole, "seconds of it beyond the same again": whole - warm,
        "seconds of it loading": seconds, "seconds of CPU": cpu,
        "peak memory": peak, "of it anonymous": watch.anonymous, "of it mapped": watch.mapped,
        "most anonymous at any time": watch.most_anonymous, "peak while loading": at_load, "after the imports": imported,
        "read from disk": None if read is None else read_from_disk() - read,
        "GPU peak": torch.cuda.max_memory_allocated() if args.device.startswith("cuda") else None}))


# ---------------------------------------------------------------------------------------------------------- the command

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
        made.add_argument("--vae-dtype", default="float32", choices=DTYPES, help="of our VAE (default: float32)")
        made.add_argument("--peer-dtype", default="float32", choices=DTYPES, help="of all that the peer has")
        made.add_argument("--taps", type=lambda text: text.split(","), help="default: mid_block; of a transformer its own")
        made.add_argument("--alone", action="store_true", help="without the peer")
        made.add_argument("--json", metavar="FILE", help="write everything found there")
        return made

    made = command("step", bench_step, "one SIFM step, beside a naive one on diffusers", repeat=3)
    made.add_argument("--timesteps", type=lambda text: [int(n) for n in text.split(",")], default=[1, 4, 10],
                      help="how many, comma-separated (default: 1,4,10)")
    made.add_argument("--prompts", type=int, default=1)
    made.add_argument("--memory", choices=memory.MEMORY, default="auto", help="our plan, as of `immunize` (default: auto)")
    made.add_argument("--option", type=option, action="append", default=[], metavar="NAME=VALUE", help="of `sifm`, as batch=2")
    made.add_argument("--no-profile", dest="profile", action="store_false", help="times, memory and agreement alone")
    made = command("edit", bench_edit, "an edit, beside diffusers' pipeline", repeat=3)
    made.add_argument("--steps", type=int, default=4, help="denoising steps (default: 4)")
    made = command("load", bench_load, "cold files to the first SIFM step, beside diffusers' pipeline", repeat=3)
    made.add_argument("--side", choices=("ours", "peer"), help=argparse.SUPPRESS)
    made.add_argument("--timestep", type=int, help=argparse.SUPPRESS)
