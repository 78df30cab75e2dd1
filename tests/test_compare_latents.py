"""`compare --latents`: the shift in every latent space on this machine, tiny ones and full autoencoders, beside noise."""

import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tiny_sd3
from PIL import Image
from test_latent_spaces import home, network, write_authors  # noqa: F401 (home is a fixture)
from test_latents import photo, shift_by_hand

from sifm_min import cli, compare, images
from sifm_min.editors import load_editor, shifts
from sifm_min.models import hub
from sifm_min.models.latent_spaces import SPACES
from sifm_min.models.sources import EDITORS


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def run(in_process):
    return partial(in_process, compare.main)


@pytest.fixture
def spaces(tiny_folder):
    """A tiny space and one editor's whole autoencoder on this machine, as the downloads leave them."""
    write_authors(SPACES["sd1"].kept, SPACES["sd1"], network(SPACES["sd1"]))
    known = EDITORS["instruct-pix2pix"]
    folder = Path(hub.cache()) / f"models--{known.hub_id.replace('/', '--')}" / "snapshots" / known.revision
    shutil.copytree(tiny_folder, folder)
    return load_editor(f"latents:sd1,{folder}", device="cpu").spaces


def save_pair(name="a.png", steps=5, seed=0):
    """b.png and the same with a perturbation of so many steps, which uses the whole budget."""
    original = np.asarray(photo(48, 40, seed)).astype(int)
    perturbed = (original + steps * np.random.default_rng(9).choice([-1, 1], original.shape)).clip(0, 255)
    for file, values in (("b.png", original), (name, perturbed)):
        Image.fromarray(values.astype(np.uint8)).save(file)


def test_every_space_at_hand_is_measured(run, spaces):
    save_pair()
    code, out, err = run("--latents", "a.png", "b.png", "--json", "--metrics", "linf")
    (record,) = map(json.loads, out.splitlines())
    assert code == cli.OK and record["linf"] == 5 and "only tiny" not in err
    assert [(found["space"], found["size"]) for found in record["shifts"]] == [
        ("sd1", [48, 40]), ("instruct-pix2pix", [48, 40])]
    control = shifts.noise_control(images.read("b.png"), 5 / 255)
    assert images.steps_used(control, Image.open("b.png")) == 5
    before, after, noisy = (images.to_pixels(image) for image in (Image.open("b.png"), Image.open("a.png"), control))
    for space, found in zip(spaces, record["shifts"], strict=True):
        assert found["shift"] == pytest.approx(shift_by_hand(space, after, before), rel=1e-3)
        assert found["noise"] == pytest.approx(shift_by_hand(space, noisy, before), rel=1e-3)
        assert found["ratio"] == pytest.approx(found["shift"] / found["noise"]) and found["budget_steps"] == 5


def test_the_editor_sd3_is_told_from_the_space_sd3(run, tmp_path):
    """Whoever has downloaded both has both in the table."""
    write_authors(SPACES["sd3"].kept, SPACES["sd3"], network(SPACES["sd3"]))
    known = EDITORS["sd3"]
    tiny_sd3.write(Path(hub.cache()) / f"models--{known.hub_id.replace('/', '--')}" / "snapshots" / known.revision)
    save_pair()
    code, out, err = run("--latents", "a.png", "b.png", "--json", "--metrics", "linf")
    assert code == cli.OK, err
    assert [found["space"] for found in json.loads(out)["shifts"]] == ["sd3", known.hub_id]


def test_spaces_selects_and_text_has_a_line_for_each(run, spaces):
    save_pair()
    code, out, err = run("a.png", "b.png", "--spaces", "sd1", "--metrics", "linf")
    (found,) = compare.latent_shifts(load_editor("latents:sd1", device="cpu"), images.read("a.png"), images.read("b.png"))
    assert code == cli.OK and "only tiny autoencoders" in err
    assert out.splitlines()[2].split() == ["sd1", "at", "48x40", "shift", f"{found['shift']:.2f}", "noise",
                                           f"{found['noise']:.2f}", "ratio", f"{found['ratio']:.2f}"]


def test_folders_have_means_and_equal_pictures_no_ratio(run, spaces, tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
    for i in range(2):
        save_pair(f"one/{i}.png", steps=4 * i, seed=i)
        shutil.copy("b.png", f"two/{i}.png")
    code, out, _ = run("one", "two", "--spaces", "sd1", "--metrics", "linf", "--json")
    equal, other, summary = map(json.loads, out.splitlines())
    assert code == cli.OK
    assert (equal["shifts"][0]["shift"], equal["shifts"][0]["noise"], equal["shifts"][0]["ratio"]) == (0, None, None)
    (found,) = summary["shifts"]
    assert found == {"space": "sd1", "size": 48, "pairs": 2, "shift": pytest.approx(other["shifts"][0]["shift"] / 2),
                     "noise": other["shifts"][0]["noise"], "ratio": other["shifts"][0]["ratio"]}


@pytest.mark.parametrize(("words", "code", "said"), [
    (["--latents"], 3, "no latent space is on this machine: run `python -m sifm_min.weights download latents` once"),
    (["--spaces", "sd1"], 3, "the latent space sd1 is not on this machine"),
    (["--spaces", "sd9"], 2, "'sd9' is none of sd1, sdxl"),
])
def test_missing_spaces_are_one_sentence(run, words, code, said):
    save_pair()
    got, out, err = run(*words, "a.png", "b.png", "--metrics", "linf", "--quiet")
    assert got == code and out == "" and said in err and err.count("\n") == 1, err
