"""The destination of each tensor of a file that is not in the diffusers layout, and tables of such destinations."""

from typing import NamedTuple


class Place(NamedTuple):
    """The destination of a tensor of a file, and the part of it that goes there."""

    name: str                                       # in the diffusers layout
    rows: tuple[int, int, int] | None = None        # (start, end, of): only the rows from start/of to end/of
    swapped: bool = False                           # the second half of the rows first
    scale: str | None = None                        # the tensor with the number by which this one is multiplied

    def below(self, prefix):
        """The same place for a file in which the scale has this prefix."""
        return self._replace(scale=prefix + self.scale) if self.scale else self

    def shape(self, shape):
        """The shape of the part, or of the whole where it does not divide."""
        if self.rows is None or not shape or shape[0] % self.rows[2]:
            return shape
        start, end, of = self.rows
        return (shape[0] // of * (end - start), *shape[1:])

    def take(self, tensor):
        """The part."""
        if self.rows is not None:
            start, end, of = self.rows
            unit = len(tensor) // of
            tensor = tensor[start * unit:end * unit]
        return tensor.roll(len(tensor) // 2, 0) if self.swapped else tensor


def both(stored, *names, swapped=False, shares=None, kinds=("weight", "bias")):
    """{name in the file: its places}, for the weight and the bias of a layer.

    Several names get equal parts of the rows, one after the other, or parts in the proportion of `shares`.
    """
    shares = shares or [1] * len(names)
    ends = [sum(shares[:i + 1]) for i in range(len(names))]
    rows = [(end - share, end, ends[-1]) if len(names) > 1 else None for share, end in zip(shares, ends, strict=True)]
    return {f"{stored}.{kind}": tuple(Place(f"{name}.{kind}", part, swapped) for name, part in zip(names, rows, strict=True))
            for kind in kinds}


def count(shapes, pattern):
    """The count of different numbers at {} in the names that begin with the pattern."""
    before, after = pattern.split("{}")
    found = (name[len(before):].split(after)[0] for name in shapes if name.startswith(before))
    return len({number for number in found if number.isdecimal()})
