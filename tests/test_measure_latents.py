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


@pytest.mark.slow
def test_the_estimate_runs_nothing(run, tmp_path):
    out, _ = run("--estimate")
    assert "CPU hours for 2 photographs of 32x32 and 2 spaces" in out and not (tmp_path / "out").exists()


def test_purified_pictures_are_compared_with_each_other(folder):  # noqa: F811
    editor = latents.load_latents(f"latents:{folder}", device="cpu")
    found = tool.measure(editor, photo(32, 32), photo(32, 32), ("jpeg-50",))
    assert max(value for of in found.values() for value in of.values()) < 1e-3


@pytest.mark.parametrize(("words", "said"), [
    (["--images", "3"], "2 photographs for evaluation, fewer than --images 3"),
    (["--spaces", "sd9"], "--spaces sd9: there are sd1, sd3"),
    (["--size", "30"], ""),
])
def test_mistakes_end_the_tool_with_a_sentence(run, words, said):
    with pytest.raises(SystemExit) as ended:
        run(*words)
    assert said in str(ended.value)
