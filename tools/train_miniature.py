"""Train the shipped miniature of InstructPix2Pix from nothing: instructions on photographs, in the space of SD 1.x.

    python tools/train_miniature.py data text unet export --photos FOLDER --minutes 60
    python tools/train_miniature.py check --photos FOLDER --guidance 4 --image-guidance 1.5

Stages: `data` caches latents of crops of the photographs and of their exact targets, `text` teaches the text transformer the
wordings, `unet` trains the denoiser on both, `export` writes the editor in the published layout, `check` edits photographs
that were kept from the training and says how many edits follow the instruction. All but `check` go on where they stopped, and
`unet` reads chunks of `data` as they come, so both may run at once. The autoencoder is the copy that ships
(models/latents/sd1); it is never trained here.
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from photograph_pairs import SIZES, make_chunks, read_pools
from photograph_words import contexts, taught, teach
from training_run import Run, say, trained

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from safetensors.torch import save  # noqa: E402

from sifm_min import miniature  # noqa: E402
from sifm_min.files import writing  # noqa: E402
from sifm_min.models.unet import UNet, UNetConfig  # noqa: E402

SPACE = "sd1"
BATCH = (16, 4)                                              # pairs a step, of small and of large crops
LARGE_STEPS = 5                                              # of so many steps, one is on large crops
DROPS = (0.05, 0.10, 0.15)                                   # below the first: no text; second: neither; third: no picture
UNIFORM = 0.35                                               # share of timesteps from anywhere; the others are noisy ones
RATE = 1e-3
LIMIT = 14_000_000                                           # bytes of a shipped folder

TEXT = {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "hidden_act": "quick_gelu", "hidden_size": 96,
        "intermediate_size": 384, "layer_norm_eps": 1e-5, "num_attention_heads": 4, "num_hidden_layers": 2}
UNET = {"_class_name": "UNet2DConditionModel", "act_fn": "silu", "attention_head_dim": 4, "block_out_channels": [48, 96, 96],
        "center_input_sample": False, "cross_attention_dim": 96,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "downsample_padding": 1, "flip_sin_to_cos": True, "freq_shift": 0, "in_channels": 8, "layers_per_block": 1,
        "mid_block_scale_factor": 1, "norm_eps": 1e-5, "norm_num_groups": 8, "out_channels": 4, "sample_size": 32}
SCHEDULER = {"_class_name": "DDIMScheduler", "beta_end": 0.012, "beta_schedule": "scaled_linear", "beta_start": 0.00085,
             "clip_sample": False, "num_train_timesteps": 1000, "prediction_type": "v_prediction", "set_alpha_to_one": True,
             "steps_offset": 0, "timestep_spacing": "trailing"}


# ------------------------------------------------------------------------------------------------------------ training

def data(args):
    make_chunks(args.work, args.photos, SPACE, args.chunks)


def text(args):
    teach(args.work, [TEXT], args.text_steps)


def batches(work, texts, step, large_steps=LARGE_STEPS):
    """Yield (sources, targets, rows of the contexts, contexts, rng) for the steps from `step` on.

    Now and then, by `DROPS`, a text or a picture is left out: guidance needs predictions without them.
    """
    words, rng = contexts(work, texts), np.random.default_rng((1, step))
    count, pools = 0, {}
    while True:
        if step % 50 == 0 or not pools:
            here = len(list((work / "chunks").glob("*.pt")))
            count, pools = (here, read_pools(work)) if here > count else (count, pools)
            if SIZES[0] not in pools:
                raise SystemExit(f"{work} has no pairs of {SIZES[0]} pixels yet: the stage data makes them")
        large = step % large_steps == large_steps - 1 and SIZES[1] in pools
        sources, targets, places = pools[SIZES[large]].draw(BATCH[large], rng)
        rows, drop = words.draw(places, rng), torch.from_numpy(rng.random(len(places)))
        rows[drop < DROPS[1]] = words.empty
        sources[(drop >= DROPS[0]) & (drop < DROPS[2])] = 0
        yield sources, targets, rows, words, rng
        step += 1


def levels(count, rng):
    """Noise levels from 0 to 1: the share `UNIFORM` from anywhere, the others from the noisier half."""
    found = rng.random(count)
    return torch.from_numpy(np.where(rng.random(count) < UNIFORM, found, 0.5 + 0.5 * found)).float()


def alphas_cumprod():
    betas = torch.linspace(SCHEDULER["beta_start"] ** 0.5, SCHEDULER["beta_end"] ** 0.5, 1000) ** 2
    return (1 - betas).cumprod(0)


def new_unet():
    return UNet(UNetConfig.from_json(json.dumps(UNET)))


def unet(args):
    """The denoiser: predict v of the target's latent from the noisy latent, the source's latent and the instruction."""
    texts = taught(args.work, [TEXT])
    run = Run(args.work / "unet.pt", new_unet().to(args.device), rate=RATE, steps=args.steps, minutes=args.minutes)
    say(f"unet: {sum(p.numel() for p in run.network.parameters()) / 1e6:.2f} million parameters")
    generator, share = torch.Generator().manual_seed(run.step), alphas_cumprod()
    drawn = batches(args.work, texts, run.step)
    while not run.done:
        sources, targets, rows, words, rng = next(drawn)
        t = (1000 * levels(len(targets), rng)).long().clamp(max=999)
        a = share[t][:, None, None, None]
        noise = torch.randn(targets.shape, generator=generator)
        noisy, velocity = a.sqrt() * targets + (1 - a).sqrt() * noise, a.sqrt() * noise - (1 - a).sqrt() * targets
        inputs = (torch.cat([noisy, sources], 1), t, words.states[rows])
        run.descend(F.mse_loss(run.network(*(x.to(args.device) for x in inputs)), velocity.to(args.device)))


# ------------------------------------------------------------------------------------------------------------- shipping

def export(args):
    """The editor in the published layout, weights in fp16, the autoencoder's files as they are."""
    texts = taught(args.work, [TEXT]).texts
    network = trained(args.work / "unet.pt", new_unet())
    parts = {"scheduler": ["diffusers", "DDIMScheduler"], "text_encoder": ["transformers", "CLIPTextModel"],
             "tokenizer": ["transformers", "CLIPTokenizer"], "unet": ["diffusers", "UNet2DConditionModel"],
             "vae": ["diffusers", "AutoencoderTiny"], "feature_extractor": [None, None], "image_encoder": [None, None],
             "safety_checker": [None, None]}
    write_index(args, "StableDiffusionInstructPix2PixPipeline", parts, {"image_guidance": args.image_guidance},
                {"requires_safety_checker": False})
    write_json(args.out / "scheduler" / "scheduler_config.json", SCHEDULER)
    write_network(args.out / "unet", "diffusion_pytorch_model", UNET, network)
    write_network(args.out / "text_encoder", "model", texts.configs[0], texts.networks[0])
    copy_folders(args, "tokenizer", "vae")
    write_hashes(args.out)


