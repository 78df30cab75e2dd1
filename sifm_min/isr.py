"""Verdicts and the Immunization Success Rate (paper, section VI).

A judge finds, of one edit of an immunized picture, a semantic mismatch and a perceptual degradation; either makes the
immunization a success. Several judges agree strictly: success only if all say so, obeyed only if none does.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Verdict:
    """One judge's findings on one edit. `success`: the edit was thwarted; `obeyed`: it was not; a split is neither."""

    semantic_mismatch: bool
    perceptual_degradation: bool
    success: bool
    obeyed: bool

    @classmethod
    def of(cls, semantic_mismatch, perceptual_degradation):
        """A single judge's verdict: the OR of its two findings."""
        success = bool(semantic_mismatch or perceptual_degradation)
        return cls(bool(semantic_mismatch), bool(perceptual_degradation), success, not success)

    @classmethod
    def consensus(cls, verdicts):
        """The strict consensus of several judges; a finding holds where every judge found it."""
        verdicts = list(verdicts)
        if not verdicts:
            raise ValueError("a consensus needs at least one verdict")
        return cls(*(all(getattr(v, name) for v in verdicts)
                     for name in ("semantic_mismatch", "perceptual_degradation", "success", "obeyed")))


def wilson(count, total, z=1.959964):
    """The Wilson score interval of a proportion, (low, high) in [0,1]; z 1.96 is 95 %. Of nothing: (0, 1)."""
    if not 0 <= count <= total:
        raise ValueError(f"{count} of {total} is no proportion")
    if total == 0:
        return 0.0, 1.0
    share, shrink = count / total, 1 + z * z / total
    centre = (share + z * z / (2 * total)) / shrink
    half = z / shrink * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return max(0.0, centre - half), min(1.0, centre + half)
