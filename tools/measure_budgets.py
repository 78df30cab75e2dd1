"""Measure the cost of a budget: uniform 3, 5 and 7 of 255, and texture of 7, 9 and 11, in shift, SSIM, LPIPS and FSIM.

    python tools/measure_budgets.py --photos ../shared/data/photoset --images 20 --editor latents:sd1 -o budgets.jsonl
    python tools/measure_budgets.py --photos photo.jpg --editor latents:sd1-copy --sheet -o budgets.png

Every photograph is scaled to --size on its long side and immunized with the method `latent` at each budget. The last part of
the table compares texture with uniform at the same shift, photograph by photograph: each texture budget with uniform ones, and
the texture budgets with uniform 5. The other side's values are interpolated between the two budgets whose shifts are next to
that shift. A photograph whose shift lies outside them is left out, and counted.

With --sheet the result is a picture in place of a table: the first photograph as it was and after some of the budgets, each
above its calmest part, enlarged.

Photographs: a file, or those of a folder; in a folder with a LICENSES.jsonl, those that it marks `"use": "evaluate"` (or
--use), from its categories in turn. Every measurement goes to the journal -o at once, one JSON line each, and is not done
twice. Means over photographs, with a 95 % bootstrap interval. LPIPS is measured where its weights are (`weights download
lpips-alex`). At 256 pixels and 60 steps a photograph takes about a minute of one slow core for each budget and latent space;
the table prints the CPU seconds that were used.
"""

import argparse
import sys
import time
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]
from photosets import in_turn, interval, marked  # noqa: E402

import sifm_min  # noqa: E402
from sifm_min import images, metrics  # noqa: E402
from sifm_min.files import contact_sheet  # noqa: E402
from sifm_min.files.digests import digest, picture_sha256  # noqa: E402
from sifm_min.files.ledger import Ledger  # noqa: E402
from sifm_min.files.listing import list_pictures  # noqa: E402
from sifm_min.metrics import just_noticeable  # noqa: E402
from sifm_min.models.checkpoints import Unavailable  # noqa: E402

ARMS = {"uniform 3": (3, "uniform"), "uniform 5": (5, "uniform"), "uniform 7": (7, "uniform"), "texture 7": (7, "texture"),
        "texture 9": (9, "texture"), "texture 11": (11, "texture")}
SHOWN, PART, ZOOM = ("uniform 3", "uniform 5", "uniform 7", "texture 9"), 64, 6        # on a sheet; pixels of the part
MATCHED = "uniform 5"                                        # whose shift texture budgets are brought to
MEASURES = ("shift", "ssim", "lpips", "fsim", "psnr", "visibility", "mean budget")


def photographs(folder, use, count):
    """Paths of `count` photographs: see the head of this file."""
    rows = marked(folder, use)
    found = list_pictures([folder]).pictures if rows is None else [folder / row["file"] for row in in_turn(rows)]
    return found[:count]


def shrunk(path, size):
    """The photograph as PIL RGB, at most `size` pixels on its long side."""
    image = images.read(path).image
    scale = min(1, size / max(image.size))
    return image.resize([max(1, round(side * scale)) for side in image.size], images.Image.Resampling.LANCZOS)


def immunized(image, editor, eps, budget, steps):
    return sifm_min.immunize(image, editor, eps=eps, budget=budget, steps=steps, schedule="linear", step_size=2 / 7 * eps)


def measure(image, editor, eps, budget, steps, lpips):
    """{measure: value} of one photograph immunized at one budget; shift: the mean over the editor's latent spaces."""
    started = time.process_time()
    result = immunized(image, editor, eps, budget, steps)
    seconds = time.process_time() - started
    report, (after, before) = result.report, [images.to_pixels(picture) for picture in (result.image, image)]
    assert report["values_beyond_budget"] == 0
    shifts = [found["shift"] for found in report["shifts"]]
    return {"shift": sum(shifts) / len(shifts), "ssim": metrics.ssim(after, before).item(),
            "lpips": metrics.lpips(after, before, weights=lpips).item() if lpips else None,
            "fsim": metrics.fsim(after, before).item(), "psnr": report["psnr"], "visibility": report["visibility"],
            "mean budget": report["budget_mean_steps"], "seconds": seconds}


def at_shift(budgets, shift, name):
    """The value of a measure that some budgets have at this shift, interpolated; None outside their shifts."""
    ordered = sorted(budgets, key=lambda values: values["shift"])
    for low, high in zip(ordered, ordered[1:], strict=False):
        if low["shift"] <= shift <= high["shift"] and low["shift"] < high["shift"]:
            part = (shift - low["shift"]) / (high["shift"] - low["shift"])
            return low[name] + part * (high[name] - low[name])
    return None


