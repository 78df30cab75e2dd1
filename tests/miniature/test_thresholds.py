"""The judges' thresholds are frozen: they were fixed before any method was run, and none is moved for a method."""

from sifm_min.miniature import deciding, kinds, recogniser, thresholds
from sifm_min.models import latent_spaces
from sifm_min.models.checkpoints import sha256


def test_the_thresholds_are_those_that_were_fixed():
    values = {name: value for name, value in vars(thresholds).items() if name.isupper()}
    assert values == {"FIXED": "2026-11-29", "PROGRESS": 0.5, "RESIDUAL": 0.6, "OUTSIDE": 0.12, "OUTSIDE_SHARE": 0.05,
                      "STRUCTURE": 0.15, "CONTRAST": 0.38, "ASKED": 0.10, "DAMAGED": 0.50}


def test_the_networks_are_those_the_thresholds_were_fixed_on():
    """A verdict of the oracle depends on the copy of the latent space, and one of the recogniser on its weights."""
    assert sha256(latent_spaces.COPIES / "sd1" / latent_spaces.WEIGHTS) == (
        "1901af167704620f0a7c5db46319b8d541efa8f96ee285a65a1532d455b28018")
    assert sha256(recogniser.WEIGHTS) == "9f2f07269ca10c34d554fcc5e8cef0162e81b5af4e07e64105be7f50540a344e"
    assert (kinds.VISIBLE, kinds.LEAST) == (0.06, 0.05)


def test_another_threshold_or_network_is_another_judge(monkeypatch, tmp_path):
    """So that no run keeps the verdicts of another."""
    before = deciding.sha256_of_judges()
    with monkeypatch.context() as patched:
        patched.setattr(thresholds, "DAMAGED", 0.6)
        assert deciding.sha256_of_judges() != before
    (tmp_path / "w").write_bytes(b"other")
    monkeypatch.setattr(recogniser, "WEIGHTS", tmp_path / "w")
    assert deciding.sha256_of_judges() != before
