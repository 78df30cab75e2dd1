"""Vision models as judges: a panel judges the edited pictures of a manifest, and every answer is kept as evidence.

    panel = Panel.load("local-ollama")                                # or paper-2025, gemini-2026, a .json file
    found = run(panel, read_manifest("manifest.jsonl"), "DIR")        # found.records go into isr.by_arm
    isr.ask(judges(panel), edits)                                     # the same judges one by one, as any other judge

A run asks every judge of the panel about every sample, and writes each answer to DIR/ledger.jsonl before that judge is
asked anything else. The ledger is evidence and cache: an answer is found again by what was asked (pictures by their
pixels, words, model, settings, vote). A run that was killed, stopped or extended buys no written answer again; at most
the calls that were in flight are bought twice. Each call is written down before it is sent, so that these calls, too,
count in the limits of the next run. No picture and no key is written. A DIR belongs to one panel.

  ledger.jsonl    every call (intent, settled) and every answer, in order of time: what was asked (hashes), said, paid
  records.jsonl   one isr.Record per sample and judge, in the manifest's order
  manifest.jsonl  the samples as they were judged;  run.json  panel, canaries, costs, rates, and whether it ended

The judge hears neither the arm nor what any of this is for. Before the samples come ten canaries (canaries.py): a judge
that misjudges two of them is not asked further. Samples are asked in a shuffled order, all arms of one original together,
so that a run which ends early, or a service that changes on the way, favours no arm.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import random
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import lru_cache
from pathlib import Path

from . import PROGRAM, __version__, cli, isr, panels, ratings, verdicts
from .canaries import PASS, canaries
from .files import writing
from .ledger import Ledger
from .panels import Panel, findings, picture_sha256, read_manifest
from .verdicts import estimated, percent
from .wire import Stop

ANSWERS = ("verdict", "canary")                              # kinds of a ledger's rows; the others are calls
PASSING = ("http_error", "timeout", "model_mismatch")        # no answer of this judge: asked again by the next run
CANARY_HOURS = 20                                            # for so long canaries vouch for a model
UNAVAILABLE = ("credential", "request", "model", "unreachable", "tls", "redirect")      # reasons of Stop: nothing to be had
COVERAGE = 0.98                                              # below this share of judged samples a rate is doubtful


# ---------------------------------------------------------------------------------------------------------- one judge

class Judge:
    """One model of a panel, as isr.ask wants it: judge(sample, edited) -> Verdict, NoVerdict, or gemini.Stop."""

    def __init__(self, name, client, panel):
        self.name, self.client, self.panel = name, client, panel
        spec = client.spec
        self._beside = {"weights": spec.weights, "system_in_user": spec.system_in_user, "prompt": panel.prompt.sha256,
                        "schema": panel.prompt.schema_sha256}

    def __call__(self, sample, edited):
        answers = [self.client.ask(self.request(sample.image, edited, sample.prompt, vote)) for vote in range(self.panel.votes)]
        mismatch, degradation, status = majority([_said(answer) for answer in answers])
        if status != "ok":
            raise isr.NoVerdict(status)
        return isr.Verdict.of(mismatch, degradation)

    def request(self, original, edited, prompt, vote):
        return self.panel.prompt.request(original, edited, prompt, self.panel.seed + vote)

    def fields(self, vote):
        """All that shapes an answer beside pictures and instruction, JSON-ready."""
        request = dataclasses.replace(self.request(None, None, "", vote), parts=[])
        return {**self.client.fields(request), **self._beside}

    def key(self, original_sha256, edited_sha256, prompt, vote):
        """The name of an answer: equal where the same was asked."""
        return panels.digest({"v": 1, **self.fields(vote), "images": [original_sha256, edited_sha256],
                              "instruction": prompt, "vote": vote})


def judges(panel, *, budget=None, notify=None):
    """{name: Judge} of a panel; raises ValueError where a key is missing."""
    from .gemini import Budget, Client
    budget = budget or Budget()
    return {name: Judge(name, Client(spec, budget=budget, notify=notify), panel) for name, spec in panel.judges.items()}


def identity(panel, asked=None):
    """The hash of all that shapes this panel's answers; its `asked` judges are made where they are not given."""
    return panels.digest({"id": panel.id, "votes": panel.votes,
                          "judges": {name: judge.fields(0) for name, judge in (asked or judges(panel)).items()}})


