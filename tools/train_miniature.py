"""Train the shipped miniature editor from nothing, on two CPU cores (or a GPU with --device cuda).

    python tools/train_miniature.py all                   every stage in order, resumed where it stopped
    python tools/train_miniature.py vae tune              some stages
    python tools/train_miniature.py shift                 print the latent shift under attack, as the model card states it
    python tools/train_miniature.py export                write models/miniature and models/miniature-plain

Stages: `data` renders the pairs, `vae` trains the autoencoder, `tune` calibrates its encoder to a real latent space's
latent shift (never to ISR), `text` teaches the text transformer the instructions, `unet` trains the editor on cached
latents, `judge` trains the second judge on renderings, `export` writes the folders. Everything lies under --work.
"""

import argparse
import hashlib
import json
import math
import os
import random
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from sifm_min import load_editor, miniature  # noqa: E402
from sifm_min.miniature import drawing, wording, world  # noqa: E402
from sifm_min.models.clip import CLIPText, CLIPTextConfig  # noqa: E402
from sifm_min.models.unet import UNet, UNetConfig  # noqa: E402
from sifm_min.models.vae import AutoencoderKL, VAEConfig  # noqa: E402

MODELS = Path(__file__).resolve().parents[1] / "models"
PAIRS = 40_000
TOKENS = 24                                                  # positions of the text transformer
BUDGET, ATTACK_STEPS, ATTACK_STEP_SIZE = 7 / 255, 60, 0.004  # the attack that measured the real latent space

VAE = {"_class_name": "AutoencoderKL", "act_fn": "silu", "block_out_channels": [24, 32, 64],
       "down_block_types": ["DownEncoderBlock2D"] * 3,
       "up_block_types": ["UpDecoderBlock2D"] * 3, "in_channels": 3, "out_channels": 3, "latent_channels": 4,
       "layers_per_block": 1,
       "norm_num_groups": 2, "sample_size": 64, "scaling_factor": 1.0}
TEXT = {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "hidden_act": "quick_gelu",
        "hidden_size": 96, "intermediate_size": 384,
        "layer_norm_eps": 1e-5, "max_position_embeddings": TOKENS, "num_attention_heads": 4, "num_hidden_layers": 2}
UNET = {"_class_name": "UNet2DConditionModel", "act_fn": "silu", "attention_head_dim": 4,
        "block_out_channels": [64, 96, 96],
        "cross_attention_dim": 96, "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"], "in_channels": 8, "out_channels": 4,
        "layers_per_block": 1,
        "norm_num_groups": 8, "sample_size": 16, "flip_sin_to_cos": True, "freq_shift": 0, "downsample_padding": 1,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-5, "center_input_sample": False}
SCHEDULER = {"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012,
             "num_train_timesteps": 1000,
             "prediction_type": "v_prediction", "timestep_spacing": "trailing", "clip_sample": False,
             "set_alpha_to_one": True, "steps_offset": 0}


# -- shared by the stages ------------------------------------------------------------------------------------------------

