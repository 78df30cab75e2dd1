"""The paper's commands on folders in the published layout, small and with random weights, as diffusers writes them, judged by
a panel behind a service of our own: nothing but weights and a key separates this from the paper's tables."""

import hashlib
from pathlib import Path
from types import MappingProxyType

import pytest
import small_editors
import small_sd3
from fake_gemini import FakeGemini, serve_panel, verdict
from test_evaluate import loader

import sifm_min
from sifm_min import cli, editors, evaluate, miniature
from sifm_min.experiments import manifest, results
from sifm_min.judging import canaries
from sifm_min.purifiers import attacks

NAMES = ("instruct-pix2pix", "hq-edit", "sd3")
TABLES = {"instruct-pix2pix": "Table III", "hq-edit": "Table IV", "sd3": "Table II"}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """{name: (folder, editor)} of the three, made by diffusers' save_pretrained."""
    base = tmp_path_factory.mktemp("models")
    tokenizers = small_sd3.write_tokenizers(tmp_path_factory.mktemp("tokenizers"))
    for seed, name in enumerate(NAMES[:2]):
        small_editors.pipeline(tokenizer=tokenizers / "tokenizer", seed=seed).save_pretrained(base / name)
    small_sd3.write(small_sd3.pipeline(tokenizers=tokenizers), base / "sd3")
    return {name: (str(base / name), sifm_min.load_editor(base / name)) for name in NAMES}


