"""Banks of instructions: the one that ships, general.txt, or the user's own text file.

A bank is a text file with one instruction a line. Behind a tab may stand a description of the result, for editors by img2img,
which are told descriptions. A line like [person] begins a category. Blank lines and lines that begin with # are passed over.
"""

import random
import re
from dataclasses import dataclass
from pathlib import Path

from ..files.digests import digest

GENERAL = Path(__file__).with_name("general.txt")
ANY = "any"                                                  # the category of instructions that fit every picture
APART = 8                                                    # steps: methods may keep what they know of so many texts
MOST = 4096                                                  # instructions of a bank


@dataclass(frozen=True)
class Instruction:
    """An instruction for an editor. img2img: a description of the result, or the instruction itself."""

    category: str
    instruct: str
    img2img: str


@dataclass(frozen=True)
class Bank:
    """Instructions with the name of their source, "general" or a file's name."""

    name: str
    instructions: tuple

    @property
    def digest(self):
        """The SHA-256 of all instructions with their categories, in order."""
        return digest([[one.category, one.instruct, one.img2img] for one in self.instructions])

    def texts(self, kind):
        """The words for editors of this kind (`editor.kind`), each once, in order."""
        return list(dict.fromkeys(one.img2img if kind == "img2img" else one.instruct for one in self.instructions))

    def without(self, texts):
        """The same bank without the instructions that are among these texts, in either form."""
        return Bank(self.name, tuple(one for one in self.instructions if not {one.instruct, one.img2img} & set(texts)))

    def record(self):
        """The bank as a report states it."""
        return {"name": self.name, "sha256": self.digest, "instructions": len(self.instructions)}


def find_bank(given):
    """The `Bank` that `any_prompt` means: True for the one that ships, a path, or a `Bank` itself. Raises ValueError."""
    if isinstance(given, Bank):
        if not given.instructions:
            raise ValueError("the bank of instructions is empty")
        return given
    if given is True:
        return read_bank(GENERAL, name="general")
    if isinstance(given, str | Path):
        return read_bank(given)
    raise ValueError(f"any_prompt {given!r}: give True, the path of a text file, or a Bank")


def read_bank(path, name=None):
    """Read a bank from a text file. Raises ValueError where it cannot be read or holds no instruction."""
    path = Path(path)
    try:
        lines = path.read_bytes().decode("utf-8-sig").splitlines()
    except OSError as error:
        raise ValueError(f"{path}: {(error.strerror or str(error)).lower()}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text; a bank has one instruction a line") from None
    category, found = ANY, {}
    for number, line in enumerate(lines, 1):
        line = line.strip()
        if heading := re.fullmatch(r"\[\s*(.*\S)\s*\]", line):
            category = heading.group(1)
        elif line and not line.startswith("#"):
            words = [part.strip() for part in line.split("\t") if part.strip()]
            if len(words) > 2 or "\0" in line:
                raise ValueError(f"{path}, line {number}: give an instruction, or an instruction, a tab and a description")
            found.setdefault(words[0], Instruction(category, words[0], words[-1]))
    if not 0 < len(found) <= MOST:
        raise ValueError(f"{path} holds {len(found)} instructions; a bank has 1 to {MOST}, one a line")
    return Bank(name or path.name, tuple(found.values()))


def drawn_order(count, steps, seed):
    """`steps` numbers below `count`, in shuffled rounds of all of them: each comes once before any comes again.

    Seeded, so that a run can be repeated. A number comes again after APART others at least, or, where there are few, after half
    as many as there are.
    """
    shuffling, order = random.Random(seed), []
    apart = min(APART, count // 2)
    while len(order) < steps:
        turn = list(range(count))
        shuffling.shuffle(turn)
        late = set(order[len(order) - apart:])
        order += sorted(turn, key=lambda number: number in late)           # stable: the others keep their shuffled order
    return order[:steps]