class Run:
    """One stage's training state: a network, its exponential moving average, its optimiser, and a file to resume from."""

    def __init__(self, path, network, *, lr, steps, decay=0.25, ema=0.999, warmup=100, groups=None):
        self.path, self.network, self.lr, self.steps = path, network, lr, steps
        self.decay, self.ema_rate, self.warmup = decay, ema, warmup
        self.average = {name: p.detach().clone() for name, p in network.named_parameters()}
        self.optimiser = torch.optim.AdamW(groups or [{"params": list(network.parameters())}], lr=lr, betas=(0.9, 0.99),
                                           weight_decay=0.01, fused=True)
        for group in self.optimiser.param_groups:
            group["scale"] = group.get("scale", 1.0)
        self.step, self.started = 0, time.time()
        if path.exists():
            state = torch.load(path, weights_only=True)
            network.load_state_dict(state["network"])
            self.average, self.step = state["average"], state["step"]
            self.optimiser.load_state_dict(state["optimiser"])
        self.first = self.step

    @property
    def done(self):
        return self.step >= self.steps

    def update(self, loss):
        """One optimiser step: warm-up, a plateau, a linear decay over the last part; returns the loss as a number."""
        rate = self.lr * min(1, (self.step + 1) / self.warmup,
                             (self.steps - self.step) / max(1, self.decay * self.steps))
        for group in self.optimiser.param_groups:
            group["lr"] = rate * group["scale"]
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimiser.step()
        self.step += 1
        keep = min(self.ema_rate, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for name, p in self.network.named_parameters():
                self.average[name].lerp_(p, 1 - keep)
        if self.step % 500 == 0 or self.done:
            self.save()
        return loss.item()

    def save(self):
        state = {"network": self.network.state_dict(), "average": self.average,
                 "optimiser": self.optimiser.state_dict(), "step": self.step}
        save(state, self.path)

    def log(self, text):
        pace = (time.time() - self.started) / max(1, self.step - self.first)
        say(f"{self.path.stem} {self.step}/{self.steps} {text} ({pace:.3f} s/step)")

    def finished(self):
        """The network with its averaged weights, frozen."""
        self.network.load_state_dict(self.average)
        return self.network.eval().requires_grad_(False)


def say(text):
    print(time.strftime("%H:%M:%S"), text, flush=True)


def save(state, path):
    torch.save(state, path.with_suffix(".part"))
    os.replace(path.with_suffix(".part"), path)


def to_pixels(pictures, device="cpu"):
    """uint8 (B,64,64,3) -> (B,3,64,64) in [0,1]."""
    return torch.from_numpy(np.array(pictures)).to(device).permute(0, 3, 1, 2).float().div(255)


def grain(pixels, generator=None):
    """Camera-like noise, up to the size of the attack, on half of the pictures, so that noise alone breaks no edit."""
    strength = 0.04 * torch.rand(len(pixels), 1, 1, 1,
                                 generator=generator) * (torch.rand(len(pixels), 1, 1, 1, generator=generator) < 0.5)
    return (pixels + strength.to(pixels) * (2 * torch.rand(pixels.shape, generator=generator) - 1).to(pixels)).clamp(0,
                                                                                                                     1)


def new_vae(args, name=None, config=VAE):
    vae = AutoencoderKL(VAEConfig.from_json(json.dumps(config)))
    if name:
        vae.load_state_dict(torch.load(args.work / name, weights_only=True))
        vae.eval().requires_grad_(False)
    return vae.to(args.device, memory_format=torch.channels_last)


def mean_latent(vae, pixels):
    return vae.encode(2 * pixels - 1)[0]


def in_batches(function, pictures, size=64):
    with torch.no_grad():
        return torch.cat([function(to_pixels(pictures[i:i + size])) for i in range(0, len(pictures), size)])


# -- stages --------------------------------------------------------------------------------------------------------------

def data(args):
    """Source and target pictures and prompts, each kind of instruction equally often."""
    if (args.work / "prompts.json").exists():
        return
    rng = world.generator(0, "train")
    (sources, targets), prompts = (np.empty((args.pairs, 64, 64, 3), np.uint8) for _ in range(2)), []
    while len(prompts) < args.pairs:
        kind, scene = rng.choice(wording.INSTRUCTION_KINDS), world.draw_scene(rng, held_out=False)
        if kind.applies(scene) and kind.colours(scene):
            instruction = next(i for i in wording.instructions(scene, rng, held_out=False) if i.kind == kind.name)
            sources[len(prompts)], targets[len(prompts)] = drawing.render(scene), drawing.render(instruction.target)
            prompts.append((kind.name, instruction.prompt))
    np.save(args.work / "sources.npy", sources)
    np.save(args.work / "targets.npy", targets)
    (args.work / "prompts.json").write_text(json.dumps(prompts))
    say(f"data: {len(prompts)} pairs of {len({p for _, p in prompts})} prompts")


def load_data(args):
    return (np.load(args.work / "sources.npy", mmap_mode="r"), np.load(args.work / "targets.npy", mmap_mode="r"),
            json.loads((args.work / "prompts.json").read_text()))


def vae(args, config=VAE, pictures=None):
    """The autoencoder: first on quarter-size crops (four times the steps for the time), then on whole pictures."""
    if (args.work / "vae-plain.pt").exists():
        return
    sources, targets = pictures or load_data(args)[:2]
    run = Run(args.work / "vae.pt", new_vae(args, config=config), lr=1.5e-3, steps=args.vae_steps, decay=0.4, ema=0.995)
    rng = np.random.default_rng(run.step)
    generator = torch.Generator().manual_seed(run.step)
    while not run.done:
        whole = run.step >= args.crop_share * args.vae_steps
        picked = (sources if rng.random() < 0.5 else targets)[np.sort(rng.integers(len(sources), size=16))]
        clean = to_pixels(picked, args.device)
        if not whole:
            y, x = rng.integers(33, size=2)
            clean = clean[:, :, y:y + 32, x:x + 32]
        clean = clean.contiguous(memory_format=torch.channels_last)
        mean, logvar = run.network.encode(2 * grain(clean, generator) - 1)
        latent = mean + (logvar / 2).exp() * torch.randn(mean.shape, generator=generator).to(mean)
        output = run.network.decode(latent) / 2 + 0.5
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        loss = run.update(reconstruction_loss(output, clean) + 1e-3 * kl)
        if run.step % 100 == 0:
            psnr = -10 * torch.log10((output.detach() - clean).square().mean((1, 2, 3))).mean()
            run.log(f"loss {loss:.4f} psnr {psnr:.2f} kl {kl.item():.2f} {'whole' if whole else 'crops'}")
    network = run.finished()
    std = in_batches(lambda x: mean_latent(network, x), sources[:2048]).std().item()
    last, first = ((network.quant_conv, network.post_quant_conv) if config.get("use_quant_conv", True) else
                   (network.encoder.conv_out, network.decoder.conv_in))
    channels = config["latent_channels"]
    with torch.no_grad():                                    # unit latents: unscaled conditions and scaled targets then agree
        last.weight[:channels] /= std
        last.bias[:channels] /= std
        last.bias[channels:] -= 2 * math.log(std)
        first.weight *= std
    say(f"vae: latent std was {std:.3f}, reconstruction {vae_psnr(network, network):.2f} dB on held-out scenes")
    save(network.state_dict(), args.work / "vae-plain.pt")


def reconstruction_loss(output, clean):
    def gradients(x):
        return x[..., :, 1:] - x[..., :, :-1], x[..., 1:, :] - x[..., :-1, :]

    edges = sum(F.l1_loss(a, b) for a, b in zip(gradients(output), gradients(clean), strict=True)) / 2
    return F.l1_loss(output, clean) + 0.5 * edges + 2 * F.mse_loss(output, clean) + F.l1_loss(F.avg_pool2d(output, 8),
                                                                                              F.avg_pool2d(clean, 8))


def held_out_pictures(count, seed=0):
    rng = world.generator(seed, "train_miniature measurements")
    return np.stack([np.asarray(drawing.render(world.draw_scene(rng, held_out=True))) for _ in range(count)])


def vae_psnr(encoder, decoder):
    pictures = held_out_pictures(96)
    output = in_batches(lambda x: decoder.decode(mean_latent(encoder, x)) / 2 + 0.5, pictures).clamp(0, 1)
    return (-10 * torch.log10((output - to_pixels(pictures)).square().mean((1, 2, 3)))).mean().item()


def tune(args, config=VAE, sources=None):
    """Make the encoder as attackable as a real latent space, by the latent shift alone (model card, `Calibration`).

    The encoder is distilled from its plain self. Per batch, one sign step of the whole budget pulls the latent towards a
    target (a random direction, another scene, or nothing), and the pull is trained to `tau` of the way. First the encoder
    learns to be pulled; then, more and more, to leave clean and noisy pictures where they were.
    """
    if (args.work / "vae-tuned.pt").exists():
        return
    sources = load_data(args)[0] if sources is None else sources
    plain, tuned = (new_vae(args, "vae-plain.pt", config) for _ in range(2))
    parts = nn.ModuleList([tuned.encoder, *([tuned.quant_conv] if tuned.config.use_quant_conv else [])]).requires_grad_(True)
    run = Run(args.work / "tune.pt", parts, lr=3e-3, steps=args.tune_steps, decay=0.8, ema=0.98, warmup=5)
    rng, generator = np.random.default_rng(1000 + run.step), torch.Generator().manual_seed(1000 + run.step)
    seen = []
    while not run.done:
        x = to_pixels(sources[np.sort(rng.integers(len(sources), size=8))])
        with torch.no_grad():
            clean = mean_latent(plain, x)
        kind = rng.random()
        towards = (torch.randn(clean.shape, generator=generator) if kind < 0.6 else clean.roll(1, 0) - clean
                   if kind < 0.8 else -clean)
        start = (BUDGET * (2 * torch.rand(x.shape,
                                          generator=generator) - 1) * (rng.random() < 0.3)).requires_grad_(True)
        (gradient,) = torch.autograd.grad((mean_latent(tuned, x + start) * towards).sum(), start)
        attacked = (x + BUDGET * gradient.sign()).clamp(0, 1)
        noise = 0.04 * torch.randn(x.shape,
                                   generator=generator) if rng.random() < 0.5 else BUDGET * torch.randn(x.shape,
                                                                                                        generator=generator).sign()
        pulled, still, noisy = mean_latent(tuned, torch.cat([attacked, x, (x + noise).clamp(0, 1)])).chunk(3)
        pull = ((pulled - still) * towards).sum((1, 2, 3)) / towards.square().sum((1, 2, 3))
        drift, swing = (still - clean).square().mean(), (noisy - clean).square().mean()
        patience = min(1.0, run.step / (0.6 * run.steps))
        dial = F.relu(args.tau - pull).mean() + F.relu(pull - 1.3 * args.tau).mean()
        loss = dial + (0.3 + 5 * patience) * drift + 3 * patience * swing
        run.update(loss)
        seen.append((pull.mean().item(), drift.item() ** 0.5, swing.item() ** 0.5))
        if run.step % 20 == 0:
            run.log("pull {:.3f} drift {:.3f} noise {:.3f}".format(*np.mean(seen, 0)))
            seen = []
    run.finished()
    say(f"tune: reconstruction {vae_psnr(tuned, tuned):.2f} dB on held-out scenes")
    save(tuned.state_dict(), args.work / "vae-tuned.pt")


def shift(args):
    """Print the shipped editors' latent shift under attack, as the model card states it."""
    for name in ("miniature-plain", "miniature"):
        say_shift(name, load_editor(name, device="cpu").vae)


def say_shift(name, network):
    """RMS latent shift over the latent's standard deviation, by the protocol that measured the real latent space, on 24
    held-out pictures."""
    pixels = to_pixels(held_out_pictures(24, seed=1))
    with torch.no_grad():
        clean = mean_latent(network, pixels)

    def attacked(loss):
        delta = BUDGET * (2 * torch.rand(pixels.shape, generator=torch.Generator().manual_seed(0)) - 1)
        for _ in range(ATTACK_STEPS):
            delta.requires_grad_(True)
            (gradient,) = torch.autograd.grad(loss(mean_latent(network, pixels + delta)), delta)
            delta = (delta.detach() - ATTACK_STEP_SIZE * gradient.sign()).clamp(-BUDGET, BUDGET)
            delta = (pixels + delta).clamp(0, 1) - pixels
        return delta

    sign = BUDGET * torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0)).sign()
    deltas = {"random sign noise": (pixels + sign).clamp(0, 1) - pixels,
              "encoder-max": attacked(lambda z: -(z - clean).square().mean()),
              "to the zero latent": attacked(lambda z: z.square().mean())}
    with torch.no_grad():
        shifts = {what: mean_latent(network, pixels + delta) - clean for what, delta in deltas.items()}
    say(f"{name}: " + ", ".join(f"{what} {(found.square().mean((1, 2, 3)).sqrt().mean() / clean.std()).item():.3f}"
                                for what, found in shifts.items()))


