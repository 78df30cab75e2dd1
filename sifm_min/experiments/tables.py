"""The tables of a folder of results in the paper's layout, with the paper's own figures beside.

`tables(group)` takes one group of `results.collect`, a dict of plan, arms and cells. `formats.py` prints the tables.
"""

import json
import math
import statistics
from dataclasses import dataclass

from ..judging.agreement import consistency
from . import comparison, findings, gains
from .figures import (
    DISTANCES,
    NAMES,
    PROMPTS,
    cost_of,
    figures,
    interval_text,
    judges_in,
    name_of,
    paper,
    records,
    sample_of,
    worst,
)

# The paper's table with the figures of an editor. A miniature has that of its kind beside it.
WHITE_BOX = {"sd3": "II", "instruct-pix2pix": "III", "hq-edit": "IV"}
BY_KIND = {"img2img": "II", "instruct": "III"}
GROUPS = {"people": "Human to human", "models": "Judge to judge", "people to models": "Human to judge"}       # of Table I


@dataclass(frozen=True)
class Table:
    """columns: (heading above, heading). rows: lists of texts. notes: lines below. data: a dict a row at full precision."""

    title: str
    columns: list
    rows: list
    notes: list
    data: list

    def record(self):
        return {"title": self.title, "notes": self.notes, "rows": self.data}


def tables(group, people=()):
    """The Tables of one group: for each editor (each direction of transfer) the paper's table and those behind it.

    people: Records of people who judged the same edits, for Table I.
    """
    made = []
    plan, suite = group["plan"], group["plan"]["suite"]
    for target in dict.fromkeys(arm["target"] for arm in group["arms"]):
        arms = [arm for arm in group["arms"] if arm["target"] == target]
        cells = [cell for cell in group["cells"] if cell["target"] == target]
        judges = judges_in(cells)
        names = [arm["name"] for arm in arms]
        source = next((arm["source"] for arm in arms if arm["source"] != target and "sources" not in arm), None)
        by_arm = figures(cells, judges, names)
        arms = [arm for arm in arms if any((arm["name"], prompts) in by_arm for prompts in PROMPTS)]
        if not arms:
            continue
        if suite in ("white-box", "transfer"):               # the controls, then the paper's order
            labels = {name: place for place, name in enumerate(paper()["labels"])}
            arms.sort(key=lambda arm: -1 if arm["name"] in NAMES else labels.get(arm["name"].partition(" (")[0], 0))
        title, beside = _title(suite, target, source), _beside(suite, target, source, plan)
        notes = [*_provenance(group, target, cells, judges), *beside.notes]
        if suite == "consistency":
            made.append(_agreement(title, cells, judges, people, notes))
            continue
        paired = comparison.against_sifm(cells, judges, names)
        if suite == "robustness":
            made.append(_robustness(title, arms, cells, by_arm, notes))
            made.append(_main(f"{title}: distances", arms, by_arm, paired, beside, [
                "Distances of edits from those of the clean picture; where the attack moves the picture, of the clean one "
                "moved in the same way."]))
        else:
            made.append(_main(title, arms, by_arm, paired, beside, notes))
            made.append(_behind(f"{title}: what stands behind the ISR", arms, by_arm, judges))
        if beyond := findings.beyond_noise(cells, judges, [arm["name"] for arm in arms]):
            made.append(findings.table(Table, f"{title}: beyond noise, by finding", beyond))
        if gained := gains.gains(cells, judges, arms, by_arm):
            made.append(gains.table(Table, f"{title}: what each gains", gained))
        if any(pair.result for pair in paired.values()):
            made.append(_paired(f"{title}: each method against SIFM, paired", arms, paired))
    return made


def _title(suite, target, source):
    return {"white-box": f"White box: {target}", "transfer": f"Transfer: {source} → {target}",
            "ablation": f"The two terms of SIFM: {target}", "lambda": f"The weight of the distance term: {target}",
            "robustness": f"Robustness: {target}", "unseen": f"Unseen prompts: {target}",
            "consistency": f"Agreement of judges: {target}"}.get(suite, f"{suite}: {target}")


