"""The text side of an editor of photographs: a tokenizer, text transformers that are taught the instructions, and contexts.

The transformers are taught to name the edit that an instruction asks for, with words dropped, and are frozen then. They read
the trained wordings only; the share of held-out wordings that they name rightly is printed.
"""

import json
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from photograph_pairs import ASKED
from torch import nn
from train_bpe import train_bpe, write
from training_run import Run, say, trained

from sifm_min.models.clip import CLIPText, CLIPTextConfig
from sifm_min.models.clip_tokenizer import CLIPTokenizer

POSITIONS = 20                                               # of a text transformer: start, words, end
ENTRIES = 2000                                               # of the vocabulary, at most
BATCH, RATE, DROPPED = 64, 2e-3, 0.15                        # wordings a step; rate; share of the tokens that is dropped
SHOWN = 10                                                   # wordings that are named wrongly, at most
VARIANTS = 3                                                 # shortened forms of each wording that an editor is trained with


def wordings(held_out=False):
    """(texts, their places in `ASKED`): all trained wordings, or those that are never trained."""
    pairs = [(text, place) for place, (kind, option) in enumerate(ASKED)
             for text in (kind.held_out(option) if held_out else kind.phrases(option))]
    return [text for text, _ in pairs], torch.tensor([place for _, place in pairs])


def tokenizer(work):
    """The tokenizer of a work, trained on the trained wordings at first use."""
    folder = work / "tokenizer"
    if not (folder / "merges.txt").exists():                 # the last file
        write(folder, *train_bpe(wordings()[0], ENTRIES), POSITIONS)
    return CLIPTokenizer.from_folder(folder)


class TextNetworks(nn.Module):
    """One CLIP text transformer, or two side by side. `configs`: the parts of config.json but for the vocabulary."""

    def __init__(self, configs, work):
        super().__init__()
        size = len(json.loads((work / "tokenizer" / "vocab.json").read_text()))
        ends = {"vocab_size": size, "bos_token_id": size - 2, "eos_token_id": size - 1, "pad_token_id": size - 1}
        self.configs = [config | {"max_position_embeddings": POSITIONS} | ends for config in configs]
        self.networks = nn.ModuleList(CLIPText(CLIPTextConfig.from_json(json.dumps(config))) for config in self.configs)
        self.start, self.end = size - 2, size - 1

    def forward(self, ids):
        """(states (B,L,C), pooled (B,P) or None): of one transformer as InstructPix2Pix reads it, of two as SD3 does."""
        found = [network(ids) for network in self.networks]
        if len(found) == 1:
            return found[0].last, None
        return torch.cat([f.penultimate for f in found], -1), torch.cat([f.pooled for f in found], -1)


class Taught(nn.Module):
    """Text networks with a layer for each of their results that names the edit."""

    def __init__(self, texts):
        super().__init__()
        self.texts = texts
        with torch.no_grad():
            states, pooled = texts(torch.full((1, POSITIONS), texts.end))
        self.by_states = nn.Linear(states.shape[-1], len(ASKED))
        self.by_pooled = nn.Linear(pooled.shape[-1], len(ASKED)) if pooled is not None else None

    def forward(self, ids):
        """Scores of the places in `ASKED`: of every position (B,L,N), and of the pooled vector (B,N) or None."""
        states, pooled = self.texts(ids)
        return self.by_states(states), self.by_pooled(pooled) if pooled is not None else None

    @torch.no_grad()
    def named(self, ids):
        """The place of the edit that each row asks for, by the states after its end."""
        return torch.cat([self(part)[0][:, -1].argmax(1) for part in ids.split(256)])


def shortened(ids, texts, rng, dropped=DROPPED):
    """Rows of ids without some of their words, drawn at random; at least two stay."""
    ids = ids.clone()
    for row in ids:
        words = [token for token in row[1:].tolist() if token != texts.end]
        kept = [token for token in words if rng.random() >= dropped]
        if 2 <= len(kept) < len(words):
            row.fill_(texts.end)
            row[:len(kept) + 1] = torch.tensor([texts.start, *kept])
    return ids


def taught(work, configs):
    """The text networks that `teach` has taught, frozen; SystemExit where it has not."""
    if not (work / "text.pt").exists():
        raise SystemExit(f"{work} has no text.pt: the stage text comes first")
    return trained(work / "text.pt", Taught(TextNetworks(configs, work)))


def teach(work, configs, steps):
    """Teach the text networks of a work; returns them with their naming layers, frozen."""
    tokens = tokenizer(work)
    network = Taught(TextNetworks(configs, work))
    texts, places = wordings()
    ids = torch.tensor(tokens(texts))
    longest = max(len(tokens.encode(text)) for text in (*texts, *wordings(held_out=True)[0])) + 2
    if longest > POSITIONS:
        raise ValueError(f"a wording has {longest} tokens; the text transformers read {POSITIONS}")
    run = Run(work / "text.pt", network, rate=RATE, steps=steps)
    rng, taught = np.random.default_rng(run.step), not run.done
    rows_of = [(places == place).nonzero()[:, 0].numpy() for place in range(len(ASKED))]
    while not run.done:
        truth = rng.integers(len(ASKED), size=BATCH)
        batch = shortened(ids[torch.tensor([rng.choice(rows_of[place]) for place in truth])], network.texts, rng)
        scores, pooled = network(batch)
        after = batch == network.texts.end
        truth = torch.from_numpy(truth)
        loss = F.cross_entropy(scores[after], truth[:, None].expand(-1, POSITIONS)[after])
        run.descend(loss + (F.cross_entropy(pooled, truth) if pooled is not None else 0))
    network = run.finished()
    if taught:
        for name, (some, where) in (("trained", (texts, places)), ("held-out", wordings(held_out=True))):
            right = network.named(torch.tensor(tokens(some))) == where
            wrong = [text for text, good in zip(some, right, strict=True) if not good]
            say(f"text: {right.sum()} of {len(right)} {name} wordings named rightly ({100 * right.float().mean():.1f} %)"
                + (f"; not {'; '.join(wrong[:SHOWN])}" if wrong else ""))
    return network


@dataclass
class Contexts:
    """The contexts that a frozen text side makes of all trained wordings, and of shortened ones that it still names rightly.

    states (N,L,C); pooled (N,P) or None; rows: for each place in `ASKED`, its rows; `empty`: the row of the empty text.
    """

    states: torch.Tensor
    pooled: torch.Tensor | None
    rows: list
    empty: int

    def draw(self, places, rng):
        """A row for each place in `ASKED`, drawn at random."""
        return torch.tensor([int(rng.choice(self.rows[place])) for place in places.tolist()])


@torch.no_grad()
def contexts(work, taught):
    """The `Contexts` of a work."""
    tokens, rng = tokenizer(work), np.random.default_rng(0)
    texts, places = wordings()
    whole = torch.tensor(tokens(texts))
    ids, of = [whole], [places]
    for _ in range(VARIANTS):
        short = shortened(whole, taught.texts, rng)
        good = taught.named(short) == places
        ids.append(short[good])
        of.append(places[good])
    ids, of = torch.cat([*ids, torch.tensor(tokens([""]))]), torch.cat(of)
    parts = [taught.texts(part) for part in ids.split(256)]
    pooled = torch.cat([p for _, p in parts]) if parts[0][1] is not None else None
    rows = [(of == place).nonzero()[:, 0].numpy() for place in range(len(ASKED))]
    return Contexts(torch.cat([s for s, _ in parts]), pooled, rows, len(ids) - 1)
