"""Qwen's tokenizer: a prompt to token ids, from the vocabulary files that lie in a checkpoint. Standard library only.

Reads `tokenizer` of black-forest-labs/FLUX.2-klein-4B (that of Qwen3-4B), and the files that transformers writes for any
Qwen2Tokenizer: byte-level BPE, from `vocab.json` with `merges.txt`, or from `tokenizer.json`. The ids are those of the Hugging
Face tokenizer. Text is classified by this Python's Unicode tables: characters of newer versions of Unicode (Python 3.11 has
14) count as symbols.
"""

import unicodedata
from pathlib import Path

from .byte_pairs import ByteLevelBPE, BytePairs, byte_symbols, listed_tokens, numbered, read_model, special
from .config import shown
from .tokens import kind, read, read_json

# A prompt as FLUX.2 [klein] gives it to Qwen3: one turn of the user, and the answer begun with no thought in it. This is
# what the chat template of the published files makes of it with add_generation_prompt and enable_thinking off.
CHAT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
TURNS = ("<|im_start|>", "<|im_end|>")
PAD = "<|endoftext|>"
LENGTH = 512                                                   # ids in a row, as in the published pipeline

# How the published pattern splits a text; `words` does the same without a library of regular expressions.
PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
CONTRACTIONS = ("s", "t", "re", "ve", "m", "ll", "d")


# ---------------------------------------------------------------------------------------------- from text to words

def normalise(text):
    """The text in Unicode's NFC."""
    return unicodedata.normalize("NFC", text)


def words(text):
    """Split normalised text by `PATTERN`; the words, joined, are the text."""
    kinds, here = "".join([kind(character) for character in text]), 0
    while here < len(text):
        start, here = here, _end(text, kinds, here)
        yield text[start:here]


def _end(text, kinds, start):
    """The end of the word that begins at start: the alternatives of `PATTERN`, in their order."""
    if text[start] == "'":                                     # a contraction, in capitals too
        for short in CONTRACTIONS:
            if [c.casefold() for c in text[start + 1:start + 1 + len(short)]] == list(short):
                return start + 1 + len(short)
    first = start + (kinds[start] in "S " and text[start] not in "\r\n")
    if (stop := _run(kinds, first, "L")) > first:              # letters, after at most one sign or space
        return stop
    if kinds[start] == "N":
        return start + 1
    first = start + (text[start] == " ")
    if (stop := _run(kinds, first, "S")) > first:              # symbols, after at most one space, and the line ends behind
        while stop < len(text) and text[stop] in "\r\n":
            stop += 1
        return stop
    stop = _run(kinds, start, " ")
    last = max(text.rfind(end, start, stop) for end in "\r\n")
    if last >= 0:                                              # white space up to the last line end in it
        return last + 1
    # All of it at the end of the text; elsewhere its last character is left to the word that follows.
    return stop if stop == len(text) or stop == start + 1 else stop - 1


def _run(kinds, start, wanted):
    """The end of the run of one kind that begins at start; start where there is none."""
    while start < len(kinds) and kinds[start] == wanted:
        start += 1
    return start


# ------------------------------------------------------------------------------------------- from words to ids