def majority(votes):
    """(mismatch, degradation, status) of the votes (mismatch, degradation, status), an odd number of them.

    A finding holds where more than half of all votes say so, counting those without an answer to neither side.
    """
    found = []
    for answers in zip(*(vote[:2] for vote in votes), strict=True):
        yes, no = answers.count(True), answers.count(False)
        found.append(True if 2 * yes > len(votes) else False if 2 * no > len(votes) else None)
    if found == [None, None]:
        return None, None, next((status for _, _, status in votes if status != "ok"), "votes_tied")
    return *found, "ok"


def _said(answer):
    """(mismatch, degradation, status) of an Answer."""
    return (*findings(answer.data)[:2], "ok") if answer.ok else (None, None, answer.status)


# -------------------------------------------------------------------------------------------------------------- a run

@dataclass(frozen=True)
class Run:
    """What came of a run. stops: (judge, reason, sentence); failures: (sample, sentence) of pictures that cannot be read."""

    records: list
    summary: dict
    stops: list
    failures: list


def run(panel, samples, folder, *, max_cost=None, max_calls=None, concurrency=4, retry=False, accept=False, notify=None,
        on_verdict=None):
    """Judge the samples of a manifest; see the module's docstring. Returns a Run; raises ValueError and OSError.

    max_cost (USD), max_calls: limits of the folder, over all runs into it; concurrency: calls in flight per judge; retry:
    ask again where a judge answered without a verdict; accept: go on with judges that fail the canaries. on_verdict() is
    called once per sample and judge, when its turn is over; notify(sentence) hears remarks.
    """
    from .gemini import Budget
    return _Run(panel, samples, Path(folder), Budget(max_cost, max_calls), concurrency, retry, accept,
                notify or (lambda text: None), on_verdict or (lambda: None)).run()


