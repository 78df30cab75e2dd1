"""The photographs that ship: whole, free, packaged, and none of them a training picture; and a user's folder."""

import configparser
import hashlib
import io
import json
import re
from collections import Counter
from pathlib import Path

import pytest
from photographs import photo
from PIL import Image

from sifm_min.files.digests import bits_apart, difference_hash
from sifm_min.miniature import photographs

ROOT = Path(__file__).resolve().parents[2]
PHOTOSET = ROOT.parent / "shared" / "data" / "photoset"
FREE = {"CC0-1.0": "CC0", "public domain": "public domain", "CC-BY-2.0": "creativecommons.org/licenses/by/2.0",
        "CC-BY-4.0": "CC-BY-4.0"}                            # licence -> the words of its quote
LINES = (photographs.SHIPPED / "ATTRIBUTIONS.jsonl").read_text(encoding="utf-8").splitlines()
ROWS = [json.loads(line) for line in LINES]


def listed(folder, *rows):
    """A folder with the pictures of these rows and a LICENSES.jsonl."""
    for row in rows:
        if "/" not in row.get("file", "/"):
            photo(folder / row["file"])
    (folder / "LICENSES.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_shipped_files_are_those_that_are_listed():
    files = {path.name for path in photographs.SHIPPED.iterdir()} - {"ATTRIBUTIONS.jsonl"}
    assert files == {row["file"] for row in ROWS} and len(ROWS) == len(files)
    for row in ROWS:
        assert hashlib.sha256((photographs.SHIPPED / row["file"]).read_bytes()).hexdigest() == row["sha256"], row["file"]


def test_shipped_files_are_small_plain_jpegs():
    assert sum(path.stat().st_size for path in photographs.SHIPPED.iterdir()) < 2.5e6
    for row in ROWS:
        image = Image.open(photographs.SHIPPED / row["file"])
        assert image.format == "JPEG" and image.mode == "RGB" and max(image.size) <= 640 and min(image.size) >= 360
        assert not image.getexif() and image.info.keys() <= {"jfif", "jfif_version", "jfif_unit", "jfif_density"}, row["file"]


def test_shipped_photographs_fill_three_categories():
    found = photographs.shipped()
    counts = Counter(photograph.category for photograph in found)
    assert set(counts) == set(photographs.CATEGORIES) and min(counts.values()) >= 4 and len(found) >= 16
    first = found[0]
    assert (first.name, first.title, first.licence) == ("tourist.jpg", "Tourist photographing a building", "CC0-1.0")
    assert first.read().size == (640, 427) and first.read().mode == "RGB"


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["file"])
def test_shipped_licence_is_free_and_quoted(row):
    assert FREE[row["licence"]].lower() in row["licence_quote"].lower()
    assert row["licence"].startswith(("CC0", "public")) or row["author"], "this licence asks for the author's name"
    assert re.fullmatch(r"(pypi|debian):[a-z0-9.-]+==[^=]+:[^:]+\.(jpg|webp)", row["source"])
    assert re.fullmatch(r"[0-9a-f]{64}", row["original_sha256"]) and row["changed"] and row["title"]


def test_shipped_photographs_are_no_training_pictures():
    if not PHOTOSET.is_dir():
        pytest.skip("the training photographs, ../shared/data/photoset, are not here")
    ours = {photograph.name: photograph.read() for photograph in photographs.shipped()}
    ours |= {f"{name} mirrored": image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for name, image in ours.items()}
    hashes = {name: difference_hash(image) for name, image in ours.items()}
    again = io.BytesIO()                                     # the hash finds a picture again: half as large, recompressed
    ours["bridge.jpg"].resize((320, 234)).save(again, "JPEG", quality=50)
    assert bits_apart(difference_hash(Image.open(again)), hashes["bridge.jpg"]) < 10
    for known in photographs.of_folder(PHOTOSET, use=None):
        image = Image.open(known.path)
        image.draft("L", (64, 64))                           # decoded small, which is quick
        theirs = difference_hash(image)
        near = [name for name, bits in hashes.items() if bits_apart(bits, theirs) < 40]
        assert not near, f"{known.name} is {near}"


