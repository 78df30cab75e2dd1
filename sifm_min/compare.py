"""Compare pictures: the budget of a perturbation, how visible it is, the distances of the paper, and the shift of latents."""

import math

from . import cli
from .files import reports
from .files.listing import list_pictures
from .metrics.backbones import NETWORKS

METRICS = ("linf", "visibility", "psnr", "ssim", "vifp", "fsim", "lpips")

EXAMPLES = """examples:
  %(prog)s out/photo_immunized.png photo.png
  %(prog)s edited_immunized/ edited_original/ --json
  %(prog)s edited_immunized/ edited_original/ --metrics psnr,lpips --weights alexnet-owt-7be5be79.pth
  %(prog)s --latents out/photo_immunized.png photo.png
  %(prog)s --spaces sd1,instruct-pix2pix,/path/to/editor out/photo_immunized.png photo.png

The first is the distorted picture, the second the reference (VIFp is not symmetric): in the paper's protocol the edit of
the immunized picture and the edit of the original. Pictures of two folders are matched by name, without the ending such
as .png and without `_immunized`; previews are left out.

visibility   the change over what the eye just notices at its place, by a model of luminance and texture: the 95th
       percentile over the values of B; up to 1 is hard to see
linf   largest difference of a channel, in steps of 1/255        vifp   of the luma; `nan`: the reference is flat
psnr   in dB, of RGB; `inf`: equal                               fsim   FSIMc
ssim   of RGB, Gaussian window 11x11, no downsampling            lpips  version 0.1, needs `weights download lpips-alex`

--latents adds the shift of A from B in each latent space that is on this machine: the tiny autoencoders that `weights
download latents` fetches, in their place the copies that ship (sd1-copy, sd3-copy), and the autoencoders of the editors that
are downloaded. The shift is the RMS of the latents' change over their standard deviation, at the sizes that editors work at.
noise: uniform noise of A's largest change everywhere, also where A was made with --budget texture, whose report has noise of
that budget.

At the pictures' own size, on their 8-bit colours; transparency is not compared. Lower is better for who immunizes, but
higher for linf and lpips. What a picture is too small for, or LPIPS without its weights, is absent (-) with the reason;
asked for by name, it is an error. Exit codes: 0 all done, 1 some pictures failed, 2 usage, 3 weights unavailable,
130 or 143 interrupted."""


def _parser():
    parser = cli.Parser("compare", "Measure how far pictures are apart.", EXAMPLES)
    add = parser.add_argument
    add("distorted", type=cli.path, metavar="A", help="a picture or a folder: the distorted")
    add("reference", type=cli.path, metavar="B", help="a picture or a folder: the reference")
    add("--metrics", type=cli.commas(), metavar="LIST", help=f"which of {','.join(METRICS)} (default: all)")
    add("--network", choices=tuple(NETWORKS), default="alex", help="of LPIPS (default: alex)")
    add("--weights", type=cli.path, metavar="FILE",
        help="of LPIPS' network: torchvision's .pth, or safetensors (default: what `weights download` has fetched)")
    add("--latents", action="store_true", help="measure the shift of the latents too, in every space on this machine")
    add("--spaces", type=cli.commas(), metavar="LIST",
        help="the same in these spaces: sd1, sdxl, sd3, flux1, flux2, sd1-copy, sd3-copy, an editor's name or hub id (sd3 "
             "is the space), or a folder of an editor or of tiny autoencoders")
    parser.shared("device")
    return parser


def pairs(distorted, reference):
    """([(distorted, reference), ...], left out) of two pictures, or of two folders matched by name.

    None stands for a picture without partner. left out: see `list_pictures`; the previews of `immunize` are among it.
    """
    if not distorted.is_dir() and not reference.is_dir():
        return [(distorted, reference)], {}
    if not (distorted.is_dir() and reference.is_dir()):
        raise ValueError(f"{distorted} and {reference}: give two pictures, or two folders")
    left, right, left_out = {}, {}, {}
    for folder, by_name in ((distorted, left), (reference, right)):
        listing = list_pictures([folder], lambda path: reports.is_result(path, ("_preview.png",), ".json"))
        for reason, files in listing.left_out.items():
            left_out.setdefault(reason, []).extend(files)
        for path in listing.pictures:
            other = by_name.setdefault(path.stem.replace("_immunized", ""), path)
            if other != path:
                raise ValueError(f"{other} and {path} have one name; keep one of them, or compare them as files")
    names = sorted(left.keys() | right.keys())
    if not left.keys() & right.keys():
        raise ValueError(f"no picture in {distorted} has the name of one in {reference}")
    return [(left.get(name), right.get(name)) for name in names], left_out