# -- the paper's rows and the notes ----------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Beside:
    """The paper's rows for a table: arm -> {prompt type: figures}. order: its distances. notes: how to read them."""

    rows: dict
    order: tuple
    notes: list


def _beside(suite, target, source, plan):
    known, kinds = paper()["tables"], {name: about["kind"] for name, about in plan["editors"].items()}
    care = ("The paper's rows are of photographs and paintings, published editors and Gemini as judge; rates of other judges "
            "and editors are not comparable with them in absolute terms.")
    if suite == "white-box":
        number = WHITE_BOX.get(target) or BY_KIND[kinds[target]]
        rows = {row["method"]: row for row in known[number]["rows"]}
        which = f"Table {number}, {known[number]['editor']}"
    elif suite == "transfer":
        if kinds[source] == kinds[target]:
            return Beside({}, tuple(DISTANCES), [])
        direction = ("instruct-pix2pix to sd3", "sd3 to instruct-pix2pix")[kinds[source] == "img2img"]
        number, which = "V", f"Table V, {direction}"
        rows = {row["method"]: {"original": row[direction]} for row in known["V"]["rows"]}
    elif suite == "ablation":
        number, which = "VI", "Table VI, sd3"
        rows = {row["arm"]: row for row in known["VI"]["rows"]}
    elif suite == "lambda":
        number, which = "VII", "Table VII, sd3"
        rows = {f"lambda {row['lam']:g}": row for row in known["VII"]["rows"]}
    else:
        return Beside({}, tuple(DISTANCES), [])
    order = tuple(metric for metric in known[number]["metrics"] if metric != "isr")
    return Beside(rows, order, [f"Rows of the paper: {paper()['source'].split(',')[0]}, {which}. {care}"])


def _provenance(group, target, cells, judges):
    """The notes with judge, editor, weights, pictures and settings of a table."""
    plan = group["plan"]
    about = plan["editors"][target]
    hashes = about["identity"]["weights"]
    weights = ", ".join(f"{file} {digest[:12]}" for file, digest in hashes.items()) or "not from files"
    pictures = {cell["image_id"] for cell in cells}
    counts = {}
    for image, category in group["pictures"].items():
        if image in pictures:
            counts[category] = counts.get(category, 0) + 1
    eps = plan["eps"]
    by_settings = {}
    for arm in group["arms"]:
        if arm["settings"]:
            by_settings.setdefault(json.dumps(arm["settings"], sort_keys=True), []).append(
                name_of(arm["name"].partition(", ")[0]))
    settings = "; ".join(f"{', '.join(dict.fromkeys(names))}: {_spelled(json.loads(text))}"
                         for text, names in by_settings.items())
    judge = plan["judge"]
    who = "the miniature's two judges" if judge["kind"] == "oracle" else f"panel {judge['id']} ({judge['date']})"
    foreign = {"instruct": {"strength"}, "img2img": {"image_guidance"}}[about["kind"]]        # not options of this editor
    foreign |= set() if about["identity"]["scheduler"].startswith("FlowMatch") else {"text_length"}
    defaults = {key: value for key, value in {**about["identity"]["defaults"], **plan["edit"]}.items() if key not in foreign}
    vae = f" (VAE {about['identity']['vae_dtype']})" if "vae_dtype" in about["identity"] else ""
    notes = [
        f"Judged by {who}: {', '.join(judges) or 'nobody yet'}; a success is what all of them call one.",
        f"Editor {target} ({about['identity']['scheduler']}, {about['identity']['dtype']}{vae}; "
        f"{_spelled(defaults)}); weights by SHA-256: {weights}.",
        f"Pictures: {len(pictures)} ({', '.join(f'{n} {category}' for category, n in counts.items())}); budget {eps:.4g} = "
        f"{math.floor(255 * eps + 1e-9)}/255 on the 8-bit picture; seed {plan['seed']} of the perturbation, "
        f"{', '.join(map(str, sorted({cell['seed'] for cell in cells})))} of the edits; sifm_min {plan['version']}.",
    ]
    if settings:
        notes.append(f"Settings: {settings}.")
    if about["notice"]:
        notes.append(about["notice"])
    if "reason" in plan["lpips"]:
        notes.append(f"LPIPS is absent: {plan['lpips']['reason']}.")
    for reason in dict.fromkeys(f"{metric} is absent: {why}" for cell in cells for metric, why in cell["absent"].items()):
        notes.append(f"{reason}.")
    if failed := [cell for cell in cells if cell["failed"]]:
        notes.append(f"{len(failed)} edits failed: " + "; ".join(dict.fromkeys(cell["failed"] for cell in failed)) + ".")
    return notes


