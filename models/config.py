"""Configs: read a published JSON config into a dataclass, and refuse what would change the numbers unnoticed.

A config is a frozen dataclass whose fields are the keys that decide numbers. Every other key of a file must be on one of two
lists of the class: `HARMLESS` (key -> the reason why it changes nothing at inference) or `IMPLEMENTED` (key -> the values
that the code implements). A key on neither list is refused. Each error is one sentence with the file, the key and the value.
Standard library only.
"""

import json
import math
import types
import typing
from dataclasses import MISSING, dataclass, fields, replace
from typing import ClassVar

LARGEST = 2**20                                     # above every published width and count
LAYERS = (1, 1000)                                  # above every published depth: a wrong digit must not build layers for hours

# Keys that diffusers' EMAModel.save_pretrained writes beside the network's own.
EMA = dict.fromkeys((
    "decay", "inv_gamma", "min_decay", "optimization_step", "power", "update_after_step", "use_ema_warmup",
    "collected_params",
), "training only: the moving average that the weights are")

# Keys that transformers writes for every kind of network.
TRANSFORMERS = dict.fromkeys((
    "attention_dropout", "classifier_dropout", "dropout", "dropout_rate", "gradient_checkpointing", "initializer_factor",
    "initializer_range", "use_bfloat16",
), "training only") | dict.fromkeys((
    "output_attentions", "output_hidden_states", "return_dict", "torchscript",
), "what a call returns, in transformers") | dict.fromkeys((
    "chunk_size_feed_forward", "use_cache", "output_past", "attn_implementation",
), "memory and speed only") | dict.fromkeys((
    "finetuning_task", "id2label", "label2id", "problem_type", "num_labels", "task_specific_params", "tf_legacy_loss",
), "of a classifier or a task") | dict.fromkeys((
    "bad_words_ids", "begin_suppress_tokens", "diversity_penalty", "do_sample", "early_stopping",
    "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "forced_bos_token_id", "forced_eos_token_id",
    "length_penalty", "max_length", "min_length", "no_repeat_ngram_size", "num_beam_groups", "num_beams",
    "num_return_sequences", "output_scores", "remove_invalid_values", "repetition_penalty", "return_dict_in_generate",
    "suppress_tokens", "temperature", "top_k", "top_p", "typical_p",
), "of generating text") | dict.fromkeys((
    "bos_token_id", "pad_token_id", "sep_token_id", "prefix", "tokenizer_class",
), "of the tokenizer; padding is attended like any token") | dict.fromkeys((
    "dtype", "torch_dtype",
), "storage; the caller chooses the dtype") | {"transformers_version": "history"}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Base of all configs: `from_json` and `from_dict` read one, and the constructor checks the type of every field."""

    FILE: ClassVar[str] = "config.json"             # in errors
    NETWORK: ClassVar[str] = "this network"         # in errors
    HARMLESS: ClassVar[dict[str, str]] = {}
    IMPLEMENTED: ClassVar[dict[str, tuple]] = {}
    RANGE: ClassVar[dict[str, tuple]] = {}          # field -> (least, most); else whole numbers from 1, and any other number
    # The field with one value per resolution, if any: a list of equal values of that length may stand for a single value.
    LEVELS: ClassVar[str] = ""

    def __post_init__(self):
        for field in fields(self):
            object.__setattr__(self, field.name, checked(field, getattr(self, field.name), self.FILE, self.RANGE))

    @classmethod
    def refusal(cls, fault):
        """A ValueError of a sentence that begins with the file."""
        return ValueError(f"{cls.FILE} {fault}")

    @classmethod
    def from_json(cls, text: str):
        """The config in a JSON text; a key or value that is not implemented is refused."""
        return cls.from_dict(parsed(text, cls.FILE))

    @classmethod
    def from_dict(cls, given: dict):
        """The config in a parsed JSON object."""
        given = cls.translated({key: value for key, value in given.items() if not key.startswith("_")})
        levels = given.get(cls.LEVELS)
        known = {field.name: field for field in fields(cls)}
        for key, value in given.items():
            if _is_repeated(value, levels) and typing.get_origin(known[key].type if key in known else None) is None:
                given[key] = value[0]
        for key, implemented in cls.IMPLEMENTED.items():
            if (value := given.get(key, implemented[0])) not in implemented:
                raise cls.refusal(f"sets {key} to {shown(value)}; only {implemented[0]!r} is implemented")
        if extra := sorted(given.keys() - known.keys() - cls.HARMLESS.keys() - cls.IMPLEMENTED.keys()):
            raise cls.refusal(f"sets {shown_list(extra)}, which {cls.NETWORK} here does not implement")
        if absent := [key for key, field in known.items() if field.default is MISSING and key not in given]:
            raise cls.refusal(f"does not set {', '.join(absent)}, which {cls.NETWORK} needs")
        return cls(**{key: given[key] for key in known if key in given})

    @classmethod
    def translated(cls, given: dict) -> dict:
        """The keys of a file as fields of this class; subclasses add what their files spell in another way."""
        return given


def parsed(text: str, file: str) -> dict:
    """The JSON object in a text; a ValueError names the file."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not a JSON object ({error})") from None
    if not isinstance(found, dict):
        raise ValueError(f"{file} is not a JSON object (it is a {type(found).__name__})")
    return found


