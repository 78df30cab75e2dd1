"""The paper's experiments as commands: `run` makes what a table needs, `table` prints it, `report` shows it.

Which arms and pictures a suite has is in suites.py, what is done with them and how it is kept in protocol.py.
"""

import argparse
import contextlib
import functools
import json
import os
import subprocess
import sys
import time
from argparse import SUPPRESS
from pathlib import Path

from . import cli, panels, protocol, suites
from .files import writing
from .immunize import PRESETS
from .ledger import Busy

# -- who does what ---------------------------------------------------------------------------------------------------------

def share(shard, environment):
    """(index, count) of this process among all that share the work: --shard, and within it torchrun's ranks."""
    (index, count), (rank, size) = shard, cli.rank(environment)
    return index * size + rank, count * size


def carry_out(runner, cases, remark=None, finished=None):
    """Run all cases; those that another process holds come last, and are waited for."""
    waiting, told = list(cases), False
    while waiting:
        held = []
        for case in waiting:
            try:
                runner.run(case)
            except Busy:
                held.append(case)
            else:
                if finished:
                    finished(case)
        if len(held) == len(waiting):
            if remark and not told:
                remark(f"another process works on the {len(held)} pictures that are left; waiting for it")
                told = True
            time.sleep(0.5)
        waiting = held


# -- the command -----------------------------------------------------------------------------------------------------------

