"""The command that measures pictures: the library's values, matched by name, and what it says where there is none."""

import json
import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hashed_lpips import hashed
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import save_file

from sifm_min import cli, compare, images, metrics
from sifm_min.metrics import backbones

ALL = ("linf", "visibility", "psnr", "ssim", "vifp", "fsim", "lpips")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))        # no weights
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def run(in_process):
    return partial(in_process, compare.main)


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "hashed.safetensors"
    save_file({name: hashed("alex").tensors[name] for name in backbones.NETWORKS["alex"].shapes}, path)
    return path


def smooth_photo(path, size=(44, 48), seed=0, mode="RGB", steps=0):
    """A smooth picture, or one at most so many steps of 1/255 from it."""
    bands = len(Image.new(mode, (1, 1)).getbands())
    values = np.random.default_rng(seed).integers(30, 220, (6, 6, bands)).astype(np.uint8)
    image = Image.merge(mode, [Image.fromarray(values[..., i]).resize(size, Image.Resampling.BICUBIC) for i in range(bands)])
    if steps:
        noise = np.random.default_rng(seed + 1).integers(-steps, steps + 1, np.asarray(image).shape)
        image = Image.fromarray((np.asarray(image).astype(int) + noise).clip(0, 255).astype(np.uint8))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return image


def records(out):
    return [json.loads(line) for line in out.splitlines()]


def test_it_has_the_librarys_values(run, weights):
    one, other = (images.to_pixels(smooth_photo(name, steps=steps)) for name, steps in (("a.png", 7), ("b.png", 0)))
    code, out, err = run("a.png", "b.png", "--weights", weights, "--json", "--quiet")
    (record,) = records(out)
    assert code == 0 and err == ""
    assert record["distorted"] == "a.png" and record["reference"] == "b.png" and record["size"] == [44, 48]
    assert record["linf"] == 7 and "absent" not in record
    for name in ALL[1:]:
        options = {"weights": hashed("alex")} if name == "lpips" else {}
        assert record[name] == pytest.approx(getattr(metrics, name)(one, other, **options).item(), rel=1e-6)
    sha256 = metrics.lpips_weights("alex", weights).sha256
    assert record["lpips_weights"] == {"network": "alex", "pinned": False, "sha256": sha256}
    swapped = records(run("b.png", "a.png", "--metrics", "vifp", "--json")[1])[0]
    assert swapped["vifp"] == pytest.approx(metrics.vifp(other, one).item(), rel=1e-6) != record["vifp"]
    assert swapped.keys() == {"distorted", "reference", "size", "vifp"}


def test_the_table(run, weights):
    smooth_photo("a.png", steps=7), smooth_photo("b.png")
    code, out, err = run("a.png", "b.png", "--weights", weights)
    head, row = out.splitlines()
    assert code == 0 and head.split() == ["PICTURE", *(name.upper() for name in ALL)]
    assert row.split()[:2] == ["a.png", "7"] and len(row.split()) == 8 and len(row) == len(head)
    assert "hashed.safetensors is not known to hold the published weights" in err
    assert run("a.png", "b.png", "--metrics", "psnr,linf", "--quiet")[1].splitlines()[0].split() == ["PICTURE", "PSNR", "LINF"]


def test_lpips_without_its_weights_is_absent_with_the_reason(run):
    smooth_photo("a.png", steps=7), smooth_photo("b.png")
    code, out, err = run("a.png", "b.png")
    assert code == 0 and out.splitlines()[1].split()[-1] == "-"
    assert err.count("\n") == 1 and "lpips is absent: the weights of LPIPS (AlexNet) are not in" in err
    (record,) = records(run("a.png", "b.png", "--json", "--quiet")[1])
    assert record["lpips"] is None and "weights download lpips-alex" in record["absent"]["lpips"]
    code, out, err = run("a.png", "b.png", "--metrics", "psnr,lpips")       # asked for by name
    assert code == cli.UNAVAILABLE and out == "" and "are not in" in err
    code, out, err = run("a.png", "b.png", "--weights", "b.png")
    assert code == cli.UNAVAILABLE and out == "" and "b.png is not alexnet-owt-7be5be79.pth" in err
    code, out, err = run("a.png", "b.png", "--weights", "c.safetensors")
    assert code == cli.UNAVAILABLE and out == "" and "c.safetensors: no such file" in err


def test_metrics_of_a_picture_that_is_too_small(run, weights):
    smooth_photo("a.png", (20, 12), steps=3), smooth_photo("b.png", (20, 12))
    code, out, err = run("a.png", "b.png", "--weights", weights, "--json")
    (record,) = records(out)
    assert code == 0 and [name for name in ALL if record[name] is None] == ["vifp", "lpips"] == list(record["absent"])
    assert "a.png: no vifp: this metric needs at least 41 pixels a side, got 20x12" in err
    code, out, err = run("a.png", "b.png", "--metrics", "vifp")
    assert code == cli.SOME_FAILED and "error: a.png: vifp: this metric needs at least 41 pixels" in err


