"""Manifests, and the tool that makes them: against a rows server of our own that misbehaves, and a fake model."""

import hashlib
import importlib.util
import io
import json
import os
import signal
import time
from collections import Counter
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import fake_gemini
import pytest
from local_server import Answers, LocalServer
from PIL import Image

from sifm_min import images, miniature
from sifm_min.experiments import manifest
from sifm_min.miniature import photographs, pictures
from sifm_min.miniature.kinds import KINDS

source = Path(__file__).resolve().parents[2] / "tools" / "make_manifest.py"
spec = importlib.util.spec_from_file_location("make_manifest", source)
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)

CAPTIONS = {"portrait": "A woman with a red hat, number {}", "landscape": "Mountains at dawn, number {}",
            "artwork": "Oil painting of a woman, number {}", None: "A red car, number {}"}


def encoded(number, format="JPEG"):
    file = io.BytesIO()
    Image.new("RGB", (24, 16), (number % 256, 255 - number % 256, 90)).save(file, format)
    return file.getvalue()


# -------------------------------------------------------------------------------------------------------------- the server

class Rows(LocalServer):
    """The rows endpoint and the pictures it points to. `faults[part]`, for paths (with query) that contain it, is a list of
    functions (handler) -> True if it answered; the last one repeats, and None stands for a sound answer."""

    def __init__(self, total=250):
        super().__init__(Handler)
        self.total, self.log, self.faults = total, [], {}
        self.rows, self.headers = [self.row(number) for number in range(total)], []

    def row(self, number):
        category = ["portrait", "landscape", "artwork", None][number * 7 % 4]
        caption = CAPTIONS[category].format(number)
        return {"original_prompt": caption, "edit_prompt": f"make it snow, {number}", "edited_prompt": f"{caption}, in snow",
                "original_image": {"src": f"{self.url}/pictures/{number}?Signature=x", "height": 16, "width": 24},
                "edited_image": {"src": f"{self.url}/other/{number}", "height": 16, "width": 24}}

    def pages(self):
        return [path for path in self.log if "length=100" in path]

    def fetched(self):
        return [path for path in self.log if path.startswith("/pictures/")]


class Handler(Answers):
    def do_GET(self):
        self.server.log.append(self.path)
        self.server.headers.append(dict(self.headers))
        for part, steps in self.server.faults.items():
            if part in self.path:
                step = steps.pop(0) if len(steps) > 1 else steps[0]
                if step and step(self):
                    return None
        path, query = urlsplit(self.path).path, parse_qs(urlsplit(self.path).query)
        if path != "/rows":
            return self.reply(200, encoded(int(path.split("/")[2])))
        offset, length = int(query["offset"][0]), int(query["length"][0])
        if length > 100:
            return self.reply(422, b'{"error":"Parameter \'length\' must not be greater than 100"}')
        rows = [{"row_idx": number, "row": row, "truncated_cells": []}
                for number, row in enumerate(self.server.rows)][offset:offset + length]
        body = {"features": [], "rows": rows, "num_rows_total": self.server.total, "num_rows_per_page": 100, "partial": False}
        return self.reply(200, json.dumps(body).encode())


def answers(code, body=b"", **headers):
    return lambda handler: handler.reply(code, body, **headers)


def cuts(handler):
    """Announce more than is sent."""
    handler.close_connection = True
    return handler.reply(200, b'{"rows": [', Content_Length=5000)


def hangs_up(handler):
    return handler.hang_up()


def changes(**cells):
    """Answers with the row asked for, some of its cells changed; None takes a cell away."""
    def answer(handler):
        number = int(parse_qs(urlsplit(handler.path).query)["offset"][0])
        row = {key: value for key, value in {**handler.server.rows[number], **cells}.items() if value is not None}
        body = {"rows": [{"row_idx": number, "row": row}], "num_rows_total": handler.server.total}
        return handler.reply(200, json.dumps(body).encode())
    return answer


@pytest.fixture
def server():
    with Rows() as running:
        yield running


@pytest.fixture
def waits(monkeypatch):
    """Replace sleep: the list of the seconds that were asked for."""
    asked = []
    monkeypatch.setattr(tool.Server.__init__, "__kwdefaults__", None)
    monkeypatch.setattr(tool.Server.__init__, "__defaults__", (asked.append,))
    return asked


SMALL = "portrait=4,landscape=3,artwork=2"


def make(server, folder, *more, composition=SMALL):
    chosen = ["--composition", composition] if composition else []
    return tool.main(["dataset", "-o", str(folder), "--server", server.url, "--quiet", *chosen, *more])


def lines_told(capsys):
    """The lines of stderr; there is no traceback, and one line for each fault."""
    text = capsys.readouterr().err
    assert "Traceback" not in text
    return text


# ------------------------------------------------------------------------------------------------------------- the dataset

