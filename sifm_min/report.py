"""The tables of a folder of results, in the paper's layout: Markdown, CSV and LaTeX, with the paper's own figures beside.

`tables(group)` takes what `protocol.collect` found, a dict of plan, arms and cells, and computes every figure anew: means
of the distances, ISR with its interval (isr.py), and what must stand beside it. Nothing here knows how cells are made.
"""

import csv
import dataclasses
import io
import json
import math
import statistics
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from . import isr

DISTANCES = {"psnr": ("PSNR", "↓", 2), "ssim": ("SSIM", "↓", 4), "vifp": ("VIFp", "↓", 4), "fsim": ("FSIM", "↓", 4),
             "lpips": ("LPIPS", "↑", 4)}
PROMPTS = {"original": "Original prompt", "unseen": "Unseen prompts"}
NAMES = {"control": "clean (control)", "noise": "noise (control)"}
# Which of the paper's tables has an editor's figures; the miniatures stand beside those of their kind, to be read with care.
WHITE_BOX = {"sd3": "II", "instruct-pix2pix": "III", "hq-edit": "IV"}
BY_KIND = {"img2img": "II", "instruct": "III"}


@lru_cache(maxsize=1)
def paper():
    """The paper's figures: see paper/tables.json."""
    return json.loads((Path(__file__).parent / "paper" / "tables.json").read_text(encoding="utf-8"))


# -- figures ---------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Figures:
    """What is said of one arm on one kind of prompts. rate, controlled: of isr.py, None where nothing is judged.

    cells: edits that were made or failed. means, left_out: distance -> mean of the finite values, and how many are not.
    """

    cells: int
    failed: int
    means: dict
    left_out: dict
    rate: object = None
    controlled: object = None
    by_judge: dict = field(default_factory=dict)

    def record(self):
        return dataclasses.asdict(self)


def records(cells, judges):
    """isr.Records of cells; a cell that failed has records too, without findings: every planned answer counts."""
    for cell in cells:
        prompt = f"{cell['prompt_id']}, seed {cell['seed']}"
        for judge in judges:
            without = [None, None, "failed" if cell["failed"] else "not_judged"]
            yield isr.Record(sample_of(cell), cell["image_id"], prompt, cell["arm"], judge,
                             *(cell["judges"] or {}).get(judge, without))


def sample_of(cell):
    """What an edit is called where people judge it: by its pixels, too, so that nobody's word is taken for another's edit."""
    return f"{cell['image_id']}, {cell['prompt_id']}, seed {cell['seed']}, {(cell['edited'] or 'not made')[:12]}"


def judges_of(cells):
    return list(dict.fromkeys(judge for cell in cells for judge in cell["judges"] or {}))


def figures(cells, judges, arms):
    """{(arm, prompt type): Figures} of the cells of one editor; `arms` in order, those without cells left out."""
    found = {}
    for kind in dict.fromkeys(cell["prompt_type"] for cell in cells):
        of_kind = [cell for cell in cells if cell["prompt_type"] == kind]
        judged = isr.by_arm(records(of_kind, judges)) if judges else {}
        for arm in arms:
            own = [cell for cell in of_kind if cell["arm"] == arm]
            if not own:
                continue
            means, left_out = {}, {}
            for distance in DISTANCES:
                values = [cell["metrics"][distance] for cell in own if cell["metrics"].get(distance) is not None]
                finite = [value for value in values if math.isfinite(value)]
                means[distance] = statistics.fmean(finite) if finite else None
                if len(finite) < len(values):
                    left_out[distance] = len(values) - len(finite)
            more = {}
            if judges:
                more = {"rate": isr.success_rate(judged, arm), "by_judge": isr.by_judge(judged, arm),
                        "controlled": _controlled(judged, arm)}
            found[arm, kind] = Figures(len(own), sum(cell["failed"] is not None for cell in own), means, left_out, **more)
    return found


