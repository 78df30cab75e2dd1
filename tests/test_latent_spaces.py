"""models/latent_spaces.py and its part of `weights`: five tiny autoencoders from a hub on the loopback, or from a folder.

The networks here have random weights, of the published names and shapes and with the published marks.
"""

import json

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save, save_file
from test_checkpoints import hub  # noqa: F401 (a fixture)
from test_weights import rows, weights_main  # noqa: F401 (a fixture)

from sifm_min.models import checkpoints, latent_spaces
from sifm_min.models.latent_spaces import SPACES
from sifm_min.models.tiny_vae import AutoencoderTiny, TinyVAEConfig

SHIPPED = latent_spaces.COPIES                               # before `home` replaces it
PIXELS = torch.rand(1, 3, 16, 24, generator=torch.Generator().manual_seed(3)) * 2 - 1


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """Empty folders in place of the downloads and of the copies that ship."""
    monkeypatch.setattr(latent_spaces, "COPIES", tmp_path / "copies")
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


def network(space, seed=0):
    torch.manual_seed(seed)
    made = AutoencoderTiny(TinyVAEConfig(latent_channels=space.channels, use_midblock_gn=space.name == "flux2")).eval()
    with torch.no_grad():
        for half, marks in space.marks.items():
            getattr(made, half).layers[-1].bias[:len(marks)] = torch.tensor(marks)
    return made


def authors(made, half):
    """The state of a half with the author's names: the decoder's lists begin with the bound."""
    state = getattr(made, half).layers.state_dict()
    shift = half == "decoder"
    return {".".join([str(int(name.split(".")[0]) + shift), *name.split(".")[1:]]): tensor.contiguous()
            for name, tensor in state.items()}


def write_authors(folder, space, made, dtype=torch.float32):
    folder.mkdir(exist_ok=True, parents=True)
    for half in ("encoder", "decoder"):
        save_file({name: tensor.to(dtype) for name, tensor in authors(made, half).items()},
                  folder / f"{space.stem}_{half}.safetensors")
    return folder


def hub_files(space, made):
    """The files of the space's repository."""
    if space.name == "flux2":
        return {"taef2.safetensors": save(made.state_dict()), "README.md": b"taef2"}
    config = {"_class_name": "AutoencoderTiny", "latent_channels": space.channels, "block_out_channels": [64] * 4}
    return {"config.json": json.dumps(config).encode(), "diffusion_pytorch_model.safetensors": save(made.state_dict()),
            "diffusion_pytorch_model.bin": b"a pickle", "README.md": b"taesd"}


@pytest.fixture
def filled(hub):  # noqa: F811
    """The hub with the five repositories at their pinned commits; the networks by name."""
    made = {name: network(space, seed) for seed, (name, space) in enumerate(SPACES.items())}
    for name, space in SPACES.items():
        hub.add(space.hub_id, hub_files(space, made[name]), commit=space.revision)
    return hub, made


