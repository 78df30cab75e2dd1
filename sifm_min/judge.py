"""The command `python -m sifm_min.judge`: vision models or people judge edited pictures. The room judging/ does the work."""

import dataclasses
import json
from functools import lru_cache
from pathlib import Path

from . import PROGRAM, __version__, cli
from .files import ledger, writing
from .files.digests import picture_sha256
from .judging import panels, ratings, summary
from .judging.agreement import consistency, prediction
from .judging.answers import ANSWERS
from .judging.canaries import canaries
from .judging.edits import read_edits
from .judging.panels import Panel
from .judging.question import Stop
from .judging.run import UNAVAILABLE, Judge, now, read_picture, run
from .judging.summary import estimated, percent

COVERAGE = 0.98                                              # below this share of judged samples a rate is doubtful

EXAMPLES = """examples:
  %(prog)s show                                              the named panels
  %(prog)s dry-run edits.jsonl --panel paper-2025
  %(prog)s run edits.jsonl --panel local-ollama -o verdicts
  %(prog)s run edits.jsonl --panel paper-2025 -o verdicts --max-cost 5
  %(prog)s export-sheet edits.jsonl --raters ann,ben,cai -o study
  %(prog)s import-ratings study/keep ann.csv ben.csv cai.csv -o people
  %(prog)s consistency people verdicts

A list of edits has a JSON object a line: sample_id, original, edited, prompt, arm ("control", "noise", or a method's name),
and image_id, prompt_id, prompt_type, category, editor, method where known; files are relative to it. A panel is a name or a
.json file. Keys come from the environment (GEMINI_API_KEY, or the panel's key_env) or a file of mode 600 (GEMINI_API_KEY_FILE);
only `run` and `dry-run --count` send pictures, and only to the panel's addresses. Exit codes: 0 all done, 1 some samples
without verdict, 2 usage or key, 3 service unavailable, 130 or 143 interrupted (run the command again: at most the calls
that were in flight are bought twice, and they count in the limits)."""


def _parser():
    parser = cli.Parser("judge", "Judge edited pictures by a panel of vision models, or by people.", EXAMPLES)
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION", prog=parser.prog, parser_class=_action)

    def add(name, description, *shared):
        made = actions.add_parser(name, description=description, help=description)
        made.shared(*shared)
        return made.add_argument

    edits = {"type": cli.path, "metavar": "EDITS", "help": "JSON lines, one edited picture each"}
    chosen = {"required": True, "metavar": "NAME|FILE", "help": f"{', '.join(panels.names())}, or a .json file"}
    folder = {"required": True, "type": cli.path, "metavar": "DIR", "help": "where results go (created if absent)"}
    option = add("run", "Ask a panel about every sample; run it again to go on.")
    option("edits", **edits)
    option("--panel", **chosen)
    option("-o", "--output", **folder)
    option("--max-cost", type=cli.positive, metavar="USD", help="spend at most this, over all runs into the folder")
    option("--max-calls", type=cli.count, metavar="N", help="call at most this often, over all runs into the folder")
    option("--concurrency", type=cli.count, default=4, metavar="N", help="calls in flight per judge (default: 4)")
    option("--retry", action="store_true", help="ask again where a judge answered without a verdict")
    option("--accept-canaries", action="store_true", help="go on with a judge that misjudges pictures of known verdict")
    option("--min-coverage", type=cli.fraction, default=COVERAGE, metavar="SHARE",
           help=f"exit with 1 if fewer samples were judged by all (default: {COVERAGE})")
    option = add("dry-run", "Count the calls, and bound tokens and cost; nothing is sent.")
    option("edits", **edits)
    option("--panel", **chosen)
    option("-o", "--output", **{**folder, "required": False, "help": "a folder whose verdicts need not be bought again"})
    option("--count", action="store_true", help="have the service count the first sample's tokens (sends its pictures)")
    option = add("export-sheet", "Make a blind rating sheet for people.", "overwrite")
    option("edits", **edits)
    option("--raters", required=True, type=cli.commas(), metavar="A,B,C", help="pseudonyms; each gets an order of their own")
    option("-o", "--output", **folder)
    option("--items", type=cli.count, default=150, metavar="N", help="how many samples to draw, of all kinds (default: 150)")
    option("--attention", type=int, default=10, metavar="N", help="items with a known answer beside them (default: 10)")
    option("--prompt", default="isr-judge/1", metavar="ID|FILE", help="the rules that raters read (default: isr-judge/1)")
    option("--seed", type=cli.seed, help="of draw, names and orders (default: drawn, and kept in keep/study.json)")
    option = add("import-ratings", "Read filled-in sheets.", "overwrite")
    option("study", type=cli.path, metavar="KEEP", help="the folder keep/ of the study")
    option("ratings", type=cli.path, nargs="+", metavar="CSV", help="what raters sent back")
    option("-o", "--output", **folder)
    option = add("consistency", "How people and models agree (the paper's Table I).")
    option("folders", type=cli.path, nargs="+", metavar="DIR", help="folders of `run` and `import-ratings`")
    option = add("show", "Show verdict folders, panels, or the list of panels.")
    option("names", nargs="*", metavar="DIR|PANEL")
    return parser


