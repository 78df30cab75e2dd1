"""The paper's experiments as commands: `run` makes what a table needs, `table` prints it, `report` shows it.

A suite is a list of arms (protocol.arm): which method immunizes against which editor, and who edits. What is done with an
arm, how it is kept and found again, is protocol.py.
"""

import json
import os
import statistics
import time
from pathlib import Path

from . import cli, panels, protocol
from .immunize import METHODS, PRESETS
from .ledger import Busy

SUITES = ("white-box", "transfer", "ablation", "lambda")
LAMBDAS = (0.001, 0.01, 0.1, 1.0, 10.0, 100.0, 1000.0)       # the paper's Table VII
ONLY_DISTANCE = 1e9              # a weight at which the norm's part of a float32 gradient is rounded away: the distance alone
COMPARED = tuple(name for name in METHODS if name != protocol.NOISE)
WORLD_SEED = 0                                               # of the miniature's samples


# -- suites ----------------------------------------------------------------------------------------------------------------

def arms(suite, editors, methods):
    """The arms of a suite, controls first. editors: names; transfer takes two, and goes both ways."""
    if suite == "transfer":
        if len(editors) != 2:
            raise ValueError("transfer needs two editors: add --other NAME")
        return [one for source, target in (editors, editors[::-1])
                for one in (*protocol.controls(target),
                            *(protocol.arm(method, method, source=source, target=target) for method in methods))]
    found = []
    for editor in editors:
        found += protocol.controls(editor)
        if suite == "white-box":
            found += [protocol.arm(method, method, source=editor, target=editor) for method in methods]
        elif suite == "lambda":
            found += [protocol.arm(f"lambda {lam:g}", "sifm", source=editor, target=editor, options={"lam": lam})
                      for lam in LAMBDAS]
        else:
            found += [protocol.arm(label, "sifm", source=editor, target=editor, options=options) for label, options in (
                ("distance only", {"lam": ONLY_DISTANCE}), ("norm only", {"lam": 0.0}), ("sifm", {}))]
    return found


PROMPTS = {"white-box": ("original", "unseen")}              # of the other tables the paper has the original prompt alone


def miniature_cases(count):
    """`count` pictures of the miniature's world: the instruction and five unseen ones, with their ground truth."""
    from . import miniature
    found = []
    for number, sample in enumerate(miniature.samples(count, WORLD_SEED)):
        asked, prompts = {"original": sample}, []
        asked |= {f"unseen-{i}": other for i, other in enumerate(sample.unseen, 1)}
        for name, one in asked.items():
            prompts.append({"id": name, "type": name.split("-")[0], "instruct": one.prompt, "img2img": one.target_caption,
                            "truth": panels.picture_sha256(one.target)})
        record = {"id": f"miniature-{number:03}", "category": sample.category, "prompts": prompts,
                  "sha256": panels.picture_sha256(sample.image)}
        found.append(protocol.Case(record, sample.image, asked))
    return found


# -- how long it takes -----------------------------------------------------------------------------------------------------

class _Enough(Exception):
    """Raised out of a run that is only timed."""


def seconds_each(asked, editors, case, immunizations, edits, kept):
    """({method: seconds of an immunization}, {target: seconds of an edit}): the median of what was done before, else timed
    on the first three steps of each."""
    by_method, by_target = {}, {}
    for one in asked["arms"]:
        method, target = one["method"], one["target"]
        if method in immunizations and method not in by_method:
            before = kept.get((method, "immunize"))
            by_method[method] = statistics.median(before) if before else _timed_immunization(asked, editors, case, one)
        if target in edits and target not in by_target:
            before = kept.get((target, "edit"))
            by_target[target] = statistics.median(before) if before else _timed_edit(asked, editors, case, one)
    return by_method, by_target


def _timed_immunization(asked, editors, case, one):
    from .immunize import immunize
    steps = one["settings"].get("steps", 1)
    return _timed(lambda on_step: immunize(
        case.picture, editors[one["source"]], protocol.words(asked, one["source"], case.record["prompts"][0]),
        method=one["method"], eps=asked["eps"], seed=asked["seed"], on_step=on_step, **one["settings"]), steps)


def _timed_edit(asked, editors, case, one):
    prompts = [protocol.words(asked, one["target"], prompt) for prompt in protocol.prompts_of(asked, case.record)]
    editor = editors[one["target"]]
    steps = len(editor.plan(asked["edit"].get("steps")).timesteps)
    return _timed(lambda on_step: editor.edit([case.picture] * len(prompts), prompts, seed=asked["seeds"][0],
                                              on_step=on_step, **asked["edit"]), steps) / len(prompts)


