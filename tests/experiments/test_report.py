"""Tables against figures computed by hand, the paper's figures against the paper, and the page in a real browser."""

import csv
import html.parser
import json
import re

import browser
import pytest
from PIL import Image
from results_by_hand import JUDGES, cell, group

from sifm_min.experiments import figures, formats, page, tables
from sifm_min.files.digests import picture_sha256
from sifm_min.judging.intervals import wilson
from sifm_min.judging.rates import success_rate
from sifm_min.judging.records import by_arm


@pytest.fixture
def small():
    """Four pictures: the clean edit works on three; SIFM thwarts three, two of them ones that worked; one split."""
    control = [cell("control", f"p{i}", success) for i, success in enumerate((True, False, False, False))]
    noise = [cell("noise", f"p{i}", success, psnr=40.0) for i, success in enumerate((True, False, False, False))]
    sifm = [cell("sifm", f"p{i}", success, psnr=psnr) for i, (success, psnr) in enumerate(
        ((True, 10.0), (True, 20.0), (True, float("inf")), (None, 12.0)))]
    return group([*control, *noise, *sifm])


def rows(table):
    return {row[0]: row for row in table.rows}


def test_the_table_equals_a_computation_by_hand(small):
    main, behind, *_ = tables.tables(small)
    assert [heading for _, heading in main.columns] == ["Method", "PSNR ↓", "SSIM ↓", "VIFp ↓", "FSIM ↓", "LPIPS ↑", "ISR ↑",
                                                      "p vs SIFM"]
    low, high = (100 * bound for bound in wilson(3, 4))
    assert rows(main)["SIFM"] == ["SIFM", "14.00", "0.5000", "0.2500", "0.7500", "-", f"75% [{low:.0f}, {high:.0f}]",
                                  "reference"]
    assert rows(main)["SIFM, paper"] == ["SIFM, paper", "14.94", "0.5330", "0.1584", "0.7253", "0.4497", "83%", "-"]
    assert rows(main)["clean (control)"][1:6] == ["-"] * 5 and rows(main)["clean (control)"][6].startswith("25% [")
    found = dict(zip([heading for _, heading in behind.columns], rows(behind)["SIFM"], strict=True))
    assert (found["n"], found["thwarted"], found["obeyed"], found["split"]) == ("4", "3", "0", "1")
    assert found["added"].startswith("50% [") and found["attributable"].startswith("67%")     # (3 - 1) / 4, (3 - 1) / (4 - 1)
    assert found["of edits that work"].startswith("67% [") and found["of edits that work"].endswith("(n = 3)")
    assert found["beyond"].startswith("50% [")
    assert (found["one"], found["two"]) == ("100%", "75%")
    assert (found["seconds"], found["encoder"], found["denoiser"], found["PSNR"]) == ("3.0", "3 + 2", "30 + 20", "34.0")
    notes = " ".join(main.notes)
    for told in ("one, two", "unet/w abababababab", "7/255", "LPIPS is absent: no weights", "Only for learning.",
                 "Infinite or undefined values are left out of the means of psnr", "Table III"):
        assert told in notes


def test_unseen_prompts_are_clustered_by_picture():
    cells = [cell("sifm", f"p{i}", i < 2, f"unseen-{k}") for i in range(4) for k in range(5)]
    main, *_ = tables.tables(group(cells))
    expected = success_rate(by_arm(figures.records(cells, JUDGES)), "sifm").isr
    assert "bootstrap over 4 images" in expected.note
    assert rows(main)["SIFM"][-2] == f"50% [{100 * expected.low:.0f}, {100 * expected.high:.0f}]" != "50% [30, 70]"


