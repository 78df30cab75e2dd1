"""CLIP's tokenizer: a prompt to token ids, from the vocabulary files that lie in a checkpoint. Standard library only.

Reads `tokenizer` of timbrooks/instruct-pix2pix, MudeHui/HQ-Edit and SD 1.5, `tokenizer` and `tokenizer_2` of
stabilityai/stable-diffusion-3-medium-diffusers, and the files that transformers writes for any of them: CLIP's byte-level BPE,
from `vocab.json` with `merges.txt`, or from `tokenizer.json`. The ids are those of the Hugging Face tokenizer, which repairs
neither mojibake nor HTML entities, unlike OpenAI's original. Text is classified by this Python's Unicode tables: characters
of newer versions of Unicode (Python 3.11 has 14) count as symbols.
"""

import heapq
import unicodedata
from itertools import pairwise
from pathlib import Path

from .config import shown
from .tokens import WHITE_SPACE, alternate, check_unicode, read, read_json, splitter

# ---------------------------------------------------------------------------------------------- from text to words

START, END = "<|startoftext|>", "<|endoftext|>"
ROLES = {                                                      # name in the files -> (name in this file, the usual token)
    "bos_token": ("start", START),
    "eos_token": ("end", END),
    "unk_token": ("unknown", END),
    "pad_token": ("pad", END),
}
CONTRACTIONS = ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d")


def byte_symbols():
    """{byte: the character for it in the vocabulary}, for all 256 bytes, in the order of the published vocabulary.

    A printable Latin-1 character is used for its own byte; the other 68 bytes, in order, get the characters from U+0100 on.
    """
    themselves = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in themselves]
    return {byte: chr(byte) for byte in themselves} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def normalise(text):
    """NFC, then lower case by single characters: a final sigma gets no special treatment, as in the reference."""
    return "".join([c.lower() for c in unicodedata.normalize("NFC", text)])


def _kind(character):
    if character in WHITE_SPACE:
        return " "
    major = unicodedata.category(character)[0]
    return major if major in "LN" else "S"                     # letter, number, or symbol: anything else


def words(text):
    """Split normalised text: contractions, runs of letters, single digits, runs of symbols; white space is dropped."""
    here = 0
    while here < len(text):
        start, kind = here, _kind(text[here])
        here += 1
        if kind == " ":
            continue
        if kind == "S" and (special := next((s for s in (START, END) if text.startswith(s, start)), None)):
            # In the raw text it had capitals and was no special token. The published pattern still matches it as a whole
            # and cuts it into three, so that a symbol right after it does not join the last part.
            here = start + len(special)
            yield from ("<|", special[2:-2], "|>")
            continue
        if kind == "S" and (short := next((c for c in CONTRACTIONS if text.startswith(c, start)), None)):
            here = start + len(short)
        elif kind != "N":
            while here < len(text) and _kind(text[here]) == kind:
                here += 1
        yield text[start:here]


# ------------------------------------------------------------------------------------------- from words to ids


