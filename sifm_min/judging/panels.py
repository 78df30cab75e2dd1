"""Panels of judges and their prompts, as files.

  panel     a JSON file: {"id", "date", "judges": [...]}; panels/ has named ones. It has a date because services replace
            models. Rates of different panels are not comparable
  prompt    the instructions of every judge: prompts/*.txt with its schema. The text of an id never changes; a new text
            gets a new id. People read the same rules

Errors are ValueErrors of one sentence that names the file.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from ..files.digests import digest
from ..files.json_text import read_object, read_text
from .question import Request
from .spec import Spec

HERE = Path(__file__).parent
SEED = 20250601                                              # sent where a model takes one: best effort
FINDINGS = ("semantic_mismatch", "perceptual_degradation")


# ------------------------------------------------------------------------------------------------------------- prompts

@dataclass(frozen=True)
class Prompt:
    """The instructions of a judge. rules: for people and models; answer: for models alone; parts: lines of the question."""

    id: str
    rules: str
    answer: str
    parts: tuple
    schema_id: str
    schema: dict

    @classmethod
    def load(cls, name, beside=None):
        """The shipped prompt of an id, such as isr-judge/1, or that of a .txt file, relative to the folder `beside`."""
        own = name.endswith(".txt")
        path = Path(beside or ".", name) if own else HERE / "prompts" / f"{_file(name)}.txt"
        text = read_text(path, f"prompt {name!r}: there is none of this id; there are {', '.join(_ids('prompts', '.txt'))}")
        head, *sections = re.split(r"^\[(\w+)\]\n", text, flags=re.M)
        about = dict(re.findall(r"^(\w+): (.+)$", head, re.M))
        sections = dict(zip(sections[::2], sections[1::2], strict=True))
        if about.keys() != {"id", "date", "schema"} or sections.keys() != {"rules", "answer", "user"}:
            raise ValueError(f"{path}: a prompt has id, date and schema, and the sections [rules], [answer] and [user]")
        parts = tuple(sections["user"].splitlines())
        places = [line for line in parts if line in ("<original>", "<edited>")]
        if sorted(places) != ["<edited>", "<original>"] or sections["user"].count("<instruction>") != 1:
            raise ValueError(f"{path}: [user] has the lines <original> and <edited>, and <instruction>, once each")
        schema_path = Path(path.parent, about["schema"]) if about["schema"].endswith(".json") else \
            HERE / "prompts" / f"{_file(about['schema'])}.json"
        schema = read_object(schema_path)
        kinds = {key: value.get("type") for key, value in schema.get("schema", {}).get("properties", {}).items()}
        if not isinstance(schema.get("id"), str) or any(kinds.get(name) != "boolean" for name in FINDINGS):
            raise ValueError(f"{schema_path}: a schema has an id, and the boolean properties {' and '.join(FINDINGS)}")
        return cls(about["id"], _unwrapped(sections["rules"]), _unwrapped(sections["answer"]), parts, schema["id"],
                   schema["schema"])

    @property
    def system(self):
        return f"{self.rules}\n\n{self.answer}"

    @property
    def sha256(self):
        return digest([self.rules, self.answer, *self.parts])

    @property
    def schema_sha256(self):
        return digest(self.schema)

    def request(self, original, edited, instruction, seed=None):
        """The Request on two PIL pictures. The instruction is sent as a JSON string, so it cannot be taken for a rule."""
        instruction = json.dumps(instruction, ensure_ascii=False)
        parts, text = [], []
        for line in (*self.parts, None):
            if line not in ("<original>", "<edited>", None):
                text.append(line.replace("<instruction>", instruction))
                continue
            parts += ["\n".join(text)] if text else []
            parts += [] if line is None else [original if line == "<original>" else edited]
            text = []
        return Request(self.system, parts, self.schema, seed)


def findings(data):
    """(mismatch, degradation, evidence) of an answer's object. Evidence is cut at 500 characters: it is kept in the journal."""
    evidence = {name: value[:500] for name, value in data.items() if isinstance(value, str)}
    return *(data[name] for name in FINDINGS), evidence