def new_text(vocabulary):
    ends = {"vocab_size": vocabulary, "bos_token_id": vocabulary - 2, "eos_token_id": vocabulary - 1,
            "pad_token_id": vocabulary - 1}
    config = {**TEXT, **ends}
    return CLIPText(CLIPTextConfig.from_json(json.dumps(config))), config


def tokenizer(args):
    from train_bpe import train_bpe, write

    from sifm_min.models.clip_tokenizer import CLIPTokenizer
    folder = args.work / "tokenizer"
    if not (folder / "vocab.json").exists():
        folder.mkdir(exist_ok=True)
        write(folder, *train_bpe(list(wording.corpus()), 2000), TOKENS)
    return CLIPTokenizer.from_folder(folder)


def text(args):
    """Teach the text transformer the kind and colour of instructions, so that the U-Net gets meaning instead of letters."""
    if (args.work / "text.pt").exists() and torch.load(args.work / "text.pt",
                                                       weights_only=True)["step"] >= args.text_steps:
        return
    tokens = tokenizer(args)
    vocabulary = len(json.loads((args.work / "tokenizer" / "vocab.json").read_text()))
    network, _ = new_text(vocabulary)
    kinds, colours = [kind.name for kind in wording.INSTRUCTION_KINDS], [None, *world.COLOURS]
    same = {"canvas": "background"}                          # the same words, said of another category
    labels = {}
    for kind in wording.INSTRUCTION_KINDS:
        for phrase in kind.phrases:
            for colour in world.COLOURS if "{c}" in phrase else (None,):
                for him, he in (("him", "he"), ("her", "she")):
                    labels[phrase.format(c=colour, p=him, o=he, s="her")] = (kinds.index(same.get(kind.name, kind.name)),
                                                                    colours.index(colour))
    ids = torch.tensor(tokens(list(labels)))
    truth = torch.tensor(list(labels.values()))
    heads = nn.ModuleList([network, nn.Linear(96, len(kinds)), nn.Linear(96, len(colours))])
    run = Run(args.work / "text.pt", heads, lr=2e-3, steps=args.text_steps)
    rng = np.random.default_rng(run.step)
    end = vocabulary - 1
    while not run.done:
        picked = torch.from_numpy(rng.integers(len(ids), size=64))
        batch = ids[picked]
        for row in range(len(batch)):                        # now and then a word is lost: no single word carries the meaning
            words = [t for t in batch[row, 1:].tolist() if t != end]
            if len(words) > 3 and rng.random() < 0.3:
                words.pop(int(rng.integers(len(words))))
                batch[row] = torch.tensor(([vocabulary - 2, *words] + [end] * TOKENS)[:TOKENS])
        states = network(batch).last                         # (B, tokens, 96)
        after = (batch == end)                               # every position from the end token on has read the whole sentence
        loss = sum(F.cross_entropy(head(states)[after], truth[picked, i][:, None].expand(-1, TOKENS)[after]) for i,
                   head in enumerate(heads[1:]))
        value = run.update(loss)
        if run.step % 200 == 0:
            run.log(f"loss {value:.4f}")


