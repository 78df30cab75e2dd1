"""Immunize pictures: the library call, and the command over it.

`immunize(image, editor, prompts)` finds a perturbation of at most `eps` (L-infinity on [0,1]) after which the editor
fails, and returns the picture with a report that holds everything needed to reproduce and to judge the run. The budget
holds on the 8-bit picture that is saved. `python -m sifm_min.immunize` does it for files and folders.
"""

import argparse
import contextlib
import inspect
import json
import os
import platform
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path

from . import cli
from .files import writing
from .memory import pictures_at_once


class _Methods(Mapping):
    """Name -> objective, imported when it is asked for: listing the names loads no torch."""

    HOMES = {"sifm": "sifm"} | dict.fromkeys(
        ("photoguard-encoder", "photoguard-diffusion", "editshield", "semantic-attack", "sds", "mist", "ace", "noise"),
        "baselines")

    def __getitem__(self, name):
        if name not in self.HOMES:
            raise KeyError(name)
        return getattr(import_module(f".{self.HOMES[name]}", __package__), name.replace("-", "_"))

    def __iter__(self):
        return iter(self.HOMES)

    def __len__(self):
        return len(self.HOMES)


METHODS = _Methods()
# The paper's protocol, which is the same for all methods; preset "native" runs a baseline as its original was run.
PROTOCOL = {"steps": 100, "step_size": 1 / 255, "schedule": "constant", "init": "random"}
PRESETS = ("protocol", "native")
TOGETHER = ("sifm",)                                         # methods that run several pictures at once


def options_of(method):
    """The names of a method's own options, beside those of the loop."""
    parameters = inspect.signature(METHODS[method]).parameters.values()
    return tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is not p.empty)


def settings(method, preset="protocol", **given):
    """What a run uses, as two dicts: of the loop (the keys of PROTOCOL) and of the method.

    What is given wins over the preset; None counts as not given. Raises ValueError for an unknown method, preset or option.
    """
    if method not in METHODS:
        raise ValueError(f"method {method!r}: choose one of {', '.join(METHODS)}")
    if preset not in PRESETS:
        raise ValueError(f"preset {preset!r}: choose one of {', '.join(PRESETS)}")
    given = {name: value for name, value in given.items() if value is not None}
    known = options_of(method)
    if unknown := [name for name in given if name not in (*PROTOCOL, *known)]:
        raise ValueError(f"{method} has no option {unknown[0]}; its options are {', '.join(known) or 'those of the loop'}")
    chosen = PROTOCOL | (_native(method).settings if preset == "native" else {}) | given
    return {name: chosen.pop(name) for name in PROTOCOL}, chosen


def _native(method):
    from .baselines import NATIVE
    if method not in NATIVE:
        raise ValueError(f"{method} has no preset 'native'; those that have one are {', '.join(NATIVE)}")
    return NATIVE[method]


@dataclass(frozen=True)
class Result:
    """image: the immunized picture, PIL, of the input's size and mode. report: a JSON-ready dict."""

    image: object
    report: dict


def immunize(image, editor, prompts, *, method="sifm", eps=0.03, steps=None, seed=0, step_size=None,
             schedule=None, init=None, preset="protocol", mask=None, memory="auto",
             on_step=None, **options):
    """Immunize a picture against one editor; a list of pictures gives a list of results.

    image: a PIL picture, an `images.Picture`, or a path; or a list of them. prompts: the edit to defeat, or several that the
    steps cycle through (Algorithm 1 has one). method: a name in METHODS; options go to its objective (for SIFM: lam,
    timesteps, taps, reduction, aggregate, noisy, resample, batch). eps: budget on [0,1]. steps, step_size, schedule
    ("constant" or "linear" decay), init ("random" in the budget, or "zero"): of the PGD loop; where not given, and for
    options not given, the preset decides: "protocol", the paper's (100 steps of 1/255, constant, random), or "native", a
    baseline as its original was run. No preset changes eps. mask: the path of a picture of the same size; only where it is
    bright is the picture perturbed. memory: "fast", "low", or "auto", which gives way where memory ends and warns (see
    `memory.plans`); the result is the same. on_step(step, loss, terms) is called after each step of each picture, and from
    the first again where a plan did not fit. Raises ValueError, in one sentence, for whatever the caller can mend.

    Pictures of one size in a list run at once where that is faster (SIFM's can); each gets what it would get alone, but for
    the order in which floats are added. Their seconds are then equal shares.
    """
    listed = isinstance(image, list | tuple)
    found = perturb(image if listed else [image], editor, prompts, method=method, eps=eps, seed=seed, preset=preset, mask=mask,
                    memory=memory, on_step=on_step, steps=steps, step_size=step_size, schedule=schedule, init=init, **options)
    results = [finish() for _, finish in found]
    return results if listed else results[0]


