"""Each method against SIFM, paired: p computed by hand and by enumeration, in every form of the tables."""

import csv
import itertools
import json
import math
import random

import pytest
from results_by_hand import cell, group

from sifm_min.experiments import comparison, formats, page, tables

TYPES = ("original", "unseen")


def outcomes(arm, successes, prompt="original"):
    """One edit per picture: p0, p1, ... thwarted or not."""
    return [cell(arm, f"p{i}", bool(success), prompt) for i, success in enumerate(successes)]


def binomial_p(b, c):
    """Twice the chance of so few heads among b + c tosses of a fair coin."""
    n = b + c
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(min(b, c) + 1)) / 2 ** n)


def holm_p(ps, i):
    """Holm's corrected p of ps[i], by its definition: the largest of the stepped values of all p up to this one."""
    smaller = sorted(range(len(ps)), key=ps.__getitem__)
    smaller = smaller[:smaller.index(i) + 1]
    return max(min(1.0, (len(ps) - rank) * ps[j]) for rank, j in enumerate(smaller))


def swap_p(differences):
    """The share of all ways of swapping two methods, picture by picture, with a difference at least as large."""
    total = abs(sum(differences))
    sums = [abs(sum(sign * d for sign, d in zip(signs, differences, strict=True)))
            for signs in itertools.product((1, -1), repeat=len(differences))]
    return sum(s >= total for s in sums) / len(sums)


@pytest.fixture
def ten():
    """Ten pictures. SIFM thwarts 8. Only SIFM: 7 against one only by mist, 8 against none by the clean picture."""
    sifm, mist = [1] * 8 + [0, 0], [1] + [0] * 7 + [1, 0]
    return group([*outcomes("control", [0] * 10), *outcomes("mist", mist), *outcomes("sifm", sifm)])


def column(table, heading):
    place = [name for _, name in table.columns].index(heading)
    return {row[0]: row[place] for row in table.rows}


def test_p_in_the_table_is_the_one_by_hand(ten):
    main, *_, paired = tables.tables(ten)
    # mist: 2 (1 + 8) / 2^8 = 0.0703; clean: 2 / 2^8 = 0.0078. Holm: 2 x 0.0078 = 0.0156, and max(0.0156, 0.0703).
    cells = column(main, "p vs SIFM")
    assert (cells["clean (control)"], cells["MIST"], cells["SIFM"]) == ("0.016", "0.070", "reference")
    row = next(row for row in paired.rows if row[0] == "MIST")
    assert row[1:6] == ["original", "10", "10", "1", "7"] and row[6].startswith("-60% [") and row[7:9] == ["0.0703", "0.070"]
    assert row[9] == "exact McNemar" and "over the 2 comparisons" in paired.notes[0]
    assert all(cells[name] == "-" for name in cells if name.endswith(", paper"))


def test_the_footnote_says_how_p_is_computed(ten):
    text = " ".join(tables.tables(ten)[0].notes)
    for part in ("equally good", "edits of one picture by one prompt and seed", "McNemar", "Holm", "Fewer than 6 pictures"):
        assert part in text


def test_p_of_random_tables_is_that_of_enumeration():
    """One prompt a picture: binomial; three unseen prompts: all swaps. Holm goes over both types of prompts."""
    draw = random.Random(3)
    for _ in range(20):
        outcome = {(arm, kind, i): draw.random() < chance for arm, chance in (("mist", 0.3), ("ace", 0.5), ("sifm", 0.8))
                   for kind in ("original", "unseen-1", "unseen-2", "unseen-3") for i in range(8)}
        cells = [cell(arm, f"p{i}", success, kind) for (arm, kind, i), success in outcome.items()]
        found = comparison.against_sifm(cells, ("one", "two"), ["mist", "ace", "sifm"])
        places, ps = [(arm, kind) for arm in ("mist", "ace") for kind in TYPES], []
        for arm, kind in places:
            kinds = ["original"] if kind == "original" else ["unseen-1", "unseen-2", "unseen-3"]
            steps = [[outcome[arm, k, i] - outcome["sifm", k, i] for k in kinds] for i in range(8)]
            flat = [step for picture in steps for step in picture]
            ps.append(binomial_p(flat.count(1), flat.count(-1)) if kind == "original" else swap_p([sum(s) for s in steps]))
            assert found[arm, kind].result.p == pytest.approx(ps[-1], abs=1e-12)
            assert found[arm, kind].images == 8 and found[arm, kind].result.pairs == 8 * len(kinds)
        for i, place in enumerate(places):
            assert found[place].p_holm == pytest.approx(holm_p(ps, i), abs=1e-12) and found[place].comparisons == 4


@pytest.mark.parametrize("pictures, text", [(5, "few (5)"), (6, "0.031")])
def test_few_pictures_are_said_in_place_of_p(pictures, text):
    """Six pictures are the fewest with a p below 0.05: 2 / 2^6."""
    arms = [*outcomes("control", [0] * pictures), *outcomes("sifm", [1] * pictures)]
    main, *_ = tables.tables(group(arms))
    assert column(main, "p vs SIFM")["clean (control)"] == text