def test_failed_steps_count_against_coverage():
    cells = [cell("sifm", "p0", True), cell("sifm", "p1", True, failed="out of memory", judges=None, edited=None)]
    main, behind, *_ = tables.tables(group(cells))
    assert rows(main)["SIFM"][-2].startswith("100%") and rows(behind)["SIFM"][2] == "1 of 2"
    assert rows(behind)["SIFM"][6] == "50 to 100%" and any("1 edits failed: out of memory" in note for note in main.notes)


def test_report_before_any_verdict():
    cells = [cell("sifm", "p0", True, judges=None)]
    main, behind, *_ = tables.tables(group(cells))
    assert rows(main)["SIFM"][-1] == "-" and behind.rows == [] and "nobody yet" in main.notes[0]


def test_the_worst_attack_decides_picture_by_picture():
    cells = [cell("sifm", "p0", True), cell("sifm, jpeg-50", "p0", True), cell("sifm", "p1", True),
             cell("sifm, jpeg-50", "p1", False), cell("sifm", "p2", False), cell("sifm, jpeg-50", "p2", True)]
    worst = figures.worst(cells)
    assert (worst.value, worst.low, worst.high) == (1 / 3, *wilson(1, 3))
    assert figures.worst([cell("sifm", "p0", True, judges=None)]) is None


def test_formats(small):
    made = tables.tables(small)
    text = formats.markdown(made)
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines[:6]}) == 1 and lines[0].startswith("| Method | Original prompt: PSNR")
    parsed = list(csv.DictReader(formats.comma_separated(made).splitlines()))
    ours = next(row for row in parsed if row["method"] == "sifm" and row["who"] == "ours")
    theirs = next(row for row in parsed if row["method"] == "sifm" and row["who"] == "paper")
    assert float(ours["psnr"]) == 14.0 and float(ours["isr"]) == 0.75 and float(theirs["isr"]) == 0.83
    assert (ours["seconds"], ours["obeyed"], ours["splits"]) == ("3.0", "0", "1")
    latex = formats.latex(made)
    assert latex.count(r"\begin{tabular}") == latex.count(r"\end{tabular}") == 4
    assert r"\multicolumn{7}{c}{Original prompt}" in latex and r"75\% [" in latex and r"PSNR $\downarrow$" in latex
    body = latex.split(r"\midrule")[1].split(r"\bottomrule")[0].strip().splitlines()
    assert {line.count(" & ") for line in body} == {7}
    json.dumps([table.record() for table in made])


def test_the_papers_figures_are_the_papers(shared):
    """Every row of the data file stands in the paper's text, in the paper's order of columns."""
    text = (shared / "reference" / "paper.txt").read_text(encoding="utf-8")
    lines = [re.sub(r" \[\d+\]", "", line).split("\t") for line in text.splitlines() if "\t" in line]
    found = [line[1:] for line in lines]
    known = figures.paper()["tables"]
    for number, table in known.items():
        for row in table["rows"]:
            if number == "I":
                wanted = [f"{100 * row[key]:.0f}%" for key in ("semantic_mismatch", "perceptual_degradation", "success")]
            else:
                wanted = []
                for block in filter(lambda value: isinstance(value, dict), row.values()):
                    wanted += [f"{block[m]:.2f}" if m == "psnr" else f"{100 * block[m]:.0f}%" if m == "isr"
                               else f"{block[m]:.4f}" for m in table["metrics"]]
            assert any(line[-len(wanted):] == wanted for line in found), (number, row)
    assert {number: len(table["rows"]) for number, table in known.items()} == {
        "I": 3, "II": 5, "III": 8, "IV": 8, "V": 4, "VI": 3, "VII": 7}
    label = {label: method for method, label in figures.paper()["labels"].items()}
    for number, start in (("II", "TABLE II\n"), ("III", "TABLE III\n"), ("IV", "TABLE IV\n")):
        part = text.split(f"\n{start}")[1].split("\nTABLE")[0]
        names = [line.split("\t")[0].split(" [")[0] for line in part.splitlines() if line.count("\t") == 12 and "%" in line]
        assert [label[name] for name in names] == [row["method"] for row in known[number]["rows"]]


