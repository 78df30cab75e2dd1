"""sifm_min/memory.py: which plans there are, that each gives the same picture, and what happens where memory ends."""

import warnings

import numpy as np
import pytest
import torch
from PIL import Image

import sifm_min
from sifm_min import edit, editors, memory
from sifm_min.memory import Plan, plans


class Device:
    """The parts of an editor that the plans depend on."""

    def __init__(self, kind, miniature=False):
        self.device, self.is_small = torch.device(kind), miniature


@pytest.mark.parametrize(("name", "device", "count", "batch", "expected"), [
    ("fast", "cpu", 10, None, [(10, False)]),
    ("low", "cpu", 10, None, [(1, True)]),
    ("auto", "meta", 10, None, [(10, False), (5, False), (2, False), (1, False), (1, True)]),
    ("auto", "meta", 1, None, [(1, False), (1, True)]),
    ("auto", "cpu", 40, None, [(4, False), (2, False), (1, False), (1, True)]),
    ("auto", "cpu", 10, None, [(3, False), (1, False), (1, True)]),
    ("auto", "cpu", 4, None, [(1, False), (1, True)]),
    ("auto", "cpu", 1, None, [(1, False), (1, True)]),
    ("auto", "meta", 10, 3, [(3, False), (3, True)]),        # asked for, so it stands
    ("low", "meta", 10, 3, [(3, True)]),
    ("auto", "meta", None, None, [(None, False), (None, True)]),
    ("fast", "meta", None, None, [(None, False)]),
])
def test_the_plans(name, device, count, batch, expected):
    assert plans(name, Device(device), count, batch) == expected


def test_a_miniature_runs_all_at_once_on_a_cpu():
    assert plans("auto", Device("cpu", miniature=True), 10)[0] == (10, False)


def test_an_unknown_plan_is_told():
    with pytest.raises(ValueError, match="choose one of auto, fast, low"):
        plans("tiny", Device("cpu"), 10)


@pytest.mark.parametrize(("plan", "words"), [
    (Plan(None, False), "everything at once"), (Plan(1, False), "one timestep at a time"),
    (Plan(4, False), "4 timesteps at once"), (Plan(None, True), "activations computed again in the backward pass"),
    (Plan(1, True), "one timestep at a time, activations computed again in the backward pass")])
def test_plans_in_words(plan, words):
    assert str(plan) == words


@pytest.fixture(autouse=True)
def nothing_remembered():
    """Plans that did not fit in one test are tried again in the next."""
    memory._SHORT.clear()


@pytest.fixture(scope="module")
def miniature():
    return sifm_min.load_editor("miniature")


@pytest.fixture
def picture():
    return sifm_min.miniature.samples(1, 5)[0].image


def immunized(picture, editor, method="sifm", steps=1, **options):
    return sifm_min.immunize(picture, editor, "make it night", method=method, steps=steps, seed=3, **options)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sifm", "semantic-attack", "photoguard-diffusion", "mist"])
def test_every_plan_gives_the_same_picture(method, miniature, picture):
    """One step of either: where a gradient is zero to rounding its sign may differ, and nowhere else."""
    fast, low = (immunized(picture, miniature, method, memory=name) for name in ("fast", "low"))
    assert fast.report["loss"][0]["loss"] == pytest.approx(low.report["loss"][0]["loss"], rel=1e-5)
    differ = sum(a != b for a, b in zip(fast.image.tobytes(), low.image.tobytes(), strict=True))
    assert differ <= 1e-3 * len(fast.image.tobytes())
    assert fast.report["memory"]["checkpointing"] is False and low.report["memory"]["checkpointing"] is True


ENDED = {"cuda": lambda: torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
         "cpu": lambda: RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: out"),
         "python": MemoryError}


@pytest.mark.slow
@pytest.mark.parametrize("error", ENDED.values(), ids=ENDED)
def test_next_plan_is_taken_and_named_when_memory_ends(error, miniature, picture, monkeypatch):
    """Ten timesteps do not fit, five no longer in their second step; two do, and all of it starts anew."""
    whole, features, calls = immunized(picture, miniature, steps=2, batch=2), miniature.features, []

    def small(condition, noisy, timesteps, *rest, **more):
        calls.append(len(noisy))
        if len(noisy) > 5 or calls.count(5) > 4:             # two calls for the original, and two in each step
            calls.clear()
            raise error()
        return features(condition, noisy, timesteps, *rest, **more)

    monkeypatch.setattr(miniature, "features", small)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        result = immunized(picture, miniature, steps=2)
    assert [str(w.message) for w in told] == [
        "out of memory with 10 timesteps at once; going on with 5 timesteps at once",
        "out of memory with 5 timesteps at once; going on with 2 timesteps at once"]
    assert result.report["memory"] == {"asked": "auto", "batch": 2, "checkpointing": False}
    assert result.image.tobytes() == whole.image.tobytes()
    assert len(result.report["loss"]) == 2 and result.report["loss"] == whole.report["loss"]
    assert set(calls) == {2}


