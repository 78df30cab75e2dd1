"""The published (diffusers) layout: which files of a folder or repository make up each component.

One folder per component; each network has a `config.json` and its weights in one file or in shards with an index. Pickles are
refused. Only small text files are opened here.
"""

import json
import re

from .hub import MAIN, Unavailable
from .sources import PIPELINES, T5


class Unfit(Unavailable, ValueError):
    """The files are there but cannot be used: damaged, of another network, or unsafe to read."""


BASES = ("diffusion_pytorch_model", "model")                    # as diffusers and as transformers name their weights
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".msgpack", ".h5")
TOKENIZERS = {                                                  # text encoder -> the files of its tokenizer, best first
    "CLIP": (("vocab.json", "merges.txt"), ("tokenizer.json",)),
    "T5": (("tokenizer.json",), ("spiece.model",)),
}
BESIDE_VOCABULARY = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
# BASE[.VARIANT].safetensors, or the index of shards: BASE.safetensors.index[.VARIANT].json, as save_pretrained writes it,
# or BASE.VARIANT.safetensors.index.json. Shards are BASE[.VARIANT]-00001-of-00002.safetensors, in older files
# BASE-00001-of-00002.VARIANT.safetensors; they are found through an index alone.
WEIGHTS = re.compile(
    rf"(?P<base>{'|'.join(BASES)})(?:\.(?P<before>[\w.-]+?))?\.safetensors(?P<index>\.index(?:\.(?P<after>[\w.-]+?))?\.json)?")
SHARD = re.compile(r"-\d{5}-of-\d{5}\b")


def pipeline_components(index, where, *, t5=True):
    """The components of the pipeline that a model_index.json, as a dict, describes.

    An index without a class is read as InstructPix2Pix. T5 is left out where the pipeline has none (no entry, or an empty
    one) and where t5 is False.
    """
    name = str(index.get("_class_name", "StableDiffusionInstructPix2PixPipeline"))
    if name not in PIPELINES:
        raise Unfit(f"{where} is a {name}, which is not implemented; implemented are {', '.join(PIPELINES)}")
    check_declined(name, t5, where)
    entries = [index.get(part) for part in T5]
    absent = () if t5 and all(isinstance(entry, list) and entry and None not in entry for entry in entries) else T5
    return tuple(part for part in PIPELINES[name] if part not in absent)


def check_declined(name, t5, where):
    """Raise Unfit where T5 is declined (t5 False) of a FLUX pipeline of this name: FLUX.1 needs it, and FLUX.2 has none."""
    if not t5 and name.startswith("Flux"):
        reason = "has no T5" if name.startswith("Flux2") else "cannot do without T5"
        raise Unfit(f"{where} is a {name}, which {reason}; do not decline it")


def needed(names, component, read, where):
    """The files of one component, in the order in which they are to be fetched, chosen from `names`.

    names: the files that exist, as paths relative to the checkpoint; read: such a path -> its text (for an index of shards);
    where: the checkpoint in words, for errors. Weights come last, so that a download that stopped early lacks the last file.
    """
    here = f"{component}/"
    if component.startswith("tokenizer"):
        extra = [here + file for file in BESIDE_VOCABULARY if here + file in names]
        kinds = TOKENIZERS["T5" if component in T5 else "CLIP"]
        if component == "tokenizer_2":                          # of FLUX.1 it is T5's
            kinds = (*kinds, ("spiece.model",))
        for kind in kinds:
            if names >= {here + file for file in kind}:
                return extra + [here + file for file in kind]
        raise Unavailable(f"{where} has no tokenizer: {here} needs {', or '.join(map(' and '.join, kinds))}")
    if component == "scheduler":
        if here + "scheduler_config.json" in names:
            return [here + "scheduler_config.json"]
        raise Unavailable(f"{where} has no {here}scheduler_config.json; a folder written by save_pretrained has one")
    if here + "config.json" not in names:
        raise Unavailable(f"{where} has no {here}config.json; expected is the layout that diffusers' save_pretrained "
                          "writes, with a folder per network")
    found = here + _weights({name.removeprefix(here) for name in names if name.startswith(here)}, component, where)
    if not found.endswith(".json"):
        return [here + "config.json", found]
    shards = _shards(read(found), f"{where}/{found}")
    if absent := [shard for shard in shards if here + shard not in names]:
        raise Unavailable(f"{where}/{found} lists the shard {absent[0]}, which is not there; fetch it again")
    return [here + "config.json", found, *(here + shard for shard in shards)]


