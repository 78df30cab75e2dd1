"""T5's tokenizer: a prompt to token ids, from the vocabulary files that lie in a checkpoint. Standard library only.

Reads `tokenizer_3` of stabilityai/stable-diffusion-3-medium-diffusers, and the files that transformers writes for any T5: a
unigram model, from `tokenizer.json` or from `spiece.model`. The ids are those of the Hugging Face tokenizer.
"""

import base64
import math
import re
import struct
import unicodedata
from functools import partial
from pathlib import Path

from .config import shown
from .tokens import WHITE_SPACE, alternate, check_unicode, read_bytes, read_json, splitter

# ---------------------------------------------------------------------------------------- from text to normalised text

SPACE = "\u2581"                                               # the space in pieces; every word begins with it
_SPACES = "".join(sorted(WHITE_SPACE))
_SPACE_RUN = re.compile(f"[{re.escape(_SPACES)}]+")
_WORD = re.compile(f"{SPACE}[^{SPACE}]*")

# Exceptions to the general categories in the rules for grapheme clusters (Unicode annex 29): characters that join the
# previous one and are no marks, marks that do not join, and characters that the next one joins.
JOINING = frozenset("\u0e33\u0eb3\u200c\u200d\uff9e\uff9f") | {chr(c) for c in (*range(0x1F3FB, 0x1F400),
                                                                               *range(0xE0020, 0xE0080))}
APART = frozenset("\u102b\u102c\u1038\u1062\u1063\u1064\u1067\u1068\u1069\u106a\u106b\u106c\u106d\u1083\u1087\u1088\u1089"
                  "\u108a\u108b\u108c\u108f\u109a\u109b\u109c\u1a61\u1a63\u1a64\uaa7b\uaa7d\U00011720\U00011721")
PREPENDED = frozenset("\u0600\u0601\u0602\u0603\u0604\u0605\u06dd\u070f\u0890\u0891\u08e2\u0d4e\U000110bd\U000110cd"
                      "\U000111c2\U000111c3\U000113d1\U0001193f\U00011941\U00011a84\U00011a85\U00011a86\U00011a87"
                      "\U00011a88\U00011a89\U00011d46\U00011f02")


def _joins(c):
    return c in JOINING or unicodedata.category(c)[0] == "M" and c not in APART


def _is_control(c):
    return unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp") and c not in PREPENDED and c not in JOINING


def clusters(text):
    """Split text into grapheme clusters, as far as `Charsmap` can tell the difference.

    Emoji sequences, flags, Hangul and Indic conjuncts stay in parts: as a whole they are longer than the five bytes up to
    which a cluster is looked up. (Rare cases differ, such as a trade mark sign with a Latin accent that follows an emoji
    and a joiner.)
    """
    start = 0
    for here in range(1, len(text)):
        before, after = text[here - 1], text[here]
        if after < "\u0300" and before not in PREPENDED:       # the common case: no character below U+0300 joins
            together = after == "\n" and before == "\r"
        elif _is_control(before) or _is_control(after):
            together = False
        else:
            together = _joins(after) or before in PREPENDED
        if not together:
            yield text[start:here]
            start = here
    if text:
        yield text[start:]


