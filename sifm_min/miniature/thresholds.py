"""The thresholds of both judges of photographs, in one place, with the day on which they were fixed.

They were fixed on rendered and autoencoded targets, on untouched sources, on the targets of other instructions, on synthetic
damage of stated strength (`tools/damages.py`), and on the edits of clean and of noisy photographs by the shipped editor, before
any method was run, and are not moved for a method. `tools/measure_judges.py` prints how each judge answers to all of these, and
models/miniature/README.md has the figures. tests/miniature/test_thresholds.py holds the values.
"""

FIXED = "2026-11-29"

# the exact oracle (`fidelity.py`); differences of pixels in [0,1] at half resolution
PROGRESS = 0.5                                               # at least this share of the way from the source to the target
RESIDUAL = 0.6                                               # at most this distance from the target, of that way's length
OUTSIDE = 0.12                                               # at most this RMS change where the instruction changes nothing
OUTSIDE_SHARE = 0.05                                         # of the picture; where less is unchanged, it is not measured
STRUCTURE = 0.15                                             # at most this loss of SSIM, one part full, two half resolution
CONTRAST = 0.38                                              # at most this share of the local contrast lost

# the recogniser (`recogniser.py`)
ASKED = 0.10                                                 # at least this probability of the edit that was asked for
DAMAGED = 0.50                                               # at most this score of damage, which training has at a limit
