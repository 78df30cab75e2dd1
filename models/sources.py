"""The editors known by name: their components, origin and licence. `recognised` finds out which one a folder is a copy of."""

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

INSTRUCT_PIX2PIX = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
STABLE_DIFFUSION_3 = ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3",
                      "tokenizer", "tokenizer_2", "tokenizer_3", "scheduler")
FLUX_1_KONTEXT = ("transformer", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
FLUX_2_KLEIN = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
T5 = ("text_encoder_3", "tokenizer_3")                          # optional in Stable Diffusion 3: it works without them
PIPELINES = {                                                   # class in model_index.json -> its components
    "StableDiffusionInstructPix2PixPipeline": INSTRUCT_PIX2PIX,
    "StableDiffusion3Pipeline": STABLE_DIFFUSION_3,
    "StableDiffusion3Img2ImgPipeline": STABLE_DIFFUSION_3,
    "StableDiffusion3InstructPix2PixPipeline": STABLE_DIFFUSION_3,                         # UltraEdit's own
    "FluxKontextPipeline": FLUX_1_KONTEXT,
    "Flux2KleinPipeline": FLUX_2_KLEIN,
}


@dataclass(frozen=True, kw_only=True)
class Source:
    """The origin of an editor; one of `folder`, `file`, `hub_id` is set. Editors known by name are shipped or on the hub."""

    name: str
    licence: str
    folder: Path | None = None
    file: Path | None = None                        # a single file of Stable Diffusion 3
    hub_id: str | None = None
    revision: str | None = None                     # a commit; None: `main` is resolved once and then kept
    gated: bool = False                             # only accounts that accepted the licence may download it
    size: int | None = None                         # bytes to fetch, to two digits; None: the files say
    size_without_t5: int | None = None              # the same where T5 is declined; None: it has none
    files: Mapping[str, str] = field(default_factory=dict)      # weight file -> its published SHA-256


_HERE = Path(__file__).resolve().parent

EDITORS: dict[str, Source] = {source.name: source for source in (
    Source(name="miniature", licence="Apache-2.0", folder=_HERE / "miniature"),
    *([Source(name="miniature-sd3", licence="Apache-2.0", folder=_HERE / "miniature-sd3")]
      if (_HERE / "miniature-sd3").is_dir() else []),
    Source(
        name="instruct-pix2pix",
        licence="MIT; derived from Stable Diffusion 1.5 (CreativeML OpenRAIL-M)",
        hub_id="timbrooks/instruct-pix2pix",
        revision="31519b5cb02a7fd89b906d88731cd4d6a7bbf88d",
        size=2_100_000_000,
        files={
            "unet/diffusion_pytorch_model.fp16.safetensors":
                "0d6bbc0a95dd125196d327a660b43d24c56f433eb30d2776f1327fb86bd38f78",
            "vae/diffusion_pytorch_model.fp16.safetensors":
                "4fbcf0ebe55a0984f5a5e00d8c4521d52359af7229bb4d81890039d2aa16dd7c",
            "text_encoder/model.fp16.safetensors":
                "77795e2023adcf39bc29a884661950380bd093cf0750a966d473d1718dc9ef4e",
        },
    ),
    Source(
        name="hq-edit",
        licence="CC BY-NC 4.0 (non-commercial)",
        hub_id="MudeHui/HQ-Edit",
        size=4_300_000_000,                         # expected: float32 files only, of the shapes of instruct-pix2pix
    ),
    Source(
        name="sd3",
        licence="Stability AI Community License",
        hub_id="stabilityai/stable-diffusion-3-medium-diffusers",
        revision="b1148b4028b9ec56ebd36444c193d56aeff7ab56",
        gated=True,
        size=15_500_000_000,
        size_without_t5=6_000_000_000,
    ),
    Source(
        name="ultraedit",
        licence="none stated; derived from Stable Diffusion 3 (Stability AI Community License)",
        hub_id="BleachNick/SD3_UltraEdit_freeform",
        revision="b1af2fa2bc827669589193d36ca49d9b077d697c",
        size=31_000_000_000,                        # expected: float32 files only, of the shapes of sd3
        size_without_t5=12_000_000_000,
    ),
    Source(
        name="flux-kontext",
        licence="FLUX.1 [dev] Non-Commercial License",
        hub_id="black-forest-labs/FLUX.1-Kontext-dev",
        gated=True,
        size=34_000_000_000,                        # expected: from the shapes; its files are bfloat16
    ),
    Source(
        name="flux-klein",
        licence="Apache-2.0",
        hub_id="black-forest-labs/FLUX.2-klein-4B",
        revision="e7b7dc27f91deacad38e78976d1f2b499d76a294",
        size=16_000_000_000,
    ),
)}

# The first repository that the example on a model card loads.
EXAMPLE = re.compile(r"""(?:from_pretrained\(|\bmodel\w*\s*=)\s*["']([\w.-]+/[\w.-]+)["']""")
REMOTE = re.compile(r"^\s*url\s*=\s*\S*?([\w.-]+/[\w.-]+?)(?:\.git)?/?\s*$", re.MULTILINE)
CACHED = re.compile(r"models--([\w.-]+?)--([\w.-]+)")


def by_hub_id(hub_id):
    """The editor known by name that has this hub id, or None; the hub ignores capitals."""
    return next((known for known in EDITORS.values() if known.hub_id and known.hub_id.casefold() == hub_id.casefold()), None)


def recognised(folder):
    """The editor known by name that a folder is a copy of, or None.

    The evidence, strongest first: the folder's path in a cache of the hub, the remote of a git clone, the commit that a
    download recorded in it, the `_name_or_path` in model_index.json, the repository in the model card's example, its name.
    """
    ids = [f"{found[1]}/{found[2]}" for path in (folder.absolute(), folder.resolve()) for part in path.parts
           if (found := CACHED.fullmatch(part))]
    ids += REMOTE.findall(_text(folder / ".git" / "config"))[:1]
    commit = _text(folder / ".cache" / "huggingface" / "download" / "model_index.json.metadata").split("\n")[0].strip()
    ids += [known.hub_id for known in EDITORS.values() if commit and commit == known.revision]
    index = None
    with suppress(ValueError, RecursionError):
        index = json.loads(_text(folder / "model_index.json"))
    origin = index.get("_name_or_path") if isinstance(index, dict) else None
    if isinstance(origin, str):                     # a repository, or a path: in a cache, or of a folder with its name
        ids += [f"{found[1]}/{found[2]}" for found in CACHED.finditer(origin)] or [origin]
        ids += [_of_name(re.split(r"[/\\]", origin.rstrip("/\\"))[-1])]
    ids += EXAMPLE.findall(_text(folder / "README.md"))[:1]
    ids += [_of_name(folder.resolve().name)]
    return next((known for hub_id in ids if hub_id and (known := by_hub_id(hub_id))), None)


def _of_name(name):
    """The hub id of the editor with this name, or whose repository has this name without its owner; else None."""
    return next((known.hub_id for known in EDITORS.values() if known.hub_id
                 and name.casefold() in (known.name, known.hub_id.split("/")[1].casefold())), None)


def _text(path):
    """The text of a small file, "" where it cannot be read."""
    with suppress(OSError, UnicodeDecodeError):
        return path.read_text(encoding="utf-8")
    return ""