def _spelled(settings):
    return ", ".join(f"{key.replace('_', ' ')} {value:.4g}" if isinstance(value, float) else f"{key.replace('_', ' ')} {value}"
                     for key, value in settings.items())


# -- distances and ISR -----------------------------------------------------------------------------------------------------

def _main(title, arms, by_arm, paired, beside, notes):
    """The table in the paper's layout. Distances are of edited immunized pictures from edited originals of the same seed."""
    types = [prompts for prompts in PROMPTS if any((arm["name"], prompts) in by_arm for arm in arms)]
    headings = [*(f"{DISTANCES[metric][0]} {DISTANCES[metric][1]}" for metric in beside.order), "ISR ↑", "p vs SIFM"]
    columns = [("", "Method")] + [(PROMPTS[prompts], heading) for prompts in types for heading in headings]
    rows, data = [], []
    for arm in arms:
        label = name_of(arm["name"])
        row = [label]
        for prompts in types:
            own, pair = by_arm.get((arm["name"], prompts)), paired.get((arm["name"], prompts))
            row += [_number(own and own.means[m], DISTANCES[m][2]) for m in beside.order]
            row += [_rate(own), pair.text if pair else "-"]
            if own:
                data.append(_data(title, arm, prompts, own, pair))
        rows.append(row)
        if theirs := beside.rows.get(arm["name"]):
            row = [f"{label}, paper"]
            for prompts in types:
                their = theirs.get(prompts, {})
                row += [_number(their.get(m), DISTANCES[m][2]) for m in beside.order]
                row += [f"{100 * their['isr']:.0f}%" if their else "-", "-"]
                if their:
                    data.append({"table": title, "method": arm["name"], "who": "paper", "prompts": prompts, **their})
            rows.append(row)
    if undefined := sorted({metric for own in by_arm.values() for metric in own.left_out}):
        notes = [*notes, f"Infinite or undefined values are left out of the means of {', '.join(undefined)}."]
    return Table(title, columns, rows, [*notes, *(comparison.NOTES if paired else ())], data)


def _data(title, arm, prompts, own, pair):
    record = {"table": title, "method": arm["name"], "who": "ours", "prompts": prompts, "source": arm["source"],
              "target": arm["target"], "edits": own.cells, "failed": own.failed, **own.means}
    if rate := own.rate:
        record |= {"isr": rate.isr.value, "isr_low": rate.isr.low, "isr_high": rate.isr.high, "judged": rate.complete,
                   "successes": rate.successes, "obeyed": rate.obeyed, "splits": rate.splits, "isr_least": rate.lowest,
                   "isr_most": rate.highest}
    if controlled := own.controlled:
        for key in ("control", "added", "attributable", "beyond_noise"):
            if estimate := getattr(controlled, key):
                record |= {key: estimate.value, f"{key}_low": estimate.low, f"{key}_high": estimate.high}
        record |= {"working": controlled.ok.complete, "isr_of_working": controlled.ok.isr.value,
                   "isr_of_working_low": controlled.ok.isr.low, "isr_of_working_high": controlled.ok.isr.high}
    return record | (pair.record() if pair else {}) | cost_of(arm)


