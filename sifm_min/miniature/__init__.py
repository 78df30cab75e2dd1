"""The miniature: samples of photographs with instructions and their exact results, and the two judges that know them.

    from sifm_min import miniature
    sample = miniature.samples(1, seed=3)[0]                 # .image .prompt .unseen_prompts .category .target
    verdict = miniature.judge(sample, edited)                # .success .obeyed .semantic_mismatch .perceptual_degradation

The miniature editors (`load_editor("miniature")`, `"miniature-sd3"`) are for learning, testing and benchmarking. A figure
measured with them says nothing about protection against real editors.

`kinds.py` has the instructions, `whole_edits.py` and `placed_edits.py` their exact results, `pictures.py` draws samples,
`photographs.py` lists the photographs that ship and those of a folder, `deciding.py` says how the two judges decide. This
file imports them when they are first used, so that commands can read `miniature.verdict` without torch.
"""

NOTICE = "The miniature is for learning, testing and benchmarking; it protects nothing against real editors."
__all__ = ["NOTICE", "Sample", "judge", "judges", "samples"]


def __getattr__(name):
    if name in ("Sample", "samples"):
        from . import pictures as home
    elif name in ("judge", "judges"):
        from . import deciding as home
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(home, name)


def __dir__():
    return sorted({*globals(), *__all__})
