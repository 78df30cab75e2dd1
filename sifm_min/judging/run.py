"""Vision models as judges: a panel judges a list of edited pictures, and every answer is kept as evidence.

    panel = Panel.load("local-ollama")                                # or paper-2025, gemini-2026, a .json file
    result = run(panel, read_edits("edits.jsonl"), "DIR")             # result.records go into records.by_arm
    records.ask(judges(panel), edits)                                 # the same judges one by one, as any other judge

A run asks every judge of the panel about every sample, and writes each answer to DIR/ledger.jsonl before that judge is
asked anything else. The ledger is evidence and cache: an answer is found by the hash of its question (pictures by
their pixels, texts, model, settings, vote). A run that was killed, stopped or extended buys no written answer again; at most
the calls that were in flight are bought twice. Each call is written down before it is sent, so that these calls, too,
count in the limits of the next run. No picture and no key is written. A DIR belongs to one panel.

  ledger.jsonl    every call (intent, settled) and every answer, in order of time: question (hashes), answer, cost
  records.jsonl   one Record per sample and judge, in the order of the list
  manifest.jsonl  the list of samples;  run.json  panel, canaries, costs, rates, state

The judge is told neither the arm nor the purpose. Before the samples come ten canaries (canaries.py): a judge that
misjudges two of them is asked no further. Samples are asked in a shuffled order, all arms of one original together, so
that a run which ends early, or a service that changes during the run, favours no arm.
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

from .. import __version__, cli
from ..files import writing
from ..files.digests import digest, picture_sha256
from ..files.ledger import Ledger
from ..miniature.verdict import NoVerdict, Verdict
from . import summary
from .answers import ANSWERS, finding, majority, take_newest
from .canaries import PASS, canaries
from .panels import findings
from .records import Record

PASSING = ("http_error", "timeout", "model_mismatch")        # no answer of this judge: asked again by the next run
CANARY_HOURS = 20                                            # hours for which canaries count
UNAVAILABLE = ("credential", "request", "model", "unreachable", "tls", "redirect")      # reasons of Stop: no service


# ---------------------------------------------------------------------------------------------------------- one judge

class Judge:
    """One model of a panel, callable as any judge: judge(sample, edited) -> Verdict; raises NoVerdict or Stop."""

    def __init__(self, name, client, panel):
        self.name, self.client, self.panel = name, client, panel
        spec = client.spec
        self._beside = {"weights": spec.weights, "system_in_user": spec.system_in_user, "prompt": panel.prompt.sha256,
                        "schema": panel.prompt.schema_sha256}

    def __call__(self, sample, edited):
        answers = [self.client.ask(self.request(sample.image, edited, sample.prompt, vote)) for vote in range(self.panel.votes)]
        mismatch, degradation, status = majority([_said(answer) for answer in answers])
        if status != "ok":
            raise NoVerdict(status)
        return Verdict.of(mismatch, degradation)

    def request(self, original, edited, prompt, vote):
        """The Request on two PIL pictures; each vote has its own seed."""
        return self.panel.prompt.request(original, edited, prompt, self.panel.seed + vote)

    def fields(self, vote):
        """All settings that shape an answer beside pictures and instruction, JSON-ready."""
        request = dataclasses.replace(self.request(None, None, "", vote), parts=[])
        return {**self.client.fields(request), **self._beside}

    def key(self, original_sha256, edited_sha256, prompt, vote):
        """The name of an answer: equal for equal questions."""
        return digest({"v": 1, **self.fields(vote), "images": [original_sha256, edited_sha256],
                              "instruction": prompt, "vote": vote})


def judges(panel, *, budget=None, notify=None):
    """{name: Judge} of a panel; raises ValueError where a key is missing."""
    from .client import Budget, Client
    budget = budget or Budget()
    return {name: Judge(name, Client(spec, budget=budget, notify=notify), panel) for name, spec in panel.judges.items()}


def identity(panel, members=None):
    """The hash of all that shapes a panel's answers. members: its judges by name, made here if not given."""
    return digest({"id": panel.id, "votes": panel.votes,
                   "judges": {name: judge.fields(0) for name, judge in (members or judges(panel)).items()}})