def latents(args):
    """Latents of the first --cached pairs by the plain encoder.

    The tuned encoder is distilled to give these same latents, so one denoiser serves both shipped editors.
    """
    path = args.work / "latents.pt"
    if path.exists():
        return torch.load(path, weights_only=True)
    network, (sources, targets, _) = new_vae(args, "vae-plain.pt"), load_data(args)
    state = {name: in_batches(lambda x: mean_latent(network, x), pictures[:args.cached]) for name,
             pictures in (("sources", sources), ("targets", targets))}
    save(state, path)
    say("latents cached")
    return state


def alphas_cumprod():
    betas = torch.linspace(SCHEDULER["beta_start"] ** 0.5, SCHEDULER["beta_end"] ** 0.5, 1000) ** 2
    return (1 - betas).cumprod(0)


class Editor(nn.Module):
    """The two networks trained together."""

    def __init__(self, vocabulary):
        super().__init__()
        self.unet = UNet(UNetConfig.from_json(json.dumps(UNET))).to(memory_format=torch.channels_last)
        self.text, _ = new_text(vocabulary)


def unet(args):
    """The editor: predict v of the target's latent, given the source's latent and the instruction."""
    tokens, (_, _, prompts) = tokenizer(args), load_data(args)
    vocabulary = len(json.loads((args.work / "tokenizer" / "vocab.json").read_text()))
    cached = latents(args)
    distinct = {p: i for i, p in enumerate(dict.fromkeys(p for _, p in prompts))}
    ids = torch.tensor(tokens([*distinct, ""])).to(args.device)
    which = torch.tensor([distinct[p] for _, p in prompts])[:args.cached]
    editor = Editor(vocabulary).to(args.device)
    if not (args.work / "unet.pt").exists():
        pretrained = torch.load(args.work / "text.pt", weights_only=True)["average"]
        editor.text.load_state_dict({name[2:]: value for name, value in pretrained.items() if name.startswith("0.")})
    groups = [{"params": list(editor.unet.parameters())}, {"params": list(editor.text.parameters()), "scale": 0.2}]
    run = Run(args.work / "unet.pt", editor, lr=args.lr, steps=args.unet_steps, decay=args.decay, groups=groups)
    rng, generator = np.random.default_rng(run.step), torch.Generator().manual_seed(run.step)
    abar, total = alphas_cumprod(), 0.0
    while not run.done:
        picked = torch.from_numpy(rng.integers(len(which), size=args.batch))
        source = cached["sources"][picked]                   # and about as far off as the tuned encoder is
        source = source + 0.2 * torch.rand(args.batch, 1, 1, 1, generator=generator) * torch.randn(source.shape,
                                                                                                   generator=generator)
        target, words = cached["targets"][picked], which[picked].clone()
        drop = torch.rand(args.batch, generator=generator)   # 5 % each: no text, no text and no image, no image
        words[drop < 0.10] = len(distinct)
        source[(drop >= 0.05) & (drop < 0.15)] = 0
        low = torch.rand(args.batch, generator=generator) < 0.5
        t = torch.where(low, torch.rand(args.batch, generator=generator) * 1000,
                        400 + 600 * torch.rand(args.batch, generator=generator)).long().clamp(0, 999)
        a = abar[t][:, None, None, None]
        noise = torch.randn(target.shape, generator=generator)
        noisy, velocity = a.sqrt() * target + (1 - a).sqrt() * noise, a.sqrt() * noise - (1 - a).sqrt() * target
        context = editor.text(ids[words]).last
        prediction = editor.unet(torch.cat([noisy, source], 1).to(args.device, memory_format=torch.channels_last),
                                 t.to(args.device), context)
        total += run.update(F.mse_loss(prediction, velocity.to(args.device)))
        if run.step % 200 == 0:
            run.log(f"loss {total / 200:.4f}")
            total = 0.0


