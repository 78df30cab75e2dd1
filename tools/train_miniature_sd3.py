"""Train the shipped miniature of Stable Diffusion 3 from nothing, on two CPU cores (or a GPU with --device cuda).

    python tools/train_miniature_sd3.py all               every stage in order, resumed where it stopped
    python tools/train_miniature_sd3.py vae tune          some stages

Stages: `data` renders pictures with captions, `vae` trains the 16-channel autoencoder, `tune` calibrates its encoder to the
latent shift of SD3's real latent space (never to ISR), `text` teaches two small CLIP text transformers what captions say
(they are frozen afterwards, as SD3's are), `mmdit` trains the transformer with rectified flow on cached latents, `export`
writes models/miniature-sd3, `shift` prints the latent shift as the model card states it. Everything lies under --work.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_miniature as first  # noqa: E402

from sifm_min import miniature  # noqa: E402
from sifm_min.miniature import drawing, wording, world  # noqa: E402
from sifm_min.models.clip import CLIPText, CLIPTextConfig  # noqa: E402
from sifm_min.models.clip_tokenizer import CLIPTokenizer  # noqa: E402
from sifm_min.models.mmdit import MMDiT, MMDiTConfig  # noqa: E402

VAE = {"_class_name": "AutoencoderKL", "act_fn": "silu", "block_out_channels": [24, 32, 64],
       "down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3,
       "in_channels": 3, "out_channels": 3, "latent_channels": 16, "layers_per_block": 1, "norm_num_groups": 2,
       "sample_size": 64, "scaling_factor": 1.0, "shift_factor": 0.0, "use_quant_conv": False,
       "use_post_quant_conv": False}
TOKENS = 28                                                  # positions of the text transformers: the longest caption fits
TEXT = {"architectures": ["CLIPTextModelWithProjection"], "model_type": "clip_text_model", "hidden_size": 64,
        "intermediate_size": 256, "layer_norm_eps": 1e-5, "max_position_embeddings": TOKENS, "num_attention_heads": 4,
        "num_hidden_layers": 3, "projection_dim": 64}
TEXTS = ({**TEXT, "hidden_act": "quick_gelu"}, {**TEXT, "hidden_act": "gelu"})          # as CLIP-L and as bigG
MMDIT = {"_class_name": "SD3Transformer2DModel", "sample_size": 16, "patch_size": 2, "in_channels": 16, "out_channels": 16,
         "num_layers": 8, "attention_head_dim": 32, "num_attention_heads": 4, "caption_projection_dim": 128,
         "joint_attention_dim": 128, "pooled_projection_dim": 128, "pos_embed_max_size": 16}
SCHEDULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}


SAID = [(category, name) for category, attributes in world.ATTRIBUTES.items() for name in attributes]


def data(args):
    """Pictures and captions: half scenes of the training split, half the results of instructions on them."""
    if (args.work / "captions.json").exists():
        return
    rng = world.generator(0, "train captions")
    pictures, captions = np.empty((args.pictures, 64, 64, 3), np.uint8), []
    labels = np.full((args.pictures, len(SAID)), -100, np.int16)                 # -100: not to be read off the caption
    while len(captions) < args.pictures:
        scene = world.draw_scene(rng, held_out=False)
        if len(captions) % 2:
            kind = rng.choice(wording.INSTRUCTION_KINDS)                   # each kind of result equally often, colours or not
            asked = {i.kind: i for i in wording.instructions(scene, rng, held_out=False)}
            if kind.name not in asked:
                continue
            scene = asked[kind.name].target
        pictures[len(captions)] = drawing.render(scene)
        for name in world.visible_attributes(scene) - {"skin"}:
            options = world.ATTRIBUTES[scene.category][name]
            labels[len(captions), SAID.index((scene.category, name))] = options.index(scene.values[name])
        captions.append(world.caption(scene))
    np.save(args.work / "pictures.npy", pictures)
    np.save(args.work / "labels.npy", labels)
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


def tokenizer(args):
    from train_bpe import train_bpe, write
    folder = args.work / "tokenizer"
    if not (folder / "vocab.json").exists():
        folder.mkdir(exist_ok=True)
        write(folder, *train_bpe([*sorted(set(load_data(args)[1])), *wording.corpus()], 2000), TOKENS)
    return CLIPTokenizer.from_folder(folder)


def text_configs(args):
    vocabulary = len(json.loads((args.work / "tokenizer" / "vocab.json").read_text()))
    ends = {"vocab_size": vocabulary, "bos_token_id": vocabulary - 2, "eos_token_id": vocabulary - 1,
            "pad_token_id": vocabulary - 1}
    return [{**config, **ends} for config in TEXTS]


def new_texts(args):
    return nn.ModuleList(CLIPText(CLIPTextConfig.from_json(json.dumps(config))) for config in text_configs(args))


def encode(texts, ids):
    """(states (B,L,128), pooled (B,128)): both transformers' penultimate states side by side, and their projections."""
    found = [network(ids) for network in texts]
    return torch.cat([f.penultimate for f in found], -1), torch.cat([f.pooled for f in found], -1)