EXAMPLES = """examples:
  %(prog)s run white-box --images 20 -o runs
  %(prog)s run white-box --editor miniature --images 100 --methods sifm,photoguard-encoder -o runs --shard 0/2
  %(prog)s run transfer --editor miniature --other miniature-sd3 --images 20 -o runs
  %(prog)s table runs
  %(prog)s table runs --format latex
  %(prog)s report runs

suites: white-box (the paper's Tables II to IV), transfer (V), ablation (VI), lambda (VII), consistency (I: the same edits,
how their judges agree), robustness (what an attacker does to the picture first). Every suite has the clean picture and
random noise of the same budget beside the methods. A run that was interrupted, killed or extended goes on
where it was; what failed is tried again. Exit codes: 0 all done, 1 something failed, 2 usage, 3 weights unavailable,
130 interrupted."""


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
    option("--manifest", type=cli.path, metavar="FILE", help="the pictures and prompts (default: the miniature's world)")
    option("--images", type=cli.count, metavar="N",
           help="how many pictures: the first of the manifest (default: all), or of the miniature's world (default: 20)")
    option("--methods", type=cli.commas(), metavar="LIST",
           help=f"of {','.join(suites.COMPARED)} (default: all; robustness: sifm)")
    option("--panel", metavar="NAME|FILE",
           help=f"who judges: {', '.join(panels.names())}, or a .json file (default: the oracles of the miniature's world)")
    option("--max-cost", type=cli.positive, metavar="USD",
           help="of the panel, over all runs into the folder; shares of the pictures have equal shares of it")
    option("--seeds", type=cli.commas(cli.seed), default=[1], metavar="LIST", help="of the edits (default: 1)")
    option("--eps", type=cli.eps, default=0.03, help="budget, as 0.03 or 8/255 (default: 0.03)")
    option("--steps", type=cli.count, help="PGD iterations (default: 100)")
    option("--preset", choices=PRESETS, default="protocol", help="how baselines are run; see immunize --help")
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
    return cli.Parser(prog.removeprefix(f"python -m {__package__}."), description)


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
    from .immunize import options_of
    from .models.checkpoints import Unavailable

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
    if args.other and args.suite not in ("transfer", "robustness"):
        raise ValueError("--other is for transfer and robustness")
    index, count = share(args.shard, os.environ)
    panel = None
    if args.panel:                                           # a key that is missing is told before hours of work
        from . import judge
        panel = panels.Panel.load(args.panel)
        judge.judges(panel)

    editors, again = _editors(args)
    cases = _cases(args, editors, panel)
    lpips, about_lpips = None, {}
    try:
        lpips = metrics.lpips_weights("alex", args.lpips_weights)
        about_lpips = {"network": lpips.network, "sha256": lpips.sha256}
    except Unavailable as error:
        if args.lpips_weights:
            raise
        about_lpips = {"reason": cli.sentence(error)}
        cli.say(f"lpips is absent: {about_lpips['reason']}", quiet=args.quiet)
    arms, remarks = suites.arms(args.suite, editors, methods, moving=panel is not None)
    for remark in remarks:
        cli.say(remark, quiet=args.quiet)
    edit = {"steps": args.edit_steps, "guidance": args.guidance, "image_guidance": args.image_guidance}
    asked = protocol.plan(
        args.suite, {called: protocol.about_editor(editor) for called, editor in editors.items()}, cases, arms,
        seeds=list(dict.fromkeys(args.seeds)), seed=args.seed, eps=args.eps,
        given=dict(args.set) | ({"steps": args.steps} if args.steps else {}), preset=args.preset,
        edit={key: value for key, value in edit.items() if value is not None},
        prompts=suites.PROMPTS.get(args.suite, ("original",)), lpips=about_lpips,
        judge={"kind": "panel", **panel.record()} if panel else {"kind": "oracle", "judges": list(miniature.judges)})
    images.budget(args.eps)
    folder = protocol.Folder(args.output)
    folder.make()
    folder.add_plan(asked)
    mine = cases[index::count]
    about = f"{args.suite} on {', '.join(editors)}: {len(mine)} pictures" + (f" of {len(cases)}" if count > 1 else "")
    jobs = _jobs(args, editors)
    turns = _turns(args.suite, editors)
    with cli.progress(total=len(mine) * len(arms) * len(turns), what=args.suite, unit="arm", quiet=args.quiet) as bar:
        judging = {"judges": None if panel else miniature.judges_of, "lpips": lpips}
        if not args.helper_of:
            _announce(folder, asked, editors, mine, f"{about}, {jobs} processes" if jobs > 1 else about, jobs, args, **judging)

        def done():
            bar.update()
            if args.helper_of and os.getppid() != args.helper_of:
                raise KeyboardInterrupt                      # whom this process helps was killed
        runner = protocol.Runner(folder, asked, editors, **judging, batch=args.edit_batch, memory=args.memory, done=done,
                                 fail=lambda failure, error: cli.fail(str(failure), error=error if args.debug else None))
        with _helpers(jobs - 1, args.argv) as helpers:
            clock = _Clock(folder, asked, mine, args.quiet)
            if turns != [None]:                              # the estimate has used both
                editors.update({called: load() for called, load in again.items()})
            for turn in turns:
                if runner.only not in (None, turn):          # its networks are let go, and read again when they are used
                    editors[runner.only] = again[runner.only]()
                runner.only = turn
                carry_out(runner, mine, remark=lambda text: cli.say(text, quiet=args.quiet), finished=clock)
    if args.helper_of:
        return cli.SOME_FAILED if runner.failures else cli.OK
    if runner.failures:
        cli.say(f"{len(runner.failures)} steps failed; the same command tries them again:")
        for failure in runner.failures:
            cli.say(f"  {failure}")
    code = cli.SOME_FAILED if runner.failures or any(helper.returncode for helper in helpers) else cli.OK
    if panel:
        code = max(code, _judge(folder, asked, panel, mine, (index, count), args))
    if args.suite == "consistency":
        _export(folder, asked, args)
    cli.result({"suite": args.suite, "output": str(args.output), "pictures": len(mine), "computed": runner.computed,
                "failed": [str(failure) for failure in runner.failures]},
               f"{about} done, {runner.computed} steps computed, {len(runner.failures)} failed; "
               f"python -m {__package__}.evaluate table {args.output}", as_json=args.json)
    return code


