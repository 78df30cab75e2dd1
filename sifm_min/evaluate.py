"""The paper's experiments as commands: `run` makes the results of a table, `table` prints it, `report` writes a page.

The work is in experiments/: `suites` has the arms and pictures, `plan` and `runner` carry them out.
"""

import argparse
import functools
import json
import os
import sys
from argparse import SUPPRESS
from pathlib import Path

from . import PROGRAM, cli
from .experiments import suites
from .files.weight_digests import hash_weights
from .judging import panels
from .methods import PRESETS
from .metrics.perturbation import BUDGETS

EXAMPLES = """examples:
  %(prog)s run white-box --images 20 -o runs
  %(prog)s run white-box --editor miniature --images 100 --methods sifm,photoguard-encoder -o runs --shard 0/2
  %(prog)s run transfer --editor miniature --other miniature-sd3 --images 20 -o runs
  %(prog)s table runs
  %(prog)s table runs --format latex
  %(prog)s report runs

suites: white-box (the paper's Tables II to IV), transfer (V), ablation (VI), lambda (VII), consistency (I: the same edits,
how their judges agree), robustness (what an attacker does to the picture first; plain and robust), unseen (made for one
prompt, for five and for any). transfer also has one perturbation for both editors. Every suite has the clean picture and
random noise of the same budget beside the methods. A run that was interrupted, killed or extended goes on
where it was; what failed is tried again. Exit codes: 0 all done, 1 something failed, 2 usage, 3 weights unavailable,
130 or 143 interrupted."""


def _parser():
    parser = cli.Parser("evaluate", "Run the paper's experiments and print its tables.", EXAMPLES)
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION", prog=parser.prog, parser_class=_action)

    def add(name, description, *shared):
        made = actions.add_parser(name, description=description, help=description)
        return made, made.add_argument

    made, option = add("run", "Immunize, edit, measure and judge, for every picture, method, prompt and seed.")
    option("suite", choices=suites.SUITES)
    option("-o", "--output", required=True, type=cli.path, metavar="DIR", help="where results go (created if absent)")
    made.editor()
    option("--other", metavar="NAME", help="the second editor, of transfer and of one attack of robustness")
    option("--manifest", type=cli.path, metavar="FILE", help="the pictures and prompts (default: photographs that ship)")
    option("--images", type=cli.count, metavar="N",
           help="how many pictures: the first of the manifest (default: all), or of those that ship (default: 20)")
    option("--methods", type=cli.commas(), metavar="LIST",
           help=f"of {','.join(suites.COMPARED)} (default: those of the paper; robustness: sifm)")
    option("--panel", metavar="NAME|FILE",
           help=f"who judges: {', '.join(panels.names())}, or a .json file (default: the miniature's two judges)")
    option("--max-cost", type=cli.positive, metavar="USD",
           help="of the panel, over all runs into the folder; shares of the pictures have equal shares of it")
    option("--seeds", type=cli.commas(cli.seed), default=[1], metavar="LIST", help="of the edits (default: 1)")
    option("--eps", type=cli.eps, default=0.03, help="budget, as 0.03 or 8/255 (default: 0.03)")
    option("--steps", type=cli.count, help="PGD iterations (default: 100)")
    option("--preset", choices=PRESETS, default="protocol", help="how baselines are run; see immunize --help")
    option("--budget", choices=BUDGETS, default="uniform", help="of the pixels, noise included; see immunize --help")
    option("--robust", action="store_true", help="methods expect purifiers; see immunize --help")
    option("--any-prompt", type=cli.path, metavar="FILE",
           help="the instructions of unseen, one a line (default: the miniature's for its judges, else those of immunize)")
    option("--flat", action="store_true", help="methods at flat minima; see immunize --help")
    option("--refine-text", action="store_true", help="of the methods that have it; see immunize --help")
    option("--blur", type=cli.positive, metavar="SIGMA", help="of every perturbation, noise included; see immunize --help")
    option("--set", action="append", type=_setting, default=[], metavar="NAME=VALUE",
           help="an option of the methods that have it, such as lam=0.5; several times")
    option("--edit-steps", type=cli.count, help="denoising steps of an edit (default: the editor's)")
    option("--guidance", type=cli.number, help="weight of the instruction (default: the editor's)")
    option("--image-guidance", type=cli.number, help="weight of the picture, of instruction editors (default: the editor's)")
    option("--edit-batch", type=cli.count, metavar="N", help="edits at once (default: all prompts of a picture)")
    made.memory()
    option("--lpips-weights", type=cli.path, metavar="FILE",
           help="of LPIPS' AlexNet (default: what `weights download` fetched)")
    option("--jobs", type=cli.count, metavar="N",
           help="processes that share the work (default: one per core where the editor is a miniature on the CPU, else 1)")
    option("--helper-of", type=cli.count, help=SUPPRESS)
    option("--shard", type=_shard, default=(0, 1), metavar="I/N", help="do the I-th of N shares of the pictures, I from 0")
    made.shared("device", "dtype", "vae-dtype", "seed")
    made, option = add("table", "Print the tables of a folder, with the paper's own figures beside.")
    option("folder", type=cli.path, metavar="DIR")
    option("--people", type=cli.path, nargs="+", metavar="RATINGS", help="folders of `judge import-ratings`, for Table I")
    option("--format", choices=("markdown", "csv", "latex"), default="markdown", help="(default: markdown)")
    made.shared()
    made, option = add("report", "Write one HTML page with the tables, charts and pictures of a folder.")
    option("folder", type=cli.path, metavar="DIR")
    option("-o", "--output", type=cli.path, metavar="FILE", help="(default: report.html in the folder)")
    option("--people", type=cli.path, nargs="+", metavar="RATINGS", help="folders of `judge import-ratings`, for Table I")
    option("--pictures", type=cli.count, default=12, metavar="N", help="how many originals are shown (default: 12)")
    made.shared("overwrite")
    return parser


