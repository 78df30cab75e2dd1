"""The world of photographs: edits are exact, calm and relative to the size; wordings never meet; a seed gives one sample."""

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from photographs import smooth
from PIL import Image

from sifm_min.miniature import kinds, photographs, pictures
from sifm_min.miniature.kinds import KINDS

ROOT = Path(__file__).resolve().parents[2]
ASKED = [(kind, option) for kind in KINDS.values() for option in kind.options]
NAMES = [f"{kind.name} {option}".strip() for kind, option in ASKED]
CONTENT = {"sky", "one colour kept", "most colourful thing", "middle removed", "sunglasses", "hat", "stripes", "autumn"}


def portrait(width=256, height=256):
    """A face above a red shirt between blue sky and green leaves, with texture everywhere: every kind can be asked for."""
    rows, columns = np.mgrid[:height, :width].astype(np.float32)
    y, x = (rows + 0.5) / height - 0.5, (columns + 0.5 - width / 2) / min(width, height)
    y = y * height / min(width, height)
    texture = np.asarray(smooth(width, height, 3).resize((width, height)), np.float32) / 255 - 0.5
    picture = np.where((y < -0.02)[..., None], (0.56, 0.70, 0.90), (0.20, 0.45, 0.12)) + 0.08 * texture
    leaves = 0.25 * np.sin(40 * x) * np.sin(36 * y + 3 * np.sin(9 * x))
    picture = picture + (leaves * (y >= -0.02))[..., None]
    picture[np.hypot(x / 0.9, y - 0.48) < 0.27] = (0.85, 0.10, 0.12)
    picture[np.hypot(x / 0.8, y + 0.05) < 0.21] = (0.88, 0.66, 0.52)
    for side in (-1, 1):
        picture[np.hypot(x - side * 0.07, y + 0.09) < 0.02] = 0.1
    picture[np.hypot((x - 0.36) / 0.5, y - 0.15) < 0.12] = (0.12, 0.22, 0.85)
    return np.clip(picture, 0, 1).astype(np.float32)


@pytest.fixture(scope="module")
def pixels():
    return portrait()


