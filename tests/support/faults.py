"""A plausible mistake, put into one file of ours, that a comparison with the oracle must see."""


class Wrong:
    """A module with some functions replaced. Only our file is given it, so that the oracle's stays right."""

    def __init__(self, module, **functions):
        self.module, self.functions = module, functions

    def __getattr__(self, name):
        return self.functions.get(name) or getattr(self.module, name)
