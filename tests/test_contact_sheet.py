"""Contact sheets: pictures unchanged, captions in any script, and never the same box for two letters."""

from pathlib import Path

import numpy as np
import pytest
import tiny_font
from PIL import Image, ImageDraw, features

from sifm_min.files import contact_sheet, fonts
from sifm_min.files.fonts import Letters

JAPANESE = "\u65e5\u672c\u8a9e"
ARABIC = "\u0633\u0645\u0627\u0621"


def rgb(height=13, width=17, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def drawn(letters, text):
    """A line as pixels."""
    image = Image.new("L", (400, 40), "white")
    letters.draw(ImageDraw.Draw(image), 5, 5, letters.legible(text))
    return np.asarray(image)


def test_a_sheet_holds_its_pictures_unchanged():
    small = [rgb(64, 64, seed) for seed in range(5)]
    made = contact_sheet.sheet([(f"picture {i}", image) for i, image in enumerate(small)])
    assert made.mode == "RGB"
    pixels = np.asarray(made)
    for image in small:                                      # each scaled up by 6, without smoothing
        block = np.asarray(image.resize((384, 384), Image.Resampling.NEAREST))
        rows = np.flatnonzero((pixels[:, :, None] == block[0, 0]).all(-1).any(1).any(1))
        assert any(np.array_equal(pixels[y:y + 384, x:x + 384], block) for y in rows[:40]
                   for x in np.flatnonzero((pixels[y] == block[0, 0]).all(-1)) if x + 384 <= made.width)


def test_a_sheet_fits_pictures_of_any_size_and_kind():
    columns = [("a" * 200, rgb(37, 513)), ("word " * 100, rgb(513, 37)), ("", Image.new("RGBA", (2000, 1500))),
               ("tiny", Image.new("L", (1, 1)))]
    made = contact_sheet.sheet(columns, footer="a remark " * 60)
    assert made.width == 4 * 384 + 5 * 12 and 384 < made.height < 800
    assert contact_sheet.sheet(columns).height < made.height
    with pytest.raises(ValueError, match="at least one"):
        contact_sheet.sheet([])


def test_transparency_is_white_on_a_sheet():
    for mode, clear in (("RGBA", (9, 9, 9, 0)), ("LA", (9, 0))):
        made = contact_sheet.sheet([("", Image.new(mode, (384, 384), clear))], folders=())
        assert np.asarray(made).min() == 255


def test_captions_are_wrapped_and_end_in_dots():
    text = "make the sky look like a thunderstorm over a dark and endless ocean at night " * 4 + "x" * 90
    letters = Letters([text], 18, ())
    rows = contact_sheet.wrapped(text, letters, 200, lines=99)
    assert "".join(rows).replace(" ", "") == text.replace(" ", "")
    assert all(letters.length(row) <= 200 for row in rows)
    cut = contact_sheet.wrapped(text, letters, 200, lines=3)
    assert len(cut) == 3 and cut[:2] == rows[:2] and cut[2].endswith("...") and letters.length(cut[2]) <= 200
    assert contact_sheet.wrapped("  ", letters, 200, lines=3) == []


# -- letters -----------------------------------------------------------------------------------------------------------

def test_letters_that_no_font_has_are_code_points(tmp_path):
    text = f"sky {JAPANESE}\U0001f600 \udcff"
    letters = Letters([text], 18, (tmp_path,))
    assert letters.legible(text) == "sky [U+65E5][U+672C][U+8A9E][U+1F600] [U+DCFF]"
    assert letters.legible("sky") == "sky"


def test_code_points_are_not_broken_between_lines():
    letters = Letters([JAPANESE * 9], 18, ())
    rows = contact_sheet.wrapped(JAPANESE * 9, letters, 200, lines=99)
    assert len(rows) > 5 and all(row.startswith("[U+") and row.endswith("]") for row in rows)


def test_a_font_of_the_system_is_found_and_draws_each_letter(tmp_path):
    tiny_font.write(tmp_path / "deep" / "inside" / "japanese.TTF", JAPANESE)
    letters = Letters([f"sky {JAPANESE}"], 18, (tmp_path / "none", tmp_path))
    assert letters.legible(f"sky {JAPANESE}") == f"sky {JAPANESE}"
    pictures = [drawn(letters, letter).tobytes() for letter in JAPANESE]
    missing = Letters([JAPANESE], 18, ())
    boxes = {missing.plain.getmask(letter).getbbox() for letter in JAPANESE}
    assert len(set(pictures)) == 3 and len(boxes) == 1       # three letters, where Pillow's own font draws one box
    assert letters.length(JAPANESE) == pytest.approx(3 * 18 * 0.9, abs=3)


def test_a_sheet_draws_its_captions_with_the_fonts_found(tmp_path):
    tiny_font.write(tmp_path / "japanese.ttf", JAPANESE)
    columns = [(JAPANESE, rgb())]
    with_font, without = (contact_sheet.sheet(columns, folders=folders) for folders in ((tmp_path,), ()))
    expected = Image.new("RGB", with_font.size, "white")
    Letters([JAPANESE], 18, (tmp_path,)).draw(ImageDraw.Draw(expected), 12, 12, JAPANESE)
    assert np.array_equal(np.asarray(with_font)[:35], np.asarray(expected)[:35])
    assert with_font.tobytes() != without.tobytes()


def test_few_fonts_with_most_letters_are_chosen(tmp_path):
    tiny_font.write(tmp_path / "a-one-letter.ttf", JAPANESE[0])
    tiny_font.write(tmp_path / "b-two-letters.ttf", JAPANESE[:2])
    tiny_font.write(tmp_path / "c-other.otf", ARABIC)
    letters = Letters([JAPANESE + ARABIC], 18, (tmp_path,))
    assert [Path(font.path).name for font in letters.fonts[1:]] == ["c-other.otf", "b-two-letters.ttf"]
    assert letters.unknown == {JAPANESE[2]}


def test_upright_faces_of_usual_weight_come_first(tmp_path):
    for name in ("A-Bold.ttf", "B-Italic.ttf", "C.ttf", "D-Mono.ttf", "LastResort.otf", "notes.txt"):
        tiny_font.write(tmp_path / name, JAPANESE)
    assert [Path(path).name for path in fonts._files((tmp_path,))] == ["C.ttf", "A-Bold.ttf", "B-Italic.ttf", "D-Mono.ttf"]


def test_damaged_fonts_are_passed_over(tmp_path):
    whole = tiny_font.build(JAPANESE)
    for i, content in enumerate((b"", b"text", whole[:60], whole[:200], whole[:12] + bytes(100) + whole[112:])):
        (tmp_path / f"{i}.ttf").write_bytes(content)
    (tmp_path / "folder.ttf").mkdir()
    assert Letters([JAPANESE], 18, (tmp_path,)).unknown == set(JAPANESE)
    tiny_font.write(tmp_path / "more" / "z.ttf", JAPANESE)
    assert Letters([JAPANESE], 18, (tmp_path / "more", tmp_path)).unknown == set()


def test_a_font_without_any_letter_wanted_or_of_blanks_has_none(tmp_path, monkeypatch):
    tiny_font.write(tmp_path / "other.ttf", ARABIC)
    assert Letters([JAPANESE], 18, (tmp_path,)).unknown == set(JAPANESE)
    monkeypatch.setattr(tiny_font, "_box", lambda width, height: b"")
    tiny_font.write(tmp_path / "blank.ttf", JAPANESE)
    assert Letters([JAPANESE + "!"], 18, (tmp_path,)).unknown == set(JAPANESE)


def test_invisible_characters_are_not_drawn():
    joined = "a\u200db\u200fc\ufe0fd\x1b[2J\x00e\u0301"
    letters = Letters([joined], 18, ())
    assert letters.legible(joined) == "abcd[2J[U+00E9]"       # and an accent is one with its letter


def test_an_accent_is_drawn_with_its_letter(tmp_path):
    tiny_font.write(tmp_path / "a.ttf", "x\u0331")            # no composed letter exists
    letters = Letters(["x\u0331"], 18, (tmp_path,))
    assert len(letters._runs("x\u0331")) == 1


def test_right_to_left_without_raqm_is_turned(monkeypatch):
    monkeypatch.setattr(features, "check", lambda name: False)
    assert fonts._in_reading_order("\u05d0\u05b8\u05d1 \u05d2") == "\u05d2 \u05d1\u05d0\u05b8"
    assert fonts._in_reading_order("abc") == "abc"
    monkeypatch.setattr(features, "check", lambda name: True)
    assert fonts._in_reading_order("\u05d0\u05d1") == "\u05d0\u05d1"


def test_the_font_folders_of_each_system(tmp_path):
    linux = fonts.system_folders({"XDG_DATA_DIRS": "/a:/b"}, "linux", "/home/me")
    assert linux == [Path("/a/fonts"), Path("/b/fonts"), Path("/home/me/.local/share/fonts"), Path("/home/me/.fonts")]
    assert fonts.system_folders({}, "linux", "/home/me")[:2] == [Path("/usr/local/share/fonts"), Path("/usr/share/fonts")]
    assert Path("/System/Library/Fonts") in fonts.system_folders({}, "darwin", "/Users/me")
    windows = fonts.system_folders({"WINDIR": "D:/Win", "LOCALAPPDATA": "D:/Local"}, "win32", "D:/me")
    assert windows == [Path("D:/Win/Fonts"), Path("D:/Local/Microsoft/Windows/Fonts")]
