"""Records of judges for the tests of statistics: single ones, arms with given outcomes, and random ones."""

import itertools
import random

from sifm_min.judging.records import Record


def record(image, prompt="own", arm="sifm", judge="a", findings=(True, False), status="ok"):
    return Record(f"{image}/{prompt}", f"{image}", f"{prompt}", arm, judge, *findings, status)


def rated(successes, arm="sifm", judges=("a", "b"), prompts=("own",)):
    """Records of an arm: `successes` holds True (all judges), False (none), "split" or None (the last judge has none)."""
    said = {True: (1, 1), False: (0, 0), "split": (1, 0), None: (1, None), "failed": (0, None)}
    return [record(i // len(prompts), prompts[i % len(prompts)], arm, judge,
                   (None, None) if vote is None else (bool(vote), False), "blocked_output" if vote is None else "ok")
            for i, success in enumerate(successes) for judge, vote in zip(judges, said[success], strict=True)]


def drawn(seed, arms=("control", "noise", "sifm", "mist"), images=12, prompts=3, judges=("a", "b"), missing=0.1):
    """Random records, some missing; image effects, so that the prompts of an image go together."""
    rng = random.Random(seed)
    records = []
    for arm, image in itertools.product(arms, range(images)):
        tendency = rng.random()
        for prompt, judge in itertools.product(range(prompts), judges):
            lost = rng.random() < missing
            records.append(record(image, prompt, arm, judge, (None, None) if lost else (rng.random() < tendency,
                                  rng.random() < 0.2), "timeout" if lost else "ok"))
    return records
