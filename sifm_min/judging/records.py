"""Records: the findings of a judge in an edited picture. All rates are computed from records alone.

A judge finds two things about the edit of an immunized picture: a semantic mismatch and a perceptual degradation. Either
one makes the immunization a success. Several judges agree strictly: success if all say so, obeyed if none does. A missing
finding is None.

A judge is a callable `judge(sample, edited) -> Verdict`, where `sample` has .image (the original, a PIL picture) and
.prompt. It raises NoVerdict(status) where it has no verdict. The oracles of the miniature are such judges. Models and
people answer later, and their answers arrive as records. The fields of a record:

  sample_id   the edited picture, unique within its arm
  image_id    the original. Edits of one original are not independent; resampling keeps them together
  prompt_id   the prompt, and whatever else was varied, such as a seed. (image_id, prompt_id) pairs the arms
  arm         what was edited: "control" (the clean picture), "noise" (random noise of the same budget), or a method
  judge       a model's or a person's name
  status      "ok", or why there are no findings

Every planned answer has its record, also if it never came. A rate is over the samples that the records name.
"""

from dataclasses import dataclass
from functools import cached_property

from ..miniature.verdict import NoVerdict, Verdict


@dataclass(frozen=True)
class Record:
    """One judge's findings on one edited picture. A finding is True, False or None."""

    sample_id: str
    image_id: str
    prompt_id: str
    arm: str
    judge: str
    semantic_mismatch: bool | None
    perceptual_degradation: bool | None
    status: str = "ok"

    def __post_init__(self):
        names = (self.sample_id, self.image_id, self.prompt_id, self.arm, self.judge, self.status)
        findings = (self.semantic_mismatch, self.perceptual_degradation)
        if not all(isinstance(name, str) and name for name in names):
            raise ValueError(f"sample {self.sample_id!r}: sample, image, prompt, arm, judge and status are texts, none empty")
        if not all(finding is None or type(finding) is bool for finding in findings):
            raise ValueError(f"sample {self.sample_id!r}, judge {self.judge!r}: a finding is true, false or missing, "
                             f"got {findings[0]!r} and {findings[1]!r}")
        if self.status != "ok" and findings != (None, None):
            raise ValueError(f"sample {self.sample_id!r}, judge {self.judge!r}: status {self.status!r} goes with no findings")

    @property
    def verdict(self):
        return Verdict.of(self.semantic_mismatch, self.perceptual_degradation)


@dataclass(frozen=True)
class Edit:
    """An edited picture to be judged, with the names for its records. `sample` has .image and .prompt."""

    sample_id: str
    image_id: str
    prompt_id: str
    arm: str
    sample: object
    edited: object


def ask(judges, edits):
    """Yield the Record of every judge (name -> callable) on every Edit, one after the other."""
    for edit in edits:
        for name, judge in judges.items():
            try:
                verdict, status = judge(edit.sample, edit.edited), "ok"
            except NoVerdict as missing:
                verdict, status = Verdict.of(None, None), missing.status
            yield Record(edit.sample_id, edit.image_id, edit.prompt_id, edit.arm, name,
                         verdict.semantic_mismatch, verdict.perceptual_degradation, status)


@dataclass(frozen=True)
class Judged:
    """An edited picture with the records of a panel: judge -> Record, or None where a judge has none."""

    sample_id: str
    image_id: str
    prompt_id: str
    records: dict

    @cached_property
    def verdicts(self):
        return {judge: record.verdict if record else Verdict.of(None, None) for judge, record in self.records.items()}

    @cached_property
    def verdict(self):
        return Verdict.consensus(self.verdicts.values())

    @property
    def complete(self):
        """True if every judge decided. (The consensus may be known before: one judge's no is enough.)"""
        return all(verdict.success is not None for verdict in self.verdicts.values())


def by_arm(records, judges=None):
    """Group records: {arm: {(image_id, prompt_id): Judged}}. The panel is `judges`, or every judge in the records.

    Filter the records first to look at a part of them, such as the unseen prompts.
    """
    records, arms = list(records), {}
    if not records:
        raise ValueError("there are no records: nothing was judged")
    known = list(dict.fromkeys(record.judge for record in records))
    panel = known if judges is None else list(dict.fromkeys(judges))
    if not panel:
        raise ValueError(f"the panel is empty; the records have the judges {', '.join(known)}")
    if strangers := [judge for judge in panel if judge not in known]:
        raise ValueError(f"judge {strangers[0]!r} has no record; the records have {', '.join(known)}")
    places = {}
    for record in records:
        place = (record.image_id, record.prompt_id)
        if places.setdefault((record.arm, record.sample_id), place) != place:
            raise ValueError(f"sample {record.sample_id!r} of arm {record.arm!r} has two images or prompts")
        judged = arms.setdefault(record.arm, {}).setdefault(place, Judged(record.sample_id, *place, dict.fromkeys(panel)))
        if judged.sample_id != record.sample_id:
            raise ValueError(f"samples {judged.sample_id!r} and {record.sample_id!r} of arm {record.arm!r} are the same image "
                             f"and prompt; name what else was varied in the prompt_id")
        if record.judge in judged.records:
            if judged.records[record.judge] is not None:
                raise ValueError(f"judge {record.judge!r} has two records of sample {record.sample_id!r}, arm {record.arm!r}")
            judged.records[record.judge] = record
    return arms


def arm_of(arms, name):
    """The samples of an arm; raises ValueError that names the arms there are."""
    if name not in arms:
        raise ValueError(f"arm {name!r} has no sample; there are {', '.join(arms) or 'none'}")
    return arms[name]


def pairs_of(arms, first, second):
    """[(Judged, Judged)] with the same image and prompt, complete in both arms."""
    left, right = arm_of(arms, first), arm_of(arms, second)
    pairs = [(left[place], right[place]) for place in left
             if place in right and left[place].complete and right[place].complete]
    if not pairs:
        raise ValueError(f"arms {first!r} and {second!r} have no image and prompt that every judge decided in both")
    return pairs