def distinct(captions):
    """(the captions once each and the empty one, the place of each caption among them)."""
    places = {caption: i for i, caption in enumerate(["", *dict.fromkeys(captions)])}
    return list(places), torch.tensor([places[caption] for caption in captions])


def text(args):
    """Teach the text transformers every attribute of captions, so that the MMDiT gets meaning instead of letters."""
    run_path = args.work / "text.pt"
    if run_path.exists() and torch.load(run_path, weights_only=True)["step"] >= args.text_steps:
        return
    tokens, labels = tokenizer(args), torch.from_numpy(np.load(args.work / "labels.npy")).long()
    captions, which = distinct(load_data(args)[1])
    ids = torch.tensor(tokens(captions))
    truth = torch.empty(len(captions), len(SAID), dtype=torch.long)
    truth[which] = labels
    texts = new_texts(args)
    heads = nn.ModuleList(nn.Linear(128, len(world.ATTRIBUTES[c][name])) for c, name in SAID for _ in range(2))
    run = first.Run(run_path, nn.ModuleList([texts, heads]), lr=2e-3, steps=args.text_steps)
    rng = np.random.default_rng(run.step)
    while not run.done:
        picked = torch.from_numpy(rng.integers(1, len(captions), size=128))
        states, pooled = encode(texts, ids[picked])
        loss = 0.0
        for i in range(len(SAID)):                           # the pooled vector says it, and so do the states at the end
            said = truth[picked, i]
            if (said >= 0).any():
                loss = loss + F.cross_entropy(heads[2 * i](pooled), said)
                loss = loss + F.cross_entropy(heads[2 * i + 1](states[:, -1]), said)
        value = run.update(loss / len(SAID))
        if run.step % 200 == 0:
            run.log(f"loss {value:.4f}")


def trained_texts(args):
    texts, state = new_texts(args), torch.load(args.work / "text.pt", weights_only=True)["average"]
    texts.load_state_dict({name[2:]: value for name, value in state.items() if name.startswith("0.")})
    return texts.eval().requires_grad_(False)


def cached(args):
    """Latents of all pictures by the plain encoder, and the text states of all captions: neither changes in training.

    The tuned encoder is distilled to give these same latents.
    """
    path = args.work / "cached.pt"
    if path.exists():
        return torch.load(path, weights_only=True)
    pictures, captions = load_data(args)
    network = first.new_vae(args, "vae-plain.pt", VAE)
    captions, which = distinct(captions)
    ids, texts = torch.tensor(tokenizer(args)(captions)), trained_texts(args)
    with torch.no_grad():
        parts = [encode(texts, batch) for batch in ids.split(256)]
    state = {"latents": first.in_batches(lambda x: first.mean_latent(network, x), pictures), "which": which,
             "states": torch.cat([states for states, _ in parts]), "pooled": torch.cat([pooled for _, pooled in parts])}
    first.save(state, path)
    first.say("latents and text states cached")
    return state


