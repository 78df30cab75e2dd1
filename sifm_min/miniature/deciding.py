"""The two independent judges of edits of photographs, and their strict consensus.

`judge(sample, edited)` is the strict consensus of two judges. Each judge is an OR of two findings, as in the paper: semantic
mismatch (the instruction was not followed) and perceptual degradation (the picture is damaged). `judges` holds both. They are
callables like any other judges, so `judging.records.ask` makes records of their verdicts.

exact oracle (`fidelity.py`): compares the edit with the exact target, and with what an autoencoder loses of it.
recogniser (`recogniser.py`): a small network that names the edit and scores damage; it never sees the target.

`thresholds.py` has every threshold and says what they were fixed on.
"""

from ..files.digests import digest
from ..models import latent_spaces
from ..models.checkpoints import sha256
from . import recogniser, thresholds
from .fidelity import exact_oracle
from .recogniser import recognise
from .verdict import Verdict

judges = {"exact oracle": exact_oracle, "recogniser": recognise}


def sha256_of_judges():
    """One SHA-256 of all that decides a verdict beside the code: thresholds, recogniser, and the oracle's autoencoder."""
    values = {name: value for name, value in vars(thresholds).items() if name.isupper()}
    return digest([values, *sha256_of_networks()])


def sha256_of_networks():
    """The SHA-256 of the two networks that verdicts depend on, the recogniser and the oracle's autoencoder."""
    return [sha256(recogniser.WEIGHTS), sha256(latent_spaces.COPIES / "sd1" / latent_spaces.WEIGHTS)]


def judge(sample, edited, editor=None):
    """The strict consensus of both judges on `edited`, a PIL picture of any size.

    editor: the editor that made the edit; the verdict does not depend on it.
    """
    return Verdict.consensus(one(sample, edited) for one in judges.values())
