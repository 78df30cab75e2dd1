"""The weights of LPIPS: a backbone's convolutions, read and checked, and the linear layers that ship with the package."""

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from .. import PROGRAM
from ..models.checkpoints import Unavailable, Unfit, sha256
from . import backbones


@dataclass(frozen=True, eq=False)                            # hashed by identity, the key of `placed`
class LPIPSWeights:
    """A backbone's convolutions and the linear layers over them; float32, on the CPU.

    sha256: over the bytes of the backbone's tensors, weight and bias in torchvision's order, whatever file held them;
    pinned: True if they come from torchvision's file of the pinned hash. file: the file that they were read from.
    """

    network: str
    tensors: dict
    sha256: str
    pinned: bool
    file: Path


def lpips_weights(network="alex", file=None):
    """The `LPIPSWeights` of a network, read from a file, or from the folder of `weights download`.

    file: torchvision's .pth, opened only if its hash is the pinned one, or a safetensors file with tensors of the same
    names (`features.0.weight`); its other tensors are ignored. Raises `Unavailable` if there is no such file and `Unfit`
    if it holds something else.
    """
    backbone = backbones.NETWORKS[network]
    path = backbone.kept if file is None else Path(file)
    if not path.is_file():
        if file is not None:
            raise Unavailable(f"{path}: no such file; LPIPS needs {backbone.file} or its convolutions as safetensors")
        raise Unavailable(f"the weights of LPIPS ({backbone.title}) are not in {path.parent}: run "
                          f"`{PROGRAM}.weights download lpips-{network}` once while online, or give {backbone.file} with "
                          "--weights")
    return _read(backbone, path, path.stat().st_mtime_ns)


@lru_cache(maxsize=4)
def _read(backbone, path, changed):
    with torch.inference_mode(False):                        # cached: later calls may need gradients
        tensors, source, digest = (_safetensors if path.suffix == ".safetensors" else _pickle)(backbone, path)
        for name, shape in backbone.shapes.items():
            tensor = tensors.get(name)
            if tensor is None or tuple(tensor.shape) != shape or not tensor.is_floating_point():
                what = "is missing" if tensor is None else f"is {tensor.dtype} {list(tensor.shape)}"
                raise Unfit(f"{path} does not hold the convolutions of {backbone.title}: {name} {what}, expected "
                            f"{list(shape)}; fetch {backbone.file} again")
        tensors = {name: tensors[name].detach().float().contiguous() for name in backbone.shapes}
        actual = hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors.values())).hexdigest()
        if digest not in (None, actual):
            raise Unfit(f"{path} is damaged: its tensors are not those that were written; remove it and run "
                        f"`{PROGRAM}.weights download lpips-{backbone.name}` again")
        tensors |= linear_layers(backbone.name)
    return LPIPSWeights(backbone.name, tensors, actual, source == backbone.sha256, path)


def linear_layers(network):
    """The linear layers that ship with the package: {"lin0": (C,), ...}, float32."""
    with safe_open(backbones.LINEAR, framework="pt") as opened:
        names = [name for name in opened.keys() if name.startswith(f"{network}.")]  # noqa: SIM118 (it is no dict)
        return {name.partition(".")[2]: opened.get_tensor(name) for name in names}


def _safetensors(backbone, path):
    """(tensors, SHA-256 of the file that they were converted from, their own SHA-256 at that time); a hash may be None."""
    try:
        with safe_open(path, framework="pt") as opened:
            about = opened.metadata() or {}
            names = set(opened.keys()) & backbone.shapes.keys()
            return {name: opened.get_tensor(name) for name in names}, about.get("source_sha256"), about.get("sha256")
    except (SafetensorError, OSError) as error:
        raise Unfit(f"{path} is cut short, damaged or not safetensors ({error}); fetch it again") from None


def _pickle(backbone, path):
    """The same three of torchvision's file. No other pickle is opened: a pickle can run code."""
    if (digest := sha256(path)) != backbone.sha256:
        raise Unfit(f"{path} is not {backbone.file}: its SHA-256 is {digest}, expected {backbone.sha256}; give that file, "
                    "or safetensors")
    return torch.load(path, map_location="cpu", weights_only=True), digest, None


@lru_cache(maxsize=4)
def placed(weights, dtype, device):
    """The tensors of `weights` in this dtype on this device, cached."""
    with torch.inference_mode(False):
        return {name: tensor.to(device, dtype) for name, tensor in weights.tensors.items()}
