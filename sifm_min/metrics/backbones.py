"""The backbones of LPIPS: source file, licence, shapes and place of each.

torchvision publishes whole classifiers; LPIPS needs their convolutions, `features.*`. `python -m sifm_min.weights
download lpips` fetches a classifier once and keeps those, as safetensors: of AlexNet's 244 MB, 10. `convolutions.py`
reads them. Importing this file does not load torch, so `weights list` is fast.
"""

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import constants

from .. import models

HOST = "https://download.pytorch.org/models"
LICENCE = "BSD-3-Clause (torchvision); trained on ImageNet, which has terms of its own"
LINEAR = Path(models.__file__).resolve().parent / "lpips" / "linear.safetensors"     # ships with the package: BSD-2-Clause


@dataclass(frozen=True, kw_only=True, eq=False)
class Backbone:
    """One network of LPIPS. `shapes`: tensor -> shape of what is kept, in the order of torchvision's state dict."""

    name: str                                                # as `metrics.lpips` and the lpips package call it
    title: str
    file: str                                                # on torchvision's host; the name ends in the start of its SHA-256
    size: int                                                # of the file, in bytes
    exact: bool = True                                       # False if `size` is approximate
    sha256: str
    smallest: int                                            # pixels a side with which the last layer has output
    shapes: dict[str, tuple[int, ...]]

    @property
    def url(self):
        return f"{HOST}/{self.file}"

    @property
    def kept(self):
        """The path of the safetensors copy: beside the hub's cache, so HF_HOME moves both."""
        return Path(constants.HF_HOME) / "sifm_min" / "lpips" / Path(self.file).with_suffix(".safetensors")

    @property
    def kept_size(self):
        """The size of the kept float32 tensors in bytes."""
        return 4 * sum(_product(shape) for shape in self.shapes.values())


def _product(shape):
    size = 1
    for side in shape:
        size *= side
    return size


def _convolutions(*rows):
    """The shapes of weights and biases, from rows of (name, channels in, channels out, kernel)."""
    shapes = {}
    for name, inside, outside, kernel in rows:
        shapes |= {f"features.{name}.weight": (outside, inside, kernel, kernel), f"features.{name}.bias": (outside,)}
    return shapes


def _fire(name, inside, squeezed, expanded):
    return ((f"{name}.squeeze", inside, squeezed, 1), (f"{name}.expand1x1", squeezed, expanded, 1),
            (f"{name}.expand3x3", squeezed, expanded, 3))


NETWORKS = {backbone.name: backbone for backbone in (
    Backbone(
        name="alex", title="AlexNet", file="alexnet-owt-7be5be79.pth", size=244_408_911, smallest=31,
        sha256="7be5be791159472b1fbf3c69796f7cb30dca7ad8466c2df70058c37116cdee02",
        shapes=_convolutions((0, 3, 64, 11), (3, 64, 192, 5), (6, 192, 384, 3), (8, 384, 256, 3), (10, 256, 256, 3)),
    ),
    Backbone(
        name="vgg", title="VGG16", file="vgg16-397923af.pth", size=553_433_881, smallest=16,
        sha256="397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
        shapes=_convolutions((0, 3, 64, 3), (2, 64, 64, 3), (5, 64, 128, 3), (7, 128, 128, 3), (10, 128, 256, 3),
                             (12, 256, 256, 3), (14, 256, 256, 3), (17, 256, 512, 3), (19, 512, 512, 3),
                             (21, 512, 512, 3), (24, 512, 512, 3), (26, 512, 512, 3), (28, 512, 512, 3)),
    ),
    Backbone(
        name="squeeze", title="SqueezeNet 1.1", file="squeezenet1_1-b8a52dc0.pth", size=4_960_000, exact=False, smallest=17,
        sha256="b8a52dc049b60e4b6ab68ad0df457362afab8b6304b2febdc1650a5dab4d7e7b",
        shapes=_convolutions((0, 3, 64, 3), *_fire(3, 64, 16, 64), *_fire(4, 128, 16, 64), *_fire(6, 128, 32, 128),
                             *_fire(7, 256, 32, 128), *_fire(9, 256, 48, 192), *_fire(10, 384, 48, 192),
                             *_fire(11, 384, 64, 256), *_fire(12, 512, 64, 256)),
    ),
)}
