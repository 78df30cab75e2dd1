"""The shift of a picture's latents: how far a change moves them, beside noise of the same budget and after purifiers.

The shift is the root mean square of the change over the standard deviation of the original's latents. After a purifier, both
pictures were purified. Uniform noise of the same budget is the control: it says what part is due to the budget alone.
"""

import torch

from .. import images
from ..models.precision import full_float32
from ..pgd import pgd
from ..purifiers.attacks import ATTACKS

PURIFIERS = ("jpeg-75", "resize-0.75")
SMALLEST = 1e-12                                             # under the root of a shift, whose slope at 0 would be infinite


def shift(latent, original):
    """The RMS of a latent's change over the standard deviation of the original's latent: a scalar."""
    return ((latent - original).square().mean() + SMALLEST).sqrt() / original.std().clamp(min=1e-6)


def noise_control(picture, eps, *, seed=0, mask=None):
    """A `Picture` with uniform noise of this budget in place of a perturbation: a PIL image, as method `noise` makes it.

    eps, mask: as of `pgd`.
    """
    pixels = images.to_pixels(picture.image)[:, :picture.channels]
    start = pgd(pixels, None, eps, steps=0, step_size=1, mask=mask, generator=torch.Generator().manual_seed(seed))
    return images.quantize(picture, start, eps)


@torch.no_grad()
def measure_shifts(editor, original, changed, control, purifiers=()):
    """The shift in every space of `Latents` at each working size: [{space, size, shift, noise, after}].

    original, changed, control: PIL images of one size; control: the original with noise of the same budget. after:
    {purifier: {shift, noise}} of the smallest working size, by names in `purifiers.attacks.ATTACKS`. In float32.
    """
    frames = editor.frames(*original.size)
    images_of_all = (original, changed, control)
    with full_float32():
        after = {name: _shifts(editor, [ATTACKS[name](image) for image in images_of_all], frames[:1]) for name in purifiers}
        found = _shifts(editor, images_of_all, frames)
    return [{**record, **({"after": {name: {key: records[i][key] for key in ("shift", "noise")}
                                     for name, records in after.items()}} if i < len(editor.spaces) and after else {})}
            for i, record in enumerate(found)]


def _shifts(editor, pictures, frames):
    """[{space, size, shift, noise}] of (original, changed, control), size after size."""
    seen = []                                                # of each picture, its pixels at each size: none is kept whole
    for image in pictures:
        pixels = images.to_pixels(image).to(editor.device)
        seen.append([images.resize(pixels, *frame) for frame in frames])
    found = []
    for (height, width), *at_size in zip(frames, *seen, strict=True):
        original, changed, control = map(editor.latents, at_size)
        found += [{"space": name, "size": [width, height], "shift": shift(changed[name], clean).item(),
                   "noise": shift(control[name], clean).item()} for name, clean in
                  ((space.name, original[space.name]) for space in editor.spaces)]
    return found


def tell_shifts(records):
    """Records of `measure_shifts` as a text of one line."""
    def of(record):
        after = "".join(f", after {name} {found['shift']:.2f} ({found['noise']:.2f})"
                        for name, found in record.get("after", {}).items())
        return f"{record['space']} at {max(record['size'])}: shift {record['shift']:.2f} (noise {record['noise']:.2f}){after}"

    return "; ".join(map(of, records))
