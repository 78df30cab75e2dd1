"""Distil a small autoencoder of our own from a published one, so that a real latent space ships with the project.

    python tools/distill_latents.py train sd1 --photos PHOTOS --weights WEIGHTS --work runs     both halves; resumes by itself
    python tools/distill_latents.py export sd1 --photos PHOTOS --work runs                      writes models/latents/sd1
    python tools/distill_latents.py measure sd1 --photos PHOTOS --weights WEIGHTS --work runs   beside its teacher; resumes
    python tools/distill_latents.py card --work runs                                            writes models/latents/README.md

The teacher is the tiny autoencoder of a latent space (`sifm_min.weights list` names them); WEIGHTS is a folder with its files.
PHOTOS is a folder with LICENSES.jsonl, one photograph a line: file, use ("train" or "evaluate"), source, author, licence.

The encoder learns, from random weights, the teacher's latents and the teacher's response to perturbations:

    L = |S(x) - T(x)|^2 / var  +  |S(y) - T(y)|^2 / var  +  w |(S(y) - S(x)) - (T(y) - T(x))|^2 / var,      y = x + d

with x a crop of a photograph, S the pupil, T the teacher, var the variance of the teacher's latents, and d within 7/255:
uniform noise, or an attack that maximises the latent's change, found on the teacher (half of the pairs) or on the pupil (a
quarter). In the first quarter of the steps w is 0 and all d are noise. The decoder then learns the photographs from the
pupil's latents.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save as packed
from torch import nn

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]
from photosets import in_turn, interval, marked, middle_square  # noqa: E402
from training_run import save, say  # noqa: E402

from sifm_min import images, metrics  # noqa: E402
from sifm_min.baselines import photoguard_encoder  # noqa: E402
from sifm_min.editors.latents import Latents, LatentSpace, latent  # noqa: E402
from sifm_min.editors.shifts import shift  # noqa: E402
from sifm_min.files import writing  # noqa: E402
from sifm_min.files.ledger import Ledger, read_rows  # noqa: E402
from sifm_min.models import latent_spaces  # noqa: E402
from sifm_min.models.checkpoints import sha256  # noqa: E402
from sifm_min.models.latent_spaces import SPACES  # noqa: E402
from sifm_min.models.tiny_vae import AutoencoderTiny, TinyVAEConfig  # noqa: E402
from sifm_min.pgd import pgd  # noqa: E402
from sifm_min.purifiers.attacks import ATTACKS  # noqa: E402

COPIED = ("sd1", "sd3")                                      # the latent spaces that ship as copies
EPS = 7 / 255                                                # the budget of 0.03 on a picture of 8 bits
# No block at full resolution, where half of the published encoder's work lies; 2.2 MB a half in bfloat16.
BLOCKS = {"num_encoder_blocks": (0, 2, 3, 4), "num_decoder_blocks": (4, 3, 2, 0)}
CROP, REGIONS = 96, (96, 320)                                # pixels of a crop; of the square that it is shrunk from
BATCH, FRESH, KEPT = 8, 2, 3000                              # pairs a step; new ones among them; pairs kept for later steps
KINDS = ("teacher", "noise", "teacher", "pupil")             # where the perturbations of new pairs come from, in turn
RATE, WARM_UP, PLAIN, WEIGHT = 2e-3, 100, 0.25, 2.0          # learning rate; its first steps; the share of steps with w = 0; w
TRAINING = "training.json"                                   # in a copy's folder: the steps of its halves, for the card
SAVE_EVERY = 300                                             # seconds between two checkpoints


def licences(folder, use):
    """The lines of LICENSES.jsonl whose photographs are for this use."""
    rows = marked(folder, use)
    if rows is None:
        raise SystemExit(f"{folder} has no LICENSES.jsonl, which says what each photograph is for")
    return rows


def photographs(folder, use):
    """The photographs for a use, as PIL pictures."""
    return [Image.open(folder / row["file"]).convert("RGB") for row in licences(folder, use)]


def crop(pictures, rng):
    """(3, CROP, CROP) in [0,1]: a random square of a random photograph, shrunk, and mirrored half the time."""
    picture = pictures[rng.integers(len(pictures))]
    side = min(int(rng.integers(REGIONS[0], REGIONS[1] + 1)), *picture.size)
    left, top = (int(rng.integers(length - side + 1)) for length in picture.size)
    square = picture.resize((CROP, CROP), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side))
    pixels = torch.from_numpy(np.array(square)).permute(2, 0, 1).float() / 255
    return pixels.flip(2) if rng.integers(2) else pixels


def attack(encode, x, generator, steps=3):
    """x + d within EPS, on 8 bits, with the latent moved far: sign steps that shrink, from a uniform start. x: (B,3,H,W)."""
    with torch.no_grad():
        target = encode(x)
    d = torch.empty_like(x).uniform_(-EPS, EPS, generator=generator)
    for step in range(steps):
        y = (x + d).clamp(0, 1).requires_grad_(True)
        (gradient,) = torch.autograd.grad((encode(y) - target).square().sum(), y)
        d = (d + EPS * (1 - step / steps) * gradient.sign()).clamp(-EPS, EPS)
    return on_8_bits(x, d)


def on_8_bits(x, d):
    """x + d as a picture of 8 bits has it."""
    return ((x + d).clamp(0, 1) * 255).round() / 255


class Pairs:
    """Pictures with and without a perturbation, and the teacher's latents of both; the last KEPT are kept and drawn again."""

    def __init__(self, pictures, teacher):
        self.pictures, self.teacher, self.kept, self.count = pictures, teacher, [], 0

    @torch.no_grad()
    def new(self, kind, pupil, rng, generator):
        """One pair as (x, y, T(x), T(y)), each without a batch dimension; pictures as uint8."""
        x = crop(self.pictures, rng)[None]
        if kind == "noise":
            y = on_8_bits(x, torch.empty_like(x).uniform_(-EPS, EPS, generator=generator))
        else:
            with torch.enable_grad():
                y = attack(self.teacher if kind == "teacher" else pupil, x, generator)
        latents = self.teacher(torch.cat([x, y]))
        return (*((255 * p[0]).round().to(torch.uint8) for p in (x, y)), *latents)

    def batch(self, kinds, pupil, rng, generator):
        """BATCH pairs as four tensors; FRESH of them new, the others drawn from those kept."""
        for _ in range(FRESH if len(self.kept) >= BATCH else BATCH):
            pair = self.new(kinds[self.count % len(kinds)], pupil, rng, generator)
            self.kept[self.count % KEPT:self.count % KEPT + 1] = [pair]
            self.count += 1
        newest = [(self.count - 1 - i) % KEPT for i in range(FRESH)]
        drawn = [int(i) for i in rng.integers(len(self.kept), size=BATCH - FRESH)]
        x, y, of_x, of_y = (torch.stack(column) for column in zip(*(self.kept[i] for i in [*newest, *drawn]), strict=True))
        return x.float() / 255, y.float() / 255, of_x, of_y