def _controlled(judged, arm):
    """Beside the controls that were edited as the arm was: where an attack came first, after the same attack."""
    after = "".join(arm.partition(", ")[1:])
    control, noise = f"control{after}", f"noise{after}"
    if arm == control or control not in judged:
        return None
    try:
        return isr.controlled(judged, arm, control, noise=noise if noise in judged and arm != noise else None)
    except ValueError:                                       # no pair that every judge decided
        return None


# -- tables ----------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Table:
    """columns: (heading above, heading); rows: texts, as many as columns; data: a dict a row, full precision, for CSV."""

    title: str
    columns: list
    rows: list
    notes: list
    data: list

    def record(self):
        return {"title": self.title, "notes": self.notes, "rows": self.data}


def tables(group, people=()):
    """The Tables of one group: per editor (of transfer, per direction) the paper's, and what stands behind its rates.

    people: isr.Records of people who judged the same edits, for Table I.
    """
    found = []
    asked, suite = group["plan"], group["plan"]["suite"]
    for target in dict.fromkeys(arm["target"] for arm in group["arms"]):
        arms = [arm for arm in group["arms"] if arm["target"] == target]
        cells = [cell for cell in group["cells"] if cell["target"] == target]
        judges = judges_of(cells)
        order = [arm["name"] for arm in arms]
        source = next((arm["source"] for arm in arms if arm["source"] != target), None)
        said = figures(cells, judges, order)
        arms = [arm for arm in arms if any((arm["name"], kind) in said for kind in PROMPTS)]
        if not arms:
            continue
        if suite in ("white-box", "transfer"):               # the controls, and then the paper's order
            labels = {name: place for place, name in enumerate(paper()["labels"])}
            arms.sort(key=lambda arm: -1 if arm["name"] in NAMES else labels.get(arm["name"], 0))
        beside = _beside(suite, target, source, asked)
        notes = [*_provenance(group, target, cells, judges), *beside.notes]
        if suite == "consistency":
            found.append(_agreement(_title(suite, target, source), cells, judges, people, notes))
            continue
        if suite == "robustness":
            found.append(_robustness(_title(suite, target, source), arms, cells, said, notes))
            found.append(_main(f"{_title(suite, target, source)}: distances", arms, said, beside, suite, notes))
            continue
        found.append(_main(_title(suite, target, source), arms, said, beside, suite, notes))
        found.append(_behind(f"{_title(suite, target, source)}: what stands behind the ISR", arms, said, judges))
    return found


def _title(suite, target, source):
    return {"white-box": f"White box: {target}", "transfer": f"Transfer: {source} → {target}",
            "ablation": f"The two terms of SIFM: {target}", "lambda": f"The weight of the distance term: {target}",
            "robustness": f"Robustness: {target}",
            "consistency": f"Agreement of judges: {target}"}.get(suite, f"{suite}: {target}")


@dataclass(frozen=True)
class Beside:
    """The paper's rows for a table: arm -> {prompt type: figures}; `notes` say how to read them."""

    rows: dict
    order: tuple
    notes: list


