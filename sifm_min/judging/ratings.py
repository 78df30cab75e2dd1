"""People as judges: a blind rating sheet to hand out, and the ratings that come back as records.

    export(samples, "study", ["ann", "ben", "cai"], prompt)      # study/sheet is handed out, study/keep is not
    rated = load("study/keep", ["ann.csv", "ben.csv"])           # rated.records go into by_arm and consistency

sheet/ has a page and a table per rater (either may be filled in) and pictures/ under random names. It has no arm, method
or original name. Each rater has an order of their own, and everything random comes from a seed in keep/. The page works
from the folder, without a network. Raters read the same rules as models and rate the same two findings. They also answer
if the edit failed as a whole, because the paper does not say which of the two its study counted.

keep/study_items.csv names each item, with its weight: the samples of its kind per item drawn. Rates of the study can be
weighted by it to the proportions of the list. Attention items are originals shown as their own edits: the change is
missing, and nothing is damaged.
"""

import csv
import io
import json
import math
import random
import re
import secrets
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from ..files import writing
from ..files.digests import picture_sha256
from .edits import EditFile
from .panels import FINDINGS, HERE
from .records import Record

RATINGS = ("item_id", "rater_id", "semantic_mismatch", "perceptual_degradation", "immunization_success", "seconds",
           "rated_at_utc", "instructions_version", "comment")
SHOWN = ("edit_prompt", "original_file", "edited_file")      # in a rater's table beside RATINGS
ITEMS = ("item_id", "arm", "method", "editor", "prompt_type", "category", "sample_id", "image_id", "prompt_id", "edit_prompt",
         "original_file", "edited_file", "original_sha256", "edited_sha256", "stratum", "weight", "is_attention")
KINDS = ("arm", "method", "editor", "prompt_type", "category")
ATTENTION = (True, False)                                    # the right answer to an attention item


# -------------------------------------------------------------------------------------------------------------- export

def export(samples, folder, raters, prompt, *, items=150, attention=10, seed=None, overwrite=False):
    """Draw a study from a list of EditFiles and write it. Returns keep/study.json as a dict; raises ValueError, OSError."""
    from .. import images
    if wrong := [name for name in raters if not re.fullmatch(r"[\w-][\w.-]{0,39}", name)]:
        raise ValueError(f"rater {wrong[0]!r}: a pseudonym has letters, digits, - and _, at most 40")
    if len({name.casefold() for name in raters}) < len(raters):
        raise ValueError("two raters have the same name; give each a pseudonym of their own")
    folder = Path(folder)
    if (folder / "keep" / "study.json").exists() and not overwrite:
        raise FileExistsError(f"{folder} has a study; --overwrite replaces it")
    seed = secrets.randbelow(2**63) if seed is None else seed
    rng, taken = random.Random(seed), set()

    def new_name():
        name = f"{rng.getrandbits(40):010x}"
        return new_name() if name in taken else taken.add(name) or name

    study = {"study": f"{rng.getrandbits(64):016x}", "date": datetime.now(timezone.utc).date().isoformat(), "seed": seed,
             "raters": list(raters), "prompt": prompt.id, "prompt_sha256": prompt.sha256}
    drawn = [(sample, sample.edited, stratum, weight, False) for sample, stratum, weight in draw(samples, items, rng)]
    unchanged = rng.sample(samples, min(attention, len(samples)))
    drawn += [(sample, sample.original, "attention", 1.0, True) for sample in unchanged]
    rng.shuffle(drawn)                                       # so that the order of the files gives nothing away
    rows = []
    for part in ("sheet/pictures", "keep"):
        writing.make_folder(folder / part)
    for sample, edited, stratum, weight, is_attention in drawn:
        row = {"item_id": new_name(), **{name: sample.details.get(name, "") for name in KINDS}, "arm": sample.arm,
               "sample_id": sample.sample_id, "image_id": sample.image_id, "prompt_id": sample.prompt_id,
               "edit_prompt": sample.prompt, "stratum": stratum, "weight": f"{weight:.6g}", "is_attention": int(is_attention)}
        if is_attention:
            row |= {"arm": "attention", "method": ""}
        for which, path in (("original", sample.original), ("edited", edited)):
            image = images.read(path).image
            row |= {f"{which}_file": f"pictures/{new_name()}.png", f"{which}_sha256": picture_sha256(image)}
            images.write_picture(folder / "sheet" / row[f"{which}_file"], image, overwrite=overwrite)
        rows.append(row)
    template = (HERE / "pages" / "rating.html").read_text(encoding="utf-8")
    for rater in raters:
        order = rng.sample(rows, len(rows))
        blank = [{**row, "rater_id": rater, "instructions_version": prompt.id} for row in order]
        shown = {"study": study["study"], "rater": rater, "prompt": prompt.id, "rules": prompt.rules, "columns": RATINGS,
                 "items": [{name: row[name] for name in ("item_id", *SHOWN)} for row in order]}
        page = template.replace("{{STUDY}}", json.dumps(shown).replace("<", "\\u003c"))
        table = _table((*RATINGS[:2], *SHOWN, *RATINGS[2:]), blank)
        writing.write(folder / "sheet" / f"{rater}.html", page, overwrite=overwrite)
        writing.write(folder / "sheet" / f"{rater}.csv", table, overwrite=overwrite)
    study |= {"items": len(rows) - len(unchanged), "attention": len(unchanged), "samples": len(samples)}
    writing.write(folder / "keep" / "study_items.csv", _table(ITEMS, rows), overwrite=overwrite)
    writing.write(folder / "keep" / "study.json", json.dumps(study, indent=1), overwrite=overwrite)
    return study


