"""models/sources.py and hub.py: copies of published editors are recognised; a cache filled by hand is read, or told."""

import json
import shutil
from pathlib import Path

import pytest
import tiny_editor
import torch
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load_file, save_file

from sifm_min import edit
from sifm_min.editors import load_editor
from sifm_min.models import checkpoints
from sifm_min.models.checkpoints import EDITORS, Unavailable
from sifm_min.models.sources import recognised

HQ_EDIT, PIX2PIX = EDITORS["hq-edit"], EDITORS["instruct-pix2pix"]
COMMIT = "a1" * 20


@pytest.fixture
def plain(tiny_folder, tmp_path):
    """An editor without settings of its own, whose file names DDIM, in a folder whose name says nothing."""
    folder = shutil.copytree(tiny_folder, tmp_path / "copy")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionInstructPix2PixPipeline"}))
    stored = tiny_editor.TEXTS["scheduler/scheduler_config.json"] | {"_class_name": "DDIMScheduler", "clip_sample": False}
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps(stored))
    return folder


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and no network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def staged(cache, plain, hub_id, commit=COMMIT, **refs):
    """The repository's folder in the cache, filled by hand; refs: name -> content of a file in refs/."""
    place = cache / f"models--{hub_id.replace('/', '--')}"
    shutil.copytree(plain, place / "snapshots" / commit)
    for name, content in refs.items():
        (place / "refs").mkdir(exist_ok=True)
        (place / "refs" / name).write_text(content)
    return place


def as_hq_edit(editor):
    defaults = editor.defaults
    return (defaults.steps, defaults.guidance, defaults.image_guidance, defaults.size) == (30, 7.0, 1.5, 512) \
        and editor.scheduler.config.sampler == "EulerAncestralDiscreteScheduler"


@pytest.mark.slow
def test_every_spelling_of_hq_edit_has_its_defaults(cache, plain):
    place = staged(cache, plain, HQ_EDIT.hub_id, main=COMMIT)
    for source in ("hq-edit", "MudeHui/HQ-Edit", "mudehui/hq-edit", place / "snapshots" / COMMIT):
        assert as_hq_edit(load_editor(source, device="cpu")), source
    editor = load_editor(plain, device="cpu")                    # nothing says what it is: the pipeline's, and its own sampler
    assert (editor.defaults.steps, editor.defaults.guidance) == (100, 7.5)
    assert editor.scheduler.config.sampler == "DDIMScheduler"


EVIDENCE = {
    "model_index.json": lambda folder: write(folder / "model_index.json", json.dumps(
        {"_class_name": "StableDiffusionInstructPix2PixPipeline", "_name_or_path": "MudeHui/HQ-Edit"})),
    "model_index.json with a cache": lambda folder: write(folder / "model_index.json", json.dumps(
        {"_name_or_path": "/home/a/.cache/huggingface/hub/models--MudeHui--HQ-Edit/snapshots/a1"})),
    "model_index.json with a folder": lambda folder: write(folder / "model_index.json", json.dumps(
        {"_name_or_path": "D:\\weights\\HQ-Edit\\"})),
    "model card": lambda folder: write(folder / "README.md", "---\nbase_model: timbrooks/instruct-pix2pix\n---\n# HQ\n"
                                       'model_id = "MudeHui/HQ-Edit"\npipe = P.from_pretrained(model_id)\n'),
    "git clone": lambda folder: write(folder / ".git/config", '[remote "origin"]\n\turl = https://hub.example/MudeHui/HQ-Edit\n'),
    "folder name": lambda folder: folder.rename(folder.with_name("HQ-Edit")),
}


def write(path, text):
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path


@pytest.mark.parametrize("evidence", EVIDENCE)
def test_local_copy_of_hq_edit_has_its_defaults(plain, evidence):
    made = EVIDENCE[evidence](plain)
    assert as_hq_edit(load_editor(made if made.is_dir() else plain, device="cpu"))


def test_download_into_a_folder_is_known_by_its_commit(plain):
    folder = plain / ".cache/huggingface/download"
    folder.mkdir(parents=True)
    write(folder / "model_index.json.metadata", f"{PIX2PIX.revision}\netag\n1.0\n")
    assert recognised(plain) is PIX2PIX
    write(folder / "model_index.json.metadata", f"{COMMIT}\netag\n1.0\n")
    assert recognised(plain) is None


def test_finetuned_editor_is_not_taken_for_its_base(plain):
    write(plain / "README.md", "---\nbase_model: timbrooks/instruct-pix2pix\n---\nfinetuned from timbrooks/instruct-pix2pix\n"
          'pipe = P.from_pretrained("me/mine")\n')
    write(plain / "model_index.json", json.dumps({"_name_or_path": "me/mine"}))
    assert recognised(plain) is None
    for text in ("{", "[1]", '{"_name_or_path": 3}'):
        write(plain / "model_index.json", text)
        assert recognised(plain) is None


