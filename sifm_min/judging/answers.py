"""The answers of a panel, as the ledgers of its runs hold them.

Each answer is written with its question: the pixels of both pictures, the instruction, the judge and the vote. So it is found
by its question, whichever run asked it.
"""

from ..files.digests import digest
from ..files.ledger import read_rows
from . import summary

ANSWERS = ("verdict", "canary")                              # kinds of a ledger's rows; the others are calls


class Answers:
    """The newest answers of a panel in the folders of its runs. Reading raises ValueError for a damaged ledger.

    panel: `Panel.record()`. folders: those that `run` wrote; those of other panels, or of other settings, are left out.
    """

    def __init__(self, panel, folders):
        self.judges, self.votes, self._newest, rows = list(panel["judges"]), range(panel["votes"]), {}, []
        for folder in folders:
            about = summary.load(folder / "run.json")
            if about and digest(about.get("panel")) == digest(panel):
                rows += (row for row in read_rows(folder / "ledger.jsonl") if row.get("kind") == "verdict")
        for row in sorted(rows, key=lambda row: row["time_utc"]):
            take_newest(self._newest, (*row["image_sha256"], row["instruction"], row["judge"], row["vote"]), row)

    def findings(self, original, edited, instruction):
        """{judge: [mismatch, degradation, status]} of an edit, pictures by the SHA-256 of their pixels; None without answer."""
        rows = self._rows(original, edited, instruction)
        return {judge: list(finding(votes)) for judge, votes in rows.items()} if any(map(any, rows.values())) else None

    def complete(self, original, edited, instruction):
        """True if every judge has answered every vote, with a verdict or without."""
        rows = self._rows(original, edited, instruction)
        return bool(rows) and all(map(all, rows.values()))

    def _rows(self, *question):
        return {judge: [self._newest.get((*question, judge, vote)) for vote in self.votes] for judge in self.judges}


def take_newest(newest, key, row):
    """Keep a row as the newest answer to a question, unless it has no verdict and the one that is kept has."""
    if row["status"] == "ok" or newest.get(key, row)["status"] != "ok":
        newest[key] = row


def finding(votes):
    """(mismatch, degradation, status) of one judge on one edit. votes: rows of a ledger, None for a vote without answer."""
    return majority([(row["semantic_mismatch"], row["perceptual_degradation"], row["status"]) if row
                     else (None, None, "not_asked") for row in votes])


def majority(votes):
    """The majority of an odd number of votes, each (mismatch, degradation, status), in the same form.

    A finding is what more than half of all votes say. Votes without an answer count for neither side.
    """
    result = []
    for answers in zip(*(vote[:2] for vote in votes), strict=True):
        yes, no = answers.count(True), answers.count(False)
        result.append(True if 2 * yes > len(votes) else False if 2 * no > len(votes) else None)
    if result == [None, None]:
        return None, None, next((status for _, _, status in votes if status != "ok"), "votes_tied")
    return *result, "ok"
