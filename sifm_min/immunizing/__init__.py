"""The parts of `immunize`: flags, each editor's share of a run, the joint loss of several editors, and the preview."""
