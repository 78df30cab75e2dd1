"""Immunize pictures: the library call, and the command over it.

`immunize(image, editor, prompts)` finds a perturbation of at most `eps` (L-infinity on [0,1]) after which the editor
fails, and returns the picture with a report that holds everything needed to reproduce and to judge the run. The budget
holds on the 8-bit picture that is saved. `python -m sifm_min.immunize` does it for files and folders.
"""

import argparse
import inspect
import json
import math
import os
import platform
import re
import sys
import time
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path

from . import cli, methods
from .files import listing as listing_of
from .files import reports, writing
from .files.digests import digest
from .files.ranks import rank
from .files.weight_digests import hash_weights
from .immunizing import flags
from .immunizing.flags import each_of, given, parser
from .immunizing.shares import (
    about_bank,
    about_editors,
    check_shares,
    drawn_text,
    group_of,
    planned_timesteps,
    shared_settings,
    shares_of,
    spelled_out,
    told,
)
from .instructions.bank import find_bank
from .memory import in_words
from .methods import METHODS
from .metrics.perturbation import local_budget, measured, rms_bound


@dataclass(frozen=True)
class Result:
    """image: the immunized picture, PIL, of the input's size and mode. report: a JSON-ready dict.

    `images.write_picture(path, result.image)` writes it with all that decides its colours; `image.save` keeps the ICC
    profile only.
    """

    image: object
    report: dict