class Run:
    """A network in training, with its optimiser; the learning rate warms up and falls to zero along a cosine."""

    def __init__(self, path, network, steps, extra=None, start=None):
        self.path, self.network, self.steps, self.extra, self.step = path, network, steps, extra, 0
        self.start = None if start is None else str(start)
        self.optimiser = torch.optim.AdamW(network.parameters(), lr=RATE, weight_decay=0.0)
        self.saved, self.errors = time.monotonic(), {}
        if path.exists():
            state = torch.load(path, weights_only=True)
            if state.get("start") != self.start:
                raise SystemExit(f"{path} is of a run with --start {state.get('start')}: remove it, or choose another --work")
            network.load_state_dict(state["network"])
            self.optimiser.load_state_dict(state["optimiser"])
            self.step = state["step"]
            if extra is not None:
                extra.kept, extra.count = state["kept"], state["count"]
            say(f"{path.name}: goes on at step {self.step} of {steps}")

    def descend(self, loss, **errors):
        rate = RATE * min(1, (self.step + 1) / WARM_UP, 0.5 + 0.5 * math.cos(math.pi * self.step / self.steps))
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimiser.step()
        self.step += 1
        for name, value in errors.items():
            self.errors[name] = 0.98 * self.errors.get(name, value.item()) + 0.02 * value.item()
        if self.step % 25 == 0 or self.step == self.steps:
            say(f"{self.path.name} {self.step}/{self.steps}  " + "  ".join(f"{k} {v:.4f}" for k, v in self.errors.items()))
        if self.step >= self.steps or time.monotonic() > self.saved + SAVE_EVERY:
            self.save()

    def save(self):
        kept = {"kept": self.extra.kept, "count": self.extra.count} if self.extra is not None else {}
        state = {"network": self.network.state_dict(), "optimiser": self.optimiser.state_dict(), "step": self.step,
                 "start": self.start, **kept}
        save(state, self.path)
        self.saved = time.monotonic()


def pupil_config(space):
    return TinyVAEConfig(latent_channels=SPACES[space].channels, **BLOCKS)


def teacher_of(args):
    return latent_spaces.open_folder(args.weights, SPACES[args.space]).network(dtype=torch.float32)