def test_shipped_photographs_are_packaged():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    patterns = setup["options.package_data"]["sifm_min.models"].split(", ")
    packaged = {path for pattern in patterns for path in (ROOT / "models").glob(pattern)}
    assert {photograph.path for photograph in photographs.shipped()} <= packaged
    assert photographs.SHIPPED / "ATTRIBUTIONS.jsonl" in packaged


# -------------------------------------------------------------------------------------------------------- a user's folder

def test_folder_has_the_photographs_of_its_use(tmp_path):
    rows = [{"file": "a.png", "category": "people", "author": "Ann", "licence": "CC0"}, {"file": "b.png", "use": "train"},
            {"file": "c.png", "category": "artworks", "use": "evaluate"}]
    folder = listed(tmp_path, *rows)
    photo(folder / "not-listed.png")
    found = photographs.of_folder(folder)
    assert [(one.name, one.category, one.author) for one in found] == [("a.png", "people", "Ann"), ("c.png", "artworks", None)]
    assert [(one.name, one.category) for one in photographs.of_folder(folder, "train")] == [("b.png", "photograph")]
    assert [one.name for one in photographs.of_folder(folder, None)] == ["a.png", "b.png", "c.png"]


def test_folder_may_have_its_list_elsewhere(tmp_path):
    folder = listed(tmp_path / "photos", {"file": "a.png"}, {"file": "b.png"})
    (tmp_path / "chosen.jsonl").write_text('{"file": "b.png", "category": "landscapes"}\n')
    assert [(one.path, one.category) for one in photographs.of_folder(folder, notes=tmp_path / "chosen.jsonl")] == [
        (folder / "b.png", "landscapes")]


def test_folder_without_a_list_has_all_its_pictures(tmp_path):
    image = photo(tmp_path / "b.png")
    photo(tmp_path / "a.jpg")
    (tmp_path / "notes.txt").write_text("no picture")
    found = photographs.of_folder(tmp_path)
    assert [(one.name, one.category) for one in found] == [("a.jpg", "photograph"), ("b.png", "photograph")]
    assert found[1].read().tobytes() == image.tobytes()


@pytest.mark.parametrize("line, sentence", [
    ('{"file": "gone.png"}', "line 2: there is no file .*gone.png"),
    ('{"file": "../a.png"}', "line 2: ../a.png is outside the folder"),
    ('{"file": "a.png"}', "line 2: a.png is listed twice"),
    ('{"category": "people"}', 'line 2: needs an object with "file"'),
    ("[1]", 'line 2: needs an object with "file"'),
    ('{"file": "b.png", "category": "cats"}', "line 2: the category 'cats' is none of people, landscapes, artworks"),
    ('{"file": "b.png"', "line 2: is no JSON"),
])
def test_folder_list_that_is_wrong_names_its_line(line, sentence, tmp_path):
    folder = listed(tmp_path / "photos", {"file": "a.png"})
    photo(tmp_path / "a.png"), photo(folder / "b.png")
    with (folder / "LICENSES.jsonl").open("a") as notes:
        notes.write(line + "\n")
    with pytest.raises(ValueError, match=sentence):
        photographs.of_folder(folder)


def test_folder_that_has_no_photograph_is_refused(tmp_path):
    with pytest.raises(ValueError, match="gone: no such folder of photographs"):
        photographs.of_folder(tmp_path / "gone")
    with pytest.raises(ValueError, match="no pictures in this folder"):
        photographs.of_folder(tmp_path)
    with pytest.raises(ValueError, match="lists no photograph for the use 'train'"):
        photographs.of_folder(listed(tmp_path, {"file": "a.png"}), "train")