def perturb(pictures, editor, prompts, *, method, eps, seed, preset, mask, memory, on_step, **given):
    """What `immunize` does on the device: for each picture the immunized one, and a function that measures and reports it,
    () -> Result, which other work can go on beside."""
    from PIL import Image

    from . import images

    loop, options = settings(method, preset, **given)
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not prompts:
        raise ValueError("immunize needs at least one prompt")
    if isinstance(editor, str | Path):
        raise ValueError(f"editor {str(editor)!r} is a name; load it first: load_editor({str(editor)!r})")
    groups = {}
    for i, picture in enumerate(pictures := list(pictures)):
        if not isinstance(picture, str | Path | Image.Image | images.Picture):
            raise ValueError(f"image is of type {type(picture).__name__}; give a PIL picture or a path")
        if not isinstance(picture, images.Picture):
            picture = images.read(picture) if isinstance(picture, str | Path) else images.picture(picture)
        pictures[i] = picture
        groups.setdefault(batch_key(picture), []).append(i)
    images.budget(eps)                                       # an impossible budget is refused before any work
    found = {}
    for members in groups.values():
        size = at_once(method, memory, editor, pictures[members[0]])
        for part in (members[start:start + size] for start in range(0, len(members), size)):
            made = _together([pictures[i] for i in part], editor, prompts, method, loop, options, eps=eps, seed=seed, mask=mask,
                             memory=memory, preset=_told(method, preset), on_step=on_step)
            found |= zip(part, made, strict=True)
    return [found[i] for i in range(len(pictures))]


def batch_key(picture):
    """What pictures that run at once have in common: size and channels."""
    return picture.image.size, picture.channels


def at_once(method, memory, editor, picture):
    """How many pictures of this one's `batch_key` run at once."""
    return pictures_at_once(memory, editor, *picture.image.size) if method in TOGETHER else 1


def _together(pictures, editor, prompts, method, loop, options, *, eps, seed, mask, memory, preset, on_step):
    """`perturb` of pictures of one size and as many channels."""
    import torch

    from . import images
    from . import memory as plans
    from .pgd import pgd

    started, count, channels = time.perf_counter(), len(pictures), pictures[0].channels
    region = images.read_mask(mask, *pictures[0].image.size) if mask is not None else None
    _reset_peak(editor.device)
    original = torch.cat([images.to_pixels(picture.image) for picture in pictures]).to(editor.device)
    with torch.no_grad():
        contexts = editor.contexts(prompts)
    texts = {"prompts": prompts} if "prompts" in inspect.signature(METHODS[method]).parameters else {}
    curves = [[] for _ in pictures]

    def perturbed(part, plan):
        """(deltas, objective, the loop as it ran) of the pictures in this slice; each starts from the seed."""
        generator = [torch.Generator().manual_seed(seed) for _ in pictures[part]]
        generator = generator if len(generator) > 1 else generator[0]
        batch = {"batch": plan.batch} if "batch" in options_of(method) else {}
        objective = METHODS[method](editor, original[part], contexts, generator=generator, **texts, **options | batch)

        def in_colour(x, step):                              # a grey picture is perturbed as one channel, and stays grey
            return objective(x.expand(-1, 3, -1, -1), step)

        def record(step, loss, terms):
            for i, curve in enumerate(curves[part]):
                own = (loss, terms) if isinstance(loss, float) else (loss[i], {name: each[i] for name, each in terms.items()})
                curve.append({"loss": own[0], **own[1]})
                if on_step:
                    on_step(step, *own)

        # The noise control has no objective: it is the loop's random start as it is.
        ran = loop | ({"steps": 0, "init": "random"} if objective is None else {})
        return pgd(original[part, :channels], in_colour, eps, **ran, mask=region, generator=generator,
                   on_step=record), objective, ran

    def work(plan):
        for curve in curves:
            curve.clear()
        found = [perturbed(slice(start, start + plan.pictures), plan) for start in range(0, count, plan.pictures)]
        return torch.cat([deltas for deltas, _, _ in found]), *found[0][1:]

    begun = time.perf_counter()
    (deltas, objective, loop), plan = plans.run(work, memory, editor, **_timesteps_of(method, options), pictures=count)
    looped = time.perf_counter() - begun
    made = [images.quantize(picture, delta, eps) for picture, delta in zip(pictures, deltas.split(1), strict=True)]
    seconds = {"seconds": round((time.perf_counter() - started) / count, 3), "loop_seconds": round(looped / count, 3)}
    shared = {
        "editor": editor.provenance(),
        "method": method, "note": getattr(objective, "note", ""), "prompts": prompts, "preset": preset,
        "options": {"eps": eps, **loop, "seed": seed, "mask": str(mask) if mask is not None else None,
                    **_spelled_out(METHODS[method], editor, options)},
    }
    spent = {
        "passes": _passes(objective, len(curves[0])), **seconds,
        "memory": {"asked": memory, **plan._asdict()}, "peak_memory_bytes": _peak(editor.device),
        "versions": {"sifm_min": import_module(__package__).__version__, "torch": torch.__version__,
                     "python": platform.python_version()},
    }
    return [(image, partial(_result, picture, image, eps, shared, {"loss": curve, **spent}))
            for picture, image, curve in zip(pictures, made, curves, strict=True)]