def immunize(image, editor, prompts=(), *, method=None, eps=0.03, budget="uniform", steps=None, seed=0, step_size=None,
             schedule=None, init=None, preset="protocol", mask=None, robust=False, any_prompt=False, each=None, flat=None,
             refine_text=None, blur=None, memory="auto", on_step=None, **options):
    """Immunize a picture against one editor, or against several at once.

    image: a PIL picture, an `images.Picture`, or a path.
    editor: an editor, or a list of them (or `editors.Several`) for one perturbation against all: the loss is the sum of the
      editors' own, each over its own scale (see `immunizing.joint`). Beside a method that needs a denoiser, editors with
      encoders alone, `latents`, have the method `latent`.
    prompts: the edit to defeat, or several that the steps cycle through (Algorithm 1 has one); none for `latents`.
    method: None is "sifm", or "latent" for `latents`; or a name in METHODS, a function, or
      "module:name" of one (see `methods`); options go to it (for SIFM: lam, timesteps,
      taps, reduction, aggregate, noisy, resample, batch).
    each: of several editors, a list with a dict of options for each alone, such as {"taps": [...]}, which win over the others;
      "prompts" among them are its own words for the edits, as for an editor that is told descriptions.
    eps: the budget on [0,1]; no preset changes it. budget: "uniform", eps everywhere, or "texture", less where the picture
      is smooth (`metrics.texture_budget`), with steps scaled to it and along the gradient (`rms` of `pgd`).
    steps, step_size, schedule ("constant" or "linear" decay), init ("random" in the budget, or "zero"): of the PGD loop.
    preset: decides these and the options where they are not given; "protocol", the same for all methods (the paper's 100
      steps; of 1/255, constant and from a random start, which are ours), or "native", a baseline as its original was run.
    mask: the path of a picture of the same size; only where it is bright is the picture perturbed.
    robust: True makes the loss an expectation over what pictures meet on their way: every step draws nothing, a JPEG, a resize
      or a blur, and the method sees both pictures after it (see `purifiers`); "cleaner" draws AdverseCleaner as well.
    any_prompt: True draws the text of every step from the prompts, 64 general instructions and the empty prompt, every text
      once before any comes again; or the path of a text file with instructions of one's own, or a `Bank` (`instructions.bank`).
    flat, refine_text: TDAE's flat minima and text refinement, True or a dict of their numbers; None: the method's default.
      blur: BlurGuard's blur of the perturbation, a standard deviation in pixels. All three: see `objectives.around`.
    memory: "fast", "low", or "auto", which gives way where memory ends and warns (see `memory.plans`); the result is the
      same. Of several editors, "low" and the last resort of "auto" hold one at a time on the device.
    on_step(step, loss, terms): called after each step, and from the first again where a memory plan did not fit.

    Raises ValueError, in one sentence, for every error that the caller can correct.
    """
    import torch

    from . import images
    from . import memory as plans
    from .editors import check
    from .immunizing import joint
    from .models import cpu
    from .models.precision import full_float32
    from .objectives.around import choose
    from .purifiers import draws
    from .purifiers.expectation import purify_steps

    group = group_of(editor)
    name, loop, shares = shares_of(group, method, preset, each, {
        "steps": steps, "step_size": step_size, "schedule": schedule, "init": init, **options})
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    bank = find_bank(any_prompt) if any_prompt else None
    if not bank and not prompts and any(getattr(share.editor, "needs_prompt", True) and not share.texts for share in shares):
        raise ValueError("immunize needs at least one prompt")
    around = choose(name, flat=flat, refine_text=refine_text, blur=blur, any_prompt=bank is not None)
    for one in group.editors:
        check(one)
    check_shares(shares)
    images.budget(eps)                                       # an impossible budget is refused before any work
    purifiers = draws.stated(robust) if robust else False
    picture = _picture(image)
    local, rms = local_budget(picture, eps, budget), rms_bound(budget)
    region = images.read_mask(mask, *picture.image.size) if mask is not None else None

    started = time.perf_counter()
    plans.reset_peak(group.device)
    with in_words(), torch.no_grad():
        original = images.to_pixels(picture.image).to(group.device)
        shares = told(shares, prompts, bank, forget=memory == "low" and len(shares) > 1)
    orders = {share.name: share.order(loop["steps"], seed) if bank else [] for share in shares}
    timesteps, curve = planned_timesteps(shares), []

    def record(step, loss, terms):
        curve.append({"loss": loss, **terms, **drawn_text(shares, orders, step)})
        if on_step:
            on_step(step, loss, terms)

    @full_float32()
    def perturb(plan):
        """(delta, objective, the loop as it ran) under this memory plan."""
        curve.clear()
        pixels = original[:, :picture.channels]
        parts = torch.as_tensor(local / eps).to(original)                    # each value's share of the largest budget

        def make(share, generator):
            batch = {"batch": share.options.get("batch") or plan.batch} if share.timesteps else {}
            texts = {"prompts": share.texts} if share.takes_texts else {}

            def build(x_orig):
                return share.function(share.editor, x_orig.to(share.editor.device), share.contexts, generator=generator,
                                      **texts, **share.options | batch)

            build = around.build(build, share.method, share.editor, share.contexts, generator)
            made = (purify_steps(build, original, draws.Draws(robust, seed), generator, share.method) if robust
                    else build(original))
            return share.in_order(made, orders[share.name])

        def descend(loss, ran, generator, on_step=None):
            return around.descend(pixels, loss, local, **ran | {"step_size": ran["step_size"] * parts}, mask=region,
                                  rms=rms, generator=generator, on_step=on_step)

        if len(shares) == 1 or name == "noise":
            generators = [torch.Generator().manual_seed(seed)]
            objective = make(shares[0], *generators)
            loss = methods.checked_loss(objective, name)
        else:
            few = loop | {"steps": min(joint.MEASURED, loop["steps"]), "schedule": "constant"}
            objective = loss = joint.joint_objective(group, shares, make, seed, lambda own, drawn: descend(own, few, drawn),
                                                     parts if region is None else parts * region.to(original),
                                                     norm=1 if rms is None else 2)
            generators = objective.generators

        def in_colour(x, step):                              # a grey picture is perturbed as one channel, and stays grey
            return loss(x.expand(-1, 3, -1, -1), step)

        # The noise control has no objective: it is the loop's random start as it is.
        ran = loop | ({"steps": 0, "init": "random"} if objective is None else {})
        minimised = around.flattened(in_colour, generators, local, pixels, region)
        return descend(minimised, ran, generators[0], record), objective, ran

    begun = time.perf_counter()
    planned = group if len(shares) > 1 else group.editors[0]
    with cpu.record() as kernels:
        (delta, objective, loop), plan = plans.run_planned(perturb, memory, planned, **timesteps, job=name,
                                                           size=math.prod(group.frame(*picture.image.size)))
    looped = time.perf_counter() - begun
    immunized = images.quantize(picture, delta, local)
    seconds = {"seconds": round(time.perf_counter() - started, 3), "loop_seconds": round(looped, 3)}
    measures = _measures(group.editors, picture, immunized, local, region, seed)
    return Result(immunized, {
        "input": {"width": picture.image.width, "height": picture.image.height, "mode": picture.mode, **picture.info},
        **about_editors(shares, getattr(objective, "scales", {})),
        "method": name, "note": getattr(objective, "note", ""), "prompts": prompts, **about_bank(bank, shares),
        "preset": _preset(name, preset),
        "options": {"eps": eps, "budget": budget, **loop, "seed": seed, "mask": str(mask) if mask is not None else None,
                    "robust": purifiers, **around.record(), **(spelled_out(shares[0]) if len(shares) == 1 else {})},
        **measured(picture, immunized, local), **measures,
        "loss": _with_draws(curve, objective), "passes": methods.counted_passes(around.counted(objective), len(curve)),
        "gradient_evaluations": around.gradients(objective, len(curve)), **seconds,
        "memory": {"asked": memory, **plan._asdict()}, "peak_memory_bytes": plans.peak(group.device),
        "cpu_kernels": cpu.describe(kernels, group.device),
        "versions": {"sifm_min": import_module(__package__).__version__, "torch": torch.__version__,
                     "python": platform.python_version()},
    })