def _action(prog, description, **_):
    return cli.Parser(prog.removeprefix(f"{PROGRAM}."), description)


def _run(args):
    panel, samples = Panel.load(args.panel), read_edits(args.edits)
    with cli.progress(total=len(samples) * len(panel.judges), what=panel.id, unit="verdict", quiet=args.quiet) as bar:
        result = run(panel, samples, args.output, max_cost=args.max_cost, max_calls=args.max_calls,
                     concurrency=args.concurrency, retry=args.retry, accept=args.accept_canaries,
                     notify=lambda text: cli.say(text, quiet=args.quiet), on_verdict=bar.update)
    code = cli.OK
    for _, sentence in result.failures:
        code = cli.fail(sentence)
    for text, reason in {text: reason for _, reason, text in result.stops}.items():
        code = max(code, cli.fail(text, cli.UNAVAILABLE if reason in UNAVAILABLE else cli.SOME_FAILED))
    coverage = result.summary["results"]["coverage"]
    if code == cli.OK and coverage < args.min_coverage:
        code = cli.fail(f"only {percent(coverage)} of the samples have a verdict of every judge; --retry asks again, "
                        "--min-coverage accepts it")
    if coverage or code != cli.UNAVAILABLE:
        cli.result(result.summary, "\n".join(summary.describe(result.summary)), as_json=args.json)
    return code


def _dry_run(args):
    from .judging.client import Client, Key
    panel, samples = Panel.load(args.panel), read_edits(args.edits)
    known = {}
    if args.output and (args.output / "ledger.jsonl").exists():
        known = {row["key"]: row for row in ledger.read_rows(args.output / "ledger.jsonl")
                 if row.get("kind") in ANSWERS and row["status"] == "ok"}
    total, priced = 0.0, True
    for name, spec in panel.judges.items():
        judge = Judge(name, Client(spec, Key("offline", "a dry run")), panel)       # this key is never sent
        calls = cached = tokens = 0
        cost = 0.0
        for original, edited, prompt, vote in _questions(samples, panel):
            if judge.key(*map(picture_sha256, (original, edited)), prompt, vote) in known:
                cached += 1
                continue
            bound, dollars = judge.client.estimate(judge.request(original, edited, prompt, vote))
            calls, tokens, cost = calls + 1, tokens + bound, cost + (dollars or 0.0)
        spent = [row["cost"] for row in known.values() if row["judge"] == name and row["cost"] is not None]
        record = {"judge": name, "calls": calls, "cached": cached, "prompt_tokens_at_most": tokens,
                  "output_tokens_at_most": calls * spec.max_output_tokens,
                  "cost_usd_at_most": round(cost, 4) if spec.price else None,
                  "cost_usd_per_call_so_far": sum(spent) / len(spent) if spent else None, "counted_tokens": None}
        if args.count:
            real = Judge(name, Client(spec), panel)
            original, edited, prompt, vote = next(_questions(samples, panel))
            record["counted_tokens"] = real.client.count_tokens(real.request(original, edited, prompt, vote))
        total, priced = total + cost, priced and spec.price is not None
        so_far = f", about {calls * record['cost_usd_per_call_so_far']:.2f} at the cost of its calls so far" if spent else ""
        counted = f"; the first sample has {record['counted_tokens']} tokens" if record["counted_tokens"] else ""
        price = f"{cost:.2f} USD (price of {spec.price.get('date', 'no date')}){so_far}" if spec.price else "price not known"
        cli.result(record, f"{name}: {calls} calls, {cached} known already; at most {tokens} tokens in and "
                   f"{record['output_tokens_at_most']} out, {price}{counted}", as_json=args.json)
    if not args.json:
        cli.out(f"beside them {len(canaries()) * len(panel.judges)} calls for canaries; in all at most {total:.2f} USD"
                f"{'' if priced else ' and what is not known'}")


def _questions(samples, panel):
    """Yield (original, edited, prompt, vote) of every question of a panel."""
    read = lru_cache(maxsize=2)(read_picture)
    for sample in samples:
        for vote in range(panel.votes):
            yield read(sample.original), read(sample.edited), sample.prompt, vote