def test_settings_of_a_folder_come_before_the_repository(plain):
    write(plain / "model_index.json", json.dumps({"_name_or_path": "MudeHui/HQ-Edit", "_sifm_min": {"defaults": {"steps": 4}}}))
    assert (load_editor(plain, device="cpu").defaults.steps, load_editor(plain, device="cpu").defaults.guidance) == (4, 7.0)


def test_hand_staged_ref_with_a_newline_is_read(cache, plain):
    staged(cache, plain, "owner/pipe", main=f"{COMMIT}\n")
    assert checkpoints.open_checkpoint("owner/pipe").revision == COMMIT


def test_hand_staged_cache_without_refs_is_told(cache, plain):
    place = staged(cache, plain, "owner/pipe")
    with pytest.raises(Unavailable, match=f"not at revision main; its snapshots/ has {COMMIT}, which --revision {COMMIT}"):
        checkpoints.open_checkpoint("owner/pipe")
    assert checkpoints.open_checkpoint("owner/pipe", revision=COMMIT).revision == COMMIT             # the remedy is one
    write(place / "refs/main", "b" * 40)
    with pytest.raises(Unavailable, match=f"refs/main says is '{'b' * 40}'; its snapshots/ has {COMMIT}"):
        checkpoints.open_checkpoint("owner/pipe")
    write(place / "refs/main", COMMIT)
    (place / "snapshots" / COMMIT / "model_index.json").unlink()
    with pytest.raises(Unavailable, match=f"model_index.json is not in its snapshots/{COMMIT}"):
        checkpoints.open_checkpoint("owner/pipe")
    write(place / "refs/main", "../../..")
    with pytest.raises(Unavailable, match="not at revision main"):
        checkpoints.open_checkpoint("owner/pipe")


# --------------------------------------------------------------------------------------------------- what the command says

WRONG = {
    "a beta": ("scheduler/scheduler_config.json", {"beta_start": None}, "scheduler_config.json sets beta_start to None"),
    "a class": ("scheduler/scheduler_config.json", {"_class_name": ["a"]}, "sets _class_name to ['a'], not to a text"),
    "settings": ("model_index.json", {"_sifm_min": None}, "model_index.json sets _sifm_min to None"),
    "defaults": ("model_index.json", {"_sifm_min": {"defaults": [1]}}, "_sifm_min is [1], not an object"),
    "a default": ("model_index.json", {"_sifm_min": {"defaults": {"steps": "4"}}}, "sets steps to '4', not to a whole number"),
    "a new default": ("model_index.json", {"_sifm_min": {"defaults": {"step": 4}}}, "sets step, which is none of steps, "),
    "a notice": ("model_index.json", {"_sifm_min": {"notice": 3}}, "sets _sifm_min to {'notice': 3}"),
    "no way to sample": ("scheduler/scheduler_config.json",
                         {"_class_name": "DDIMScheduler", "rescale_betas_zero_snr": True, "clip_sample": False,
                          "timestep_spacing": "trailing"}, "timestep 999 is noise alone"),
}


def command(folder, output):
    Image.new("RGB", (32, 32), "teal").save(output / "p.png")
    return edit.main([str(output / "p.png"), "--prompt", "x", "-o", str(output / "out"), "--editor", str(folder), "--device",
                      "cpu"])


@pytest.mark.parametrize("how", WRONG)
def test_wrong_values_end_with_exit_code_3(tiny_folder, tmp_path, capsys, how):
    folder = shutil.copytree(tiny_folder, tmp_path / "editor")
    name, change, words = WRONG[how]
    (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | change))
    assert command(folder, tmp_path) == 3
    told = capsys.readouterr().err
    assert words in told and str(folder) in told and "Traceback" not in told and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_edit_that_is_not_finite_names_the_weights(tiny_folder, tmp_path, capsys):
    folder = shutil.copytree(tiny_folder, tmp_path / "editor")
    file = Path(folder / "unet/diffusion_pytorch_model.safetensors")
    state = load_file(file)
    state["conv_out.weight"] = torch.full_like(state["conv_out.weight"], float("nan"))
    save_file(state, file)
    assert command(folder, tmp_path) == 1
    assert "not a finite picture: the weights hold such values, in conv_out.weight of the UNet" in capsys.readouterr().err


@pytest.mark.slow
def test_edit_that_is_not_finite_names_float16(tiny_folder, monkeypatch):
    editor = load_editor(tiny_folder, device="cpu")
    monkeypatch.setattr(editor, "decode", lambda latent: torch.full((1, 3, 32, 32), float("inf")))
    with pytest.raises(ValueError, match="not a finite picture: the guidance, the number of steps or the scheduler"):
        editor.edit(Image.new("RGB", (32, 32)), "x")
    editor.dtype = torch.float16
    monkeypatch.setattr(editor, "predict", lambda latents, noisy, *_: noisy)
    with pytest.raises(ValueError, match="float16 ends at 65504, and activations of the UNet may exceed it; --dtype bfloat16"):
        editor.edit(Image.new("RGB", (32, 32)), "x")