def _action(prog, description, **_):
    return cli.Parser(prog.removeprefix(f"{PROGRAM}."), description)


def _shard(text):
    first, slash, second = text.partition("/")
    if not (slash and first.isdecimal() and second.isdecimal() and int(first) < int(second)):
        raise argparse.ArgumentTypeError(f"{text} is no share: write 0/2 for the first half and 1/2 for the second")
    return int(first), int(second)


def _setting(text):
    key, equals, value = text.partition("=")
    if not equals or not key.isidentifier():
        raise argparse.ArgumentTypeError(f"{text!r}: write NAME=VALUE, such as lam=0.5")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def _run(args):
    from . import images, metrics, miniature
    from .experiments import plan, workers
    from .experiments.store import Folder
    from .miniature import deciding

    methods = _methods(args)
    around = _around(args, methods)
    index, count = workers.share_of_work(args.shard, os.environ)
    panel = None
    if args.panel:                                           # a missing key is reported before hours of work
        from .judging.run import judges
        panel = panels.Panel.load(args.panel)
        judges(panel)
    editors, again = _editors(args)
    cases = _cases(args, editors, panel)
    lpips, about_lpips = _lpips(args, metrics)
    arms, remarks = suites.arms(args.suite, editors, methods, moving=panel is not None, robust=args.robust)
    for remark in remarks:
        cli.say(remark, quiet=args.quiet)
    for editor in editors.values():                          # the plan states them
        hash_weights(editor, args.output)
    edit = {"steps": args.edit_steps, "guidance": args.guidance, "image_guidance": args.image_guidance}
    planned = plan.make_plan(
        args.suite, {name: plan.about_editor(editor) for name, editor in editors.items()}, cases, arms,
        seeds=list(dict.fromkeys(args.seeds)), seed=args.seed, eps=args.eps,
        options=dict(args.set) | ({"steps": args.steps} if args.steps else {})
        | ({"robust": True} if args.robust else {}) | around | ({"budget": args.budget} if args.budget != "uniform" else {}),
        preset=args.preset,
        edit={key: value for key, value in edit.items() if value is not None},
        prompts=suites.PROMPTS.get(args.suite, ("original",)), lpips=about_lpips,
        judge={"kind": "panel", **panel.record()} if panel else
              {"kind": "oracle", "judges": list(miniature.judges), "sha256": deciding.sha256_of_judges()},
        bank=suites.bank(args.any_prompt, world=panel is None) if args.suite == "unseen" else None)
    images.budget(args.eps)
    folder = Folder(args.output)
    folder.make()
    folder.add_plan(planned)
    mine = cases[index::count]
    edited = ", ".join(plan.editing(editors))
    about = f"{args.suite} on {edited}: {len(mine)} pictures" + (f" of {len(cases)}" if count > 1 else "")
    judging = {"judges": None if panel else miniature.judges, "lpips": lpips}
    runner, code = _carry_out(args, folder, planned, editors, again, mine, about, judging)
    if args.helper_of:
        return code
    if panel:
        from .experiments.panel import judge_edits
        code = max(code, judge_edits(folder, planned, panel, mine, (index, count), max_cost=args.max_cost, quiet=args.quiet))
    if args.suite == "consistency":
        from .experiments.panel import export_edits
        path, edits = export_edits(folder, planned)
        cli.say(f"{path} lists {edits} edits for `judge export-sheet`", quiet=args.quiet)
    cli.result({"suite": args.suite, "output": str(args.output), "pictures": len(mine), "computed": runner.computed,
                "failed": [str(failure) for failure in runner.failures]},
               f"{about} done, {runner.computed} steps computed, {len(runner.failures)} failed; "
               f"{PROGRAM}.evaluate table {args.output}", as_json=args.json)
    return code