def train(args):
    """Train the encoder, then the decoder."""
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    writing.make_folder(args.work)
    teacher, pictures = teacher_of(args), photographs(args.photos, "train")
    network = AutoencoderTiny(pupil_config(args.space))
    if args.start:
        network.load_state_dict(latent_spaces.open_copy(args.start, SPACES[args.space]).network().state_dict())
    say(f"{args.space}: {len(pictures)} photographs, {sum(p.numel() for p in network.parameters())} parameters")
    train_encoder(args, network.encoder, teacher.encoder, pictures)
    train_decoder(args, network, pictures)


def train_encoder(args, pupil, teacher, pictures):
    pairs = Pairs(pictures, teacher)
    run = Run(args.work / f"{args.space}-encoder.pt", pupil, args.encoder_steps, pairs, args.start)
    rng = np.random.default_rng((args.seed, run.step))
    generator = torch.Generator().manual_seed(args.seed + run.step)
    with torch.no_grad():
        examples = torch.stack([crop(pictures, np.random.default_rng(i)) for i in range(64)])
        variance = torch.cat([teacher(part) for part in examples.split(8)]).var()
    while run.step < run.steps:
        plain = not args.start and run.step < PLAIN * run.steps
        x, y, of_x, of_y = pairs.batch(("noise",) if plain else KINDS, pupil, rng, generator)
        s_x, s_y = pupil(torch.cat([x, y])).chunk(2)
        latent = ((s_x - of_x).square().mean() + (s_y - of_y).square().mean()) / variance
        response = ((s_y - s_x) - (of_y - of_x)).square().mean() / variance
        run.descend(latent + (0 if plain else WEIGHT) * response, latent=latent / 2, response=response)


def train_decoder(args, network, pictures):
    network.encoder.requires_grad_(False)
    run = Run(args.work / f"{args.space}-decoder.pt", network.decoder, args.decoder_steps, start=args.start)
    rng = np.random.default_rng((args.seed, 1, run.step))
    while run.step < run.steps:
        x = torch.stack([crop(pictures, rng) for _ in range(BATCH)])
        with torch.no_grad():
            latent = network.encoder(x)
        decoded = network.decoder(latent)
        squared = F.mse_loss(decoded, x)
        run.descend(F.l1_loss(decoded, x) + 4 * squared, squared=squared)


# ---------------------------------------------------------------------------------------------------- shipping, measuring

def export(args):
    """Write the trained copy to models/latents, in diffusers' layout, and the attributions of the photographs."""
    network, steps = AutoencoderTiny(pupil_config(args.space)), {}
    for half in latent_spaces.HALVES:
        state = torch.load(args.work / f"{args.space}-{half}.pt", weights_only=True)
        getattr(network, half).load_state_dict(state["network"])
        steps[half] = state["step"]
        say(f"{args.space}: {half} of {state['step']} steps")
    folder = latent_spaces.COPIES / args.space
    writing.make_folder(folder)
    tensors = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in network.state_dict().items()}
    writing.write(folder / latent_spaces.WEIGHTS, packed(tensors), overwrite=True)
    config = {"_class_name": "AutoencoderTiny", "act_fn": "relu", "in_channels": 3, "out_channels": 3, "scaling_factor": 1.0,
              "shift_factor": 0.0, "latent_channels": SPACES[args.space].channels, "upsampling_scaling_factor": 2,
              "upsample_fn": "nearest", "encoder_block_out_channels": [64] * 4, "decoder_block_out_channels": [64] * 4,
              **{name: list(counts) for name, counts in BLOCKS.items()}}
    writing.write(folder / latent_spaces.CONFIG, json.dumps(config, indent=2) + "\n", overwrite=True)
    writing.write(folder / TRAINING, json.dumps(steps) + "\n", overwrite=True)
    kept = ("source", "path", "title", "author", "licence")
    rows = [{key: row[key] for key in kept} for row in licences(args.photos, "train")]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    writing.write(latent_spaces.COPIES / "ATTRIBUTIONS.jsonl", lines, overwrite=True)


def hashes(checkpoint):
    return {file: sha256(checkpoint.folder / file) for file in checkpoint.files}


