"""Methods and editors from outside the package, written and run as sifm_min/README.md says."""

import importlib
import json
import os
import re
import shlex
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tiny_sd3
import torch
from photographs import smooth
from PIL import Image

import sifm_min
from sifm_min import cli, images, methods
from sifm_min.editors import Defaults, Editor, check, load_editor
from sifm_min.models import schedulers

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "sifm_min" / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README[README.index("## Add a method"):], re.DOTALL)
COMMANDS = [line for language, block in BLOCKS if language == "bash" for line in block.splitlines()]
PROMPT = "make the sky red"


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """A folder of somebody else's with the README's files and a picture; it is the working folder, and importable."""
    for language, block in BLOCKS:
        if language == "python":
            name = re.match(r"# (\w+\.py)\n", block).group(1)
            (tmp_path / name).write_text(block)
    smooth(40, 40).save(tmp_path / "photo.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in [name for name, module in sys.modules.items() if str(tmp_path) in str(getattr(module, "__file__", ""))]:
        del sys.modules[name]


@pytest.fixture
def run(forked):
    """Run a command as the README shows it, from a folder that is not the checkout."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return lambda folder, line: forked(*shlex.split(line)[1:], cwd=folder, env=environment)


def module(name, text):
    Path(f"{name}.py").write_text(text)


# ------------------------------------------------------------------------------------------------ the README to the letter

def test_the_readme_has_its_files_and_commands():
    assert [re.match(r"# (\w+\.py)", block).group(1) for language, block in BLOCKS if language == "python"] == [
        "my_method.py", "my_editor.py"]
    assert len(COMMANDS) == 3 and sum("--method" in line for line in COMMANDS) == 1


@pytest.mark.slow
@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_of_the_readme_runs_outside(line, outside, run):
    done = run(outside, line)
    assert done.returncode == cli.OK, done.stderr
    assert "Traceback" not in done.stderr and done.stdout.strip()
    if "sifm_min.edit " in line:
        assert Image.open("out/photo_edited.png").size == (40, 40)
        return
    report = json.loads(Path("out/photo.json").read_text())
    assert report["finished"] and report["linf_steps"] == report["budget_steps"] == 7
    assert (Path("out/photo_preview.png")).exists()
    if "my_method" in line:
        assert report["method"] == "my_method:away" and report["options"]["weight"] == 2.0
        assert report["passes"] == {"encoder_forward": 101, "encoder_backward": 100}
        distances = [entry["distance"] for entry in report["loss"]]
        assert len(distances) == 100 and distances[-1] > 4 * distances[0]                # it moved away
        assert report["loss"][-1]["loss"] == pytest.approx(-2 * distances[-1])
    else:
        assert report["editor"]["name"] == "toy" and report["method"] == "sifm" and len(report["loss"]) == 3


@pytest.mark.slow
def test_library_calls_give_what_the_command_gives(outside, run):
    my_editor, my_method = importlib.import_module("my_editor"), importlib.import_module("my_method")
    line = f"python -m sifm_min.immunize photo.png --prompt '{PROMPT}' --editor my_editor:Toy --method my_method:away " \
           "--option weight=3 --steps 4 --no-preview -o out"
    assert run(outside, line).returncode == cli.OK
    commanded = np.asarray(Image.open("out/photo_immunized.png"))
    for method in (my_method.away, "my_method:away", partial(my_method.away)):
        result = sifm_min.immunize(smooth(40, 40), my_editor.Toy(), PROMPT, method=method, steps=4, weight=3)
        assert result.report["method"] == "my_method:away" and result.report["options"]["weight"] == 3
        assert np.array_equal(np.asarray(result.image), commanded)
    other = sifm_min.immunize(smooth(40, 40), my_editor.Toy(), PROMPT, steps=4)
    assert not np.array_equal(np.asarray(other.image), commanded)
    assert sifm_min.METHODS["my_method:away"] is my_method.away


def test_methods_of_the_package_run_on_the_toy_editor(outside):
    """All but those that need attention maps, and the methods for other kinds of editors: they say so."""
    editor = load_editor("my_editor:Toy")
    for method in sifm_min.METHODS:
        if method in ("semantic-attack", "tdae", "danp"):
            with pytest.raises(ValueError, match="needs the denoiser's attention maps,? and .*toy"):
                sifm_min.immunize(smooth(40, 40), editor, PROMPT, method=method, steps=1)
        elif method == "decontext":
            with pytest.raises(ValueError, match="reference tokens, and the denoiser of toy has none"):
                sifm_min.immunize(smooth(40, 40), editor, PROMPT, method=method, steps=1)
        elif method == "latent":
            with pytest.raises(ValueError, match="latent is for editors without a denoiser"):
                sifm_min.immunize(smooth(40, 40), editor, PROMPT, method=method, steps=1)
        else:
            report = sifm_min.immunize(smooth(40, 40), editor, PROMPT, method=method, steps=1).report
            assert report["linf_steps"] <= 7 and len(report["loss"]) == (method != "noise")


@pytest.mark.slow
def test_an_edited_method_is_not_done_before(outside, tiny_folder, run):
    line = f"python -m sifm_min.immunize photo.png --prompt x --editor {tiny_folder} --method my_method:away --steps 1 " \
           "--no-preview -o out"
    assert run(outside, line).returncode == cli.OK
    assert "done before" in run(outside, line).stderr
    Path("my_method.py").write_text(Path("my_method.py").read_text().replace("-weight", "weight"))
    done = run(outside, line)
    assert done.returncode == cli.SOME_FAILED and "from another picture or other options" in done.stderr


# ---------------------------------------------------------------------------------------------------- options and passes

OPTIONS = """
import torch
def method(editor, x_orig, contexts, *, generator, count=3, rate=0.5, flag=False, text="a", free=None, label: str = None):
    def objective(x_imu, step):
        return x_imu.sum()
    return objective
def needy(editor, x_orig, contexts, *, generator, must):
    return lambda x_imu, step: x_imu.sum()
def open_minded(editor, x_orig, contexts, *, generator, **options):
    return lambda x_imu, step: x_imu.sum() * options["factor"]
"""


def test_options_are_read_by_the_signature(outside):
    module("mine", OPTIONS)
    texts = ["count=5", "rate=1/4", "flag=true", "text=7", "free=0.5", "label=007"]
    assert methods.parse("mine:method", texts) == {"count": 5, "rate": 0.25, "flag": True, "text": "7", "free": 0.5,
                                                  "label": "007"}
    guessed = {text: methods.parse("mine:method", [f"free={text}"])["free"] for text in ("3", "1e-2", "no", "a=b")}
    assert guessed == {"3": 3, "1e-2": 0.01, "no": False, "a=b": "a=b"}
    assert methods.parse("mine:open_minded", ["factor=2"]) == {"factor": 2}
    assert methods.parse("sifm", ["lam=0.5", "resample=yes"]) == {"lam": 0.5, "resample": True}


@pytest.mark.parametrize(("method", "text", "says"), [
    ("mine:method", "size=3", "mine:method has no option size; its options are count, rate, flag, text, free, label"),
    ("mine:method", "steps=3", "has no option steps; --steps is of the command itself"),
    ("mine:open_minded", "generator=3", "has no option generator"),
    ("mine:method", "count=1.5", "count=1.5: not a whole number"),
    ("mine:method", "rate=much", "rate=much: not a number"), ("mine:method", "flag=2", "flag=2: give true or false"),
    ("mine:method", "count", "write it as NAME=VALUE"), ("sifm", "lambda=1", "sifm has no option lambda; its options are lam,"),
], ids=str)
def test_a_wrong_option_is_one_sentence(method, text, says, outside):
    module("mine", OPTIONS)
    with pytest.raises(ValueError, match=re.escape(says)) as caught:
        methods.parse(method, [text])
    assert "\n" not in str(caught.value)


def test_wrong_options_of_the_command_end_in_usage(outside, tiny_folder, capsys, monkeypatch):
    module("mine", OPTIONS)
    from sifm_min import immunize
    for extra, says in ((("--option", "size=3"), "mine:method has no option size"),
                        (("--option", "count=1", "--option", "count=2"), "--option count is given twice"),
                        (("--lam", "2"), "mine:method has no option lam"),
                        (("--method", "mine:needy"), "mine:needy needs the option must"),
                        (("--method", "mine:missing"), "mine has no function or class missing"),
                        (("--method", "sifm", "--lam", "2", "--option", "lam=3"), "--option lam and --lam are the same"),
                        (("--method", "magic"), "'magic' is none of sifm, ")):
        arguments = ["photo.png", "--prompt", PROMPT, "--editor", str(tiny_folder), "-o", "out", "--method",
                     "mine:method", *extra]
        assert immunize.main(arguments) == cli.USAGE
        told = capsys.readouterr().err
        assert says in told and "Traceback" not in told and not Path("out").exists(), told


def test_uncounted_passes_are_unknown_in_the_report(outside, tiny_folder):
    module("mine", OPTIONS)
    editor = load_editor(tiny_folder)
    report = sifm_min.immunize(smooth(40, 40), editor, PROMPT, method="mine:method", steps=2).report
    assert report["passes"] == "unknown" and report["options"]["rate"] == 0.5
    assert sifm_min.immunize(smooth(40, 40), editor, PROMPT, method="mine:open_minded", steps=1, factor=2).report[
        "loss"][0]["loss"] == pytest.approx(2 * report["loss"][0]["loss"])
    json.dumps(report)


@pytest.mark.slow
def test_a_keyword_called_prompts_gets_the_texts(tiny_folder):
    seen = []

    def method(editor, x_orig, contexts, *, generator, prompts):
        seen.append((prompts, len(contexts)))
        return lambda x_imu, step: x_imu.sum()

    sifm_min.immunize(smooth(40, 40), load_editor(tiny_folder), [PROMPT, "b"], method=method, steps=1)
    assert seen == [([PROMPT, "b"], 2)]


MISTAKES = {
    "no module": ("nowhere:method", "there is no module nowhere, neither in the working folder nor installed"),
    "no function": ("mine:other", "mine has no function or class other"),
    "not callable": ("mine:VALUE", "mine has no function or class VALUE"),
    "no name": ("mine:", "'mine:' is not of the form module:name"),
    "syntax": ("broken:method", "importing broken failed: "),
    "import": ("lacking:method", "importing lacking failed: No module named 'no_such_package'"),
    "arguments": ("mine:wrong", "the method mine:wrong cannot be called as method(editor, x_orig, contexts, generator=..."),
    "a taken name": ("mine:clash", "the method mine:clash has an option steps, which immunize has as well; rename it"),
    "no loss": ("mine:no_loss", "the objective of mine:no_loss must return a loss"),
    "no gradient": ("mine:constant", "the objective of mine:constant must return a loss"),
    "no number": ("mine:no_number", "the objective of mine:no_number must return its terms as a dict of numbers"),
    "no such": ("magic", "method 'magic': choose one of sifm, "),
}
WRONG = """
import torch
VALUE = 3
def wrong(editor): pass
def clash(editor, x_orig, contexts, *, generator, steps=3): pass
def no_loss(editor, x_orig, contexts, *, generator): return lambda x_imu, step: None
def no_number(editor, x_orig, contexts, *, generator): return lambda x_imu, step: (x_imu.sum(), {"a": x_imu})
def constant(editor, x_orig, contexts, *, generator): return lambda x_imu, step: torch.ones(())
"""


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_method_that_is_none_is_one_sentence(mistake, outside, tiny_folder):
    module("mine", WRONG)
    module("broken", "def method(:")
    module("lacking", "import no_such_package")
    method, says = MISTAKES[mistake]
    with pytest.raises(ValueError, match=re.escape(says)) as caught:
        sifm_min.immunize(smooth(40, 40), load_editor(tiny_folder), PROMPT, method=method, steps=1)
    assert "\n" not in str(caught.value)


# --------------------------------------------------------------------------------------------------- incomplete editors

class Half(Editor):
    """An editor that was left half done."""

    tap_names = default_taps = ("a",)

    def context(self, prompts):
        return torch.zeros(len(prompts), 1, 1)


class Stranger:
    """An object with some of an editor's names."""

    device, name = torch.device("cpu"), "stranger"

    def encode(self, pixels):
        raise AssertionError("an incomplete editor was used")


def test_an_incomplete_editor_is_told_what_it_lacks():
    half = Half(name="half", scheduler=schedulers.load(None), defaults=Defaults(size=64))
    for editor, says in ((half, "the editor Half lacks features, predict, encode, decode, scaled; derive it from"),
                         (Stranger(), "the editor Stranger lacks kind, dtype, defaults, notice, "),
                         (3, "the editor int lacks name, kind, device, "), (Half, "the editor Half lacks name, device, ")):
        with pytest.raises(ValueError, match=re.escape(says)) as caught:
            sifm_min.immunize(smooth(40, 40), editor, PROMPT, steps=1)
        assert "\n" not in str(caught.value) and "sifm_min.editors.base.Editor" in str(caught.value)


def test_every_needed_name_is_missed(outside):
    """And the editors of the package have them all."""
    from sifm_min.editors import base
    editor = load_editor("my_editor:Toy")
    check(editor)
    for name in ("miniature", "miniature-sd3"):
        check(load_editor(name, device="cpu"))
    for name in base.NEEDED:
        part = type("Part", (), {key: getattr(editor, key) for key in base.NEEDED if key != name})()
        with pytest.raises(ValueError, match=f"the editor Part lacks {name};"):
            check(part)


def test_editors_by_name_are_refused_in_a_sentence(outside, capsys):
    module("mine", "def make(device='cpu'):\n    return 3\ndef bare():\n    return 3\n")
    from sifm_min import edit
    for name, extra, says in (("mine:make", (), "the editor int lacks name"),
                              ("mine:bare", ("--device", "cpu"), "mine:bare cannot be called with device=...: "),
                              ("nowhere:make", (), "there is no module nowhere"),
                              ("my_editor:Toy", ("--revision", "main"), "my_editor:Toy cannot be called with revision=...")):
        assert edit.main(["photo.png", "--prompt", PROMPT, "--editor", name, "-o", "out", *extra]) == cli.USAGE
        told = capsys.readouterr().err
        assert says in told and "Traceback" not in told and told.count("\n") == 1, told


# ------------------------------------------------------------------------------------------ options and kinds of editors

@pytest.mark.slow
@pytest.mark.parametrize("extra", [("--noisy", "deploy"), ("--method", "editshield", "--variant", "released"),
                                   ("--option", "noisy=deploy"),
                                   ("--method", "editshield", "--preset", "native")], ids=" ".join)
def test_instruction_options_are_refused_on_img2img(extra, tmp_path, monkeypatch, capsys):
    from sifm_min import immunize
    monkeypatch.chdir(tmp_path)
    smooth(40, 40).save("a.png")
    folder = tiny_sd3.write(tmp_path / "tiny-sd3")
    arguments = ["a.png", "--prompt", PROMPT, "--editor", str(folder), "--steps", "1", "-o", "out", *extra]
    assert immunize.main(arguments) == cli.USAGE
    told = capsys.readouterr().err
    assert "is for instruction editors, and " in told and "tiny-sd3 edits by img2img: " in told and not Path("out").exists()


def test_deploy_noise_is_refused_before_any_work(tmp_path, monkeypatch):
    editor = load_editor(tiny_sd3.write(tmp_path / "tiny-sd3"), device="cpu")
    monkeypatch.setattr(editor, "context", lambda prompts: pytest.fail("text was encoded"))
    with pytest.raises(ValueError, match="noisy deploy of sifm is for instruction editors, and .*tiny-sd3 edits by img2img"):
        sifm_min.immunize(smooth(40, 40), editor, PROMPT, noisy="deploy")
    x = images.to_pixels(smooth(64, 64))
    with pytest.raises(ValueError, match="noisy 'deploy': choose one of paper"):         # the objective alone, by itself
        sifm_min.METHODS["sifm"](editor, x, [], generator=torch.Generator(), noisy="deploy")