def _picture(image):
    from PIL import Image

    from . import images
    if isinstance(image, images.Picture):
        return image
    if isinstance(image, str | Path):
        return images.read(image)
    if not isinstance(image, Image.Image):
        raise ValueError(f"image is of type {type(image).__name__}; give one PIL picture or a path")
    return images.picture(image)


def _measures(editors, picture, immunized, eps, region, seed):
    """The measurements that editors make themselves, beside uniform noise of the same budget and mask; {} of most.

    Where one fails, as for lack of memory, "measures_absent" says why: the immunized picture is not lost with it.
    """
    measuring = [editor for editor in editors if hasattr(editor, "measures")]
    if not measuring:
        return {}
    from .editors import shifts
    control = shifts.noise_control(picture, eps, seed=seed, mask=region)
    found = {}
    for editor in measuring:
        try:
            with in_words():
                measures = editor.measures(picture, immunized, control)
        except ValueError as error:
            found["measures_absent"] = str(error)
            continue
        for name, records in measures.items():
            found[name] = [*found.get(name, []), *records]
    return found


def _with_draws(curve, objective):
    """The loss of every step; with robust, beside the purifier that was drawn in it."""
    drawn = getattr(objective, "drawn", ())
    return [step | {"purifier": purifier} for step, purifier in zip(curve, drawn, strict=True)] if drawn else curve


def _preset(method, preset):
    """The preset as a report states it; "native" with its source, and with the original's budget, which is not used."""
    native = methods.native(method) if preset == "native" else None
    return {"name": preset} | ({"source": native.source, "budget": native.budget} if native else {})


class _CallableModule(type(sys)):
    """`sifm_min.immunize` is a file that `python -m` runs and a function that the library calls: the module is callable."""

    __call__ = staticmethod(immunize)


sys.modules[__name__].__class__ = _CallableModule
sys.modules[__name__].__signature__ = inspect.signature(immunize)

# -- the command ---------------------------------------------------------------------------------------------------------

OUTPUTS, EDITS = ("_immunized.png", "_preview.png", ".json"), ("_edited.png", "_edited.json")        # of immunize and edit
RESULTS = 2                                                  # of both; raised when code changes them


def _body(args):
    from . import images
    from .objectives.around import choose

    sources = args.editor or ["miniature"]
    args.editor = sources[0] if len(sources) == 1 else sources
    encoders = [re.match("latents(:|$)", source) is not None for source in sources]
    listing, latents = args.taps == ["list"], all(encoders)
    args.method = args.method or ("latent" if latents else "sifm")
    if not listing and not args.pictures and isinstance(args.any_prompt, Path):
        raise ValueError(f"--any-prompt took {args.any_prompt} for its FILE, and no picture is left; put it behind the "
                         "pictures")
    if not listing and not (args.pictures and (args.prompt or args.any_prompt or latents) and args.output):
        prompt = "" if latents else ", --prompt TEXT"
        raise ValueError(f"give at least one picture or folder{prompt} and -o DIR (--help shows examples)")
    if not listing:                                          # an unknown option is an error before any work
        each, arguments = each_of(args, encoders), given(args)
        shared_settings(args.method, encoders, args.preset, each, **arguments)
        choose(methods.find_method(args.method)[0], **flags.around(args), any_prompt=bool(args.any_prompt))
        pictures, left_out = find(args.pictures, args.output, OUTPUTS)
        index, count = rank(os.environ)
        pictures, left_out = pictures[index::count], {} if index else left_out
        if args.any_prompt:
            args.any_prompt = find_bank(args.any_prompt)
    if args.mask:                                            # what is wrong with the mask itself is no picture's fault
        images.read_mask(args.mask, *images.read(args.mask).image.size)
    group = group_of([editor_of(argparse.Namespace(**vars(args) | own)) for own in _of_each(args, sources)])
    set_strength(group.editors, args.strength)
    editor = group if len(sources) > 1 else group.editors[0]
    if listing:
        return _list_taps(group, args)
    _, loop, shares = shares_of(group, args.method, args.preset, each, arguments)
    check_shares(shares)
    for share in shares:
        known = set(share.editor.tap_names)
        if unknown := [name for name in share.options.get("taps") or () if name not in known]:
            who = f"{share.name} has no such activation; --option 2:taps=... is for the second editor alone, and" if (
                share.name) else "this editor has no such activation;"
            raise ValueError(f"--taps {unknown[0]}: {who} --taps list prints those it has")
    writing.make_folder(args.output)
    for one in group.editors:
        if pictures:
            hash_weights(one, args.output)
        cli.say_editor(one, quiet=args.quiet)
    if args.any_prompt and (deaf := [str(share.editor.name) for share in shares if not share.reads_text]):
        cli.say(f"{' and '.join(deaf)}: no text is read by {shares[-1].method if len(deaf) == len(shares) else 'it'}, so "
                "--any-prompt changes nothing there", quiet=args.quiet)
    return cli.each_file(pictures, lambda path: _immunize_file(path, editor, args, loop["steps"], each),
                         output=args.output, left_out=left_out, done="immunized", quiet=args.quiet, debug=args.debug,
                         as_json=args.json)


