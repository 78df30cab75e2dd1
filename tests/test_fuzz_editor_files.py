"""Three hundred mutated editors: a file is damaged in its JSON, its bytes or its length, and no `edit` ends with a traceback.

Both kinds of editor are used, and every file of them. The seed is fixed; a failure names the number of its case.
"""

import copy
import json
import random
import shutil

import pytest
import tiny_editor
import tiny_sd3
from PIL import Image

from sifm_min import edit

SEED, CASES = 20261128, 300
ODD = (None, True, False, -1, 0, 1, 2, 0.5, 1e308, 2**70, float("nan"), float("-inf"), "", "x" * 5000, "8", "\0", "\ud800", [],
       {}, [None], [[]], [1, 1], [4, 4, 4, 4], {"a": {}}, ["transformers", "T5EncoderModel"], "StableDiffusion3Pipeline",
       "DDIMScheduler", "gelu")
BYTES = (b"", b"{", b"[]", b"null", b"\xff\xfe", b"<html>", b"version https://git-lfs.github.com/spec/v1\n", b"[" * 100_000)


def places(value):
    """Every (container, key) in a parsed JSON value; of long containers the first few."""
    items = list(value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ())[:40]
    for key, inner in items:
        yield value, key
        yield from places(inner)


def mutate_json(content, rng):
    """Change, remove, add or repeat up to three values of a JSON file."""
    value = json.loads(content)
    for _ in range(rng.choice((1, 1, 2, 3))):
        found = list(places(value))
        if not found:
            break
        container, key = rng.choice(found)
        kind = rng.random()
        if kind < 0.6:
            container[key] = copy.deepcopy(rng.choice(ODD))
        elif kind < 0.75:
            del container[key]
        elif kind < 0.9 and isinstance(container, dict):
            new = rng.choice(("unknown", "__proto__", "dropout", "quantization_config", ""))
            container[new] = copy.deepcopy(rng.choice(ODD))
        else:
            container[key] = [container[key]] * rng.choice((1, 2, 4))
    return json.dumps(value).encode()


def mutate_bytes(content, rng):
    """Cut, overwrite, flip or replace bytes; half of the changes lie in the first 200, where headers are."""
    if rng.random() < 0.15:
        return rng.choice(BYTES)
    if rng.random() < 0.2:
        return content[:rng.randrange(len(content))]
    changed = bytearray(content)
    for _ in range(rng.choice((1, 3, 20))):
        reach = min(200, len(changed)) if rng.random() < 0.5 else len(changed)
        changed[rng.randrange(reach)] = rng.choice((0, 0x7F, 0xFF, rng.randrange(256)))
    return bytes(changed)


@pytest.fixture(scope="module")
def editors(tmp_path_factory):
    base = tmp_path_factory.mktemp("whole")
    return [tiny_editor.write(base / "pix2pix"), tiny_sd3.write(base / "sd3")]


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("picture") / "p.png"
    Image.radial_gradient("L").resize((16, 16)).convert("RGB").save(path)
    return path


def edited(folder, picture, output):
    return edit.main([str(picture), "--prompt", "a hat", "-o", str(output), "--editor", str(folder), "--steps", "1",
                      "--device", "cpu"])


@pytest.mark.slow
def test_whole_editors_edit(editors, picture, tmp_path):
    for number, folder in enumerate(editors):
        assert edited(folder, picture, tmp_path / str(number)) == 0


@pytest.mark.slow
def test_mutated_editor_files_are_edits_or_sentences(editors, picture, tmp_path, capsys):
    rng, codes = random.Random(SEED), []
    for case in range(CASES):
        whole = editors[case % 2]
        folder = shutil.copytree(whole, tmp_path / "editor")
        file = rng.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
        content = file.read_bytes()
        mutate = mutate_json if file.suffix == ".json" and rng.random() < 0.75 else mutate_bytes
        file.write_bytes(mutate(content, rng))
        where = f"case {case}: {file.relative_to(folder)} by {mutate.__name__}"
        try:
            code = edited(folder, picture, tmp_path / "out")
        except BaseException as error:
            raise AssertionError(f"{where}: {type(error).__name__}: {error}") from error
        told = capsys.readouterr().err
        assert code in (0, 1, 3) and "Traceback" not in told, (where, code, told)
        assert code == 0 or "error: " in told and len(told) < 1500, (where, told)
        codes.append(code)
        shutil.rmtree(folder)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
    assert codes.count(3) > CASES / 4 and codes.count(0) > CASES / 20, {code: codes.count(code) for code in set(codes)}