class Charsmap:
    """The `precompiled_charsmap` of a SentencePiece model: replacements by the bytes that they replace.

    The format: the length of a double-array trie in bytes, the trie's units, all little-endian uint32, and then the
    replacements in UTF-8, each ended by a zero byte. A unit holds the byte that leads to it (its low 8 bits), whether a
    key ends here (bit 8), and the offset of its children, relative to its own index: the child of byte b is at offset ^ b,
    and the unit at offset ^ 0 holds the place where the key's replacement begins.
    """

    def __init__(self, data, path):
        self._path = path
        size = int.from_bytes(data[:4], "little")
        if len(data) < 4 or size % 4 or not 0 < size <= len(data) - 4:
            raise self._damaged()
        self._units = struct.unpack(f"<{size // 4}I", data[4:4 + size])
        self._replacements = data[4 + size:]
        self._known = {}                                       # cluster -> replacement, of short clusters met before

    def _damaged(self):
        return ValueError(f"{self._path}: its precompiled_charsmap is damaged")

    def __call__(self, text):
        """Replace the keys of the map in a text.

        SentencePiece takes the longest key at each place. This follows the Hugging Face tokenizer (tokenizers up to 0.23),
        which SD3's pipeline uses: a cluster of at most five bytes becomes the replacement of the *shortest* key at its
        start, so that a second accent is lost; a longer cluster is replaced character by character.
        """
        return "".join([self._cluster(cluster) for cluster in clusters(text)])

    def _cluster(self, cluster):
        if cluster in self._known:
            return self._known[cluster]
        whole = self._find(cluster.encode()) if len(cluster) == 1 or len(cluster.encode()) < 6 else None
        if whole is None:
            whole = "".join([self._cluster(c) for c in cluster]) if len(cluster) > 1 else cluster
        if len(cluster) <= 5 and len(self._known) < 65536:     # bounded memory for any text
            self._known[cluster] = whole
        return whole

    def _find(self, key):
        """The replacement for the shortest beginning of `key` that the trie has, or None."""
        here = _offset(self._units[0])
        for byte in key:
            here ^= byte
            if byte == 0 or here >= len(self._units) or self._units[here] & 0x800000FF != byte:
                return None
            unit = self._units[here]
            here ^= _offset(unit)
            if unit & 0x100:
                return self._replacement(here)
        return None

    def _replacement(self, here):
        if here >= len(self._units):
            raise self._damaged()
        begin = self._units[here] & 0x7FFFFFFF
        end = self._replacements.find(b"\0", begin)
        try:
            return self._replacements[begin:end if end >= 0 else None].decode()
        except UnicodeDecodeError:
            raise self._damaged() from None


def _offset(unit):
    return unit >> 10 << ((unit & 0x200) >> 6)                 # bit 9: the offset is in units of 256


def _strip_right(text):
    return text.rstrip(_SPACES)


def _one_for_many_spaces(text, one=SPACE):
    return re.sub(" {2,}", one, text)


# --------------------------------------------------------------------------------------------- from text to ids

UNKNOWN_PENALTY = 10.0                                         # the score of an unknown character: the worst piece's minus this