@pytest.mark.slow
def test_a_set_has_its_composition_and_its_sources(server, tmp_path, capsys):
    assert make(server, tmp_path) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'manifest.jsonl'}\n"
    items = manifest.read_manifest(tmp_path)
    assert Counter(item.category for item in items) == {"portrait": 4, "landscape": 3, "artwork": 2}
    for item in items:
        number = item.origin["row"]
        row = server.rows[number]
        assert (item.prompt, item.caption) == (row["edit_prompt"], row["edited_prompt"])
        assert item.path.read_bytes() == encoded(number), "the original picture, as it came"
        assert item.sha256 == hashlib.sha256(encoded(number)).hexdigest()
        assert row["original_prompt"].startswith(CAPTIONS[item.category][:8])
        assert item.id == f"train-{number:06d}" and item.unseen_prompts == ()
        assert item.origin["dataset"] == "timbrooks/instructpix2pix-clip-filtered"
    assert len(server.fetched()) == 9 and not any("/other/" in path for path in server.log)
    assert not any({"Authorization", "Cookie"} & set(headers) for headers in server.headers)
    assert {path.name for path in tmp_path.iterdir()} == {"images", "manifest.jsonl", "selection.json"}


@pytest.mark.slow
def test_the_papers_composition_is_the_default(tmp_path):
    with Rows(total=1700) as server:
        assert make(server, tmp_path, "--review", composition=None) == 0
        rows = json.loads((tmp_path / "selection.json").read_text())["rows"]
        assert Counter(row["category"] for row in rows) == {"portrait": 35, "landscape": 35, "artwork": 30}
        assert max(Counter((row["category"], row["row"] // 100) for row in rows).values()) <= tool.PER_PAGE
        assert not server.fetched(), "--review fetches nothing"


@pytest.mark.slow
def test_the_same_command_again_asks_for_nothing(server, tmp_path):
    assert make(server, tmp_path) == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    server.log.clear()
    assert make(server, tmp_path) == 0
    assert server.log == [] and before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_the_seed_alone_decides_which_rows(server, tmp_path):
    chosen = []
    for folder, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        assert make(server, tmp_path / folder, "--review", "--seed", seed) == 0
        chosen.append([row["row"] for row in json.loads((tmp_path / folder / "selection.json").read_text())["rows"]])
    assert chosen[0] == chosen[1] != chosen[2]


@pytest.mark.slow
def test_a_person_corrects_a_category_and_rejects_a_row(server, tmp_path, capsys):
    make(server, tmp_path, "--review")
    path = tmp_path / "selection.json"
    given = json.loads(path.read_text())
    assert all(row["matched"].lower() in row["caption"].lower() for row in given["rows"])
    lines = path.read_text().splitlines()
    assert sum('"row": ' in line for line in lines) == 9, "one line for each row"
    rejected, moved = [row for row in given["rows"] if row["category"] == "portrait"][:2]
    text = path.read_text()
    for row, category in ((rejected, "reject"), (moved, "artwork")):
        was = json.dumps(row)
        assert was in text
        text = text.replace(was, json.dumps({**row, "category": category}))
    path.write_text(text)
    assert make(server, tmp_path, composition=None) == 0
    items = {item.origin["row"]: item for item in manifest.read_manifest(tmp_path)}
    assert Counter(item.category for item in items.values()) == {"portrait": 4, "landscape": 3, "artwork": 2}
    assert rejected["row"] not in items and items[moved["row"]].category == "artwork"


@pytest.mark.slow
def test_an_interrupted_run_goes_on_where_it_was(server, tmp_path, monkeypatch):
    make(server, tmp_path, "--review")
    rows = [row["row"] for row in json.loads((tmp_path / "selection.json").read_text())["rows"]]
    pages = len(server.pages())
    fetch = tool.fetch

    def interrupted(row, *rest):
        if row["row"] == rows[5]:
            raise KeyboardInterrupt
        return fetch(row, *rest)

    with monkeypatch.context() as here:
        here.setattr(tool, "fetch", interrupted)
        assert make(server, tmp_path, composition=None) == 130
    assert not (tmp_path / "manifest.jsonl").exists() and len(server.fetched()) == 5
    (tmp_path / "images" / f"train-{rows[0]:06d}.jpg").write_bytes(b"damaged since")
    assert make(server, tmp_path, composition=None) == 0
    assert Counter(int(path.split("/")[2].split("?")[0]) for path in server.fetched()) == {
        **dict.fromkeys(rows, 1), rows[0]: 2}
    assert len(server.pages()) == pages, "chosen rows are not chosen again"
    assert len(manifest.read_manifest(tmp_path)) == 9 and all(item.picture() for item in manifest.read_manifest(tmp_path))


@pytest.mark.slow
def test_a_published_selection_gives_the_same_set_or_says_so(server, tmp_path, capsys):
    make(server, tmp_path / "mine")
    (tmp_path / "yours").mkdir()
    (tmp_path / "yours" / "selection.json").write_text((tmp_path / "mine" / "selection.json").read_text())
    number = json.loads((tmp_path / "mine" / "selection.json").read_text())["rows"][0]["row"]
    server.faults[f"/pictures/{number}?"] = [answers(200, encoded(3, "PNG"))]
    assert make(server, tmp_path / "yours", composition=None) == 1
    assert f"row {number}: the picture is not the one of selection.json (its sha256 differs)" in lines_told(capsys)
    server.faults.clear()
    assert make(server, tmp_path / "yours", composition=None) == 0
    assert (tmp_path / "yours" / "manifest.jsonl").read_bytes() == (tmp_path / "mine" / "manifest.jsonl").read_bytes()


STUMBLES = {
    "limit": [answers(429, b"slow down", Retry_After="7")], "overload": [answers(503)], "cut": [cuts],
    "connection": [hangs_up],
}


@pytest.mark.slow
@pytest.mark.parametrize("part", ["/rows", "/pictures/"])
@pytest.mark.parametrize("stumble", STUMBLES)
def test_passing_faults_of_a_server_are_waited_for(server, tmp_path, waits, stumble, part, capsys):
    server.faults[part] = [*STUMBLES[stumble], *STUMBLES[stumble], None]
    assert make(server, tmp_path) == 0
    assert len(waits) == 2 and waits[1] >= waits[0] and (stumble != "limit" or waits == [7.0, 7.0])
    assert lines_told(capsys) == ""


def test_a_wait_is_told_in_a_sentence(server, tmp_path, waits, capsys):
    server.faults["/rows"] = [answers(429, Retry_After="600"), None]
    assert tool.main(["dataset", "-o", str(tmp_path), "--server", server.url, "--review", "--composition", SMALL]) == 0
    assert "rows from 0 on: the server's limit of requests is reached; trying again in 120 s" in lines_told(capsys)
    assert waits == [120]


@pytest.mark.slow
def test_a_server_that_is_gone_ends_the_run_and_loses_nothing(server, tmp_path, waits, capsys):
    server.faults["length=100"] = [None, answers(502)]
    assert make(server, tmp_path) == 3
    assert "502, 5 times; run the same command again later, it goes on from here" in lines_told(capsys)
    kept = json.loads((tmp_path / "selection.json").read_text())
    assert kept["pages"] == 1 and kept["rows"]
    server.faults = {"/pictures/": [hangs_up]}
    assert make(server, tmp_path) == 3
    assert len(server.fetched()) == tool.LOST * tool.TRIES, "three pictures were tried, not nine"
    server.faults.clear()
    assert make(server, tmp_path) == 0


def test_address_without_a_server(tmp_path, waits, capsys):
    assert tool.main(["dataset", "-o", str(tmp_path), "--server", "http://127.0.0.1:9", "--quiet"]) == 3
    assert "the connection failed, 5 times" in lines_told(capsys)


BROKEN_PAGES = {
    "no such dataset": (answers(404, b'{"error":"The dataset does not exist."}'), "404 (The dataset does not exist.)"),
    "login page": (answers(200, b"<html>Please log in</html>"), "something else than rows: <html>Please log in</html>"),
    "a list": (answers(200, b"[]"), "something else than rows: []"),
    "empty": (answers(200, b""), "something else than rows: nothing"),
    "deep": (answers(200, b"[" * 100_000), "something else than rows: [[["),
    "no rows": (answers(200, b'{"rows": [], "num_rows_total": 9}'), "gave no rows from"),
    "other rows": (answers(200, b'{"rows": [{"row_idx": 5000, "row": {}}], "num_rows_total": 9}'), "other rows than asked for"),
    "other columns": (changes(edit_prompt=None), "has no column edit_prompt; this tool reads datasets made like timbrooks"),
    "binary": (answers(200, b"\xff\xfe\x00\x1b[2J"), "something else than rows:"),
}


@pytest.mark.parametrize("fault, sentence", BROKEN_PAGES.values(), ids=BROKEN_PAGES)
def test_a_page_that_is_none_is_told_in_a_sentence(server, tmp_path, waits, capsys, fault, sentence):
    server.faults["length=100"] = [fault]
    assert make(server, tmp_path) == 2
    text = lines_told(capsys)
    assert sentence in text and text.count("\n") == 1 and "\x1b" not in text
    assert waits == [] and not (tmp_path / "manifest.jsonl").exists()


BROKEN_ROWS = {
    "no address": ("length=1", changes(original_image={"src": None}), "comes without an address"),
    "a file of ours": ("length=1", changes(original_image={"src": "file:///etc/passwd"}), "comes without an address"),
    "no cell": ("length=1", changes(original_image="x"), "comes without an address"),
    "other texts": ("length=1", changes(edit_prompt="make it burn"), "now has other texts than when it was chosen"),
    "gone": ("/pictures/", answers(403, b"<Error>expired</Error>"), "the server answered 403 (<Error>expired</Error>)"),
    "a page": ("/pictures/", answers(200, b"<html>"), "no JPEG, PNG or WebP"),
    "half": ("/pictures/", answers(200, encoded(1)[:300]), "is damaged"),
    "endless": ("/pictures/", answers(200, b"\xff\xd8\xff" + bytes(3000)), "more than 0 MiB came"),
    "loop": ("/pictures/", answers(302, b"", Location="/pictures/1?again"), "TooManyRedirects"),
}


@pytest.mark.slow
@pytest.mark.parametrize("part, fault, sentence", BROKEN_ROWS.values(), ids=BROKEN_ROWS)
def test_a_picture_that_is_none_fails_alone(server, tmp_path, waits, capsys, monkeypatch, part, fault, sentence):
    make(server, tmp_path, "--review")
    row = json.loads((tmp_path / "selection.json").read_text())["rows"][2]["row"]
    where = f"offset={row}&length=1" if part == "length=1" else f"/pictures/{row}?"
    server.faults |= {where: [fault], "?again": [fault]}
    if sentence.startswith("more than"):
        monkeypatch.setattr(tool, "CAP", 2000)
    assert make(server, tmp_path, composition=None) == 1
    text = lines_told(capsys)
    assert sentence in text and "8 of 9 pictures done, 1 failed" in text
    assert "manifest.jsonl was not written, because something is lacking" in text
    assert not (tmp_path / "manifest.jsonl").exists() and len(list((tmp_path / "images").iterdir())) == 8
    assert make(server, tmp_path, "--partial", composition=None) == 1
    assert len(manifest.read_manifest(tmp_path)) == 8


def test_rows_without_texts_and_twins_are_passed_over(tmp_path):
    with Rows(total=60) as server:
        for number, row in enumerate(server.rows):
            if number % 3 == 0:
                row["original_prompt"] = "A woman at a window"
            elif number % 3 == 1:
                row["edit_prompt"] = ["", None, "x" * 301, "tab\there", "\ud800"][number % 5]
        assert make(server, tmp_path, "--review", composition="portrait=3") == 0
        rows = json.loads((tmp_path / "selection.json").read_text())["rows"]
    assert sum(row["caption"] == "A woman at a window" for row in rows) <= 1
    assert all(row["row"] % 3 != 1 for row in rows)


def test_too_few_rows_in_all_the_dataset(tmp_path, capsys):
    with Rows(total=40) as server:
        assert make(server, tmp_path, composition="portrait=50") == 2
    assert "all 40 rows were looked at, and 47 portrait are lacking; widen the rules or ask for less" in lines_told(capsys)


def test_captions_and_their_categories():
    for caption, expected in {
        "Portrait of a woman in the rain": ("portrait", "portrait"), "A WOMAN by the sea": ("portrait", "woman"),
        "Oil painting, portrait of a lady": ("artwork", "painting"), "Lake at sunset": ("landscape", "lake"),
        "A man by a lake": ("portrait", "man"), "Two people on a beach": (None, None), "Manchester": (None, None),
        "Mountain landscape with a couple": (None, None), "Statue of a woman": (None, None), "a red car": (None, None),
    }.items():
        assert tool.category(caption, tool.RULES) == expected, caption


def test_rules_of_ones_own(server, tmp_path, capsys):
    rules = tmp_path / "rules.json"
    rules.write_text('{"car": {"any": ["car"]}}')
    assert make(server, tmp_path / "set", "--rules", str(rules), "--review", composition="car=3") == 0
    kept = json.loads((tmp_path / "set" / "selection.json").read_text())
    assert {row["category"] for row in kept["rows"]} == {"car"} and kept["rules"] == {"car": {"any": ["car"]}}
    assert make(server, tmp_path / "set", composition=None) == 0
    assert make(server, tmp_path / "set", "--seed", "4", composition=None) == 2
    assert "was made with another --seed" in lines_told(capsys)
    assert make(server, tmp_path / "other", "--rules", str(rules), composition="car=3,boat=2") == 2
    assert "no rule says what a boat is" in lines_told(capsys)
    for wrong in ('{"car": ["car"]}', '{"car": {"any": []}}', '{"car": {"any": [1]}}', '{"reject": {"any": ["a"]}}'):
        rules.write_text(wrong)
        assert make(server, tmp_path / "other", "--rules", str(rules), composition="car=3") == 2
        assert "the rules are an object like" in lines_told(capsys)


EDITS = {
    "no json": (lambda text: text[:-9], "is no JSON"),
    "category": (lambda text: text.replace('"category": "portrait"', '"category": "potrait"', 1), "has the category 'potrait'"),
    "a field": (lambda text: text.replace('"prompt"', '"promt"', 1), "is not a row with row, category"),
    "head": (lambda text: text.replace('"pages"', '"page"'), "has no pages"),
    "composition": (lambda text: text.replace('"portrait": 4', '"portrait": "4"'), "the composition is an object like"),
}


@pytest.mark.parametrize("edit, sentence", EDITS.values(), ids=EDITS)
def test_a_selection_that_was_damaged_by_hand(server, tmp_path, capsys, edit, sentence):
    make(server, tmp_path, "--review")
    path = tmp_path / "selection.json"
    path.write_text(edit(path.read_text()))
    assert make(server, tmp_path, composition=None) == 2
    text = lines_told(capsys)
    assert sentence in text and str(path) in text and text.count("\n") == 1


def test_a_dataset_that_grew_since(server, tmp_path, capsys):
    make(server, tmp_path, "--review")
    server.total += 1
    path = tmp_path / "selection.json"
    path.write_text(path.read_text().replace('"category": "portrait"', '"category": "reject"', 1))
    assert make(server, tmp_path, composition=None) == 2
    assert "when the dataset had 250 rows, and now it has 251" in lines_told(capsys)


# ------------------------------------------------------------------------------------------------------- folder and world

@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, name in enumerate(["a b.png", "a-b.png", "été.JPG", "-x.png"]):
        (folder / name).write_bytes(encoded(number, "JPEG" if name.endswith("JPG") else "PNG"))
    return folder


def test_a_folder_with_one_prompt_for_all(photos, tmp_path, capsys):
    command = ["folder", str(photos), "--prompt", "make it night", "--category", "mine", "-o", str(tmp_path / "set")]
    assert tool.main(command) == 0
    items = manifest.read_manifest(tmp_path / "set")
    assert [item.id for item in items] == ["picture-x", "a-b", "a-b-2", "été"]
    assert {(item.prompt, item.category) for item in items} == {("make it night", "mine")}
    for item in items:
        assert item.path.read_bytes() == (photos / item.origin["file"]).read_bytes() and item.picture()
    assert "4 of 4 pictures have no unseen prompts" in lines_told(capsys)
    assert tool.main(command) == 0
    assert tool.main([*command, "--category", "other"]) == 1
    assert "exists; --overwrite replaces it" in lines_told(capsys)
    assert tool.main([*command, "--category", "other", "--overwrite"]) == 0
    (photos / "a b.png").write_bytes(b"\x89PNG no more")
    assert tool.main([*command, "--overwrite"]) == 1
    assert "a b.png" in lines_told(capsys)


def test_prompts_and_unseen_prompts_from_files(photos, tmp_path, capsys):
    prompts, unseen = tmp_path / "prompts.csv", tmp_path / "unseen.json"
    prompts.write_text('\ufeffimage,prompt,caption,category\n"a b.png","make it red, please",a red thing,art\n'
                       'a-b.png,b,,\nété.JPG,c,,\n-x.png,d,,\n', encoding="utf-8")
    unseen.write_text(json.dumps({"a b.png": [{"prompt": f"do {i}", "caption": f"done {i}"} for i in range(5)],
                                  "a-b-2": ["one", "two"]}))
    command = ["folder", str(photos), "--prompts", str(prompts), "--unseen", str(unseen), "-o", str(tmp_path / "set")]
    assert tool.main(command) == 0
    items = {item.origin["file"]: item for item in manifest.read_manifest(tmp_path / "set")}
    assert items["a b.png"].prompts() == ["make it red, please", *(f"do {i}" for i in range(5))]
    assert items["a b.png"].prompts("img2img") == ["a red thing", *(f"done {i}" for i in range(5))]
    assert items["a b.png"].category == "art" and items["été.JPG"].unseen_prompts == ()
    assert items["a-b.png"].unseen_prompts == ("one", "two")
    assert "2 of 4 pictures have no unseen prompts" in lines_told(capsys)
    csv = tmp_path / "unseen.csv"
    csv.write_text("id,prompt\n" + "".join(f"été,do {i}\n" for i in range(5)), encoding="utf-8")
    assert tool.main([*command[:4], "--unseen", str(csv), "-o", str(tmp_path / "set"), "--overwrite"]) == 0
    assert [len(item.unseen_prompts) for item in manifest.read_manifest(tmp_path / "set")] == [0, 0, 0, 5]


FILES = {
    "no head": ("prompts.csv", "a b.png,x\n", "has no column image; its first line names the columns: image, prompt"),
    "a column": ("prompts.csv", "image,prompt,colour\n", "has a column 'colour', which means nothing here"),
    "empty": ("prompts.csv", "image,prompt\na b.png,\n", "line 2: has an empty column"),
    "comma": ("prompts.csv", "image,prompt\na b.png,make, it\n", "line 2: has too many columns; a text with a comma"),
    "twice": ("prompts.csv", "image,prompt\na-b.png,x\na-b.png,y\n", "line 3: a-b.png stands there twice"),
    "typo": ("prompts.json", '{"ab.png": "x"}', "there is no picture ab.png in"),
    "too few": ("prompts.json", '{"a-b.png": "x"}', "has no prompt for -x.png, nor for 2 others"),
    "json": ("prompts.json", "{", "is no JSON"), "list": ("prompts.json", "[]", "holds no JSON object"),
    "object": ("prompts.json", '{"a-b.png": {"promt": "x"}}', "a-b.png has neither a text nor an object with a prompt"),
    "binary": ("prompts.json", b"\xff\xff", "is not UTF-8 text"), "none": ("prompts.json", None, "no such file"),
}


@pytest.mark.parametrize("name, content, sentence", FILES.values(), ids=FILES)
def test_a_prompt_file_that_is_wrong(photos, tmp_path, capsys, name, content, sentence):
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    command = ["folder", str(photos), "--prompts", str(tmp_path / name), "-o", str(tmp_path / "set"), "--quiet"]
    assert tool.main(command) == 2
    text = lines_told(capsys)
    assert sentence in text and name in text and text.count("\n") == 1
    assert not (tmp_path / "set" / "manifest.jsonl").exists()


@pytest.mark.parametrize("content, sentence", [
    ('{"nobody": ["x"]}', "the set has no picture nobody"), ('{"a-b": "x"}', "a-b has no list of texts"),
    ('{"a-b": ["make it night"]}', "a-b has the same prompt twice"),
    ('{"a-b": [{"prompt": "x", "caption": "y"}, "z"]}', "has captions for some of its prompts"),
    ('{"a-b": [{"prompt": "x", "caption": "y"}]}', "has unseen_captions and no caption"),
])
def test_an_unseen_file_that_is_wrong(photos, tmp_path, capsys, content, sentence):
    path = tmp_path / "unseen.json"
    path.write_text(content)
    assert tool.main(["folder", str(photos), "--prompt", "make it night", "--unseen", str(path), "--quiet",
                      "-o", str(tmp_path / "set")]) == 2
    assert sentence in lines_told(capsys)


@pytest.fixture
def small(monkeypatch):
    """Photographs that ship, at 64 pixels."""
    monkeypatch.setattr(pictures, "SIZE", 64)


def test_the_world_makes_its_own_with_exact_results(tmp_path, small):
    assert tool.main(["world", "-n", "3", "--seed", "3", "-o", str(tmp_path)]) == 0
    items = manifest.read_manifest(tmp_path)
    expected = miniature.samples(3, 3)
    assert [item.id for item in items] == [f"{sample.category}-{index:04d}" for index, sample in enumerate(expected)]
    for item, sample in zip(items, expected, strict=True):
        assert item.prompts() == [sample.prompt, *sample.unseen_prompts] and len(item.unseen_prompts) == 5
        assert item.picture().image.tobytes() == sample.image.tobytes()
        assert item.origin["photograph"]["name"] == sample.photograph and item.origin["photograph"]["licence"]
        found = item.sample()
        assert (found.kind, found.option, found.target.tobytes()) == (sample.kind, sample.option, sample.target.tobytes())
        assert [one.target.tobytes() for one in found.unseen] == [one.target.tobytes() for one in sample.unseen]


def test_the_world_takes_photographs_of_a_folder(tmp_path, small):
    (tmp_path / "photos").mkdir()
    photographs.shipped()[0].read().save(tmp_path / "photos" / "mine.png")
    made = ["world", "-n", "1", "--photos", str(tmp_path / "photos"), "--wordings", "train", "-o", str(tmp_path / "set")]
    assert tool.main(made) == 0
    item, = manifest.read_manifest(tmp_path / "set")
    kind, option = item.origin["edits"][0]
    assert item.id == "photograph-0000" and item.origin["photograph"] == {"name": "mine.png"}
    assert item.prompt in KINDS[kind].phrases(option)


# ---------------------------------------------------------------------------------------------- unseen prompts from a model

def written(number=0, **changed):
    data = {"caption_0": f"the picture {number}", **{f"{kind}_{i}": f"{kind} {number}.{i}" for i in range(1, 6)
                                                     for kind in ("instruction", "caption")}} | changed
    return fake_gemini.says(json.dumps(data))


@pytest.fixture
def model(tmp_path, monkeypatch):
    for name in ("GEMINI_API_KEY", "GOOGLE_API_KEY", "JUDGE_KEY"):
        monkeypatch.delenv(name, raising=False)
    with fake_gemini.FakeGemini() as server:
        server.script("gemini-2.5-pro", lambda call: written(len(server.calls)))
        (tmp_path / "judge.json").write_text(json.dumps({
            "provider": "gemini", "model": "gemini-2.5-pro", "base_url": server.base_url("gemini"), "key_env": "JUDGE_KEY"}))
        yield server


def asked(photos, tmp_path, *more):
    return tool.main(["folder", str(photos), "--prompt", "make it night", "-o", str(tmp_path / "set"), "--quiet",
                      "--gemini", str(tmp_path / "judge.json"), *more])


def test_prompts_are_asked_for_on_request_and_with_a_key(photos, tmp_path, model, capsys):
    tool.main(["folder", str(photos), "--prompt", "make it night", "-o", str(tmp_path / "plain")])
    assert model.calls == []
    assert tool.main(["folder", str(photos), "--prompt", "x", "--gemini", "gemini-2.5-pro", "-o", str(tmp_path / "set")]) == 2
    assert "set GEMINI_API_KEY" in lines_told(capsys) and not (tmp_path / "set" / "manifest.jsonl").exists()


def test_five_prompts_a_picture_each_asked_for_once(photos, tmp_path, model, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "a-secret-of-many-letters")
    assert asked(photos, tmp_path) == 0
    items = manifest.read_manifest(tmp_path / "set")
    assert len(model.calls) == 4
    for item in items:
        assert len(set(item.prompts())) == len(item.prompts("img2img")) == 6
        assert item.caption.startswith("the picture")
    for call in model.calls:
        assert "The given instruction: make it night" in call.parts[0] and len(call.pictures) == 1
        assert "five further instructions" in call.body["systemInstruction"]["parts"][0]["text"]
    before = (tmp_path / "set" / "manifest.jsonl").read_bytes()
    assert asked(photos, tmp_path) == 0 and len(model.calls) == 4, "an answer that is there is asked for again"
    assert (tmp_path / "set" / "manifest.jsonl").read_bytes() == before
    assert b"a-secret" not in b"".join(path.read_bytes() for path in (tmp_path / "set").iterdir() if path.is_file())
    (photos / "a-b.png").write_bytes(encoded(77, "PNG"))
    assert asked(photos, tmp_path, "--overwrite") == 0 and len(model.calls) == 5, "only the picture that changed"


def test_a_missing_answer_fails_alone_and_is_asked_for_again(photos, tmp_path, model, monkeypatch, capsys):
    monkeypatch.setenv("JUDGE_KEY", "a-secret-of-many-letters")
    bad = [written(1, instruction_2="instruction 1.1"), written(2, instruction_1="Make it night"),
           fake_gemini.says("I cannot.")]
    model.script("gemini-2.5-pro", lambda call: bad.pop(0) if bad else written(len(model.calls)))
    assert asked(photos, tmp_path) == 1
    text = lines_told(capsys)
    assert text.count("the model gave an instruction twice, or none") == 2 and "was not written" in text
    calls = len(model.calls)
    assert asked(photos, tmp_path) == 0
    assert len(model.calls) <= calls + 3
    assert all(len(item.unseen_prompts) == 5 for item in manifest.read_manifest(tmp_path / "set"))


def test_a_limit_on_the_calls_is_kept(photos, tmp_path, model, monkeypatch, capsys):
    monkeypatch.setenv("JUDGE_KEY", "a-secret-of-many-letters")
    assert asked(photos, tmp_path, "--max-calls", "2", "--partial") == 1
    assert "the limit of 2 calls is reached" in lines_told(capsys) and len(model.calls) == 2
    assert sorted(len(item.unseen_prompts) for item in manifest.read_manifest(tmp_path / "set")) == [0, 0, 5, 5]
    assert asked(photos, tmp_path, "--max-calls", "2", "--partial", "--overwrite") == 1 and len(model.calls) == 2
    assert asked(photos, tmp_path, "--overwrite") == 0 and len(model.calls) == 4


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system kills otherwise")
def test_calls_in_flight_at_a_kill_count_in_the_limits(photos, tmp_path, model, monkeypatch, capsys, forked):
    """One picture is answered and three calls hang: with a limit of six calls, two are left."""
    monkeypatch.setenv("JUDGE_KEY", "a-secret-of-many-letters")
    limit = ("--max-calls", "6", "--partial", "--overwrite")
    model.script("gemini-2.5-pro", lambda call: written(1) if call is model.calls[0] else fake_gemini.after(60, written()))
    command = [str(source), "folder", str(photos), "--prompt", "make it night", "-o", str(tmp_path / "set"),
               "--gemini", str(tmp_path / "judge.json"), *limit]
    child, until = forked.start(*command), time.monotonic() + 60
    journal = tmp_path / "set" / "unseen.jsonl"
    while len(model.calls) < 4 or '"prompts"' not in journal.read_text():
        assert time.monotonic() < until
        time.sleep(0.02)
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait().returncode == -signal.SIGKILL
    model.script("gemini-2.5-pro", lambda call: written(len(model.calls)))
    assert tool.main(command[1:]) == 1 and len(model.calls) == 6
    text = lines_told(capsys)
    assert "3 calls were in flight when the last run ended" in text and "the limit of 6 calls is reached" in text
    assert tool.main(command[1:-len(limit)] + ["--partial", "--overwrite"]) == 0 and len(model.calls) == 7


def test_calls_of_a_journal_without_intents_count_too(photos, tmp_path, model, monkeypatch, capsys):
    monkeypatch.setenv("JUDGE_KEY", "a-secret-of-many-letters")
    assert asked(photos, tmp_path) == 0 and len(model.calls) == 4
    journal = tmp_path / "set" / "unseen.jsonl"
    rows = [row for row in map(json.loads, journal.read_text().splitlines()) if "key" in row]
    for row in rows:                                         # as an earlier version wrote them
        for attempt in row["answer"]["attempts"]:
            del attempt["call"]
    journal.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (photos / "a-b.png").write_bytes(encoded(77, "PNG"))
    assert asked(photos, tmp_path, "--overwrite", "--max-calls", "4") == 1 and len(model.calls) == 4
    assert asked(photos, tmp_path, "--overwrite", "--max-calls", "5") == 0 and len(model.calls) == 5


# ---------------------------------------------------------------------------------------------------------- the manifest file

LINE = {"id": "a", "image": "images/a.png", "category": "portrait", "prompt": "make it night", "unseen_prompts": ["x", "y"],
        "sha256": "0" * 64}


def test_a_manifest_is_read_back_as_it_was_written(tmp_path):
    items = [manifest.Item("a", "a.png", "c", "p", (), "0" * 64),
             manifest.Item("b", "ü/b.png", "c", "line\u2028break", ("x",), "1" * 64, caption="d", unseen_captions=("e",),
                           origin={"row": 3})]
    manifest.write_manifest(tmp_path / "manifest.jsonl", items)
    found = manifest.read_manifest(tmp_path)
    assert [item.to_json() for item in found] == [item.to_json() for item in items]
    assert found[1].path == tmp_path / "ü" / "b.png" and "caption" not in found[0].to_json()
    with pytest.raises(FileExistsError, match="--overwrite"):
        manifest.write_manifest(tmp_path / "manifest.jsonl", items)
    with pytest.raises(ValueError, match="two pictures have the id a"):
        manifest.write_manifest(tmp_path / "new.jsonl", [items[0], items[0]])


@pytest.mark.parametrize("change, sentence", [
    ({"id": "../x"}, r"has the id '../x'"), ({"id": ""}, "has a id that is no text"), ({"sha256": "F" * 64}, "not 64 digits"),
    ({"image": "../../etc/passwd"}, "inside the manifest's folder"), ({"image": "/etc/passwd"}, "inside the manifest's folder"),
    ({"image": "C:\\a.png"}, "inside the manifest's folder"), ({"prompt": "  "}, "has a prompt that is no text"),
    ({"prompt": "x"}, "the same prompt twice"), ({"unseen_prompts": "x"}, "unseen_prompts that are no list of texts"),
    ({"unseen_prompts": ["x", 3]}, "unseen_prompts that are no list of texts"), ({"colour": 1}, "has 'colour', which"),
    ({"category": None}, "has a category that is no text"), ({"origin": []}, "has an origin that is no object"),
    ({"caption": "c", "unseen_captions": ["x"]}, "has 1 unseen_captions for 2 unseen_prompts"),
    ({"unseen_captions": ["x", "y"]}, "has unseen_captions and no caption"), ({"origin": float("nan")}, "the number NaN"),
    ({"prompt": "\ud800"}, "has a prompt that is no text"),
])
def test_a_line_that_is_wrong_is_named(tmp_path, change, sentence):
    path = tmp_path / "manifest.jsonl"
    path.write_text(f"{json.dumps(LINE)}\n\n{json.dumps({**LINE, 'id': 'b', **change})}\n")
    with pytest.raises(ValueError) as error:
        manifest.read_manifest(path)
    assert str(error.value).startswith(f"{path}, line 3: ") and sentence in str(error.value)


@pytest.mark.parametrize("content, sentence", [
    (b'{"id": "a", "id": "b"}', "line 1: has a key twice"), (b"[1]", "line 1: is no JSON object"), (b"{", "line 1: is no JSON"),
    (b"[" * 100_000, "line 1: is no JSON"), (b"\xff\xfe", "is not UTF-8 text"), (b"\n \n", "lists no pictures"),
    (json.dumps({k: v for k, v in LINE.items() if k != "sha256"}).encode(), "line 1: has no sha256"),
    (f"{json.dumps(LINE)}\n{json.dumps(LINE)}".encode(), "line 2: has the id a of line 1"), (None, "no such file"),
])
def test_a_file_that_is_no_manifest(tmp_path, content, sentence):
    if content is not None:
        (tmp_path / "manifest.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=sentence):
        manifest.read_manifest(tmp_path)


def test_a_picture_that_changed_is_gone_or_has_no_captions(tmp_path):
    content = encoded(5, "PNG")
    (tmp_path / "a.png").write_bytes(content)
    line = {**LINE, "image": "a.png", "sha256": hashlib.sha256(content).hexdigest()}
    (tmp_path / "manifest.jsonl").write_text(json.dumps(line))
    item, = manifest.read_manifest(tmp_path)
    assert item.picture().image.tobytes() == images.read(tmp_path / "a.png").image.tobytes()
    with pytest.raises(ValueError, match="a has no captions, and img2img editors are told what the result looks like"):
        item.prompts("img2img")
    with pytest.raises(ValueError, match="a has no exact results"):
        item.sample()
    (tmp_path / "a.png").write_bytes(encoded(6, "PNG"))
    with pytest.raises(ValueError, match="is not the file of the manifest"):
        item.picture()
    (tmp_path / "a.png").unlink()
    with pytest.raises(ValueError, match="no such file"):
        item.picture()


def test_a_sample_whose_prompts_were_changed_has_no_truth(tmp_path, small):
    tool.main(["world", "-n", "1", "-o", str(tmp_path), "--quiet"])
    path = tmp_path / "manifest.jsonl"
    line = json.loads(path.read_text())
    path.write_text(json.dumps(line | {"prompt": "make it better"}))
    with pytest.raises(ValueError, match="'make it better' does not ask for"):
        manifest.read_manifest(path)[0].sample()
    for edits in ([["nights", ""], *line["origin"]["edits"][1:]], line["origin"]["edits"][1:], "night", [[1, 2]] * 6):
        path.write_text(json.dumps(line | {"origin": {"edits": edits}}))
        with pytest.raises(ValueError, match="no edit 'nights'|does not state the edit of each prompt"):
            manifest.read_manifest(path)[0].sample()
