"""Every arm of a table against SIFM, on the same pictures and prompts: exact paired tests with Holm's correction."""

import dataclasses
from dataclasses import dataclass

from ..judging.paired import compare, holm
from .figures import PROMPTS, judged_by_arm

FEWEST = 6                       # pictures. With 5, the smallest two-sided p of an exact test is 2 / 2**5 = 0.0625
NO_SIFM, NO_PAIR, REFERENCE = "no SIFM arm", "no pair", "reference"

NOTES = [
    "p vs SIFM: if the method and SIFM were equally good, a difference in ISR this large or larger would come about by chance "
    "with this probability. It is computed on pairs: edits of one picture by one prompt and seed, under the method and under "
    "SIFM, that every judge decided. Where every picture stands once, only the pairs count in which one of the two edits was "
    "thwarted and the other was not (exact McNemar test). Where pictures stand several times, the two methods are swapped "
    "picture by picture in all possible ways (exact randomization test).",
    "The p are corrected by Holm's method over all comparisons of the table, so that the chance of any false difference in it "
    f"is at most 5 % if p below 0.05 counts as one. Fewer than {FEWEST} pictures cannot give a p below 0.05; then the cell "
    "says how many there are."]


@dataclass(frozen=True)
class Paired:
    """The comparison of an arm with SIFM on one type of prompts.

    images: the number of pictures with a pair. note: the reason if there is no p, else "". result: a Comparison of the
    arm (first) with SIFM (second). p_holm: corrected over the `comparisons` of the table.
    """

    images: int
    note: str = ""
    result: object = None
    p_holm: float | None = None
    comparisons: int = 0

    @property
    def text(self):
        """The cell of a table."""
        return self.note or (f"{self.p_holm:.3f}" if self.p_holm >= 0.001 else "< 0.001")

    def record(self):
        """The comparison as flat data for CSV and JSON."""
        if self.result is None:
            return {"vs_sifm_note": self.note}
        r = self.result
        return {"vs_sifm_pairs": r.pairs, "vs_sifm_images": self.images, "vs_sifm_only_method": r.only_first,
                "vs_sifm_only_sifm": r.only_second, "vs_sifm_difference": r.difference.value,
                "vs_sifm_difference_low": r.difference.low, "vs_sifm_difference_high": r.difference.high,
                "vs_sifm_test": r.test, "vs_sifm_p": None if self.note else r.p, "vs_sifm_p_holm": self.p_holm,
                "vs_sifm_comparisons": self.comparisons, "vs_sifm_note": self.note}


def reference_of(arm, names):
    """The name of the SIFM arm to compare with, after the same attack: "sifm", or in the lambda suite the default weight."""
    after = "".join(arm.partition(", ")[1:])
    return next((name + after for name in ("sifm", "lambda 0.1") if name + after in names), None)


def against_sifm(cells, judges, names):
    """{(arm, prompt type): Paired} of the judged arms of one table; names: of its arms, in order."""
    return against(cells, judges, {arm: reference_of(arm, names) for arm in names})


def against(cells, judges, references):
    """{(arm, prompt type): Paired} of judged arms; references: arm -> the arm that it is compared with, or None."""
    paired = {}
    for prompts in PROMPTS:
        judged = judged_by_arm(cells, judges, prompts)
        for arm, reference in references.items():
            if arm in judged:
                paired[arm, prompts] = pair(judged, arm, reference)
    return corrected(paired)


def corrected(paired):
    """The same dict of Paireds, with p corrected by Holm's method over those that have one."""
    paired = dict(paired)
    places = [place for place, pair in paired.items() if pair.result and not pair.note]
    for place, p in zip(places, holm([paired[place].result.p for place in places]), strict=True):
        paired[place] = dataclasses.replace(paired[place], p_holm=p, comparisons=len(places))
    return paired


def pair(judged, arm, reference):
    """The uncorrected Paired of an arm; a comparison with too few pictures has its result, and a note in place of p."""
    if arm == reference:
        return Paired(0, REFERENCE)
    if reference is None or reference not in judged:
        return Paired(0, NO_SIFM)
    own, sifm = judged[arm], judged[reference]
    images = {place[0] for place, edit in own.items() if edit.complete and place in sifm and sifm[place].complete}
    if not images:
        return Paired(0, NO_PAIR)
    (result,) = compare(judged, [(arm, reference)])
    return Paired(len(images), f"few ({len(images)})" if len(images) < FEWEST else "", result)
