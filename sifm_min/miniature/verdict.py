"""A judge's verdict on one edit: two findings, their OR, and the strict consensus of several judges.

An answer that is missing is None. Kleene's strong logic carries it on: a result is known where no missing answer could
change it.
"""

from dataclasses import dataclass


def kleene_and(values):
    """False if any is False, else None if any is None, else True (Kleene, Introduction to Metamathematics, 1952, par. 64)."""
    values = list(values)
    return False if any(v is False for v in values) else None if any(v is None for v in values) else True


def kleene_not(value):
    """The negation; None stays None."""
    return None if value is None else not value


def kleene_or(values):
    """True if any is True, else None if any is None, else False."""
    return kleene_not(kleene_and(kleene_not(v) for v in values))


@dataclass(frozen=True)
class Verdict:
    """Findings on one edit. success: the edit was thwarted. obeyed: it was not. A split is neither. None: not known."""

    semantic_mismatch: bool | None
    perceptual_degradation: bool | None
    success: bool | None
    obeyed: bool | None

    @classmethod
    def of(cls, semantic_mismatch, perceptual_degradation):
        """The verdict of a single judge: the OR of its two findings. A missing finding is None."""
        findings = [None if v is None else bool(v) for v in (semantic_mismatch, perceptual_degradation)]
        success = kleene_or(findings)
        return cls(*findings, success, kleene_not(success))

    @classmethod
    def consensus(cls, verdicts):
        """The strict consensus of several judges: the AND of each field over all judges."""
        verdicts = list(verdicts)
        if not verdicts:
            raise ValueError("a consensus needs at least one verdict")
        return cls(*(kleene_and(getattr(v, name) for v in verdicts)
                     for name in ("semantic_mismatch", "perceptual_degradation", "success", "obeyed")))


class NoVerdict(Exception):
    """Raised by a judge that has no verdict on an edit. `status` is the reason in one word, such as "blocked_prompt"."""

    def __init__(self, status):
        if not status or status == "ok":
            raise ValueError(f"status {status!r}: say in a word why there is no verdict")
        super().__init__(status)
        self.status = status
