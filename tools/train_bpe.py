"""Train a small CLIP-format tokenizer (byte-level BPE) on the lines of a text file.

    python tools/train_bpe.py captions.txt tokenizer/ --size 2000 --length 24

The folder can then be read by `sifm_min.models.clip_tokenizer.CLIPTokenizer` and by transformers' CLIPTokenizer, with equal
ids. Any text can be tokenized, whatever was in the file: all 256 bytes are in the vocabulary.
"""

import argparse
import json
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from sifm_min.models.byte_pairs import byte_symbols  # noqa: E402
from sifm_min.models.clip_tokenizer import END, START, normalise, words  # noqa: E402


def train_bpe(texts, size):
    """Texts to `(vocab, merges)`: token -> id with at most `size` entries, and the merged pairs in order.

    Entries as in CLIP: 256 bytes, the same at a word's end (`</w>`), one for each merge, the two special tokens last.
    Each step merges the pair that is most frequent in the texts, the alphabetically first of equals, until the
    vocabulary is full or each word is one token. The same texts give the same result in any order.
    """
    symbols = byte_symbols()
    vocab = {token: i for i, token in enumerate([*symbols.values(), *(s + "</w>" for s in symbols.values())])}
    if size < len(vocab) + 2:
        raise ValueError(f"size {size}: the bytes and the two special tokens alone need {len(vocab) + 2} entries")

    counts = Counter(word for text in texts for word in words(normalise(text)))
    split = {}                                                 # word -> its current tokens
    for word in counts:
        *inner, last = (symbols[byte] for byte in word.encode())
        split[word] = [*inner, last + "</w>"]
    frequency, where = Counter(), {}                           # pair -> occurrences; pair -> words that ever held it
    for word, tokens in split.items():
        for pair in pairwise(tokens):
            frequency[pair] += counts[word]
            where.setdefault(pair, set()).add(word)

    merges = {}                                                # a dict, as the same pair can come up again
    while frequency and len(vocab) < size - 2:
        best = min(frequency, key=lambda pair: (-frequency[pair], pair))
        merges[best] = None
        vocab.setdefault(best[0] + best[1], len(vocab))
        for word in where.pop(best):
            before, after = split[word], _merged(split[word], best)
            for pair in pairwise(before):
                frequency[pair] -= counts[word]
                if not frequency[pair]:
                    del frequency[pair]
            for pair in pairwise(after):
                frequency[pair] += counts[word]
                where.setdefault(pair, set()).add(word)
            split[word] = after
    for special in (START, END):
        vocab[special] = len(vocab)
    return vocab, list(merges)


def _merged(tokens, pair):
    """The tokens with each occurrence of the pair joined, from the left."""
    out = []
    for token in tokens:
        if out and (out[-1], token) == pair:
            out[-1] = pair[0] + pair[1]
        else:
            out.append(token)
    return out


def write(folder, vocab, merges, length):
    """Write the four files of a published `tokenizer` folder. `length`: ids in each row, start and end included."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    roles = {"bos_token": START, "eos_token": END, "pad_token": END, "unk_token": END}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": length, "do_lower_case": True, **roles}
    for name, content in (("vocab.json", vocab), ("tokenizer_config.json", config), ("special_tokens_map.json", roles)):
        text = json.dumps(content, ensure_ascii=False, indent=None if name == "vocab.json" else 2)
        (folder / name).write_text(text + "\n", encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("texts", type=Path, help="a UTF-8 text file, one prompt per line")
    parser.add_argument("folder", type=Path, help="where the tokenizer is written")
    parser.add_argument("--size", type=int, default=2000, help="entries of the vocabulary at most")
    parser.add_argument("--length", type=int, default=77, help="ids per prompt: the encoder's max_position_embeddings")
    args = parser.parse_args()
    vocab, merges = train_bpe(args.texts.read_text(encoding="utf-8").splitlines(), args.size)
    write(args.folder, vocab, merges, args.length)


if __name__ == "__main__":
    main()
