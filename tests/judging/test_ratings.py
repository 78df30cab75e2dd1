"""Rating sheets: nothing on them tells the arm, what comes back is read strictly, and the page is used as a person would."""

import csv
import io
import json
import random
import re
import shutil
import subprocess
import time
from collections import Counter
from pathlib import Path

import browser
import pytest
from PIL import Image

from sifm_min import judge
from sifm_min.files.digests import picture_sha256
from sifm_min.judging import ratings
from sifm_min.judging.agreement import consistency
from sifm_min.judging.edits import EditFile, read_edits
from sifm_min.judging.panels import Prompt
from sifm_min.judging.records import Record

ARMS = ("control", "noise", "sifm", "photoguard-encoder")
PROMPT = Prompt.load("isr-judge/1")


def make_manifest(folder, count=6, arms=ARMS):
    rows = []
    for i in range(count):
        Image.new("RGB", (24, 16), (i, 200, 3)).save(folder / f"original{i}.png")
        for arm in arms:
            image = Image.new("RGB", (24, 16), (i, 9, 10 * ARMS.index(arm)))
            image.save(folder / f"{arm}{i}.png")
            rows.append({"sample_id": f"s{i}", "original": f"original{i}.png", "edited": f"{arm}{i}.png", "arm": arm,
                         "prompt": f"=make it {i}, \"now\"", "prompt_type": "own" if i % 2 else "unseen",
                         "category": ("portrait", "landscape", "artwork")[i % 3], "editor": "miniature"})
    path = folder / "edits.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def study(tmp_path):
    """A study of 24 items and 3 attention items for two raters, with seed 5."""
    samples = read_edits(make_manifest(tmp_path))
    ratings.export(samples, tmp_path / "study", ["ann", "ben"], PROMPT, items=24, attention=3, seed=5)
    return tmp_path / "study"


def items(study):
    with open(study / "keep/study_items.csv", encoding="utf-8", newline="") as file:
        return {row["item_id"]: row for row in csv.DictReader(file)}