def measure(args):
    """Measure a copy beside its teacher on evaluation photographs; one line a photograph in the working folder."""
    torch.set_num_threads(args.threads)
    given = latent_spaces.open_folder(args.weights, SPACES[args.space])
    teacher = LatentSpace("teacher", teacher_of(args), given, True)
    copy = latent_spaces.open_copy(latent_spaces.COPIES / args.space, SPACES[args.space])
    pupil = LatentSpace("pupil", copy.network(dtype=torch.float32), copy, True)
    of = {"copy": hashes(copy), "teacher": hashes(given), "size": args.size, "steps": args.steps}
    writing.make_folder(args.work)
    with Ledger(args.work / f"{args.space}-measured.jsonl") as journal:
        done = {row["photograph"] for row in journal.rows if row["of"] == of}
        for row in in_turn(licences(args.photos, "evaluate"))[:args.images]:
            if row["id"] not in done:
                found = measured(args, teacher, pupil, Image.open(args.photos / row["file"]).convert("RGB"))
                journal.append({"photograph": row["id"], "of": of, **found})
                say(f"{args.space} {row['id']}: {found}")


def measured(args, teacher, pupil, picture):
    """The figures of one photograph, its middle square at `args.size` pixels."""
    picture = middle_square(picture, args.size)
    pixels = images.to_pixels(picture)
    spaces, figures = {"teacher": teacher, "pupil": pupil}, {}

    def of(space, pixels):
        with torch.no_grad():
            return spaces[space].encode(pixels)

    t, s = of("teacher", pixels), of("pupil", pixels)
    figures["latent error"] = shift(s, t).item()
    figures["correlation"] = torch.corrcoef(torch.stack([t.flatten(), s.flatten()]))[0, 1].item()
    with torch.no_grad():
        decoded = {"teacher": teacher.decode(t), "teacher's decoder": teacher.decode(s), "pupil": pupil.decode(s)}
        for name, picture_of in decoded.items():
            figures[f"PSNR {name}"] = metrics.psnr(picture_of.clamp(0, 1), pixels).item()
    jpeg = ATTACKS["jpeg-75"]
    for made in MADE:
        changed = protected(args, spaces, picture, made)
        for purifier, clean, noisy in (("none", picture, changed), ("JPEG 75", jpeg(picture), jpeg(changed))):
            for space in spaces:
                figures[f"{made}, {space}, {purifier}"] = shift(of(space, images.to_pixels(noisy)),
                                                                of(space, images.to_pixels(clean))).item()
    return figures


def protected(args, spaces, picture, made):
    """The picture with one of the perturbations of `MADE`, on 8 bits. spaces: {"teacher", "pupil"}."""
    (_, home, attack), pixels, generator = MADE[made], images.to_pixels(picture), torch.Generator().manual_seed(0)
    options = {"sizes": args.size} if attack is latent else {}
    objective = attack and attack(Latents([spaces[home]]), pixels, [None], generator=generator, **options)
    delta = pgd(pixels, objective, EPS, steps=args.steps if attack else 0, step_size=2 / 255, schedule="linear",
                generator=generator)
    return images.to_image(on_8_bits(pixels, delta))


# The perturbations: name in the journal -> (row of the card, the autoencoder that it is made on, the method).
MADE = {"noise": ("uniform noise", None, None),
        "teacher": ("encoder-max on the teacher", "teacher", latent), "pupil": ("encoder-max on ours", "pupil", latent),
        "teacher to zero": ("to zero on the teacher", "teacher", photoguard_encoder),
        "pupil to zero": ("to zero on ours", "pupil", photoguard_encoder)}
AIMS = [                                                     # (what, aim, a function of a photograph's figures)
    ("latent error / standard deviation", "at most .25", lambda f: f["latent error"]),
    ("correlation of the latents", "at least .97", lambda f: f["correlation"]),
    ("dB lost: the teacher's decoder on our latents", "at most .4", lambda f: f["PSNR teacher"] - f["PSNR teacher's decoder"]),
    ("dB lost: our decoder on our latents", "at most 1", lambda f: f["PSNR teacher"] - f["PSNR pupil"]),
    ("shift under noise, over the teacher's", ".9 to 1.1", lambda f: f["noise, pupil, none"] / f["noise, teacher, none"]),
    ("made on the teacher: our shift over the teacher's own", "at least .65",
     lambda f: f["teacher, pupil, none"] / f["teacher, teacher, none"]),
    ("made on ours: the teacher's shift over its white box", "at least .70",
     lambda f: f["pupil, teacher, none"] / f["teacher, teacher, none"]),
    ("the same after JPEG 75", "at least .85", lambda f: f["pupil, teacher, JPEG 75"] / f["teacher, teacher, JPEG 75"]),
    ("noise in its place: the teacher's shift over its white box", "",
     lambda f: f["noise, teacher, none"] / f["teacher, teacher, none"]),
    ("noise in its place, after JPEG 75", "", lambda f: f["noise, teacher, JPEG 75"] / f["teacher, teacher, JPEG 75"]),
]


