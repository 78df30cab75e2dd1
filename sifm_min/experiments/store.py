"""The folder of a run: its plans, and the result of every step.

  DIR/plans/*.json       the plans
  DIR/steps/*.jsonl      the journal of one picture: its steps in the order in which they were finished; one writer at a time
  DIR/pictures/*.png     every picture that a step made, named by the SHA-256 of its pixels
  DIR/verdicts/*/        what a panel answered; the folders of `judging.run`, one for each panel and share of the pictures

Several processes, on one machine or on many, may work into one folder. Each takes the journal of a picture, works on that
picture, and gives it back.
"""

import os
from pathlib import Path

from .. import cli
from ..files import ledger, writing
from ..files.digests import digest, picture_sha256
from ..files.ledger import Ledger
from ..judging.answers import Answers
from .plan import SHARED

REMEMBERED = 24                                              # decoded pictures of a journal: the edits of two arms


class Folder:
    """The folder of a run; see the module's docstring."""

    def __init__(self, path):
        self.path = Path(path)

    def make(self):
        """Create the folder and its parts."""
        writing.make_folder(self.path)
        for inner in ("plans", "steps", "pictures"):
            writing.make_folder(self.path / inner)

    def add_plan(self, plan):
        path = self.path / "plans" / f"{plan['suite']}-{digest(plan)[:16]}.json"
        if not path.exists():
            writing.write(path, cli.to_json(plan, indent=1) + "\n", overwrite=True)

    def plans(self):
        """The plans, oldest first. Raises ValueError if there are none."""
        from ..judging import summary
        paths = sorted((self.path / "plans").glob("*.json"), key=lambda path: (path.stat().st_mtime_ns, path.name))
        if not paths:
            raise ValueError(f"{self.path}: holds no results; `evaluate run SUITE -o {self.path}` makes them")
        plans = [(path, summary.load(path) or {}) for path in paths]
        for path, plan in plans:
            if lacking := [key for key in (*SHARED, "editors", "judge") if key not in plan]:
                raise ValueError(f"{path}: has no {lacking[0]}, so it is no plan that this version knows; remove it")
        return [plan for _, plan in plans]

    def journal(self, sha256):
        """The path of a picture's journal."""
        return self.path / "steps" / f"{sha256[:24]}.jsonl"

    def rows(self, sha256):
        """{key: row} of a picture's steps so far; another process may be adding to them."""
        path = self.journal(sha256)
        return {row["name"]: row for row in ledger.read_rows(path)} if path.exists() else {}

    def answers(self, plan):
        """The `Answers` of the plan's panel. The oracles have none: their verdicts are steps in the journals."""
        panel = {name: value for name, value in plan["judge"].items() if name != "kind"}
        if plan["judge"]["kind"] == "oracle":
            return Answers({"judges": [], "votes": 1}, [])
        return Answers(panel, sorted(path.parent for path in (self.path / "verdicts").glob("*/run.json")))

    def picture(self, sha256):
        """The path of a picture."""
        return self.path / "pictures" / f"{sha256}.png"

    def keep(self, image):
        """Write a picture and return the SHA-256 of its pixels."""
        from .. import images  # here, so that `evaluate table` does not load torch
        sha256 = picture_sha256(image)
        if not self.picture(sha256).exists():
            images.write_picture(self.picture(sha256), image, overwrite=True)
        return sha256

    def probe(self):
        """Raise OSError if nothing can be written, before minutes of work are spent."""
        part = self.path / "pictures" / f".{os.getpid()}.part"
        try:
            with part.open("wb") as file:
                file.write(bytes(1 << 16))
                file.flush()
                os.fsync(file.fileno())
        finally:
            part.unlink(missing_ok=True)


class Journal:
    """The steps of one picture, open for one writer. Raises Busy if another process has it open."""

    def __init__(self, folder, sha256):
        self.folder, self._ledger = folder, Ledger(folder.journal(sha256))

    def __enter__(self):
        self._ledger.__enter__()
        self.rows, self._images = {row["name"]: row for row in self._ledger.rows}, {}
        return self

    def __exit__(self, *_):
        self._ledger.__exit__()

    def get(self, key):
        """The row of a finished step, None if there is none, if it failed, or if the picture that it made is gone."""
        row = self.rows.get(key)
        if row is None or "failed" in row or ("sha256" in row and not self.folder.picture(row["sha256"]).exists()):
            return None
        return row

    def add(self, key, step, image=None, **result):
        """Write the result of a step, with its picture if it made one, and return its row."""
        if image is not None:
            result["sha256"] = self.folder.keep(image)
            self._remember(result["sha256"], image)
        row = {"name": key, "step": step, **result}
        self._ledger.append(row)
        self.rows[key] = row
        return row

    def hold(self, sha256, read):
        """Make sure that the original is in the folder. Raises ValueError if read() returns another picture."""
        if not self.folder.picture(sha256).exists() and self.folder.keep(read()) != sha256:
            raise ValueError("the picture has changed since this run began; run the same command again")

    def image(self, sha256):
        """A picture of the folder, decoded; the last ones are remembered."""
        from .. import images
        if sha256 not in self._images:
            self._remember(sha256, images.read(self.folder.picture(sha256)).image)
        return self._images[sha256]

    def _remember(self, sha256, image):
        self._images[sha256] = image
        while len(self._images) > REMEMBERED:
            del self._images[next(iter(self._images))]
