"""tools/measure_latents.py on two small pictures: every figure of its table from the pictures, and a run that goes on."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from test_latent_spaces import home, network, write_authors  # noqa: F401 (home is a fixture)
from test_latents import folder, photo  # noqa: F401 (folder is a fixture)

from sifm_min.editors import latents

source = Path(__file__).resolve().parents[1] / "tools" / "measure_latents.py"
spec = importlib.util.spec_from_file_location("measure_latents", source)
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)


@pytest.fixture
def run(folder, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setattr(tool, "FAST", ("jpeg-75", "resize-0.75"))
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(3):
        photo(60, 40, seed=i).save(photos / f"{i}.png")
    (photos / "LICENSES.jsonl").write_text("".join(
        json.dumps({"file": f"{i}.png", "use": use}) + "\n" for i, use in enumerate(("evaluate", "train", "evaluate"))))

    def command(*argv):
        threads = torch.get_num_threads()
        try:
            tool.main(["--photos", str(photos), "--weights", str(folder), "--images", "2", "--size", "32", "--steps", "2",
                       "--out", str(tmp_path / "out"), *argv])
        finally:
            torch.set_num_threads(threads)
        return capsys.readouterr()
    return command


def journal(tmp_path):
    return [json.loads(line) for line in (tmp_path / "out" / "shifts.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_the_table_is_of_the_journal_and_a_cut_run_goes_on(run, tmp_path):
    out, err = run()
    rows = journal(tmp_path)
    assert {row["picture"] for row in rows} == {"0.png", "2.png"} and len(rows) == 2 * 5
    assert [row["arm"] for row in rows[:5]] == ["noise", "white box sd1", "white box sd3", "all", "robust"]
    assert max(row["steps_used"] for row in rows) <= 7
    of = {(row["picture"], row["arm"]): row["shifts"] for row in rows}
    for name in ("0.png", "2.png"):                          # each white box moves its own space further than the other does
        for space, other in (("sd1", "sd3"), ("sd3", "sd1")):
            own, foreign = (of[name, f"white box {one}"]["none"][space] for one in (space, other))
            assert own > foreign and own > of[name, "noise"]["none"][space]
    kept = np.median([of[name, "all"]["none"]["sd1"] / of[name, "white box sd1"]["none"]["sd1"] for name in ("0.png", "2.png")])
    after = np.median([of[name, "robust"]["jpeg-75"]["sd1"] / of[name, "robust"]["none"]["sd1"] for name in ("0.png", "2.png")])
    cells = next(line for line in out.splitlines() if line.startswith("| sd1 |")).split(" | ")
    assert cells[4].startswith(f"{kept:.2f} [") and cells[6].startswith(f"{after:.2f} [")
    ratio = np.median([of[name, "robust"]["resize-0.75"]["sd1"] / of[name, "noise"]["resize-0.75"]["sd1"]
                       for name in ("0.png", "2.png")])
    cells = next(line for line in out.splitlines() if line.startswith("| resize-0.75 |")).strip("| ").split(" | ")
    assert cells[5].startswith(f"{ratio:.2f} [")

    path = tmp_path / "out" / "shifts.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-2]) + '{"key": "cut o')
    again, err = run()
    assert again == out and err.count("CPU seconds") == 2    # the last two perturbations
    assert run("--table") == (out, "")


@pytest.mark.slow
def test_shares_have_a_journal_each_and_one_table(run, tmp_path):
    with pytest.raises(SystemExit, match="no photograph is complete yet"):
        run("--table")
    one, _ = run("--shard", "0/2", "--steps", "1")
    assert one.startswith("1 photographs")
    two, err = run("--shard", "1/2", "--steps", "1")
    assert two.startswith("2 photographs") and err.count("CPU seconds") == 5
    files = [path.name for path in sorted((tmp_path / "out").iterdir()) if not path.name.startswith(".")]
    assert files == ["shifts-0-of-2.jsonl", "shifts-1-of-2.jsonl"]
    assert run("--steps", "1") == (two, "")                  # a run of both shares has nothing left to do
    with tool.Ledger(tmp_path / "out" / "shifts.jsonl"), pytest.raises(SystemExit, match="another run"):
        run("--steps", "1")


@pytest.mark.slow
def test_turns_of_the_spaces_are_for_all_spaces_alone(run, tmp_path, monkeypatch):
    seen, immunize = {}, tool.sifm_min.immunize

    def spy(image, editor, **options):
        result = immunize(image, editor, **options)
        seen.setdefault((len(editor.spaces), options["robust"]), [{*step} & {"sd1", "sd3"} for step in result.report["loss"]])
        return result

    monkeypatch.setattr(tool.sifm_min, "immunize", spy)
    run("--images", "1", "--spaces-per-step", "1")
    assert seen == {(1, False): [{"sd1"}] * 2, (2, False): [{"sd1"}, {"sd3"}], (2, True): [{"sd1"}, {"sd3"}]}
    rows = {row["arm"]: row["shifts"] for row in journal(tmp_path)}
    first, both = {"sd1"}, {"sd1", "sd3"}
    assert {arm: {name: {*of} for name, of in rows[arm].items()} for arm in ("white box sd3", "all", "robust")} == {
        "white box sd3": {"none": both}, "all": {"none": both, "jpeg-75": first, "resize-0.75": first},
        "robust": {"none": both, "jpeg-75": both, "resize-0.75": both}}


@pytest.mark.slow
def test_the_estimate_runs_nothing(run, tmp_path):
    out, _ = run("--estimate")
    assert "CPU hours for 2 photographs of 32x32 and 2 spaces" in out and not (tmp_path / "out").exists()


def test_purified_pictures_are_compared_with_each_other(folder):  # noqa: F811
    editor = latents.load_latents(f"latents:{folder}", device="cpu")
    clean, wanted = {}, {"none": editor.spaces, "jpeg-50": editor.spaces[:1]}
    found = tool.measure(photo(32, 32), photo(32, 32), wanted, clean)
    assert {name: [*of] for name, of in found.items()} == {"none": ["sd1", "sd3"], "jpeg-50": ["sd1"]}
    assert max(value for of in found.values() for value in of.values()) < 1e-3


def test_original_is_encoded_once_for_all_arms(folder, monkeypatch):  # noqa: F811
    editor = latents.load_latents(f"latents:{folder}", device="cpu")
    wanted, clean, seen = {"none": editor.spaces, "jpeg-50": editor.spaces[:1]}, {}, []
    plain = latents.LatentSpace.encode
    monkeypatch.setattr(latents.LatentSpace, "encode", lambda self, pixels: seen.append(self.name) or plain(self, pixels))
    found = [tool.measure(photo(32, 32), photo(32, 32, seed=seed), wanted, clean) for seed in (1, 2)]
    assert len(seen) == 3 + 2 * 3
    one, other = (photo(32, 32, seed=seed) for seed in (0, 2))
    after, before = (plain(editor.spaces[0], tool.images.to_pixels(tool.ATTACKS["jpeg-50"](image))) for image in (other, one))
    assert found[1]["jpeg-50"]["sd1"] == pytest.approx(tool.shifts.shift(after, before).item())


@pytest.mark.parametrize(("words", "said"), [
    (["--images", "3"], "2 photographs for evaluation, fewer than --images 3"),
    (["--spaces", "sd9"], "--spaces sd9: there are sd1, sd3"),
    (["--size", "30"], ""),
    (["--shard", "2/2"], ""),
])
def test_mistakes_end_the_tool_with_a_sentence(run, words, said):
    with pytest.raises(SystemExit) as ended:
        run(*words)
    assert said in str(ended.value)