def _paired(title, arms, paired):
    """The comparisons behind the column "p vs SIFM"."""
    columns = [("", "Method"), ("", "Prompts"), ("", "pictures"), ("", "pairs"), ("Thwarted", "method alone"),
               ("Thwarted", "SIFM alone"), ("", "ISR minus SIFM's"), ("", "p, alone"), ("", "p, corrected"), ("", "Test")]
    rows = []
    for arm in arms:
        for prompts in PROMPTS:
            pair = paired.get((arm["name"], prompts))
            if pair and (r := pair.result):
                counts = (pair.images, r.pairs, r.only_first, r.only_second)
                rows.append([name_of(arm["name"]), prompts, *map(str, counts), interval_text(r.difference),
                             "-" if pair.note else f"{r.p:.3g}", pair.text, r.test])
    family = max(pair.comparisons for pair in paired.values())
    return Table(title, columns, rows, [
        "The notes on the column \"p vs SIFM\" say how p is computed. Corrected: by Holm's method, over the "
        f"{family} comparisons of this table that have a p."], [])


# -- agreement of judges ---------------------------------------------------------------------------------------------------

def _agreement(title, cells, judges, people, notes):
    """The paper's Table I: the share of edits on which two judges agree."""
    labels = ("semantic_mismatch", "perceptual_degradation", "success")
    own = list(records(cells, judges))
    known = {(cell["arm"], sample_of(cell)) for cell in cells}
    people = [record for record in people if (record.arm, record.sample_id) in known]     # not those of other edits
    raters = list(dict.fromkeys(record.judge for record in people))
    agreement = consistency([*own, *people], people=raters, models=judges) if len(judges) > 1 or raters else {}
    theirs = {row["who"]: row for row in paper()["tables"]["I"]["rows"]}
    rows, data = [], []
    for who, label in GROUPS.items():
        by_label = {name: agreement.get(name, {}).get(who) for name in labels}
        if any(by_label.values()):
            rows.append([label, *(interval_text(a.observed) if a else "-" for a in by_label.values()),
                         *_kappa(by_label["success"])])
            data.append({"table": title, "method": who, "who": "ours",
                         **{name: a and a.observed.value for name, a in by_label.items()}})
        rows.append([f"{label}, paper", *(f"{100 * theirs[who][name]:.0f}%" for name in labels), "-", "-", "-"])
        data.append({"table": title, "method": who, "who": "paper", **{name: theirs[who][name] for name in labels}})
    columns = [("", "Agreement"), ("", "Semantic mismatch"), ("", "Perceptual degradation"), ("", "Final success (ISR)"),
               ("Of success", "Cohen"), ("Of success", "AC1"), ("Of success", "n")]
    notes = [*notes, "Rows of the paper: 150 samples, three people, Gemini 2.5 Pro and Flash."]
    if raters:
        rated = {(record.arm, record.sample_id) for record in people}
        notes.append(f"People: {', '.join(raters)}, {len(rated)} of {len(known)} edits; all rows are of these.")
    else:
        notes.append("People: `judge export-sheet` makes sheets from edits.jsonl in the folder, `judge import-ratings` reads "
                     "them, and `evaluate table DIR --people RATINGS` puts them here.")
    return Table(title, columns, rows, notes, data)


def _kappa(agreement):
    if not agreement:
        return ["-"] * 3
    values = (agreement.cohen, agreement.ac1)
    return [*("-" if e is None or e.value is None else f"{e.value:.2f}" for e in values), str(agreement.items)]


# -- robustness ------------------------------------------------------------------------------------------------------------

def _robustness(title, arms, cells, by_arm, notes):
    """ISR after each attack, and after the attack that is best for the attacker, picture by picture."""
    plain = [arm["name"] for arm in arms if not arm["attack"]]
    attacks = list(dict.fromkeys(arm["attack"]["name"] for arm in arms if arm["attack"]))
    columns = [("", "Attack"), ("", "PSNR of the picture"), *(("ISR", name_of(name)) for name in plain)]
    rows, data = [], []
    for attack in (None, *attacks):
        damage = [cell["damage"] for cell in cells if cell["attack"] == attack and not cell["method"] and cell["damage"]]
        row = [attack or "none", _number(statistics.fmean(damage) if damage else None, 1)]
        for name in plain:
            own = by_arm.get((f"{name}, {attack}" if attack else name, "original"))
            row.append(_rate(own))
            if own and own.rate:
                data.append(_attack_data(title, name, attack or "none", own.rate.isr))
        rows.append(row)
    row = ["worst for each picture", "-"]
    for name in plain:
        estimate = worst([cell for cell in cells if cell["arm"].partition(", ")[0] == name])
        row.append(interval_text(estimate))
        if estimate:
            data.append(_attack_data(title, name, "worst", estimate))
    return Table(title, columns, [*rows, row], [*notes, "worst: a picture counts as protected only if its edit is thwarted "
                                                "without an attack and after every one. PSNR: of the clean picture after the "
                                                "attack, to the clean picture."], data)