def _beside(suite, target, source, asked):
    known, kinds = paper()["tables"], {name: about["kind"] for name, about in asked["editors"].items()}
    care = ("The paper's rows are of photographs and paintings, published editors and Gemini as judge; rates of other judges "
            "and editors are not comparable with them in absolute terms.")
    if suite == "white-box":
        number = WHITE_BOX.get(target) or BY_KIND[kinds[target]]
        rows = {row["method"]: row for row in known[number]["rows"]}
        which = f"Table {number}, {known[number]['editor']}"
    elif suite == "transfer":
        if kinds[source] == kinds[target]:
            return Beside({}, tuple(DISTANCES), [])
        way = ("instruct-pix2pix to sd3", "sd3 to instruct-pix2pix")[kinds[source] == "img2img"]
        number, which = "V", f"Table V, {way}"
        rows = {row["method"]: {"original": row[way]} for row in known["V"]["rows"]}
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
    """The lines that say which judge, weights and settings made a table."""
    asked = group["plan"]
    about = asked["editors"][target]
    hashes = about["identity"]["weights"]
    weights = ", ".join(f"{file} {digest[:12]}" for file, digest in hashes.items()) or "not from files"
    counted = {}
    used = {cell["image_id"] for cell in cells}
    for image, category in group["pictures"].items():
        if image in used:
            counted[category] = counted.get(category, 0) + 1
    eps = asked["eps"]
    loops = {json.dumps(arm["settings"], sort_keys=True): [] for arm in group["arms"] if arm["settings"]}
    for arm in group["arms"]:
        if arm["settings"]:
            loops[json.dumps(arm["settings"], sort_keys=True)].append(name_of(arm["name"].partition(", ")[0]))
    told = "; ".join(f"{', '.join(dict.fromkeys(names))}: {_spelled(json.loads(loop))}" for loop, names in loops.items())
    judge = asked["judge"]
    who = "the oracles of the miniature's world" if judge["kind"] == "oracle" else f"panel {judge['id']} ({judge['date']})"
    strange = {"instruct": {"strength"}, "img2img": {"image_guidance"}}[about["kind"]]        # no option of this editor
    strange |= set() if about["identity"]["scheduler"].startswith("FlowMatch") else {"text_length"}
    defaults = {key: value for key, value in {**about["identity"]["defaults"], **asked["edit"]}.items() if key not in strange}
    vae = f" (VAE {about['identity']['vae_dtype']})" if "vae_dtype" in about["identity"] else ""
    lines = [
        f"Judged by {who}: {', '.join(judges) or 'nobody yet'}; a success is what all of them call one.",
        f"Editor {target} ({about['identity']['scheduler']}, {about['identity']['dtype']}{vae}; "
        f"{_spelled(defaults)}); weights by SHA-256: {weights}.",
        f"Pictures: {len(used)} ({', '.join(f'{n} {category}' for category, n in counted.items())}); budget {eps:.4g} = "
        f"{math.floor(255 * eps + 1e-9)}/255 on the 8-bit picture; seed {asked['seed']} of the perturbation, "
        f"{', '.join(map(str, sorted({cell['seed'] for cell in cells})))} of the edits; sifm_min {asked['version']}.",
    ]
    if told:
        lines.append(f"Settings: {told}.")
    if about["notice"]:
        lines.append(about["notice"])
    if "reason" in asked["lpips"]:
        lines.append(f"LPIPS is absent: {asked['lpips']['reason']}.")
    for reason in dict.fromkeys(f"{metric} is absent: {why}" for cell in cells for metric, why in cell["absent"].items()):
        lines.append(f"{reason}.")
    if failed := [cell for cell in cells if cell["failed"]]:
        lines.append(f"{len(failed)} edits failed: " + "; ".join(dict.fromkeys(cell["failed"] for cell in failed)) + ".")
    return lines


def _spelled(settings):
    return ", ".join(f"{key.replace('_', ' ')} {value:.4g}" if isinstance(value, float) else f"{key.replace('_', ' ')} {value}"
                     for key, value in settings.items())


def name_of(arm):
    """An arm's name as the paper has it; what is done to the picture first stays behind it."""
    method, comma, attack = arm.partition(", ")
    return (NAMES.get(method) or paper()["labels"].get(method, method)) + comma + attack


