"""A folder of results as one HTML page that needs nothing else: tables, charts as SVG, and the pictures themselves.

`page(groups, tables, picture)` returns the text; the frame, style and script are in pages/report.html. Pictures go in as
data URIs, of a few originals from every category: the page is to be looked at and passed on, not an archive.
"""

import base64
import html
import io
import json
import math
import re
from pathlib import Path

from . import images, isr, report

SIDE = 256                                                   # pixels; larger pictures are shown scaled down
SMALL = 128                                                  # up to which every pixel is shown, and all prompts are


def page(groups, tables, picture, *, count=12):
    """The page's HTML. groups: of protocol.collect; tables: of report.tables; picture(sha256) -> the path of a picture;
    count: how many originals are shown."""
    shown = _Pictures(picture)
    samples, lines = [], []
    for group in groups:
        made = _samples(group, shown, _chosen(group, count))
        samples += made[0]
        lines += made[1]
    data = json.dumps({"samples": samples, "lines": lines, "pictures": shown.made, "small": shown.small}, ensure_ascii=False)
    parts = {
        "title": "Immunization against text-guided editing", "intro": _intro(groups),
        "tables": "\n".join(map(_table, tables)), "charts": "\n".join(charts(groups)) or "<p>Nothing is judged yet.</p>",
        "data": data.replace("<", "\\u003c"),
    }
    text = (Path(__file__).parent / "pages" / "report.html").read_text(encoding="utf-8")
    return re.sub(f"@({'|'.join(parts)})@", lambda found: parts[found.group(1)], text)


def _intro(groups):
    notices = dict.fromkeys(about["notice"] for group in groups for about in group["plan"]["editors"].values())
    suites = ", ".join(dict.fromkeys(group["plan"]["suite"] for group in groups))
    return html.escape(f"{suites}. {' '.join(filter(None, notices))}")


# -- tables ----------------------------------------------------------------------------------------------------------------

def _table(table):
    spans = []
    for above, _ in table.columns:
        if spans and spans[-1][0] == above:
            spans[-1][1] += 1
        else:
            spans.append([above, 1])
    above = "".join(f'<th colspan="{span}">{html.escape(text)}</th>' for text, span in spans)
    heads = "".join(f'<th scope="col"><button type="button">{html.escape(text)}</button></th>' for _, text in table.columns)
    body = "\n".join(f"<tr{' class=theirs' if row[0].endswith(', paper') else ''}>"
                     f"{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in table.rows)
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in table.notes)
    return (f'<h3>{html.escape(table.title)}</h3>\n<div class="scroll" tabindex="0"><table><thead>'
            f'<tr class="above">{above}</tr><tr>{heads}</tr></thead><tbody>\n{body}\n</tbody></table></div>\n'
            f'<ul class="notes">{notes}</ul>')


# -- pictures --------------------------------------------------------------------------------------------------------------

class _Pictures:
    """Pictures by name as data URIs, each once. small: none of them is larger than SMALL."""

    def __init__(self, place):
        self.place, self.made, self.small, self._read = place, {}, True, {}

    def image(self, sha256):
        if sha256 not in self._read:
            self._read[sha256] = images.read(self.place(sha256)).image
        return self._read[sha256]

    def add(self, name, image):
        if name not in self.made:
            self.small = self.small and max(image.size) <= SMALL
            if max(image.size) > SIDE:
                image = image.copy()
                image.thumbnail((SIDE, SIDE))
            encoded = io.BytesIO()
            image.save(encoded, "PNG", optimize=True)
            self.made[name] = f"data:image/png;base64,{base64.b64encode(encoded.getvalue()).decode()}"
        return name

    def short(self, sha256):
        return self.add(sha256[:16], self.image(sha256))

    def difference(self, one, other):
        return self.add(f"{one[:16]}-{other[:16]}", images.amplify(self.image(one), self.image(other)))


