"""tools/gpu_check.py on a pretended card: every part runs, figures are written, and a card that computes wrongly is found."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from pretended_gpu import PretendedGPU

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
import gpu_check  # noqa: E402

# As gpu_check.SMALL, with two levels and layers: each operation on the pretended card takes long.
TWO = {"block_out_channels": [32, 64], "layers_per_block": 1, "norm_num_groups": 8}
TINY = {
    "instruct-pix2pix": gpu_check.SMALL["instruct-pix2pix"] | {"unet": {
        **TWO, "cross_attention_dim": 64, "attention_head_dim": 4, "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"]}},
    "sd3": gpu_check.SMALL["sd3"] | {"transformer": gpu_check.SMALL["sd3"]["transformer"] | {"num_layers": 2}},
}


def test_small_networks_have_every_kind_of_module():
    for kind, networks in gpu_check.FULL.items():
        small = gpu_check.small(kind)
        assert small.keys() == networks.keys()
        for component, (network, _, config) in networks.items():
            with torch.device("meta"):
                kinds = [{(re.sub(r"\.\d+", "", name), type(part)) for name, part in made.named_modules()}
                         for given in (config, small[component][2])
                         for made in [network(network.Config.from_json(json.dumps(given)))]]
            assert kinds[0] == kinds[1], component


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """The command on a pretended card, with small pictures: its exit code and its file."""
    def call(*words):
        monkeypatch.setattr(gpu_check, "SIZE", 32)
        monkeypatch.setattr(gpu_check, "TIMESTEPS", 2)
        monkeypatch.setattr(gpu_check, "SMALL", TINY)
        with PretendedGPU():
            code = gpu_check.main(["--json", str(tmp_path / "gpu.json"), "--small", "--methods", "mist",
                                   "--denoising-steps", "1", "--repeat", "1", *words])
        capsys.readouterr()
        return code, json.loads((tmp_path / "gpu.json").read_text())
    return call


@pytest.mark.slow
def test_every_part_runs_and_is_written(run):
    code, found = run()
    names = [one["name"] for one in found["checks"]]
    assert code == 0 and found["left_out"] == [] and all(one["ok"] for one in found["checks"])
    for kind in ("instruct-pix2pix", "sd3"):
        assert f"{kind}, edit, float32" in names and f"{kind}, memory plan: one timestep at a time" in names
        assert {f"{kind}, mist, {dtype}" for dtype in ("float32", "bfloat16", "float16")} <= set(names)
    assert [one["editor"] for one in found["measures"]] == ["instruct-pix2pix", "sd3"]
    for one in found["measures"]:
        assert one["load_and_first_step_seconds"] > one["step_of_1"]["seconds"] > 0
        assert one["step_of_10"]["peak_bytes"] > one["step_of_1"]["peak_bytes"] > one["step_of_1"]["resting_bytes"] > 0
        assert one["edit"]["steps"] == 1 and one["edit"]["seconds"] > 0


@pytest.mark.slow
def test_a_card_that_computes_wrongly_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "SIZE", 32)
    folder = gpu_check.write_editor(tmp_path, "instruct-pix2pix", networks=gpu_check.small("instruct-pix2pix"))
    reference = gpu_check.gradient(gpu_check.load_editor(folder, device="cpu"), "photoguard-encoder")
    generator = torch.Generator().manual_seed(0)

    def noisy(name, tensors):
        if name == "convolution":
            with torch.no_grad():
                tensors[0].value.add_(0.05 * torch.randn(tensors[0].shape, generator=generator).to(tensors[0].value))

    for before in (None, noisy):
        with PretendedGPU() as gpu:
            gpu.before = before or gpu.before
            first = next(gpu_check.check_gradients(folder, "instruct-pix2pix", "cuda", "photoguard-encoder", reference))
        assert first["ok"] is (before is None), first


@pytest.mark.slow
def test_parts_that_come_too_late_are_named(run):
    code, found = run("--minutes", "0")
    assert code == 0 and found["checks"] == found["measures"] == [] and "sd3, measures" in found["left_out"]


def test_without_a_card_it_is_a_sentence(capsys, tmp_path):
    with PretendedGPU(cards=0), pytest.raises(SystemExit) as stopped:
        gpu_check.main(["--json", str(tmp_path / "gpu.json")])
    assert stopped.value.code == 2 and "torch finds no CUDA card here" in capsys.readouterr().err