def _result(picture, image, eps, shared, spent):
    from . import images, metrics
    width, height = picture.image.size
    after, before = images.to_pixels(image), images.to_pixels(picture.image)
    return Result(image, {
        "input": {"width": width, "height": height, "mode": picture.mode, **picture.info}, **shared,
        "linf_steps": images.steps_used(picture.image, image), "budget_steps": images.budget(eps),
        "psnr": metrics.psnr(after, before).item(),
        "ssim": metrics.ssim(after, before).item() if min(width, height) >= 11 else None, **spent})


def _timesteps_of(method, options):
    """What a method's memory depends on: how many timesteps it has, and how many at once it was asked for."""
    if "batch" not in options_of(method):
        return {}
    timesteps = options.get("timesteps", inspect.signature(METHODS[method]).parameters["timesteps"].default)
    return {"count": timesteps if isinstance(timesteps, int) else len(timesteps), "batch": options.get("batch")}


def _spelled_out(method, editor, options):
    """The objective's options with its defaults filled in, as plain values."""
    defaults = {name: p.default for name, p in inspect.signature(method).parameters.items() if p.default is not p.empty}
    values = {**defaults, **options}
    if "taps" in values:
        values["taps"] = list(values["taps"] or editor.default_taps)
    if isinstance(values.get("timesteps"), int):
        values["timesteps"] = editor.timesteps(values["timesteps"]).tolist()
    return values


def _told(method, preset):
    """What a report states of the preset: of "native" also whose it is, and the original's budget, which it leaves alone."""
    native = _native(method) if preset == "native" else None
    return {"name": preset} | ({"source": native.source, "budget": native.budget} if native else {})


def _passes(objective, steps):
    """How many forward and backward passes of VAE encoder and denoiser the run took, as the objective counts them: "100
    iterations" says nothing of cost."""
    if hasattr(objective, "passes"):
        return objective.passes(steps)
    return {} if objective else dict.fromkeys(("encoder_forward", "encoder_backward", "denoiser_forward",
                                               "denoiser_backward"), 0)


def _reset_peak(device):
    if device.type == "cuda":
        import torch
        torch.cuda.reset_peak_memory_stats(device)


def _peak(device):
    """Peak memory in bytes: of the device on cuda, of this process since its start elsewhere; None on Windows."""
    if device.type == "cuda":
        import torch
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class _CallableModule(type(sys)):
    """`sifm_min.immunize` is a file that `python -m` runs and a function that the library calls: the module is callable."""

    __call__ = staticmethod(immunize)


sys.modules[__name__].__class__ = _CallableModule
sys.modules[__name__].__signature__ = inspect.signature(immunize)

# -- the command ---------------------------------------------------------------------------------------------------------

