"""The benches of editors run end to end on a CPU, and the naive step that ours is measured against is the same step."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

source = Path(__file__).resolve().parents[1] / "tools" / "bench.py"
spec = importlib.util.spec_from_file_location("bench", source)
bench = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bench)
import bench_editors  # noqa: E402  (bench.py puts its folder on the path)
import bench_measuring  # noqa: E402
import bench_peers  # noqa: E402

SMALL_VAE = {"block_out_channels": [8, 8, 16, 16], "layers_per_block": 1, "norm_num_groups": 4}
SMALL_CLIP = {"vocab_size": len(bench_peers.TOKENS), "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
              "num_attention_heads": 2, "projection_dim": 16}
SMALL = {
    "instruct-pix2pix": {
        "unet": {"block_out_channels": [16, 32], "layers_per_block": 1, "norm_num_groups": 8, "cross_attention_dim": 16,
                 "attention_head_dim": 2, "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
                 "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"]},
        "vae": SMALL_VAE, "text_encoder": SMALL_CLIP},
    "sd3": {
        "transformer": {"num_layers": 4, "num_attention_heads": 2, "attention_head_dim": 8, "caption_projection_dim": 16,
                        "joint_attention_dim": 48, "pooled_projection_dim": 32, "pos_embed_max_size": 8},
        "vae": SMALL_VAE, "text_encoder": SMALL_CLIP, "text_encoder_2": SMALL_CLIP},
}
TAPS = {"instruct-pix2pix": "mid_block,up_blocks.1.attentions.0", "sd3": "transformer_blocks.1.context,transformer_blocks.2"}


@pytest.fixture(scope="module", params=SMALL)
def small(request, tmp_path_factory):
    """(kind, folder) of a small editor in the layout that the benches write at full size."""
    pytest.importorskip("diffusers", reason="diffusers, which the benches compare with, is not installed")
    full = bench_peers.FULL[request.param]
    networks = {name: (network, theirs, {**config, **SMALL[request.param][name]})
                for name, (network, theirs, config) in full.items()}
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, bench_peers.write_editor(folder, request.param, networks=networks)


@pytest.fixture
def run(monkeypatch, tmp_path, capsys, small):
    """A bench of that editor, in this process: (what its JSON says, what it prints)."""
    monkeypatch.setattr(bench_editors, "peak_rates", lambda args, dtype: {"mm": 1e10, "conv": 2e10})

    def run(command, *options):
        threads, file = torch.get_num_threads(), tmp_path / "found.json"
        try:
            bench.main([command, "--editor", str(small[1]), "--size", "64", "--json", str(file), *options])
        finally:
            torch.set_num_threads(threads)
        return json.loads(file.read_text()), capsys.readouterr().out

    return run


@pytest.mark.slow
def test_the_naive_step_has_the_gradient_of_ours(run, small):
    found, out = run("step", "--repeat", "1", "--timesteps", "1,2", "--prompts", "2", "--taps", TAPS[small[0]])
    assert found["taps"] == TAPS[small[0]].split(",")
    one, two = found["timesteps"]["1"], found["timesteps"]["2"]
    for each in (one, two):
        assert each["cosine"] > 0.9999 and each["same_sign"] > 0.999
        assert sum(each["stages"].values()) == pytest.approx(1) and sum(each["operations"].values()) == pytest.approx(1)
        assert min(each["ours"]["cpu"], each["peer"]["cpu"], each["ratio"]["wall"]) > 0
    assert "| timesteps | ours, cpu s | peer | ratio |" in out and "\n| 2 | " in out and "on a GPU" in out
    # One pass of the VAE whatever the timesteps, and one of the denoiser for each.
    for stage in ("VAE forward", "VAE backward"):
        assert one["gflop"][stage] == two["gflop"][stage] > 0
    assert two["gflop"]["denoiser forward"] > 1.5 * one["gflop"]["denoiser forward"] > 0
    # The floor is of the given rates: 20 GFLOP/s for all of it.
    assert one["floor"]["seconds"] == pytest.approx(sum(one["gflop"].values()) / 20)


@pytest.mark.slow
def test_the_edit_is_the_pipelines(run):
    found, out = run("edit", "--repeat", "1", "--steps", "2")
    assert found["apart"] < 1e-4 and found["ratio"]["cpu"] > 0
    assert "| pictures differ by |" in out and "peer: diffusers' pipeline, float32\n" in out


@pytest.mark.slow
def test_loading_is_measured_on_both_sides(run, small, monkeypatch, capsys):
    class InThisProcess:
        returncode = 0

        def __init__(self, words, **options):
            capsys.readouterr()
            bench.main(words[2:])
            self.stdout = capsys.readouterr().out

    monkeypatch.setattr(bench_editors.subprocess, "run", InThisProcess)
    found, out = run("load", "--repeat", "1")
    for side in ("ours", "peer"):
        assert 0 < found[side]["seconds of it loading"] < found[side]["seconds to the end of the first step"]
    assert "| seconds to the end of the first step | " in out and "peer: from_pretrained of the pipeline" in out
    if sys.platform == "linux":
        assert found["ours"]["of it anonymous"] > 0 and found["peer"]["peak memory"] >= found["peer"]["peak while loading"]


@pytest.mark.slow
def test_convolutions_are_those_of_the_networks(monkeypatch, tmp_path, capsys):
    small = bench_peers.FULL["instruct-pix2pix"]
    small = {name: (*small[name][:2], {**small[name][2], **config}) for name, config in (
        ("unet", {"block_out_channels": [64, 64, 128, 128], "layers_per_block": 1}), ("vae", SMALL_VAE))}
    monkeypatch.setitem(bench_peers.FULL, "instruct-pix2pix", small)
    threads = torch.get_num_threads()
    try:
        bench.main(["convolutions", "--size", "64", "--pictures", "2", "--seconds", "0", "--json",
                    str(tmp_path / "found.json")])
    finally:
        torch.set_num_threads(threads)
    rows = {tuple(row["shape"]): row for row in json.loads((tmp_path / "found.json").read_text())["rows"]}
    first, down = rows[2, 64, 64, 8, 8, 3, 1, 1], rows[2, 64, 64, 8, 8, 3, 2, 1]
    # Going down two; going up two, and one after the interpolation.
    assert first["layers"] == 5 and down["layers"] == 1
    for way in ("forward", "gradient"):
        assert first["seconds"][way].keys() == {"torch", "Winograd", "product"}
        assert all(0 < least < 10 for least in first["seconds"][way].values())
    assert down["seconds"]["forward"].keys() == {"torch", "product"} and down["seconds"]["gradient"].keys() == {"torch"}
    assert "2\t64 -> 64\t8x8\t3x3/1\t5" in capsys.readouterr().out


@pytest.mark.slow
def test_latents_have_the_gradient_of_the_naive_loop(tmp_path, capsys):
    pytest.importorskip("diffusers", reason="diffusers, which the bench compares with, is not installed")
    threads, file = torch.get_num_threads(), tmp_path / "found.json"
    try:
        bench.main(["latents", "--size", "32", "--spaces", "1,2", "--repeat", "2", "--json", str(file)])
    finally:
        torch.set_num_threads(threads)
    found, out = json.loads(file.read_text()), capsys.readouterr().out
    assert found["weights"] == "random" and found["counts"].keys() == {"1", "2"}
    for one in found["counts"].values():
        assert one["cosine"] > 0.9999 and one["same_sign"] > 0.99
        assert one["photograph"] == {side: pytest.approx(100 * one[side]["cpu"]) for side in ("ours", "peer")}
        assert min(one["ours"]["cpu"], one["peer"]["cpu"]) > 0
    assert "| spaces | ours, cpu s | peer | ratio |" in out and "A step is measured; a photograph is 100" in out


@pytest.mark.slow
def test_without_diffusers_ours_is_measured_alone(run, monkeypatch):
    def absent():
        raise ImportError("No module named 'diffusers'")

    monkeypatch.setattr(bench_peers, "quiet", absent)
    found, out = run("step", "--repeat", "1", "--timesteps", "1", "--no-profile", "--dtype", "bfloat16", "--memory", "low")
    assert found["peer"] == "diffusers is not compared with: No module named 'diffusers'" and found["peer"] in out
    assert found["timesteps"]["1"].keys() == {"plan", "ours"}
    assert "| not measured |" in out


@pytest.mark.slow
@pytest.mark.slow
def test_memory_of_a_transformer_is_counted(capsys):
    """At full size, where nothing is computed: four times the timesteps take more, and checkpointed blocks less."""
    bench.main(["memory", "--editor", "flux-klein", "--size", "64"])
    head, _, *rows = capsys.readouterr().out.splitlines()[1:]
    assert head.startswith("flux-klein, counted, not measured, for 64x64") and head.endswith("weights 7.35 GiB")
    (one, again), (four, fewer) = ([float(row.split()[-1]) for row in rows[i:i + 2]] for i in (0, 2))
    assert four > one > again > 7.35 and four > fewer >= again


def test_memory_is_what_a_call_holds_at_its_worst_moment():
    size = 64 * 2**20
    if bench_measuring.most_memory(lambda: None, "cpu") is None:
        pytest.skip("this system does not tell a process' peak memory")

    def call():
        torch.ones(size, dtype=torch.uint8)                  # gone again before the call ends

    # Memory that the allocator kept from earlier tensors serves the call, and counts as the call's.
    for large in (30, 20, 20):
        kept = [torch.ones(large * 2**20, dtype=torch.uint8) for _ in range(10)] + [torch.ones(2**18)]
        del kept[:-1]
    assert abs(bench_measuring.most_memory(call, "cpu") - size) < 0.1 * size
