"""Any prompt: banks of instructions, the order in which a run draws them, and what methods and reports make of them."""

import json
from collections import Counter
from pathlib import Path

import pytest
import tiny_sd3
import torch
from photographs import photo, smooth

import sifm_min
from sifm_min import cli, immunize, sifm
from sifm_min.instructions import bank
from sifm_min.instructions.bank import drawn_order, find_bank, read_bank

PROMPT = "make it night"


@pytest.fixture
def own(tmp_path):
    """A user's file with three instructions."""
    path = tmp_path / "mine.txt"
    path.write_text("# mine\n\nmake it red\n[landscape]\nadd a lake\ta lake\n  add a tree  \n", encoding="utf-8")
    return path


# -- the bank ----------------------------------------------------------------------------------------------------------

def test_general_bank_has_64_instructions_by_category():
    general = find_bank(True)
    assert Counter(one.category for one in general.instructions) == dict.fromkeys(("any", "person", "landscape", "artwork"), 16)
    for kind in ("instruct", "img2img"):
        assert len(set(general.texts(kind))) == 64
    assert all(one.instruct != one.img2img for one in general.instructions)


def test_a_users_file_is_a_bank(own):
    found = find_bank(own)
    assert [(one.category, one.instruct, one.img2img) for one in found.instructions] == [
        ("any", "make it red", "make it red"), ("landscape", "add a lake", "a lake"), ("landscape", "add a tree", "add a tree")]
    assert found.texts("img2img") == ["make it red", "a lake", "add a tree"] and found.name == "mine.txt"
    assert found.without(["a lake", "make it blue"]).texts("instruct") == ["make it red", "add a tree"]
    before = found.digest
    own.write_text(own.read_text().replace("red", "blue"))
    assert read_bank(own).digest != before == found.digest


@pytest.mark.parametrize(("content", "says"), [
    (b"# nothing\n", "holds 0 instructions"), (b"\xff\xfe\x00", "is not UTF-8 text"),
    (b"a\tb\tc\n", "line 1: give an instruction"), (None, "no such file")])
def test_a_file_that_is_no_bank_is_told(tmp_path, content, says):
    path = tmp_path / "bank.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=says):
        find_bank(path)


