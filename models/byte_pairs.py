"""Byte-level BPE, shared by CLIP's and Qwen's tokenizers: reading its files, and from a text to ids.

The files are `vocab.json` with `merges.txt`, or `tokenizer.json`. Standard library only.
"""

import heapq
from itertools import pairwise

from .config import shown
from .tokens import alternate, check_unicode, read, read_json, splitter


def byte_symbols():
    """{byte: the character for it in the vocabulary}, for all 256 bytes, in the order of the published vocabularies.

    A printable Latin-1 character is used for its own byte; the other 68 bytes, in order, get the characters from U+0100 on.
    """
    themselves = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in themselves]
    return {byte: chr(byte) for byte in themselves} | {byte: chr(256 + i) for i, byte in enumerate(others)}


class ByteLevelBPE:
    """A tokenizer's way from a text to ids. The steps in which tokenizers differ are `_normalise` and `_words`.

    specials: text -> (id, normalised); each is cut out of the text first, the normalised ones out of the normalised text.
    pairs: the `BytePairs` that turns a word into ids.
    """

    def __init__(self, specials, pairs):
        self._raw = {text: number for text, (number, normalised) in specials.items() if not normalised}
        self._normalised = {self._normalise(text): number for text, (number, normalised) in specials.items() if normalised}
        self._raw_splitter, self._normalised_splitter = splitter(self._raw), splitter(self._normalised)
        self._pairs = pairs

    def _normalise(self, text):
        """The text as its words are looked for."""
        raise NotImplementedError

    def _words(self, text):
        """The words of a normalised text."""
        raise NotImplementedError

    def encode(self, text):
        """The ids of a text of any length, with nothing put around it and no padding."""
        check_unicode(text)
        ids = []
        for part, is_special in alternate(self._raw_splitter, text):
            if is_special:
                ids.append(self._raw[part])
                continue
            for piece, is_normalised_special in alternate(self._normalised_splitter, self._normalise(part)):
                if is_normalised_special:
                    ids.append(self._normalised[piece])
                    continue
                for word in self._words(piece):
                    ids.extend(self._pairs(word))
        return ids


class BytePairs:
    """Word -> ids. `vocab`: token -> id. `merges`: pairs of tokens, in order of priority.

    end: a suffix that the last byte of each word has in the vocabulary. unknown: the id of a byte that is not in it.
    """

    def __init__(self, vocab, merges, *, end="", unknown=None):
        self.vocab, self.end, self.unknown = vocab, end, unknown
        self._symbols = byte_symbols()
        # (left id, right id) -> (rank, merged id); the lowest rank is merged first
        self._merges = {(vocab[a], vocab[b]): (rank, vocab[a + b]) for rank, (a, b) in enumerate(merges)}
        self._known = {}                                       # word -> ids, of words met before

    def __call__(self, word):
        """The ids of a word of at least one character."""
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
        symbols[-1] += self.end
        ids = [self.vocab.get(symbol, self.unknown) for symbol in symbols]
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


# ----------------------------------------------------------------------------------------------------------------- files

def read_model(folder, name, *, end=""):
    """(vocab, merges, whole) of a tokenizer's folder; whole is the parsed tokenizer.json, {} where it was not needed.

    name: of the tokenizer, in errors; end: the suffix that its tokenizer.json must state. A ValueError names the file.
    """
    if (folder / "vocab.json").exists() or (folder / "merges.txt").exists():
        source = folder / "vocab.json"
        vocab, merges, whole = read_json(source), _read_merges(folder / "merges.txt"), {}
    elif (folder / "tokenizer.json").exists():
        source = folder / "tokenizer.json"
        vocab, merges, whole = _read_single(source, name, end)
    else:
        raise ValueError(f"{folder} holds no tokenizer: neither vocab.json and merges.txt nor tokenizer.json")
    if not all(type(number) is int and number >= 0 for number in vocab.values()):
        raise ValueError(f"{source}: the vocabulary must map each token to a whole number")
    for a, b in merges:
        if unknown := next((token for token in (a, b, a + b) if token not in vocab), None):
            raise ValueError(f"{folder}: the merge {shown(a)} {shown(b)} needs the token {shown(unknown)}, which {source} "
                             "lacks")
    return vocab, merges, whole


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


def _read_single(path, name, end):
    """vocab, merges and the whole of a `tokenizer.json`; older ones write a merge as one string, not as a pair."""
    whole = read_json(path)
    model = whole.get("model")
    if not isinstance(model, dict) or model.get("type") != "BPE" or (model.get("end_of_word_suffix") or "") != end:
        suffix = f"the suffix {end}" if end else "no suffix"
        raise ValueError(f"{path} is not of a {name} tokenizer: its model must be a BPE with {suffix}")
    if not isinstance(model.get("vocab"), dict) or not isinstance(model.get("merges"), list):
        raise ValueError(f"{path}: its model has no vocab or no merges")
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    for pair in pairs:
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(token, str) for token in pair):
            raise ValueError(f"{path}: a merge must be two tokens, found {shown(pair)}")
    return model["vocab"], pairs, whole


def listed_tokens(folder, config, whole):
    """(file, [(id, token)]) of the special tokens that are listed with their ids, in the newest form that a folder has.

    config: of tokenizer_config.json. The list is in its `added_tokens_decoder`, or else in tokenizer.json.
    """
    if "added_tokens_decoder" in config:
        path = folder / "tokenizer_config.json"
        if not isinstance(config["added_tokens_decoder"], dict):
            raise ValueError(f"{path}: added_tokens_decoder must map ids to tokens")
        return path, list(config["added_tokens_decoder"].items())
    path, added = folder / "tokenizer.json", whole.get("added_tokens") or []
    if not isinstance(added, list) or not all(isinstance(token, dict) for token in added):
        raise ValueError(f"{path}: added_tokens must be a list of tokens with their ids")
    return path, [(token.get("id"), token) for token in added]


def numbered(listed, path):
    """{text: (id, normalised)} of the special tokens listed in a file."""
    specials = {}
    for number, token in listed:
        text, normalised = special(token, path)
        if not str(number).isdecimal():
            raise ValueError(f"{path}: the special token {shown(text)} has the id {shown(number)}, which is not a whole number")
        specials[text] = int(number), normalised
    return specials


def special(token, path):
    """(text, normalised) of a special token as files declare it: a plain string, or a dict with the text and its flags.

    normalised: it is looked for in the text as the tokenizer normalises it, not in the raw text.
    """
    token = {"content": token} if isinstance(token, str) else token
    if not isinstance(token, dict) or not isinstance(token.get("content"), str) or not token["content"]:
        raise ValueError(f"{path} declares a special token without a text: {shown(token)}")
    for flag in ("lstrip", "rstrip", "single_word"):
        if token.get(flag):
            raise ValueError(f"{path} sets {flag} on the token {shown(token['content'])}, which is not implemented")
    return token["content"], bool(token.get("normalized", False))