def draw(samples, items, rng):
    """Draw `items` samples, at least one of each kind (KINDS), else in proportion: [(sample, stratum, weight)].

    The rest after one of each goes by largest remainder. Within a kind each sample has the same chance.
    """
    kinds = {}
    for sample in samples:
        values = [sample.arm if name == "arm" else str(sample.details.get(name, "")) for name in KINDS]
        kinds.setdefault("|".join(values), []).append(sample)
    items = min(items, len(samples))
    if items < len(kinds):
        raise ValueError(f"{items} items are fewer than the {len(kinds)} kinds of samples (arm, method, editor, "
                         "prompt type, category); raise --items")
    exact = {kind: items * len(group) / len(samples) for kind, group in kinds.items()}
    many = {kind: max(1, math.floor(share)) for kind, share in exact.items()}
    for kind in sorted(kinds, key=lambda k: (many[k] - exact[k], k)) * items:
        if sum(many.values()) >= items:
            break
        many[kind] += many[kind] < len(kinds[kind])
    for kind in sorted(kinds, key=lambda k: (exact[k] - many[k], k)) * items:        # more kinds below 1 than remainders
        if sum(many.values()) <= items:
            break
        many[kind] -= many[kind] > 1
    return [(sample, kind, len(group) / many[kind])
            for kind, group in kinds.items() for sample in rng.sample(group, many[kind])]


# -------------------------------------------------------------------------------------------------------------- import

@dataclass(frozen=True)
class Ratings:
    """The ratings of a study. raters: rater -> counts; csv: all rows in one table, in the order of the study."""

    records: list
    samples: list
    raters: dict
    csv: str
    study: dict