class CLIPTokenizer:
    """CLIP's byte-level BPE. Made by `from_folder`; then `tokenizer(prompts)` gives one row of ids for each prompt.

    `vocab`: token -> id. `merges`: pairs of tokens, in order of priority. `specials`: text -> (id, folded); each is cut out
    of the prompt first; folded means that capitals match too. `start`, `end`, `pad`, `unknown`: ids. `length`: ids in each
    row.
    """

    def __init__(self, vocab, merges, specials, *, start, end, pad, unknown, length):
        self.vocab, self.start, self.end, self.pad, self.length = vocab, start, end, pad, length
        self._raw = {text: number for text, (number, folded) in specials.items() if not folded}
        self._folded = {normalise(text): number for text, (number, folded) in specials.items() if folded}
        self._raw_splitter, self._folded_splitter = splitter(self._raw), splitter(self._folded)
        self._symbols = byte_symbols()
        self._unknown = unknown
        # (left id, right id) -> (rank, merged id); the lowest rank is merged first
        self._merges = {(vocab[a], vocab[b]): (rank, vocab[a + b]) for rank, (a, b) in enumerate(merges)}
        self._known = {}                                       # word -> ids, of words met before

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

        listed = []                                            # special tokens that stand beside the vocabulary
        if (folder / "vocab.json").exists() or (folder / "merges.txt").exists():
            source = folder / "vocab.json"
            vocab, merges = read_json(source), _read_merges(folder / "merges.txt")
        elif (folder / "tokenizer.json").exists():
            source = folder / "tokenizer.json"
            vocab, merges, listed = _read_single(source)
        else:
            raise ValueError(f"{folder} holds no tokenizer: neither vocab.json and merges.txt nor tokenizer.json")
        if not all(type(number) is int and number >= 0 for number in vocab.values()):
            raise ValueError(f"{source}: the vocabulary must map each token to a whole number")
        for a, b in merges:
            if unknown := next((token for token in (a, b, a + b) if token not in vocab), None):
                raise ValueError(f"{folder}: the merge {shown(a)} {shown(b)} needs the token {shown(unknown)}, which {source} "
                                 "lacks")
        specials, roles = _read_specials(folder, config, listed, vocab)
        return cls(vocab, merges, specials, **roles, length=length)

    def __call__(self, prompts):
        """A list of prompts to a list of rows, each of exactly `length` ids: start, text, end, padding.

        A prompt that is too long is cut; its row still ends with the end token.
        """
        if isinstance(prompts, str):
            raise TypeError("the tokenizer takes a list of prompts, not one string")
        rows = ([self.start, *self.encode(prompt)[:self.length - 2], self.end] for prompt in prompts)
        return [row + [self.pad] * (self.length - len(row)) for row in rows]

    def encode(self, text):
        """The ids of a text of any length, without start, end and padding."""
        check_unicode(text)
        ids = []
        for part, is_special in alternate(self._raw_splitter, text):
            if is_special:
                ids.append(self._raw[part])
                continue
            for piece, is_folded_special in alternate(self._folded_splitter, normalise(part)):
                if is_folded_special:
                    ids.append(self._folded[piece])
                    continue
                for word in words(piece):
                    ids.extend(self._word(word))
        return ids

    def _word(self, word):
        if word not in self._known:
            ids = self._merge(word)
            if len(word) > 64 or len(self._known) >= 65536:    # bounded memory for any text
                return ids
            self._known[word] = ids
        return self._known[word]

    def _merge(self, word):
        """Byte-pair encoding: merge the pair of the lowest rank, of equals the leftmost, until no pair can be merged.

        The symbols are a linked list and the candidates a heap, so that a word of n bytes takes n log n steps. A candidate
        stays in the heap when the merge of a neighbour makes it invalid, and is skipped when it is taken out.
        """
        symbols = [self._symbols[byte] for byte in word.encode()]
        symbols[-1] += "</w>"
        ids = [self.vocab.get(symbol, self._unknown) for symbol in symbols]
        before, after = list(range(-1, len(ids) - 1)), [*range(1, len(ids)), -1]
        heap = [(self._merges[pair][0], i) for i, pair in enumerate(pairwise(ids)) if pair in self._merges]
        heapq.heapify(heap)
        while heap:
            rank, i = heapq.heappop(heap)
            j = after[i]
            urgency, merged = self._merges.get((ids[i], ids[j]), (None, None)) if j >= 0 else (None, None)
            if urgency != rank:
                continue
            ids[i], ids[j], after[i] = merged, None, after[j]
            if after[i] >= 0:
                before[after[i]] = i
            for left, right in ((before[i], i), (i, after[i])):
                if left >= 0 and right >= 0 and (ids[left], ids[right]) in self._merges:
                    heapq.heappush(heap, (self._merges[ids[left], ids[right]][0], left))
        return [number for number in ids if number is not None]