class _Run:
    def __init__(self, panel, samples, folder, budget, concurrency, retry, accept, notify, on_verdict):
        self.panel, self.samples, self.folder, self.budget = panel, samples, folder, budget
        self.concurrency, self.retry, self.accept = concurrency, retry, accept
        self.notify, self.on_verdict = notify, on_verdict
        self.judges = judges(panel, budget=budget, notify=notify)
        self.identity = identity(panel, self.judges)
        self.stops, self.failures, self.canaries = [], {}, {}
        self.best, self.queued, self.hashes = {}, set(), {}
        self.read = lru_cache(maxsize=4)(_read)

    def run(self):
        writing.make_folder(self.folder)
        with Ledger(self.folder / "ledger.jsonl") as self.ledger:
            self._take_over()
            self._write("run.json", cli.to_json({**self._about(), "state": "running"}, indent=1))
            rows = (json.dumps(self._row(sample), ensure_ascii=False) for sample in self.samples)
            self._write("manifest.jsonl", "".join(f"{row}\n" for row in rows))
            self._ask_all()
            records = [self._record(sample, judge) for sample in self.samples for judge in self.judges.values()]
            summary = self._about() | {
                "state": "ended", "stops": [dict(zip(("judge", "reason", "text"), stop, strict=True)) for stop in self.stops],
                "unreadable": list(self.failures.values()), **self._spent(),
                "self_flips": self._flips(), "results": verdicts.summarize(records, self.samples)}
            lines = (json.dumps(dataclasses.asdict(record), ensure_ascii=False) for record in records)
            self._write("records.jsonl", "".join(f"{line}\n" for line in lines))
            self._write("run.json", cli.to_json(summary, indent=1))
        return Run(records, summary, self.stops, list(self.failures.items()))

    # ---- before and after

    def _take_over(self):
        """Read the answers of earlier runs into this folder, and count their calls and cost."""
        if self.ledger.repaired:
            self.notify(f"{self.ledger.path}: the last line was cut off, {self.ledger.repaired} bytes; it is removed")
        before = verdicts.load(self.folder / "run.json")
        if self.ledger.rows and not before:
            raise ValueError(f"{self.folder} has a ledger of something else; choose another folder")
        if before and (before.get("kind") != "models" or self.ledger.rows and before.get("identity") != self.identity):
            raise ValueError(f"{self.folder} holds verdicts of {verdicts.whose(before)}, which were asked otherwise; "
                             "choose another folder")
        for row in self.ledger.rows:
            if row.get("kind") in ANSWERS:
                self._take(row)
        self.budget.journal = self.ledger
        calls, cost = self.budget.resume(list(self.ledger.rows))
        if calls:
            price = f" and {cost:.4f} USD at most" if cost else ""
            self.notify(f"{calls} calls were in flight when the last run ended: they count as {calls} calls{price}, and their "
                        "questions are asked again")

    def _about(self):
        return {"kind": "models", "version": __version__, "time_utc": _now(), "panel": self.panel.record(),
                "identity": self.identity, "samples": len(self.samples), "canaries": self.canaries}

    def _row(self, sample):
        """A sample with its files as seen from here: manifest.jsonl is a manifest itself."""
        files = {name: str(getattr(sample, name)) for name in ("original", "edited")}
        with contextlib.suppress(ValueError):                # another drive: there is no way from here
            files = {name: Path(os.path.relpath(file, self.folder)).as_posix() for name, file in files.items()}
        return sample.record() | files

    def _spent(self):
        rows = [row for row in self.ledger.rows if row.get("kind") in ANSWERS]
        counted = {name: sum(row["tokens"].get(name) or 0 for row in rows) for name in ("prompt", "output", "thoughts")}
        return {"calls": self.budget.calls, "cost_usd": round(self.budget.cost, 6),
                "calls_of_unknown_cost": self.budget.unknown, "their_cost_usd_at_most": round(self.budget.held, 6),
                "tokens": counted}

    def _write(self, name, text):
        writing.write(self.folder / name, text, overwrite=True)

    # ---- asking

    def _ask_all(self):
        order = self._order()
        upcoming = {judge: self._upcoming(judge, order) for judge in self.judges.values()}
        work = {}
        for judge, questions in upcoming.items():            # who has nothing to ask needs no canaries either
            first = next(questions, None)
            if first:
                work[judge] = itertools.chain([first], questions)
        hosts = sorted({judge.client.spec.host for judge in work if not judge.client.spec.local})
        if hosts:
            self.notify(f"pictures and prompts go to {', '.join(hosts)}, where a free tier may use them for training")
        self._ask({judge: self._canary_questions(judge) for judge in work})
        for judge in self.judges.values():
            if not self._vouched(judge, judge in work):
                work.pop(judge, None)
        self._ask({judge: questions for judge, questions in work.items() if not judge.client.stopped})

    def _order(self):
        """Originals shuffled, the samples of each together: a cheap prefix for services that cache, and no arm first."""
        groups = {}
        for sample in self.samples:
            groups.setdefault(sample.image_id, []).append(sample)
        groups = list(groups.values())
        random.Random(self.panel.seed).shuffle(groups)
        return [sample for group in groups for sample in group]

    def _upcoming(self, judge, order):
        """What is still to be asked of a judge, one by one: (row so far, function that makes the Request)."""
        for sample in order:
            for vote, key in enumerate(self._keys(sample, judge)):
                row = self.best.get(key)
                again = row and row["status"] != "ok" and (self.retry or row["status"] in PASSING)
                if (row is None or again) and key not in self.queued:
                    self.queued.add(key)
                    yield {"kind": "verdict", "key": key, "sample_id": sample.sample_id, "arm": sample.arm,
                           "image_sha256": [self.hashes[path] for path in (sample.original, sample.edited)],
                           "instruction": sample.prompt, "vote": vote}, lambda s=sample, v=vote: judge.request(
                               self.read(s.original), self.read(s.edited), s.prompt, v)
            self.on_verdict()

    def _canary_questions(self, judge):
        for canary in canaries():
            key, shas = self._canary_key(judge, canary)
            row = self.best.get(key)
            if row is None or row["status"] in PASSING or _hours(row["time_utc"]) > CANARY_HOURS:
                yield {"kind": "canary", "key": key, "sample_id": canary.name, "arm": "canary", "image_sha256": shas,
                       "instruction": canary.prompt, "vote": 0}, lambda c=canary: judge.request(
                           c.original, c.edited, c.prompt, 0)

    def _canary_key(self, judge, canary):
        shas = [picture_sha256(image) for image in (canary.original, canary.edited)]
        return f"canary {judge.key(*shas, canary.prompt, 0)}", shas

    def _ask(self, work):
        """Ask each judge its questions; every answer is on the disk before the next question goes out."""
        from .gemini import ask_many
        asked = {judge: [] for judge in work}

        def requests(judge, questions):
            for row, make in questions:
                asked[judge].append(row)
                yield dataclasses.replace(make(), name=row["key"])
        busy = list(work)
        answers = ask_many([(judge.client, requests(judge, work[judge])) for judge in busy], concurrency=self.concurrency)
        with contextlib.closing(answers):                    # an error here ends the calls in flight now, not at exit
            for which, index, answer in answers:
                self._keep(busy[which], asked[busy[which]][index], answer)
                asked[busy[which]][index] = None
        for judge in busy:
            stop = judge.client.stopped
            if stop and judge.name not in [name for name, _, _ in self.stops]:
                self.stops.append((judge.name, stop.reason, str(stop)))

    def _keep(self, judge, row, answer):
        told = answer.record()
        data = told.pop("data")
        mismatch, degradation, evidence = findings(data) if answer.ok else (None, None, {})
        if answer.ok or answer.status == "model_mismatch":
            del told["text"]                                 # the object says it all; otherwise the text is the evidence
        else:
            told["text"] = told["text"][:500]
        row = {**row, "judge": judge.name, "panel": self.panel.id, "prompt": self.panel.prompt.id,
               "prompt_sha256": self.panel.prompt.sha256, "schema_sha256": self.panel.prompt.schema_sha256,
               "semantic_mismatch": mismatch, "perceptual_degradation": degradation, "evidence": evidence, **told,
               "version": __version__, "time_utc": _now()}
        self.ledger.append(row)
        self._take(row)

    def _take(self, row):
        """The newest answer to a question counts, but never one without a verdict before one with."""
        if row["kind"] == "canary" or row["status"] == "ok" or self.best.get(row["key"], row)["status"] != "ok":
            self.best[row["key"]] = row

    def _vouched(self, judge, needed):
        """Whether a judge's canaries allow to go on; marks the run."""
        found = [(canary, self.best.get(self._canary_key(judge, canary)[0])) for canary in canaries()]
        if any(row is None for _, row in found):             # stopped before the last, or there is nothing to ask
            return False
        wrong = [canary.name for canary, row in found
                 if (row["semantic_mismatch"], row["perceptual_degradation"])
                 != (canary.semantic_mismatch, canary.perceptual_degradation)]
        self.canaries[judge.name] = {"right": len(found) - len(wrong), "of": len(found), "wrong": wrong}
        if len(found) - len(wrong) >= PASS or self.accept or judge.client.stopped or not needed:
            if wrong:
                self.notify(f"{judge.name} misjudged {len(wrong)} of {len(found)} canaries ({', '.join(wrong)}); "
                            "the run is marked")
            return True
        silent = [row for _, row in found if row["status"] != "ok"]
        why = f"; {len(silent)} of these had no verdict at all ({silent[0]['message']})" if silent else ""
        self.stops.append((judge.name, "canaries", f"{judge.name} misjudged {len(wrong)} of {len(found)} pictures of known "
                           f"verdict ({', '.join(wrong)}){why}, so it was asked no more; take another model, or judge with "
                           "it all the same by --accept-canaries"))
        return False

    # ---- results

    def _keys(self, sample, judge):
        """The names of a sample's answers, one per vote; none where a picture cannot be read."""
        if (sample.arm, sample.sample_id) in self.failures:
            return []
        try:
            shas = [self._hash(path) for path in (sample.original, sample.edited)]
        except ValueError as error:
            self.failures[sample.arm, sample.sample_id] = str(error)
            return []
        return [judge.key(*shas, sample.prompt, vote) for vote in range(self.panel.votes)]

    def _hash(self, path):
        if path not in self.hashes:
            self.hashes[path] = picture_sha256(self.read(path))
        return self.hashes[path]

    def _votes(self, sample, judge):
        return [self.best.get(key) for key in self._keys(sample, judge)]

    def _record(self, sample, judge):
        votes = [(row["semantic_mismatch"], row["perceptual_degradation"], row["status"]) if row else (None, None, "not_asked")
                 for row in self._votes(sample, judge)] or [(None, None, "bad_input")]
        return isr.Record(sample.sample_id, sample.image_id, sample.prompt_id, sample.arm, judge.name, *majority(votes))

    def _flips(self):
        """{judge: share of pairs of votes on one sample that differ in success}: how far a judge agrees with itself."""
        shares = {}
        for judge in self.judges.values() if self.panel.votes > 1 else ():
            pairs = [first["semantic_mismatch"] | first["perceptual_degradation"]
                     != second["semantic_mismatch"] | second["perceptual_degradation"]
                     for sample in self.samples
                     for first, second in itertools.combinations(filter(None, self._votes(sample, judge)), 2)
                     if first["status"] == second["status"] == "ok"]
            shares[judge.name] = sum(pairs) / len(pairs) if pairs else None
        return shares


