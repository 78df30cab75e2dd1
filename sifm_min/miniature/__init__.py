"""The miniature: samples of a procedural world with their ground truth, and the two judges that know it.

    from sifm_min import miniature
    sample = miniature.samples(1, seed=3)[0]                 # .image .prompt .unseen_prompts .category .target
    verdict = miniature.judge(sample, edited)                # .success .obeyed .semantic_mismatch .perceptual_degradation

The miniature editors (`load_editor("miniature")`, `"miniature-plain"`, `"miniature-sd3"`) are for learning, testing and
benchmarking. A figure measured with them says nothing about protection against real editors.

`world.py`, `wording.py` and `drawing.py` are the world, `sample.py` draws samples of it, `consensus.py` says how the two
judges decide. This file imports them when they are first used, so that commands can read `miniature.verdict` without
torch.
"""

NOTICE = "The miniature is for learning, testing and benchmarking; it protects nothing against real editors."
__all__ = ["NOTICE", "Classifier", "Sample", "caption_judges", "judge", "judges", "judges_of", "prompt_of", "samples"]


def __getattr__(name):
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import classifier, consensus, sample
    return next(getattr(home, name) for home in (sample, consensus, classifier) if hasattr(home, name))


def __dir__():
    return sorted({*globals(), *__all__})