def _timed(work, steps):
    """Seconds of work(on_step), from its first three steps; a step of the whole that is not there is not waited for."""
    stamps = [time.perf_counter()]

    def on_step(*_):
        stamps.append(time.perf_counter())
        if len(stamps) > min(3, steps):
            raise _Enough
    try:
        work(on_step)
    except _Enough:
        pass
    else:
        return time.perf_counter() - stamps[0]
    first, each = stamps[1] - stamps[0], stamps[-1] - stamps[-2]
    return first + each * (steps - 1)


def duration(seconds):
    """Seconds as people say them."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02} min"


# -- who does what ---------------------------------------------------------------------------------------------------------

def share(shard, environment):
    """(index, count) of this process among all that share the work: --shard, and within it torchrun's ranks."""
    index, count = shard
    if "WORLD_SIZE" in environment:
        rank, size = environment.get("RANK", ""), environment["WORLD_SIZE"]
        if not (rank.isdecimal() and size.isdecimal() and int(rank) < int(size)):
            raise ValueError(f"RANK {rank!r} of WORLD_SIZE {size!r} is no share of the work: leave both to torchrun, or "
                             "unset them")
        index, count = index * int(size) + int(rank), count * int(size)
    return index, count


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

suites: white-box (the paper's Tables II to IV), transfer (V), ablation (VI), lambda (VII). Every suite has the clean
picture and random noise of the same budget beside the methods. A run that was interrupted, killed or extended goes on
where it was; what failed is tried again. Exit codes: 0 all done, 1 something failed, 2 usage, 3 weights unavailable,
130 interrupted."""


def _parser():
    parser = cli.Parser("evaluate", "Run the paper's experiments and print its tables.", EXAMPLES)
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION", prog=parser.prog, parser_class=_action)

    def add(name, description, *shared):
        made = actions.add_parser(name, description=description, help=description)
        return made, made.add_argument

    made, option = add("run", "Immunize, edit, measure and judge, for every picture, method, prompt and seed.")
    option("suite", choices=SUITES)
    option("-o", "--output", required=True, type=cli.path, metavar="DIR", help="where results go (created if absent)")
    made.editor()
    option("--other", metavar="NAME", help="the second editor, of transfer")
    option("--images", type=cli.count, default=20, metavar="N", help="how many pictures of the miniature's world (default: 20)")
    option("--methods", type=cli.commas(), default=list(COMPARED), metavar="LIST",
           help=f"of {','.join(COMPARED)} (default: all)")
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
    option("--lpips-weights", type=cli.path, metavar="FILE",
           help="of LPIPS' AlexNet (default: what `weights download` fetched)")
    option("--shard", type=_shard, default=(0, 1), metavar="I/N", help="do the I-th of N shares of the pictures, I from 0")
    made.shared("device", "dtype", "seed")
    made, option = add("table", "Print the tables of a folder, with the paper's own figures beside.")
    option("folder", type=cli.path, metavar="DIR")
    option("--format", choices=("markdown", "csv", "latex"), default="markdown", help="(default: markdown)")
    made.shared()
    return parser


def _action(prog, description, **_):
    return cli.Parser(prog.removeprefix(f"python -m {__package__}."), description)


def _shard(text):
    first, slash, second = text.partition("/")
    if not (slash and first.isdecimal() and second.isdecimal() and int(first) < int(second)):
        raise cli.argparse.ArgumentTypeError(f"{text} is no share: write 0/2 for the first half and 1/2 for the second")
    return int(first), int(second)


def _setting(text):
    key, equals, value = text.partition("=")
    if not equals or not key.isidentifier():
        raise cli.argparse.ArgumentTypeError(f"{text!r}: write NAME=VALUE, such as lam=0.5")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def _run(args):
    from . import metrics, miniature
    from .immunize import load, options_of
    from .models.checkpoints import Unavailable

    if unknown := [method for method in args.methods if method not in COMPARED]:
        raise ValueError(f"--methods {unknown[0]}: choose from {','.join(COMPARED)} (the controls are always there)")
    if args.seed in args.seeds:
        raise ValueError(f"--seeds {args.seed} is also --seed: a method would be tested on the very noise that it was made "
                         "with; choose others")
    used = args.methods if args.suite in ("white-box", "transfer") else ["sifm"]
    known = {option for method in used for option in options_of(method)}
    if strangers := [option for option, _ in args.set if option not in known]:
        raise ValueError(f"--set {strangers[0]}: no method of this run has this option; there are {', '.join(sorted(known))}")
    if args.suite != "transfer" and args.other:
        raise ValueError("--other is for transfer")
    index, count = share(args.shard, os.environ)

    editors = {}
    for source in filter(None, (args.editor, args.other)):
        args.editor = source
        editor = load(args)
        called = Path(source).name
        if called in editors:
            raise ValueError(f"{source}: the two editors are called the same; give two")
        editors[called] = editor
        if editor.notice:
            cli.say(f"{called}: {editor.notice}", quiet=args.quiet)
    if plain := [called for called, editor in editors.items() if not editor.notice]:
        raise ValueError(f"{plain[0]} is no miniature, and the miniature's world is no test of it; give --manifest FILE")
    cases = miniature_cases(args.images)
    lpips, about_lpips = None, {}
    try:
        lpips = metrics.lpips_weights("alex", args.lpips_weights)
        about_lpips = {"network": lpips.network, "sha256": lpips.sha256}
    except Unavailable as error:
        if args.lpips_weights:
            raise
        about_lpips = {"reason": cli.sentence(error)}
        cli.say(f"lpips is absent: {about_lpips['reason']}", quiet=args.quiet)

    given = dict(args.set) | ({"steps": args.steps} if args.steps else {})
    edit = {"steps": args.edit_steps, "guidance": args.guidance, "image_guidance": args.image_guidance}
    asked = protocol.plan(
        args.suite, {called: protocol.about_editor(editor) for called, editor in editors.items()}, cases,
        arms(args.suite, list(editors), list(dict.fromkeys(args.methods))), seeds=list(dict.fromkeys(args.seeds)),
        seed=args.seed, eps=args.eps, given=given, preset=args.preset,
        edit={key: value for key, value in edit.items() if value is not None}, prompts=PROMPTS.get(args.suite, ("original",)),
        judge={"kind": "oracle", "judges": list(miniature.judges)}, lpips=about_lpips)
    folder = protocol.Folder(args.output)
    folder.make()
    folder.add_plan(asked)
    mine = cases[index::count]
    about = f"{args.suite} on {', '.join(editors)}: {len(mine)} pictures" + (f" of {len(cases)}" if count > 1 else "")
    with cli.progress(total=len(mine) * len(asked["arms"]), what=args.suite, unit="arm", quiet=args.quiet) as bar:
        _announce(folder, asked, editors, mine, about, args)
        runner = protocol.Runner(folder, asked, editors, judges=miniature.judges_of, lpips=lpips, batch=args.edit_batch,
                                 fail=lambda failure, error: cli.fail(str(failure), error=error if args.debug else None),
                                 done=lambda one: bar.update())
        carry_out(runner, mine, remark=lambda text: cli.say(text, quiet=args.quiet), finished=_Clock(len(mine), args.quiet))
    if runner.failures:
        cli.say(f"{len(runner.failures)} steps failed; the same command tries them again:")
        for failure in runner.failures:
            cli.say(f"  {failure}")
    cli.result({"suite": args.suite, "output": str(args.output), "pictures": len(mine), "computed": runner.computed,
                "failed": [str(failure) for failure in runner.failures]},
               f"{about} done, {runner.computed} steps computed, {len(runner.failures)} failed; "
               f"python -m {__package__}.evaluate table {args.output}", as_json=args.json)
    return cli.SOME_FAILED if runner.failures else cli.OK


def _announce(folder, asked, editors, cases, about, args):
    """Say what is to be done and how long it will take, before it begins."""
    immunizations, edits, finished, kept = protocol.left(folder, asked, cases)
    todo = f"{sum(immunizations.values())} immunizations and {sum(edits.values())} edits to do, {finished} pictures done"
    readable = next((case for case in cases if case.picture is not None), None)
    if not (immunizations or edits) or readable is None:
        cli.say(f"{about}; {todo}", quiet=args.quiet)
        return
    by_method, by_target = seconds_each(asked, editors, readable, immunizations, edits, kept)
    total = sum(by_method[method] * n for method, n in immunizations.items())
    total += sum(by_target[target] * n for target, n in edits.items())
    each = ", ".join(f"{label} {seconds:.1f} s" for label, seconds in
                     (*by_method.items(), *((f"an edit by {target}", s) for target, s in by_target.items())))
    cli.say(f"{about}; {todo}; about {duration(total)} for this process ({each})", quiet=args.quiet)


class _Clock:
    """Says after each picture how many are done and how long the rest will take."""

    def __init__(self, total, quiet):
        self.total, self.quiet, self.done, self.started = total, quiet, 0, time.perf_counter()

    def __call__(self, case):
        self.done += 1
        spent = time.perf_counter() - self.started
        cli.say(f"{self.done} of {self.total} pictures, {duration(spent)} so far, about "
                f"{duration(spent / self.done * (self.total - self.done))} left", quiet=self.quiet or spent < 5)


def _table(args):
    from . import report
    groups = protocol.collect(args.folder)
    for group in groups:
        if group["missing"]:
            cli.say(f"{group['plan']['suite']}: {group['missing']} edits are still to be made", quiet=args.quiet)
    tables = [table for group in groups for table in report.tables(group)]
    if args.json:
        for table in tables:
            cli.out(cli.to_json(table.record()))
    else:
        cli.out(report.FORMATS[args.format](tables))
    return cli.OK


def _body(args):
    return {"run": _run, "table": _table}[args.action](args)


def main(argv=None):
    return cli.run(_body, _parser(), argv)


if __name__ == "__main__":
    cli.leave(main())
