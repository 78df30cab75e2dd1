"""Measure what one perturbation does to several latent spaces, and what survives purifiers, on a folder of photographs.

    python tools/measure_latents.py --photos photos/ --weights taesd/ --estimate            the CPU time that it will take
    python tools/measure_latents.py --photos photos/ --weights taesd/                       20 photographs, 256x256, 100 steps
    python tools/measure_latents.py --photos photos/ --spaces sd1,sd3 --images 8 --out build/two

--weights: a folder with the files of tiny autoencoders; without it, the spaces that `weights download latents` fetched. Each
photograph is cut to its middle square and scaled to --size. For each one: a perturbation for every space alone (white box),
one for all spaces, the same with robust (purifiers expected), and uniform noise, each at the budget of --eps. Where
LICENSES.jsonl beside the photographs says their use, those for evaluation are taken.

Results go to --out, a line for each perturbation: a run that was interrupted goes on, and a repeated one prints the table at
once. The shift is the RMS of the latents' change over their standard deviation. Figures are medians over photographs, each
with the 95 % interval of a bootstrap over photographs.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]
from photosets import marked  # noqa: E402

import sifm_min  # noqa: E402
from sifm_min import images  # noqa: E402
from sifm_min.editors import latents, shifts  # noqa: E402
from sifm_min.files.digests import digest, picture_sha256  # noqa: E402
from sifm_min.files.ledger import Ledger  # noqa: E402
from sifm_min.files.listing import list_pictures  # noqa: E402
from sifm_min.purifiers.attacks import ATTACKS  # noqa: E402

FAST = ("jpeg-95", "jpeg-85", "jpeg-75", "jpeg-65", "jpeg-50", "resize-0.75", "blur-1", "adverse-cleaner")
KEPT = ("jpeg-75", "resize-0.75")                            # after which the robust perturbation must keep its shift
NOISE, ALL, ROBUST, WHITE = "noise", "all", "robust", "white box "
DRAWS = 2000                                                 # of the bootstrap


def photographs(folder, count):
    """`count` pictures of a folder for evaluation, in an order that is random and fixed: a larger count has them too."""
    rows = marked(folder, "evaluate")
    found = list_pictures([folder]).pictures if rows is None else [folder / row["file"] for row in rows]
    if len(found) < count:
        raise SystemExit(f"{folder} has {len(found)} photographs for evaluation, fewer than --images {count}")
    return sorted(found, key=lambda path: digest(path.name))[:count]


def square(path, size):
    """The middle square of a picture file, RGB, size x size."""
    image = images.read(path).image
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.LANCZOS)


def arms_of(editor):
    return [NOISE, *(WHITE + space.name for space in editor.spaces), ALL, ROBUST]


def perturb(editor, image, arm, args, steps):
    """The picture that an arm makes, PIL."""
    if arm == NOISE:
        return shifts.noise_control(images.picture(image), args.eps, seed=args.seed)
    alone = [space for space in editor.spaces if WHITE + space.name == arm]
    made_for = Unmeasured(alone or editor.spaces, device=editor.device, loop_dtype=editor.loop_dtype)
    loop = {"sizes": (args.size,), "steps": steps, "step_size": args.step_size, "schedule": args.schedule,
            "robust": arm == ROBUST}
    return sifm_min.immunize(image, made_for, method="latent", eps=args.eps, seed=args.seed, **loop).image


class Unmeasured(latents.Latents):
    """`Latents` without a report of shifts, which are measured here for all spaces and purifiers."""

    measures = property()                                    # absent


@torch.no_grad()
def measure(editor, original, changed, purifiers):
    """{purifier or "none": {space: shift}} of one picture at its own size."""
    found = {}
    for name in ("none", *purifiers):
        pair = [image if name == "none" else ATTACKS[name](image) for image in (original, changed)]
        before, after = (editor.latents(images.to_pixels(image)) for image in pair)
        found[name] = {space: shifts.shift(after[space], before[space]).item() for space in before}
    return found


def run(editor, paths, args):
    """The journal's rows of these photographs, {(photograph, arm): row}, after everything that is missing was done."""
    identity = [editor.provenance()["weights"], args.size, args.steps, args.step_size, args.schedule, args.eps, args.seed,
                str(editor.loop_dtype), sifm_min.__version__]
    args.out.mkdir(parents=True, exist_ok=True)
    rows = {}
    with Ledger(args.out / "shifts.jsonl") as ledger:
        known = {row["key"]: row for row in ledger.rows}
        for number, path in enumerate(paths, 1):
            original = square(path, args.size)
            for arm in arms_of(editor):
                key = digest([picture_sha256(original), arm, identity])
                if key not in known:
                    began = time.process_time()
                    changed = perturb(editor, original, arm, args, args.steps)
                    used = images.steps_used(original, changed)
                    purified = () if arm.startswith(WHITE) else FAST
                    row = {"key": key, "picture": path.name, "arm": arm, "steps_used": used,
                           "shifts": measure(editor, original, changed, purified),
                           "cpu_seconds": round(time.process_time() - began, 2)}
                    ledger.append(row)
                    known[key] = row
                    print(f"{number} of {len(paths)}, {arm}: {row['cpu_seconds']:.0f} CPU seconds", file=sys.stderr, flush=True)
                rows[path.name, arm] = known[key]
    return rows


def estimate(editor, paths, args):
    """Print the CPU time of the whole run, from one step and two steps of two arms, and one measurement."""
    original = square(paths[0], args.size)

    def seconds(call):
        began = time.process_time()
        call()
        return time.process_time() - began

    def each(arm):
        one, three = (seconds(lambda count=count: perturb(editor, original, arm, args, count)) for count in (1, 3))
        return max(three - one, 0) / 2

    each(ALL)                                                # the first call of a process is slower
    step, robust = each(ALL), each(ROBUST)
    purified = seconds(lambda: measure(editor, original, perturb(editor, original, NOISE, args, 0), FAST))
    total = args.images * (args.steps * (2 * step + robust) + 3 * purified)
    print(f"about {total / 3600:.2f} CPU hours for {args.images} photographs of {args.size}x{args.size} and "
          f"{len(editor.spaces)} spaces: a step for all spaces takes {step:.2f} s, as do the white boxes together, with robust "
          f"{robust:.2f} s; the measurements after purifiers take {purified:.1f} s a perturbation")


def median(values, seed=0):
    """The median and its interval as text."""
    values = np.asarray(values, float)
    if len(values) < 2:
        return f"{statistics.median(values):.2f}"
    drawn = np.random.default_rng(seed).integers(0, len(values), (DRAWS, len(values)))
    low, high = np.percentile(np.median(values[drawn], axis=1), [2.5, 97.5])
    return f"{np.median(values):.2f} [{low:.2f}, {high:.2f}]"


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
        lines.append(f"| {space} | " + " | ".join(map(median, cells)) + " |")
    first = spaces[0]
    lines += ["", f"| {first}, after | noise | one for all | robust | one for all over noise | robust over noise |",
              "|---" * 6 + "|"]
    for name in ("none", *FAST):
        noise, plain, robust = (of(arm, first, name) for arm in (NOISE, ALL, ROBUST))
        lines.append(f"| {name} | " + " | ".join(map(median, (noise, plain, robust, plain / noise, robust / noise))) + " |")
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
    rows = run(editor, paths, args)
    print("\n".join(table([space.name for space in editor.spaces], [path.name for path in paths], rows, args)))


if __name__ == "__main__":
    main()