def _list_taps(group, args):
    """Print the activations of each editor."""
    for called, editor in zip(group.names, group.editors, strict=True):
        of = {"editor": called} if len(group.editors) > 1 else {}
        for name in editor.tap_names:
            default = name in editor.default_taps
            cli.result({**of, "tap": name, "default": default},
                       f"{called + ': ' if of else ''}{name}{'  (default)' if default else ''}", as_json=args.json)
    return cli.OK


def _of_each(args, sources):
    """The flags of each editor among several, as `editor_of` takes them."""
    if len(sources) == 1:
        return [{"editor": sources[0]}]
    if args.revision is not None:
        raise ValueError("--revision is of one hub repository, and several editors are given: fetch it with `python -m "
                         f"{__package__}.weights download ID --revision {args.revision}`, and give --editor the folder that "
                         "this prints")
    single = [Path(source).expanduser().is_file() for source in sources]
    if args.components is not None and not any(single):
        raise ValueError("--components is for an editor that is a single file, and none of these is one")
    return [{"editor": source, "components": args.components if file else None}
            for source, file in zip(sources, single, strict=True)]


def editor_of(args):
    """The editor that a command's flags (`cli.Parser.editor`) ask for; `set_strength` is apart from it."""
    from .editors import load_editor
    return load_editor(args.editor, revision=args.revision, components=args.components, t5=args.t5, **cli.place(args))


def set_strength(editors, strength):
    """Set the strength of every edit by those editors that do img2img, unless it is None.

    Raises ValueError where none of them does, or where the strength leaves no denoising step.
    """
    if strength is None:
        return
    taking = [editor for editor in editors if "strength" in editor.OPTIONS]
    if not taking:
        names = " and ".join(str(editor.name) for editor in editors)
        raise ValueError(f"--strength is for img2img, which {names} {'does' if len(editors) == 1 else 'do'} not do")
    for editor in taking:
        editor.plan(strength=strength)
        editor.defaults = replace(editor.defaults, strength=strength)


def find(names, output, endings):
    """The `Listing` of the pictures named, folders opened, for a command that writes <output>/<stem><ending> for each.

    endings: of the results, that of the report last. Results of earlier runs are left out of folders. Raises ValueError
    where two pictures would write one file, or one picture would be overwritten by the result of another.
    """
    def made(path):
        """A result of either command; immunized pictures are there to be edited."""
        known = any(reports.is_result(path, each[:-1], each[-1]) for each in (OUTPUTS, EDITS))
        return known and not (endings == EDITS and path.name.endswith(OUTPUTS[0]))

    listing = listing_of.list_pictures(names, made)
    stems = {}
    for path in listing.pictures:
        other = stems.setdefault(path.stem, path)
        if os.path.realpath(other) != os.path.realpath(path):
            raise ValueError(f"{other} and {path} would both write {path.stem}{endings[0]}; "
                             "run them into different folders")
    here = os.path.realpath(output)
    inside = {path.name: path for path in stems.values() if os.path.realpath(path.parent) == here}
    if lost := [inside[stem + ending] for stem in stems for ending in endings if stem + ending in inside]:
        raise ValueError(f"{lost[0]} would be overwritten by a result; choose another folder for the results")
    return listing._replace(pictures=list(stems.values()))


