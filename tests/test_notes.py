"""edit and immunize say on stderr what reading a picture changed, and keep what decides how it looks."""

import json
import struct

import numpy as np
import pytest
import tiny_editor
from photographs import colours
from picture_files import chunk, icc_header, png
from PIL import Image

import sifm_min
from sifm_min import cli, edit
from sifm_min.files import png as png_file


def run(command, *argv):
    main = {"edit": edit.main, "immunize": sifm_min.immunize.main}[command]
    more = ["--steps", "1"] if command == "edit" else ["--steps", "1", "--method", "photoguard-encoder"]
    editor = [] if "--editor" in argv else ["--editor", "tiny"]
    return main([*editor, *argv, "--prompt", "make it night", "-o", command, *more])


def animation():
    frames = [Image.fromarray(colours(seed=seed)) for seed in range(3)]
    frames[0].save("a.gif", save_all=True, append_images=frames[1:])
    return "a.gif", "the first of 3 frames"


def webp():
    frames = [Image.fromarray(colours(seed=seed)) for seed in range(2)]
    frames[0].save("a.webp", save_all=True, append_images=frames[1:])
    return "a.webp", "the first of 2 frames"


def apng():
    frames = [Image.fromarray(colours(seed=seed)) for seed in range(4)]
    frames[0].save("a.png", save_all=True, append_images=frames[1:])
    return "a.png", "the first of 4 frames"


def press():
    Image.fromarray(colours()).convert("CMYK").save("a.jpg")
    return "a.jpg", "CMYK converted to RGB, without a colour profile"


def deep():
    with open("a.png", "wb") as file:
        file.write(png(colours().astype(np.uint16) * 257, 16, 2))
    return "a.png", "16 bits a channel, of which the upper 8 are kept"


@pytest.mark.slow
@pytest.mark.parametrize("source", [animation, webp, apng, press, deep])
@pytest.mark.parametrize("command", ["immunize", "edit"])
def test_the_command_says_what_reading_changed(loaded_once, capsys, command, source):
    name, note = source()
    assert run(command, name) == cli.OK
    assert f"{name}: {note}\n" in capsys.readouterr().err
    assert run(command, name, "--quiet", "--overwrite") == cli.OK
    assert capsys.readouterr().err == ""


def test_the_notes_are_in_the_json_of_both_commands(loaded_once, capsys):
    name, note = press()
    for command in ("edit", "immunize"):
        assert run(command, name, "--json") == cli.OK
        record = json.loads(capsys.readouterr().out.splitlines()[0])
        assert (record["notes"] if command == "edit" else record["input"]["notes"]) == [note]


@pytest.mark.slow
@pytest.mark.parametrize("command", ["immunize", "edit"])
def test_another_sampler_than_the_stored_one_is_told(tmp_path, monkeypatch, capsys, command):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "pndm"
    folder.mkdir()
    tiny_editor.write(folder)
    config = folder / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"_class_name": "PNDMScheduler", "skip_prk_steps": True}))
    Image.fromarray(colours()).save("a.png")
    assert run(command, "a.png", "--editor", str(folder)) == cli.OK
    told = [line for line in capsys.readouterr().err.splitlines() if "PNDM" in line]
    assert len(told) == 1 and "ancestral" in told[0].lower()


def test_an_edit_keeps_alpha_profile_and_colour_chunks(loaded_once):
    gamma = (b"gAMA", struct.pack(">I", 100000))
    with open("a.png", "wb") as file:
        file.write(png(np.dstack([colours(), colours(seed=1)[..., 0]]), 8, 6, chunk(*gamma)))
    Image.fromarray(colours()).save("b.png", icc_profile=icc_header())
    assert run("edit", "a.png", "b.png") == cli.OK
    with Image.open("edit/a_edited.png") as edited, Image.open("edit/b_edited.png") as other:
        assert edited.mode == "RGBA" and np.array_equal(np.asarray(edited)[..., 3], colours(seed=1)[..., 0])
        assert other.mode == "RGB" and other.info["icc_profile"] == icc_header()
    with open("edit/a_edited.png", "rb") as file:
        assert png_file.header(file.read()).chunks == (gamma,)