def _editors(args):
    """({name: editor}, {name: function that loads it anew}) of --editor and --other. What only one of two knows is for that
    one, and --revision for --editor."""
    from .immunize import load, set_strength

    def loaded(given):
        editor = load(given)
        if args.strength is not None and "strength" in editor.OPTIONS:
            set_strength(editor, args.strength)
        return editor
    editors, again, known = {}, {}, set()
    for source in filter(None, (args.editor, args.other)):
        called = source.rstrip("/").rpartition("/")[2]
        if called in editors:
            raise ValueError(f"{source}: two editors are called {called}; give two that are told apart by name")
        given = argparse.Namespace(**{**vars(args), "editor": source, "strength": None})
        if source == args.other:
            given.revision = None
        if args.other and not Path(source).is_file():        # --components are those of a single file
            given.components = None
        again[called] = functools.partial(loaded, given)
        editor = editors[called] = loaded(given)
        known |= editor.OPTIONS
        if editor.notice:
            cli.say(f"{called}: {editor.notice}", quiet=args.quiet)
    for option, who in (("strength", "img2img"), ("image_guidance", "instruction editors")):
        if getattr(args, option) is not None and option not in known:
            raise ValueError(f"--{option.replace('_', '-')} is for {who}, which {' and '.join(editors)} "
                             f"{'are' if len(editors) > 1 else 'is'} not")
    return editors, again


def _cases(args, editors, panel):
    """The pictures: those of a manifest, or of the miniature's world."""
    if args.manifest:
        kinds = {editor.kind for editor in editors.values()}
        return suites.manifest_cases(args.manifest, kinds, oracles=panel is None, count=args.images)
    if plain := [called for called, editor in editors.items() if not editor.notice]:
        raise ValueError(f"{plain[0]} is no miniature, and the miniature's world is no test of it; give --manifest FILE")
    return suites.miniature_cases(args.images or 20)


def _jobs(args, editors):
    """How many processes share this run: as asked for, or one per core where the editors are small and run on the CPU."""
    if args.helper_of:
        return 1                                             # whoever helps has no helpers
    if args.jobs:
        return args.jobs
    if not _small(editors) or args.shard != (0, 1) or "WORLD_SIZE" in os.environ:
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _small(editors):
    """Whether these are miniatures on the CPU."""
    return all(editor.is_miniature and editor.device.type == "cpu" for editor in editors.values())


def _turns(suite, editors):
    """Whose turn it is, one after the other, None for both: two large editors do not share the memory. What the first
    protects the second edits, and what the second protects the first edits when it comes again."""
    if suite != "transfer" or _small(editors):
        return [None]
    first, second = editors
    return [first, second, first, None]                      # at last what another process left, which is mostly nothing