def _said(answer):
    """(mismatch, degradation, status) of an Answer."""
    return (*findings(answer.data)[:2], "ok") if answer.ok else (None, None, answer.status)


# -------------------------------------------------------------------------------------------------------------- a run

@dataclass(frozen=True)
class Run:
    """The result of a run. stops: (judge, reason, sentence); failures: (sample, sentence) of unreadable pictures."""

    records: list
    summary: dict
    stops: list
    failures: list


def run(panel, samples, folder, *, max_cost=None, max_calls=None, concurrency=4, retry=False, accept=False, notify=None,
        on_verdict=None):
    """Judge a list of edited pictures; see the module's docstring. Returns a Run; raises ValueError and OSError.

    max_cost (USD), max_calls: limits of the folder, over all runs into it. concurrency: calls in flight per judge. retry:
    ask again where a judge answered without a verdict. accept: go on with judges that fail the canaries. on_verdict() is
    called once per sample and judge, when its turn is over; notify(sentence) is called with remarks.
    """
    from .client import Budget
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
        self.read = lru_cache(maxsize=4)(read_picture)

    def run(self):
        writing.make_folder(self.folder)
        with Ledger(self.folder / "ledger.jsonl") as self.ledger:
            self._take_over()
            self._write("run.json", cli.to_json({**self._about(), "state": "running"}, indent=1))
            rows = (json.dumps(self._row(sample), ensure_ascii=False) for sample in self.samples)
            self._write("manifest.jsonl", "".join(f"{row}\n" for row in rows))
            self._ask_all()
            records = [self._record(sample, judge) for sample in self.samples for judge in self.judges.values()]
            about = self._about() | {
                "state": "ended", "stops": [dict(zip(("judge", "reason", "text"), stop, strict=True)) for stop in self.stops],
                "unreadable": list(self.failures.values()), **self._spent(),
                "self_flips": self._flips(), "results": summary.summarize(records, self.samples)}
            lines = (json.dumps(dataclasses.asdict(record), ensure_ascii=False) for record in records)
            self._write("records.jsonl", "".join(f"{line}\n" for line in lines))
            self._write("run.json", cli.to_json(about, indent=1))
        return Run(records, about, self.stops, list(self.failures.items()))

    # ---- before and after

    def _take_over(self):
        """Read the answers of earlier runs into this folder, and count their calls and cost."""
        if self.ledger.repaired:
            self.notify(f"{self.ledger.path}: the last line was cut off, {self.ledger.repaired} bytes; it is removed")
        before = summary.load(self.folder / "run.json")
        if self.ledger.rows and not before:
            raise ValueError(f"{self.folder} has a ledger of something else; choose another folder")
        if before and (before.get("kind") != "models" or self.ledger.rows and before.get("identity") != self.identity):
            raise ValueError(f"{self.folder} holds verdicts of {summary.whose(before)}, whose settings differ; "
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
        return {"kind": "models", "version": __version__, "time_utc": now(), "panel": self.panel.record(),
                "identity": self.identity, "samples": len(self.samples), "canaries": self.canaries}

    def _row(self, sample):
        """A sample with its files relative to the folder, so that manifest.jsonl can be judged itself."""
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
        for judge, questions in upcoming.items():            # a judge without open questions needs no canaries
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
        """The samples, shuffled by original, those of one original together: a prefix that services can cache."""
        groups = {}
        for sample in self.samples:
            groups.setdefault(sample.image_id, []).append(sample)
        groups = list(groups.values())
        random.Random(self.panel.seed).shuffle(groups)
        return [sample for group in groups for sample in group]

    def _upcoming(self, judge, order):
        """Yield the open questions of a judge: (row so far, function that makes the Request)."""
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
        """Yield the canaries that a judge has not answered within CANARY_HOURS, as `_upcoming` does."""
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
        """Ask each judge its questions. Every answer is on the disk before that judge's next question is sent."""
        from .client import ask_many
        open_rows = {judge: [] for judge in work}

        def requests(judge, questions):
            for row, make in questions:
                open_rows[judge].append(row)
                yield dataclasses.replace(make(), name=row["key"])
        busy = list(work)
        answers = ask_many([(judge.client, requests(judge, work[judge])) for judge in busy], concurrency=self.concurrency)
        with contextlib.closing(answers):                    # an error here ends the calls in flight now, not at exit
            for which, index, answer in answers:
                self._keep(busy[which], open_rows[busy[which]][index], answer)
                open_rows[busy[which]][index] = None
        for judge in busy:
            stop = judge.client.stopped
            if stop and judge.name not in [name for name, _, _ in self.stops]:
                self.stops.append((judge.name, stop.reason, str(stop)))

    def _keep(self, judge, row, answer):
        """Write an answer into the ledger."""
        fields = answer.record()
        data = fields.pop("data")
        mismatch, degradation, evidence = findings(data) if answer.ok else (None, None, {})
        if answer.ok or answer.status == "model_mismatch":
            del fields["text"]                               # the object says it all; otherwise the text is the evidence
        else:
            fields["text"] = fields["text"][:500]
        row = {**row, "judge": judge.name, "panel": self.panel.id, "prompt": self.panel.prompt.id,
               "prompt_sha256": self.panel.prompt.sha256, "schema_sha256": self.panel.prompt.schema_sha256,
               "semantic_mismatch": mismatch, "perceptual_degradation": degradation, "evidence": evidence, **fields,
               "version": __version__, "time_utc": now()}
        self.ledger.append(row)
        self._take(row)

    def _take(self, row):
        """Keep the newest answer to a question, see `take_newest`. Of canaries it is the last one, whatever it says."""
        if row["kind"] == "canary":
            self.best[row["key"]] = row
        else:
            take_newest(self.best, row["key"], row)

    def _vouched(self, judge, needed):
        """True if a judge's canaries allow it to go on. Their result is written into the run."""
        replies = [(canary, self.best.get(self._canary_key(judge, canary)[0])) for canary in canaries()]
        if any(row is None for _, row in replies):           # stopped before the last, or there is nothing to ask
            return False
        wrong = [canary.name for canary, row in replies
                 if (row["semantic_mismatch"], row["perceptual_degradation"])
                 != (canary.semantic_mismatch, canary.perceptual_degradation)]
        self.canaries[judge.name] = {"right": len(replies) - len(wrong), "of": len(replies), "wrong": wrong}
        if len(replies) - len(wrong) >= PASS or self.accept or judge.client.stopped or not needed:
            if wrong:
                self.notify(f"{judge.name} misjudged {len(wrong)} of {len(replies)} canaries ({', '.join(wrong)}); "
                            "the run is marked")
            return True
        silent = [row for _, row in replies if row["status"] != "ok"]
        why = f"; {len(silent)} of these had no verdict at all ({silent[0]['message']})" if silent else ""
        self.stops.append((judge.name, "canaries", f"{judge.name} misjudged {len(wrong)} of {len(replies)} pictures of known "
                           f"verdict ({', '.join(wrong)}){why}, so it was asked no more; take another model, or judge with "
                           "it all the same by --accept-canaries"))
        return False

    # ---- results

    def _keys(self, sample, judge):
        """The names of a sample's answers, one per vote; [] where a picture cannot be read."""
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
        votes = self._votes(sample, judge)
        found = finding(votes) if votes else (None, None, "bad_input")
        return Record(sample.sample_id, sample.image_id, sample.prompt_id, sample.arm, judge.name, *found)

    def _flips(self):
        """{judge: share of pairs of votes on one sample that differ in success}."""
        shares = {}
        for judge in self.judges.values() if self.panel.votes > 1 else ():
            pairs = [first["semantic_mismatch"] | first["perceptual_degradation"]
                     != second["semantic_mismatch"] | second["perceptual_degradation"]
                     for sample in self.samples
                     for first, second in itertools.combinations(filter(None, self._votes(sample, judge)), 2)
                     if first["status"] == second["status"] == "ok"]
            shares[judge.name] = sum(pairs) / len(pairs) if pairs else None
        return shares


def read_picture(path):
    """The PIL picture in a file, RGB; raises ValueError."""
    from .. import images
    return images.read(path).image


def now():
    """The time as it is written into files: UTC, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _hours(time_utc):
    return (datetime.now(timezone.utc) - datetime.fromisoformat(time_utc)).total_seconds() / 3600