def _immunize_file(path, editor, args, steps, each):
    """One picture from its file to its results: read, perturb, quantize, write with the report, preview."""
    from . import images
    from .immunizing import previews

    immunized_path, preview_path, report_path = paths = [args.output / f"{path.stem}{end}" for end in OUTPUTS]
    asked = question(path, editor, args)
    before = reports.earlier(report_path, asked, paths[:1] if args.no_preview else paths[:2], overwrite=args.overwrite)
    done = before is not None and immunized_path.exists()
    if done and (args.no_preview or preview_path.exists()):
        return tell_skipped(path, before, args)
    picture = images.read(path)
    cli.say_notes(path, picture.info["notes"], quiet=args.quiet)
    if done:                                                 # all but the preview
        immunized, report = picture.put_together(images.read(immunized_path).image), before
    else:
        with cli.progress(total=steps, what=path.name, quiet=args.quiet) as bar:
            result = immunize(picture, editor, args.prompt or (), method=args.method, eps=args.eps, budget=args.budget,
                              seed=args.seed, preset=args.preset, mask=args.mask, robust=args.robust, memory=args.memory,
                              any_prompt=args.any_prompt, each=each, on_step=lambda step, loss, terms: bar.update(),
                              **flags.around(args), **given(args))
        immunized, limit = result.image, local_budget(picture, args.eps, args.budget)
        report = {"finished": True, "asked": asked, "results": [immunized_path.name, preview_path.name], "picture": str(path),
                  "immunized": immunized_path.name, **result.report}
        if args.overwrite:                                   # else the preview of another question would pass for this one's
            preview_path.unlink(missing_ok=True)
        reports.write_results(
            report_path, lambda finished: cli.to_json(report | {"finished": finished}, indent=1) + "\n",
            {immunized_path: lambda path: images.write_checked(path, immunized, picture, limit, overwrite=True)},
            overwrite=args.overwrite)
    cli.result(reports.in_short(report), f"{path} -> {immunized_path}: at most {report['linf_steps']}/255 per channel "
               f"(budget {report['budget_steps']}/255), PSNR {report['psnr']:.1f} dB, {report['seconds']:.0f} s"
               f"{_shifts(report)}",
               as_json=args.json)
    if not args.no_preview:
        previews.write_preview(picture, immunized, preview_path, editor, args)


def tell_skipped(path, report, args):
    """Say that a picture's results are there already; with --json, print their report."""
    cli.say(f"{path}: done before, skipped", quiet=args.quiet)
    if args.json:
        cli.out(cli.to_json(reports.in_short(report) | {"skipped": True}))


def question(path, editor, args):
    """All that decides the result: the bytes of picture, mask and weights, and every option, as text."""
    from .models.checkpoints import sha256
    irrelevant = {"pictures", "output", "overwrite", "json", "quiet", "debug", "device", "memory", "no_preview", "any_prompt"}
    values = {key: str(value) for key, value in vars(args).items()       # a flag that is not given may be of a later version
              if key not in irrelevant and value is not None and value is not False and value != []}
    if not path.is_file():                                   # hashing a device would never end
        raise ValueError(f"{path}: no such file")
    method, mask, bank = (getattr(args, name, None) for name in ("method", "mask", "any_prompt"))
    editors = group_of(editor).editors
    if own := methods.own_sources(*([METHODS[method]] if method else []), *editors):
        values["sources"] = [sha256(Path(source)) for source in own]
    if bank:
        values["any_prompt"] = bank.digest
    about = [one.provenance() for one in editors]
    weights = [one["weights"] for one in about]
    settings = [[one["scheduler"], one["defaults"], *(checkpoint.configuration for checkpoint in _checkpoints(editor))]
                for one, editor in zip(about, editors, strict=True)]
    return {**values, "results": RESULTS, "sha256": sha256(path), **({"mask": sha256(mask)} if mask else {}),
            "settings": digest(json.loads(cli.to_json(settings))), "weights": weights if weights[1:] else weights[0]}


def _checkpoints(editor):
    """The files of an editor; of encoders alone, those of each space."""
    own = getattr(editor, "checkpoint", None)
    return [own] if own else [space.checkpoint for space in getattr(editor, "spaces", ())]


def _shifts(report):
    """The shifts of a report in words, or why they are absent; "" where there are none."""
    from .editors import shifts
    told = [shifts.tell_shifts(report["shifts"])] if report.get("shifts") else []
    if "measures_absent" in report:
        told.append(f"shifts were not measured: {report['measures_absent']}")
    return "".join(f"; {words}" for words in told)


def main(argv=None):
    return cli.run_command(_body, parser(), argv)


if __name__ == "__main__":
    cli.leave(main())
