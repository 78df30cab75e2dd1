"""Memory plans: how many timesteps a method runs at once, and whether activations are kept or computed again.

Every plan adds the same gradients; only the order of the additions differs, and with it the rounding of the results.
"""

import contextlib
import gc
import itertools
import math
import re
import sys
import warnings
import weakref
from typing import NamedTuple

MEMORY = ("auto", "fast", "low")
AT_ONCE_ON_A_CPU = 4                                         # more in a batch is hardly faster there, and takes memory
EDIT_PLANS = ("everything at once", "one picture and one pass of the guidance at a time")
_SHORT = weakref.WeakKeyDictionary()                         # editor -> {(job, plan): the smallest size that did not fit}


class Plan(NamedTuple):
    """batch: timesteps at once, None for all, or where the method runs one. checkpointing: True if the networks compute
    their activations again in the backward pass instead of keeping them."""

    batch: int | None
    checkpointing: bool

    def __str__(self):
        at_once = {None: "", 1: "one timestep at a time"}.get(self.batch, f"{self.batch} timesteps at once")
        again = "activations computed again in the backward pass" if self.checkpointing else ""
        return ", ".join(part for part in (at_once, again) if part) or "everything at once"


def plans(memory, editor, count=None, batch=None):
    """The plans to try in turn.

    count: of the method's timesteps, None where it takes no batch of them. batch: the caller's choice, which stands.
    memory: "fast" is everything at once; "low" is one timestep at a time, activations computed again in the backward
    pass, no text encoder in memory, and of FLUX the weights of one block at a time. "auto" starts with the fastest plan;
    each time the device's memory ends it halves the timesteps, and at last it computes activations again. On a CPU the
    process ends where memory ends, so there "auto" starts with a third of the timesteps, four at most, except on a miniature.
    """
    if memory not in MEMORY:
        raise ValueError(f"memory {memory!r}: choose one of {', '.join(MEMORY)}")
    if count is None or batch is not None:
        sizes = [batch]
    else:
        few = memory == "auto" and editor.device.type == "cpu" and not editor.is_small
        most = max(1, min(count // 3, AT_ONCE_ON_A_CPU)) if few else count
        sizes = [most >> n for n in range(max(most, 1).bit_length())]
    kept, again = [Plan(size, False) for size in sizes], Plan(sizes[-1], True)
    return {"auto": [*kept, again], "fast": kept[:1], "low": [again]}[memory]


@contextlib.contextmanager
def sparing(editor, memory):
    """Have the edits inside take as little memory as they can if memory is "low": one picture and one pass of the guidance at a
    time, no text encoder while the denoiser runs, and of FLUX the weights of one block at a time."""
    editor.streaming = memory == "low"
    try:
        yield
    finally:
        editor.streaming = False


def edit_plans(editor):
    """The plans of an edit, in turn."""
    return EDIT_PLANS[1:] if editor.streaming else EDIT_PLANS


def run_planned(work, memory, editor, count=None, batch=None, *, job="", size=0):
    """Return (work(plan), plan) for the first plan that fits in memory; each plan that does not is a warning.

    job, size: the kind of work and the number of pixels, for `first_fitting`. Raises ValueError where no plan fits.
    """
    def under(plan):
        editor.checkpointing, editor.streaming = plan.checkpointing, memory == "low"
        try:
            return work(plan)
        finally:
            editor.checkpointing = editor.streaming = False

    tried = plans(memory, editor, count, batch)
    if memory == "low":
        editor.forget_text()
    better = "" if tried[-1].checkpointing else "memory low, "
    return first_fitting(under, tried, editor, job=job, size=size, advice=f"{better}a smaller picture or a narrower dtype")


def first_fitting(work, tried, editor, *, job, size, advice):
    """Return (work(plan), plan) for the first of the plans that fits in memory; each plan that does not is a warning.

    A plan that did not fit is left out the next time that this editor has the same job of this size or a larger one.
    Raises ValueError with the advice where no plan fits.
    """
    short = _SHORT.setdefault(editor, {})
    tried = [plan for plan in tried[:-1] if size < short.get((job, plan), math.inf)] + [tried[-1]]
    for plan, following in itertools.zip_longest(tried, tried[1:]):
        try:
            return work(plan), plan
        except (MemoryError, RuntimeError) as error:
            if not is_short(error):
                raise
        short[job, plan] = min(size, short.get((job, plan), math.inf))
        release(editor)                                      # here, where the traceback that holds its tensors is gone
        if following:
            warnings.warn(f"out of memory with {plan}; going on with {following}", stacklevel=4)
    raise ValueError(f"out of memory with {tried[-1]}; {advice} may help")


def or_on_cpu(work, device, name):
    """Return work(device), or work(cpu) with a warning where the device's memory ends. name: of what runs."""
    import torch
    try:
        return work(device)
    except (MemoryError, RuntimeError) as error:
        if not is_short(error) or device.type == "cpu":
            raise
    _empty_cache(device)
    warnings.warn(f"out of memory with {name} on {device}; it runs on the CPU", stacklevel=3)
    return work(torch.device("cpu"))


# Of allocators for CPUs and GPUs, and of cuBLAS and cuDNN where no memory is left for their workspaces.
SHORT = re.compile(r"out of memory|DefaultCPUAllocator|_STATUS_(\w+_)?ALLOC\w*_FAILED", re.IGNORECASE)


def is_short(error):
    """True for out-of-memory errors; torch has no class of its own for a CPU's, nor for those of CUDA's libraries."""
    import torch
    if isinstance(error, MemoryError | torch.cuda.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and SHORT.search(str(error)) is not None


@contextlib.contextmanager
def in_words():
    """Raise an out-of-memory error as a ValueError of one sentence, with advice."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_short(error):
            raise
        raise ValueError("out of memory; a smaller picture or --size, a narrower --dtype, --no-t5 with Stable Diffusion 3, or "
                         "another --device may help") from error


def reset_peak(device):
    """Begin a new measurement of `peak` on a cuda device; elsewhere it cannot be reset."""
    if device.type == "cuda":
        import torch
        torch.cuda.init()                                    # else an indexed device is an error before its first tensor
        torch.cuda.reset_peak_memory_stats(device)


def peak(device):
    """Peak memory in bytes: of the device on cuda, of this process since its start elsewhere; None on Windows."""
    if device.type == "cuda":
        import torch
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def release(editor):
    """Free what a failed plan held, and the text encoder, for the next plan."""
    editor.forget_text()
    _empty_cache(editor.device)


def _empty_cache(device):
    gc.collect()
    if device.type == "cuda":
        import torch
        torch.cuda.empty_cache()
