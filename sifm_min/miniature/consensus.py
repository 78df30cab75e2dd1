"""The miniature's two independent judges, and their strict consensus.

`judge(sample, edited)` is the strict consensus of two judges. Each judge is an OR of two findings, as in the paper.
`judges` holds both. They are callables like any other judges, so `judging.records.ask` makes records of their verdicts.

pixel oracle: compares the edit O with the exact target T and the source S. Let M be the pixels that the instruction
  changes (by more than 0.06 of the range), p = <O-S, T-S>_M / |T-S|^2_M the progress and r = |O-T|_M / |T-S|_M the
  residual. Semantic mismatch: p < 0.5 or r > 0.6. Perceptual degradation: PSNR(O, T) < 18 dB, or PSNR(O, S) outside M
  < 19 dB (if at least 200 pixels are outside), or SSIM(O, T) < 0.60.
attribute classifier: a small network trained on renderings, never on edits. Semantic mismatch: an attribute that the
  instruction changes does not have the value asked for. Perceptual degradation: its damage head, trained on synthetic
  damage, reports damage, or fewer than 70 % of the attributes that the instruction does not change kept their value.

Img2img repaints the whole picture from a caption. Its edits may be shifted a little, and an attribute that the caption
does not name (the skin) may have any value. `caption_judges` are the same two judges with the same thresholds that allow
for exactly this: the oracle draws source and target in the pose that is nearest to the edit, and outside M compares with
that target; the classifier checks only attributes that the caption names.

`tools/measure_miniature.py judges` prints how well the thresholds separate: the share of autoencoded targets, of
untouched sources and of edits by a wrong prompt that each judge calls obeyed. The thresholds were set on clean pictures
and never changed for a method.
"""

from .classifier import attribute_classifier, caption_classifier
from .oracle import pixel_oracle, posed_oracle
from .verdict import Verdict

judges = {"pixel oracle": pixel_oracle, "attribute classifier": attribute_classifier}
caption_judges = {"pixel oracle": posed_oracle, "attribute classifier": caption_classifier}


def judges_of(editor):
    """The two judges for an editor: for edits by an instruction, or for img2img edits by a caption of the result."""
    return caption_judges if editor.kind == "img2img" else judges


def judge(sample, edited, editor=None):
    """The strict consensus of both judges on `edited`, a picture of any size, which is judged at 64x64.

    editor: the editor that made the edit. Without it the edit is taken for one by an instruction.
    """
    chosen = judges_of(editor) if editor else judges
    return Verdict.consensus(judge(sample, edited) for judge in chosen.values())