def _attack_data(title, name, attack, estimate):
    return {"table": title, "method": name, "attack": attack, "isr": estimate.value, "isr_low": estimate.low,
            "isr_high": estimate.high}


# -- the figures behind the ISR --------------------------------------------------------------------------------------------

def _behind(title, arms, by_arm, judges):
    """Per arm and type of prompts: counts, bounds, controlled rates, each judge alone, and the cost."""
    columns = [("", "Method"), ("", "Prompts"), ("", "n"), ("Judged", "thwarted"), ("Judged", "obeyed"), ("Judged", "split"),
               ("Judged", "bounds"), ("Beside the clean edits", "control"), ("Beside the clean edits", "added"),
               ("Beside the clean edits", "attributable"), ("Beside the clean edits", "of edits that work"),
               ("Beside noise", "beyond"), *(("Judge alone", judge) for judge in judges),
               ("A picture", "seconds"), ("A picture", "encoder"), ("A picture", "denoiser"), ("A picture", "gradients"),
               ("A picture", "steps of 1/255"),
               ("A picture", "PSNR"), ("A picture", "shift")]
    rows = []
    for arm in arms:
        spent = cost_of(arm)
        for prompts in PROMPTS:
            own = by_arm.get((arm["name"], prompts))
            if not own or not own.rate:
                continue
            rate, controlled = own.rate, own.controlled
            row = [name_of(arm["name"]), prompts,
                   f"{rate.complete}" + (f" of {rate.samples}" if rate.complete < rate.samples else ""),
                   str(rate.successes), str(rate.obeyed), str(rate.splits),
                   f"{100 * rate.lowest:.0f} to {100 * rate.highest:.0f}%"]
            row += [interval_text(controlled.control), interval_text(controlled.added), interval_text(controlled.attributable),
                    f"{interval_text(controlled.ok.isr)} (n = {controlled.ok.complete})",
                    interval_text(controlled.beyond_noise)] if controlled else ["-"] * 5
            row += [_share(own.by_judge.get(judge)) for judge in judges]
            row += [_number(spent.get("seconds"), 1), *(_passes(spent, part) for part in ("encoder", "denoiser")),
                    _number(spent.get("gradients"), 0), _number(spent.get("linf_255"), 0),
                    _number(spent.get("psnr_of_picture"), 1), _number(spent.get("shift"), 2)]
            rows.append(row)
    notes = ["thwarted: every judge says so; obeyed: none does; split: they disagree. bounds: the rate if every edit without "
             "a verdict were a failure, or a success.",
             "added: thwarted edits beyond those that fail on the clean picture. attributable: (ISR - control) / (1 - "
             "control). of edits that work: among edits whose clean edit was obeyed. beyond: the ISR above random noise of "
             "the same budget. Intervals are at 95 %: Wilson's where a picture stands once, else a bootstrap over pictures.",
             "seconds: median of one immunization. encoder, denoiser: forward and backward passes of one immunization; "
             "gradients: the evaluations of its loss with a gradient. "
             "steps, PSNR: of the immunized picture. shift: of the editor's latents by the perturbation, the root mean square "
             "over the standard deviation of the original's; the mean over pictures."]
    return Table(title, columns, rows, notes, [])


def _passes(spent, part):
    if f"{part}_forward" not in spent:
        return "-"
    return f"{spent[f'{part}_forward']:g} + {spent[f'{part}_backward']:g}"


def _number(value, digits):
    return "-" if value is None else f"{value:.{digits}f}"


def _rate(own):
    return interval_text(own.rate.isr) if own and own.rate else "-"


def _share(counts):
    return "-" if not counts or not counts.judged else f"{100 * counts.successes / counts.judged:.0f}%"
