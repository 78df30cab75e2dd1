"""The attacker's command, end to end on a tiny random editor: it is the library's edit, with files, codes and sentences."""

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
import tiny_editor
from outcomes import files, told
from photographs import photo
from PIL import Image

from sifm_min import cli, edit

PROMPT = "make it night"


@pytest.fixture
def run(loaded_once, tiny_folder):
    """Run the command in this process and in tmp_path, on the tiny editor."""
    return lambda *argv: edit.main(["--prompt", PROMPT, "--editor", str(tiny_folder), "-o", "out", *argv])


@pytest.mark.parametrize("argv, options", [
    ((), {"seed": 0}),
    (("--seed", "7", "--steps", "3", "--guidance", "5", "--image-guidance", "1.2", "--size", "24", "--negative-prompt", "fog"),
     {"seed": 7, "steps": 3, "guidance": 5.0, "image_guidance": 1.2, "size": 24, "negative_prompt": "fog"}),
])
def test_it_is_the_librarys_edit(run, tiny, capsys, argv, options):
    original = photo("a.png", (40, 30))
    assert run("a.png", *argv) == cli.OK
    expected = tiny.edit(original, PROMPT, **options)
    assert list(files()) == ["a_edited.json", "a_edited.png"]
    report = json.loads(files()["a_edited.json"])
    assert (report["finished"], report["prompt"], report["seed"]) == (True, PROMPT, options["seed"])
    with Image.open("out/a_edited.png") as edited:
        assert edited.size == (40, 30) and np.array_equal(edited, expected)
    assert np.array_equal(expected, tiny.edit(original, PROMPT)) == (argv == ())
    assert capsys.readouterr() == ("out/a_edited.png\n", f"{tiny_editor.NOTICE}\n")