def _main(title, arms, said, beside, suite, notes):
    """The table in the paper's layout. Distances are of edited immunized pictures from edited originals of one seed."""
    kinds = [kind for kind in PROMPTS if any((arm["name"], kind) in said for arm in arms)]
    columns = [("", "Method")] + [(PROMPTS[kind], f"{DISTANCES[m][0]} {DISTANCES[m][1]}" if m in DISTANCES else "ISR ↑")
                                  for kind in kinds for m in (*beside.order, "isr")]
    if suite == "robustness":                                # its rates have a table of their own
        notes = ["Distances of edits from those of the clean picture; where the attack moves the picture, of the clean one "
                 "moved in the same way."]
    rows, data = [], []
    for arm in arms:
        label = name_of(arm["name"])
        row = [label]
        for kind in kinds:
            found = said.get((arm["name"], kind))
            row += [_number(found and found.means[m], DISTANCES[m][2]) for m in beside.order] + [_rate(found)]
            if found:
                data.append(_data(title, arm, label, kind, found))
        rows.append(row)
        if theirs := beside.rows.get(arm["name"]):
            row = [f"{label}, paper"]
            for kind in kinds:
                own = theirs.get(kind, {})
                row += [_number(own.get(m), DISTANCES[m][2]) for m in beside.order]
                row += [f"{100 * own['isr']:.0f}%" if own else "-"]
                if own:
                    data.append({"table": title, "method": arm["name"], "who": "paper", "prompts": kind, **own})
            rows.append(row)
    if undefined := sorted({m for figures in said.values() for m in figures.left_out}):
        notes = [*notes, f"Infinite or undefined values are left out of the means of {', '.join(undefined)}."]
    return Table(title, columns, rows, notes, data)


WHO = {"people": "Human to human", "models": "Judge to judge", "people to models": "Human to judge"}


def _agreement(title, cells, judges, people, notes):
    """The paper's Table I: how often two of them say the same."""
    labels = ("semantic_mismatch", "perceptual_degradation", "success")
    own = list(records(cells, judges))
    known = {(cell["arm"], sample_of(cell)) for cell in cells}             # of other editors and budgets they say nothing
    people = [record for record in people if (record.arm, record.sample_id) in known]
    raters = list(dict.fromkeys(record.judge for record in people))
    found = isr.consistency([*own, *people], people=raters, models=judges) if len(judges) > 1 or raters else {}
    theirs = {row["who"]: row for row in paper()["tables"]["I"]["rows"]}
    rows, data = [], []
    for who, label in WHO.items():
        agreements = {one: found.get(one, {}).get(who) for one in labels}
        if any(agreements.values()):
            rows.append([label, *(estimated(agreement.observed) if agreement else "-" for agreement in agreements.values()),
                         *_kappa(agreements["success"])])
            data.append({"table": title, "method": who, "who": "ours", **{one: agreement and agreement.observed.value
                                                                          for one, agreement in agreements.items()}})
        rows.append([f"{label}, paper", *(f"{100 * theirs[who][one]:.0f}%" for one in labels), "-", "-", "-"])
        data.append({"table": title, "method": who, "who": "paper", **{one: theirs[who][one] for one in labels}})
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


def _robustness(title, arms, cells, said, notes):
    """ISR after each attack, and of the attack that is best for the attacker, picture by picture."""
    plain = [arm["name"] for arm in arms if not arm["attack"]]
    attacks = list(dict.fromkeys(arm["attack"]["name"] for arm in arms if arm["attack"]))
    columns = [("", "Attack"), ("", "PSNR of the picture"), *(("ISR", name_of(name)) for name in plain)]
    rows, data = [], []
    for attack in (None, *attacks):
        damage = [cell["damage"] for cell in cells if cell["attack"] == attack and not cell["method"] and cell["damage"]]
        row = [attack or "none", _number(statistics.fmean(damage) if damage else None, 1)]
        for name in plain:
            found = said.get((f"{name}, {attack}" if attack else name, "original"))
            row.append(_rate(found))
            if found and found.rate:
                estimate = found.rate.isr
                data.append({"table": title, "method": name, "attack": attack or "none", "isr": estimate.value,
                             "isr_low": estimate.low, "isr_high": estimate.high})
        rows.append(row)
    row = ["worst for each picture", "-"]
    for name in plain:
        estimate = worst([cell for cell in cells if cell["arm"].partition(", ")[0] == name])
        row.append(estimated(estimate))
        if estimate:
            data.append({"table": title, "method": name, "attack": "worst", "isr": estimate.value, "isr_low": estimate.low,
                         "isr_high": estimate.high})
    return Table(title, columns, [*rows, row], [*notes, "worst: a picture counts as protected only if its edit is thwarted "
                                                "without an attack and after every one. PSNR: of the clean picture after the "
                                                "attack, to the clean picture."], data)


