"""CLIP's tokenizer: a prompt to token ids, from the vocabulary files that lie in a checkpoint. Standard library only.

Reads `tokenizer` of timbrooks/instruct-pix2pix, MudeHui/HQ-Edit and SD 1.5, `tokenizer` and `tokenizer_2` of
stabilityai/stable-diffusion-3-medium-diffusers, and the files that transformers writes for any of them: CLIP's byte-level BPE,
from `vocab.json` with `merges.txt`, or from `tokenizer.json`. The ids are those of the Hugging Face tokenizer, which repairs
neither mojibake nor HTML entities, unlike OpenAI's original. Text is classified by this Python's Unicode tables: characters
of newer versions of Unicode (Python 3.11 has 14) count as symbols.
"""

import unicodedata
from pathlib import Path

from .byte_pairs import ByteLevelBPE, BytePairs, listed_tokens, numbered, read_model, special
from .config import shown
from .tokens import kind, read_json

# ---------------------------------------------------------------------------------------------- from text to words

START, END = "<|startoftext|>", "<|endoftext|>"
ROLES = {                                                      # name in the files -> (name in this file, the usual token)
    "bos_token": ("start", START),
    "eos_token": ("end", END),
    "unk_token": ("unknown", END),
    "pad_token": ("pad", END),
}
CONTRACTIONS = ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d")


def normalise(text):
    """NFC, then lower case by single characters: a final sigma gets no special treatment, as in the reference."""
    return "".join([c.lower() for c in unicodedata.normalize("NFC", text)])


def words(text):
    """Split normalised text: contractions, runs of letters, single digits, runs of symbols; white space is dropped."""
    here = 0
    while here < len(text):
        start, first = here, kind(text[here])
        here += 1
        if first == " ":
            continue
        if first == "S" and (whole := next((s for s in (START, END) if text.startswith(s, start)), None)):
            # In the raw text it had capitals and was no special token. The published pattern still matches it as a whole
            # and cuts it into three, so that a symbol right after it does not join the last part.
            here = start + len(whole)
            yield from ("<|", whole[2:-2], "|>")
            continue
        if first == "S" and (short := next((c for c in CONTRACTIONS if text.startswith(c, start)), None)):
            here = start + len(short)
        elif first != "N":
            while here < len(text) and kind(text[here]) == first:
                here += 1
        yield text[start:here]


# ------------------------------------------------------------------------------------------- from words to ids


class CLIPTokenizer(ByteLevelBPE):
    """CLIP's byte-level BPE. Made by `from_folder`; then `tokenizer(prompts)` gives one row of ids for each prompt.

    `vocab`: token -> id. `merges`: pairs of tokens, in order of priority. `specials`: text -> (id, folded); each is cut out
    of the prompt first; folded means that capitals match too. `start`, `end`, `pad`, `unknown`: ids. `length`: ids in each
    row.
    """

    def __init__(self, vocab, merges, specials, *, start, end, pad, unknown, length):
        self.vocab, self.start, self.end, self.pad, self.length = vocab, start, end, pad, length
        super().__init__(specials, BytePairs(vocab, merges, end="</w>", unknown=unknown))

    @classmethod
    def from_folder(cls, folder):
        """Read a `tokenizer` folder of a checkpoint. A damaged or foreign one is a ValueError that names the file.

        The defaults are the special tokens and the 77 ids of every published CLIP.
        """
        folder = Path(folder)
        config_file = folder / "tokenizer_config.json"
        config = read_json(config_file) if config_file.exists() else {}
        if config.get("tokenizer_class", "CLIPTokenizer") not in ("CLIPTokenizer", "CLIPTokenizerFast"):
            raise ValueError(f"{config_file} is of a {shown(config['tokenizer_class'])}, not of a CLIPTokenizer")
        for side in ("padding_side", "truncation_side"):
            if config.get(side, "right") != "right":
                raise ValueError(f"{config_file} sets {side} to {shown(config[side])}; only 'right' is implemented")
        length = config.get("model_max_length", 77)
        if type(length) is not int or not 2 <= length <= 100_000:
            raise ValueError(
                f"{config_file} gives model_max_length {shown(length)}; set it to the text encoder's max_position_embeddings"
            )

        vocab, merges, whole = read_model(folder, "CLIP", end="</w>")
        specials, roles = _read_specials(folder, config, whole, vocab)
        return cls(vocab, merges, specials, **roles, length=length)

    def __call__(self, prompts):
        """A list of prompts to a list of rows, each of exactly `length` ids: start, text, end, padding.

        A prompt that is too long is cut; its row still ends with the end token.
        """
        if isinstance(prompts, str):
            raise TypeError("the tokenizer takes a list of prompts, not one string")
        rows = ([self.start, *self.encode(prompt)[:self.length - 2], self.end] for prompt in prompts)
        return [row + [self.pad] * (self.length - len(row)) for row in rows]

    def _normalise(self, text):
        return normalise(text)

    def _words(self, text):
        return words(text)


def _read_specials(folder, config, whole, vocab):
    """`(specials, roles)`: text -> (id, folded), and the ids of the four roles.

    The rules are those of transformers, which has written these files in several forms over the years. A list of tokens
    with ids (`added_tokens_decoder`, or in tokenizer.json) comes first. A token that is not in it is declared by its role,
    in special_tokens_map.json before tokenizer_config.json.
    """
    path, listed = listed_tokens(folder, config, whole)
    if "added_tokens_decoder" not in config:
        path = path if listed else folder / "tokenizer_config.json"
        if (folder / "special_tokens_map.json").exists():
            path = folder / "special_tokens_map.json"
            config = config | read_json(path)
        if (folder / "added_tokens.json").exists():
            named = {special(config.get(role) or usual, path)[0] for role, (_, usual) in ROLES.items()}
            added = read_json(folder / "added_tokens.json")
            listed = [(number, {"content": text, "normalized": text not in named}) for text, number in added.items()]
    specials = numbered(listed, path)
    decided = set(specials)

    def declare(token):
        text, folded = special(token, path)
        if text not in decided:
            if text not in vocab:
                raise ValueError(f"{path}: the special token {shown(text)} is not in the vocabulary")
            specials[text] = vocab[text], folded               # of two declarations the later one counts
        return specials[text][0]

    roles = {name: declare(config.get(role) or usual) for role, (name, usual) in ROLES.items()}
    for token in config.get("additional_special_tokens") or ():
        declare(token)
    return specials, roles