EXAMPLES = """examples:
  %(prog)s photo.png --prompt "make her a witch" -o out
  %(prog)s photo.png --prompt "make her a witch" --editor instruct-pix2pix -o out
  %(prog)s photos/ --prompt "turn him into a zombie" --prompt "make it night" --steps 200 -o out

writes, per picture: NAME_immunized.png, NAME_preview.png (original, its edit, immunized, its edit, perturbation x10) and
NAME.json (the report). A folder resumes where it stopped. Exit codes: 0 all done, 1 some pictures failed, 2 usage,
3 weights unavailable, 130 interrupted."""
OUTPUTS = ("_immunized.png", "_preview.png", ".json")


def _parser():
    parser = cli.Parser("immunize",
                        "Write a picture again with an invisible perturbation that makes text-guided edits of it fail.",
                        EXAMPLES)
    add = parser.add_argument
    add("pictures", nargs="*", type=cli.path, metavar="PICTURE-OR-FOLDER")
    add("--prompt", action="append", type=cli.prompt, help="the edit to defeat; several take turns")
    add("-o", "--output", type=cli.path, metavar="DIR", help="where results go (created if absent)")
    parser.editor()
    add("--method", default="sifm", choices=tuple(METHODS))
    add("--eps", type=cli.eps, default=0.03, help="budget, as 0.03 or 8/255 (default: 0.03)")
    add("--preset", choices=PRESETS, default="protocol",
        help="what holds unless told otherwise: the paper's protocol for all methods (default), or how the original of a "
             "baseline was run; the budget is --eps in both")
    add("--steps", type=cli.count, help="PGD iterations (protocol: 100)")
    add("--step-size", type=cli.positive, help="of one iteration, on [0,1] (protocol: 1/255)")
    add("--schedule", choices=("constant", "linear"), help="of the step size (protocol: constant)")
    add("--init", choices=("random", "zero"), help="where the perturbation starts (protocol: random)")
    add("--mask", type=cli.path, metavar="PICTURE", help="perturb only where this picture is bright")
    own = parser.add_argument_group("options of single methods, named behind each").add_argument
    own("--lam", "--lambda", type=cli.number, help="weight of the distance term (sifm; default: 0.1)")
    own("--timesteps", type=cli.timesteps,
        help="a count, or timesteps as 900,500,100 (sifm, semantic-attack; default: 10)")
    own("--taps", type=cli.commas(), help="activations to perturb, comma-separated; `list` prints what there is (sifm)")
    own("--reduction", choices=("balanced", "relative", "mean", "literal"),
        help="of activations to a number (sifm; default: balanced)")
    own("--aggregate", choices=("loss-mean", "feature-mean"), help="of the taps (sifm; default: loss-mean)")
    own("--noisy", choices=("paper", "deploy"),
        help="whose latent is noised: the immunized picture's (default), or the original's (sifm)")
    own("--resample", action=argparse.BooleanOptionalAction,
        help="draw new noise at every step (sifm; default: no; photoguard-diffusion; default: yes)")
    own("--batch", type=cli.count, help="timesteps at once (sifm, semantic-attack; default: all)")
    own("--unroll", type=cli.count, help="denoising steps to look through (photoguard-diffusion; default: 4)")
    own("--repeats", type=cli.count, help="edits per step, each from its own noise (photoguard-diffusion; default: 1)")
    own("--content", type=cli.prompt, metavar="TEXT", help="what to protect, as `man` (semantic-attack; default: the prompts)")
    own("--variant", help="which form of the loss: zero, grey (photoguard-encoder); eot, plain, released (editshield); minus, "
                          "plus (sds); fused, textural, semantic (mist); ace+, ace (ace); the first is the default")
    parser.memory()
    add("--no-preview", action="store_true", help="skip the preview and its two edits")
    parser.shared("device", "dtype", "vae-dtype", "seed", "overwrite")
    return parser


OPTIONS = ("lam", "timesteps", "taps", "reduction", "aggregate", "noisy", "resample", "batch", "unroll", "repeats", "content",
           "variant")


def _given(args):
    """Of loop and method, what the command line set; the rest is the preset's, or the method's own default."""
    return {name: value for name in (*PROTOCOL, *OPTIONS) if (value := getattr(args, name)) is not None}