@pytest.fixture
def folder(tmp_path):
    """Six photographs in three categories, as a photoset has them."""
    rows = []
    for i in range(6):
        name = f"{['people', 'artworks', 'landscapes'][i % 3]}/{i}.png"
        (tmp_path / name).parent.mkdir(exist_ok=True)
        pictures.as_image(portrait(130 + 10 * i, 150)).save(tmp_path / name)
        rows.append({"file": name, "category": name.split("/")[0], "use": "evaluate"})
    (tmp_path / "LICENSES.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return tmp_path


def asked(test):
    return pytest.mark.parametrize(("kind", "option"), ASKED, ids=NAMES)(test)


# ---------------------------------------------------------------------------------------------------------------- edits

def test_kinds_are_many_and_six_read_the_picture():
    assert len(KINDS) >= 24
    assert set(KINDS) >= CONTENT


@asked
def test_target_is_a_visible_change_in_range(kind, option, pixels):
    before = pixels.copy()
    target = kind.target(pixels, option)
    assert target.shape == pixels.shape and target.dtype == np.float32
    assert target.min() >= 0 and target.max() <= 1
    assert kind.applies(pixels, option)
    assert kinds.changed(pixels, target).mean() >= 0.05
    np.testing.assert_array_equal(pixels, before)            # the source is left as it was
    np.testing.assert_array_equal(target, kind.target(pixels, option))


@asked
def test_target_moves_little_under_noise(kind, option, pixels):
    noise = np.random.default_rng(1).uniform(-7 / 255, 7 / 255, pixels.shape).astype(np.float32)
    noisy = np.clip(pixels + noise, 0, 1)
    assert np.abs(kind.target(noisy, option) - kind.target(pixels, option)).mean() < 0.03
    assert kind.applies(noisy, option)


@asked
def test_target_is_relative_to_the_size(kind, option, pixels):
    from sifm_min.miniature.soft_maps import halved
    small = halved(pixels)
    assert np.abs(halved(kind.target(pixels, option)) - kind.target(small, option)).mean() < 0.03


@asked
def test_target_of_small_and_oblong_pictures(kind, option):
    for size in ((64, 64), (97, 64), (64, 131)):
        source = portrait(*size)
        assert kind.target(source, option).shape == source.shape


@asked
def test_plain_grey_has_no_place_for_content_kinds(kind, option):
    if kind.name in CONTENT:
        assert not kind.applies(np.full((96, 96, 3), 0.5, np.float32), option)


def test_changed_counts_at_half_resolution():
    source = np.full((8, 8, 3), 0.5, np.float32)
    target = source.copy()
    target[0, 0, 1] += 0.2                                   # 0.05 after the mean of four pixels: not visible
    target[4, 4:6, 2] += 0.2                                 # 0.1: visible
    assert kinds.changed(source, target).tolist() == [[False] * 4, [False] * 4, [False, False, True, False], [False] * 4]


def test_edits_do_what_their_names_say(pixels):
    def made(name, option=""):
        return KINDS[name].target(pixels, option)
    corners = np.s_[:6, :6]
    np.testing.assert_allclose(made("negative"), 1 - pixels, atol=1e-6)
    assert np.ptp(made("black and white"), 2).max() < 1e-5
    half = made("half black and white", "left")
    assert np.ptp(half[:, :120], 2).max() < 1e-5
    np.testing.assert_array_equal(half[:, 136:], pixels[:, 136:])
    np.testing.assert_allclose(made("frame", "wooden")[corners] - (0.36, 0.19, 0.08), 0, atol=1e-5)
    assert made("night").mean() < 0.5 * pixels.mean()
    tile = made("mosaic")[:16, :16]
    np.testing.assert_allclose(tile, np.broadcast_to(pixels[:16, :16].mean((0, 1)), tile.shape), atol=1e-5)
    for side, x in (("left", 64), ("right", 192)):
        assert np.allclose(made("sun", side)[56, x], (1, 0.86, 0.20), atol=1e-4)
        assert made("moon", side)[61, x].min() > 0.6


def test_edits_find_their_place(pixels):
    def moved(name, option, where):
        return np.abs(KINDS[name].target(pixels, option) - pixels).max(2)[where].mean()
    sky, leaves, eyes, shirt, ball = (np.s_[8:40, 8:60], np.s_[200:240, 4:40], np.s_[95:115, 100:156], np.s_[215:250, 100:156],
                                      np.s_[150:180, 210:230])
    assert moved("sky", "red", sky) > 0.3 > 0.02 > moved("sky", "red", leaves)
    assert moved("autumn", "", leaves) > 0.2 > moved("autumn", "", shirt)
    assert moved("sunglasses", "", eyes) > 0.4 > 0.01 > moved("sunglasses", "", shirt)
    assert moved("hat", "red", np.s_[30:55, 110:146]) > 0.3 > 0.01 > moved("hat", "red", leaves)
    assert moved("one colour kept", "red", ball) > 0.2 > 0.02 > moved("one colour kept", "red", shirt)
    assert moved("one colour kept", "blue", shirt) > 0.2 > 0.02 > moved("one colour kept", "blue", ball)
    assert moved("most colourful thing", "green", shirt) > 0.3 > 0.02 > moved("most colourful thing", "green", sky)
    assert moved("middle removed", "", np.s_[120:136, 120:136]) > 0.1 > 0.001 > moved("middle removed", "", sky)


# ------------------------------------------------------------------------------------------------------------- wordings

@asked
def test_wordings_are_enough(kind, option):
    assert len(set(kind.phrases(option))) == len(kind.phrases(option)) >= 15
    assert len(set(kind.held_out(option))) == len(kind.held_out(option)) >= 2


def test_wordings_never_coincide():
    every = Counter(phrase for kind, option in ASKED for phrase in (*kind.phrases(option), *kind.held_out(option)))
    assert [phrase for phrase, times in every.items() if times > 1] == []


def test_corpus_is_every_trained_wording_once():
    assert sorted(kinds.corpus()) == sorted({phrase for kind, option in ASKED for phrase in kind.phrases(option)})


def test_held_out_wordings_use_trained_words():
    trained = {word for kind, option in ASKED for phrase in kind.phrases(option) for word in phrase.split()}
    held = {word for kind, option in ASKED for phrase in kind.held_out(option) for word in phrase.split()}
    assert held <= trained


def test_wordings_are_plain_and_short():
    """CLIP splits common words into at most two tokens: twelve words stay below 24."""
    for kind, option in ASKED:
        for phrase in (*kind.phrases(option), *kind.held_out(option)):
            assert re.fullmatch(r"[a-z]+( [a-z]+){0,11}", phrase), phrase


# -------------------------------------------------------------------------------------------------------------- samples

def told(samples):
    return [(s.photograph, s.category, s.kind, s.option, s.prompt, s.unseen_prompts, s.image.tobytes(), s.target.tobytes())
            for s in samples]


def test_samples_are_the_same_in_every_process(folder):
    code = ("import sys, hashlib; from sifm_min.miniature import pictures; "
            "print(hashlib.sha256(repr([(s.prompt, s.unseen_prompts, s.photograph, s.image.tobytes()) for s in "
            "pictures.samples(4, 5, pictures=sys.argv[1], size=64)]).encode()).hexdigest())")
    hashes = {subprocess.run([sys.executable, "-c", code, folder], cwd=ROOT, check=True, capture_output=True, text=True,
                             env={"PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"}).stdout for seed in "12"}
    assert len(hashes) == 1
    few, more = (told(pictures.samples(n, 5, pictures=folder, size=64)) for n in (3, 5))
    assert few == more[:3]
    assert few != told(pictures.samples(3, 6, pictures=folder, size=64))


def test_samples_take_the_categories_in_turn(folder):
    drawn = pictures.samples(9, 1, pictures=folder, size=64)
    assert Counter(s.category for s in drawn) == {"people": 3, "artworks": 3, "landscapes": 3}
    assert len({s.photograph for s in drawn[:6]}) == 6


def test_samples_have_the_exact_target(folder):
    for sample in pictures.samples(4, 2, pictures=folder, size=96):
        assert sample.image.size == sample.target.size == (96, 96)
        source = np.asarray(sample.image, np.float32) / 255
        for one in (sample, *sample.unseen):
            exact = KINDS[one.kind].target(source, one.option)
            assert np.abs(np.asarray(one.target, np.float32) / 255 - exact).max() <= 0.5 / 255 + 1e-6
            assert one.image is sample.image
            assert one.prompt in KINDS[one.kind].held_out(one.option)
        assert len({sample.kind, *(one.kind for one in sample.unseen)}) == 6
        assert sample.unseen_prompts == [one.prompt for one in sample.unseen]


def test_samples_of_training_use_trained_wordings(folder):
    for sample in pictures.samples(3, 2, pictures=folder, size=64, wordings="train"):
        for one in (sample, *sample.unseen):
            assert one.prompt in KINDS[one.kind].phrases(one.option)


def test_samples_ask_for_every_kind_alike():
    source = pictures.as_image(portrait())
    first = Counter(pictures.draw_sample(source, seed, size=64).kind for seed in range(70))
    assert len(first) >= 24 and max(first.values()) <= 8     # two each on average


def test_samples_take_pictures_and_paths(folder):
    image = Image.open(folder / "people" / "0.png")
    drawn = pictures.samples(2, 0, pictures=[image, folder / "people" / "3.png"], size=64)
    assert sorted(s.photograph for s in drawn) == ["3.png", "picture 1"]
    assert {s.category for s in drawn} == {"photograph"}


@pytest.mark.parametrize(("given", "sentence"), [
    ("missing", "no such folder"), ([], "the list is empty"), (["missing.png"], "no such file"),
])
def test_samples_refuse_what_is_no_picture(given, sentence):
    with pytest.raises(ValueError, match=sentence):
        pictures.samples(1, 0, pictures=given)


def test_samples_refuse_a_picture_that_shows_nothing(monkeypatch):
    monkeypatch.setattr(pictures, "KINDS", {name: KINDS[name] for name in ("night", "sky", "hat", "autumn")})
    with pytest.raises(ValueError, match="picture 1: only 1 kinds of instruction change it visibly"):
        pictures.samples(1, 0, pictures=[Image.new("RGB", (80, 80), "grey")], size=64)


def test_samples_of_what_ships_are_the_default():
    first, again = pictures.samples(1, 4, size=64)[0], pictures.samples(1, 4, size=64, pictures=photographs.shipped())[0]
    assert (first.photograph, first.prompt, first.category) == (again.photograph, again.prompt, again.category)
    assert first.category in photographs.CATEGORIES


def test_samples_have_the_shares_of_the_paper(monkeypatch):
    drawn = []
    monkeypatch.setattr(pictures, "draw_sample", lambda photograph, *_, **__: drawn.append(photograph.category))
    pictures.samples(100, 0)
    assert Counter(drawn) == {"people": 35, "landscapes": 35, "artworks": 30}


def test_sample_with_stated_instructions_is_the_drawn_one(folder):
    sample = pictures.samples(1, 3, pictures=folder, size=64)[0]
    asked_for = [(one.kind, one.option, one.prompt) for one in (sample, *sample.unseen)]
    assert told([pictures.sample_with(sample.image, asked_for, sample.category, sample.photograph)]) == told([sample])
    for wrong, sentence in ((("nights", "", "make it night"), "no edit 'nights'"), (("sky", "", "x"), "no edit 'sky'"),
                            (("night", "", "make it day"), "'make it day' does not ask for night")):
        with pytest.raises(ValueError, match=sentence):
            pictures.sample_with(sample.image, [wrong], "people", "a")


def test_samples_refuse_other_wordings(folder):
    with pytest.raises(ValueError, match="choose held-out or train"):
        pictures.samples(1, 0, pictures=folder, wordings="both")