def test_two_folders_are_matched_by_name(run):
    smooth_photo("ours/x_immunized_edited.png", steps=7), smooth_photo("theirs/x_edited.jpg")
    smooth_photo("ours/same.png", seed=3), smooth_photo("theirs/same.png", seed=3)
    smooth_photo("ours/flat.png", steps=4)
    Image.new("RGB", (44, 48), (10, 200, 30)).save("theirs/flat.png")
    smooth_photo("ours/x_preview.png"), smooth_photo("ours/.hidden.png")
    (Path("ours") / "x.json").write_text('{"asked": {}, "results": ["x_preview.png"]}')
    code, out, err = run("ours", "theirs", "--json")
    assert "the result of an earlier run (name it, to have it all the same): ours/x.json, ours/x_preview.png" in err
    found = [record for record in records(out) if "left_out" not in record or "mean" in record]
    assert code == 0 and [(record["distorted"], record["reference"]) for record in found[:-1]] == [
        ("ours/flat.png", "theirs/flat.png"), ("ours/same.png", "theirs/same.png"),
        ("ours/x_immunized_edited.png", "theirs/x_edited.jpg")]
    assert found[1]["psnr"] == "inf" and found[1]["linf"] == 0 and found[0]["vifp"] == "nan"
    summary = found[-1]
    assert summary["pairs"] == 3 and summary["left_out"] == {"psnr": 1, "vifp": 1, "lpips": 3}
    assert summary["mean"]["ssim"] == pytest.approx(np.mean([record["ssim"] for record in found[:-1]]))
    assert summary["mean"]["psnr"] == pytest.approx((found[0]["psnr"] + found[2]["psnr"]) / 2)
    assert summary["mean"]["lpips"] is None
    assert "not in the mean, as infinite, undefined or absent: 1 of psnr, 1 of vifp, 3 of lpips" in err
    lines = run("ours", "theirs", "--quiet")[1].splitlines()
    assert len(lines) == 5 and lines[-1].startswith("mean of 3") and len({len(line) for line in lines}) == 1


def test_a_picture_without_a_partner_fails_alone(run):
    smooth_photo("ours/a.png", steps=2), smooth_photo("theirs/a.png")
    smooth_photo("ours/b.png"), smooth_photo("theirs/c.png")
    smooth_photo("ours/d.png", (30, 30)), smooth_photo("theirs/d.png", (31, 30))
    smooth_photo("ours/e.png"), (Path("theirs") / "e.png").write_text("no picture")
    code, out, err = run("ours", "theirs", "--metrics", "psnr,linf")
    assert code == cli.SOME_FAILED and len(out.splitlines()) == 2 and out.splitlines()[1].startswith("ours/a.png")
    for words in ("ours/b.png: no picture of this name in theirs", "theirs/c.png: no picture of this name in ours",
                  "ours/d.png: the pictures differ in size, 30x30 and 31x30", "theirs/e.png is not a picture",
                  "1 of 5 pictures done"):
        assert words in err


@pytest.mark.parametrize("argv, says", [
    (("ours", "theirs/a.png"), "ours and theirs/a.png: give two pictures, or two folders"),
    (("ours", "other"), "no picture in ours has the name of one in other"),
    (("ours", "empty"), "empty: no pictures in this folder"),
    (("twice", "theirs"), "have one name"),
    (("ours", "theirs", "--metrics", "psnr,mse"), "--metrics mse: choose from linf,visibility,psnr,ssim,vifp,fsim,lpips"),
    (("ours", "theirs", "--metrics", "psnr", "--weights", "x"), "--weights is for lpips, which --metrics leaves out"),
    (("ours", "theirs", "--network", "resnet"), "invalid choice: 'resnet'"),
    (("ours", "theirs", "--device", "abacus"), "abacus is no device"),
    (("ours",), "required: B"),
])
def test_usage_errors_are_one_sentence(run, argv, says):
    for name in ("ours/a.png", "theirs/a.png", "other/b.png", "twice/a.png", "twice/a_immunized.jpg"):
        smooth_photo(name)
    Path("empty").mkdir()
    code, out, err = run(*argv)
    assert code == cli.USAGE and out == "" and says in err and err.count("\n") == 1


def test_files_that_are_not_there(run):
    smooth_photo("a.png")
    code, _, err = run("a.png", "b.png", "--metrics", "psnr")
    assert code == cli.SOME_FAILED and "b.png: no such file" in err


def test_every_kind_of_picture_is_compared_on_its_8_bit_colours(run):
    smooth_photo("a.png", mode="L", steps=5), smooth_photo("b.png", mode="RGBA"), smooth_photo("c.png", mode="L")
    code, out, err = run("a.png", "c.png", "--json", "--quiet")
    (grey,) = records(out)
    assert code == 0 and grey["linf"] == 5 and "notes" not in grey
    one, other = (images.to_pixels(Image.open(name))[:, :1] for name in ("a.png", "c.png"))
    for name in ("psnr", "ssim", "vifp", "fsim"):
        assert grey[name] == pytest.approx(getattr(metrics, name)(one, other).item(), rel=1e-5)
    code, out, err = run("b.png", "b.png", "--metrics", "psnr", "--json")
    (record,) = records(out)
    assert code == 0 and record["psnr"] == "inf" and "b.png: transparency, not compared" in err
    assert len(record["notes"]) == 2


def test_mean_leaves_out_what_is_no_number():
    rows = [{"psnr": 20.0, "vifp": math.nan}, {"psnr": math.inf, "vifp": None}, {"psnr": 30.0, "vifp": 0.5}]
    assert compare.mean(rows, ("psnr", "vifp")) == {"pairs": 3, "mean": {"psnr": 25.0, "vifp": 0.5},
                                                    "left_out": {"psnr": 1, "vifp": 2}}


def test_help_has_examples_that_parse(run):
    code, out, _ = run("--help")
    examples = [line.split("sifm_min.compare ")[1].split() for line in out.splitlines()
                if line.startswith("  python -m sifm_min.compare ")]
    assert code == 0 and len(examples) == 5
    for words in examples:
        compare._parser().parse_args(words)