def measure(distorted, reference, wanted, weights=None, *, device="cpu", strict=False):
    """{metric: value} of two `images.Picture`, and under "absent" why a metric has no value (None).

    weights: a `metrics.LPIPSWeights`, or a sentence that says why there is none. strict: what has no value is a
    ValueError. Raises ValueError where the pictures differ in size.
    """
    from . import images, metrics
    one, other = (f"{picture.image.width}x{picture.image.height}" for picture in (distorted, reference))
    if one != other:
        raise ValueError(f"the pictures differ in size, {one} and {other}; make them equal first")
    pixels = [images.to_pixels(picture.image).to(device) for picture in (distorted, reference)]
    record, absent = dict.fromkeys(wanted), {}
    for name in wanted:
        try:
            if name == "linf":
                record[name] = images.steps_used(distorted.image, reference.image)
            elif name != "lpips":
                record[name] = getattr(metrics, name)(*pixels).item()
            elif isinstance(weights, str):
                raise ValueError(weights)
            else:
                record[name] = metrics.lpips(*pixels, network=weights.network, weights=weights).item()
        except ValueError as error:                          # two 8-bit pictures of one size: too small, no weights
            if strict:
                raise ValueError(f"{name}: {error}") from None
            absent[name] = str(error)
    return record | ({"absent": absent} if absent else {})


def latent_shifts(spaces, distorted, reference):
    """[{space, size, shift, noise, ratio, budget_steps}] of two `images.Picture`s of one size.

    spaces: the editor `latents`. noise: the shift by uniform noise of the budget that the distorted picture uses. ratio: shift
    over noise. Both are None for two equal pictures.
    """
    from . import images
    from .editors import shifts
    steps = images.steps_used(distorted.image, reference.image)
    control = shifts.noise_control(reference, steps / 255) if steps else reference.image
    found = shifts.measure_shifts(spaces, reference.image, distorted.image, control)
    return [{**record, **({} if steps else {"shift": 0.0, "noise": None}),
             "ratio": record["shift"] / record["noise"] if steps else None, "budget_steps": steps} for record in found]


def mean_shifts(pairs):
    """The means over pairs of `latent_shifts`, for each space and long side: [{space, size, pairs, shift, noise, ratio}]."""
    by_place = {}
    for record in (record for records in pairs for record in records):
        by_place.setdefault((record["space"], max(record["size"])), []).append(record)
    found = []
    for (space, size), records in by_place.items():
        values = {name: [record[name] for record in records if record[name] is not None]
                  for name in ("shift", "noise", "ratio")}
        found.append({"space": space, "size": size, "pairs": len(records),
                      **{name: sum(each) / len(each) if each else None for name, each in values.items()}})
    return found


def _shift_lines(records, width):
    """One line for each space and size, below the row of a pair."""
    def line(record):
        size = record["size"] if isinstance(record["size"], int) else "x".join(map(str, record["size"]))
        values = (f"{name} {'-' if record[name] is None else f'{record[name]:.2f}'}" for name in ("shift", "noise", "ratio"))
        return "  ".join([f"{'':4}{record['space']} at {size}".ljust(width), *values])

    return "".join(f"\n{line(record)}" for record in records)


def _spaces(args, device):
    """The editor `latents` that the flags ask for, or None."""
    if not (args.latents or args.spaces):
        return None
    from .editors import latents
    items = args.spaces or latents.at_hand()
    if not items:
        raise latents.no_space("with --spaces")
    return latents.load_latents(f"{latents.NAME}:{','.join(items)}", device=device)


def mean(records, wanted):
    """The last line of a table: the mean of each metric's finite values, and the number of values left out."""
    values = {name: [record[name] for record in records if record[name] is not None] for name in wanted}
    finite = {name: [value for value in values[name] if math.isfinite(value)] for name in wanted}
    return {
        "pairs": len(records),
        "mean": {name: sum(finite[name]) / len(finite[name]) if finite[name] else None for name in wanted},
        "left_out": {name: len(records) - len(finite[name]) for name in wanted if len(finite[name]) < len(records)},
    }


def _width(name):
    return max(8, len(name))


