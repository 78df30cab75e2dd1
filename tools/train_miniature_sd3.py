"""Train the shipped miniature of UltraEdit from nothing: instructions on photographs, in the space of Stable Diffusion 3.

    python tools/train_miniature_sd3.py data text mmdit export --photos FOLDER --minutes 60
    python tools/train_miniature_sd3.py check --photos FOLDER --guidance 4 --image-guidance 1.5

The stages are those of train_miniature.py. `mmdit` trains the transformer by rectified flow, with the picture's latent as
further channels, as UltraEdit has it; `text` teaches two CLIP text transformers side by side. The autoencoder is the copy that
ships (models/latents/sd3); it is never trained here.
"""

import json

import torch
import torch.nn.functional as F
import train_miniature as first
from photograph_pairs import SIZES, make_chunks
from photograph_words import taught, teach
from torch import nn
from training_run import Run, say, trained

from sifm_min.models.mmdit import MMDiT, MMDiTConfig

SPACE = "sd3"
LARGE_STEPS = 2                                              # of so many steps, one is on large crops
TEXT = {"architectures": ["CLIPTextModelWithProjection"], "model_type": "clip_text_model", "hidden_size": 64,
        "intermediate_size": 256, "layer_norm_eps": 1e-5, "num_attention_heads": 4, "num_hidden_layers": 3,
        "projection_dim": 64}
TEXTS = [TEXT | {"hidden_act": "quick_gelu"}, TEXT | {"hidden_act": "gelu"}]           # as CLIP-L and as bigG
MMDIT = {"_class_name": "SD3Transformer2DModel", "attention_head_dim": 32, "caption_projection_dim": 128, "in_channels": 32,
         "joint_attention_dim": 128, "num_attention_heads": 4, "num_layers": 6, "out_channels": 16, "patch_size": 2,
         "pooled_projection_dim": 128, "pos_embed_max_size": 16, "sample_size": 32}
SCHEDULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}


def data(args):
    make_chunks(args.work, args.photos, SPACE, args.chunks, large=2)


def text(args):
    teach(args.work, TEXTS, args.text_steps)


def new_mmdit():
    """The transformer before training: every block is the identity, and positions have the published kind of table."""
    network = MMDiT(MMDiTConfig.from_json(json.dumps(MMDIT)))
    for name, p in network.named_parameters():
        if "norm1" in name or name.startswith(("norm_out", "proj_out")):
            nn.init.zeros_(p)
    network.pos_embed.pos_embed.copy_(positions(network, 1))
    return network


def positions(network, stride):
    """A position table (1, side * side, width) of the published kind, whose central positions are `stride` places apart.

    Edits are relative to the picture. With stride 2, the tokens of a small crop stand at the places of a picture of twice its
    size, so that they mean the same parts of the picture. What ships is stride 1.
    """
    side, width = network.pos_embed.side, network.config.width
    places = (torch.arange(side) - (side - 1) / 2) * stride + (side - 1) / 2
    angle = places[:, None] * 10000 ** -(torch.arange(width // 4) / (width // 4))
    waves = torch.cat([angle.sin(), angle.cos()], 1)                                        # (side, width / 2)
    table = torch.cat([waves[None].expand(side, -1, -1), waves[:, None].expand(-1, side, -1)], 2)
    return table.reshape(1, side * side, width)


def mmdit(args):
    """Rectified flow: predict noise less latent at (1 - sigma) latent + sigma noise, given the source and the instruction."""
    texts = taught(args.work, TEXTS)
    run = Run(args.work / "mmdit.pt", new_mmdit().to(args.device), rate=first.RATE, steps=args.steps, minutes=args.minutes)
    say(f"mmdit: {sum(p.numel() for p in run.network.parameters()) / 1e6:.2f} million parameters")
    generator, drawn = torch.Generator().manual_seed(run.step), first.batches(args.work, texts, run.step, LARGE_STEPS)
    tables = {size: positions(run.network, SIZES[1] / size).to(args.device) for size in SIZES}
    while not run.done:
        sources, targets, rows, words, rng = next(drawn)
        run.network.pos_embed.pos_embed.copy_(tables[8 * targets.shape[-1]])
        sigma = first.levels(len(targets), rng)
        noise, s = torch.randn(targets.shape, generator=generator), sigma[:, None, None, None]
        noisy = torch.cat([(1 - s) * targets + s * noise, sources], 1)
        inputs = (noisy, 1000 * sigma, words.states[rows], words.pooled[rows])
        run.descend(F.mse_loss(run.network(*(x.to(args.device) for x in inputs)), (noise - targets).to(args.device)))


def export(args):
    """The editor in the published layout, weights in fp16, the autoencoder's files as they are; without T5."""
    texts = taught(args.work, TEXTS).texts
    network = trained(args.work / "mmdit.pt", new_mmdit())
    parts = {"scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
             "transformer": ["diffusers", "SD3Transformer2DModel"], "vae": ["diffusers", "AutoencoderTiny"],
             "text_encoder_3": [None, None], "tokenizer_3": [None, None], "feature_extractor": [None, None],
             "image_encoder": [None, None]}
    for i, config, one in zip(("", "_2"), texts.configs, texts.networks, strict=True):
        parts |= {f"text_encoder{i}": ["transformers", "CLIPTextModelWithProjection"],
                  f"tokenizer{i}": ["transformers", "CLIPTokenizer"]}
        first.write_network(args.out / f"text_encoder{i}", "model", config, one)
        first.copy_folders(args, "tokenizer", to=f"tokenizer{i}")
    first.write_index(args, "StableDiffusion3InstructPix2PixPipeline", parts,
                      {"image_guidance": args.image_guidance, "text_length": 0}, {})
    first.write_json(args.out / "scheduler" / "scheduler_config.json", SCHEDULER)
    first.write_network(args.out / "transformer", "diffusion_pytorch_model", MMDIT, network)
    first.copy_folders(args, "vae")
    first.write_hashes(args.out)


if __name__ == "__main__":
    first.main(stages={stage.__name__: stage for stage in (data, text, mmdit, export, first.check)}, space=SPACE)
