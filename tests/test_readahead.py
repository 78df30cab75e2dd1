"""Read-ahead of weights: the right bytes, in the network's order, and never far ahead."""

import os
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from sifm_min.models import checkpoints, readahead
from sifm_min.models.readahead import ReadAhead, spans

FILE = "diffusion_pytorch_model.safetensors"


@pytest.fixture(autouse=True)
def nothing_waits():
    """Clear the queue of networks that other tests loaded and never ran."""
    readahead._beginnings.clear()


@pytest.fixture
def asked(monkeypatch):
    """(path, first byte, end) of each request to the system, in order; the thread is this one."""
    found = []
    if not Path("/proc/self/fd").exists():
        pytest.skip("this system does not tell which file a descriptor is of")

    class Here:
        def submit(self, call, *given):
            call(*given)

    def fadvise(descriptor, start, length, advice):
        assert advice == 3                                   # POSIX_FADV_WILLNEED
        found.append((os.readlink(f"/proc/self/fd/{descriptor}"), start, start + length))

    monkeypatch.setattr(readahead, "_thread", Here)
    monkeypatch.setattr(os, "posix_fadvise", fadvise, raising=False)
    monkeypatch.setattr(os, "POSIX_FADV_WILLNEED", 3, raising=False)
    return found


class Network(nn.Module):
    """Parts that run one after the other, behind an embedding."""

    class Config:
        from_json = staticmethod(lambda text: None)

    def __init__(self, config=None):
        super().__init__()
        self.embedding = nn.Embedding(8, 4)
        self.parts = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))

    def forward(self, x, upto=4):
        x = self.embedding(x)
        for part in self.parts[:upto]:
            x = part(x)
        return x


@pytest.fixture
def stored(tmp_path):
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet/config.json").write_text("{}")
    torch.manual_seed(0)
    save_file(Network().state_dict(), tmp_path / "unet" / FILE)
    return checkpoints.open_checkpoint(tmp_path, ["unet"])


def test_spans_are_where_the_tensors_lie(tmp_path):
    tensors = {"a": torch.rand(3, 5), "b.c": torch.arange(7), "d": torch.rand(2).half()}
    save_file(tensors, tmp_path / FILE, metadata={"format": "pt"})
    raw, found = (tmp_path / FILE).read_bytes(), spans(tmp_path / FILE)
    assert found.keys() == tensors.keys()
    for name, (first, end) in found.items():
        assert raw[first:end] == tensors[name].numpy().tobytes()
    assert spans(tmp_path / "absent") == {}


def test_prefetch_is_in_pieces_once_and_within_the_window(asked, monkeypatch, tmp_path):
    (tmp_path / "f").touch()
    monkeypatch.setattr(readahead, "WINDOW", 250)
    monkeypatch.setattr(readahead, "PIECE", 60)
    ahead = ReadAhead([(str(n), tmp_path / "f", 100 * n, 100 * n + 100) for n in range(6)])

    def request(call):
        asked.clear()
        call()
        assert all(path == str(tmp_path / "f") and end - start <= 60 for path, start, end in asked)
        assert all(one[2] == two[1] for one, two in zip(asked, asked[1:], strict=False))
        return (asked[0][1], asked[-1][2]) if asked else None

    ahead.begin()
    assert not asked
    assert request(lambda: ReadAhead([]).reached([])) == (0, 200)        # another network runs
    assert request(lambda: ReadAhead([]).reached([])) is None
    assert request(lambda: ahead.reached([])) is None
    assert request(lambda: ahead.reached(["0"])) == (200, 300)
    assert request(lambda: ahead.reached(["unknown"])) is None
    assert request(lambda: ahead.reached(["2", "3"])) == (400, 600)
    assert request(lambda: ahead.reached(["5"])) is None


def test_a_tensor_larger_than_the_window_is_passed_over(asked, monkeypatch, tmp_path):
    (tmp_path / "f").touch()
    monkeypatch.setattr(readahead, "WINDOW", 250)
    ahead = ReadAhead([("large", tmp_path / "f", 0, 300), ("next", tmp_path / "f", 300, 310)])
    ahead.reached([])
    assert not asked
    ahead.reached(["large"])
    assert asked == [(str(tmp_path / "f"), 300, 310)]


def test_prefetch_of_a_network_skips_embeddings(stored, asked, monkeypatch):
    places = spans(stored.folder / "unet" / FILE)
    names = {place: name for name, place in places.items()}

    def fetched():
        return [names[start, end] for _, start, end in asked]

    order = [f"parts.{n}.{kind}" for n in range(4) for kind in ("weight", "bias")]
    monkeypatch.setattr(readahead, "WINDOW", 2 * (64 + 16))  # two parts
    network, x = stored.load(Network, "unet", lazily=True), torch.arange(3)
    assert not asked
    network.embedding(x)
    assert fetched() == order[:4]
    network(x, upto=1)
    assert fetched() == order[:6]
    network(x)
    assert fetched() == order
    asked.clear()
    stored.load(Network, "unet")                             # at once: there is nothing to be ahead of
    assert not asked


@pytest.mark.parametrize("fault", ["no such function", "refused", "a file that went"])
def test_readahead_is_left_out_where_it_is_missing(stored, asked, fault, monkeypatch, tmp_path):
    if fault == "no such function":
        monkeypatch.delattr(os, "posix_fadvise")
    elif fault == "refused":
        monkeypatch.setattr(os, "posix_fadvise", lambda *given: os.stat(tmp_path / "absent"))
    else:
        ReadAhead([("gone", tmp_path / "gone", 0, 10)]).reached([])
    expected = stored.load(Network, "unet")(torch.arange(3))
    assert torch.equal(stored.load(Network, "unet", lazily=True)(torch.arange(3)), expected)


def test_it_is_another_thread_that_asks(stored, monkeypatch):
    threads = []
    monkeypatch.setattr(os, "posix_fadvise", lambda *given: threads.append(threading.current_thread().name), raising=False)
    monkeypatch.setattr(os, "POSIX_FADV_WILLNEED", 3, raising=False)
    stored.load(Network, "unet", lazily=True)(torch.arange(3))
    readahead._thread().submit(lambda: None).result(timeout=60)          # behind all that was asked of it
    assert len(threads) == 8 and all(name.startswith("read-ahead") for name in threads)
