"""A folder of results as one HTML page that needs nothing else: tables, charts as SVG, and pictures.

`page(groups, tables, picture)` returns the text. Frame, style and script are in pages/report.html. The pictures are data
URIs. Only a few originals of every category are shown, so that the page stays small enough to pass on.
"""

import base64
import html
import io
import json
import re
from pathlib import Path

from .. import images
from ..miniature.verdict import Verdict
from .charts import charts
from .figures import name_of

SIDE = 256                                                   # pixels; larger pictures are scaled down
SMALL = 128                                                  # pixels; up to this, pixel by pixel and with all prompts


def page(groups, tables, picture, *, count=12):
    """The page's HTML.

    groups: of results.collect. tables: of tables.tables. picture(sha256): the path of a picture. count: how many originals
    are shown.
    """
    shown = _Pictures(picture)
    samples, lines = [], []
    for group in groups:
        rows, comparisons = _samples(group, shown, _chosen(group, count))
        samples += rows
        lines += comparisons
    data = json.dumps({"samples": samples, "lines": lines, "pictures": shown.made, "small": shown.small}, ensure_ascii=False)
    parts = {
        "title": "Immunization against text-guided editing", "intro": _intro(groups),
        "tables": "\n".join(map(_table, tables)), "charts": "\n".join(charts(groups)) or "<p>Nothing is judged yet.</p>",
        "data": data.replace("<", "\\u003c"),
    }
    text = (Path(__file__).parent / "pages" / "report.html").read_text(encoding="utf-8")
    return re.sub(f"@({'|'.join(parts)})@", lambda match: parts[match.group(1)], text)


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
    """Pictures by name as data URIs, each once. small: True if none is larger than SMALL."""

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
    """(the joint verdict in a word, the verdict of each judge in words) of a cell."""
    verdicts = {judge: Verdict.of(*answer[:2]) for judge, answer in (cell["judges"] or {}).items()}
    if not verdicts:
        return "no verdict", ""
    joint = Verdict.consensus(verdicts.values())
    if joint.success is None or joint.obeyed is None:
        return "no verdict", ""
    reasons = {}
    for judge, verdict in verdicts.items():
        words = {"mismatch": verdict.semantic_mismatch, "degraded": verdict.perceptual_degradation}
        reasons[judge] = " and ".join(word for word, holds in words.items() if holds) or "as asked"
    return ("thwarted" if joint.success else "obeyed" if joint.obeyed else "split",
            "; ".join(f"{judge}: {reason}" for judge, reason in reasons.items()))


def _samples(group, shown, chosen):
    """(rows of five pictures, rows with all methods) of the chosen originals of a group, as data for the page."""
    samples, lines = [], {}
    seed = min((cell["seed"] for cell in group["cells"]), default=None)
    for cell in group["cells"]:
        if cell["image_id"] not in chosen or cell["edited"] is None or cell["seed"] != seed or cell["attack"]:
            continue
        small = max(shown.image(cell["original"]).size) <= SMALL
        if not small and cell["prompt_id"] not in ("original", "unseen-1"):
            continue
        word, reasons = verdict_of(cell)
        table = f"{group['plan']['suite']}, {cell['target']}" + (
            f" from {cell['source']}" if cell["source"] != cell["target"] else "")
        about = {"prompt": cell["prompt"], "category": cell["category"], "image": cell["image_id"], "table": table}
        method = name_of(cell["arm"])
        if cell["method"]:
            samples.append({**about, "method": method, "type": cell["prompt_type"], "verdict": word, "said": reasons,
                            "original": shown.short(cell["original"]), "clean": shown.short(cell["edited_original"]),
                            "immunized": shown.short(cell["immunized"]), "edited": shown.short(cell["edited"]),
                            "difference": shown.difference(cell["original"], cell["immunized"])})
        if cell["prompt_type"] == "original":
            line = lines.setdefault((cell["target"], cell["image_id"]), {**about, "edits": [],
                                                                         "original": shown.short(cell["original"])})
            line["edits"].append({"method": method, "picture": shown.short(cell["edited"]), "verdict": word})
    return samples, list(lines.values())
