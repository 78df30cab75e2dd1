"""The options that go around any method: flat minima, text refinement and a blurred perturbation.

    around = choose("sifm", flat=True, blur=1.0)             # ValueError for what makes no sense
    build = around.build(build, "sifm", editor, contexts, generator)    # x_orig -> objective
    objective = around.flattened(objective, [generator], eps, pixels)
    delta = around.descend(pixels, objective, eps, generator=generator, steps=100, step_size=1 / 255)
"""

from dataclasses import asdict, dataclass
from functools import partial
from types import SimpleNamespace

from .. import pgd
from .blurred import check_sigma, descend_blurred
from .flat_minima import SHARE, WEIGHT, flatten, passes_of_both, radius_in
from .text_refinement import EVERY, REACH, ROUNDS, refine_text

NUMBERS = {"flat": {"share": SHARE, "weight": WEIGHT}, "refine_text": {"every": EVERY, "rounds": ROUNDS, "reach": REACH}}
ON_BY_DEFAULT = {"tdae": ("flat", "refine_text")}
REFINED = ("sifm", "sifm-output", "semantic-attack", "tdae")    # whose objectives have texts and leaves
NOT_FLAT = {"sds": "flat compares the losses of two places, and the loss that sds reports is not the function whose gradient "
                   "it follows: leave flat out, or choose another method",
            "noise": "noise has no loss that could be flat: leave flat out"}


@dataclass(frozen=True)
class Around:
    """flat, refine_text: their numbers, or None. blur: a standard deviation in pixels, or None."""

    flat: dict | None = None
    refine_text: dict | None = None
    blur: float | None = None

    def build(self, build, method, editor, contexts, generator):
        """A function like build, x_orig -> objective, whose objectives refine their text; build itself where this editor's
        method has no text to refine, as `latent` beside SIFM."""
        if not self.refine_text or ":" not in method and method not in REFINED:
            return build
        return refine_text(build, editor, contexts, generator=generator, **self.refine_text)

    def flattened(self, objective, generators, eps, pixels, mask=None):
        """The objective, or a flat one. generators: all that it draws from; eps, pixels, mask: as of `pgd`."""
        if not self.flat:
            return objective
        radius = radius_in(eps, pixels, self.flat["share"], mask)
        return flatten(objective, generators=generators, radius=radius, weight=self.flat["weight"], mask=mask)

    def descend(self, pixels, objective, eps, **loop):
        """The perturbation, as `pgd` returns it, with its arguments; a blurred one, if chosen."""
        run = partial(descend_blurred, sigma=self.blur) if self.blur else pgd.pgd
        return run(pixels, objective, eps, **loop)

    def counted(self, objective):
        """The objective as `methods.counted_passes` takes it, with the passes of all its evaluations."""
        if not (self.flat and objective):
            return objective
        passes = passes_of_both(objective)
        return SimpleNamespace(passes=passes) if passes else SimpleNamespace()

    def gradients(self, objective, steps):
        """The gradient evaluations of so many steps: one each for every editor, two if flat, and those by the text.

        The joint objective of several editors has `gradients`, a pair: evaluations at a step, and before the first one.
        """
        each, before = getattr(objective, "gradients", (1, 0))
        refinements = getattr(objective, "refinements", lambda steps: 0)
        return each * steps * (2 if self.flat else 1) + before + refinements(steps)

    def record(self):
        """The options as a report states them."""
        return {name: value or False for name, value in asdict(self).items()}


def choose(name, *, flat=None, refine_text=None, blur=None, any_prompt=False):
    """The options around the method of this name.

    flat: True, or a dict of its numbers, "share" (see flat_minima.py) and "weight". refine_text: True, or a dict of "every",
      "rounds" and "reach" (see text_refinement.py). None is the method's default: both for tdae, neither for others.
    blur: a standard deviation in pixels, or None. any_prompt: True if every step draws its text; then no text is refined, not
      even by tdae.
    Raises ValueError for numbers out of range, and where an option makes no sense for the method.
    """
    if any_prompt and refine_text:
        raise ValueError("any_prompt draws another text at every step, and refine_text moves one for several steps: give one "
                         "of them")
    if any_prompt:
        refine_text = False
    given = {"flat": flat, "refine_text": refine_text}
    chosen = {option: _numbers(option, option in ON_BY_DEFAULT.get(name, ()) if value is None else value)
              for option, value in given.items()}
    if chosen["flat"] and name in NOT_FLAT:
        raise ValueError(NOT_FLAT[name])
    if chosen["refine_text"] and name not in REFINED and ":" not in name:
        raise ValueError(f"refine_text is for {', '.join(REFINED)}, not for {name}: it moves the text along the gradient of "
                         "their losses")
    if blur is not None and blur is not False:
        check_sigma(blur)
    return Around(**chosen, blur=blur or None)


def _numbers(option, value):
    """The numbers of an option, None if it is off."""
    if not value:
        return None
    numbers = NUMBERS[option]
    if value is True:
        return dict(numbers)
    if unknown := [key for key in value if key not in numbers]:
        raise ValueError(f"{option} has no {unknown[0]}; it has {', '.join(numbers)}")
    found = numbers | dict(value)
    for key, number in found.items():
        whole = isinstance(numbers[key], int)
        if isinstance(number, bool) or not isinstance(number, int if whole else int | float) or not 0 < number < float("inf"):
            raise ValueError(f"{option}: {key} is {number!r}; it is a {'whole ' if whole else ''}number above 0, such as "
                             f"{numbers[key]}")
    return found
