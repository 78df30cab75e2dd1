"""Train the recogniser, the miniature's second judge: which edit a picture shows, and how damaged it is.

    python tools/train_recogniser.py data train score export --photos FOLDER   all stages; a later run goes on where it stopped
    python tools/train_recogniser.py measure --photos FOLDER                   on evaluation photographs

FOLDER holds photographs and LICENSES.jsonl with a use for each (`tools/photosets.py`): those for "train" are trained on,
those for "evaluate" measured. The network (`sifm_min/miniature/recogniser.py`) learns from exact results of instructions,
from the same after the autoencoders that ship, and from synthetic damage (`tools/damages.py`). It never sees an edit or a
perturbation that was sought.

Work files go to --work. The trained network ships as models/miniature/recogniser/model.safetensors, in fp16.
"""

import argparse
import itertools
import json
import random
import sys
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import damages  # noqa: E402
import photosets  # noqa: E402
from training_run import Run, save, trained  # noqa: E402

from sifm_min import images  # noqa: E402
from sifm_min.miniature import fidelity, pictures, recogniser  # noqa: E402
from sifm_min.miniature.kinds import KINDS  # noqa: E402
from sifm_min.miniature.recogniser import SIZE, Recogniser, class_of, classes  # noqa: E402
from sifm_min.models import latent_spaces  # noqa: E402

FULL = 256                                                   # pixels of what passes the autoencoder
EACH = 4                                                     # edits of one crop
PART = 25                                                    # crops in one file of data
STATE = "recogniser.pt"                                      # of the training, in --work
READABLE = 0.7                                               # up to this damage the edit must be named


# ------------------------------------------------------------------------------------------------------------- the pictures

def draw(photographs, start, count, size, each):
    """Yield (source, [(class, target)]) of crops, as pixels (3,size,size): the rarest classes that apply first."""
    names, counts = classes(), {}
    for i in range(start, start + count):
        rng = random.Random(f"recogniser {size} {i}")
        picture = pictures.random_square(images.read(photographs[i % len(photographs)]).image, rng, size)
        pixels = np.asarray(picture, np.float32) / 255
        options = [(kind, option) for kind in KINDS.values() for option in kind.options]
        rng.shuffle(options)
        found = []
        for kind, option in sorted(options, key=lambda pair: counts.get(class_of(pair[0].name, pair[1]), 0)):
            name = class_of(kind.name, option)
            if kind.name not in [other for other, _, _ in found] and kind.applies(pixels, option):
                found.append((kind.name, names.index(name), tensor(kind.target(pixels, option))))
                counts[name] = counts.get(name, 0) + 1
            if len(found) == each:
                break
        if found:
            yield tensor(pixels), [(label, target) for _, label, target in found]


def tensor(pixels):
    """A picture (H,W,3) as pixels (3,H,W)."""
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


@lru_cache(maxsize=1)
def autoencoders():
    """The copies of latent spaces that ship: what the miniature editors' results pass through."""
    copies = filter(None, map(latent_spaces.copy_of, latent_spaces.SPACES.values()))
    return [copy.network(dtype=torch.float32).eval() for copy in copies]


def through_autoencoder(target, generator, network):
    """(after the autoencoder, the same with false texture, its damage): pixels (3,H,W) of a target, and the level."""
    smooth, limit = list(damages.LATENTS.values())[int(torch.randint(2, (), generator=generator))]
    strength = 2 * limit * torch.rand((), generator=generator).item()
    with torch.no_grad():
        latent = network.encode(2 * target[None] - 1)[0]
        both = torch.cat([latent, damages.latent_noise(latent, strength, generator, smooth)])
        plain, spoiled = (network.decode(both) / 2 + 0.5).clamp(0, 1)
    return plain, spoiled, damages.level(strength, limit)


def small(pixels):
    """Pixels (3,H,W) at the recogniser's size, as 8 bits."""
    return (images.resize(pixels[None], SIZE, SIZE)[0] * 255).round().byte()