def _methods(args):
    """The methods of the run. Raises ValueError for options that do not fit the suite or the methods."""
    from .methods import options_of
    methods = list(dict.fromkeys(args.methods or suites.METHODS_OF.get(args.suite, ("sifm",))))
    if unknown := [method for method in methods if method not in suites.COMPARED]:
        raise ValueError(f"--methods {unknown[0]}: choose from {','.join(suites.COMPARED)} (the controls are always there)")
    if args.methods and args.suite not in suites.METHODS_OF:
        raise ValueError(f"--methods is not for {args.suite}, which is about SIFM")
    if args.seed in args.seeds:
        raise ValueError(f"--seeds {args.seed} is also --seed: a method would be tested on the very noise that it was made "
                         "with; choose others")
    known = {option for method in methods for option in options_of(method)}
    if strangers := [option for option, _ in args.set if option not in known]:
        raise ValueError(f"--set {strangers[0]}: no method of this run has this option; there are {', '.join(sorted(known))}")
    if args.any_prompt and args.suite != "unseen":
        raise ValueError("--any-prompt is for unseen")
    if args.other and args.suite not in ("transfer", "robustness"):
        raise ValueError("--other is for transfer and robustness")
    return methods


def _around(args, methods):
    """The options of the run that go around its methods; those that a method cannot have are said to be left out."""
    from .objectives.around import choose
    given = {name: value for name in ("flat", "refine_text", "blur") if (value := getattr(args, name))}
    for name, value in given.items():
        for method in methods:
            try:
                choose(method, **{name: value})
            except ValueError as error:
                if name == "blur":                           # wrong for all of them
                    raise
                cli.say(f"{method} is run without it: {error}", quiet=args.quiet)
    return given


def _lpips(args, metrics):
    """(LPIPSWeights or None, the entry of the plan). Without --lpips-weights they may be absent, which is said."""
    from .models.checkpoints import Unavailable
    try:
        weights = metrics.lpips_weights("alex", args.lpips_weights)
    except Unavailable as error:
        if args.lpips_weights:
            raise
        reason = cli.sentence(error)
        cli.say(f"lpips is absent: {reason}", quiet=args.quiet)
        return None, {"reason": reason}
    return weights, {"network": weights.network, "sha256": weights.sha256}


def _carry_out(args, folder, planned, editors, again, cases, about, judging):
    """Run the cases, with helpers; return (runner, exit code)."""
    from .experiments import estimate, workers
    from .experiments.runner import Runner

    jobs, rounds = workers.jobs(args, editors), workers.rounds(args.suite, editors)
    with cli.progress(total=len(cases) * len(planned["arms"]) * len(rounds), what=args.suite, unit="arm",
                      quiet=args.quiet) as bar:
        if not args.helper_of:
            todo = estimate.announcement(folder, planned, editors, cases, jobs, by_panel=bool(args.panel), **judging)
            cli.say(f"{about}{f', {jobs} processes' if jobs > 1 else ''}; {todo}", quiet=args.quiet)

        def done():
            bar.update()
            if args.helper_of and os.getppid() != args.helper_of:
                raise KeyboardInterrupt                      # the process that this one helps was killed
        runner = Runner(folder, planned, editors, **judging, batch=args.edit_batch, memory=args.memory, done=done,
                        fail=lambda failure, error: cli.fail(str(failure), error=error if args.debug else None))
        with workers.helpers(jobs - 1, args.argv) as helpers:
            clock = None if args.quiet else estimate.Clock(folder, planned, cases, cli.say)
            if rounds != [None]:                             # the estimate has used both: load them afresh
                editors.update({name: load() for name, load in again.items()})
            for only in rounds:
                if runner.only not in (None, only):          # drop the networks of the last round; they load when used
                    editors.update({name: again[name]() for name in runner.only})
                runner.only = only
                workers.carry_out(runner, cases, remark=lambda text: cli.say(text, quiet=args.quiet), finished=clock)
    if runner.failures and not args.helper_of:
        cli.say(f"{len(runner.failures)} steps failed; the same command tries them again:")
        for failure in runner.failures:
            cli.say(f"  {failure}")
    failed = runner.failures or any(helper.returncode for helper in helpers)
    return runner, cli.SOME_FAILED if failed else cli.OK