def assert_is(checkpoint, made, tolerance=0.0):
    ours = checkpoint.network(dtype=torch.float32)
    torch.testing.assert_close(ours.encode(PIXELS)[0], made.encode(PIXELS)[0], rtol=0, atol=tolerance + 5e-6)
    latent = made.encode(PIXELS)[0].detach()
    torch.testing.assert_close(ours.decode(latent), made.decode(latent), rtol=0, atol=tolerance + 5e-6)
    assert not any(parameter.requires_grad for parameter in ours.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("name", SPACES)
def test_download_fetches_the_pinned_files_once(name, filled, weights_main):  # noqa: F811
    (server, made), space = filled, SPACES[name]
    with pytest.raises(checkpoints.Unavailable, match=f"run `.*weights download latents-{name}` once, about 1[01] MB"):
        latent_spaces.find(space)
    assert server.log == []
    code, out, err = weights_main("download", f"latents-{name}")
    assert set(server.asked("GET")) == set(space.files)                 # no file that is not needed
    assert f"latents-{name}: {space.title}, about {'10.7' if name == 'flux2' else '9.8'} MB" in err
    assert f"from {space.hub_id} at {space.revision}, licence: MIT (Ollin Boer Bohan)" in err
    known = [digest for digest in space.files.values() if digest]
    if known:                                                   # random weights are not the published file
        assert code == 1 and f"is not the file of the published checksum {known[0]}" in err
    else:
        assert code == 0 and out == "" and "none damaged" in err
    checkpoint = latent_spaces.find(space)
    assert checkpoint.revision == space.revision
    assert_is(checkpoint, made[name])
    server.log.clear()
    assert weights_main("download", f"latents-{name}")[0] == code and server.log == []


def test_list_shows_the_spaces_and_asks_nobody(filled, weights_main):  # noqa: F811
    server, _ = filled
    code, out, _ = weights_main("list")
    assert code == 0 and server.log == []
    for space in SPACES.values():
        line = rows(out)[space.command]
        assert all(word in line for word in ("absent", space.revision[:12], "open", space.hub_id, "MIT"))
    weights_main("download", "latents-sdxl")
    listed = {record["name"]: record for record in map(json.loads, weights_main("list", "latents", "--json")[1].splitlines())}
    assert list(listed) == [space.command for space in SPACES.values()]
    assert [listed[f"latents-{name}"]["state"] for name in ("sdxl", "sd1")] == ["complete", "absent"]
    assert latent_spaces.at_hand() == [SPACES["sdxl"]]


@pytest.mark.slow
@pytest.mark.parametrize("name", SPACES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_folder_in_the_authors_layout(name, dtype, tmp_path, weights_main):  # noqa: F811
    space, made = SPACES[name], network(SPACES[name])
    folder = write_authors(tmp_path / "given", space, made, dtype)
    code, _, err = weights_main("download", f"latents-{name}", "--weights", folder)
    assert code == 0 and "none damaged" in err and f"copied from {folder}, licence: MIT" in err
    checkpoint = latent_spaces.find(space)
    assert checkpoint.folder == space.kept and (space.kept / "SHA256SUMS").is_file()
    assert_is(checkpoint, made, {torch.float32: 0, torch.float16: 5e-3, torch.bfloat16: 5e-2}[dtype])
    assert weights_main("verify", "latents")[0] == 0
    file = space.kept / f"{space.stem}_encoder.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    code, out, err = weights_main("verify", f"latents-{name}")
    assert code == 1 and "is not the file of SHA256SUMS" in err and out.count("BAD") == 1


@pytest.mark.slow
def test_weights_folder_in_diffusers_layout(tmp_path, weights_main):  # noqa: F811
    """At the top of the folder, or each in a folder of the author's name; and one file of taef2."""
    made = {name: network(SPACES[name]) for name in ("sd1", "sd3", "flux2")}
    for name, folder in (("sd1", tmp_path), ("sd3", tmp_path / "taesd3"), ("flux2", tmp_path)):
        folder.mkdir(exist_ok=True)
        for file, content in hub_files(SPACES[name], made[name]).items():
            (folder / file).write_bytes(content)
    code, _, err = weights_main("download", "latents-sd1", "latents-sd3", "latents-flux2", "--weights", tmp_path)
    assert code == 0, err
    for name in made:
        assert_is(latent_spaces.find(SPACES[name]), made[name])
    assert not (SPACES["sd1"].kept / "README.md").exists()


def test_group_takes_the_one_space_of_a_plain_folder(tmp_path, weights_main):  # noqa: F811
    """config.json and its weights do not say in their names which space they are of."""
    (tmp_path / "given").mkdir()
    for file, content in hub_files(SPACES["flux1"], network(SPACES["flux1"])).items():
        (tmp_path / "given" / file).write_bytes(content)
    code, _, err = weights_main("download", "latents", "--weights", tmp_path / "given")
    assert code == 0 and latent_spaces.at_hand() == [SPACES["flux1"]], err


def test_group_takes_what_a_folder_has(tmp_path, weights_main):  # noqa: F811
    folder = write_authors(tmp_path / "given", SPACES["flux1"], network(SPACES["flux1"]))
    assert weights_main("download", "latents", "--weights", folder)[0] == 0
    assert latent_spaces.at_hand() == [SPACES["flux1"]]
    (tmp_path / "empty").mkdir()
    for words, given in (("has no taesd: neither taesd_encoder", tmp_path / "empty"), ("is not a folder", tmp_path / "none")):
        code, out, err = weights_main("download", "latents", "--weights", given)
        assert code in (2, 3) and words in err and err.count("\n") == 1 and out == ""


def authors_file(folder, name, half):
    """The bytes of another space's file, written beside."""
    space = SPACES[name]
    return (write_authors(folder / "other", space, network(space)) / f"{space.stem}_{half}.safetensors").read_bytes()


def spoil(folder, how):
    """Spoil the files of sd1 in a folder; the words of the refusal."""
    encoder, decoder = (folder / f"taesd_{half}.safetensors" for half in ("encoder", "decoder"))
    if how == "truncated":
        encoder.write_bytes(encoder.read_bytes()[:-100])
        return "cut short or damaged"
    if how == "of sdxl":
        encoder.write_bytes(authors_file(folder.parent, "sdxl", "encoder"))
        return "is the file of taesdxl, which is the latent space of Stable Diffusion XL; taesd has 4 channels"
    if how == "of sd3":
        encoder.write_bytes(authors_file(folder.parent, "sd3", "encoder"))
        return "is the file of taesd3"
    if how == "of 5 channels":
        state = load_file(encoder)
        save_file(state | {"14.weight": torch.zeros(5, 64, 3, 3), "14.bias": torch.zeros(5)}, encoder)
        return "is the file of 5 channels"
    if how == "halves exchanged":
        kept = encoder.read_bytes()
        encoder.write_bytes(decoder.read_bytes())
        decoder.write_bytes(kept)
        return "is the file of 3 channels"
    if how == "decoder of sdxl":
        decoder.write_bytes(authors_file(folder.parent, "sdxl", "decoder"))
        return "taesd_decoder.safetensors is the file of taesdxl"
    if how == "of none":
        state = load_file(encoder)
        save_file(state | {"14.bias": torch.zeros(4)}, encoder)
        return "taesd_decoder.safetensors is not the published taesd, so it is not kept as that; `--editor latents:"
    if how == "a tensor renamed":
        state = load_file(decoder)
        save_file({f"{name}s" if name == "1.bias" else name: tensor for name, tensor in state.items()}, decoder)
        return "missing decoder.layers.0.bias; unexpected 1.biass"
    encoder.write_text("<html>login</html>")
    return "a web page saved under this name"


@pytest.mark.parametrize("how", ["truncated", "of sdxl", "of sd3", "of 5 channels", "halves exchanged", "decoder of sdxl",
                                 "of none", "a tensor renamed", "web page"])
def test_wrong_files_are_one_sentence_and_nothing_is_kept(how, tmp_path, weights_main):  # noqa: F811
    space = SPACES["sd1"]
    folder = write_authors(tmp_path / "given", space, network(space))
    words = spoil(folder, how)
    code, out, err = weights_main("download", "latents-sd1", "--weights", folder)
    assert code == 3 and out == "" and err.count("\n") == 1 and words in err, err
    assert not space.kept.exists() and not list(space.kept.parent.glob("*")) and latent_spaces.at_hand() == []


@pytest.mark.parametrize("name", ["latents", "latents-sd1", "latents-sd3"])
def test_our_copy_is_not_kept_as_the_published_one(name, tmp_path, weights_main):  # noqa: F811
    """It lacks a block, so its last layer has another number than the published one's."""
    code, out, err = weights_main("download", name, "--weights", SHIPPED / "sd1")
    assert code == 3 and out == "" and err.count("\n") == 1 and latent_spaces.at_hand() == []
    assert ("is the file of 4 channels" if name == "latents-sd3" else "is not the published tae") in err, err


@pytest.mark.slow
def test_damaged_files_are_named_with_a_remedy_that_works(filled, tmp_path, weights_main):  # noqa: F811
    """Both of a download and of files that were kept; the other spaces are verified all the same."""
    weights_main("download", "latents-sdxl", "latents-flux2", "--quiet")
    write_authors(tmp_path / "given", SPACES["sd1"], network(SPACES["sd1"]))
    weights_main("download", "latents-sd1", "--weights", tmp_path / "given", "--quiet")
    damaged = [SPACES["sd1"].kept / "taesd_decoder.safetensors",
               (latent_spaces.stored(SPACES["sdxl"]).folder / "diffusion_pytorch_model.safetensors").resolve()]
    for file in damaged:
        file.write_bytes(file.read_bytes()[:-100])
    code, out, err = weights_main("verify", "latents", "--quiet")
    assert code == 1 and out.count("BAD") == 2 and "latents-flux2" in out
    for name, file in zip(("sd1", "sdxl"), damaged, strict=True):
        assert f"remove {file.resolve()} and download again" in err
        assert weights_main("download", f"latents-{name}", "--quiet")[0] == 1       # the remedy is said, not the sentence alone
        file.unlink()
    assert weights_main("download", "latents-sdxl", "--quiet")[0] == 0
    assert weights_main("download", "latents-sd1", "--weights", tmp_path / "given", "--quiet")[0] == 0
    assert weights_main("verify", "latents", "--quiet")[0] == 0


def test_offline_and_broken_hubs_are_one_sentence(filled, weights_main, monkeypatch):  # noqa: F811
    server, _ = filled
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    code, _, err = weights_main("download", "latents-sd1", "--quiet")
    assert code == 3 and err.count("\n") == 1 and "HF_HUB_OFFLINE is set" in err and "--weights" in err and server.log == []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    server.commits[SPACES["sdxl"].hub_id, SPACES["sdxl"].revision] = {"README.md": b"moved"}
    code, _, err = weights_main("download", "latents-sdxl", "--quiet")
    assert code == 3 and err.count("\n") == 1 and "madebyollin/taesdxl has no config.json" in err
    code, _, err = weights_main("verify", "latents", "--quiet")
    assert code == 3 and "the latent space sd1 is not on this machine" in err
    code, _, err = weights_main("download", "latents", "--revision", "main", "--quiet")
    assert code == 2 and "--revision and --no-t5 are for editors" in err


@pytest.mark.slow
def test_published_files_bear_their_marks(shared):
    """Every real file is known as its own, in the layout of the reference data, and no two are taken for one another."""
    folder = shared / "data" / "taesd"
    for space in SPACES.values():
        checkpoint = latent_spaces.open_folder(folder, space)
        ours = checkpoint.network(dtype=torch.float32)
        assert ours.config.use_midblock_gn == (space.name == "flux2") and ours.config.latent_channels == space.channels
        assert checkpoint.recognised
        for half in latent_spaces.HALVES:
            found = getattr(ours, half).layers[-1].bias.tolist()
            assert [other.name for other in SPACES.values() if latent_spaces._is_marked(half, found, other)] == [space.name]
