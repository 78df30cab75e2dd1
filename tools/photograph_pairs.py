"""Pairs to train an instruction editor on: latents of crops of photographs and of their exact targets, kept in chunks.

The photographs are those that LICENSES.jsonl marks for training, but for one in `HELD`, which `check` looks at. A chunk is a
file of the working folder: crops of one size, and for each crop several targets of different kinds. A chunk depends on its
number alone, so an interrupted run goes on where it stopped, and a training can begin on the first chunks.
"""

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from photosets import marked  # noqa: E402
from training_run import save, say  # noqa: E402

from sifm_min.files import writing  # noqa: E402
from sifm_min.miniature.kinds import KINDS  # noqa: E402
from sifm_min.models import latent_spaces  # noqa: E402

HELD = 16                                                    # of so many photographs for training, one is kept for `check`
SIZES, CROPS = (128, 256), (32, 12)                          # of crops, in pixels, and their number in a chunk
EDITS = 6                                                    # targets of each crop
SMALLEST = 0.6                                               # side of a crop, at least, over the photograph's shorter side
GONE = -1                                                    # in place of a pair's kind and option that are no more
ASKED = [(kind, option) for kind in KINDS.values() for option in kind.options]


def photographs(folder, *, held=False):
    """The files of the photographs for training, or of those among them that are kept for `check`."""
    rows = marked(folder, "train")
    return [folder / row["file"] for i, row in enumerate(rows) if (i % HELD == HELD - 1) == held]


def crop(picture, size, rng, *, smallest=SMALLEST):
    """A random square of a PIL picture, half of the time mirrored, as float32 (size,size,3) in [0,1]."""
    side = round(min(picture.size) * rng.uniform(smallest, 1))
    left, top = (int(rng.integers(length - side + 1)) for length in picture.size)
    small = picture.resize((size, size), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side))
    pixels = np.asarray(small.convert("RGB"), np.float32) / 255
    return np.ascontiguousarray(pixels[:, ::-1]) if rng.random() < 0.5 else pixels


def edits(pixels, rng, counts, number=EDITS):
    """[(its place in `ASKED`, target)] of so many different kinds that apply to a crop; the rarest kinds so far come first.

    counts: {kind: how often it was taken}, which this adds to.
    """
    found = []
    order = sorted(KINDS, key=lambda name: counts[name] + rng.random())
    for kind in (KINDS[name] for name in order):
        option = kind.options[int(rng.integers(len(kind.options)))]
        if not kind.applies(pixels, option):
            continue
        found.append((ASKED.index((kind, option)), kind.target(pixels, option)))
        counts[kind.name] += 1
        if len(found) == number:
            break
    return found


@torch.no_grad()
def latents(vae, pictures):
    """Pictures, float32 (H,W,3) in [0,1] -> their latents as the diffusion model has them, (N,C,h,w) in float16."""
    pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
    found = torch.cat([vae.encode(2 * part - 1)[0] for part in pixels.split(4)])
    return (found * vae.config.scaling_factor).half()


def autoencoder(work, space):
    """The frozen autoencoder of a work, in float32: a copy of the one that ships, made when the work begins."""
    folder = work / "vae"
    if not (folder / latent_spaces.WEIGHTS).exists():
        folder.mkdir(parents=True, exist_ok=True)
        for name in (latent_spaces.CONFIG, latent_spaces.WEIGHTS):                   # the weights last
            shutil.copyfile(latent_spaces.COPIES / space / name, folder / name)
    return latent_spaces.open_copy(folder, latent_spaces.SPACES[space]).network(dtype=torch.float32)


def make_chunk(number, size, files, vae):
    """One chunk of crops of a size: sources (N,C,h,w) and targets (M,C,h,w); for each target, `of`, the place of its source,
    and `asked`, its kind and option."""
    rng = np.random.default_rng((0, number))
    sources, targets, of, asked = [], [], [], []
    counts = dict.fromkeys(KINDS, 0)
    crops = CROPS[SIZES.index(size)]
    for file in rng.choice(len(files), crops, replace=crops > len(files)):
        with Image.open(files[file]) as picture:
            pixels = crop(picture, size, rng)
        for place, target in edits(pixels, rng, counts):
            targets.append(target)
            of.append(len(sources))
            asked.append(place)
        sources.append(pixels)
    return {"size": size, "sources": latents(vae, sources), "targets": latents(vae, targets), "of": torch.tensor(of),
            "asked": [(ASKED[place][0].name, ASKED[place][1]) for place in asked]}


def make_chunks(work, photos, space, count, large=4):
    """The chunks 0 to count - 1 of a work, but for those that it has. Of `large` chunks, one has large crops."""
    vae, files, folder = autoencoder(work, space), photographs(photos), work / "chunks"
    writing.make_folder(folder)
    for number in range(count):
        path = folder / f"{number:04d}.pt"
        if not path.exists():
            size = SIZES[number % large == large - 1]
            made = make_chunk(number, size, files, vae)
            save(made, path)
            say(f"chunk {number + 1} of {count}: {len(made['targets'])} pairs of {size} pixels")


@dataclass
class Pool:
    """The pairs of one size: tensors as in a chunk, and for each kind of edit the places of its pairs."""

    sources: torch.Tensor
    targets: torch.Tensor
    of: torch.Tensor
    asked: torch.Tensor
    by_kind: list

    def draw(self, count, rng):
        """(sources, targets, places in `ASKED`) of so many pairs; each kind of edit is equally likely."""
        rows = [rng.choice(self.by_kind[int(rng.integers(len(self.by_kind)))]) for _ in range(count)]
        rows = torch.tensor(np.array(rows))
        return self.sources[self.of[rows]].float(), self.targets[rows].float(), self.asked[rows]


def read_pools(work):
    """{size of the crops: `Pool`} of all chunks that a work has by now."""
    names, places = list(KINDS), {(kind.name, option): place for place, (kind, option) in enumerate(ASKED)}
    kinds = torch.tensor([names.index(kind.name) for kind, _ in ASKED])
    chunks = {}
    for path in sorted((work / "chunks").glob("*.pt")):
        chunk = torch.load(path, weights_only=True)
        chunks.setdefault(chunk["size"], []).append(chunk)
    pools = {}
    for size, some in chunks.items():
        starts = np.cumsum([0, *(len(chunk["sources"]) for chunk in some)])
        joined = {name: torch.cat([chunk[name] for chunk in some]) for name in ("sources", "targets")}
        joined["asked"] = torch.tensor([places.get(pair, GONE) for chunk in some for pair in chunk["asked"]])
        of = torch.cat([chunk["of"] + int(start) for chunk, start in zip(some, starts, strict=False)])
        kind = torch.where(joined["asked"] == GONE, GONE, kinds[joined["asked"]])
        by_kind = [rows.numpy() for k in range(len(names)) if len(rows := (kind == k).nonzero()[:, 0])]
        pools[size] = Pool(of=of, by_kind=by_kind, **joined)
    return pools
