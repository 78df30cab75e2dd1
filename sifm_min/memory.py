"""Memory plans: how many pictures and timesteps a method runs at once, and whether activations are kept or computed again.

Whatever the plan, the same gradients meet in the same latent: results agree up to the order in which floats are added.
"""

import contextlib
import gc
import itertools
import math
import warnings
from typing import NamedTuple

MEMORY = ("auto", "fast", "low")
AT_ONCE_ON_A_CPU = 4                                         # more in a batch is hardly faster there, and takes memory
PIXELS, PICTURES = 512 * 512, 8                              # at once, at most: more is no faster


class Plan(NamedTuple):
    """batch: timesteps at once, None where the method runs one, or all. checkpointing: whether the networks compute their
    activations again on the way back instead of keeping them. pictures: how many at once."""

    batch: int | None
    checkpointing: bool
    pictures: int = 1

    def __str__(self):
        together = f"{self.pictures} pictures at once" if self.pictures > 1 else ""
        at_once = {None: "", 1: "one timestep at a time"}.get(self.batch, f"{self.batch} timesteps at once")
        again = "activations computed again on the way back" if self.checkpointing else ""
        return ", ".join(part for part in (together, at_once, again) if part) or "everything at once"


def pictures_at_once(memory, editor, width, height):
    """How many pictures of this size are run at once: small ones, where that is faster."""
    if memory == "low" or editor.device.type == "cpu" and not editor.is_miniature:
        return 1
    return max(1, min(PICTURES, PIXELS // max(math.prod(editor.frame(width, height)), width * height)))


def plans(memory, editor, count=None, batch=None, pictures=1):
    """The plans to try in turn.

    count: of the method's timesteps, None where it takes no batch of them; batch: what the caller asked for, which then
    stands; pictures: how many are to run at once, which the first plan does and no other. memory: "fast" is everything at
    once, "low" one timestep at a time, computed again on the way back, without a text encoder in memory. "auto" starts
    with what is fastest and gives way, where the device's memory ends, by half and at last to "low". Where a CPU's ends,
    the process ends; so there it starts with a third of the timesteps, four at most, except on a miniature.
    """
    if memory not in MEMORY:
        raise ValueError(f"memory {memory!r}: choose one of {', '.join(MEMORY)}")
    if count is None or batch is not None:
        sizes = [batch]
    else:
        few = memory == "auto" and editor.device.type == "cpu" and not editor.is_miniature
        most = max(1, min(count // 3, AT_ONCE_ON_A_CPU)) if few else count
        sizes = [most >> n for n in range(max(most, 1).bit_length())]
    kept, again = [Plan(size, False) for size in sizes], Plan(sizes[-1], True)
    if pictures > 1:
        kept.insert(0, kept[0]._replace(pictures=pictures))
    return {"auto": [*kept, again], "fast": kept[:1], "low": [again]}[memory]


def run(work, memory, editor, count=None, batch=None, pictures=1):
    """(what work(plan) returns, the plan) of the first plan whose memory suffices; each that does not is told as a warning.
    Raises ValueError where none does."""
    tried = plans(memory, editor, count, batch, pictures)
    if memory == "low":
        editor.forget_text()
    for plan, following in itertools.zip_longest(tried, tried[1:]):
        editor.checkpointing = plan.checkpointing
        try:
            return work(plan), plan
        except (MemoryError, RuntimeError) as error:
            if not is_short(error):
                raise
        finally:
            editor.checkpointing = False
        _release(editor)                                     # here, where the traceback that holds its tensors is gone
        if following:
            warnings.warn(f"out of memory with {plan}; going on with {following}", stacklevel=3)
    better = "" if tried[-1].checkpointing else "memory low, "
    raise ValueError(f"out of memory with {tried[-1]}; {better}a smaller picture or a narrower dtype may help")


def is_short(error):
    """Whether this exception is of memory that ended; torch has none of its own for a CPU."""
    import torch
    if isinstance(error, MemoryError | torch.cuda.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and ("DefaultCPUAllocator" in str(error) or "out of memory" in str(error).lower())


@contextlib.contextmanager
def in_words():
    """An exception of memory that ended becomes a ValueError, a sentence for whoever chose sizes and device."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_short(error):
            raise
        raise ValueError("out of memory; a smaller picture or --size, a narrower --dtype or another --device may "
                         "help") from error


def _release(editor):
    """Gives back what the failed plan held, and the text encoder, so that the next one has it."""
    editor.forget_text()
    gc.collect()
    if editor.device.type == "cuda":
        import torch
        torch.cuda.empty_cache()