CARD = """# Copies of two latent spaces

`sd1/` and `sd3/` are small autoencoders in the latent spaces of Stable Diffusion 1.x and 3, in diffusers' layout
(`AutoencoderTiny`), trained by this project from random weights. The teachers are the published tiny autoencoders by
Ollin Boer Bohan (MIT), which are distilled copies themselves; none of their weights is here. `load_editor("latents")`
uses a copy where its teacher is not on the machine (`python -m sifm_min.weights download latents` fetches all five).

- **For** protection without a download, and for tests. A perturbation made on a copy moves the teacher less than one made
  on the teacher: the tables below say by how much. What either does to the full autoencoder is not measured here.
- **Licence**: Apache-2.0. Trained on 419 photographs and artworks; `ATTRIBUTIONS.jsonl` names the source, author and
  licence of each.
- **Size**: 1.1 million parameters a half, 2.2 MB in bfloat16. No block at full resolution, where half of the teacher's
  work lies.
- **A beginning**: most aims below are missed, because the training was short. `tools/distill_latents.py train --start`
  goes on from these files.
- **Training and figures**: `tools/distill_latents.py`, whose header has the loss and the commands.

Below: evaluation photographs that were not trained on, their middle squares at 256 pixels, a budget of 7/255, attacks of
60 steps: `encoder-max`, the method `latent`, and `to zero`, the method `photoguard-encoder`. A shift is the RMS of a latent's
change over the standard deviation of the latent. Means over photographs; brackets: their 95 % intervals by a bootstrap
over photographs.

"""


def card(args):
    """Write models/latents/README.md from what was measured."""
    tables = []
    for space in COPIED:
        journal = args.work / f"{space}-measured.jsonl"
        if not journal.exists():
            continue
        rows = list(read_rows(journal))
        of = rows[-1]["of"]
        if of["copy"] != hashes(latent_spaces.open_copy(latent_spaces.COPIES / space, SPACES[space])):
            raise SystemExit(f"{journal} is of an earlier copy of {space}: measure this one first")
        rows = [row for row in rows if row["of"] == of]
        lines = [f"| {what} | {aim} | {interval([of(row) for row in rows])} |" for what, aim, of in AIMS]
        shifts = [f"| {made} | " + " | ".join(interval([row[f"{source}, {space_}, {purifier}"] for row in rows])
                                             for space_ in ("teacher", "pupil") for purifier in ("none", "JPEG 75")) + " |"
                  for source, (made, _, _) in MADE.items()]
        steps = json.loads((latent_spaces.COPIES / space / TRAINING).read_text())
        tables.append("\n".join([
            f"## {space}: {SPACES[space].title}", "",
            f"Teacher: {SPACES[space].hub_id}. Trained for {steps['encoder']} steps of {BATCH} pairs (encoder) and "
            f"{steps['decoder']} of {BATCH} crops (decoder) in the last run. {len(rows)} photographs.", "",
            "| | aim | measured |", "|---|---|---|", *lines, "",
            "| shift | teacher | teacher, JPEG 75 | ours | ours, JPEG 75 |", "|---|---|---|---|---|", *shifts]))
    writing.write(latent_spaces.COPIES / "README.md", CARD + "\n\n".join(tables) + "\n", overwrite=True)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for function in (train, export, measure, card):
        command = commands.add_parser(function.__name__, help=function.__doc__)
        command.set_defaults(function=function)
        command.add_argument("--work", type=Path, default=Path("runs"), help="folder of checkpoints and measurements")
        if function is card:
            continue
        command.add_argument("space", choices=COPIED)
        command.add_argument("--photos", type=Path, required=True, help="folder with LICENSES.jsonl")
        if function is export:
            continue
        command.add_argument("--weights", type=Path, required=True, help="folder with the teacher's files")
        command.add_argument("--threads", type=int, default=2)
        if function is measure:
            command.add_argument("--images", type=int, default=8, help="evaluation photographs")
            command.add_argument("--size", type=int, default=256, help="pixels of a side")
            command.add_argument("--steps", type=int, default=60, help="steps of an attack")
            continue
        command.add_argument("--encoder-steps", type=int, default=6000)
        command.add_argument("--decoder-steps", type=int, default=2000)
        command.add_argument("--seed", type=int, default=0)
        command.add_argument("--start", type=Path, metavar="FOLDER",
                             help="a copy to go on from (models/latents/sd1), with both terms of the loss from the first step")
    args = parser.parse_args(argv)
    args.function(args)


if __name__ == "__main__":
    main()
