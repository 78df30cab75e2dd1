"""Measure what one perturbation does to several latent spaces, and what survives purifiers, on a folder of photographs.

    python tools/measure_latents.py --photos photos/ --weights taesd/ --estimate            the CPU time that it will take
    python tools/measure_latents.py --photos photos/ --weights taesd/                       20 photographs, 256x256, 100 steps
    python tools/measure_latents.py --photos photos/ --spaces sd1,sd3 --images 8 --out build/two
    python tools/measure_latents.py --photos photos/ --weights taesd/ --shard 0/2           and 1/2 beside it: two processes
    python tools/measure_latents.py --photos photos/ --weights taesd/ --table               of what is there already

--weights: a folder with the files of tiny autoencoders; without it, the spaces that `weights download latents` fetched. Each
photograph is cut to its middle square and scaled to --size. For each one: a perturbation for every space alone (white box),
one for all spaces, the same with robust (purifiers expected), and uniform noise, each at the budget of --eps. Where
LICENSES.jsonl beside the photographs says their use, those for evaluation are taken.

All perturbations are measured in all spaces; after purifiers, noise and the perturbations for all spaces are measured in the
first space, and the robust one in all spaces after jpeg-75 and resize-0.75.

Results go to --out, a line for each perturbation: a run that was interrupted goes on, and a repeated one prints the table at
once. The table is of the photographs that are complete. The shift is the RMS of the latents' change over their standard
deviation. Figures are medians over photographs, each with the 95 % interval of a bootstrap over photographs.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]
from photosets import interval, marked, middle_square  # noqa: E402

import sifm_min  # noqa: E402
from sifm_min import images  # noqa: E402
from sifm_min.editors import latents, shifts  # noqa: E402
from sifm_min.files.digests import digest, picture_sha256  # noqa: E402
from sifm_min.files.ledger import Busy, Ledger, read_rows  # noqa: E402
from sifm_min.files.listing import list_pictures  # noqa: E402
from sifm_min.purifiers.attacks import ATTACKS  # noqa: E402

FAST = ("jpeg-95", "jpeg-85", "jpeg-75", "jpeg-65", "jpeg-50", "resize-0.75", "blur-1", "adverse-cleaner")
KEPT = ("jpeg-75", "resize-0.75")                            # after which the robust perturbation must keep its shift
NOISE, ALL, ROBUST, WHITE = "noise", "all", "robust", "white box "


def photographs(folder, count):
    """`count` pictures of a folder for evaluation, in an order that is random and fixed: a larger count has them too."""
    rows = marked(folder, "evaluate")
    found = list_pictures([folder]).pictures if rows is None else [folder / row["file"] for row in rows]
    if len(found) < count:
        raise SystemExit(f"{folder} has {len(found)} photographs for evaluation, fewer than --images {count}")
    return sorted(found, key=lambda path: digest(path.name))[:count]


def square(path, size):
    """The middle square of a picture file, RGB, size x size."""
    return middle_square(images.read(path).image, size)


def arms_of(editor):
    return [NOISE, *(WHITE + space.name for space in editor.spaces), ALL, ROBUST]


def perturb(editor, image, arm, args, steps):
    """The picture that an arm makes, PIL."""
    if arm == NOISE:
        return shifts.noise_control(images.picture(image), args.eps, seed=args.seed)
    alone = [space for space in editor.spaces if WHITE + space.name == arm]
    made_for = Unmeasured(alone or editor.spaces, device=editor.device, loop_dtype=editor.loop_dtype)
    loop = {"sizes": (args.size,), "steps": steps, "step_size": args.step_size, "schedule": args.schedule,
            "robust": arm == ROBUST, **({} if alone else {"spaces_per_step": args.spaces_per_step})}
    return sifm_min.immunize(image, made_for, method="latent", eps=args.eps, seed=args.seed, **loop).image


class Unmeasured(latents.Latents):
    """`Latents` without a report of shifts, which are measured here for all spaces and purifiers."""

    measures = property()                                    # absent


def wanted_of(editor, arm):
    """{purifier or "none": the spaces in which this arm is measured after it}."""
    after = {} if arm.startswith(WHITE) else dict.fromkeys(FAST, editor.spaces[:1])
    return {"none": editor.spaces} | after | (dict.fromkeys(KEPT, editor.spaces) if arm == ROBUST else {})


def measure(original, changed, wanted, clean):
    """{purifier or "none": {space: shift}} of one picture at its own size.

    wanted: {purifier or "none": spaces}. clean: {purifier: {space: latent}} of the original, which this adds to: it serves
    all arms of a photograph.
    """
    found = {}
    for name, spaces in wanted.items():
        before = clean.setdefault(name, {})
        before |= encode([space for space in spaces if space.name not in before], original, name)
        after = encode(spaces, changed, name)
        found[name] = {space: shifts.shift(after[space], before[space]).item() for space in after}
    return found


@torch.no_grad()
def encode(spaces, image, purifier):
    """{name: latent} of a picture after a purifier, or after "none", in these spaces."""
    if not spaces:
        return {}
    pixels = images.to_pixels(image if purifier == "none" else ATTACKS[purifier](image))
    return {space.name: space.encode(pixels) for space in spaces}


def journal_of(args):
    """The file of this process's results."""
    index, count = args.shard
    return args.out / ("shifts.jsonl" if count == 1 else f"shifts-{index}-of-{count}.jsonl")


