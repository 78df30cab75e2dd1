"""torch.compile for an editor, block by block: what repeats in its networks is compiled, and the loops around it are not.

A residual block, a transformer block, is compiled when it first runs, once for all blocks whose weights have the same
shapes. So compiling takes a fraction of what a whole network takes, and what is done between blocks goes on as it was:
activations are tapped, the pass ends at the last tap, weights are read when they are first used, blocks are run again for
memory. Values and gradients agree with those of the plain blocks up to the order in which floats are added.
"""

import contextlib
import types

BACKEND = "inductor"                                         # torch's own: C++ on a CPU, Triton on a GPU
REMEDY = "leave --compile out"
_functions = {}                                              # kind of block, shapes, backend -> its compiled forward


def check(device):
    """ValueError, in one sentence, where this machine compiles nothing for the device: told now, not in the first step."""
    import torch

    def probe(x):
        return x + torch.compiler.is_compiling()

    zero = torch.zeros(2, device=device)
    try:
        ran = torch.compile(probe, backend=BACKEND)(zero)
    except (RuntimeError, ImportError, OSError) as error:    # no C++ compiler, no Triton, a Python that it does not know
        raise ValueError(f"torch.compile does not work here ({_reason(error)}); {REMEDY}") from error
    if not ran.any():
        raise ValueError(f"torch.compile is switched off here, as by TORCH_COMPILE_DISABLE; {REMEDY}")


def compile_blocks(network):
    """Has every block of one of `network.REPEATED` compiled, in place, when it first runs."""
    for block in network.modules():
        if isinstance(block, network.REPEATED):
            # `forward` alone, and not the hooks around it: one of them reads the block's weights, when it first runs.
            block.forward = types.MethodType(_compiled_forward(block), block)


def _compiled_forward(block):
    import torch

    shapes = tuple((name, weight.shape) for name, weight in block.named_parameters())
    if (key := (type(block), shapes, BACKEND)) not in _functions:
        plain = type(block).forward
        # torch counts what it compiled of a piece of code, and gives up after a few; so each kind has a copy of the code.
        code = plain.__code__.replace(co_name=f"{type(block).__name__}_{len(_functions)}")
        own = types.FunctionType(code, plain.__globals__, code.co_name, plain.__defaults__, plain.__closure__)
        _functions[key] = torch.compile(own, backend=BACKEND)
    return _functions[key]


@contextlib.contextmanager
def in_words():
    """What the compiler raises, be it in the first step, becomes a ValueError of one sentence."""
    try:
        yield
    except RuntimeError as error:
        if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        raise ValueError(f"torch.compile failed ({_reason(error)}); {REMEDY}") from error


def _reason(error):
    """The first paragraph of what the compiler says: advice for its developers follows."""
    return " ".join(str(error).strip().partition("\n\n")[0].split()) or type(error).__name__
