"""sifm_min/weights.py: what it prints and with which exit code, on the cache that a hub on the loopback filled."""

import hashlib
import json
from functools import partial

import pytest
import torch
from hub import status
from huggingface_hub import constants
from huggingface_hub.utils import enable_progress_bars, logging
from safetensors.torch import save_file
from test_checkpoints import (  # noqa: F401 (hub is a fixture)
    ALL,
    HALF,
    OTHERS,
    REPO,
    T5_FILES,
    hub,
    pipeline,
    stable_diffusion_3,
    tensors,
)

from sifm_min import weights
from sifm_min.models import checkpoints
from sifm_min.models.checkpoints import EDITORS, Source, open_checkpoint

PIX2PIX = EDITORS["instruct-pix2pix"]


@pytest.fixture
def weights_main(in_process):
    """Run the command: (exit code, stdout, stderr). What --quiet sets for a process is set back afterwards."""
    verbosity = logging.get_verbosity()
    yield partial(in_process, weights.main)
    logging.set_verbosity(verbosity)
    enable_progress_bars()


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """An editor that ships with the package, in place of the real one."""
    folder = tmp_path / "shipped"
    for component in ("unet", "vae", "text_encoder"):
        (folder / component).mkdir(parents=True)
        (folder / component / "config.json").write_text('{"width": 4}')
        save_file(tensors(dtype=torch.float16), folder / component / "model.safetensors")
    for name in ("tokenizer/vocab.json", "tokenizer/merges.txt", "scheduler/scheduler_config.json", "model_index.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    monkeypatch.setitem(EDITORS, "miniature", Source(name="miniature", licence="Apache-2.0", folder=folder))
    return folder


def rows(text):
    return {line.split()[0]: line for line in text.splitlines()[1:]}


def test_list_shows_every_editor_without_a_request(hub, shipped, weights_main):  # noqa: F811
    code, out, err = weights_main("list")
    assert code == 0 and err == "" and hub.log == []
    assert list(rows(out))[:len(EDITORS)] == list(EDITORS)       # and then the backbones of LPIPS
    assert all(word in rows(out)["miniature"] for word in ("shipped", "kB", "open", str(shipped), "Apache-2.0"))
    for word in ("absent", "~2.1 GB", "31519b5cb02a", "open", "timbrooks/instruct-pix2pix", "MIT", "OpenRAIL-M"):
        assert word in rows(out)["instruct-pix2pix"]
    for word in ("absent", "~4.3 GB", "unpinned", "MudeHui/HQ-Edit", "CC BY-NC 4.0", "non-commercial"):
        assert word in rows(out)["hq-edit"]


@pytest.mark.slow
def test_list_as_json_and_the_states_of_the_cache(hub, shipped, weights_main):  # noqa: F811
    hub.add(PIX2PIX.hub_id, pipeline(), commit=PIX2PIX.revision)
    hub.add(EDITORS["hq-edit"].hub_id, pipeline(seed=1))

    def listed():
        code, out, _ = weights_main("list", "--json")
        assert code == 0
        return {record["name"]: record for record in map(json.loads, out.splitlines())}

    before = listed()
    assert [before["hq-edit"][key] for key in ("state", "revision", "pinned")] == ["absent", None, False]
    assert before["miniature"]["bytes"] == sum(path.stat().st_size for path in shipped.rglob("*/*"))
    with hub.fault(f"vae/{HALF}", status(500)):
        assert weights_main("download", "instruct-pix2pix", "--quiet")[0] == 3
    record = listed()["instruct-pix2pix"]
    assert record["state"] == "partial" and "has no weights in vae/" in record["missing"]
    open_checkpoint("instruct-pix2pix", ALL)
    open_checkpoint("hq-edit", ALL)
    after = listed()
    assert after["instruct-pix2pix"] == record | {"state": "complete", "missing": None}
    assert after["hq-edit"]["state"] == "complete" and not after["hq-edit"]["pinned"]
    assert after["hq-edit"]["revision"] == hub.refs[EDITORS["hq-edit"].hub_id, "main"]
    (shipped / "vae/model.safetensors").unlink()
    assert listed()["miniature"]["state"] == "partial"
    assert json.loads(weights_main("list", REPO, "--json")[1])["state"] == "absent"
    assert json.loads(weights_main("list", shipped, "--json")[1])["missing"].startswith(str(shipped))


@pytest.mark.slow
def test_download_says_licence_and_size_fetches_and_verifies(hub, weights_main, monkeypatch):  # noqa: F811
    hub.add("MudeHui/HQ-Edit", pipeline())
    code, out, err = weights_main("download", "hq-edit")
    commit = hub.refs["MudeHui/HQ-Edit", "main"]
    assert code == 0 and out == ""
    assert "about 4.3 GB from MudeHui/HQ-Edit at main (unpinned), licence: CC BY-NC 4.0 (non-commercial)" in err
    assert f"hq-edit at {commit}: 12 files in {constants.HF_HUB_CACHE}" in err and "none damaged" in err
    hub.log.clear()
    code, out, err = weights_main("download", "hq-edit", "--json", "--quiet")
    assert code == 0 and err == "" and hub.log == []
    record = json.loads(out)
    assert record["revision"] == commit and record["licence"].startswith("CC BY-NC")
    assert len(record["files"]) == 12 and all(file["ok"] for file in record["files"])


def test_an_unavailable_name_does_not_stop_the_others(hub, weights_main, shipped):  # noqa: F811
    code, out, err = weights_main("verify", "instruct-pix2pix", shipped)
    assert code == 3 and "error: instruct-pix2pix: " in err and f"{shipped}: " in err and "none damaged" in err


@pytest.mark.slow
def test_stable_diffusion_3_with_and_without_t5(hub, weights_main, monkeypatch):  # noqa: F811
    source = EDITORS["sd3"]
    hub.add(source.hub_id, stable_diffusion_3(), commit=source.revision)

    def listed():
        return rows(weights_main("list")[1])["sd3"]

    for word in ("absent", "~15.5 GB", source.revision[:12], "gated", source.hub_id, "Stability AI Community License"):
        assert word in listed()
    code, _, err = weights_main("download", "sd3", "--no-t5")
    assert code == 0 and "sd3: about 6.0 GB from" in err and f"{len(OTHERS)} files" in err and "none damaged" in err
    assert set(hub.asked("GET")) == OTHERS
    assert "without-t5" in listed() and "~6.0 GB" in listed()
    assert weights_main("verify", "sd3", "--no-t5")[0] == 0
    code, _, err = weights_main("verify", "sd3")
    assert code == 3 and "has no text_encoder_3/config.json" in err
    code, _, err = weights_main("download", "sd3")
    assert code == 0 and "sd3: about 15.5 GB from" in err and f"{len(OTHERS | T5_FILES)} files" in err
    assert "complete" in listed() and "~15.5 GB" in listed()
    assert set(hub.asked("GET")) == OTHERS | T5_FILES


def test_a_gated_editor_without_a_token_is_one_sentence(hub, weights_main):  # noqa: F811
    hub.add(EDITORS["sd3"].hub_id, stable_diffusion_3(), commit=EDITORS["sd3"].revision)
    with hub.fault("/resolve/", status(401, error="GatedRepo", message="Access is restricted.")):
        code, out, err = weights_main("download", "sd3", "--quiet")
    assert code == 3 and out == "" and err.count("\n") == 1
    assert f"is gated and no token is set: accept its licence at {hub.url}/{EDITORS['sd3'].hub_id}, set HF_TOKEN" in err


def test_quiet_is_quiet_about_retries_too(hub, weights_main):  # noqa: F811
    with hub.fault(HALF, status(500)):                          # huggingface_hub tries six times and says so
        code, out, err = weights_main("download", REPO, "--quiet")
    assert code == 3 and out == "" and err.count("\n") == 1 and "answered 500" in err


@pytest.mark.slow
def test_download_of_a_hub_id_at_a_revision(hub, weights_main):  # noqa: F811
    commit = hub.add(REPO, pipeline(seed=3), branch="v1")
    code, _, err = weights_main("download", REPO, "--revision", "v1")
    assert code == 0 and "at v1, licence: the one on its card" in err and f"{REPO} at {commit}" in err
    assert weights_main("verify", REPO, "--revision", "v1")[0] == 0
    assert weights_main("verify", REPO)[0] == 3                 # main was never fetched


@pytest.mark.slow
def test_file_without_its_published_checksum_is_bad(hub, weights_main):  # noqa: F811
    hub.add(PIX2PIX.hub_id, pipeline(), commit=PIX2PIX.revision)
    code, out, err = weights_main("download", "instruct-pix2pix", "--quiet")
    bad = [line for line in out.splitlines() if line.startswith("BAD")]
    assert code == 1 and len(bad) == 3                          # none of the three is the published file
    assert f"is not the file of the published checksum {PIX2PIX.files[f'unet/{HALF}']}" in err
    other = hub.add(PIX2PIX.hub_id, pipeline(seed=1))           # no checksums are published for another commit
    assert weights_main("download", "instruct-pix2pix", "--revision", other)[0] == 0


@pytest.mark.slow
def test_verify_finds_one_flipped_bit(hub, weights_main):  # noqa: F811
    folder = open_checkpoint(REPO, ALL).folder
    code, out, _ = weights_main("verify", REPO)
    assert code == 0 and [line.split()[0] for line in out.splitlines()] == ["ok"] * 12
    assert hashlib.sha256((folder / "unet" / HALF).read_bytes()).hexdigest() in out
    hub.log.clear()
    for name in (f"vae/{HALF}", "tokenizer/vocab.json"):        # known by SHA-256, and by git's hash
        path = (folder / name).resolve()
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        code, out, err = weights_main("verify", REPO)
        assert code == 1 and [line.split()[-1] for line in out.splitlines() if line.startswith("BAD")] == [name]
        assert f"is not the file of the hub's checksum {path.name}; remove {path} and download again" in err
        record = json.loads(weights_main("verify", REPO, "--json")[1])
        assert [file["file"] for file in record["files"] if not file["ok"]] == [name]
        path.unlink()                                           # the remedy that was given
        assert weights_main("download", REPO)[0] == 0


def test_verify_of_a_shipped_editor(shipped, weights_main):
    code, out, err = weights_main("verify", "miniature")
    assert code == 0 and [line.split()[0] for line in out.splitlines()] == ["unknown"] * 10        # nothing to compare
    assert "none damaged" in err
    digest = checkpoints.sha256(shipped / "unet/model.safetensors")
    (shipped / "SHA256SUMS").write_text(f"{digest}  unet/model.safetensors\n{digest}  vae/model.safetensors\n"
                                        f"{'0' * 64} *text_encoder/model.safetensors\nnonsense\n")
    code, out, err = weights_main("verify", "miniature")
    marks = {line.split()[-1]: line.split()[0] for line in out.splitlines()}
    assert code == 1 and marks["text_encoder/model.safetensors"] == "BAD" and marks["unet/model.safetensors"] == "ok"
    assert f"is not the file of SHA256SUMS {'0' * 64}" in err
    (shipped / "SHA256SUMS").write_text(f"{digest}  judge/model.safetensors\n")   # a file that no editor needs
    code, out, err = weights_main("verify", "miniature")
    assert code == 1 and "judge/model.safetensors is listed in SHA256SUMS and missing" in err
    assert [line.split()[-1] for line in out.splitlines() if line.startswith("BAD")] == ["judge/model.safetensors"]
    path = shipped / "unet/model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    (shipped / "SHA256SUMS").unlink()
    code, _, err = weights_main("verify", shipped)
    assert code == 1 and "cut short or damaged; get the folder again" in err      # found without a checksum


@pytest.mark.parametrize("argv, code, words", [
    (["download"], 2, f"download needs a name: {', '.join(EDITORS)}"),
    (["verify"], 2, "verify needs a name"),
    (["verify", "pix2pix"], 2, "'pix2pix' is neither a known editor"),
    (["list", "pix2pix"], 2, "'pix2pix' is neither a known editor"),
    (["list", "--revision", "main"], 2, "--revision is for download and verify"),
    (["list", "--no-t5"], 2, "--no-t5 is for download and verify"),
    (["verify", REPO], 3, f"run `python -m sifm_min.weights download {REPO}` once while online"),
    (["download", "owner/nothing"], 3, "has no repository owner/nothing"),
    (["download", REPO, "--revision", "v9"], 3, "has no revision v9"),
    (["download", REPO, "--revision", "../x"], 2, "'../x' is not a commit, tag or branch"),
    (["fetch"], 2, "invalid choice: 'fetch'"),
    ([], 2, "required"),
])
def test_mistakes_are_one_sentence_with_the_right_code(hub, weights_main, argv, code, words):  # noqa: F811
    got, out, err = weights_main(*argv, *(["--quiet"] if argv else []))
    assert got == code and out == "" and words in err and err.count("\n") == 1, err


def test_a_shipped_editor_that_is_not_there(shipped, weights_main):
    for path in sorted(shipped.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    shipped.rmdir()
    for action in ("download", "verify"):
        code, _, err = weights_main(action, "miniature")
        assert code == 3 and "lacks its weights" in err and "tools/train_miniature.py" in err
    assert "absent" in weights_main("list", "miniature")[1]


@pytest.mark.parametrize("name", ["miniature", "miniature-sd3"])
def test_the_weights_that_ship_are_those_of_their_checksums(name, weights_main):
    code, out, err = weights_main("verify", name)
    assert code == 0 and "none damaged" in err, err
    marks = {line.split()[-1]: line.split()[0] for line in out.splitlines()}
    weighty = [file for file in marks if file.endswith(".safetensors")]
    assert len(weighty) >= 3 and {marks[file] for file in weighty} == {"ok"}


def test_help_has_examples_that_parse(weights_main):
    code, out, _ = weights_main("--help")
    assert code == 0
    examples = [line.split("sifm_min.weights ")[1].split() for line in out.splitlines()
                if line.startswith("  python -m sifm_min.weights ")]
    assert {words[0] for words in examples} == {"list", "download", "verify"}
    for words in examples:
        weights._parser().parse_args(words)