class T5Tokenizer:
    """T5's unigram tokenizer. Made by `from_folder`; then `tokenizer(prompts)` gives one row of ids for each prompt.

    `pieces`: (piece, score) by id, a score being a log probability. `added`: text -> (id, strips left, strips right);
    each is cut out of the prompt first, with the white space on the sides that it strips. `steps`: the functions that
    normalise a text, in order. `splits`: True if any white space separates words, not the space alone. `unknown`, `end`,
    `pad`: ids.
    """

    def __init__(self, pieces, added, steps, *, splits, unknown, end, pad):
        self.end, self.pad, self.unknown = end, pad, unknown
        self.vocab = {piece: number for number, (piece, _) in enumerate(pieces)}
        self._pieces = {piece: (number, pieces[number][1]) for piece, number in self.vocab.items()}
        self._longest = max(map(len, self._pieces))
        self._unknown_score = min(score for _, score in pieces) - UNKNOWN_PENALTY
        self._added, self._splitter = added, splitter(added)
        self._steps, self._splits = steps, splits
        self._known = {}                                       # word -> ids, of words met before

    @classmethod
    def from_folder(cls, folder):
        """Read a `tokenizer_3` folder of a checkpoint. A damaged or foreign one is a ValueError that names the file.

        `tokenizer.json` is complete; without it `spiece.model` is read, which gives the same ids for a published T5.
        """
        folder = Path(folder)
        config_file = folder / "tokenizer_config.json"
        config = read_json(config_file) if config_file.exists() else {}
        if config.get("tokenizer_class", "T5Tokenizer") not in ("T5Tokenizer", "T5TokenizerFast"):
            raise ValueError(f"{config_file} is of a {shown(config['tokenizer_class'])}, not of a T5Tokenizer")
        for side in ("padding_side", "truncation_side"):
            if config.get(side, "right") != "right":
                raise ValueError(f"{config_file} sets {side} to {shown(config[side])}; only 'right' is implemented")
        if "added_tokens_decoder" not in config and (folder / "special_tokens_map.json").exists():
            config = config | read_json(folder / "special_tokens_map.json")

        if (folder / "tokenizer.json").exists():
            source = folder / "tokenizer.json"
            pieces, unknown, listed, steps, splits = _read_unigram(source)
        elif (folder / "spiece.model").exists():
            source, splits = folder / "spiece.model", False
            pieces, unknown, listed, steps = _read_sentencepiece(source, config.get("extra_ids", 100))
        else:
            raise ValueError(f"{folder} holds no tokenizer: neither tokenizer.json nor spiece.model")
        if "added_tokens_decoder" in config:                   # replaces the other lists of added tokens
            listed = config["added_tokens_decoder"]
            if not isinstance(listed, dict):
                raise ValueError(f"{config_file}: added_tokens_decoder must map ids to tokens")
            source, listed = config_file, list(listed.items())

        added = {}
        for number, token in listed:
            text = _token_text(token, source)
            if not str(number).isdecimal():
                raise ValueError(f"{source}: the token {shown(text)} has the id {shown(number)}, which is not a whole number")
            flags = token if isinstance(token, dict) else {}
            for flag in ("single_word", "normalized"):
                if flags.get(flag):
                    raise ValueError(f"{source} sets {flag} on the token {shown(text)}, which is not implemented")
            added[text] = int(number), bool(flags.get("lstrip")), bool(flags.get("rstrip"))
        numbers = {piece: number for number, (piece, _) in enumerate(pieces)}

        def declare(token):
            text = _token_text(token, folder / "tokenizer_config.json")
            if text not in added and text not in numbers:
                raise ValueError(f"{folder}: the special token {shown(text)} is not in the vocabulary")
            added.setdefault(text, (numbers.get(text), False, False))
            return added[text][0]

        end, pad = (declare(config.get(role) or usual) for role, usual in (("eos_token", "</s>"), ("pad_token", "<pad>")))
        for token in (config.get("unk_token") or pieces[unknown][0], *(config.get("additional_special_tokens") or ())):
            declare(token)
        return cls(pieces, added, steps, splits=splits, unknown=unknown, end=end, pad=pad)

    def __call__(self, prompts, length=256):
        """A list of prompts to a list of rows, each of exactly `length` ids: text, end, padding.

        A prompt that is too long is cut; its row still ends with the end token.
        """
        if isinstance(prompts, str):
            raise TypeError("the tokenizer takes a list of prompts, not one string")
        if length < 1:
            raise ValueError(f"a row of {length} ids has no room for the end token; ask for at least 1")
        rows = ([*self.encode(prompt)[:length - 1], self.end] for prompt in prompts)
        return [row + [self.pad] * (length - len(row)) for row in rows]

    def count(self, text):
        """The number of ids of the text, with the end token."""
        return len(self.encode(text)) + 1

    def encode(self, text):
        """The ids of a text of any length, without the end token."""
        check_unicode(text)
        ids, strip_left = [], False
        parts = alternate(self._splitter, text)               # text, added token, text, ..., text
        for place, (part, is_added) in enumerate(parts):
            if is_added:
                number, _, strip_left = self._added[part]
                ids.append(number)
                continue
            if strip_left:
                part = part.lstrip(_SPACES)
            if place + 1 < len(parts) and self._added[parts[place + 1][0]][1]:
                part = part.rstrip(_SPACES)
            for word in self._words(part):
                ids.extend(self._word(word))
        return ids

    def _words(self, text):
        """Normalise, then split before each space, which becomes `SPACE`; the first word gets one if it has none."""
        for step in self._steps:
            text = step(text)
        for part in _SPACE_RUN.split(text) if self._splits else (text,):
            if part:
                part = part.replace(" ", SPACE)
                yield from _WORD.findall(part if part.startswith(SPACE) else SPACE + part)

    def _word(self, word):
        if word not in self._known:
            ids = self._best(word)
            if len(word) > 64 or len(self._known) >= 65536:    # bounded memory for any text
                return ids
            self._known[word] = ids
        return self._known[word]

    def _best(self, word):
        """The ids of the pieces that make up `word` with the highest sum of scores, by Viterbi; of equals the first found.

        A character that is no piece may count as unknown; neighbouring unknowns become one id.
        """
        size = len(word)
        score = [0.0] + [-math.inf] * size                     # by place: the score of the best path to it
        arrived = [None] * (size + 1)                          # by place: (start of the path's last piece, that piece's id)
        for here in range(size):
            alone = False                                      # True if the character at this place is a piece
            for there in range(here + 1, min(here + self._longest, size) + 1):
                number, gain = self._pieces.get(word[here:there], (None, 0.0))
                if number is None:
                    continue
                alone = alone or there == here + 1
                if arrived[there] is None or score[here] + gain > score[there]:
                    score[there], arrived[there] = score[here] + gain, (here, number)
            if not alone and (arrived[here + 1] is None or score[here] + self._unknown_score > score[here + 1]):
                score[here + 1], arrived[here + 1] = score[here] + self._unknown_score, (here, self.unknown)
        ids, place = [], size
        while place:
            place, number = arrived[place]
            if not (ids and number == ids[-1] == self.unknown):
                ids.append(number)
        return ids[::-1]