def _cell(name, value):
    if value is None:
        return "-"
    return f"{value:.{ {'linf': 0 if isinstance(value, int) else 2, 'psnr': 2, 'visibility': 2}.get(name, 4)}f}"


def _body(args):
    from . import images, metrics
    from .models.checkpoints import Unavailable

    wanted = tuple(dict.fromkeys(args.metrics or METRICS))
    if unknown := [name for name in wanted if name not in METRICS]:
        raise ValueError(f"--metrics {unknown[0]}: choose from {','.join(METRICS)}")
    if args.weights and "lpips" not in wanted:
        raise ValueError("--weights is for lpips, which --metrics leaves out")
    device = cli.place(args)["device"] or ("cuda" if _cuda() else "cpu")
    matched, left_out = pairs(args.distorted, args.reference)
    spaces, weights = _spaces(args, device), None
    if spaces and all(space.tiny for space in spaces.spaces):
        cli.say("only tiny autoencoders are compared, distilled copies of the editors' own; --spaces takes the folder of an "
                "editor, whose autoencoder is the full one", quiet=args.quiet)
    if "lpips" in wanted:
        try:
            weights = metrics.lpips_weights(args.network, args.weights)
        except Unavailable as error:
            if args.metrics or args.weights:
                raise
            weights = cli.sentence(error)
            cli.say(f"lpips is absent: {weights}", quiet=args.quiet)
        else:
            if not weights.pinned:
                cli.say(f"{weights.file} is not known to hold the published weights (its tensors' SHA-256 is "
                        f"{weights.sha256}); lpips is measured with what it holds", quiet=args.quiet)
    names = [str(left or right) for left, right in matched]
    width = max(map(len, [*names, f"mean of {len(names)}"]))
    if not args.json:
        cli.out("  ".join(["PICTURE".ljust(width), *(name.upper().rjust(_width(name)) for name in wanted)]))

    def row(name, values):
        return "  ".join([name.ljust(width), *(_cell(metric, values[metric]).rjust(_width(metric)) for metric in wanted)])

    records, moved, partner = [], [], dict(zip(names, matched, strict=True))

    def one(name):
        left, right = partner[name]
        if left is None or right is None:
            raise ValueError(f"{name}: no picture of this name in {args.reference if left else args.distorted}")
        pictures = images.read(left), images.read(right)
        found = measure(*pictures, wanted, weights, device=device, strict=bool(args.metrics))
        notes = [(path, [*picture.info["notes"], *(["transparency, not compared"] if picture.alpha else [])])
                 for path, picture in zip((left, right), pictures, strict=True)]
        told = [f"{path}: {note}" for path, sentences in notes for note in sentences]
        reasons = [f"{name}: no {metric}: {reason}" for metric, reason in found.get("absent", {}).items()
                   if reason != weights]                     # told once, above
        for path, sentences in notes:
            cli.say_notes(path, sentences, quiet=args.quiet)
        for reason in reasons:
            cli.say(reason, quiet=args.quiet)
        used = {"network": weights.network, "sha256": weights.sha256, "pinned": weights.pinned} if (
            isinstance(weights, metrics.LPIPSWeights)) else None
        record = {"distorted": left, "reference": right, "size": list(pictures[0].image.size), **found,
                  **({"lpips_weights": used} if used else {}), **({"notes": told} if told else {})}
        shifts = latent_shifts(spaces, *pictures) if spaces else []
        records.append(found)
        moved.append(shifts)
        cli.result(record | ({"shifts": shifts} if spaces else {}), row(name, found) + _shift_lines(shifts, width),
                   as_json=args.json)

    code = cli.each_file(names, one, left_out=left_out, done="compared", quiet=args.quiet, debug=args.debug, as_json=args.json)
    if len(records) > 1:
        summary, shifts = mean(records, wanted), mean_shifts(moved)
        cli.result(summary | ({"shifts": shifts} if spaces else {}),
                   row(f"mean of {len(records)}", summary["mean"]) + _shift_lines(shifts, width), as_json=args.json)
        if summary["left_out"]:
            told = ", ".join(f"{count} of {name}" for name, count in summary["left_out"].items())
            cli.say(f"not in the mean, as infinite, undefined or absent: {told}", quiet=args.quiet)
    return code


def _cuda():
    import torch
    return torch.cuda.is_available()


def main(argv=None):
    return cli.run_command(_body, _parser(), argv)


if __name__ == "__main__":
    cli.leave(main())