def data(args):
    """Two files of pictures: exact results, and results after the autoencoder with and without false texture."""
    folder = args.photos
    photographs = [folder / row["file"] for row in photosets.in_turn(photosets.marked(folder, "train"))]
    for part in range(0, args.crops, PART):
        path = args.work / f"rendered-{part}.pt"
        if not path.exists():
            rows = [(small(source), small(target), label)
                    for source, found in draw(photographs, part, min(PART, args.crops - part), SIZE, EACH)
                    for label, target in found]
            save(columns(("source", "target", "label"), rows), path)
    for part in range(0, args.autoencoded, PART):
        path = args.work / f"autoencoded-{part}.pt"
        if not path.exists():
            rows, generator = [], torch.Generator().manual_seed(part)
            drawn = draw(photographs[::-1], part, min(PART, args.autoencoded - part), FULL, 1)
            for (source, ((label, target),)), network in zip(drawn, itertools.cycle(autoencoders()), strict=False):
                plain, spoiled, level = through_autoencoder(target, generator, network)
                rows.append((small(source), small(plain), small(spoiled), level, label))
            save(columns(("source", "plain", "spoiled", "level", "label"), rows), path)


def columns(names, rows):
    """{name: its column of the rows, one tensor}."""
    return {name: torch.stack(column) if torch.is_tensor(column[0]) else torch.tensor(column)
            for name, column in zip(names, zip(*rows, strict=True), strict=True)}


def parts(work, stem):
    """The parts of the data on disk, put together."""
    found = [torch.load(path) for path in sorted(work.glob(f"{stem}-*.pt"))]
    return {name: torch.cat([part[name] for part in found]) for name in found[0]}


# --------------------------------------------------------------------------------------------------------------- training

def batch(rendered, autoencoded, size, generator):
    """(edits, sources, labels, levels) of one step: two thirds exact results, a third through the autoencoder."""
    n = size * 2 // 3
    chosen = torch.randint(len(rendered["label"]), (n,), generator=generator)
    other = torch.randint(len(autoencoded["label"]), (size - n,), generator=generator)
    spoiled = torch.rand(size - n, generator=generator) < 0.5
    edit = torch.cat([rendered["target"][chosen],
                      torch.where(spoiled[:, None, None, None], autoencoded["spoiled"][other], autoencoded["plain"][other])])
    source = torch.cat([rendered["source"][chosen], autoencoded["source"][other]])
    label = torch.cat([rendered["label"][chosen], autoencoded["label"][other]])
    level = torch.cat([torch.zeros(n), torch.where(spoiled, autoencoded["level"][other], 0.0)])
    edit, source = edit.float() / 255, source.float() / 255
    unchanged = torch.rand(size, generator=generator) < 0.06
    edit = torch.where(unchanged[:, None, None, None], source, edit)
    label, level = label.masked_fill(unchanged, 0), level.masked_fill(unchanged, 0.0)
    edit = faithful(edit, generator)
    for i in torch.nonzero(torch.rand(size, generator=generator) < 0.45)[:, 0].tolist():
        edit[i:i + 1], added = spoil(edit[i:i + 1], generator)
        level[i] = min(1.0, (level[i].item() ** 2 + added ** 2) ** 0.5)
    return edit, source, label, level


def faithful(edit, generator):
    """The small deviations of a good edit: brightness, contrast and tint."""
    shape = (len(edit), 1, 1, 1)
    contrast = 1 + 0.06 * torch.randn(shape, generator=generator)
    tint = 0.02 * torch.randn(len(edit), 3, 1, 1, generator=generator) + 0.02 * torch.randn(shape, generator=generator)
    return (edit * contrast + tint).clamp(0, 1)


def spoil(edit, generator):
    """One or two damages of random strength: (edit, level)."""
    total = 0.0
    for i in torch.randperm(len(damages.PIXELS), generator=generator)[:1 + int(torch.rand((), generator=generator) < 0.3)]:
        function, limit = list(damages.PIXELS.values())[i]
        strength = limit * (0.1 + 2 * torch.rand((), generator=generator).item())
        edit = function(edit, strength, generator).clamp(0, 1)
        total += damages.level(strength, limit) ** 2
    return edit, min(1.0, total ** 0.5)


def train(args):
    """The part that names the edit; --work keeps its state."""
    rendered, autoencoded = parts(args.work, "rendered"), parts(args.work, "autoencoded")
    run = Run(args.work / STATE, new_recogniser(), rate=args.lr, steps=args.steps, minutes=args.minutes)
    while not run.done:
        edit, source, label, level = batch(rendered, autoencoded, args.batch, torch.Generator().manual_seed(run.step))
        scores = run.network.name(edit.to(memory_format=torch.channels_last), source)
        readable = level <= READABLE
        run.descend(F.cross_entropy(scores[readable], label[readable], label_smoothing=0.02))


def new_recogniser():
    torch.manual_seed(0)
    return Recogniser(len(classes()))