def _weights(names, component, where):
    """The file of weights, or the index of shards, among the names in a component's folder.

    The variant fp16 comes first, since it has half the bytes, then the files without a variant. Any other variant is taken if
    it is the only one.
    """
    variants = {}                                               # variant -> its files, best first
    for name in sorted(names):
        match = WEIGHTS.fullmatch(name)
        if match and not SHARD.search(name):
            variant = match["before"] or match["after"] or ""
            rank = bool(match["index"]), BASES.index(match["base"])     # one file rather than shards
            variants.setdefault(variant, []).append((rank, name))
    for variant in ("fp16", "", *(variants if len(variants) == 1 else ())):
        if variant in variants:
            return min(variants[variant])[1]
    if variants:
        files = [min(found)[1] for found in variants.values()]
        raise Unfit(f"{where} has its {component} in several variants, {' and '.join(files)}, and none without a variant: "
                    f"choose one in a copy of the folder, by moving the others out of {component}/")
    if pickle := next((name for name in sorted(names) if name.endswith(PICKLES)), None):
        raise Unfit(
            f"{where} has its {component} only as a pickle ({component}/{pickle}), which could run code on being opened and is "
            "refused; if you trust it, convert it where diffusers is installed: python -c \"from diffusers import "
            f"DiffusionPipeline as P; P.from_pretrained('{where}').save_pretrained('converted')\"")
    held = sorted(name for name in names if is_weights(name))
    lies = f"; the files there are {', '.join(held[:3])}{' and more' if len(held) > 3 else ''}" if held else ""
    raise Unavailable(f"{where} has no weights in {component}/: expected is {BASES[0]}.safetensors or {BASES[1]}.safetensors, "
                      f"perhaps with a variant such as .fp16 before its end, or shards with an index{lies}")


def is_weights(file):
    """True for a file of weights, by its name."""
    return file.endswith(".safetensors")


def _shards(text, where):
    """The file names in an index, sorted. They lie beside the index; a name that looks like a path is refused."""
    table = parse(text, where).get("weight_map")
    if not isinstance(table, dict) or not table or not all(isinstance(shard, str) for shard in table.values()):
        raise Unfit(f"{where} is not an index of shards: it has no weight_map from tensor names to file names")
    for shard in table.values():
        if re.fullmatch(r"[\w][\w.-]*\.safetensors", shard) is None:
            raise Unfit(f"{where} points to {shard!r}; a shard is a safetensors file beside its index")
    return sorted(set(table.values()))


def parse(text, where):
    """The JSON object in the text of a file."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Unfit(f"{where} is not valid JSON ({error}); fetch it again") from None
    if not isinstance(found, dict):
        raise Unfit(f"{where} holds a JSON {type(found).__name__}, expected is an object")
    return found


def in_folder(folder, components, where, t5=True):
    """The files that `components` need of a folder on this disk; None: those of its pipeline."""
    files = []
    if components is None:
        components = pipeline_components(index_of(folder), where, t5=t5)
    for component in components:
        try:                                        # a dangling link counts as absent: its blob left the cache
            names = {f"{component}/{path.name}" for path in (folder / component).iterdir() if path.exists()}
        except FileNotFoundError:
            names = set()
        except OSError as error:
            raise Unavailable(f"{folder / component} cannot be read: {error.strerror}") from None
        files += needed(names, component, lambda name: read(folder / name), where)
    return files


def index_of(folder):
    """The model_index.json of a folder, {} where it has none."""
    path = folder / MAIN
    return parse(read(path), path) if path.exists() else {}


def read(path):
    """The text of a small file."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise Unavailable(f"{path} is missing") from None
    except IsADirectoryError:
        raise Unavailable(f"{path} is a folder where a file is expected") from None
    except OSError as error:
        raise Unavailable(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise Unfit(f"{path} is not text in UTF-8; fetch it again") from None