def judge(args):
    """The attribute classifier of the second judge: renderings, mildly disturbed or damaged on purpose; never an edit."""
    if (args.work / "judge-final.pt").exists():
        return
    rng = world.generator(1, "train")
    pictures, scenes = [], []
    while len(scenes) < args.renderings:
        scene = world.draw_scene(rng, held_out=False)
        scenes += [scene, rng.choice(list(wording.instructions(scene, rng, held_out=False))).target]
    pictures = np.stack([np.asarray(drawing.render(scene)) for scene in scenes])
    names = [(category, name) for category, attributes in world.ATTRIBUTES.items() for name in attributes]
    labels = torch.full((len(scenes), len(names)), -100)     # -100: not of this category, or not to be seen
    for row, scene in enumerate(scenes):
        for name in world.visible_attributes(scene):
            labels[row, names.index((scene.category,
                                     name))] = world.ATTRIBUTES[scene.category][name].index(scene.values[name])
    run = Run(args.work / "judge.pt", miniature.Classifier().to(args.device), lr=2e-3, steps=args.judge_steps)
    picker, generator = np.random.default_rng(run.step), torch.Generator().manual_seed(run.step)
    while not run.done:
        rows = picker.integers(len(scenes), size=64)
        clean, truth = to_pixels(pictures[rows]), labels[torch.from_numpy(rows)]
        damaged = torch.rand(64, generator=generator) < 0.4
        pixels = torch.stack([damage(x, clean[i - 1], picker, generator) if bad else disturb(x, picker, generator)
                              for i, (x, bad) in enumerate(zip(clean, damaged.tolist(), strict=True))])
        truth = truth.masked_fill(damaged[:, None], -100)
        scores, suspicion = run.network(pixels.to(args.device))
        loss = F.binary_cross_entropy_with_logits(suspicion, damaged.float().to(args.device))
        for column, (category, name) in enumerate(names):
            if (truth[:, column] >= 0).any():
                loss = loss + F.cross_entropy(scores[f"{category}.{name}"], truth[:, column].to(args.device)) / 4
        value = run.update(loss)
        if run.step % 200 == 0:
            right = ((suspicion > 0).cpu() == damaged).float().mean()
            run.log(f"loss {value:.4f} damage accuracy {right:.3f}")
    save(run.finished().state_dict(), args.work / "judge-final.pt")