def _chosen(group, count):
    """`count` originals, taken from the categories in turn."""
    categories = {}
    for image, category in group["pictures"].items():
        categories.setdefault(category, []).append(image)
    turns = [image for turn in range(max(map(len, categories.values()))) for members in categories.values()
             for image in members[turn:turn + 1]]
    return set(turns[:count])


def verdict_of(cell):
    """(a word, what each judge said) of a cell."""
    verdicts = {judge: isr.Verdict.of(*said[:2]) for judge, said in (cell["judges"] or {}).items()}
    if not verdicts:
        return "no verdict", ""
    joint = isr.Verdict.consensus(verdicts.values())
    if joint.success is None or joint.obeyed is None:
        return "no verdict", ""
    reasons = {}
    for judge, verdict in verdicts.items():
        words = {"mismatch": verdict.semantic_mismatch, "degraded": verdict.perceptual_degradation}
        reasons[judge] = " and ".join(word for word, found in words.items() if found) or "as asked"
    return ("thwarted" if joint.success else "obeyed" if joint.obeyed else "split",
            "; ".join(f"{judge}: {reason}" for judge, reason in reasons.items()))


def _samples(group, shown, chosen):
    """(rows of five pictures, rows of all methods) of the chosen originals of a group, as data for the page."""
    samples, lines = [], {}
    seed = min((cell["seed"] for cell in group["cells"]), default=None)
    for cell in group["cells"]:
        if cell["image_id"] not in chosen or cell["edited"] is None or cell["seed"] != seed or cell["attack"]:
            continue
        small = max(shown.image(cell["original"]).size) <= SMALL
        if not small and cell["prompt_id"] not in ("original", "unseen-1"):
            continue
        word, said = verdict_of(cell)
        table = f"{group['plan']['suite']}, {cell['target']}" + (
            f" from {cell['source']}" if cell["source"] != cell["target"] else "")
        told = {"prompt": cell["prompt"], "category": cell["category"], "image": cell["image_id"], "table": table}
        method = report.name_of(cell["arm"])
        if cell["method"]:
            samples.append({**told, "method": method, "type": cell["prompt_type"], "verdict": word, "said": said,
                            "original": shown.short(cell["original"]), "clean": shown.short(cell["edited_original"]),
                            "immunized": shown.short(cell["immunized"]), "edited": shown.short(cell["edited"]),
                            "difference": shown.difference(cell["original"], cell["immunized"])})
        if cell["prompt_type"] == "original":
            line = lines.setdefault((cell["target"], cell["image_id"]), {**told, "edits": [],
                                                                         "original": shown.short(cell["original"])})
            line["edits"].append({"method": method, "picture": shown.short(cell["edited"]), "verdict": word})
    return samples, list(lines.values())


# -- charts ----------------------------------------------------------------------------------------------------------------

def charts(groups):
    """SVG figures: ISR of methods, by prompt, against lambda and against the budget, each where there are such results."""
    budgets = {}
    for group in groups:
        suite = group["plan"]["suite"]
        for target in dict.fromkeys(arm["target"] for arm in group["arms"]):
            arms = [arm["name"] for arm in group["arms"] if arm["target"] == target and not arm["attack"]]
            cells = [cell for cell in group["cells"] if cell["target"] == target and not cell["attack"]]
            judges = report.judges_of(cells)
            if not judges:
                continue
            said = report.figures(cells, judges, arms)
            where = f"{target}, {len({cell['image_id'] for cell in cells})} pictures"
            if suite == "lambda":
                rates = {arm.partition(" ")[2]: said[arm, "original"].rate.isr for arm in arms if arm.startswith("lambda ")
                         and (arm, "original") in said}
                theirs = {f"{row['lam']:g}": row["original"]["isr"] for row in report.paper()["tables"]["VII"]["rows"]}
                series = {"ours": rates, "the paper, sd3": {lam: isr.Estimate(theirs[lam], None, None, "") for lam in rates
                                                            if lam in theirs}}
                yield chart(f"ISR against lambda: {where}", list(rates), series)
                continue
            kinds = [kind for kind in report.PROMPTS if any((arm, kind) in said for arm in arms)]
            series = {report.PROMPTS[kind]: {report.name_of(arm): said[arm, kind].rate.isr for arm in arms
                                             if (arm, kind) in said} for kind in kinds}
            yield chart(f"ISR, {suite}: {where}", [report.name_of(arm) for arm in arms], series)
            prompts = list(dict.fromkeys(cell["prompt_id"] for cell in cells))
            if len(prompts) > 1:
                by_prompt = {prompt: report.figures([cell for cell in cells if cell["prompt_id"] == prompt], judges, arms)
                             for prompt in prompts}
                yield chart(f"ISR against prompts: {where}", prompts, {
                    report.name_of(arm): {prompt: found.rate.isr for prompt in prompts
                                          for (name, _), found in by_prompt[prompt].items() if name == arm} for arm in arms})
            if suite == "white-box":
                eps = f"{math.floor(255 * group['plan']['eps'] + 1e-9)}/255"
                for arm in arms:
                    if (arm, "original") in said:
                        budgets.setdefault(target, {}).setdefault(report.name_of(arm), {})[eps] = said[arm, "original"].rate.isr
    for target, series in budgets.items():
        steps = sorted({eps for rates in series.values() for eps in rates}, key=lambda eps: int(eps.partition("/")[0]))
        if len(steps) > 1:
            yield chart(f"ISR against the budget: {target}", steps, series)