def replaced(config, given, file: str, ranges: dict):
    """A copy of a dataclass with the values of a parsed JSON object; a ValueError names the file and the key.

    ranges: field -> (least, most), as `Config.RANGE`.
    """
    if not isinstance(given, dict):
        raise ValueError(f"{file} is {shown(given)}, not an object of settings")
    known = {field.name: field for field in fields(config)}
    if extra := sorted(given.keys() - known):
        raise ValueError(f"{file} sets {shown_list(extra)}, which is none of {', '.join(known)}")
    return replace(config, **{key: checked(known[key], value, file, ranges) for key, value in given.items()})


def checked(field, value, file: str, ranges: dict):
    """The value of a dataclass field, lists as tuples; a ValueError where it is not of the field's type."""
    limits = ranges.get(field.name)
    if (found := _converted(value, field.type, limits)) is WRONG:
        raise ValueError(f"{file} sets {field.name} to {shown(value)}, not to {_expected(field.type, limits)}")
    return found


def shown(value) -> str:
    """A value for an error: its repr, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def shown_list(keys) -> str:
    """Names for an error: the first eight."""
    return ", ".join(keys[:8]) + (f" and {len(keys) - 8} more" if len(keys) > 8 else "")


WRONG = object()


def _is_repeated(value, levels):
    """True for a list of equal values, one for each resolution."""
    return (isinstance(value, (list, tuple)) and isinstance(levels, (list, tuple)) and len(value) == len(levels) > 0
            and all(item == value[0] for item in value))


def _converted(value, kind, limits):
    """The value as the annotated type has it, lists as tuples, or `WRONG`."""
    if isinstance(kind, types.UnionType):
        found = (_converted(value, one, limits) for one in typing.get_args(kind))
        return next((one for one in found if one is not WRONG), WRONG)
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, (list, tuple)):
            return WRONG
        items = tuple(_converted(item, typing.get_args(kind)[0], limits) for item in value)
        return WRONG if any(item is WRONG for item in items) else items
    if kind is int:
        least, most = limits or (1, LARGEST)
        fits = type(value) is int and least <= value <= most
    elif kind is float:                             # JSON may write 1.0 as 1, and Python reads NaN and Infinity from JSON
        least, most = limits or (-math.inf, math.inf)
        fits = type(value) in (int, float) and math.isfinite(value) and least <= value <= most
    else:
        fits = type(value) is kind
    return value if fits else WRONG


def _expected(kind, limits):
    """The annotated type in words."""
    if isinstance(kind, types.UnionType):
        return " or ".join(_expected(one, limits) for one in typing.get_args(kind) if one is not types.NoneType)
    if typing.get_origin(kind) is tuple:
        return f"a list of which each is {_expected(typing.get_args(kind)[0], limits)}"
    bounds = f" from {limits[0]} to {limits[1]}" if limits else ""
    return {int: f"a whole number{bounds or f' from 1 to {LARGEST}'}", float: f"a number{bounds}", bool: "true or false",
            str: "a text"}[kind]