def _token_text(token, path):
    """The text of a token as files declare it: a plain string, or a dict with the text and its flags."""
    text = token.get("content") if isinstance(token, dict) else token
    if not isinstance(text, str) or not text:
        raise ValueError(f"{path} declares a token without a text: {shown(token)}")
    return text


def _check_pieces(pieces, unknown, path):
    """Return `pieces` unchanged; raise ValueError unless each is a text with a finite score."""
    for piece in pieces:
        if (not isinstance(piece, (list, tuple)) or len(piece) != 2 or not isinstance(piece[0], str)
                or type(piece[1]) not in (int, float) or not math.isfinite(piece[1])):
            raise ValueError(f"{path}: a piece must be a text and its score, found {shown(piece)}")
    if type(unknown) is not int or not 0 <= unknown < len(pieces):
        raise ValueError(f"{path}: unk_id {shown(unknown)} is not the id of a piece")
    return pieces


def _read_unigram(path):
    """(pieces, unknown id, added tokens as (id, token), normalising steps, splits) of a `tokenizer.json`."""
    found = read_json(path)
    model = found.get("model")
    if not isinstance(model, dict) or model.get("type") != "Unigram":
        raise ValueError(f"{path} is not of a T5 tokenizer: its model must be a Unigram")
    if not isinstance(model.get("vocab"), list):
        raise ValueError(f"{path}: its model has no vocab")
    if model.get("byte_fallback"):
        raise ValueError(f"{path} sets byte_fallback, which is not implemented")
    pieces = _check_pieces(model["vocab"], model.get("unk_id"), path)
    added = found.get("added_tokens") or []
    if not isinstance(added, list) or not all(isinstance(token, dict) for token in added):
        raise ValueError(f"{path}: added_tokens must be a list of tokens with their ids")

    splits, metaspace = False, found.get("pre_tokenizer")
    if isinstance(metaspace, dict) and metaspace.get("type") == "Sequence":        # as transformers 5 writes it
        first, *rest = metaspace.get("pretokenizers") or [None]
        splits, metaspace = first == {"type": "WhitespaceSplit"}, rest[0] if len(rest) == 1 else None
        metaspace = metaspace if splits else None
    if not isinstance(metaspace, dict) or metaspace.get("type") != "Metaspace":
        raise ValueError(f"{path} has another pre_tokenizer than T5's, which is Metaspace, with WhitespaceSplit or alone")
    for key, usual in (("replacement", SPACE), ("prepend_scheme", "always"), ("add_prefix_space", True), ("split", True)):
        if metaspace.get(key, usual) != usual:
            raise ValueError(f"{path}: its pre_tokenizer sets {key} to {shown(metaspace[key])}; only {usual!r} is implemented")
    steps = [_read_step(step, path) for step in _sequence(found.get("normalizer"), "normalizers")]
    return pieces, model["unk_id"], [(token.get("id"), token) for token in added], steps, splits


def _sequence(part, key):
    """The members of a Sequence of `tokenizer.json`; of a single part a list of it, of None an empty list."""
    if isinstance(part, dict) and part.get("type") == "Sequence" and isinstance(part.get(key), list):
        return part[key]
    return [] if part is None else [part]