# ------------------------------------------------------------------------------------------------------------- the page

@pytest.fixture
def written(small, tmp_path):
    """The page of `small`, with two categories and a caption that would break out of a script."""
    places = {}
    for name, colour in (("a", "red"), ("b", "green"), ("c", "blue"), ("d", "white")):
        image = Image.new("RGB", (16, 16), colour)
        places[name] = tmp_path / f"{picture_sha256(image)}.png"
        image.save(places[name])
    for one in small["cells"]:
        one["prompt"] = "</script><b>go</b> @data@"
    for image in ("p2", "p3"):
        small["pictures"][image] = "artwork"
    for one in small["cells"]:
        one["category"] = small["pictures"][one["image_id"]]
    text = page.page([small], tables.tables(small), places.__getitem__)
    path = tmp_path / "report.html"
    path.write_text(text, encoding="utf-8")
    return path


class Elements(html.parser.HTMLParser):
    VOID = {"meta", "link", "img", "br", "hr", "input", "line", "circle"}

    def __init__(self):
        super().__init__()
        self.open, self.seen = [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_well_formed_and_needs_nothing_else(written):
    text = written.read_text(encoding="utf-8")
    found = Elements()
    found.feed(text)
    assert found.open == [] and len([tag for tag, _ in found.seen if tag == "script"]) == 2
    assert "@title@" not in text and "@tables@" not in text and text.count("<svg") == 1
    for tag, attributes in found.seen:
        assert not {"src", "srcset", "data", "action"} & attributes.keys() and tag not in ("link", "iframe", "object")
        assert attributes.get("href", "#").startswith("#")
    assert not re.search(r"url\(|@import|https?:", text)


def test_the_page_in_a_browser(written, tmp_path):
    if not browser.find():
        pytest.skip("no Chromium on the PATH; CHROMIUM names one")
    with browser.Browser(tmp_path) as opened:
        opened.open(written.as_uri())
        count = "document.getElementById('count').textContent"
        assert opened.run(count) == "8 of 8 edits"
        told = opened.run("document.querySelector('#rows p').textContent")
        assert told.startswith("noise (control): </script><b>go</b> @data@")
        pick = ("document.querySelector('[name={}]').value = '{}'; "
                "document.getElementById('filters').dispatchEvent(new Event('change'));")
        opened.run(pick.format("method", "SIFM") + pick.format("verdict", "thwarted"))
        assert opened.run(count) == "3 of 8 edits"
        opened.run(pick.format("category", "artwork"))
        assert opened.run(count) == "1 of 8 edits"
        assert opened.run("Promise.all([...document.images].map(i => (i.loading = 'eager', i.decode()))).then(() => "
                          "document.images.length)") == 5 + 4 * 4
        first = "document.querySelector('tbody tr td').textContent"
        sort = "document.querySelectorAll('thead tr:last-child button')[1].click()"
        assert opened.run(f"{first}") == "clean (control)"
        assert opened.run(f"{sort}; {first}") == "SIFM"      # 14.00 before 14.94 and 40; what has no number comes last
        assert opened.run(f"{sort}; {first}") == "noise (control)"
        assert opened.run(f"{sort}; {first}") == "clean (control)"
        requests = [e["params"]["request"]["url"][:5] for e in opened.events if e["method"] == "Network.requestWillBeSent"]
        assert set(requests) <= {"file:", "data:"} and requests.count("file:") == 1
        assert not [e for e in opened.events if e["method"] in ("Runtime.exceptionThrown", "Log.entryAdded")]
        opened._call("Emulation.setDeviceMetricsOverride", width=390, height=800, deviceScaleFactor=1, mobile=True)
        assert opened.run("document.documentElement.scrollWidth") <= 390
        assert opened.run("document.querySelector('svg text').getBoundingClientRect().height") > 9    # it scrolls by itself
