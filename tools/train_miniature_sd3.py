"""Train the shipped miniature of Stable Diffusion 3 from nothing, on two CPU cores (or a GPU with --device cuda).

    python tools/train_miniature_sd3.py all               every stage in order, resumed where it stopped
    python tools/train_miniature_sd3.py vae tune          some stages

Stages: `data` renders pictures with captions, `vae` trains the 16-channel autoencoder, `tune` calibrates its encoder to the
latent shift of SD3's real latent space (never to ISR). Everything lies under --work.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_miniature as first  # noqa: E402
from sifm_min import world  # noqa: E402

VAE = {"_class_name": "AutoencoderKL", "act_fn": "silu", "block_out_channels": [24, 32, 64, 96],
       "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
       "in_channels": 3, "out_channels": 3, "latent_channels": 16, "layers_per_block": 1, "norm_num_groups": 2,
       "sample_size": 64, "scaling_factor": 1.0, "shift_factor": 0.0, "use_quant_conv": False,
       "use_post_quant_conv": False}


def data(args):
    """Pictures and captions: scenes of the training split and what instructions make of them, half and half."""
    if (args.work / "captions.json").exists():
        return
    rng = world.generator(0, "train captions")
    pictures, captions = np.empty((args.pictures, 64, 64, 3), np.uint8), []
    while len(captions) < args.pictures:
        scene = world.draw(rng, held_out=False)
        if len(captions) % 2:
            kind = rng.choice(world.KINDS)                   # each kind of result equally often, colours or not
            asked = {i.kind: i for i in world.instructions(scene, rng, held_out=False)}
            if kind.name not in asked:
                continue
            scene = asked[kind.name].target
        pictures[len(captions)] = world.render(scene)
        captions.append(world.caption(scene))
    np.save(args.work / "pictures.npy", pictures)
    (args.work / "captions.json").write_text(json.dumps(captions))
    first.say(f"data: {len(captions)} pictures of {len(set(captions))} captions")


def load_data(args):
    pictures = np.load(args.work / "pictures.npy", mmap_mode="r")
    return pictures, json.loads((args.work / "captions.json").read_text())


def vae(args):
    pictures, _ = load_data(args)
    first.vae(args, VAE, (pictures[0::2], pictures[1::2]))


def tune(args):
    first.tune(args, VAE, load_data(args)[0])


STAGES = {stage.__name__: stage for stage in (data, vae, tune)}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="+", choices=[*STAGES, "all"])
    parser.add_argument("--work", type=Path, default=Path("build/miniature-sd3"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pictures", type=int, default=48_000)
    parser.add_argument("--vae-steps", type=int, default=2400)
    parser.add_argument("--crop-share", type=float, default=0.75)
    parser.add_argument("--tune-steps", type=int, default=450)
    parser.add_argument("--tau", type=float, default=0.2)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    args.work.mkdir(parents=True, exist_ok=True)
    for stage in STAGES if "all" in args.stages else args.stages:
        STAGES[stage](args)


if __name__ == "__main__":
    main()