@pytest.mark.slow
def test_no_plan_that_fits_is_one_sentence(miniature, picture, monkeypatch):
    def none(*inputs, **options):
        assert miniature.checkpointing == (len(inputs[1]) == 1 and len(seen) == 4)
        seen.append(len(inputs[1]))
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    seen = []
    monkeypatch.setattr(miniature, "features", none)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match="out of memory with one timestep at a time, .*a smaller picture") as caught:
            immunized(picture, miniature)
    assert seen == [10, 5, 2, 1, 1] and "memory low" not in str(caught.value) and miniature.checkpointing is False
    seen.clear()
    with pytest.raises(ValueError, match="10 timesteps at once; memory low, a smaller picture"):
        immunized(picture, miniature, memory="fast")


def test_other_errors_are_not_of_memory(miniature, picture, monkeypatch):
    calls = []

    def broken(*inputs, **options):
        calls.append(1)
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(miniature, "features", broken)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        immunized(picture, miniature)
    assert len(calls) == 1 and miniature.checkpointing is False


def test_low_lets_go_of_the_text_encoder(miniature, picture):
    miniature.context(["make it night"])
    before = miniature.text_encoder
    assert not any(weight.is_meta for weight in before.parameters())
    immunized(picture, miniature, "photoguard-encoder", memory="low")
    assert miniature.text_encoder is not before and all(weight.is_meta for weight in miniature.text_encoder.parameters())
    assert miniature.edit(Image.new("RGB", (64, 64)), "make it night", steps=1).size == (64, 64)     # and it is read again


def test_low_reaches_the_edits_of_a_preview(miniature, tmp_path, monkeypatch):
    """One pass of the guidance at a time, with the text encoder let go before the denoiser runs."""
    seen, predict = [], type(miniature).predict

    def watched(self, image_latent, noisy_latent, *inputs):
        seen.append((len(noisy_latent), all(weight.is_meta for weight in self.text_encoder.parameters())))
        return predict(self, image_latent, noisy_latent, *inputs)

    monkeypatch.setattr(type(miniature), "predict", watched)
    monkeypatch.setattr(type(miniature), "plan", lambda self, steps=None: self.scheduler.plan(1))
    Image.new("RGB", (64, 64), "grey").save(tmp_path / "a.png")
    shown = {}
    for name in ("auto", "low"):
        seen.clear()
        code = sifm_min.immunize.main([str(tmp_path / "a.png"), "--prompt", "make it night", "--method", "photoguard-encoder",
                                       "--steps", "1", "--memory", name, "-o", str(tmp_path / name)])
        assert code == 0
        shown[name] = np.asarray(Image.open(tmp_path / name / "a_preview.png").convert("RGB"), int)
        assert seen == {"auto": [(3, False)] * 2, "low": [(1, True)] * 6}[name]
    assert np.abs(shown["auto"] - shown["low"]).max() <= 2   # batches round otherwise


@pytest.mark.slow
@pytest.mark.parametrize("error", ENDED.values(), ids=ENDED)
def test_a_command_tells_it_in_a_sentence_and_goes_on(error, tmp_path, monkeypatch, capsys):
    """An edit at a size that memory does not suffice for; the next picture may be smaller."""
    for name, size in (("a.png", 80), ("b.png", 64)):
        Image.new("RGB", (size, size)).save(tmp_path / name)

    def sample(self, pixels, *inputs, **options):
        asked.append(1)
        if len(asked) <= 2:                                  # everything at once, and one pass at a time
            raise error()
        return pixels

    asked = []
    monkeypatch.setattr(editors.InstructPix2Pix, "sample", sample)
    code = edit.main([str(tmp_path / "a.png"), str(tmp_path / "b.png"), "--prompt", "make it night", "-o",
                      str(tmp_path / "out")])
    err = capsys.readouterr().err
    assert code == 1 and "a.png: out of memory with one picture and one pass" in err and "--size" in err
    assert "Traceback" not in err and [path.name for path in (tmp_path / "out").glob("*.png")] == ["b_edited.png"]