def _read(path):
    from . import images
    return images.read(path).image


def _now():
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _hours(time_utc):
    return (datetime.now(timezone.utc) - datetime.fromisoformat(time_utc)).total_seconds() / 3600


# ------------------------------------------------------------------------------------------------------------- command

EXAMPLES = """examples:
  %(prog)s show                                              the named panels
  %(prog)s dry-run edits.jsonl --panel paper-2025
  %(prog)s run edits.jsonl --panel local-ollama -o verdicts
  %(prog)s run edits.jsonl --panel paper-2025 -o verdicts --max-cost 5
  %(prog)s export-sheet edits.jsonl --raters ann,ben,cai -o study
  %(prog)s import-ratings study/keep ann.csv ben.csv cai.csv -o people
  %(prog)s consistency people verdicts

A manifest has a JSON object a line: sample_id, original, edited, prompt, arm ("control", "noise", or a method's name), and
image_id, prompt_id, prompt_type, category, editor, method where known; files are relative to it. A panel is a name or a .json
file. Keys come from the environment (GEMINI_API_KEY, or what the panel names) or a file of mode 600 (GEMINI_API_KEY_FILE);
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

    manifest = {"type": cli.path, "metavar": "MANIFEST", "help": "JSON lines, one edited picture each"}
    chosen = {"required": True, "metavar": "NAME|FILE", "help": f"{', '.join(panels.names())}, or a .json file"}
    folder = {"required": True, "type": cli.path, "metavar": "DIR", "help": "where results go (created if absent)"}
    option = add("run", "Ask a panel about every sample; run it again to go on.")
    option("manifest", **manifest)
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
    option("manifest", **manifest)
    option("--panel", **chosen)
    option("-o", "--output", **{**folder, "required": False, "help": "a folder whose verdicts need not be bought again"})
    option("--count", action="store_true", help="have the service count the first sample's tokens (sends its pictures)")
    option = add("export-sheet", "Make a blind rating sheet for people.", "overwrite")
    option("manifest", **manifest)
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
    panel, samples = Panel.load(args.panel), read_manifest(args.manifest)
    with cli.progress(total=len(samples) * len(panel.judges), what=panel.id, unit="verdict", quiet=args.quiet) as bar:
        found = run(panel, samples, args.output, max_cost=args.max_cost, max_calls=args.max_calls,
                    concurrency=args.concurrency, retry=args.retry, accept=args.accept_canaries,
                    notify=lambda text: cli.say(text, quiet=args.quiet), on_verdict=bar.update)
    code = cli.OK
    for _, sentence in found.failures:
        code = cli.fail(sentence)
    for text, reason in {text: reason for _, reason, text in found.stops}.items():
        code = max(code, cli.fail(text, cli.UNAVAILABLE if reason in UNAVAILABLE else cli.SOME_FAILED))
    coverage = found.summary["results"]["coverage"]
    if code == cli.OK and coverage < args.min_coverage:
        code = cli.fail(f"only {percent(coverage)} of the samples have a verdict of every judge; --retry asks again, "
                        "--min-coverage accepts it")
    if coverage or code != cli.UNAVAILABLE:
        cli.result(found.summary, "\n".join(verdicts.describe(found.summary)), as_json=args.json)
    return code


def _dry_run(args):
    from .gemini import Client, Key
    panel, samples = Panel.load(args.panel), read_manifest(args.manifest)
    known = {}
    if args.output and (args.output / "ledger.jsonl").exists():
        from . import ledger
        known = {row["key"]: row for row in ledger.read(args.output / "ledger.jsonl")
                 if row.get("kind") in ANSWERS and row["status"] == "ok"}
    total, priced = 0.0, True
    for name, spec in panel.judges.items():
        judge = Judge(name, Client(spec, Key("offline", "a dry run")), panel)       # which is never sent
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
    read = lru_cache(maxsize=2)(_read)
    for sample in samples:
        for vote in range(panel.votes):
            yield read(sample.original), read(sample.edited), sample.prompt, vote


def _export(args):
    if args.attention < 0:
        raise ValueError(f"--attention {args.attention}: give a whole number of at least 0")
    writing.make_folder(args.output)
    study = ratings.export(read_manifest(args.manifest), args.output, args.raters, panels.Prompt.load(args.prompt),
                           items=args.items, attention=args.attention, seed=args.seed, overwrite=args.overwrite)
    cli.result(study, f"{study['items']} items and {study['attention']} attention items for {', '.join(study['raters'])}: "
               f"hand out {args.output / 'sheet'}, keep {args.output / 'keep'} to yourself", as_json=args.json)


def _import(args):
    writing.make_folder(args.output)
    found = ratings.load(args.study, args.ratings)
    summary = {"kind": "people", "version": __version__, "time_utc": _now(), "state": "ended", "samples": len(found.samples),
               "panel": {"id": "people", "date": found.study["date"], "prompt": found.study["prompt"],
                         "judges": {rater: found.raters[rater] for rater in found.raters}},
               "results": verdicts.summarize(found.records, found.samples)}
    lines = (json.dumps(dataclasses.asdict(record), ensure_ascii=False) for record in found.records)
    for name, text in (("ratings.csv", found.csv), ("records.jsonl", "".join(f"{line}\n" for line in lines)),
                       ("run.json", cli.to_json(summary, indent=1))):
        writing.write(args.output / name, text, overwrite=args.overwrite)
    for rater, counts in found.raters.items():
        cli.say(f"{rater}: {counts['rated']} of {counts['items']} items rated, {counts['attention_right']} of "
                f"{counts['attention']} attention items right; {counts['overall_differs']} overall answers differ from the OR "
                "of the two findings", quiet=args.quiet)
    cli.result(summary, "\n".join(verdicts.describe(summary)), as_json=args.json)


def _consistency(args):
    records, groups = [], {"people": [], "models": []}
    for folder in args.folders:
        found, about = verdicts.load_records(folder)
        records += found
        groups[about["kind"]] += dict.fromkeys(record.judge for record in found)
    table = isr.consistency(records, **groups)
    if args.json:
        return cli.out(cli.to_json({label: {row: dataclasses.asdict(one) for row, one in rows.items()}
                                    for label, rows in table.items()}))
    for row in next(iter(table.values())):
        cli.out(f"{row}:")
        for label, rows in table.items():
            found = rows[row]
            shares = ", ".join(f"{name} {percent(share)}" for name, share in found.marginals.items())
            fleiss = f", Fleiss {_plain(found.fleiss)}" if found.fleiss else ""
            cli.out(f"  {label.replace('_', ' ')}: agreement {estimated(dataclasses.asdict(found.observed))}, Cohen "
                    f"{_plain(found.cohen)}{fleiss}, AC1 {_plain(found.ac1)}, n = {found.items} "
                    f"({found.left_out} left out); says yes: {shares}")
            if row == "majority to consensus":
                ((_, _, *cells),) = found.tables
                how = ", ".join(f"{name} {'-' if value is None else f'{value:.2f}'}"
                                for name, value in isr.prediction(*cells).items())
                cli.out(f"    consensus as a prediction of the majority: {how}")
    return cli.OK


def _plain(estimate):
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
            _, about = verdicts.load_records(name)
            cli.result(about, "\n".join(verdicts.describe(about)), as_json=args.json)
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
    return cli.run(_body, _parser(), argv)


if __name__ == "__main__":
    cli.leave(main())