@contextlib.contextmanager
def _helpers(count, argv):
    """`count` more processes of this command while the block runs, one thread each; whoever takes a picture works on it."""
    if not count:
        yield []
        return
    import torch
    torch.set_num_threads(1)
    command = [sys.executable, "-m", f"{__package__}.evaluate", *argv, "--quiet", "--helper-of", str(os.getpid())]
    places = [str(Path(__file__).resolve().parents[__package__.count(".") + 1]), os.environ.get("PYTHONPATH")]
    surroundings = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, places))}
    helpers = [subprocess.Popen(command, env=surroundings, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
               for _ in range(count)]
    try:
        yield helpers
        for helper in helpers:
            helper.wait()
    finally:
        for helper in helpers:
            if helper.poll() is None:
                helper.terminate()
                helper.wait()


def _announce(folder, asked, editors, cases, about, jobs, args, **judging):
    """Say what is to be done and how long it will take, before it begins."""
    left = protocol.left(folder, asked, cases)
    counted = {step: sum(n for (one, _), n in left.todo.items() if one == step) for step, _ in left.todo}
    bought = counted.pop("verdict", 0) if args.panel else 0
    later = f", and then {bought} verdicts by the panel" if bought else ""
    todo = ", ".join(f"{n} {KINDS[step][n > 1]}" for step, n in counted.items()) or "nothing"
    about = f"{about}; to do: {todo}; {left.finished} pictures done"
    readable = next((case for case in cases if case.record["sha256"]), None)
    if not counted or readable is None:
        cli.say(f"{about}{later}", quiet=args.quiet)
        return
    seconds = suites.seconds_each(asked, editors, readable, left, **judging)
    spent = {(step, what): seconds[step, what] * n for (step, what), n in left.todo.items()
             if step in counted and seconds[step, what] is not None}
    each = [f"{what if step == 'immunize' else f'an edit by {what}'} {_brief(seconds[step, what])}"
            for step, what in spent if step in ("immunize", "edit")]
    for step in dict.fromkeys(step for step, _ in spent if step not in ("immunize", "edit")):
        share = sum(s for (one, _), s in spent.items() if one == step) / counted[step]
        each.append(f"{KINDS[step][2]} {_brief(share)}")
    each += [f"not counted: {what}, {step}, which failed" for (step, what), found in seconds.items() if found is None]
    cli.say(f"{about}; about {suites.duration(sum(spent.values()) / jobs)}{later} ({', '.join(each)})", quiet=args.quiet)


# What a step is called: one of them, several, and what takes so long.
KINDS = {"immunize": ("immunization", "immunizations", ""), "attack": ("attack", "attacks", "an attack"),
         "edit": ("edit", "edits", ""), "metrics": ("comparison", "comparisons", "the distances of an edit"),
         "lpips": ("LPIPS", "LPIPS", "LPIPS"), "verdict": ("verdict", "verdicts", "a verdict")}


def _brief(seconds):
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1000 * seconds:.0f} ms"


def _export(folder, asked, args):
    """Write the edits as a manifest of judge.py, for people to judge."""
    from . import report
    lines = []
    for case in asked["cases"]:
        for cell in protocol.cells(folder, asked, case):
            if cell["edited"]:
                prompt = f"{cell['prompt_id']}, seed {cell['seed']}"
                lines.append(json.dumps({
                    "sample_id": report.sample_of(cell), "image_id": cell["image_id"], "prompt_id": prompt,
                    "arm": cell["arm"], "prompt": cell["prompt"], "original": f"pictures/{cell['original']}.png",
                    "edited": f"pictures/{cell['edited']}.png", "category": cell["category"], "method": cell["arm"],
                    "prompt_type": cell["prompt_type"], "editor": cell["target"]}, ensure_ascii=False) + "\n")
    writing.write(folder.path / "edits.jsonl", "".join(lines), overwrite=True)
    cli.say(f"{folder.path / 'edits.jsonl'} lists {len(lines)} edits for `judge export-sheet`", quiet=args.quiet)


