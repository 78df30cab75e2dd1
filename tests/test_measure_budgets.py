"""The tool that measures what a budget costs: its choice of photographs, its comparison at equal shift, its journal."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from photographs import smooth
from PIL import Image
from test_latent_spaces import network, write_authors

from sifm_min.models.latent_spaces import SPACES

source = Path(__file__).resolve().parents[1] / "tools" / "measure_budgets.py"
spec = importlib.util.spec_from_file_location("measure_budgets", source)
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)


def test_values_at_a_shift_lie_on_the_line_between_budgets():
    uniform = [{"shift": shift, "ssim": ssim} for shift, ssim in ((1.0, 0.8), (0.5, 0.95), (0.7, 0.9))]
    assert tool.at_shift(uniform, 0.6, "ssim") == pytest.approx(0.925)
    assert tool.at_shift(uniform, 0.9, "ssim") == pytest.approx(0.9 - 0.1 * 2 / 3)
    assert tool.at_shift(uniform, 0.4, "ssim") is tool.at_shift(uniform, 1.1, "ssim") is None


def test_photographs_come_from_the_categories_in_turn(tmp_path):
    rows = [("a", "evaluate"), ("a", "train"), ("a", "evaluate"), ("b", "evaluate"), ("a", "evaluate")]
    (tmp_path / "LICENSES.jsonl").write_text("".join(
        json.dumps({"file": f"{category}/{i}.jpg", "category": category, "use": use}) + "\n"
        for i, (category, use) in enumerate(rows)))
    found = [path.relative_to(tmp_path).as_posix() for path in tool.photographs(tmp_path, "evaluate", 3)]
    assert found == ["a/0.jpg", "b/3.jpg", "a/2.jpg"]


def test_table_has_the_gain_at_equal_shift_and_what_is_left_out():
    def values(shift, ssim):
        return dict.fromkeys(tool.MEASURES, 0.0) | {"shift": shift, "ssim": ssim, "lpips": None, "seconds": 2.0}

    uniform = {"uniform 3": values(0.4, 0.98), "uniform 5": values(0.6, 0.94), "uniform 7": values(0.8, 0.88)}
    found = {name: uniform | {"texture 7": values(shift, 0.97), "texture 9": values(0.9, 0.95), "texture 11": values(1, 0.9)}
             for name, shift in (("x", 0.5), ("y", 0.6), ("z", 0.3))}
    lines = tool.table(found)
    assert lines[0].split(" | ")[1:4] == ["shift", "ssim", "fsim"]              # no lpips
    assert "texture 7 minus uniform at the same shift (2 photographs, 1 outside):" in lines
    assert any(line.startswith("  ssim: 0.020 [0.010, 0.030]") for line in lines)
    assert "texture 9 minus uniform at the same shift (0 photographs, 3 outside):" in lines
    # At the shift 0.6 of uniform 5, x is a quarter of the way from 0.97 to 0.95, y at its start and z halfway.
    last = lines.index("texture minus uniform 5 at the shift of uniform 5 (3 photographs, 0 outside):")
    gains = [0.97 - 0.02 / 4 - 0.94, 0.97 - 0.94, 0.97 - 0.02 / 2 - 0.94]
    assert lines[last + 1].startswith(f"  ssim: {sum(gains) / 3:.3f} [")


def test_a_run_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    write_authors(tmp_path / "space", SPACES["sd1"], network(SPACES["sd1"], 0))
    (tmp_path / "photos").mkdir()
    for seed in range(2):
        smooth(48, 40, seed).save(tmp_path / "photos" / f"{seed}.png")
    argv = ["--photos", str(tmp_path / "photos"), "--size", "32", "--steps", "1", "--editor", f"latents:{tmp_path / 'space'}",
            "-o", str(tmp_path / "journal.jsonl")]
    tool.main([*argv, "--images", "1"])
    first = (tmp_path / "journal.jsonl").read_text()
    assert len(first.splitlines()) == len(tool.ARMS)
    tool.main([*argv, "--images", "2"])
    second, printed = (tmp_path / "journal.jsonl").read_text(), capsys.readouterr().out
    assert second.startswith(first) and len(second.splitlines()) == 2 * len(tool.ARMS)
    monkeypatch.setattr(tool, "measure", lambda *arguments: pytest.fail("measured again"))
    tool.main([*argv, "--images", "2"])
    assert printed.endswith(capsys.readouterr().out)
    budgets = {row["arm"]: row["values"]["mean budget"] for row in map(json.loads, second.splitlines())}
    assert [budgets[f"uniform {n}"] for n in (3, 5, 7)] == [3, 5, 7] and budgets["texture 7"] < 7


def test_a_sheet_shows_every_budget_above_the_calmest_part(tmp_path, monkeypatch):
    write_authors(tmp_path / "space", SPACES["sd1"], network(SPACES["sd1"], 0))
    pixels = np.random.default_rng(0).integers(60, 200, (96, 80, 3), np.uint8)
    pixels[20:68, 10:58] = 120
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    monkeypatch.setattr(tool, "PART", 40)
    left, top, side = tool.calmest(Image.fromarray(pixels))
    assert 10 <= left <= 18 and 20 <= top <= 28 and side == 40
    tool.main(["--photos", str(tmp_path / "photo.png"), "--size", "96", "--steps", "1", "--sheet",
               "--editor", f"latents:{tmp_path / 'space'}", "-o", str(tmp_path / "sheet.png")])
    with Image.open(tmp_path / "sheet.png") as made:
        assert made.width >= (1 + len(tool.SHOWN)) * 40 * tool.ZOOM and made.height >= 96 + 40 * tool.ZOOM
        columns = {made.convert("RGB").getpixel((x, made.height - 60)) for x in range(made.width)}
    assert (120, 120, 120) in columns and len(columns) > 3   # the original's calm part, and changed ones