def _editors(args):
    """({name: editor}, {name: function that loads it again}) of --editor and --other.

    An option that only one of the two editors has goes to that one. --revision is for --editor.
    """
    from .immunize import editor_of, set_strength

    def loaded(options):
        editor = editor_of(options)
        if "strength" in editor.OPTIONS:
            set_strength([editor], args.strength)
        return editor

    def loaded_again(options):
        editor = loaded(options)
        hash_weights(editor, args.output)
        return editor
    editors, again, known = {}, {}, set()
    for source in filter(None, (args.editor, args.other)):
        name = source.rstrip("/").rpartition("/")[2]
        if name in editors:
            raise ValueError(f"{source}: two editors are called {name}; give two that are told apart by name")
        options = argparse.Namespace(**{**vars(args), "editor": source})
        if source == args.other:
            options.revision = None
        if args.other and not Path(source).is_file():        # --components are those of a single file
            options.components = None
        again[name] = functools.partial(loaded_again, options)
        editor = editors[name] = loaded(options)
        if editor.kind == "encoders":
            raise ValueError(f"{source} has encoders and no denoiser, and an experiment edits; immunize takes it")
        known |= editor.OPTIONS
        if editor.notice:
            cli.say(f"{name}: {editor.notice}", quiet=args.quiet)
    if args.suite == "transfer":
        _add_latents(args, editors, again)
    for option, kind in (("strength", "img2img"), ("image_guidance", "instruction editors")):
        if getattr(args, option) is not None and option not in known:
            raise ValueError(f"--{option.replace('_', '-')} is for {kind}, which {' and '.join(editors)} "
                             f"{'are' if len(editors) > 1 else 'is'} not")
    return editors, again


def _add_latents(args, editors, again):
    """Add the latent spaces of this machine, for the arms that protect these too."""
    from .editors import latents, load_editor
    from .models.checkpoints import Unavailable
    place = cli.place(args)

    def load():
        return load_editor(latents.NAME, device=place["device"], dtype=place["dtype"])
    try:
        editors[latents.NAME], again[latents.NAME] = load(), load
    except Unavailable as error:
        cli.say(f"{latents.NAME} are left out: {cli.sentence(error)}", quiet=args.quiet)


def _cases(args, editors, panel):
    """The pictures: those of a manifest, or the photographs that ship."""
    from .experiments.plan import editing
    editors = editing(editors)
    if args.manifest:
        kinds = {editor.kind for editor in editors.values()}
        return suites.manifest_cases(args.manifest, kinds, oracles=panel is None, count=args.images)
    if real := [name for name, editor in editors.items() if not editor.notice]:
        raise ValueError(f"{real[0]} is no miniature, and the miniature's instructions are no test of it; give --manifest FILE")
    if told := [name for name, editor in editors.items() if editor.kind == "img2img"]:
        raise ValueError(f"{told[0]} edits by img2img, and the photographs that ship have instructions and no captions; give "
                         "--manifest FILE")
    return suites.miniature_cases(args.images or 20)


def _collected(args):
    """(groups, tables) of a folder. The number of missing edits goes to stderr."""
    from .experiments import results, tables
    from .judging import summary
    groups = results.collect(args.folder)
    for group in groups:
        if group["missing"]:
            cli.say(f"{group['plan']['suite']}: {group['missing']} edits are still to be made", quiet=args.quiet)
    people = [record for folder in args.people or () for record in summary.load_records(folder)[0]]
    return groups, [table for group in groups for table in tables.tables(group, people)]


def _table(args):
    from .experiments import formats
    _, tables = _collected(args)
    if args.json:
        for table in tables:
            cli.out(cli.to_json(table.record()))
    else:
        cli.out(formats.BY_NAME[args.format](tables))
    return cli.OK


def _report(args):
    from .experiments import page, store
    from .files import writing
    groups, tables = _collected(args)
    path = args.output or args.folder / "report.html"
    text = page.page(groups, tables, store.Folder(args.folder).picture, count=args.pictures)
    writing.write(path, text, overwrite=args.overwrite)
    cli.result({"report": str(path), "bytes": len(text.encode())}, str(path), as_json=args.json)
    return cli.OK


def _body(args):
    return {"run": _run, "table": _table, "report": _report}[args.action](args)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else [str(part) for part in argv]
    parser = _parser()
    parser.set_defaults(argv=argv)
    return cli.run_command(_body, parser, argv)


if __name__ == "__main__":
    cli.leave(main())