def _read_step(step, path):
    """One normaliser of a `tokenizer.json` as a function from text to text."""
    kind = step.get("type") if isinstance(step, dict) else None
    if kind == "Precompiled":
        try:
            return Charsmap(base64.b64decode(step.get("precompiled_charsmap"), validate=True), path)
        except (ValueError, TypeError):
            raise ValueError(f"{path}: its precompiled_charsmap is damaged") from None
    if kind == "Strip" and step.get("strip_right") is True and step.get("strip_left") is False:
        return _strip_right
    if kind == "Replace" and step.get("pattern") == {"Regex": " {2,}"} and step.get("content") in (" ", SPACE):
        return partial(_one_for_many_spaces, one=step["content"])
    raise ValueError(f"{path} has a normalizer of type {shown(kind)} that is not among T5's")


NORMAL, UNKNOWN, CONTROL = 1, 2, 3                             # the kinds of piece in T5's spiece.model


def _read_sentencepiece(path, extra_ids):
    """(pieces, unknown id, added tokens as (id, token), normalising steps) of a `spiece.model`.

    Fields of SentencePiece's ModelProto: 1 is a piece (1 its text, 2 its score, 3 its kind); 2 the training (3 the type of
    model, where 1 is unigram; 24 true if a space ends a word); 3 the normalisation (2 the charsmap; 3, 4 and 5 true to put a
    space in front, to remove extra spaces, and to write a space as `SPACE`). The sentinels `<extra_id_99>` to `<extra_id_0>`
    are not in the file; their ids follow those of the pieces.
    """
    if type(extra_ids) is not int or not 0 <= extra_ids <= 100_000:
        raise ValueError(f"{path.parent / 'tokenizer_config.json'} gives extra_ids {shown(extra_ids)}, not a whole number")
    pieces, unknown, trained, normalised = [], None, {}, {}
    try:
        for number, value in _protobuf(read_bytes(path)):
            if number == 1:
                fields = dict(_protobuf(value))
                kind = fields.get(3, NORMAL)
                if kind not in (NORMAL, UNKNOWN, CONTROL):
                    raise ValueError(f"a piece of kind {kind}, which a T5 does not have")
                if kind == UNKNOWN:
                    unknown = len(pieces)
                pieces.append((fields[1].decode(), struct.unpack("<f", fields.get(2, bytes(4)))[0]))
            elif number == 2:
                trained = dict(_protobuf(value))
            elif number == 3:
                normalised = dict(_protobuf(value))
        charsmap = bytes(normalised.get(2, b""))
    except (ValueError, KeyError, AttributeError, TypeError, struct.error) as error:
        raise ValueError(f"{path} is not a SentencePiece model, or damaged ({error})") from None
    if trained.get(3, 1) != 1 or trained.get(24, 0):
        raise ValueError(f"{path} is not of a T5 tokenizer: its model must be a unigram whose words begin with a space")
    if not all(normalised.get(flag, 1) == 1 for flag in (3, 4, 5)):
        raise ValueError(f"{path} treats spaces in another way than a T5 tokenizer")
    if not pieces or unknown is None:
        raise ValueError(f"{path} is not a SentencePiece model, or damaged: it has no pieces, or none for the unknown")
    listed = [(len(pieces) + place, {"content": f"<extra_id_{extra_ids - 1 - place}>", "lstrip": True, "rstrip": True})
              for place in range(extra_ids)]
    pieces += [(token["content"], 0.0) for _, token in listed]
    steps = [Charsmap(charsmap, path)] if charsmap else []
    return _check_pieces(pieces, unknown, path), unknown, listed, [*steps, _strip_right, _one_for_many_spaces]


def _protobuf(data):
    """Yield (number, value) of the fields of a protobuf message; a value is a whole number or bytes."""
    here = 0

    def whole():
        nonlocal here
        value = 0
        for shift in range(0, 70, 7):
            if here >= len(data):
                raise ValueError("it ends early")
            byte, here = data[here], here + 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
        raise ValueError("a number without end")

    while here < len(data):
        key = whole()
        if key & 7 == 0:
            yield key >> 3, whole()
            continue
        size = {1: 8, 5: 4}.get(key & 7) or (whole() if key & 7 == 2 else None)
        if size is None or size > len(data) - here:
            raise ValueError("it ends early" if size else f"wire type {key & 7}")
        yield key >> 3, data[here:here + size]
        here += size