def _unwrapped(text):
    """The paragraphs of a text as one line each."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in text.strip().split("\n\n"))


# -------------------------------------------------------------------------------------------------------------- panels

@dataclass(frozen=True)
class Panel:
    """A panel. judges: Specs by name (a judge's `name`, or its model); votes: calls per verdict."""

    id: str
    date: str
    judges: dict
    prompt: Prompt
    about: str = ""
    votes: int = 1
    seed: int = SEED

    @classmethod
    def load(cls, name):
        """A named panel (see `names`), or the panel in a .json file."""
        name = str(name)
        own = name.endswith(".json")
        path = Path(name) if own else HERE / "panels" / (f"{name}.json" if name in names() else "-")
        settings = read_object(path, f"panel {name!r}: there is none of this name; there are {', '.join(names())}, "
                            "or give a .json file")
        if extra := sorted(settings.keys() - {"id", "date", "about", "prompt", "votes", "seed", "judges"}):
            raise ValueError(f"{path}: a panel has no {extra[0]}; it has id, date, judges, and about, prompt, votes, seed")
        if missing := [key for key in ("id", "date") if not isinstance(settings.get(key), str) or not settings[key].strip()]:
            raise ValueError(f"{path}: a panel needs a text as its {missing[0]}")
        listed = settings.get("judges")
        if not isinstance(listed, list) or not listed or not all(isinstance(judge, dict) for judge in listed):
            raise ValueError(f"{path}: a panel needs a list of judges, each an object with provider and model")
        votes, seed = settings.get("votes", 1), settings.get("seed", SEED)
        if type(votes) is not int or votes < 1 or votes % 2 == 0 or type(seed) is not int or seed < 0:
            raise ValueError(f"{path}: votes is an odd number, for a majority, and seed a whole number of at least 0")
        judges = {}
        for judge in listed:
            variable = judge.get("key_env")
            if variable is not None and not re.fullmatch(r"[A-Z][A-Z0-9_]*", str(variable)):
                raise ValueError(f"{path}: key_env is the name of an environment variable, in capitals, never the key itself")
            try:
                spec = Spec.from_json({key: value for key, value in judge.items() if key != "name"})
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from None
            called = judge.get("name", spec.model)
            if not isinstance(called, str) or not called.strip() or called in judges:
                raise ValueError(f"{path}: two judges are called {called!r}; give them a name each")
            judges[called] = spec
        prompt = Prompt.load(str(settings.get("prompt", "isr-judge/1")), path.parent)
        return cls(settings["id"], settings["date"], judges, prompt, str(settings.get("about", "")), votes, seed)

    def record(self):
        """The panel as a JSON-ready dict, to be printed beside every rate that it gave."""
        return {"id": self.id, "date": self.date, "about": self.about, "votes": self.votes, "seed": self.seed,
                "prompt": self.prompt.id, "prompt_sha256": self.prompt.sha256, "schema": self.prompt.schema_id,
                "schema_sha256": self.prompt.schema_sha256,
                "judges": {name: spec.record() for name, spec in self.judges.items()}}


def names():
    """The names of the shipped panels: local ones first."""
    return sorted((path.stem for path in (HERE / "panels").glob("*.json")), key=lambda n: (not n.startswith("local"), n))


# ------------------------------------------------------------------------------------------------------- small helpers

def _file(name):
    """The file of an id: isr-judge/1 -> isr-judge-1. Other ids get a name that no file has."""
    return name.replace("/", "-") if re.fullmatch(r"[\w.-]+/\d+", name) else "-"


def _ids(folder, ending):
    return [re.sub(r"-(\d+)$", r"/\1", path.stem) for path in sorted((HERE / folder).glob(f"*{ending}"))]
