"""sifm_min/metrics/fetch.py and the commands over it, against a server on the loopback interface that misbehaves on request."""

import errno
import json
import zipfile
from functools import partial

import pytest
import torch
from huggingface_hub import constants
from local_server import Answers, LocalServer
from safetensors import safe_open

from sifm_min import cli, metrics, weights
from sifm_min.metrics import backbones, fetch
from sifm_min.models import checkpoints
from sifm_min.models.checkpoints import Unavailable, Unfit


class Server(LocalServer):
    """One file under its name. `faults`: what the next requests get, in order: a status, a number of bytes after which
    the connection is cut, other bytes, a place to go instead, or None. `log`: (path, Range header) of each request."""

    def __init__(self, name, content):
        super().__init__(Handler)
        self.name, self.content, self.faults, self.log, self.ranges = name, content, [], [], True


class Handler(Answers):
    def do_GET(self):
        server, asked = self.server, self.headers.get("Range")
        server.log.append((self.path, asked))
        fault = server.faults.pop(0) if server.faults else None
        if isinstance(fault, str):
            return self.reply(302, Location=fault)
        if isinstance(fault, int) and fault < 0:
            return self.reply(-fault, b"a page that says what is wrong")
        if isinstance(fault, bytes):
            return self.reply(200, fault)
        self.cut, content = fault, server.content
        if asked and server.ranges:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            if start >= len(content):
                return self.reply(416)
            return self.reply(206, content[start:], Content_Range=f"bytes {start}-{len(content) - 1}/{len(content)}")
        return self.reply(200, content)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A file as torchvision publishes it: a whole classifier, pickled; random weights of SqueezeNet, the smallest."""
    generator = torch.Generator().manual_seed(0)
    state = {name: torch.randn(shape, generator=generator) / 10 for name, shape in
             backbones.NETWORKS["squeeze"].shapes.items()}
    path = tmp_path_factory.mktemp("published") / "squeezenet.pth"
    torch.save(state | {"classifier.1.weight": torch.randn(1000, 512, 1, 1, generator=generator)}, path)
    return state, path


@pytest.fixture
def server(published, tmp_path, monkeypatch):
    _, path = published
    source = backbones.NETWORKS["squeeze"]
    with Server(source.file, path.read_bytes()) as server:
        monkeypatch.setattr(backbones, "HOST", server.url)
        monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)      # whatever the environment says
        monkeypatch.setattr(fetch, "PAUSE", 0)
        monkeypatch.setattr(fetch, "BLOCK", 100_000)
        for name, value in {"sha256": checkpoints.sha256(path), "size": len(server.content), "exact": True}.items():
            monkeypatch.setitem(source.__dict__, name, value)        # frozen, so around its own setattr
        yield server


@pytest.fixture
def run(in_process):
    return partial(in_process, weights.main)


def kept(tmp_path):
    return sorted(path.name for path in (tmp_path / "home/sifm_min/lpips").iterdir() if path.suffix != ".lock")


KEPT, PART = "squeezenet1_1-b8a52dc0.safetensors", "squeezenet1_1-b8a52dc0.pth.part"


# ------------------------------------------------------------------------------------------------------- what is fetched

def test_the_convolutions_are_kept_and_serve_lpips(server, published, tmp_path):
    state, path = published
    counted = []
    found = fetch.backbone("squeeze", on_bytes=counted.append)
    assert kept(tmp_path) == [KEPT] and server.log == [(f"/{server.name}", None)]
    assert sum(counted) == len(server.content)
    assert found.pinned and found.file == tmp_path / "home/sifm_min/lpips" / KEPT
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in state.items())
    with safe_open(found.file, framework="pt") as opened:
        assert set(opened.keys()) == state.keys()
        about = opened.metadata()
    assert about["source_sha256"] == checkpoints.sha256(path) and about["sha256"] == found.sha256
    pair = torch.rand(2, 1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    assert metrics.lpips(*pair, network="squeeze") == metrics.lpips(*pair, network="squeeze", weights=path)
    assert fetch.backbone("squeeze") is found and len(server.log) == 1


def test_a_cut_connection_is_taken_up_where_it_broke(server, tmp_path):
    server.faults = [1_000_000, 0, 500_000, None]
    fetch.backbone("squeeze")
    assert [asked for _, asked in server.log] == [None, "bytes=1000000-", "bytes=1000000-", "bytes=1500000-"]
    assert kept(tmp_path) == [KEPT]


def test_fetched_part_is_kept_for_the_next_run(server, tmp_path):
    server.faults = [1_000_000, 0, 0, 0, 0]
    with pytest.raises(Unavailable, match=f"{server.url}/.*cannot be fetched .*the 1000000 bytes that came are kept"):
        fetch.backbone("squeeze")
    assert kept(tmp_path) == [PART] and not server.faults
    server.log.clear()
    assert fetch.backbone("squeeze").pinned and server.log == [(f"/{server.name}", "bytes=1000000-")]


def test_a_server_without_ranges_starts_anew(server, tmp_path):
    server.faults, server.ranges = [1_000_000], False
    assert fetch.backbone("squeeze").pinned and kept(tmp_path) == [KEPT]


def test_a_part_that_is_whole_is_not_fetched_again(server, tmp_path):
    part = tmp_path / "home/sifm_min/lpips" / PART
    part.parent.mkdir(parents=True)
    part.write_bytes(server.content)
    assert fetch.backbone("squeeze").pinned and server.log == []
    metrics.lpips_weights("squeeze").file.unlink()
    part_of = server.content + b"more"                       # of another file
    part.write_bytes(part_of)
    assert fetch.backbone("squeeze").pinned
    assert [asked for _, asked in server.log] == [f"bytes={len(part_of)}-", None]


def test_redirects_are_followed(server):
    server.faults = [f"{server.url}/elsewhere/{server.name}"]
    assert fetch.backbone("squeeze").pinned and server.log[1][0] == f"/elsewhere/{server.name}"


@pytest.mark.parametrize("fault, says", [
    (-404, "answered 404 for"), (-503, "answered 503 for"), (-403, "answered 403 for"),
    (b"<html>please log in</html>", "is 26 bytes there, and .* are expected: it is not the pinned file"),
    ("ftp://127.0.0.1/x", "cannot be fetched"),
])
def test_another_answer_is_one_sentence(server, fault, says, tmp_path):
    server.faults = [fault] * 4
    with pytest.raises(Unavailable, match=says) as caught:
        fetch.backbone("squeeze")
    assert "\n" not in str(caught.value) and kept(tmp_path) == []


def test_wrong_bytes_are_never_opened(server, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("opened"))
    flipped = bytearray(server.content)
    flipped[len(flipped) // 2] ^= 1
    server.faults = [bytes(flipped)]
    with pytest.raises(Unavailable, match="sent another file: its SHA-256 is .* it was removed unopened"):
        fetch.backbone("squeeze")
    assert kept(tmp_path) == []


def test_a_size_that_is_not_known_to_the_byte(server, monkeypatch, tmp_path):
    for name, value in {"size": len(server.content) - 1000, "exact": False}.items():
        monkeypatch.setitem(backbones.NETWORKS["squeeze"].__dict__, name, value)
    server.faults = [b"x" * (2 * len(server.content)), 1000]
    with pytest.raises(Unavailable, match="it is not the pinned file"):
        fetch.backbone("squeeze")
    assert fetch.backbone("squeeze").pinned


def test_a_loop_of_redirects_ends(server):
    server.faults = [f"{server.url}/again"] * 200
    with pytest.raises(Unavailable, match="TooManyRedirects"):
        fetch.backbone("squeeze")


def test_no_server(server):
    server.shutdown()
    server.server_close()
    with pytest.raises(Unavailable, match="check the connection and the proxy"):
        fetch.backbone("squeeze")


def test_offline_makes_no_request(server, monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(Unavailable, match="HF_HUB_OFFLINE is set"):
        fetch.backbone("squeeze")
    assert server.log == [] and not (tmp_path / "home").exists()


def test_a_full_disk(server, monkeypatch, tmp_path):
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10**6}))
    with pytest.raises(Unavailable, match="is full, SqueezeNet 1.1 needs 5 MB for a while: make room"):
        fetch.backbone("squeeze")
    assert server.log == []
    monkeypatch.undo()


@pytest.mark.parametrize("failing", ["_more", "_keep"])
def test_a_disk_that_fills_up_on_the_way(server, monkeypatch, tmp_path, failing):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(fetch, failing, full)
        with pytest.raises(Unavailable, match="is full: make room, or point HF_HOME to another disk; what was fetched is kept"):
            fetch.backbone("squeeze")
    assert kept(tmp_path) == ([PART] if failing == "_keep" else [])
    assert fetch.backbone("squeeze").pinned and len(server.log) == 1


def test_kept_file_appears_whole_or_not_at_all(server, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        patch.setattr(fetch.os, "fsync", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            fetch.backbone("squeeze")
    assert kept(tmp_path) == [PART]


def test_a_folder_that_cannot_be_written(server, monkeypatch, tmp_path):
    (tmp_path / "home").write_text("a file")
    with pytest.raises(Unavailable, match="cannot be written .*point HF_HOME to a folder that is"):
        fetch.backbone("squeeze")


# ------------------------------------------------------------------------------------------------------- from a file

def test_a_file_that_was_fetched_elsewhere(server, published, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    found = fetch.backbone("squeeze", file=published[1])
    assert found.pinned and kept(tmp_path) == [KEPT] and server.log == []
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(found.file.read_bytes())
    found.file.unlink()
    assert fetch.backbone("squeeze", file=copy).sha256 == found.sha256       # the kept file of another machine


def test_a_file_that_is_another(server, published, tmp_path):
    from safetensors.torch import save_file
    save_file(published[0], tmp_path / "alike.safetensors")
    with pytest.raises(Unfit, match="alike.safetensors is not known to hold squeezenet1_1-b8a52dc0.pth"):
        fetch.backbone("squeeze", file=tmp_path / "alike.safetensors")
    (tmp_path / "other.pth").write_bytes(b"other")
    with pytest.raises(Unfit, match="other.pth is not squeezenet1_1-b8a52dc0.pth: its SHA-256"):
        fetch.backbone("squeeze", file=tmp_path / "other.pth")
    assert kept(tmp_path) == []


def test_a_pickle_of_the_right_hash_still_runs_no_code(server, tmp_path, monkeypatch):
    """Were a hash ever pinned wrongly: weights_only refuses what is more than tensors."""
    import pickle

    class Evil:
        def __reduce__(self):
            return (pytest.fail, ("code was run",))

    path = tmp_path / "evil.pth"
    with zipfile.ZipFile(path, "w") as packed:
        packed.writestr("archive/data.pkl", pickle.dumps(Evil(), protocol=2))
        packed.writestr("archive/version", "3\n")
    monkeypatch.setitem(backbones.NETWORKS["squeeze"].__dict__, "sha256", checkpoints.sha256(path))
    with pytest.raises(pickle.UnpicklingError):
        metrics.lpips_weights("squeeze", path)


# ------------------------------------------------------------------------------------------------------- the commands

def test_download_says_licence_and_size_and_verify_finds_damage(server, run, tmp_path):
    code, out, err = run("verify", "lpips-squeeze")
    assert code == cli.UNAVAILABLE and "weights download lpips-squeeze` once while online" in err
    code, out, err = run("download", "lpips-squeeze")
    assert code == 0 and out == ""
    for words in ("lpips-squeeze: SqueezeNet 1.1, about 5.0 MB from http://127.0.0.1", "of which 2.9 MB are kept",
                  "licence: BSD-3-Clause (torchvision); trained on ImageNet", KEPT):
        assert words in err
    assert "complete" in run("list", "lpips-squeeze")[1] and "absent" in run("list", "lpips-vgg")[1]
    code, out, _ = run("verify", "lpips-squeeze")
    assert code == 0 and out.split() == ["ok", metrics.lpips_weights("squeeze").sha256, "lpips-squeeze:", KEPT]
    record = json.loads(run("verify", "lpips-squeeze", "--json", "--quiet")[1])
    assert record["ok"] and record["revision"] == backbones.NETWORKS["squeeze"].sha256
    path = tmp_path / "home/sifm_min/lpips" / KEPT
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    code, out, err = run("verify", "lpips-squeeze")
    assert code == cli.SOME_FAILED and out.startswith("BAD") and "is damaged" in err and "download lpips-squeeze" in err
    path.unlink()
    assert run("download", "lpips-squeeze", "--quiet") == (0, "", "")


def test_lpips_is_all_three(server, run, monkeypatch):
    asked = []
    monkeypatch.setattr(fetch, "backbone", lambda network, **_: asked.append(network) or
                        metrics.LPIPSWeights(network, {}, "0" * 64, True, None))
    assert run("download", "lpips")[0] == 0 and asked == ["alex", "vgg", "squeeze"]
    lines = run("list", "lpips")[1].splitlines()[1:]
    assert [line.split()[0] for line in lines] == ["lpips-alex", "lpips-vgg", "lpips-squeeze"]


def test_download_takes_a_file(server, published, run):
    code, _, err = run("download", "lpips-squeeze", "--weights", published[1])
    assert code == 0 and server.log == [] and f"SqueezeNet 1.1, {published[1]}, of which" in err
    for argv in (("download", "lpips"), ("verify", "lpips-alex"), ("download", "lpips-alex", "lpips-vgg"), ("list",),
                 ("download", "miniature")):
        code, _, err = run(*argv, "--weights", published[1])
        assert code == cli.USAGE and "--weights is for download of one of lpips-alex, lpips-vgg, lpips-squeeze" in err

    for option in (("--revision", "main"), ("--no-t5",)):
        code, _, err = run("download", "lpips-alex", *option)
        assert code == cli.USAGE and "are for editors; the files of LPIPS and of the latent spaces are pinned" in err


def test_faults_have_the_code_of_weights_that_cannot_be_had(server, run):
    server.faults = [-404]
    code, out, err = run("download", "lpips-squeeze", "--quiet")
    assert code == cli.UNAVAILABLE and out == "" and err.count("\n") == 1 and "answered 404" in err