def test_comparisons_with_few_pictures_are_not_in_the_family():
    arms = [*outcomes("control", [0] * 8), *outcomes("mist", [0] * 3), *outcomes("sifm", [1] * 8)]
    main, *_ = tables.tables(group(arms))
    cells = column(main, "p vs SIFM")
    assert (cells["clean (control)"], cells["MIST"]) == ("0.008", "few (3)")           # 2 / 2^8, not doubled


def test_a_missing_sifm_arm_is_said():
    made = tables.tables(group([*outcomes("control", [0] * 8), *outcomes("mist", [1] * 8)]))
    assert set(column(made[0], "p vs SIFM").values()) == {"no SIFM arm", "-"} and len(made) == 2


def test_edits_without_a_common_picture_are_said():
    apart = [cell("mist", f"q{i}", True) for i in range(8)]
    main, *_ = tables.tables(group([*apart, *outcomes("sifm", [1] * 8)]))
    assert column(main, "p vs SIFM")["MIST"] == "no pair"


def test_an_edit_that_one_judge_left_open_is_no_pair(ten):
    """Nine pairs are left, and the picture that only mist protected is out: 2 / 2^7."""
    for edit in ten["cells"]:
        if (edit["arm"], edit["image_id"]) == ("mist", "p8"):
            edit["judges"] = {"one": [True, False, "ok"], "two": [None, None, "timeout"]}
    found = comparison.against_sifm(ten["cells"], ("one", "two"), ["control", "mist", "sifm"])
    mist = found["mist", "original"]
    assert mist.result.pairs == mist.images == 9 and mist.result.p == 2 / 2 ** 7


def test_the_reference_of_the_lambda_suite_and_of_attacks():
    names = ["control", "lambda 0.01", "lambda 0.1"]
    assert comparison.reference_of("lambda 0.01", names) == "lambda 0.1"
    names = ["sifm", "noise", "sifm, jpeg-50", "noise, jpeg-50", "noise, blur-1"]
    assert comparison.reference_of("noise, jpeg-50", names) == "sifm, jpeg-50"
    assert comparison.reference_of("noise", names) == "sifm" and comparison.reference_of("noise, blur-1", names) is None


def test_every_form_of_the_tables_has_p(ten):
    made = tables.tables(ten)
    assert "| MIST | " in formats.markdown(made) and "| 0.070 |" in formats.markdown(made)
    latex = formats.latex(made)
    assert next(line for line in latex.splitlines() if line.startswith("MIST &")).endswith(r"& 0.070 \\")
    row = next(row for row in csv.DictReader(formats.comma_separated(made).splitlines())
               if (row["method"], row["who"]) == ("mist", "ours"))
    assert float(row["vs_sifm_p"]) == float(row["vs_sifm_p_holm"]) == binomial_p(1, 7) == 0.0703125
    assert (row["vs_sifm_only_method"], row["vs_sifm_only_sifm"], row["vs_sifm_comparisons"]) == ("1", "7", "2")
    record = next(row for row in json.loads(json.dumps(made[0].record()))["rows"] if row["method"] == "control")
    assert (record["vs_sifm_p"], record["vs_sifm_p_holm"]) == (2 / 2 ** 8, 4 / 2 ** 8)
    for edit in ten["cells"]:
        edit["edited"] = None                                # no pictures: the page of the tables alone
    html = page.page([ten], made, None)
    assert "<td>0.070</td>" in html and "p vs SIFM: if the method" in html and "each method against SIFM, paired" in html


# ------------------------------------------------------------------------------------------------------------ formats

def broken_lines():
    """A group whose notes, titles and failures hold line breaks."""
    made = group([*outcomes("mist", [1]), cell("sifm", "p1", True, failed="first\nsecond\r\nthird", judges=None, edited=None)])
    made["plan"]["editors"]["miniature"]["notice"] = "One line.\nAnother line.\n\n50 % of a third."
    return made


def test_latex_notes_with_line_breaks_stay_comments():
    latex = formats.latex(tables.tables(broken_lines()))
    for line in latex.splitlines():
        if "Another line." in line or "of a third" in line or line.endswith(("second", "third.")):
            assert line.startswith("% "), line
    assert "% Another line." in latex and "% 50 % of a third." in latex
    inside = latex.split(r"\end{tabular}")[1].split(r"\end{table*}")[0].strip().split("\n")
    assert all(line.startswith("% ") for line in inside)


@pytest.mark.parametrize("form", ["markdown", "latex"])
def test_a_title_or_cell_with_a_line_break_stays_one_row(form):
    table = tables.Table("two\nlines", [("", "Method"), ("a\nb", "ISR")], [["new\nline", "1"]], [], [])
    text = formats.BY_NAME[form]([table])
    assert "two lines" in text and "new line" in text and "a b" in text