def load(keep, files):
    """The Ratings of a study from its raters' files; raises ValueError."""
    keep = Path(keep)
    try:
        study = json.loads((keep / "study.json").read_text(encoding="utf-8"))
        known = {row["item_id"]: row for row in _rows(keep / "study_items.csv", ITEMS, ITEMS)}
        prompt, planned = study["prompt"], study["raters"]
    except (OSError, KeyError, TypeError, json.JSONDecodeError):
        raise ValueError(f"{keep}: is not the folder keep/ of a study") from None
    answers = {}
    for path in files:
        for number, row in enumerate(_rows(path, RATINGS[:4], (*RATINGS, *SHOWN)), 2):
            place, item, rater = f"{path}, row {number}", row["item_id"], row["rater_id"]
            if item not in known:
                raise ValueError(f"{place}: item {item!r} is not of this study")
            if rater not in planned:
                raise ValueError(f"{place}: rater {rater!r} is not of this study; there are {', '.join(planned)}")
            if (rater, item) in answers:
                raise ValueError(f"{place}: rater {rater!r} has rated item {item!r} before, in {answers[rater, item]['place']}")
            if row.get("instructions_version") not in (None, "", prompt):
                raise ValueError(f"{place}: was rated by the rules {row['instructions_version']!r}, the study's are {prompt!r}")
            for name in RATINGS[2:5]:
                value = (row.get(name) or "").strip()
                if value not in ("", "0", "1"):
                    raise ValueError(f"{place}: {name} is {value!r}; write 1 for yes, 0 for no, or nothing")
                row[name] = None if value == "" else value == "1"
            if row.get("seconds") and not re.fullmatch(r"\d+([.,]\d+)?", row["seconds"].strip()):
                raise ValueError(f"{place}: seconds is {row['seconds']!r}, no number")
            answers[rater, item] = {**row, "place": place}
    if not answers:
        raise ValueError("no row was rated")
    items = [row for row in known.values() if row["is_attention"] == "0"]
    samples = [EditFile(row["sample_id"], row["image_id"], row["prompt_id"], row["arm"], row["edit_prompt"],
                      Path(row["original_file"]), Path(row["edited_file"]),
                      {name: row[name] for name in KINDS[1:] if row[name]}) for row in items]
    records, raters, nothing = [], {}, dict.fromkeys(RATINGS)
    for rater in dict.fromkeys(rater for rater, _ in answers):
        for row in items:
            findings = [answers.get((rater, row["item_id"]), nothing)[name] for name in FINDINGS]
            names = [row[name] for name in ("sample_id", "image_id", "prompt_id", "arm")]
            records.append(Record(*names, rater, *findings, "not_rated" if findings == [None, None] else "ok"))
        raters[rater] = _counts(rater, known, answers)
    rows = [{**answers[rater, item], **{name: _mark(answers[rater, item][name]) for name in RATINGS[2:5]}}
            for rater in raters for item in known if (rater, item) in answers]
    return Ratings(records, samples, raters, _table(RATINGS, rows), study)


def _counts(rater, known, answers):
    """The counts of a rater: items rated, attention items right, and overall answers that differ from the findings."""
    mine = {item: row for (name, item), row in answers.items() if name == rater}
    findings = {item: tuple(row[name] for name in FINDINGS) for item, row in mine.items()}
    attention = [item for item, row in known.items() if row["is_attention"] == "1"]
    rated = [item for item in known if item not in attention and None not in findings.get(item, (None,))]
    differs = sum(mine[item]["immunization_success"] is not None
                  and mine[item]["immunization_success"] != any(findings[item]) for item in rated)
    return {"items": len(known) - len(attention), "rated": len(rated), "attention": len(attention),
            "attention_right": sum(findings.get(item) == ATTENTION for item in attention), "overall_differs": differs}


def _mark(finding):
    return "" if finding is None else str(int(finding))


# -------------------------------------------------------------------------------------------------------------- tables

def _table(columns, rows):
    """Rows as CSV (RFC 4180, LF). A text that a spreadsheet takes for a formula gets an apostrophe; `_rows` removes it."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        texts = ["" if row.get(name) is None else str(row[name]) for name in columns]
        writer.writerow([f"'{text}" if text[:1] in tuple("=+-@\t\r'") else text for text in texts])
    return file.getvalue()


def _rows(path, needed, allowed):
    """The rows of a CSV as dicts of texts; raises ValueError."""
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
        lines = list(csv.reader(io.StringIO(text, newline=""), strict=True))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror[:1].lower()}{error.strerror[1:]}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: is no CSV in UTF-8 ({error})") from None
    head = [name.strip() for name in lines[0]] if lines else []
    if extra := [name for name in head if name not in allowed]:
        advice = "; separate the columns by commas" if ";" in extra[0] or "\t" in extra[0] else ""
        raise ValueError(f"{path}: has the column {extra[0]!r}, which is none of {', '.join(allowed)}{advice}")
    if missing := [name for name in needed if name not in head]:
        raise ValueError(f"{path}: has no column {missing[0]}")
    if len(set(head)) < len(head):
        raise ValueError(f"{path}: has a column twice")
    rows = []
    for number, line in enumerate(lines[1:], 2):
        if not any(line):
            continue
        if len(line) != len(head):
            raise ValueError(f"{path}, row {number}: has {len(line)} fields, and there are {len(head)} columns")
        rows.append({name: value[1:] if value[:1] == "'" else value for name, value in zip(head, line, strict=True)})
    return rows