def worst(cells):
    """The Estimate of the share of pictures whose edits are thwarted whatever is done to the picture first."""
    images = {}
    for cell in cells:
        verdicts = [isr.Verdict.of(*said[:2]) for said in (cell["judges"] or {}).values()]
        images.setdefault(cell["image_id"], []).append(isr.Verdict.consensus(verdicts).success if verdicts else None)
    decided = [isr.kleene_and(values) for values in images.values()]
    decided = [value for value in decided if value is not None]
    if not decided:
        return None
    return isr.Estimate(sum(decided) / len(decided), *isr.wilson(sum(decided), len(decided)), "Wilson")


def _data(title, arm, label, kind, found):
    record = {"table": title, "method": arm["name"], "who": "ours", "prompts": kind, "source": arm["source"],
              "target": arm["target"], "edits": found.cells, "failed": found.failed, **found.means}
    if rate := found.rate:
        record |= {"isr": rate.isr.value, "isr_low": rate.isr.low, "isr_high": rate.isr.high, "judged": rate.complete,
                   "successes": rate.successes, "obeyed": rate.obeyed, "splits": rate.splits, "isr_least": rate.lowest,
                   "isr_most": rate.highest}
    if beside := found.controlled:
        for key in ("control", "added", "attributable", "beyond_noise"):
            if estimate := getattr(beside, key):
                record |= {key: estimate.value, f"{key}_low": estimate.low, f"{key}_high": estimate.high}
        record |= {"working": beside.ok.complete, "isr_of_working": beside.ok.isr.value,
                   "isr_of_working_low": beside.ok.isr.low, "isr_of_working_high": beside.ok.isr.high}
    return record | cost(arm)


def cost(arm):
    """What an arm's immunizations took: the medians of seconds and passes, the largest step, the mean PSNR."""
    rows = list(arm["immunized"].values())
    if not rows:
        return {}
    passes = {key: statistics.median(row["passes"].get(key, 0) for row in rows) for key in rows[0]["passes"]}
    psnr = [float(row["psnr"]) for row in rows if math.isfinite(float(row["psnr"]))]
    return {"seconds": statistics.median(row["seconds"] for row in rows), **passes,
            "linf_255": max(row["linf_steps"] for row in rows), "psnr_of_picture": statistics.fmean(psnr) if psnr else None}


def _behind(title, arms, said, judges):
    """Per arm and kind of prompts: counts, bounds, controlled rates, each judge alone, and what it cost."""
    columns = [("", "Method"), ("", "Prompts"), ("", "n"), ("Judged", "thwarted"), ("Judged", "obeyed"), ("Judged", "split"),
               ("Judged", "bounds"), ("Beside the clean edits", "control"), ("Beside the clean edits", "added"),
               ("Beside the clean edits", "attributable"), ("Beside the clean edits", "of edits that work"),
               ("Beside noise", "beyond"), *(("Judge alone", judge) for judge in judges),
               ("A picture", "seconds"), ("A picture", "encoder"), ("A picture", "denoiser"), ("A picture", "steps of 1/255"),
               ("A picture", "PSNR")]
    rows, data = [], []
    for arm in arms:
        spent = cost(arm)
        for kind in PROMPTS:
            found = said.get((arm["name"], kind))
            if not found or not found.rate:
                continue
            rate, beside = found.rate, found.controlled
            row = [name_of(arm["name"]), kind, f"{rate.complete}" + (f" of {rate.samples}" if rate.complete < rate.samples
                                                                      else ""),
                   str(rate.successes), str(rate.obeyed), str(rate.splits),
                   f"{100 * rate.lowest:.0f} to {100 * rate.highest:.0f}%"]
            row += [estimated(beside.control), estimated(beside.added), estimated(beside.attributable),
                    f"{estimated(beside.ok.isr)} (n = {beside.ok.complete})", estimated(beside.beyond_noise)] if beside else (
                        ["-"] * 5)
            row += [_share(found.by_judge.get(judge)) for judge in judges]
            row += [_number(spent.get("seconds"), 1), *(_passes(spent, part) for part in ("encoder", "denoiser")),
                    _number(spent.get("linf_255"), 0), _number(spent.get("psnr_of_picture"), 1)]
            rows.append(row)
    notes = ["thwarted: every judge says so; obeyed: none does; split: they disagree. bounds: the rate if every edit without "
             "a verdict were a failure, or a success.",
             "added: thwarted edits beyond those that fail on the clean picture. attributable: (ISR - control) / (1 - "
             "control). of edits that work: among edits whose clean edit was obeyed. beyond: the ISR above random noise of "
             "the same budget. Intervals are at 95 %: Wilson's where a picture stands once, else a bootstrap over pictures.",
             "seconds: median of one immunization. encoder, denoiser: forward and backward passes of one immunization. "
             "steps, PSNR: of the immunized picture."]
    return Table(title, columns, rows, notes, data)