@pytest.fixture
def run(models, tmp_path, monkeypatch):
    """Run a suite on one picture of 64 pixels, its two prompts with captions, in tmp_path; a judge's word hangs on the edit."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(canaries, "SIZE", 48)
    monkeypatch.setenv("JUDGE_KEY", "AQ.sentinel-0123456789")
    # The weights are read once for all tests; the options that an editor is loaded with are the command's business here.
    monkeypatch.setattr(editors, "load_editor", loader(dict(models.values())))
    sample = miniature.samples(1)[0]
    sample.image.resize((64, 64)).save("0.png")
    manifest.write_manifest("manifest.jsonl", [manifest.Item(
        id="p0", image="0.png", category=sample.category, prompt=sample.prompt, unseen_prompts=tuple(sample.unseen_prompts[:1]),
        sha256=hashlib.sha256(Path("0.png").read_bytes()).hexdigest(), caption="the result",
        unseen_captions=("another result",))])
    for _, editor in models.values():
        monkeypatch.setattr(editor, "defaults", editor.defaults)             # --strength writes into it

    def hanging(call):
        number = int(call.digest(), 16)
        return verdict(number % 3 == 0, number % 5 == 0)
    with FakeGemini() as server:
        serve_panel(server, "panel.json", hanging)

        def run(suite, name, *argv):
            server.calls.clear()
            methods = ("--methods", "photoguard-encoder,sifm") if suite in ("white-box", "transfer", "consistency") else ()
            steps = "4" if name == "sd3" or "sd3" in " ".join(argv) else "2"                 # of which img2img takes a share
            code = evaluate.main(["run", suite, "--editor", models[name][0], "--manifest", "manifest.jsonl", "-o", "out",
                                  "--panel", "panel.json", "--steps", "1", "--edit-steps", steps, "--set", "timesteps=1",
                                  *methods, "--quiet", *argv])
            return code, len(server.calls)
        yield run


def printed(capsys, *argv):
    capsys.readouterr()
    assert evaluate.main(["table", "out", *argv]) == cli.OK
    return capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_white_box_and_consistency_end_in_the_papers_tables(run, capsys, name):
    code, asked = run("white-box", name)
    assert code == cli.OK and asked > 0
    assert run("consistency", name) == (cli.OK, 0)           # the same edits, judged already
    text = printed(capsys)
    assert f"{TABLES[name]}, " in text and "Table I" in text and "### Agreement of judges" in text
    row = next(line for line in text.splitlines() if line.startswith("| SIFM |"))
    assert row.count("%") == 2 and "Unseen prompts: ISR" in text
    assert "| SIFM, paper |" in text and "gemini-2.5-pro, gemini-2.5-flash" in text
    strange = {"sd3": "image guidance"}.get(name, "strength")
    assert f", {strange} " not in text                       # no editor is said to have what it has not
    for form in ("csv", "latex"):
        assert "sifm" in printed(capsys, "--format", form).lower()
    assert evaluate.main(["report", "out"]) == cli.OK and "ISR against prompts" in Path("out/report.html").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("suite", ["ablation", "lambda"])
def test_ablation_and_lambda_by_img2img(run, capsys, suite):
    assert run(suite, "sd3")[0] == cli.OK
    text = printed(capsys)
    assert {"ablation": "Table VI, ", "lambda": "Table VII, "}[suite] in text
    assert text.count(", paper |") == {"ablation": 3, "lambda": 7}[suite]


@pytest.mark.slow
def test_transfer_between_an_instruction_and_a_caption(run, models, capsys):
    """Each editor gets its own texts, and options of one editor do not reach the other."""
    told = {name: [] for name in NAMES}
    with pytest.MonkeyPatch.context() as patch:
        for name, (_, editor) in models.items():
            patch.setattr(editor, "edit", lambda images, prompts, *, name=name, edit=editor.edit, **options: (
                told[name].append((tuple(prompts), options)), edit(images, prompts, **options))[1])
        assert run("transfer", "instruct-pix2pix", "--other", models["sd3"][0], "--image-guidance", "1.2", "--strength",
                   "0.5")[0] == cli.OK
    (item,) = manifest.read_manifest("manifest.jsonl")
    assert {prompts for prompts, _ in told["instruct-pix2pix"]} == {(item.prompt,)}
    assert {prompts for prompts, _ in told["sd3"]} == {(item.caption,)} and item.caption != item.prompt
    assert all(options["image_guidance"] == 1.2 for _, options in told["instruct-pix2pix"])
    assert not any("image_guidance" in options for _, options in told["sd3"])
    text = printed(capsys)
    assert "Table V, instruct-pix2pix to sd3" in text and "Table V, sd3 to instruct-pix2pix" in text
    assert "strength 0.5" in text and "image guidance 1.2" in text


@pytest.mark.parametrize("argv, sentence", [
    (("white-box", "sd3", "--image-guidance", "1.2"), "--image-guidance is for instruction editors, which sd3 is not"),
    (("white-box", "hq-edit", "--strength", "0.5"), "--strength is for img2img, which hq-edit is not"),
])
def test_an_option_that_no_editor_has_is_refused_before_any_work(run, capsys, argv, sentence):
    assert run(*argv) == (cli.USAGE, 0) and sentence in capsys.readouterr().err and not Path("out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name, other", [("sd3", "hq-edit"), ("instruct-pix2pix", "sd3")])
def test_attacks_that_need_an_editor_or_move_the_picture(run, models, capsys, monkeypatch, name, other):
    kept = ("crop-0.75", "vae", "vae-other", "regenerate-0.15")
    monkeypatch.setattr(attacks, "ATTACKS", MappingProxyType({one: attacks.ATTACKS[one] for one in kept}))
    assert run("robustness", name, "--other", models[other][0])[0] == cli.OK
    (group,) = results.collect("out")
    found = {cell["attack"] for cell in group["cells"]}
    assert found == {None, *kept} - (set() if name == "sd3" else {"regenerate-0.15"}) and group["missing"] == 0
    assert not any(cell["failed"] for cell in group["cells"])
    moved = [cell for cell in group["cells"] if cell["attack"] == "crop-0.75" and cell["method"]]
    assert moved and all(cell["metrics"]["psnr"] for cell in moved)
    clean = next(cell for cell in group["cells"] if cell["attack"] == "crop-0.75" and not cell["method"])
    assert {cell["edited_original"] for cell in moved} == {clean["edited"]}  # compared with the clean picture, moved as well
    assert "| worst for each picture |" in printed(capsys)