def _export(args):
    if args.attention < 0:
        raise ValueError(f"--attention {args.attention}: give a whole number of at least 0")
    writing.make_folder(args.output)
    study = ratings.export(read_edits(args.edits), args.output, args.raters, panels.Prompt.load(args.prompt),
                           items=args.items, attention=args.attention, seed=args.seed, overwrite=args.overwrite)
    cli.result(study, f"{study['items']} items and {study['attention']} attention items for {', '.join(study['raters'])}: "
               f"hand out {args.output / 'sheet'}, keep {args.output / 'keep'} to yourself", as_json=args.json)


def _import(args):
    writing.make_folder(args.output)
    rated = ratings.load(args.study, args.ratings)
    about = {"kind": "people", "version": __version__, "time_utc": now(), "state": "ended", "samples": len(rated.samples),
             "panel": {"id": "people", "date": rated.study["date"], "prompt": rated.study["prompt"],
                       "judges": {rater: rated.raters[rater] for rater in rated.raters}},
             "results": summary.summarize(rated.records, rated.samples)}
    lines = (json.dumps(dataclasses.asdict(record), ensure_ascii=False) for record in rated.records)
    for name, text in (("ratings.csv", rated.csv), ("records.jsonl", "".join(f"{line}\n" for line in lines)),
                       ("run.json", cli.to_json(about, indent=1))):
        writing.write(args.output / name, text, overwrite=args.overwrite)
    for rater, counts in rated.raters.items():
        cli.say(f"{rater}: {counts['rated']} of {counts['items']} items rated, {counts['attention_right']} of "
                f"{counts['attention']} attention items right; {counts['overall_differs']} overall answers differ from the OR "
                "of the two findings", quiet=args.quiet)
    cli.result(about, "\n".join(summary.describe(about)), as_json=args.json)


def _consistency(args):
    records, groups = [], {"people": [], "models": []}
    for folder in args.folders:
        own, about = summary.load_records(folder)
        records += own
        groups[about["kind"]] += dict.fromkeys(record.judge for record in own)
    table = consistency(records, **groups)
    if args.json:
        return cli.out(cli.to_json({label: {row: dataclasses.asdict(agreement) for row, agreement in rows.items()}
                                    for label, rows in table.items()}))
    for row in next(iter(table.values())):
        cli.out(f"{row}:")
        for label, rows in table.items():
            agreement = rows[row]
            shares = ", ".join(f"{name} {percent(share)}" for name, share in agreement.marginals.items())
            fleiss = f", Fleiss {_plain(agreement.fleiss)}" if agreement.fleiss else ""
            cli.out(f"  {label.replace('_', ' ')}: agreement {estimated(dataclasses.asdict(agreement.observed))}, Cohen "
                    f"{_plain(agreement.cohen)}{fleiss}, AC1 {_plain(agreement.ac1)}, n = {agreement.items} "
                    f"({agreement.left_out} left out); says yes: {shares}")
            if row == "majority to consensus":
                ((_, _, *cells),) = agreement.tables
                how = ", ".join(f"{name} {'-' if value is None else f'{value:.2f}'}"
                                for name, value in prediction(*cells).items())
                cli.out(f"    consensus as a prediction of the majority: {how}")
    return cli.OK


def _plain(estimate):
    """An Estimate as text, without percent."""
    if estimate.value is None:
        return f"- ({estimate.note})"
    return f"{estimate.value:.2f}" + ("" if estimate.low is None else f" [{estimate.low:.2f}, {estimate.high:.2f}]")


def _show(args):
    if not args.names:
        for name in panels.names():
            panel = Panel.load(name)
            cli.result(panel.record(), f"{name}: {', '.join(panel.judges)}. {panel.about}", as_json=args.json)
    for name in args.names:
        if Path(name).is_dir():
            _, about = summary.load_records(name)
            cli.result(about, "\n".join(summary.describe(about)), as_json=args.json)
        else:
            record = Panel.load(name).record()
            cli.result(record, cli.to_json(record, indent=2), as_json=args.json)


def _body(args):
    actions = {"run": _run, "dry-run": _dry_run, "export-sheet": _export, "import-ratings": _import,
               "consistency": _consistency, "show": _show}
    try:
        return actions[args.action](args)
    except Stop as stop:                                     # only of a count: a run keeps its stops
        return cli.fail(str(stop), cli.UNAVAILABLE)


def main(argv=None):
    return cli.run_command(_body, _parser(), argv)


if __name__ == "__main__":
    cli.leave(main())
