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
_copies = {}                                                 # kind of block -> case -> its compiled forward


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
            block.forward = _forward(block)


def _forward(block):
    import torch

    kind = type(block), tuple((name, weight.shape) for name, weight in block.named_parameters()), BACKEND

    def forward(*inputs):
        case = torch.is_grad_enabled(), *((x.requires_grad, x.is_contiguous(), len(x) == 1)
                                          for x in inputs if isinstance(x, torch.Tensor))
        return _compiled(kind, case)(block, *inputs)

    return forward


def _compiled(kind, case):
    """The compiled forward of a kind of block in a case. torch keeps a few versions of one piece of code, and runs it as it
    is after that: so every case, which would be one more, has a copy of the code, and versions are left for sizes."""
    import torch

    copies = _copies.setdefault(kind, {})
    if case not in copies:
        plain = kind[0].forward
        name = f"{kind[0].__name__}_{list(_copies).index(kind)}"         # by which torch knows what sizes it has seen
        copy = types.FunctionType(plain.__code__.replace(co_name=name), plain.__globals__, name, plain.__defaults__,
                                  plain.__closure__)
        copies[case] = torch.compile(copy, backend=kind[-1])
    return copies[case]


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