def score(args):
    """The part that scores damage, on the statistics of so many pictures that the trained part has named."""
    rendered, autoencoded = parts(args.work, "rendered"), parts(args.work, "autoencoded")
    network = trained(args.work / STATE, new_recogniser())
    network.damage.requires_grad_(True)
    rows = []
    with torch.no_grad():
        for step in range(-(-args.scored // args.batch)):
            edit, source, _, level = batch(rendered, autoencoded, args.batch, torch.Generator().manual_seed(1_000_000 + step))
            rows.append((network.statistics(edit, source, network.name(edit, source)), level))
    found, levels = (torch.cat(column) for column in zip(*rows, strict=True))
    network.damage[0].set(found)
    optimizer = torch.optim.AdamW(network.damage.parameters(), lr=3e-3, weight_decay=0.05)
    generator, tested = torch.Generator().manual_seed(0), len(levels) // 8
    for step in range(args.score_steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (1 - step / args.score_steps)
        chosen = torch.randint(tested, len(levels), (256,), generator=generator)
        loss = F.binary_cross_entropy_with_logits(network.damage(found[chosen])[:, 0], levels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        apart = (network.damage(found[:tested])[:, 0].sigmoid() - levels[:tested]).abs().mean()
    print(f"damage off by {apart:.3f} on {tested} pictures that were left out", flush=True)
    save({"network": network.state_dict()}, args.work / "scored.pt")


def export(args):
    """The shipped file, in fp16, with the names of the classes in its metadata."""
    state = torch.load(args.work / "scored.pt")["network"]
    args.to.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.half().contiguous() for name, value in state.items()}, args.to,
              metadata={"format": "pt", "classes": json.dumps(classes())})
    print(f"{args.to.name}: {args.to.stat().st_size / 1e6:.2f} MB")


# -------------------------------------------------------------------------------------------------------------- measuring

@torch.no_grad()
def measure(args):
    """Accuracy on evaluation photographs: exact and autoencoded results, and the score of each damage around its limit."""
    recogniser.WEIGHTS = args.to
    network, names = recogniser.load_recogniser()
    photographs = [args.photos / row["file"] for row in photosets.in_turn(photosets.marked(args.photos, "evaluate"))]
    generator, wrong = torch.Generator().manual_seed(0), {}
    right = {"exact": [], "autoencoded": []}
    scores = {}

    def ask(edit, source):
        found, damage = network(*(images.resize(pixels[None].clamp(0, 1), SIZE, SIZE) for pixels in (edit, source)))
        return found[0], damage.sigmoid().item()

    for source, found in draw(photographs, 0, args.evaluated, FULL, 2):
        for label, target in found:
            plain, _, _ = through_autoencoder(target, generator, fidelity.reference())
            for arm, edit in (("exact", target), ("autoencoded", plain)):
                answer, damage = ask(edit, source)
                right[arm].append(answer.argmax().item() == names.index(classes()[label]))
                scores.setdefault((arm, 0), []).append(damage)
                if not right[arm][-1]:
                    pair = classes()[label], names[answer.argmax()]
                    wrong[pair] = wrong.get(pair, 0) + 1
            for name, (function, limit) in damages.PIXELS.items():
                for times in (0.5, 1, 2):
                    scores.setdefault((name, times), []).append(
                        ask(function(plain[None], times * limit, generator)[0], source)[1])
    for arm, hits in right.items():
        print(f"{arm}: {sum(hits)} of {len(hits)} named")
    for (name, times), values in scores.items():
        over = sum(value > recogniser.thresholds.DAMAGED for value in values)
        print(f"{name} x {times}: score {np.median(values):.2f}, called damaged {over} of {len(values)}")
    print("taken for another: " + "; ".join(f"{a} for {b} {n}" for (a, b), n in sorted(wrong.items(), key=lambda w: -w[1])))


STAGES = {stage.__name__: stage for stage in (data, train, score, export, measure)}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="+", choices=[*STAGES])
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("build/recogniser"))
    parser.add_argument("--to", type=Path, default=recogniser.WEIGHTS)
    parser.add_argument("--crops", type=int, default=1300)
    parser.add_argument("--autoencoded", type=int, default=600)
    parser.add_argument("--steps", type=int, default=1500, help="of the part that names the edit, at most")
    parser.add_argument("--minutes", type=float, help="of that part's training, at most; its rate reaches zero then")
    parser.add_argument("--scored", type=int, default=6000)
    parser.add_argument("--score-steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--evaluated", type=int, default=60)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    for stage in args.stages:
        STAGES[stage](args)


if __name__ == "__main__":
    main()
