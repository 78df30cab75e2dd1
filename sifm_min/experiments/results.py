"""The results of a folder, and the steps that are still missing. Nothing is computed here."""

from typing import NamedTuple

from .. import cli
from .plan import (
    attack_key,
    edit_key,
    group_key,
    immunize_key,
    lpips_key,
    metrics_key,
    prompts_of,
    reference_arm,
    shift_key,
    verdict_key,
    work_of,
)
from .store import Folder

# -- missing steps -----------------------------------------------------------------------------------------------------


class Left(NamedTuple):
    """todo: (step, what) -> the number of missing steps. kept: (step, what) -> [seconds] of the steps that are there.
    finished: the number of pictures that are complete, except for a panel's verdicts. what: a method, an attack, or the
    editor of an edit."""

    todo: dict
    kept: dict
    finished: int


def left(folder, plan, cases, *, again=True):
    """The `Left` of these cases; the steps that follow a missing picture are missing too.

    again: True counts failed steps as missing. Otherwise they are over, and so are the steps that would follow them.
    """
    todo, kept, finished, answers = {}, {}, 0, folder.answers(plan)
    for case in cases:
        record = case.record
        if record["sha256"] is None:
            continue
        try:
            rows = folder.rows(record["sha256"])
        except (ValueError, OSError):                        # a damaged journal: the run reports it
            continue
        failed = {key for key, row in rows.items() if "failed" in row}
        rows = {key: row for key, row in rows.items() if key not in failed}
        steps = dict.fromkeys(_steps(plan, record, rows, answers, () if again else failed))
        for step, what, key in steps:
            if key not in rows:
                todo[step, what] = todo.get((step, what), 0) + 1
            elif "seconds" in rows[key]:
                kept.setdefault((step, what), []).append(rows[key]["seconds"])
        by_panel = plan["judge"]["kind"] != "oracle"
        finished += all(key in rows or by_panel and step == "verdict" for step, _, key in steps)
    return Left(todo, kept, finished)


def _steps(plan, case, rows, answers, failed):
    """Yield (step, what, key) of all steps of a picture but the failed ones and those that follow them, some twice.

    Verdicts that a panel has given are left out too.
    """
    def made(step, what, key):
        """The SHA-256 of the picture that a step made, a stand-in if the step is missing, None if it failed."""
        if key in failed:
            return None
        steps.append((step, what, key))
        return rows[key].get("sha256") if key in rows else f"{key} to come"

    def protected(arm):
        sha256 = case["sha256"]
        if arm["method"]:
            sha256 = made("immunize", work_of(arm), immunize_key(plan, case, arm))
        if arm["attack"] and sha256:
            sha256 = made("attack", arm["attack"]["name"], attack_key(plan, arm, sha256))
        return sha256
    for arm in plan["arms"]:
        steps, target = [], arm["target"]
        sha256, clean = protected(arm), protected(reference_arm(arm))
        for seed in plan["seeds"]:
            for prompt in prompts_of(plan, case):
                reference, edited = (picture and made("edit", target, edit_key(plan, arm, picture, prompt, seed))
                                     for picture in (clean, sha256))
                if edited is None or reference is None:
                    continue
                if sha256 != clean:
                    made("metrics", target, metrics_key(plan, edited, reference))
                    if plan["lpips"].get("sha256"):
                        made("lpips", target, lpips_key(plan, edited, reference))
                if not answers.complete(case["sha256"], edited, prompt["instruct"]):
                    made("verdict", target, verdict_key(plan, arm, case, prompt, edited))
        if sha256 and (key := shift_key(plan, case, arm, sha256)):
            made("shift", target, key)
        yield from steps


# -- finished steps ----------------------------------------------------------------------------------------------------

def collect(path):
    """[{"plan", "arms", "cells", "missing", "pictures"}], one per table of the folder: see `plan.group_key`.

    plan: the newest plan of the table. arms: each with the rows of its immunizations. cells: one dict per edit, with the
    results of its steps. missing: the number of planned edits that are neither made nor failed. pictures: id -> category.
    """
    folder, groups = Folder(path), {}
    for plan in folder.plans():
        groups.setdefault(group_key(plan), []).append(plan)
    return [_collected(folder, plans) for plans in groups.values()]


def cells(folder, plan, case, answers):
    """Yield a dict per edit of one picture (the record of a Case) that was made or failed; see `collect`.

    answers: `Folder.answers(plan)`.
    """
    try:
        rows = folder.rows(case["sha256"]) if case["sha256"] else {}
    except (ValueError, OSError):                            # a damaged journal: the run has reported it
        return
    for arm in plan["arms"]:
        immunized = _immunized(plan, case, arm, rows)
        for seed in plan["seeds"]:
            for prompt in prompts_of(plan, case):
                if cell := _cell(plan, case, arm, rows, answers, immunized, prompt, seed):
                    yield cell