def _passes(spent, part):
    if f"{part}_forward" not in spent:
        return "-"
    return f"{spent[f'{part}_forward']:g} + {spent[f'{part}_backward']:g}"


def _number(value, digits):
    return "-" if value is None else f"{value:.{digits}f}"


def _rate(found):
    return estimated(found.rate.isr) if found and found.rate else "-"


def estimated(estimate):
    """An Estimate as text: 83% [74, 89]."""
    if estimate is None or estimate.value is None:
        return "-"
    return f"{100 * estimate.value:.0f}%" + ("" if estimate.low is None
                                             else f" [{100 * estimate.low:.0f}, {100 * estimate.high:.0f}]")


def _share(counts):
    return "-" if not counts or not counts.judged else f"{100 * counts.successes / counts.judged:.0f}%"


# -- formats ---------------------------------------------------------------------------------------------------------------

def markdown(made):
    """Tables as GitHub's Markdown; the heading above a column stands before it."""
    parts = []
    for table in made:
        heads = [f"{above}: {heading}" if above else heading for above, heading in table.columns]
        lines = [f"### {table.title}", "", _piped(heads), _piped(["---", *["---:"] * (len(heads) - 1)])]
        lines += [_piped(row) for row in table.rows]
        parts.append("\n".join([*lines, "", *(f"- {note}" for note in table.notes)]))
    return "\n\n".join(parts)


def _piped(cells):
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def comma_separated(made):
    """One row per method, prompts and author (ours or the paper's), at full precision."""
    rows = [row for table in made for row in table.data]
    fields = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, fields, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().rstrip("\n")


def latex(made):
    """Tables for a document with \\usepackage{booktabs}."""
    parts = []
    for table in made:
        groups = []                                          # (heading above, how many columns it spans)
        for above, _ in table.columns:
            if groups and groups[-1][0] == above:
                groups[-1][1] += 1
            else:
                groups.append([above, 1])
        above = " & ".join(f"\\multicolumn{{{span}}}{{c}}{{{_tex(head)}}}" if head else " & ".join([""] * span)
                           for head, span in groups)
        lines = ["\\begin{table*}", "\\centering", f"\\caption{{{_tex(table.title)}}}",
                 f"\\begin{{tabular}}{{l{'r' * (len(table.columns) - 1)}}}", "\\toprule", f"{above} \\\\",
                 " & ".join(_tex(heading) for _, heading in table.columns) + " \\\\", "\\midrule"]
        lines += [" & ".join(map(_tex, row)) + " \\\\" for row in table.rows]
        lines += ["\\bottomrule", "\\end{tabular}", *(f"% {note}" for note in table.notes), "\\end{table*}"]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


TEX = {"\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
       "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "↓": r"$\downarrow$", "↑": r"$\uparrow$", "→": r"$\rightarrow$"}


def _tex(text):
    return "".join(TEX.get(letter, letter) for letter in text)


FORMATS = {"markdown": markdown, "csv": comma_separated, "latex": latex}