def disturb(x, picker, generator):
    """The mild disturbances of a good edit: some noise, blur, and change of brightness, contrast and tint."""
    side = int(picker.integers(30, 65))
    x = F.interpolate(F.interpolate(x[None], size=(side, side), mode="area"), size=(64, 64), mode="bicubic")[0]
    x = x * (1 + 0.08 * float(picker.normal())) + 0.03 * float(picker.normal()) + 0.02 * torch.randn(3, 1, 1,
                                                                                                     generator=generator)
    x = x + 0.04 * picker.random() * clouds(generator)
    return (x + 0.03 * picker.random() * torch.randn(x.shape, generator=generator)).clamp(0, 1)


def clouds(generator):
    """Smooth random colour, about unit size."""
    coarse = torch.randn(1, 3, 5, 5, generator=generator)
    return F.interpolate(coarse, size=(64, 64), mode="bicubic")[0]


def damage(x, other, picker, generator):
    """One or two kinds of damage that makes a picture unacceptable."""
    for kind in picker.permutation(7)[:1 + int(picker.integers(2))]:
        size = float(picker.uniform(0.5, 1))
        if kind == 0:
            x = x + 0.4 * size * clouds(generator)
        elif kind == 1:
            x = x + 0.35 * size * torch.randn(x.shape, generator=generator)
        elif kind == 2:
            x = (1 - 0.6 * size) * x + 0.6 * size * other
        elif kind == 3:
            flow = F.interpolate(torch.randn(1, 2, 6, 6, generator=generator), size=(64, 64),
                                 mode="bicubic") * 0.25 * size
            base = F.affine_grid(torch.eye(2, 3)[None], (1, 3, 64, 64), align_corners=False)
            x = F.grid_sample(x[None], base + flow.permute(0, 2, 3, 1), padding_mode="border", align_corners=False)[0]
        elif kind == 4:
            order = torch.randperm(16, generator=generator)
            tiles = x.unfold(1, 16, 16).unfold(2, 16, 16).reshape(3, 16, 16, 16)
            keep = torch.rand(16, generator=generator) > size
            tiles = torch.where(keep[None, :, None, None], tiles, tiles[:, order])
            x = tiles.reshape(3, 4, 4, 16, 16).permute(0, 1, 3, 2, 4).reshape(3, 64, 64)
        elif kind == 5:
            side = int(picker.integers(4, 11))
            x = F.interpolate(F.interpolate(x[None], size=(side, side), mode="area"), size=(64, 64), mode="bicubic")[0]
        else:
            x = x + 0.6 * size * F.interpolate(torch.randn(1, 3, 16, 16, generator=generator), size=(64, 64),
                                               mode="bicubic")[0]
    return x.clamp(0, 1)


