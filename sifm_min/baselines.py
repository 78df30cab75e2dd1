"""What SIFM is compared with. So far the control that every figure needs beside it; the paper's baselines follow."""


def noise(editor, x_orig, contexts, *, generator):
    """Uniform random noise at the same budget: no objective, so the loop returns its random start as it is.

    Whatever this control achieves is no merit of a method. Cost: nothing.
    """
    return None