def _judge(folder, asked, panel, cases, share, args):
    """Have a panel judge the edits of these pictures that have no verdict of it yet; returns an exit code.

    Each share of the pictures has its own folder of verdicts, and its part of what may be spent.
    """
    from . import judge
    samples, homes, (index, count) = [], {}, share
    for case in filter(lambda case: case.record["sha256"], cases):
        for cell in protocol.cells(folder, asked, case.record):
            said = (cell["judges"] or {}).values()
            if cell["edited"] and not (said and all(status == "ok" for _, _, status in said)):
                key = cell["verdict"]
                if key not in homes:
                    homes[key] = case.record["sha256"]
                    prompt = f"{cell['prompt_id']}, seed {cell['seed']}, edited by {cell['target']}"
                    samples.append(panels.Sample(
                        key, cell["image_id"], prompt, cell["arm"] if cell["source"] == cell["target"] else
                        f"{cell['arm']}, made for {cell['source']}", cell["prompt"], folder.picture(cell["original"]),
                        folder.picture(cell["edited"]), {"category": cell["category"], "editor": cell["target"],
                                                         "method": cell["arm"], "prompt_type": cell["prompt_type"]}))
    if not samples:
        return cli.OK
    with cli.progress(total=len(samples) * len(panel.judges), what=panel.id, unit="verdict", quiet=args.quiet) as bar:
        place = folder.path / "verdicts" / f"{panel.id}-{judge.identity(panel)[:8]}-{index}of{count}"
        found = judge.run(panel, samples, place, max_cost=args.max_cost and args.max_cost / count,
                          notify=lambda text: cli.say(text, quiet=args.quiet), on_verdict=bar.update)
    answers = {}
    for record in found.records:
        answers.setdefault(record.sample_id, []).append(record)
    for key, records in answers.items():
        if any(record.status != "not_asked" for record in records):
            protocol.keep_verdict(folder, homes[key], key, records)
    code = cli.OK
    for _, sentence in found.failures:
        code = cli.fail(sentence)
    for text, reason in {text: reason for _, reason, text in found.stops}.items():
        code = max(code, cli.fail(text, cli.UNAVAILABLE if reason in judge.UNAVAILABLE else cli.SOME_FAILED))
    silent = sum(any(record.status != "ok" for record in records) for records in answers.values())
    if silent and code == cli.OK:
        code = cli.fail(f"{silent} of {len(samples)} edits have no verdict of every judge; the same command asks again where a "
                        "service did not answer")
    return code


class _Clock:
    """Says after each picture how many are done, by whomever, and how long the rest will take."""

    def __init__(self, folder, asked, cases, quiet):
        self.folder, self.asked, self.cases, self.quiet = folder, asked, cases, quiet
        self.started = self.told = time.perf_counter()
        self.before = None

    def __call__(self, case):
        now = time.perf_counter()
        if self.quiet or self.before is not None and now - self.told < 5:
            return
        begun = [case for case in self.cases
                 if case.record["sha256"] and os.path.exists(self.folder.journal(case.record["sha256"]))]
        done = protocol.left(self.folder, self.asked, begun, again=False).finished
        before, self.told = self.before, now
        if before is None:                                   # pictures of an earlier run take no time
            self.before = done - (now - self.started > 5)
        elif done < len(self.cases) and done > before:
            spent = now - self.started
            cli.say(f"{done} of {len(self.cases)} pictures, {suites.duration(spent)} so far, about "
                    f"{suites.duration(spent / (done - before) * (len(self.cases) - done))} left", quiet=self.quiet)


def _collected(args):
    """(groups, tables) of a folder; what is still to be made is told."""
    from . import report, verdicts
    groups = protocol.collect(args.folder)
    for group in groups:
        if group["missing"]:
            cli.say(f"{group['plan']['suite']}: {group['missing']} edits are still to be made", quiet=args.quiet)
    people = [record for folder in args.people or () for record in verdicts.load_records(folder)[0]]
    return groups, [table for group in groups for table in report.tables(group, people)]


def _table(args):
    from . import report
    _, tables = _collected(args)
    if args.json:
        for table in tables:
            cli.out(cli.to_json(table.record()))
    else:
        cli.out(report.FORMATS[args.format](tables))
    return cli.OK


def _report(args):
    from . import page
    groups, tables = _collected(args)
    path = args.output or args.folder / "report.html"
    text = page.page(groups, tables, protocol.Folder(args.folder).picture, count=args.pictures)
    writing.write(path, text, overwrite=args.overwrite)
    cli.result({"report": str(path), "bytes": len(text.encode())}, str(path), as_json=args.json)
    return cli.OK


def _body(args):
    return {"run": _run, "table": _table, "report": _report}[args.action](args)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else [str(part) for part in argv]
    parser = _parser()
    parser.set_defaults(argv=argv)
    return cli.run(_body, parser, argv)


if __name__ == "__main__":
    cli.leave(main())