def _collected(folder, plans):
    cells, immunized, arms, missing, journals, damaged = {}, {}, {}, set(), {}, {}
    answers = folder.answers(plans[-1])                      # all plans of a table have the same judges
    for plan in plans:
        for case in plan["cases"]:
            sha256 = case["sha256"]
            if sha256 is not None and sha256 not in journals:
                try:
                    journals[sha256] = folder.rows(sha256)
                except (ValueError, OSError) as error:
                    journals[sha256], damaged[sha256] = {}, {"sha256": None, "reason": cli.sentence(error)}
            case = case | damaged.get(sha256, {})
            rows = journals.get(sha256, {})
            for arm in plan["arms"]:
                place = (arm["target"], arm["source"], arm["name"])
                arms.setdefault(place, arm)
                row = _immunized(plan, case, arm, rows)
                if arm["method"] and row and "failed" not in row:
                    measured = rows.get(shift_key(plan, case, arm, row["sha256"])) or {}
                    immunized.setdefault(place, {})[case["id"]] = {**row, "shift": measured.get("shift")}
                for seed in plan["seeds"]:
                    for prompt in prompts_of(plan, case):
                        edit = (*place, case["id"], prompt["id"], seed)
                        cell = _cell(plan, case, arm, rows, answers, row, prompt, seed)
                        if cell is None:
                            missing.add(edit)
                        else:
                            cells[edit] = cell
    return {"plan": plans[-1], "cells": list(cells.values()), "missing": len(missing - cells.keys()),
            "arms": [{**arm, "immunized": immunized.get(place, {})} for place, arm in arms.items()],
            "pictures": {case["id"]: case["category"] for plan in plans for case in plan["cases"]}}


def _immunized(plan, case, arm, rows):
    """The row of the picture that an arm protects, before any attack; None if it is missing."""
    if case["sha256"] is None:
        return {"failed": case.get("reason") or "cannot be read"}
    if arm["method"] is None:
        return {"sha256": case["sha256"]}
    return rows.get(immunize_key(plan, case, arm))


def _cell(plan, case, arm, rows, answers, immunized, prompt, seed):
    """One edit as a dict, None if it is missing."""
    cell = {"target": arm["target"], "source": arm["source"], "arm": arm["name"], "image_id": case["id"],
            "attack": (arm["attack"] or {}).get("name"), "method": arm["method"], "category": case["category"],
            "prompt_id": prompt["id"], "prompt_type": prompt["type"], "seed": seed,
            "prompt": prompt["instruct"], "metrics": {}, "absent": {}, "damage": None, "judges": None, "failed": None,
            "original": case["sha256"], "immunized": None, "edited_original": None, "edited": None, "verdict": None}
    if immunized is None:
        return None
    if "failed" in immunized:
        return {**cell, "failed": immunized["failed"]}
    sha256, clean = immunized["sha256"], case["sha256"]
    for side in (sha256, clean) if (arm["attack"] or {}).get("moves") else (sha256,) if arm["attack"] else ():
        row = rows.get(attack_key(plan, arm, side))
        if row is None or "failed" in row:
            return {**cell, "failed": row["failed"]} if row else None
        cell["damage"] = float(row["psnr"])
        sha256, clean = (row["sha256"] if picture == side else picture for picture in (sha256, clean))
    row = rows.get(edit_key(plan, arm, sha256, prompt, seed))
    reference = rows.get(edit_key(plan, arm, clean, prompt, seed))
    for edit in (row, reference):
        if edit is None or "failed" in edit:
            return {**cell, "failed": edit["failed"]} if edit else None
    cell |= {"immunized": sha256, "edited": row["sha256"], "edited_original": reference["sha256"]}
    if sha256 != clean:
        keys = [metrics_key(plan, row["sha256"], reference["sha256"])]
        if plan["lpips"].get("sha256"):
            keys.append(lpips_key(plan, row["sha256"], reference["sha256"]))
        for measured in filter(None, map(rows.get, keys)):
            if "failed" in measured:
                return {**cell, "failed": measured["failed"]}
            cell["metrics"] |= {key: None if value is None else float(value) for key, value in measured["values"].items()}
            cell["absent"] |= measured["absent"]
    cell["verdict"] = verdict_key(plan, arm, case, prompt, row["sha256"])
    said = answers.findings(case["sha256"], row["sha256"], prompt["instruct"])
    verdict = {"judges": said} if said else rows.get(cell["verdict"]) or {"judges": None}
    return {**cell, "failed": verdict["failed"]} if "failed" in verdict else {**cell, "judges": verdict["judges"]}