def _read_specials(folder, config, listed, vocab):
    """`(specials, roles)`: text -> (id, folded), and the ids of the four roles.

    The rules are those of transformers, which has written these files in several forms over the years. A list of tokens
    with ids (`added_tokens_decoder`, or in tokenizer.json) comes first. A token that is not in it is declared by its role,
    in special_tokens_map.json before tokenizer_config.json.
    """
    path = folder / ("tokenizer.json" if listed else "tokenizer_config.json")
    if "added_tokens_decoder" in config:
        path = folder / "tokenizer_config.json"
        if not isinstance(config["added_tokens_decoder"], dict):
            raise ValueError(f"{path}: added_tokens_decoder must map ids to tokens")
        listed = list(config["added_tokens_decoder"].items())
    else:
        if (folder / "special_tokens_map.json").exists():
            path = folder / "special_tokens_map.json"
            config = config | read_json(path)
        if (folder / "added_tokens.json").exists():
            named = {_special(config.get(role) or usual, path)[0] for role, (_, usual) in ROLES.items()}
            added = read_json(folder / "added_tokens.json")
            listed = [(number, {"content": text, "normalized": text not in named}) for text, number in added.items()]
    specials = {}
    for number, token in listed:
        text, folded = _special(token, path)
        if not str(number).isdecimal():
            raise ValueError(f"{path}: the special token {shown(text)} has the id {shown(number)}, which is not a whole number")
        specials[text] = int(number), folded
    decided = set(specials)

    def declare(token):
        text, folded = _special(token, path)
        if text not in decided:
            if text not in vocab:
                raise ValueError(f"{path}: the special token {shown(text)} is not in the vocabulary")
            specials[text] = vocab[text], folded               # of two declarations the later one counts
        return specials[text][0]

    roles = {name: declare(config.get(role) or usual) for role, (name, usual) in ROLES.items()}
    for token in config.get("additional_special_tokens") or ():
        declare(token)
    return specials, roles


def _special(token, path):
    """(text, folded) of a special token as files declare it: a plain string, or a dict with the text and its flags."""
    token = {"content": token} if isinstance(token, str) else token
    if not isinstance(token, dict) or not isinstance(token.get("content"), str) or not token["content"]:
        raise ValueError(f"{path} declares a special token without a text: {shown(token)}")
    for flag in ("lstrip", "rstrip", "single_word"):
        if token.get(flag):
            raise ValueError(f"{path} sets {flag} on the token {shown(token['content'])}, which is not implemented")
    return token["content"], bool(token.get("normalized", False))


def _read_merges(path):
    """The pairs of tokens in merges.txt, one on each line after `#version`. Other lines that begin with # are merges too."""
    pairs = []
    for number, line in enumerate(read(path).split("\n"), start=1):
        if not line or line.startswith("#version"):
            continue
        pair = tuple(line.split(" "))
        if len(pair) != 2:
            raise ValueError(f"{path}, line {number}: expected two tokens, found {shown(line)}")
        pairs.append(pair)
    return pairs


def _read_single(path):
    """vocab, merges and special tokens of a `tokenizer.json`; older ones write a merge as one string, not as a pair."""
    found = read_json(path)
    model = found.get("model")
    if not isinstance(model, dict) or model.get("type") != "BPE" or model.get("end_of_word_suffix") != "</w>":
        raise ValueError(f"{path} is not of a CLIP tokenizer: its model must be a BPE with the suffix </w>")
    if not isinstance(model.get("vocab"), dict) or not isinstance(model.get("merges"), list):
        raise ValueError(f"{path}: its model has no vocab or no merges")
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    for pair in pairs:
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(token, str) for token in pair):
            raise ValueError(f"{path}: a merge must be two tokens, found {shown(pair)}")
    added = found.get("added_tokens") or []
    if not isinstance(added, list) or not all(isinstance(token, dict) for token in added):
        raise ValueError(f"{path}: added_tokens must be a list of tokens with their ids")
    return model["vocab"], pairs, [(token.get("id"), token) for token in added]