def identity_of(editor, args):
    return [editor.provenance()["weights"], [space.name for space in editor.spaces], args.size, args.steps, args.step_size,
            args.schedule, args.eps, args.seed, args.spaces_per_step, str(editor.loop_dtype), sifm_min.__version__]


def rows_of(editor, paths, args):
    """{(photograph, arm): row} of what all processes have measured of these photographs."""
    known = {row["key"]: row for path in sorted(args.out.glob("shifts*.jsonl")) for row in read_rows(path)}
    identity, found = identity_of(editor, args), {}
    for path in paths:
        seen = picture_sha256(square(path, args.size))
        for arm in arms_of(editor):
            if row := known.get(digest([seen, arm, identity])):
                found[path.name, arm] = row
    return found


def run(editor, paths, args):
    """Measure what is missing of this process's share of the photographs."""
    identity = identity_of(editor, args)
    args.out.mkdir(parents=True, exist_ok=True)
    done = rows_of(editor, paths, args)
    index, count = args.shard
    with Ledger(journal_of(args)) as ledger:
        for number, path in list(enumerate(paths, 1))[index::count]:
            original, clean = square(path, args.size), {}
            for arm in arms_of(editor):
                if (path.name, arm) in done:
                    continue
                began = time.process_time()
                changed = perturb(editor, original, arm, args, args.steps)
                row = {"key": digest([picture_sha256(original), arm, identity]), "picture": path.name, "arm": arm,
                       "steps_used": images.steps_used(original, changed),
                       "shifts": measure(original, changed, wanted_of(editor, arm), clean),
                       "cpu_seconds": round(time.process_time() - began, 2)}
                ledger.append(row)
                print(f"{number} of {len(paths)}, {arm}: {row['cpu_seconds']:.0f} CPU seconds", file=sys.stderr, flush=True)


def estimate(editor, paths, args):
    """Print the CPU time of the whole run, from one step and three steps of each arm, and the measurements of two arms."""
    original, clean = square(paths[0], args.size), {}

    def seconds(call):
        began = time.process_time()
        call()
        return time.process_time() - began

    def each(arm):
        one, three = (seconds(lambda count=count: perturb(editor, original, arm, args, count)) for count in (1, 3))
        return max(three - one, 0) / 2

    each(ALL)                                                # the first call of a process is slower
    steps = {arm: each(arm) for arm in arms_of(editor) if arm != NOISE}
    white = sum(of for arm, of in steps.items() if arm.startswith(WHITE))
    noise = perturb(editor, original, NOISE, args, 0)
    first, later = (seconds(lambda arm=arm: measure(original, noise, wanted_of(editor, arm), clean)) for arm in (NOISE, ROBUST))
    total = args.images * (args.steps * (white + steps[ALL] + steps[ROBUST]) + first + 2 * later)
    print(f"about {total / 3600:.2f} CPU hours for {args.images} photographs of {args.size}x{args.size} and "
          f"{len(editor.spaces)} spaces: a step takes {white:.2f} s for the white boxes together, {steps[ALL]:.2f} s for all "
          f"spaces, with robust {steps[ROBUST]:.2f} s; a photograph's measurements take {first + 2 * later:.0f} s")