def _body(args):
    from . import images

    listing = args.taps == ["list"]
    if not listing and not (args.pictures and args.prompt and args.output):
        raise ValueError("give at least one picture or folder, --prompt TEXT and -o DIR (--help shows examples)")
    if not listing:
        settings(args.method, args.preset, **_given(args))   # an option that the method has not is told before any work
    pictures = []
    if not listing:
        pictures = find(args.pictures, args.output, OUTPUTS)
        index, count = cli.rank(os.environ)
        pictures = pictures[index::count]
    if args.mask:                                            # what is wrong with the mask itself is no picture's fault
        images.read_mask(args.mask, *images.read(args.mask).image.size)
    editor = load(args)
    if listing:
        for name in editor.tap_names:
            default = name in editor.default_taps
            cli.result({"tap": name, "default": default}, f"{name}{'  (default)' if default else ''}", as_json=args.json)
        return cli.OK
    editor_taps = set(editor.tap_names)
    if unknown := [name for name in args.taps or () if name not in editor_taps]:
        raise ValueError(f"--taps {unknown[0]}: this editor has no such activation; --taps list prints those it has")
    writing.make_folder(args.output)
    if editor.notice:
        cli.say(editor.notice, quiet=args.quiet)
    return cli.each_file(pictures, lambda jobs: _work(jobs, editor, args), read=lambda path: _ready(path, editor, args),
                         write=lambda done: _write(*done, args, editor.notice),
                         key=lambda job: batch_key(job.picture),
                         most=lambda job: at_once(args.method, args.memory, editor, job.picture),
                         quiet=args.quiet, debug=args.debug, as_json=args.json)


def load(args):
    """The editor that a command's flags (`cli.Parser.editor`) ask for."""
    from .editors import load_editor
    place = cli.place(args)
    if place["device"] is None and "LOCAL_RANK" in os.environ:
        import torch
        place["device"] = f"cuda:{os.environ['LOCAL_RANK']}" if torch.cuda.is_available() else None
    editor = load_editor(args.editor, revision=args.revision, components=args.components, t5=args.t5, **place)
    if args.strength is not None:
        if "strength" not in editor.OPTIONS:
            raise ValueError(f"--strength is for img2img, which {args.editor} does not do")
        set_strength(editor, args.strength)
    if args.compile:
        editor.compile()
    return editor


def set_strength(editor, strength):
    """Every edit by this editor of img2img is at this strength; too little of too few steps is a ValueError now."""
    editor.plan(strength=strength)
    editor.defaults = replace(editor.defaults, strength=strength)


def find(names, output, endings):
    """The pictures named, folders opened, for a command that writes <output>/<stem><ending> for each of them.

    Earlier results that lie in a folder are left out. Raises ValueError where two pictures would write one file, or one
    picture would be overwritten by the result of another.
    """
    from . import images
    named, stems = set(names), {}
    for path in images.find(names):
        if path in named or not path.name.endswith(endings):
            other = stems.setdefault(path.stem, path)
            if os.path.realpath(other) != os.path.realpath(path):
                raise ValueError(f"{other} and {path} would both write {path.stem}{endings[0]}; "
                                 "run them into different folders")
    if not stems:
        raise ValueError(f"{names[0]}: nothing in this folder but earlier results")
    here = os.path.realpath(output)
    inside = {path.name: path for path in stems.values() if os.path.realpath(path.parent) == here}
    if lost := [inside[stem + ending] for stem in stems for ending in endings if stem + ending in inside]:
        raise ValueError(f"{lost[0]} would be overwritten by a result; choose another folder for the results")
    return list(stems.values())


@dataclass(frozen=True)
class _Job:
    """A picture that was read, and where its results go. paths: of OUTPUTS; existing: those of them that lie there, and may
    be replaced; asked: what decides the result."""

    path: Path
    picture: object
    paths: list
    existing: list
    asked: dict


def _ready(path, editor, args):
    """The picture of this file, None where its results are there already."""
    from . import images

    paths = [args.output / f"{path.stem}{end}" for end in OUTPUTS]
    immunized_path, _, report_path = paths
    asked, before = _asked(path, editor, args), _read_report(report_path)
    existing = [p for p in paths if p.exists()]
    if not args.overwrite and before.get("asked") == asked:
        wanted = {immunized_path, report_path} if args.no_preview else set(paths)
        if before.get("finished") and wanted <= set(existing):
            cli.say(f"{path}: done before, skipped", quiet=args.quiet)
            if args.json:
                cli.out(cli.to_json(_in_short(before) | {"skipped": True}))
            return None
    elif existing and not args.overwrite:
        raise ValueError(f"{existing[0]} exists, from another picture or other options; "
                         "add --overwrite or choose another folder")
    return _Job(path, images.read(path), paths, existing, asked)


