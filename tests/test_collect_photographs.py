"""The tool that makes the photographs that ship anew: from packages, with the right original, cut, size and colours."""

import hashlib
import importlib.util
import io
import json
import re
import shutil
import subprocess
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from photographs import smooth
from PIL import Image, ImageCms

from sifm_min.miniature import photographs
from sifm_min.miniature.kinds import KINDS

source = Path(__file__).resolve().parents[1] / "tools" / "collect_photographs.py"
spec = importlib.util.spec_from_file_location("collect_photographs", source)
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)


def encoded(image, **options):
    """The bytes of a PNG."""
    file = io.BytesIO()
    image.save(file, "PNG", **options)
    return file.getvalue()


def decoded(jpeg):
    return Image.open(io.BytesIO(jpeg))


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A wheel with one picture, and a list of photographs that ship with this one alone."""
    original, folders = encoded(smooth(800, 600)), [tmp_path / name for name in ("packages", "ships", "out")]
    for folder in folders[:2]:
        folder.mkdir()
    with zipfile.ZipFile(folders[0] / "some_thing-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("thing/a.png", original)
    row = {"file": "a.jpg", "source": "pypi:some-thing==1.0:thing/a.png", "crop": [0, 0, 400, 300],
           "original_sha256": hashlib.sha256(original).hexdigest()}
    (folders[1] / "ATTRIBUTIONS.jsonl").write_text(json.dumps(row) + "\n")
    (folders[1] / "a.jpg").write_bytes(tool.made(original, (0, 0, 400, 300)))
    monkeypatch.setattr(photographs, "SHIPPED", folders[1])
    return folders, ["shipped", "--packages", str(folders[0]), "-o", str(folders[2])]


def test_photograph_is_made_from_its_package(package, capsys):
    (_, ships, out), argv = package
    assert tool.main(argv) == 0
    assert capsys.readouterr().out == "1 of 1 photographs are as listed\n"
    assert (out / "a.jpg").read_bytes() == (ships / "a.jpg").read_bytes()


def test_photograph_that_ships_must_be_the_one_made(package, capsys):
    (_, ships, _), argv = package
    (ships / "a.jpg").write_bytes(tool.made(encoded(smooth(400, 300, seed=1))))
    assert tool.main(argv) == 1
    said = capsys.readouterr()
    assert said.out == "0 of 1 photographs are as listed\n" and "a.jpg: the file that ships is another picture" in said.err


def test_original_must_have_its_hash(package, capsys):
    (packages, _, out), argv = package
    with zipfile.ZipFile(packages / "some_thing-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("thing/a.png", encoded(smooth(800, 600, seed=1)))
    assert tool.main(argv) == 1
    assert "a.jpg: some_thing-1.0-py3-none-any.whl has another picture" in capsys.readouterr().err
    assert not (out / "a.jpg").exists()


def test_package_that_cannot_be_fetched_says_where_to_put_it(package, capsys, monkeypatch):
    (packages, *_), argv = package
    (packages / "some_thing-1.0-py3-none-any.whl").unlink()
    monkeypatch.setitem(tool.FETCH, "pypi", (tool.FETCH["pypi"][0], ["sh", "-c", "echo '{name} {version}?' >&2; false"]))
    assert tool.main(argv) == 2
    assert f"(some-thing 1.0?); put its file, some_thing-*.whl, into {packages}" in capsys.readouterr().err


@pytest.mark.skipif(not shutil.which("dpkg-deb"), reason="dpkg-deb, which opens Debian packages, is not here")
def test_original_is_found_in_a_debian_package(tmp_path):
    folder = tmp_path / "thing"
    (folder / "DEBIAN").mkdir(parents=True)
    (folder / "DEBIAN" / "control").write_text(
        "Package: thing\nVersion: 1:1.0\nArchitecture: all\nMaintainer: A <a@example.org>\nDescription: thing\n")
    (folder / "usr").mkdir()
    (folder / "usr" / "a.jpg").write_bytes(b"a picture")
    subprocess.run(["dpkg-deb", "--build", str(folder), str(tmp_path / "thing_1.deb")], check=True, capture_output=True)
    assert tool.originals(tmp_path / "thing_1.deb", {"usr/a.jpg", "usr/gone.jpg"}) == {"usr/a.jpg": b"a picture"}
    assert tool.parts_of("debian:thing==1:1.0:usr/a.jpg") == ("debian", "thing", "1:1.0", "usr/a.jpg")


def test_long_side_is_640_and_small_pictures_keep_their_size():
    assert decoded(tool.made(encoded(smooth(1280, 960)))).size == (640, 480)
    assert decoded(tool.made(encoded(smooth(300, 400)))).size == (300, 400)
    assert decoded(tool.made(encoded(smooth(1280, 960)), (100, 50, 500, 350))).size == (400, 300)


def test_photograph_is_upright_in_srgb_and_without_metadata():
    image, exif = smooth(96, 64), Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "a camera"               # stored lying on its side
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    swapped = srgb.replace(b"rXYZ", b"_XYZ").replace(b"bXYZ", b"rXYZ").replace(b"_XYZ", b"bXYZ")   # its red is sRGB's blue
    found = decoded(tool.made(encoded(image, exif=exif, icc_profile=swapped)))
    assert found.size == (64, 96) and not found.getexif() and "icc_profile" not in found.info
    upright = image.transpose(Image.Transpose.ROTATE_270)
    assert np.abs(np.asarray(found, int) - np.asarray(upright, int)[..., ::-1]).mean() < 5


# -------------------------------------------------------------------------------------------------------- the evaluation set

def test_evaluation_set_has_sources_and_licences():
    rows = tool.read_rows(tool.EVALUATION)
    assert Counter(row["category"] for row in rows) == tool.COMPOSITION and len({row["id"] for row in rows}) == 100
    for row in rows:
        assert re.fullmatch(r"(github:[\w.-]+/[\w.-]+@[0-9a-f]{12}|debian:[\w.-]+ \S+)( \(.*\))?", row["source"]), row["id"]
        assert re.match("CC0|CC-BY-(SA-)?[1-4]|public domain", row["licence"]) and row["licence_quote"] and row["path"]
        assert max(row["size"]) <= 512 and max(row["original_size"]) >= max(row["size"])


def test_evaluation_set_is_the_choice_of_its_rule():
    folder = source.parents[2] / "shared" / "data" / "photoset"
    if not folder.is_dir():
        pytest.skip("the photographs for evaluation, ../shared/data/photoset, are not here")
    rows = [row for row in tool.read_rows(folder / "LICENSES.jsonl") if row["use"] == "evaluate"]
    assert [row["id"] for row in tool.chosen(rows)] == [row["id"] for row in tool.read_rows(tool.EVALUATION)]


def test_choice_is_by_the_hash_of_the_identifier():
    rows = [{"id": name, "category": "people"} for name in "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"]
    found = tool.chosen(rows)
    assert found == tool.chosen(rows[::-1]) and len(found) == 35
    assert [row["id"] for row in found[:3]] == ["s", "M", "u"]           # 043a7187..., 08f27188..., 0bfe935e...


def test_folder_is_checked_against_the_evaluation_set(tmp_path, monkeypatch, capsys):
    pictures = {f"{name}.png": smooth(200, 150, seed) for seed, name in enumerate("abcd")}
    rows = [{"file": file, "sha256": hashlib.sha256(encoded(image)).hexdigest(), "size": [200, 150],
             "difference_hash": tool.difference_hash(image)} for file, image in pictures.items()]
    (tmp_path / "evaluation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(tool, "EVALUATION", tmp_path / "evaluation.jsonl")
    argv = ["evaluation", "--photos", str(tmp_path / "photos")]
    (tmp_path / "photos").mkdir()
    for file, image in pictures.items():
        (tmp_path / "photos" / file).write_bytes(encoded(image))
    pictures["b.png"].save(tmp_path / "photos" / "b.png", "JPEG", quality=80)          # saved anew: the same photograph
    assert tool.main(argv) == 0 and capsys.readouterr().out == "4 of 4 photographs are as listed\n"
    (tmp_path / "photos" / "a.png").unlink()
    (tmp_path / "photos" / "b.png").write_bytes(encoded(pictures["d.png"]))
    (tmp_path / "photos" / "c.png").write_bytes(encoded(pictures["c.png"].resize((100, 75))))
    assert tool.main(argv) == 1
    said = capsys.readouterr()
    assert said.out == "1 of 4 photographs are as listed\n"
    assert said.err == "a.png is missing\nb.png is another picture\nc.png is 100x75, not 200x150\n"


def test_evaluation_manifest_has_the_listed_photographs():
    """Each of the 100 once, with its source and licence, and prompts that were never trained."""
    listed = {row["file"]: row for row in map(json.loads, tool.EVALUATION.read_text().splitlines())}
    rows = [json.loads(line) for line in tool.EVALUATION.with_name("evaluation_manifest.jsonl").read_text().splitlines()]
    origins = [row["origin"]["photograph"] for row in rows]
    assert Counter(row["category"] for row in rows) == tool.COMPOSITION and len(listed) == len(rows)
    assert {origin["name"]: (origin["licence"], origin["sha256"]) for origin in origins} == {
        file: (row["licence"], row["sha256"]) for file, row in listed.items()}
    for row in rows:
        asked = zip([row["prompt"], *row["unseen_prompts"]], row["origin"]["edits"], strict=True)
        assert all(prompt in KINDS[kind].held_out(option) for prompt, (kind, option) in asked)