def table(spaces, names, rows, args):
    """The two tables as a list of lines."""
    def of(arm, space, purifier="none"):
        return np.array([rows[name, arm]["shifts"][purifier][space] for name in names])

    used = max(row["steps_used"] for row in rows.values())
    lines = [f"{len(names)} photographs, {args.size}x{args.size}, {args.steps} steps, budget {images.budget(args.eps)}/255, at "
             f"most {used} used; median and 95 % interval", "",
             "| space | noise | white box | one for all | kept of the white box | robust | " +
             " | ".join(f"robust keeps after {name}" for name in KEPT) + " |", "|---" * (6 + len(KEPT)) + "|"]
    for space in spaces:
        cells = [of(NOISE, space), of(WHITE + space, space), of(ALL, space), of(ALL, space) / of(WHITE + space, space),
                 of(ROBUST, space), *(of(ROBUST, space, name) / of(ROBUST, space) for name in KEPT)]
        lines.append(f"| {space} | " + " | ".join(interval(cell, "median") for cell in cells) + " |")
    first = spaces[0]
    lines += ["", f"| {first}, after | noise | one for all | robust | one for all over noise | robust over noise |",
              "|---" * 6 + "|"]
    for name in ("none", *FAST):
        noise, plain, robust = (of(arm, first, name) for arm in (NOISE, ALL, ROBUST))
        cells = (noise, plain, robust, plain / noise, robust / noise)
        lines.append(f"| {name} | " + " | ".join(interval(cell, "median") for cell in cells) + " |")
    return lines


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--weights", type=Path, help="a folder with the files of tiny autoencoders")
    parser.add_argument("--spaces", help="such as sd1,sd3 (default: all that are there); the second table is of the first")
    parser.add_argument("--images", type=int, default=20)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--step-size", type=float, default=1 / 255)
    parser.add_argument("--schedule", choices=("constant", "linear"), default="constant")
    parser.add_argument("--eps", type=float, default=7 / 255)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("build/latents"))
    parser.add_argument("--spaces-per-step", type=int, metavar="N",
                        help="so many spaces take turns in the steps for all spaces (default: all of them in every step)")
    parser.add_argument("--shard", type=share, default=(0, 1), metavar="I/N", help="measure the I-th of N shares, I from 0")
    parser.add_argument("--table", action="store_true", help="print the table of what is there, and end")
    parser.add_argument("--estimate", action="store_true", help="print the CPU time that the run takes, and end")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    if args.size % 8 or not 8 <= args.size <= max(latents.SIZES):
        parser.error(f"--size {args.size}: give a multiple of 8 up to {max(latents.SIZES)}")
    torch.set_num_threads(args.threads)
    editor = latents.load_latents(f"{latents.NAME}:{args.weights}" if args.weights else latents.NAME, device="cpu")
    if args.spaces:
        known = {space.name: space for space in editor.spaces}
        if lacking := [name for name in args.spaces.split(",") if name not in known]:
            raise SystemExit(f"--spaces {lacking[0]}: there are {', '.join(known)}")
        editor = latents.Latents([known[name] for name in args.spaces.split(",")], device="cpu", loop_dtype=editor.loop_dtype)
    paths = photographs(args.photos, args.images)
    if args.estimate:
        return estimate(editor, paths, args)
    if not args.table:
        try:
            run(editor, paths, args)
        except Busy as error:
            raise SystemExit(str(error)) from None
    rows = rows_of(editor, paths, args)
    whole = [path.name for path in paths if all((path.name, arm) in rows for arm in arms_of(editor))]
    if not whole:
        raise SystemExit(f"{args.out}: no photograph is complete yet, so there is no table")
    rows = {(name, arm): row for (name, arm), row in rows.items() if name in whole}
    print("\n".join(table([space.name for space in editor.spaces], whole, rows, args)))


def share(text):
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise argparse.ArgumentTypeError(f"{text}: give I/N with I from 0 to N - 1, as 0/2")
    return int(index), int(count)


if __name__ == "__main__":
    main()