def test_an_edit_of_a_grey_picture_says_that_its_profile_is_gone(loaded_once, capsys):
    Image.fromarray(colours()).convert("L").save("a.png", icc_profile=icc_header("GRAY"))
    assert run("edit", "a.png") == cli.OK
    assert "a.png: its colour profile is for grey pixels, and the edit has colours: left out\n" in capsys.readouterr().err
    with Image.open("edit/a_edited.png") as edited:
        assert edited.mode == "RGB" and "icc_profile" not in edited.info


def test_the_preview_has_the_colours_of_the_picture(loaded_once):
    Image.fromarray(colours()).save("a.png", icc_profile=icc_header())
    with open("b.png", "wb") as file:
        file.write(png(colours(), 8, 2, chunk(b"gAMA", struct.pack(">I", 100000))))
    assert run("immunize", "a.png", "b.png") == cli.OK
    with Image.open("immunize/a_preview.png") as preview:
        assert preview.info["icc_profile"] == icc_header()
    with Image.open("immunize/b_preview.png") as preview:
        assert preview.info["gamma"] == 1.0


# -- greyness ----------------------------------------------------------------------------------------------------------

def grey_sources():
    grey = Image.fromarray(colours()).convert("L")
    grey.save("l.png")
    grey.convert("LA").save("la.png")
    grey.convert("RGB").save("rgb.png")
    grey.convert("RGB").save("rgb.jpg", quality=90)
    grey.convert("RGBA").save("rgba.png")
    grey.convert("RGB").save("rgb.webp", lossless=True)
    grey.convert("RGB").save("rgb.tiff")
    grey.save("palette.gif")
    grey.convert("P").save("palette.png")
    values = np.asarray(grey).astype(np.uint16) * 257
    with open("deep.png", "wb") as file:
        file.write(png(np.dstack([values, values]), 16, 4))
    return {"l.png": "L", "la.png": "LA", "rgb.png": "RGB", "rgb.jpg": "RGB", "rgba.png": "RGBA", "rgb.webp": "RGB",
            "rgb.tiff": "RGB", "palette.gif": "RGB", "palette.png": "RGB", "deep.png": "LA"}


def test_a_picture_without_colour_stays_without_colour(loaded_once):
    for name, mode in grey_sources().items():
        assert run("immunize", name, "--no-preview", "--overwrite") == cli.OK
        with Image.open(f"immunize/{name.partition('.')[0]}_immunized.png") as made, Image.open(name) as source:
            assert made.mode == mode, name
            red, green, blue = made.convert("RGB").split()
            assert red.tobytes() == green.tobytes() == blue.tobytes(), name
            if name != "deep.png":                           # which Pillow shows by its own rule
                apart = np.asarray(red).astype(int) - np.asarray(source.convert("L"))
                assert 0 < np.abs(apart).max() <= 8, name


def test_one_coloured_pixel_makes_a_picture_coloured():
    from sifm_min import images
    grey = Image.fromarray(colours()).convert("L").convert("RGB")
    assert images.picture(grey).channels == 1
    value = grey.getpixel((3, 3))[0]
    grey.putpixel((3, 3), (value, value, value ^ 1))
    assert images.picture(grey).channels == 3


# -- masks -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["RGBA", "LA", "palette", "one grey"])
def test_the_transparency_of_a_mask_counts(tmp_path, kind):
    from sifm_min import images
    half = np.zeros((6, 8), np.uint8)
    half[:, :3] = 255
    path = tmp_path / "mask.png"
    if kind == "palette":
        mask = Image.fromarray(half // 255).convert("P")
        mask.putpalette([255] * 6)
        mask.save(path, transparency=0)
    elif kind == "one grey":                                 # light grey, transparent where it is the key
        path.write_bytes(png(np.where(half, 3, 2), 2, 0, chunk(b"tRNS", b"\0\2")))
    else:
        white = Image.new("RGB" if kind == "RGBA" else "L", (8, 6), "white")
        white.putalpha(Image.fromarray(half))
        white.save(path)
    assert np.array_equal(images.read_mask(path, 8, 6)[0, 0].numpy(), half / 255)


def test_a_mask_painted_in_black_on_nothing_is_refused(tmp_path):
    from sifm_min import images
    black = Image.new("RGBA", (8, 6))
    black.putpixel((2, 2), (0, 0, 0, 255))
    black.save(tmp_path / "mask.png")
    with pytest.raises(ValueError, match="the mask is all dark or transparent; paint white where"):
        images.read_mask(tmp_path / "mask.png", 8, 6)