def _work(jobs, editor, args):
    """[(job, a function that reports, the edits of the preview)]: what the device does for these pictures."""
    given, first = _given(args), jobs[0].path.name
    what = first if len(jobs) == 1 else f"{first} and {len(jobs) - 1} more"
    steps = settings(args.method, args.preset, **given)[0]["steps"]
    with cli.progress(total=steps * len(jobs), what=what, quiet=args.quiet) as bar:
        found = perturb([job.picture for job in jobs], editor, args.prompt, method=args.method, eps=args.eps, seed=args.seed,
                        preset=args.preset, mask=args.mask, memory=args.memory,
                        on_step=lambda step, loss, terms: bar.update(), **given)
    return [(job, finish, None if args.no_preview else _edits(job.picture, image, editor, args))
            for job, (image, finish) in zip(jobs, found, strict=True)]


def _write(job, finish, edits, args, notice):
    from . import images

    result = finish()
    preview = None if args.no_preview else _preview(job.picture, result.image, edits, args.prompt[0], notice)
    immunized_path, preview_path, report_path = job.paths
    # The report frames the pictures: begun before them and finished after them, it tells a later run whose they are.
    report = {"finished": False, "asked": job.asked}
    with contextlib.ExitStack() as undo:                     # disk full: one file of three helps nobody
        def put(target, content, write=writing.write, **how):
            write(target, content, overwrite=args.overwrite or target in job.existing, **how)
            if target not in job.existing:
                undo.callback(_remove, target)

        put(report_path, cli.to_json(report) + "\n")
        report |= {"finished": True, "picture": str(job.path), "immunized": immunized_path.name, **result.report}
        put(immunized_path, result.image, images.write_checked, original=job.picture, eps=args.eps)
        if preview is not None:
            put(preview_path, preview, images.write)
        writing.write(report_path, cli.to_json(report, indent=1) + "\n", overwrite=True)
        undo.pop_all()
    cli.result(_in_short(report), f"{immunized_path}: at most {report['linf_steps']}/255 per channel "
               f"(budget {report['budget_steps']}/255), PSNR {report['psnr']:.1f} dB, {report['seconds']:.0f} s",
               as_json=args.json)


def _remove(path):
    with contextlib.suppress(OSError):
        path.unlink()


def _in_short(report):
    """A report as --json prints it on one line."""
    return {key: value for key, value in report.items() if key not in ("loss", "asked")}


def _asked(path, editor, args):
    """What decides the result: the bytes of picture, mask and weights, and every option. The same needs no second run."""
    from .models.checkpoints import sha256
    told_apart = {"pictures", "output", "overwrite", "json", "quiet", "debug", "device"}
    values = {key: str(value) for key, value in vars(args).items() if key not in told_apart}
    if not path.is_file():                                   # hashing a device would never end
        raise ValueError(f"{path}: no such file")
    return {**values, "sha256": sha256(path), "mask": args.mask and sha256(args.mask),
            "weights": editor.provenance()["weights"]}


def _read_report(path):
    """What an earlier run says of these results; an empty dict where there is no report, or not one of ours."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError):
        return {}


def _edits(picture, immunized, editor, args):
    """The edits of the original and of the immunized picture."""
    with cli.progress(total=2 * len(editor.plan().timesteps), what="preview", quiet=args.quiet) as bar:
        return [editor.edit(image.convert("RGB"), args.prompt[0], seed=args.seed, on_step=lambda i, n: bar.update())
                for image in (picture.image, immunized)]


def _preview(picture, immunized, edits, prompt, notice):
    from . import images
    captions = ("original", f"edited: {prompt}", "immunized", f"edited: {prompt}", "perturbation x10")
    original = picture.put_together(picture.image)           # with its transparency, as the immunized one has it
    pictures = (original, edits[0], immunized, edits[1], images.amplify(picture.image, immunized))
    return images.sheet(list(zip(captions, pictures, strict=True)), footer=notice)


def main(argv=None):
    return cli.run(_body, _parser(), argv)


if __name__ == "__main__":
    cli.leave(main())
