"""Verdicts of a panel on the edits of a run, and the list of edits for people to judge."""

import json

from .. import cli
from ..files import writing
from ..judging.edits import EditFile
from . import results
from .tables import sample_of


def judge_edits(folder, plan, panel, cases, share, *, max_cost=None, quiet=False):
    """Have a panel judge the edits of these pictures that lack a verdict of it; return an exit code.

    The answers stay where `judging.run` writes them; `Folder.answers` reads them for the tables.

    share: (index, count) of this process. Each share of the pictures has its own folder of verdicts, and an equal part of
    max_cost.
    """
    from ..judging.run import UNAVAILABLE, identity, run
    samples, (index, count), answers = {}, share, folder.answers(plan)
    for case in filter(lambda case: case.record["sha256"], cases):
        for cell in results.cells(folder, plan, case.record, answers):
            statuses = [status for _, _, status in (cell["judges"] or {}).values()]
            if not cell["edited"] or statuses and all(status == "ok" for status in statuses):
                continue
            samples.setdefault(cell["verdict"], _sample(folder, cell))
    if not samples:
        return cli.OK
    with cli.progress(total=len(samples) * len(panel.judges), what=panel.id, unit="verdict", quiet=quiet) as bar:
        place = folder.path / "verdicts" / f"{panel.id}-{identity(panel)[:8]}-{index}of{count}"
        outcome = run(panel, list(samples.values()), place, max_cost=max_cost and max_cost / count,
                      notify=lambda text: cli.say(text, quiet=quiet), on_verdict=bar.update)
    code = cli.OK
    for _, sentence in outcome.failures:
        code = cli.fail(sentence)
    for text, reason in {text: reason for _, reason, text in outcome.stops}.items():
        code = max(code, cli.fail(text, cli.UNAVAILABLE if reason in UNAVAILABLE else cli.SOME_FAILED))
    silent = {record.sample_id for record in outcome.records if record.status != "ok"}
    if silent and code == cli.OK:
        code = cli.fail(f"{len(silent)} of {len(samples)} edits have no verdict of every judge; the same command asks again "
                        "where a service did not answer")
    return code


def _sample(folder, cell):
    """An edit as the panel gets it."""
    prompt = f"{cell['prompt_id']}, seed {cell['seed']}, edited by {cell['target']}"
    arm = cell["arm"] if cell["source"] == cell["target"] else f"{cell['arm']}, made for {cell['source']}"
    return EditFile(cell["verdict"], cell["image_id"], prompt, arm, cell["prompt"], folder.picture(cell["original"]),
                    folder.picture(cell["edited"]), {"category": cell["category"], "editor": cell["target"],
                                                     "method": cell["arm"], "prompt_type": cell["prompt_type"]})


def export_edits(folder, plan):
    """Write edits.jsonl, a list of the edits for `judge export-sheet`; return (its path, the number of edits)."""
    lines, answers = [], folder.answers(plan)
    for case in plan["cases"]:
        for cell in results.cells(folder, plan, case, answers):
            if cell["edited"]:
                prompt = f"{cell['prompt_id']}, seed {cell['seed']}"
                lines.append(json.dumps({
                    "sample_id": sample_of(cell), "image_id": cell["image_id"], "prompt_id": prompt,
                    "arm": cell["arm"], "prompt": cell["prompt"], "original": f"pictures/{cell['original']}.png",
                    "edited": f"pictures/{cell['edited']}.png", "category": cell["category"], "method": cell["arm"],
                    "prompt_type": cell["prompt_type"], "editor": cell["target"]}, ensure_ascii=False) + "\n")
    path = folder.path / "edits.jsonl"
    writing.write(path, "".join(lines), overwrite=True)
    return path, len(lines)
