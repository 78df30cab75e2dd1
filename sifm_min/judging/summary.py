"""The summary of a folder of verdicts: its records, and the rates that follow from them, as data and as text.

`judge run` and `judge import-ratings` write such folders: records.jsonl has a Record per line, and run.json has the judges,
their prompt and the rates.
"""

import dataclasses
import json
from pathlib import Path

from .rates import by_judge, controlled, success_rate
from .records import Record, by_arm


def load(path):
    """The JSON object in a file of a run, None where there is no such file; raises ValueError."""
    try:
        about = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(about, dict):
            raise ValueError
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError):
        raise ValueError(f"{path}: is not a file of a run") from None
    return about


def load_records(folder):
    """([Record], run.json) of a folder that `run` or `import-ratings` wrote; raises ValueError."""
    folder = Path(folder)
    about = load(folder / "run.json")
    if about is None:
        raise ValueError(f"{folder}: is no folder of verdicts; `run` and `import-ratings` make one")
    if "kind" not in about:
        raise ValueError(f"{folder / 'run.json'}: does not say whether people or models judged, so it is not a file of a run")
    if about.get("state") == "running":
        raise ValueError(f"{folder}: its run has not ended; run the same command again, it goes on from there")
    try:
        lines = (folder / "records.jsonl").read_text(encoding="utf-8").splitlines()
        return [Record(**json.loads(line)) for line in lines], about
    except (ValueError, TypeError) as error:
        raise ValueError(f"{folder / 'records.jsonl'}: is not a file of a run ({error})") from None


def summarize(records, samples):
    """The rates and the coverage of a run, JSON-ready. Own and unseen prompts are apart if samples have a prompt_type."""
    kinds = {(sample.arm, sample.sample_id): sample.details.get("prompt_type") or "all prompts" for sample in samples}
    grouped = {}
    for record in records:
        grouped.setdefault(kinds[record.arm, record.sample_id], []).append(record)
    tables, decided = {}, 0
    for kind, group in grouped.items():
        arms, tables[kind] = by_arm(group), {}
        for arm in arms:
            rate = success_rate(arms, arm)
            decided += rate.complete
            tables[kind][arm] = {
                "rate": dataclasses.asdict(rate), "controlled": _controlled(arms, arm),
                "judges": {name: dataclasses.asdict(counts) for name, counts in by_judge(arms, arm).items()}}
    return {"coverage": decided / len(samples), "tables": tables}


def _controlled(arms, arm):
    if "control" not in arms or arm == "control":
        return None
    try:
        return dataclasses.asdict(controlled(arms, arm, noise="noise" if "noise" in arms and arm != "noise" else None))
    except ValueError as error:                              # no pair that every judge decided
        return {"note": str(error)}


def describe(about):
    """Yield run.json as lines of text."""
    panel, results = about["panel"], about["results"]
    people = about["kind"] == "people"
    yield (f"{'people' if people else 'panel ' + panel['id']} ({panel['date']}), prompt {panel['prompt']}: "
           f"{', '.join(panel['judges'])}; {about['samples']} samples, {percent(results['coverage'])} judged by all")
    if not people:
        unknown = f", and {about['calls_of_unknown_cost']} calls of unknown cost" if about["calls_of_unknown_cost"] else ""
        if most := about.get("their_cost_usd_at_most"):
            unknown += f" (at most {most:.4f} USD)"
        yield f"{about['calls']} calls, {about['cost_usd']:.4f} USD{unknown}"
        for name, canary in about["canaries"].items():
            if wrong := canary["wrong"]:
                yield f"MARKED: {name} misjudged {len(wrong)} of {canary['of']} canaries ({', '.join(wrong)})"
        for name, share in about["self_flips"].items():
            yield f"{name} contradicts itself in {percent(share)} of pairs of votes"
    for kind, arms in results["tables"].items():
        for arm, results_of_arm in arms.items():
            rate = results_of_arm["rate"]
            yield (f"{arm}, {kind}: ISR {estimated(rate['isr'])} ({rate['successes']} of {rate['complete']}; over all "
                   f"{rate['samples']}: {percent(rate['lowest'])} to {percent(rate['highest'])})")
            for name, counts in results_of_arm["judges"].items():
                others = ", ".join(f"{status} {n}" for status, n in sorted(counts["statuses"].items()) if status != "ok")
                yield (f"  {name}: {percent(counts['successes'] / counts['judged'] if counts['judged'] else None)} of "
                       f"{counts['judged']} (mismatch only {counts['mismatch_only']}, degradation only "
                       f"{counts['degradation_only']}, both {counts['both']}){'; ' + others if others else ''}")
            if (beside := results_of_arm["controlled"]) and "isr" in beside:
                ok = beside["ok"]
                yield (f"  beside the clean edits ({beside['pairs']} pairs): control {estimated(beside['control'])}, added "
                       f"{estimated(beside['added'])}, of edits that work {estimated(ok['isr'])} (n = {ok['complete']}), "
                       f"attributable {estimated(beside['attributable'])}")
                if beside["beyond_noise"]:
                    yield f"  beyond random noise of the same budget: {estimated(beside['beyond_noise'])}"
        refused = {arm: _refusals(results_of_arm["judges"]) for arm, results_of_arm in arms.items()}
        if refused and max(refused.values()) - min(refused.values()) >= 0.02:
            shares = ", ".join(f"{arm} {percent(share)}" for arm, share in refused.items())
            yield f"MARKED: judges refuse more often in some arms ({shares}); compare the bounds, not the rates"


def _refusals(counts):
    """The share of refusals among all answers of an arm's judges."""
    total = [sum(judge["statuses"].values()) for judge in counts.values()]
    refused = [sum(n for status, n in judge["statuses"].items() if status.startswith(("blocked", "refused")))
               for judge in counts.values()]
    return sum(refused) / sum(total)


def percent(share):
    """A share as a percentage, "-" for None."""
    return "-" if share is None else f"{100 * share:.1f} %"


def estimated(estimate):
    """An Estimate as text in percent, from its dict."""
    if estimate["value"] is None:
        return f"- ({estimate['note']})"
    interval = "no interval" if estimate["low"] is None else f"{100 * estimate['low']:.1f}, {100 * estimate['high']:.1f}"
    return f"{percent(estimate['value'])} [{interval}]"


def whose(about):
    """The judges of a run.json, in words."""
    return "people" if about.get("kind") == "people" else f"panel {about.get('panel', {}).get('id')}"