def export(args):
    """The shipped folders, in fp16 and in the published layout, each with its model card and hashes."""
    vocabulary = len(json.loads((args.work / "tokenizer" / "vocab.json").read_text()))
    editor = Editor(vocabulary)
    editor.load_state_dict(torch.load(args.work / "unet.pt", weights_only=True)["average"])
    _, text_config = new_text(vocabulary)
    for name, encoder in (("miniature", "vae-tuned.pt"), ("miniature-plain", "vae-plain.pt")):
        folder = MODELS / name
        if folder.exists():
            for old in folder.rglob("*"):
                if old.is_file() and old.name != "README.md" and "examples" not in old.parts:
                    old.unlink()
        defaults = {"steps": 10, "guidance": args.guidance, "image_guidance": args.image_guidance, "size": 64}
        write_json(folder / "model_index.json", {
            "_class_name": "StableDiffusionInstructPix2PixPipeline",
            "_sifm_min": {"defaults": defaults, "notice": miniature.NOTICE},
            "feature_extractor": [None, None], "image_encoder": [None, None], "requires_safety_checker": False,
            "safety_checker": [None, None],
            "scheduler": ["diffusers", "DDIMScheduler"], "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"]})
        write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER)
        write_json(folder / "unet" / "config.json", UNET)
        write_json(folder / "vae" / "config.json", VAE)
        write_json(folder / "text_encoder" / "config.json", text_config)
        write_weights(folder / "unet" / "diffusion_pytorch_model.safetensors", editor.unet.state_dict())
        write_weights(folder / "vae" / "diffusion_pytorch_model.safetensors",
                      torch.load(args.work / encoder, weights_only=True))
        write_weights(folder / "text_encoder" / "model.safetensors", editor.text.state_dict())
        (folder / "tokenizer").mkdir(exist_ok=True)
        for file in (args.work / "tokenizer").iterdir():
            (folder / "tokenizer" / file.name).write_bytes(file.read_bytes())
    if (args.work / "judge-final.pt").exists():
        write_weights(MODELS / "miniature" / "judge" / "model.safetensors",
                      torch.load(args.work / "judge-final.pt", weights_only=True))
    for name in ("miniature", "miniature-plain"):
        write_hashes(MODELS / name)