def new_mmdit():
    """The transformer as it is before training: every block the identity, and the published kind of position table."""
    network = MMDiT(MMDiTConfig.from_json(json.dumps(MMDIT)))
    for name, p in network.named_parameters():
        if "norm1" in name or name.startswith(("norm_out", "proj_out")):
            nn.init.zeros_(p)
    side, width = MMDIT["pos_embed_max_size"], network.config.width
    place = torch.arange(side) / (side / MMDIT["sample_size"] * MMDIT["patch_size"])
    angle = place[:, None] * 10000 ** -(torch.arange(width // 4) / (width // 4))
    waves = torch.cat([angle.sin(), angle.cos()], dim=1)                                    # (side, width / 2)
    table = torch.cat([waves[None].expand(side, -1, -1), waves[:, None].expand(-1, side, -1)], dim=2)
    network.pos_embed.pos_embed.copy_(table.reshape(1, side * side, width))
    return network


def mmdit(args):
    """Rectified flow: predict noise - latent at latent (1 - sigma) + noise sigma, given the caption (or one time in ten
    the empty one)."""
    state = cached(args)
    run = first.Run(args.work / "mmdit.pt", new_mmdit().to(args.device), lr=args.lr, steps=args.mmdit_steps, decay=args.decay)
    rng, generator, total = np.random.default_rng(run.step), torch.Generator().manual_seed(run.step), 0.0
    while not run.done:
        picked = torch.from_numpy(rng.integers(len(state["which"]), size=args.batch))
        latent, words = state["latents"][picked], state["which"][picked]
        words = words * (torch.rand(args.batch, generator=generator) >= 0.1)
        uniform = torch.rand(args.batch, generator=generator)       # half anywhere, half where the text decides most
        sigma = torch.where(torch.rand(args.batch, generator=generator) < 0.5, uniform, 0.5 + 0.5 * uniform)
        noise = torch.randn(latent.shape, generator=generator)
        noisy = (1 - sigma)[:, None, None, None] * latent + sigma[:, None, None, None] * noise
        inputs = (noisy, 1000 * sigma, state["states"][words], state["pooled"][words])
        velocity = run.network(*(x.to(args.device) for x in inputs))
        total += run.update(F.mse_loss(velocity, (noise - latent).to(args.device)))
        if run.step % 200 == 0:
            run.log(f"loss {total / 200:.4f}")
            total = 0.0


def trained_mmdit(args):
    network = new_mmdit()
    network.load_state_dict(torch.load(args.work / "mmdit.pt", weights_only=True)["average"], strict=False)     # but the table
    return network.eval().requires_grad_(False)


def export(args):
    """The shipped folder, in fp16 and in the published layout, with its hashes."""
    folder, network = first.MODELS / "miniature-sd3", trained_mmdit(args)
    texts, configs = trained_texts(args), text_configs(args)
    defaults = {"steps": args.steps, "guidance": args.guidance, "strength": args.strength, "size": 64, "text_length": 0}
    parts = {"scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
             "transformer": ["diffusers", "SD3Transformer2DModel"], "vae": ["diffusers", "AutoencoderKL"],
             "text_encoder_3": [None, None], "tokenizer_3": [None, None]}
    for i in ("", "_2"):
        parts |= {f"text_encoder{i}": ["transformers", "CLIPTextModelWithProjection"],
                  f"tokenizer{i}": ["transformers", "CLIPTokenizer"]}
    first.write_json(folder / "model_index.json", {
        "_class_name": "StableDiffusion3Img2ImgPipeline", "_sifm_min": {"defaults": defaults, "notice": miniature.NOTICE},
        "feature_extractor": [None, None], "image_encoder": [None, None], **parts})
    first.write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER)
    weights = torch.load(args.work / "vae-tuned.pt", weights_only=True)
    for name, config, state in (("transformer", MMDIT, network.state_dict()), ("vae", VAE, weights)):
        first.write_json(folder / name / "config.json", config)
        first.write_weights(folder / name / "diffusion_pytorch_model.safetensors", state)
    for i, config, text_encoder in zip(("", "_2"), configs, texts, strict=True):
        first.write_json(folder / f"text_encoder{i}" / "config.json", config)
        first.write_weights(folder / f"text_encoder{i}" / "model.safetensors", text_encoder.state_dict())
        (folder / f"tokenizer{i}").mkdir(exist_ok=True)
        for file in (args.work / "tokenizer").iterdir():
            (folder / f"tokenizer{i}" / file.name).write_bytes(file.read_bytes())
    first.write_hashes(folder)


def shift(args):
    """Print the latent shift under attack of the plain encoder, which is not shipped, and of the tuned one."""
    for name in ("vae-plain.pt", "vae-tuned.pt"):
        first.say_shift(name, first.new_vae(args, name, VAE))


STAGES = {stage.__name__: stage for stage in (data, vae, tune, text, mmdit, export, shift)}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="+", choices=[*STAGES, "all"])
    parser.add_argument("--work", type=Path, default=Path("build/miniature-sd3"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pictures", type=int, default=48_000)
    parser.add_argument("--vae-steps", type=int, default=2000)
    parser.add_argument("--crop-share", type=float, default=0.75)
    parser.add_argument("--tune-steps", type=int, default=300)
    parser.add_argument("--tau", type=float, default=0.47)
    parser.add_argument("--text-steps", type=int, default=500)
    parser.add_argument("--mmdit-steps", type=int, default=4400)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--decay", type=float, default=0.3,
                        help="the last share of the steps, over which the rate falls to zero")
    parser.add_argument("--steps", type=int, default=20, help="denoising steps of an edit, by default")
    parser.add_argument("--guidance", type=float, default=3.0, help="likewise")
    parser.add_argument("--strength", type=float, default=0.6, help="likewise")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    args.work.mkdir(parents=True, exist_ok=True)
    for stage in STAGES if "all" in args.stages else args.stages:
        STAGES[stage](args)


if __name__ == "__main__":
    main()