def table(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def page(path):
    """The study as a rater's page has it."""
    found = re.search(r'<script type="application/json" id="study">(.*?)</script>', path.read_text(encoding="utf-8"), re.S)
    return json.loads(found[1])


def truth(row):
    """The findings of the raters of these tests. They depend on the arm, which raters do not see."""
    return (True, False) if row["is_attention"] == "1" else (row["arm"] in ("sifm", "control"), row["arm"] == "sifm")


def fill_in(study, rater, change=lambda row, item: row, **extra):
    """A rater's table with answers, as text."""
    rows, known = table(study / f"sheet/{rater}.csv"), items(study)
    for row in rows:
        mismatch, degradation = truth(known[row["item_id"]])
        row |= {"semantic_mismatch": int(mismatch), "perceptual_degradation": int(degradation),
                "immunization_success": int(mismatch or degradation)}
        change(row, known[row["item_id"]])
    file = io.StringIO()
    writer = csv.DictWriter(file, [*rows[0], *extra])
    writer.writeheader()
    writer.writerows({**row, **extra} for row in rows)
    return file.getvalue()


def returned(study, rater, text):
    path = study.parent / f"{rater}-back.csv"
    path.write_text(text, encoding="utf-8", newline="")
    return path


# ------------------------------------------------------------------------------------------------------------ the sheet

def test_rating_sheet_does_not_show_the_arm(study):
    secret = (*ARMS, "original0", "s0", "portrait", "unseen", "miniature", "attention", "stratum")
    for file in filter(Path.is_file, (study / "sheet").rglob("*")):
        content = file.read_bytes().replace(json.dumps(PROMPT.rules).replace("<", "\\u003c").encode(), b"")
        found = [word for word in secret if re.search(rf"\b{word}\b".encode(), content) or word in file.name]
        assert not found, file
    assert b'"seed"' not in (study / "sheet/ann.html").read_bytes()
    pictures = {path.name for path in (study / "sheet/pictures").iterdir()}
    assert len(pictures) == 2 * 27 and all(re.fullmatch(r"[0-9a-f]{10}\.png", name) for name in pictures)
    assert all(Image.open(study / "sheet/pictures" / name).info == {} for name in pictures)


def test_every_rater_has_all_items_in_an_order_of_their_own(study):
    orders = {rater: [row["item_id"] for row in table(study / f"sheet/{rater}.csv")] for rater in ("ann", "ben")}
    assert sorted(orders["ann"]) == sorted(orders["ben"]) == sorted(items(study)) and orders["ann"] != orders["ben"]
    for rater, order in orders.items():
        shown = page(study / f"sheet/{rater}.html")
        assert [item["item_id"] for item in shown["items"]] == order and shown["rater"] == rater
        assert shown["rules"] == PROMPT.rules and shown["prompt"] == "isr-judge/1"       # the question to models
    arms = [items(study)[name]["arm"] for name in orders["ann"]]
    assert arms != sorted(arms)


def test_the_key_says_what_every_item_is(study, tmp_path):
    samples = {(s.arm, s.sample_id): s for s in read_edits(tmp_path / "edits.jsonl")}
    known = items(study)
    assert len(known) == 27 and tuple(next(iter(known.values()))) == ratings.ITEMS
    for row in known.values():
        files = [study / "sheet" / row[name] for name in ("original_file", "edited_file")]
        original, edited = (picture_sha256(Image.open(file)) for file in files)
        assert (original, edited) == (row["original_sha256"], row["edited_sha256"])
        if row["is_attention"] == "1":
            assert row["arm"] == "attention" and original == edited
            continue
        sample = samples.pop((row["arm"], row["sample_id"]))
        assert edited == picture_sha256(Image.open(sample.edited)) and float(row["weight"]) == 1
        assert row["edit_prompt"] == f"'{sample.prompt}"     # no spreadsheet takes it for a formula
    assert not samples


def test_a_seed_makes_the_same_study_and_a_drawn_one_is_kept(tmp_path):
    samples = read_edits(make_manifest(tmp_path, 4, ARMS[:2]))

    def keep(name, seed):
        made = ratings.export(samples, tmp_path / name, ["ann"], PROMPT, items=8, attention=1, seed=seed)
        assert json.loads((tmp_path / name / "keep/study.json").read_text()) == made
        return (tmp_path / name / "keep/study_items.csv").read_bytes(), made["seed"]
    assert keep("a", 7) == keep("b", 7) != keep("c", 8)
    drawn = keep("d", None)
    assert drawn[1] != keep("e", None)[1] and drawn[0] == keep("f", drawn[1])[0]


def test_a_draw_has_every_kind_and_keeps_the_proportions():
    rng = random.Random(3)
    for _ in range(200):
        sizes = {f"arm{i}": rng.randint(1, 40) for i in range(rng.randint(1, 12))}
        samples = [EditFile(f"{arm}-{i}", f"i{i}", "p", arm, "p", Path("x"), Path("y"), {"category": "c"})
                   for arm, size in sizes.items() for i in range(size)]
        wanted = rng.randint(len(sizes), len(samples) + 5)
        drawn = ratings.draw(samples, wanted, rng)
        assert len(drawn) == len({sample.sample_id for sample, _, _ in drawn}) == min(wanted, len(samples))
        counts = Counter(sample.arm for sample, _, _ in drawn)
        assert counts.keys() == sizes.keys()
        exact = {arm: len(drawn) * size / len(samples) for arm, size in sizes.items()}
        if min(exact.values()) >= 1:
            assert all(abs(counts[arm] - exact[arm]) < 1 for arm in sizes)
        assert sum(weight for _, _, weight in drawn) == pytest.approx(len(samples))
    with pytest.raises(ValueError, match="3 items are fewer than the 4 kinds"):
        ratings.draw([EditFile("a", "i", "p", arm, "p", Path(), Path()) for arm in ARMS], 3, rng)


def test_a_study_is_not_replaced_by_chance(study, tmp_path, capsys):
    make_manifest(tmp_path, 3)
    call = ["export-sheet", str(tmp_path / "edits.jsonl"), "-o", str(study), "--raters", "ann"]
    before = (study / "keep/study_items.csv").read_bytes()
    assert judge.main(call) == 1 and "--overwrite replaces it" in capsys.readouterr().err
    assert (study / "keep/study_items.csv").read_bytes() == before
    assert judge.main([*call, "--overwrite", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["items"] == 12


@pytest.mark.parametrize("raters, told", [("ann,Ann", "two raters have the same name"), ("../ann", "a pseudonym has letters"),
                                          ("ann smith", "a pseudonym has letters")])
def test_pseudonyms_are_file_names(raters, told, tmp_path, capsys):
    make_manifest(tmp_path, 2)
    assert judge.main(["export-sheet", str(tmp_path / "edits.jsonl"), "-o", str(tmp_path / "x"), "--raters", raters]) == 2
    assert told in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------- the way back

def test_a_sheet_goes_out_and_comes_back(study, tmp_path):
    files = [returned(study, rater, fill_in(study, rater)) for rater in ("ann", "ben")]
    found = ratings.load(study / "keep", files)
    assert len(found.records) == 2 * 24 and found.raters["ann"] == {
        "items": 24, "rated": 24, "attention": 3, "attention_right": 3, "overall_differs": 0}
    for record in found.records:
        assert (record.semantic_mismatch, record.perceptual_degradation) == truth({"is_attention": "0", "arm": record.arm})
        assert record.status == "ok"
    named = {(s.arm, s.sample_id, s.image_id, s.prompt_id) for s in read_edits(tmp_path / "edits.jsonl")}
    assert {(r.arm, r.sample_id, r.image_id, r.prompt_id) for r in found.records} == named       # pairs with models' records
    merged = study.parent / "merged.csv"
    merged.write_text(found.csv, encoding="utf-8", newline="")
    assert tuple(found.csv.split("\n")[0].split(",")) == ratings.RATINGS
    assert ratings.load(study / "keep", [merged]).records == found.records


def test_blank_ratings_are_missing_and_differences_counted(study):
    def change(row, item):
        if item["is_attention"] == "1":
            row["perceptual_degradation"] = 1
        if item["arm"] == "control":
            row |= {"semantic_mismatch": "", "perceptual_degradation": "", "immunization_success": ""}
        if item["arm"] == "noise":
            row |= {"perceptual_degradation": ""}
        if item["arm"] == "sifm":
            row["immunization_success"] = 0
    found = ratings.load(study / "keep", [returned(study, "ann", fill_in(study, "ann", change))])
    assert found.raters == {"ann": {"items": 24, "rated": 12, "attention": 3, "attention_right": 0, "overall_differs": 6}}
    said = {record.arm: (record.semantic_mismatch, record.perceptual_degradation, record.status) for record in found.records}
    assert said == {"control": (None, None, "not_rated"), "noise": (False, None, "ok"), "sifm": (True, True, "ok"),
                    "photoguard-encoder": (False, False, "ok")}


def test_comments_survive_and_never_compute(study):
    comments = ["=1+1", "+", "-x", "@a", "'quoted", "plain, \"and\"\nmore", "\tx", ""]

    def change(row, item):
        row["comment"] = ratings._table(["c"], [{"c": comments[int(item["sample_id"][1:])]}]).split("\n", 1)[1].strip("\n")
        row["comment"] = next(csv.reader(io.StringIO(row["comment"])), [""])[0]
    found = ratings.load(study / "keep", [returned(study, "ann", fill_in(study, "ann", change))])
    rows = list(csv.DictReader(io.StringIO(found.csv)))
    assert {row["comment"] for row in rows} >= {"'=1+1", "'+", "'-x", "'@a", "''quoted"}
    assert not any(row["comment"][:1] in ("=", "+", "-", "@", "\t") for row in rows if row["comment"])


@pytest.mark.parametrize("damage, told", [
    (lambda text: text.replace("item_id", "item", 1), "has the column 'item', which is none of"),
    (lambda text: text.replace(",", ";"), "separate the columns by commas"),
    (lambda text: re.sub(r",1,0,1", ",2,0,1", text, count=1), "semantic_mismatch is '2'; write 1 for yes"),
    (lambda text: re.sub(r",1,0,1", ",yes,0,1", text, count=1), "semantic_mismatch is 'yes'"),
    (lambda text: text + text.splitlines()[1] + "\n", "has rated item .* before"),
    (lambda text: text.replace(text.splitlines()[1][:10], "0123456789"), "item '0123456789' is not of this study"),
    (lambda text: text.replace(",ann,", ",bob,"), "rater 'bob' is not of this study; there are ann, ben"),
    (lambda text: text.replace("isr-judge/1", "isr-judge/0"), "was rated by the rules 'isr-judge/0'"),
    (lambda text: text + "x,y\n", "has 2 fields"),
    (lambda text: text.split("\n")[0] + "\n", "no row was rated"),
    (lambda text: "", "has no column item_id"),
    (lambda text: text.replace("rater_id", "item_id", 1), "has no column rater_id|has a column twice"),
    (lambda text: text + '"', "is no CSV"),
])
def test_a_table_that_is_wrong_is_refused_in_one_sentence(damage, told, study, capsys):
    path = returned(study, "ann", damage(fill_in(study, "ann")))
    with pytest.raises(ValueError, match=told):
        ratings.load(study / "keep", [path])
    assert judge.main(["import-ratings", str(study / "keep"), str(path), "-o", str(study / "people")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1 and not list((study / "people").iterdir())


def test_other_files_are_refused_too(study, tmp_path):
    for keep, files in ((tmp_path, [study / "sheet/ann.csv"]), (study / "keep", [tmp_path / "absent.csv"]),
                        (study / "keep", [tmp_path / "original0.png"]), (study / "keep", [tmp_path])):
        with pytest.raises(ValueError):
            ratings.load(keep, files)


def test_table_one_of_people_and_models(study, tmp_path, capsys):
    """import-ratings and a folder of model verdicts, through `consistency`, give what consistency gives."""
    def ben(row, item):
        if item["sample_id"] == "s0" and item["is_attention"] == "0":
            row["perceptual_degradation"] = 1
    files = [returned(study, "ann", fill_in(study, "ann")), returned(study, "ben", fill_in(study, "ben", ben))]
    people, models = tmp_path / "people", tmp_path / "models"
    assert judge.main(["import-ratings", str(study / "keep"), *map(str, files), "-o", str(people)]) == 0
    told = capsys.readouterr()
    assert "ben: 24 of 24 items rated, 3 of 3 attention items right; 2 overall answers differ" in told.err
    assert "sifm, own: ISR 100.0 %" in told.out and "beside the clean edits (3 pairs)" in told.out
    models.mkdir()
    said = [Record(s.sample_id, s.image_id, s.prompt_id, s.arm, model, s.arm == "sifm", False)
            for s in read_edits(tmp_path / "edits.jsonl") for model in ("one", "two")]
    (models / "records.jsonl").write_text("".join(json.dumps(vars(record)) + "\n" for record in said))
    (models / "run.json").write_text(json.dumps({"kind": "models", "state": "ended"}))
    assert judge.main(["consistency", str(people), str(models), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    rated = ratings.load(study / "keep", files).records
    expected = consistency([*rated, *said], people=["ann", "ben"], models=["one", "two"])
    assert found["success"].keys() == expected["success"].keys() == {
        "people", "models", "people to models", "majority to consensus"}
    assert found["success"]["people"]["observed"]["value"] == expected["success"]["people"].observed.value < 1
    assert found["semantic_mismatch"]["people to models"]["observed"]["value"] == pytest.approx(18 / 24)
    assert judge.main(["consistency", str(people), str(models)]) == 0
    assert "majority to consensus:" in capsys.readouterr().out
    assert judge.main(["show", str(people)]) == 0 and capsys.readouterr().out == told.out


# ------------------------------------------------------------------------------------------------------------- the page

def test_the_page_loads_nothing_and_its_script_parses(study, tmp_path):
    text = (study / "sheet/ann.html").read_text(encoding="utf-8")
    assert not re.search(r"https?:|//[\w.]+/|\bfetch\(|XMLHttpRequest|<link|\bimport\b", text)
    assert "default-src 'none'" in text and "{{" not in text
    data, script = re.findall(r"<script[^>]*>(.*?)</script>", text, re.S)
    assert "<" not in data                                   # a prompt cannot end the script
    if not shutil.which("node"):
        pytest.skip("node is not here to parse the page's script")
    (tmp_path / "page.js").write_text(script, encoding="utf-8")
    subprocess.run(["node", "--check", str(tmp_path / "page.js")], check=True)


def test_a_sheet_rated_by_keys_in_a_browser(tmp_path):
    if not browser.find():
        pytest.skip("no Chromium here (on the PATH, or named by CHROMIUM)")
    samples = read_edits(make_manifest(tmp_path, 2, ("control", "sifm")))
    study, downloads = tmp_path / "study", tmp_path / "downloads"
    ratings.export(samples, study, ["ann"], PROMPT, items=4, attention=1, seed=1)
    known = items(study)
    order = [row["item_id"] for row in table(study / "sheet/ann.csv")]
    with browser.Browser(downloads) as chrome:
        chrome.open((study / "sheet/ann.html").as_uri())
        loaded = "[...document.images].map(i => i.complete && i.naturalWidth)"
        for i, name in enumerate(order[:3]):
            shown = chrome.run("[place.textContent, original.getAttribute('src'), edited.getAttribute('src'), "
                               "document.getElementById('prompt').textContent]")
            row = known[name]
            assert shown == [f"{i + 1} of 5", row["original_file"], row["edited_file"], f"“{row['edit_prompt'][1:]}”"]
            chrome.run("Promise.all([...document.images].map(i => i.decode()))")
            assert chrome.run(loaded) == [24, 24]
            mismatch, degradation = truth(row)
            chrome.press("y" if mismatch else "n", "y" if degradation else "n", "n")
        chrome.press("ArrowLeft")                            # back to the third: correct its second answer, then clear it
        assert chrome.run("place.textContent") == "3 of 5"
        pressed = "[...document.querySelectorAll('[aria-pressed=true]')].length"
        assert chrome.run(pressed) == 3
        chrome.press("ArrowDown", "Backspace")
        assert chrome.run(pressed) == 2 and chrome.run("document.getElementById('count').textContent") == "2 rated"
        chrome.press("c", "=", "y", ",", "\"", "Escape", "ArrowRight", "ArrowRight")    # a comment's keys answer nothing
        chrome.run("document.querySelectorAll('.question')[1].querySelector('button').click()")   # with the mouse: yes
        chrome.open((study / "sheet/ann.html").as_uri())     # what was rated is still there, and the first open item is shown
        assert chrome.run("['place', 'count'].map(id => document.getElementById(id).textContent)") == ["3 of 5", "2 rated"]
        chrome.press("d")
        chrome.wait_for("Browser.downloadProgress", state="completed")
        asked = [event["params"]["request"]["url"] for event in chrome.events if event["method"] == "Network.requestWillBeSent"]
        assert asked and all(url.startswith(("file:", "blob:", "about:")) for url in asked)
        errors = [event for event in chrome.events if event["method"] in ("Runtime.exceptionThrown", "Log.entryAdded")]
        assert not errors
    rows = table(downloads / "ann.csv")
    assert [row["item_id"] for row in rows] == order and tuple(rows[0]) == ratings.RATINGS
    said = [(row["semantic_mismatch"], row["perceptual_degradation"], row["immunization_success"]) for row in rows]
    expected = [(*(str(int(value)) for value in truth(known[name])), "0") for name in order[:3]]
    assert said == [*expected[:2], (expected[2][0], "", "0"), ("", "", ""), ("", "1", "")]
    assert rows[2]["comment"] == "'=y,\"" and {row["instructions_version"] for row in rows} == {"isr-judge/1"}
    assert all(float(row["seconds"]) >= 0 and time.strptime(row["rated_at_utc"], "%Y-%m-%dT%H:%M:%SZ") for row in rows[:3])
    found = ratings.load(study / "keep", [downloads / "ann.csv"])
    assert found.raters["ann"]["items"] == 4