def table(found):
    """Lines of the table; found: {photograph: {arm: {measure: value}}}, all arms of each photograph."""
    names = [name for name in MEASURES if all(values[name] is not None for arms in found.values() for values in arms.values())]
    lines = ["| budget | " + " | ".join(names) + " | CPU s |", "|---" * (len(names) + 2) + "|"]
    for arm in ARMS:
        values = [arms[arm] for arms in found.values()]
        cells = [interval([value[name] for value in values], digits=3) for name in names]
        lines.append(f"| {arm} | " + " | ".join(cells) + f" | {sum(v['seconds'] for v in values) / len(values):.0f} |")
    for texture in (arm for arm, (_, budget) in ARMS.items() if budget == "texture"):
        lines += comparison(f"{texture} minus uniform at the same shift", found, names[1:], texture, "uniform")
    return lines + comparison(f"texture minus {MATCHED} at the shift of {MATCHED}", found, names[1:], MATCHED, "texture", -1)


def comparison(title, found, names, arm, others, sign=1):
    """Lines: an arm's measures minus those of the other budgets at the arm's shift (sign -1: the others minus the arm)."""
    gains = {name: [] for name in names}
    for arms in found.values():
        budgets = [values for other, values in arms.items() if ARMS[other][1] == others]
        for name, values in gains.items():
            if (other := at_shift(budgets, arms[arm]["shift"], name)) is not None:
                values.append(sign * (arms[arm][name] - other))
    kept = len(gains["ssim"])
    return ["", f"{title} ({kept} photographs, {len(found) - kept} outside):",
            *(f"  {name}: {interval(values, digits=3)}" for name, values in gains.items())]


def sheet(image, editor, steps):
    """One PIL picture of a photograph and of what budgets make of it: see the head of this file."""
    made = {"original": image}
    for arm in SHOWN:
        levels, budget = ARMS[arm]
        result = immunized(image, editor, levels / 255, budget, steps)
        made[f"{arm}: shift {result.report['shifts'][0]['shift']:.2f}, SSIM {result.report['ssim']:.3f}"] = result.image
    left, top, side = calmest(image)
    columns = []
    for caption, picture in made.items():
        column = images.Image.new("RGB", (max(picture.width, side * ZOOM), picture.height + side * ZOOM + 8), "white")
        column.paste(picture, ((column.width - picture.width) // 2, 0))
        part = picture.crop((left, top, left + side, top + side)).resize((side * ZOOM,) * 2, images.Image.Resampling.NEAREST)
        column.paste(part, ((column.width - part.width) // 2, picture.height + 8))
        columns.append((caption, column))
    return contact_sheet.sheet(columns, cell=max(columns[0][1].size))


def calmest(image):
    """(left, top, side) of the square of a picture, `PART` pixels a side, in which the least change can be seen."""
    seen = just_noticeable.thresholds(images.to_pixels(image)).mean(1, keepdim=True)
    side = min(PART, *image.size)
    means = torch.nn.functional.avg_pool2d(seen, side, 1)[0, 0]
    top, left = divmod(means.argmin().item(), means.shape[1])
    return left, top, side


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True, metavar="PATH")
    parser.add_argument("--use", default="evaluate", help="of a folder with LICENSES.jsonl (default: evaluate)")
    parser.add_argument("--images", type=int, default=20, metavar="N")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--editor", default="latents:sd1")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="the journal, or the picture")
    parser.add_argument("--sheet", action="store_true", help="a picture of the first photograph in place of the table")
    args = parser.parse_args(argv)
    paths = photographs(args.photos, args.use, args.images)
    editor = sifm_min.load_editor(args.editor)
    if args.sheet:
        sheet(shrunk(paths[0], args.size), editor, args.steps).save(args.output)
        return
    try:
        lpips = metrics.lpips_weights("alex")
    except Unavailable as error:
        lpips = None
        print(f"lpips is absent: {error}", file=sys.stderr)
    about = [sifm_min.__version__, editor.provenance()["weights"], editor.provenance()["dtype"], args.size, args.steps,
             lpips and lpips.sha256,
             [value for name, value in vars(just_noticeable).items() if name.isupper() and isinstance(value, float | int)]]
    found = {}
    with Ledger(args.output) as journal:
        done = {row["key"]: row["values"] for row in journal.rows}
        for i, path in enumerate(paths):
            image = shrunk(path, args.size)
            for arm, (levels, budget) in ARMS.items():
                key = digest([about, picture_sha256(image), arm])
                if key not in done:
                    done[key] = measure(image, editor, levels / 255, budget, args.steps, lpips)
                    journal.append({"key": key, "photograph": str(path), "arm": arm, "values": done[key]})
                found.setdefault(str(path), {})[arm] = done[key]
            spent = sum(values["seconds"] for arms in found.values() for values in arms.values())
            print(f"{i + 1} of {len(paths)}: {path.name}, {spent:.0f} CPU seconds of immunizing so far", file=sys.stderr)
    print("\n".join(table(found)))


if __name__ == "__main__":
    main()