@pytest.mark.slow
def test_the_dtypes_reach_the_editor_and_what_is_told_of_it(tiny_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    photo("a.png", (40, 30))
    for dtypes in ("bfloat16", "float32"), ("float32", "bfloat16"):
        assert edit.main(["a.png", "--prompt", PROMPT, "--editor", str(tiny_folder), "--steps", "2", "-o", "-".join(dtypes),
                          "--dtype", dtypes[0], "--vae-dtype", dtypes[1], "--json"]) == cli.OK
        about = json.loads(capsys.readouterr().out)["editor"]
        assert (about["dtype"], about["vae_dtype"]) == dtypes


def test_every_kind_of_picture_is_edited_at_its_size(run):
    photo("in/strip.png", (37, 513)), photo("in/grey.jpg", mode="L"), photo("in/clear.png", mode="RGBA")
    Image.fromarray(np.random.default_rng(1).integers(0, 65536, (20, 24), np.uint16)).save("in/deep.png")
    Image.radial_gradient("L").resize((24, 20)).convert("P").save("in/palette.gif")
    exif = Image.Exif()
    exif[0x0112] = 6
    photo("turned.png").save("in/turned.jpg", exif=exif)
    assert run("in") == cli.OK
    sizes = {name: Image.open(f"out/{name}").size for name in files() if name.endswith(".png")}
    assert sizes == {f"{stem}_edited.png": {"strip": (37, 513), "turned": (20, 24)}.get(stem, (24, 20))
                     for stem in ("strip", "grey", "clear", "deep", "palette", "turned")}


def test_json_and_quiet(run, tiny_folder, capsys):
    photo("in/a.png"), photo("in/b.png", seed=1)
    assert run("in", "--json", "--quiet", "--seed", "5") == cli.OK
    out, err = capsys.readouterr()
    records = [json.loads(line) for line in out.splitlines()]
    assert err == "" and [(record["picture"], record["edited"]) for record in records] == [
        ("in/a.png", "out/a_edited.png"), ("in/b.png", "out/b_edited.png")]
    for record in records:
        assert (record["prompt"], record["seed"], record["editor"]["source"]) == (PROMPT, 5, str(tiny_folder))
        assert len(record["editor"]["weights"]) == 3


def test_an_edit_that_overflows_is_an_error_and_not_a_picture(run, capsys):
    photo("a.png")
    assert run("a.png", "--guidance", "1e300") == cli.SOME_FAILED
    assert "a.png: the edit is not a finite picture" in capsys.readouterr().err and files() == {}


def test_files_are_overwritten_on_request_only(run, capsys):
    photo("a.png")
    Path("out").mkdir()
    Path("out/a_edited.png").write_text("mine")
    assert run("a.png", "--quiet") == cli.SOME_FAILED
    assert told(capsys) == ("error: a.png: out/a_edited.png exists, from another picture or other options; add --overwrite or "
                            "choose another folder\n")
    assert files() == {"a_edited.png": b"mine"}
    assert run("a.png", "--overwrite") == cli.OK and Image.open("out/a_edited.png").size == (24, 20)


def test_results_beside_the_pictures_are_not_edited_again(run, capsys):
    photo("in/a.png")
    assert run("in", "-o", "in") == cli.OK
    before = files("in")
    assert run("in", "-o", "in", "--overwrite") == cli.OK and files("in") == before
    capsys.readouterr()
    assert run("in/a.png", "in/a_edited.png", "-o", "in", "--overwrite") == cli.USAGE
    assert "in/a_edited.png would be overwritten by a result" in told(capsys) and files("in") == before


@pytest.mark.parametrize("argv, code, says", [
    (("a.png", "--prompt", ""), cli.USAGE, "--prompt: the text is empty"),
    (("a.png", "--steps", "0"), cli.USAGE, "--steps"), (("a.png", "--size", "0"), cli.USAGE, "--size"),
    (("a.png", "--guidance", "nan"), cli.USAGE, "--guidance"), (("a.png", "--guidance", "1e999"), cli.USAGE, "--guidance"),
    (("a.png", "--editor", "nonsense"), cli.USAGE, "'nonsense' is neither"), ((), cli.USAGE, "PICTURE-OR-FOLDER"),
    (("empty",), cli.USAGE, "empty: no pictures in this folder"),
    (("a.png", "a.jpg"), cli.USAGE, "a.png and a.jpg would both write a_edited.png"),
    (("a.png", "--editor", "owner/editor"), cli.UNAVAILABLE, "offline nothing is fetched"),
    (("",), cli.USAGE, "PICTURE-OR-FOLDER: the name is empty"), (("a.png", "-o", ""), cli.USAGE, "the name is empty"),
    (("a.png", "-o", "a.jpg"), cli.SOME_FAILED, "a.jpg is a file; results need a folder"),
])
def test_mistakes_are_one_sentence_and_a_code(run, tmp_path, monkeypatch, capsys, argv, code, says):
    from huggingface_hub import constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    photo("a.png"), photo("a.jpg")
    Path("empty").mkdir()
    assert run(*argv) == code
    assert says in told(capsys) and not Path("out").exists()


def test_an_unreadable_picture_is_told_and_the_others_are_done(run, capsys):
    photo("in/good.png")
    Path("in/bad.png").write_text("I am not a picture.")
    assert run("in", "missing.png", "--json") == cli.SOME_FAILED
    assert list(files()) == ["good_edited.json", "good_edited.png"]
    out, err = capsys.readouterr()
    assert [json.loads(line).get("file") for line in out.splitlines()] == ["in/bad.png", None, "missing.png"]
    assert "1 of 3 pictures done, 2 failed:" in err and "Traceback" not in err


@pytest.mark.parametrize("error, code, says", [
    (OSError(errno.ENOSPC, "No space left on device"), cli.SOME_FAILED, "no space left on device; free some space"),
    (KeyboardInterrupt(), cli.INTERRUPTED, "interrupted; what is finished is whole"),
])
def test_a_run_that_stops_leaves_nothing_half(run, monkeypatch, capsys, error, code, says):
    def fail(descriptor):
        raise error
    photo("in/a.png"), photo("in/b.png")
    monkeypatch.setattr(os, "fsync", fail)
    assert run("in") == code
    err = capsys.readouterr().err
    assert says in err and "0 of 2 pictures done" in err and files() == {}