class QwenTokenizer(ByteLevelBPE):
    """Qwen's byte-level BPE. Made by `from_folder`; then `tokenizer(prompts)` gives rows of ids, and their masks.

    `vocab`: token -> id. `merges`: pairs of tokens, in order of priority. `specials`: text -> (id, normalised); each is cut
    out of the text first, the normalised ones out of the normalised text. `pad`: an id.
    """

    def __init__(self, vocab, merges, specials, *, pad):
        self.vocab, self.pad = vocab, pad
        super().__init__(specials, BytePairs(vocab, merges))

    @classmethod
    def from_folder(cls, folder):
        """Read a `tokenizer` folder of a checkpoint. A damaged or foreign one is a ValueError that names the file."""
        folder = Path(folder)
        config_file = folder / "tokenizer_config.json"
        config = read_json(config_file) if config_file.exists() else {}
        kinds = ("Qwen2Tokenizer", "Qwen2TokenizerFast")
        if config.get("tokenizer_class", kinds[0]) not in kinds:
            raise ValueError(f"{config_file} is of a {shown(config['tokenizer_class'])}, not of a {kinds[0]}")
        for side in ("padding_side", "truncation_side"):
            if config.get(side, "right") != "right":
                raise ValueError(f"{config_file} sets {side} to {shown(config[side])}; only 'right' is implemented")
        for key in ("add_prefix_space", "add_bos_token", "add_eos_token", "split_special_tokens"):
            if config.get(key):
                raise ValueError(f"{config_file} sets {key}, which is not implemented")
        _check_template(folder, config)
        vocab, merges, whole = read_model(folder, "Qwen")
        if whole:
            _check_single(folder / "tokenizer.json", whole)
        if absent := [symbol for symbol in byte_symbols().values() if symbol not in vocab]:
            raise ValueError(f"{folder}: the vocabulary lacks {len(absent)} of the 256 bytes, the first {shown(absent[0])}")
        specials, pad = _read_specials(folder, config, whole, vocab)
        return cls(vocab, merges, specials, pad=pad)

    def __call__(self, prompts, length=LENGTH):
        """A list of prompts to (rows, masks), lists of `length` numbers: ids, and 1 for a token and 0 for padding behind.

        Each prompt is put into the chat of `CHAT`. One that is too long is cut at its end, so that the end of the chat is
        missing, as in the published pipeline.
        """
        if isinstance(prompts, str):
            raise TypeError("the tokenizer takes a list of prompts, not one string")
        rows = [self.encode(CHAT.format(prompt))[:length] for prompt in prompts]
        return ([row + [self.pad] * (length - len(row)) for row in rows],
                [[1] * len(row) + [0] * (length - len(row)) for row in rows])

    def count(self, prompt):
        """The number of ids of a prompt in its chat, uncut."""
        return len(self.encode(CHAT.format(prompt)))

    def _normalise(self, text):
        return normalise(text)

    def _words(self, text):
        return words(text)


def _check_template(folder, config):
    """A ValueError where a stored chat template is not of the kind that `CHAT` is made by."""
    path, template = folder / "tokenizer_config.json", config.get("chat_template")
    if (folder / "chat_template.jinja").exists():
        path = folder / "chat_template.jinja"
        template = read(path)
    if template is not None and not (isinstance(template, str) and all(
            part in template for part in (*TURNS, "enable_thinking", "<think>"))):
        raise ValueError(f"{path}: the chat template is not Qwen3's, with {TURNS[0]} and enable_thinking")


def _check_single(path, whole):
    """A ValueError where a `tokenizer.json` splits or merges text in another way."""
    steps = whole.get("pre_tokenizer")
    steps = steps.get("pretokenizers") if isinstance(steps, dict) else None
    steps = steps if isinstance(steps, list) else []
    patterns = [step.get("pattern") for step in steps if isinstance(step, dict) and step.get("type") == "Split"]
    if patterns != [{"Regex": PATTERN}]:
        raise ValueError(f"{path} splits text by {shown(patterns)}, not by Qwen's pattern")
    if whole.get("normalizer") != {"type": "NFC"}:
        raise ValueError(f"{path} sets normalizer to {shown(whole.get('normalizer'))}; only NFC is implemented")
    for key in ("ignore_merges", "byte_fallback", "dropout", "continuing_subword_prefix"):
        if whole["model"].get(key):
            raise ValueError(f"{path} sets {key}, which is not implemented")


def _read_specials(folder, config, whole, vocab):
    """`(specials, pad)`: text -> (id, normalised), and the id of the padding.

    The list with ids is in tokenizer_config.json, in added_tokens.json, which has the ids alone, or in tokenizer.json.
    """
    added, single = folder / "added_tokens.json", folder / "tokenizer.json"
    if "added_tokens_decoder" not in config and not whole and added.exists():
        path, listed = added, [(number, text) for text, number in read_json(added).items()]
    else:
        needed = "added_tokens_decoder" not in config and not whole and single.exists()
        path, listed = listed_tokens(folder, config, read_json(single) if needed else whole)
    specials = numbered(listed, path)
    if "pad_token" not in config and (folder / "special_tokens_map.json").exists():
        config = config | read_json(folder / "special_tokens_map.json")
    pad, _ = special(config.get("pad_token") or PAD, folder / "tokenizer_config.json")
    for text in (*TURNS, pad):
        if text not in specials:
            if text not in vocab:
                raise ValueError(f"{folder} has no id for the special token {shown(text)}")
            specials[text] = vocab[text], False
    return specials, specials[pad][0]