@pytest.mark.parametrize("count", [1, 2, 5, 66])
def test_order_draws_all_before_any_again(count):
    order = drawn_order(count, 200, seed=3)
    assert order == drawn_order(count, 200, seed=3) and (count < 5 or order != drawn_order(count, 200, seed=4))
    for start in range(0, 200 - count, count):
        assert sorted(order[start:start + count]) == list(range(count))
    apart = min(bank.APART, count // 2)
    assert not any(order[i] in order[max(0, i - apart):i] for i in range(200))


# -- the steps ---------------------------------------------------------------------------------------------------------

def spy(told):
    """A method of one's own that writes down the context of every step."""
    def method(editor, x_orig, contexts, *, generator):
        def objective(x, step):
            told.append(contexts[step % len(contexts)])
            return editor.encode(editor.resize(x)).square().mean()
        return objective
    return method


def test_each_step_is_told_the_text_that_the_report_has(tiny, own):
    told = []
    result = sifm_min.immunize(smooth(40, 30), tiny, [PROMPT], method=spy(told), any_prompt=own, steps=10, seed=2)
    texts = [step["prompt"] for step in result.report["loss"]]
    assert set(texts) == {PROMPT, "make it red", "add a lake", "add a tree", ""}
    for text, context in zip(texts, told, strict=True):
        assert torch.equal(context, tiny.context([text]))
    assert Counter(texts[:5]) == Counter(texts[5:]) == dict.fromkeys(texts, 1)
    assert result.report["any_prompt"] == {"name": "mine.txt", "sha256": read_bank(own).digest, "instructions": 3,
                                           "empty": True, "texts": 5, "ignored_by": []}
    again = sifm_min.immunize(smooth(40, 30), tiny, [PROMPT], method=spy([]), any_prompt=own, steps=10, seed=2)
    assert [step["prompt"] for step in again.report["loss"]] == texts and again.image.tobytes() == result.image.tobytes()


def test_texts_are_encoded_once_and_prompts_may_be_absent(tiny, own, monkeypatch):
    asked, real = [], tiny.contexts
    monkeypatch.setattr(tiny, "contexts", lambda texts: asked.append(list(texts)) or real(texts))
    sifm_min.immunize(smooth(40, 30), tiny, any_prompt=own, steps=6, timesteps=2)
    assert asked == [["make it red", "add a lake", "add a tree", ""]]


def test_img2img_is_told_descriptions(tmp_path, own):
    editor = sifm_min.load_editor(tiny_sd3.write(tmp_path / "sd3"), device="cpu")
    result = sifm_min.immunize(smooth(40, 30), editor, any_prompt=own, method="mist", steps=4)
    assert {step["prompt"] for step in result.report["loss"]} == {"make it red", "a lake", "add a tree", ""}


def test_semantic_attack_has_no_empty_text(tiny, own):
    result = sifm_min.immunize(smooth(40, 30), tiny, any_prompt=own, method="semantic-attack", steps=4, timesteps=1)
    assert {step["prompt"] for step in result.report["loss"]} == {"make it red", "add a lake", "add a tree"}
    assert result.report["any_prompt"]["empty"] is False


def test_robust_runs_draw_texts_too(tiny, own):
    result = sifm_min.immunize(smooth(40, 30), tiny, any_prompt=own, steps=4, timesteps=1, robust=True)
    assert len({step["prompt"] for step in result.report["loss"]}) == 4 and all(step["purifier"] for step in
                                                                                result.report["loss"])


@pytest.mark.parametrize("texts", [5, 12])
def test_original_features_of_eight_texts_are_kept(tiny, texts, monkeypatch):
    """SIFM computes the original's features once for each of few texts, and at every step where there are many.

    In the order of a bank, in which a text may come again after few others.
    """
    calls, real = [], tiny.features
    monkeypatch.setattr(tiny, "features", lambda *args, **how: calls.append(torch.is_grad_enabled()) or real(*args, **how))
    contexts = tiny.contexts([f"word {number}" for number in range(texts)])
    x = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    objective = sifm.sifm(tiny, x, contexts, generator=torch.Generator().manual_seed(0), timesteps=1)
    for step, place in enumerate(drawn_order(texts, 24, 2)):
        objective((x + 0.01).requires_grad_(), step * texts + place)
    computed = calls.count(False)
    assert computed == (5 if texts == 5 else 24) and objective.passes(24)["denoiser_forward"] == 24 + computed


def test_methods_without_text_ignore_the_bank(tiny, tiny_folder, own):
    encoders = sifm_min.load_editor(f"latents:{tiny_folder}", device="cpu")
    for editor, options in ((encoders, {}), (tiny, {"method": "photoguard-encoder"})):
        plain, drawn = (sifm_min.immunize(smooth(40, 30), editor, PROMPT, steps=3, any_prompt=given, **options)
                        for given in (False, own))
        assert plain.image.tobytes() == drawn.image.tobytes()
        assert drawn.report["any_prompt"]["ignored_by"] == [editor.name] and "prompt" not in drawn.report["loss"][0]


# -- the command -------------------------------------------------------------------------------------------------------

def test_command_draws_resumes_and_says_who_ignores(loaded_once, tiny_folder, own, capfd):
    photo("a.png")

    def run(*argv):
        code = immunize.main(["a.png", "--editor", str(tiny_folder), "--steps", "2", "-o", "out", *argv])
        return code, capfd.readouterr().err

    code, _ = run("--timesteps", "1", "--any-prompt", str(own))
    report = json.loads(Path("out/a.json").read_text())
    assert code == cli.OK and report["prompts"] == [] and report["any_prompt"]["sha256"] == read_bank(own).digest
    assert Path("out/a_preview.png").exists()
    assert "done before, skipped" in run("--timesteps", "1", "--any-prompt", str(own))[1]
    own.write_text("make it blue\n")
    assert run("--timesteps", "1", "--any-prompt", str(own))[0] == cli.SOME_FAILED
    code, err = run("--any-prompt", "--method", "photoguard-encoder", "--overwrite", "--no-preview")
    assert code == cli.OK and "--any-prompt changes nothing there" in err
    assert json.loads(Path("out/a.json").read_text())["any_prompt"]["instructions"] == 64
    code, err = run("--any-prompt", "absent.txt", "--overwrite")
    assert code == cli.USAGE and "absent.txt: no such file" in err