WIDTH, HEIGHT, LEFT, TOP, FOOT = 660, 310, 66, 12, 80


def chart(title, places, series):
    """A figure: for each place along the axis a point with its interval for every series, name -> {place: isr.Estimate}."""
    step, rows = (WIDTH - LEFT - 10) / max(1, len(places)), max(1, math.ceil(len(series) / 4))
    total = HEIGHT + 18 * rows

    def y(value):
        return TOP + (1 - value) * (HEIGHT - TOP - FOOT)
    drawn = []
    for tenth in range(0, 11, 2):
        height = y(tenth / 10)
        drawn.append(f'<line x1="{LEFT}" x2="{WIDTH - 10}" y1="{height:.1f}" y2="{height:.1f}" stroke="var(--line)"/><text '
                     f'x="{LEFT - 6}" y="{height + 4:.1f}" text-anchor="end" fill="currentColor">{tenth * 10}%</text>')
    for i, place in enumerate(places):
        x = LEFT + step * (i + 0.5)
        drawn.append(f'<text x="{x:.1f}" y="{HEIGHT - FOOT + 16}" text-anchor="end" fill="currentColor" '
                     f'transform="rotate(-35 {x:.1f} {HEIGHT - FOOT + 16})">{html.escape(place)}</text>')
    for k, (name, values) in enumerate(series.items()):
        colour = f"var(--s{k % 10})"
        for i, place in enumerate(places):
            estimate = values.get(place)
            if estimate is None or estimate.value is None:
                continue
            x = LEFT + step * (i + 0.5) + (k - (len(series) - 1) / 2) * min(12, step * 0.7 / len(series))
            told = html.escape(f"{name}, {place}: {report.estimated(estimate)}")
            bar = "" if estimate.low is None else (f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{y(estimate.low):.1f}" '
                                                   f'y2="{y(estimate.high):.1f}" stroke="{colour}" stroke-width="2"/>')
            drawn.append(f'<g><title>{told}</title>{bar}<circle cx="{x:.1f}" cy="{y(estimate.value):.1f}" r="4" '
                         f'fill="{colour}"/></g>')
        row, column = divmod(k, 4)
        drawn.append(f'<circle cx="{LEFT + 155 * column}" cy="{HEIGHT + 18 * row}" r="4" fill="{colour}"/><text x="'
                     f'{LEFT + 155 * column + 9}" y="{HEIGHT + 18 * row + 4}" fill="currentColor">{html.escape(name)}</text>')
    return (f'<figure><figcaption>{html.escape(title)}</figcaption><svg viewBox="0 0 {WIDTH} {total}" role="img" aria-label="'
            f'{html.escape(title)}">{"".join(drawn)}</svg></figure>')