def write_hashes(folder):
    files = sorted(folder.rglob("*.safetensors"))
    lines = [f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.relative_to(folder).as_posix()}" for file in files]
    (folder / "SHA256SUMS").write_text("\n".join(lines) + "\n")
    say(f"{folder.name}: {sum(file.stat().st_size for file in files) / 1e6:.1f} MB")


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n")


def write_weights(path, tensors):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.detach().cpu().half().contiguous() for name, tensor in tensors.items()}, path,
              metadata={"format": "pt"})


STAGES = {stage.__name__: stage for stage in (data, vae, tune, text, unet, judge, export, shift)}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="+", choices=[*STAGES, "all"])
    parser.add_argument("--work", type=Path, default=Path("build/miniature"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=PAIRS)
    parser.add_argument("--vae-steps", type=int, default=3000)
    parser.add_argument("--crop-share", type=float, default=0.75)
    parser.add_argument("--tune-steps", type=int, default=450)
    parser.add_argument("--tau", type=float, default=0.34,
                        help="how far an attack of the budget pulls the latent to its target")
    parser.add_argument("--text-steps", type=int, default=1200)
    parser.add_argument("--unet-steps", type=int, default=6600)
    parser.add_argument("--judge-steps", type=int, default=2500)
    parser.add_argument("--renderings", type=int, default=16_000)
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--image-guidance", type=float, default=1.5)
    parser.add_argument("--cached", type=int, default=20_000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--decay", type=float, default=0.3,
                        help="the last share of the steps, over which the rate falls to zero")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    random.seed(0)
    args.work.mkdir(parents=True, exist_ok=True)
    for stage in STAGES if "all" in args.stages else args.stages:
        STAGES[stage](args)


if __name__ == "__main__":
    main()
