"""The share of an editor's edits that follow their instruction, on photographs for training that were kept from it.

An edit is compared with the exact target at half resolution, where the target differs visibly from the source. Progress is
the part of the way from the source to the target that the edit has gone; the residual is its distance from the target as the
autoencoder gives it back, both over the length of that way. It is a quick measure to choose guidance with; the judges of
`sifm_min.miniature` are apart from it.
"""

from pathlib import Path

import numpy as np
import torch
from photograph_pairs import ASKED, crop, edits, photographs
from PIL import Image
from training_run import say

from sifm_min import load_editor
from sifm_min.miniature.kinds import KINDS, changed
from sifm_min.miniature.pictures import as_image
from sifm_min.miniature.soft_maps import halved

PROGRESS, RESIDUAL = 0.5, 0.6                                # an edit counts as obedient from, and up to


def progress_and_residual(source, target, returned, edited):
    """Both measures of one edit; all pictures float32 (H,W,3), `returned` is the target through the autoencoder."""
    mask = changed(source, target)
    source, target, returned, edited = (halved(picture)[mask] for picture in (source, target, returned, edited))
    way, length = target - source, max(float(np.square(target - source).sum()), 1e-9)
    progress = float((way * (edited - source)).sum()) / length
    return progress, (float(np.square(edited - returned).sum()) / length) ** 0.5


def asked(photos, count, size, seed=0):
    """Yield (source, target, place in `ASKED`) of so many edits, each of another kind as far as they go."""
    rng, files, counts = np.random.default_rng((2, seed)), photographs(photos, held=True), dict.fromkeys(KINDS, 0)
    for i in range(count):
        with Image.open(files[i % len(files)]) as picture:
            pixels = crop(picture, size, rng, smallest=0.7)
        for place, target in edits(pixels, rng, counts, 1):
            yield pixels, target, place


def check(args):
    """Edit, print the share that is obeyed with trained and with held-out wordings, and write a sheet."""
    editor, rng = load_editor(args.out, device=args.device), np.random.default_rng(3)
    rows, found = [], {"trained": [], "held-out": []}
    for i, (source, target, place) in enumerate(asked(args.photos, args.edits, args.size)):
        kind, option = ASKED[place]
        wording = "held-out" if i % 2 else "trained"
        texts = kind.held_out(option) if i % 2 else kind.phrases(option)
        prompt = texts[int(rng.integers(len(texts)))]
        edited = editor.edit(as_image(source), prompt, seed=i, steps=args.sampling_steps, guidance=args.guidance,
                             image_guidance=args.image_guidance, size=args.size)
        edited = np.asarray(edited, np.float32) / 255
        with torch.no_grad():
            returned = editor.decode(editor.encode(as_tensor(target)))[0].clamp(0, 1).permute(1, 2, 0).cpu().numpy()
        progress, residual = progress_and_residual(source, target, returned, edited)
        good = progress >= PROGRESS and residual <= RESIDUAL
        found[wording].append(good)
        rows.append(np.concatenate([source, target, edited], 1))
        say(f"{'obeyed' if good else 'NOT   '} {progress:5.2f} {residual:5.2f}  {kind.name} {option}: {prompt}")
    for wording, some in found.items():
        say(f"{wording} wordings: {sum(some)} of {len(some)} obeyed")
    if args.sheet:
        write_sheet(rows, args.sheet)


def as_tensor(pixels):
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None]


def write_sheet(rows, path, across=3):
    """Rows of pictures, `across` of them beside each other, as one file."""
    blank = np.ones_like(rows[0])
    rows = [*rows, *[blank] * (-len(rows) % across)]
    lines = [np.concatenate(rows[i:i + across], 1) for i in range(0, len(rows), across)]
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    as_image(np.concatenate(lines)).save(path)
