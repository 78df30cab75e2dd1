"""Float32 on a GPU as float32."""

import contextlib

import torch


@contextlib.contextmanager
def full_float32():
    """Convolve float32 tensors in float32 on a GPU as well; torch's default there is TF32, with 10 bits for 23.

    The setting belongs to the process: it is restored at the end. It changes nothing on a CPU.
    """
    cudnn = torch.backends.cudnn                             # torch 2.9 gave the switch another name
    where, name, exact = (cudnn.conv, "fp32_precision", "ieee") if hasattr(cudnn, "conv") else (cudnn, "allow_tf32", False)
    before = getattr(where, name)
    setattr(where, name, exact)
    try:
        yield
    finally:
        setattr(where, name, before)