def write_index(args, pipeline, parts, settings, more):
    """model_index.json: the pipeline's class, its parts, and the settings of an edit."""
    defaults = {"steps": args.sampling_steps, "guidance": args.guidance, **settings, "size": args.size}
    write_json(args.out / "model_index.json", {
        "_class_name": pipeline, "_sifm_min": {"defaults": defaults, "notice": miniature.NOTICE}} | more | parts)


def write_network(folder, stem, config, network):
    """config.json and the weights in fp16."""
    write_json(folder / "config.json", config)
    tensors = {name: tensor.cpu().half().contiguous() for name, tensor in network.state_dict().items()}
    writing.write(folder / f"{stem}.safetensors", save(tensors, {"format": "pt"}), overwrite=True)


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    writing.write(path, json.dumps(value, indent=2) + "\n", overwrite=True)


def copy_folders(args, *folders, to=None):
    """Folders of the work, byte for byte; `to`: another name in the exported folder."""
    for name in folders:
        for file in sorted((args.work / name).iterdir()):
            target = args.out / (to or name) / file.name
            target.parent.mkdir(parents=True, exist_ok=True)
            writing.write(target, file.read_bytes(), overwrite=True)


def write_hashes(folder):
    """SHA256SUMS of the weights; ValueError where the folder is larger than `LIMIT`."""
    files = sorted(folder.rglob("*.safetensors"))
    lines = [f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.relative_to(folder).as_posix()}" for file in files]
    writing.write(folder / "SHA256SUMS", "\n".join(lines) + "\n", overwrite=True)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    say(f"{folder.name}: {size / 1e6:.1f} MB")
    if size > LIMIT:
        raise ValueError(f"{folder} has {size} bytes; {LIMIT} are allowed")


def check(args):
    from photograph_check import check as look
    look(args)


def main(argv=None, stages=None, space=SPACE, **defaults):
    stages = stages or {stage.__name__: stage for stage in (data, text, unet, export, check)}
    parser = argparse.ArgumentParser(description=sys.modules[next(iter(stages.values())).__module__].__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="+", choices=list(stages))
    parser.add_argument("--photos", type=Path, help="a folder with LICENSES.jsonl, which says what may be trained on")
    parser.add_argument("--work", type=Path, default=Path("build") / f"photographs-{space}", help="checkpoints and latents")
    parser.add_argument("--out", type=Path, help="the exported folder (default: editor/ of the working folder)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--chunks", type=int, default=60, help="of the training data")
    parser.add_argument("--text-steps", type=int, default=800)
    parser.add_argument("--steps", type=int, default=8000, help="of the denoiser, at most")
    parser.add_argument("--minutes", type=float, help="of the denoiser's training, at most; its rate reaches zero then")
    parser.add_argument("--sampling-steps", type=int, default=8)
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--image-guidance", type=float, default=1.5)
    parser.add_argument("--size", type=int, default=256, help="working size, in pixels")
    parser.add_argument("--edits", type=int, default=48, help="of `check`")
    parser.add_argument("--sheet", type=Path, help="contact sheet of `check`: source, exact target, edit")
    parser.set_defaults(**defaults)
    args = parser.parse_args(argv)
    if args.photos is None and {"data", "check"} & set(args.stages):
        parser.error("data and check need --photos")
    args.out = args.out or args.work / "editor"
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    writing.make_folder(args.work)
    for stage in args.stages:
        stages[stage](args)


if __name__ == "__main__":
    main()
