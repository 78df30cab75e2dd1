"""Random texts on which a tokenizer is compared with its oracle."""

import random
import unicodedata


def assigned(character):
    """True for a character that this Python's Unicode knows; the oracle may know a newer version."""
    return unicodedata.category(character) not in ("Cn", "Cs")


def random_texts(count, seed, pieces, share=0.5, leave_out=""):
    """A share of the texts are `pieces` in random order, the others random characters of widening ranges."""
    rng, texts = random.Random(seed), []
    while len(texts) < count:
        if rng.random() < share:
            texts.append("".join(rng.choices(pieces, k=rng.randint(1, 14))))
        else:
            limits = rng.choices((0x80, 0x250, 0x3000, 0x10000, 0x30000), k=rng.randint(1, 20))
            points = [chr(rng.randrange(limit)) for limit in limits]
            texts.append("".join(c for c in points if assigned(c) and c not in leave_out))
    return texts
