"""The parts of the command `immunize` beside its work on a file: its flags and its preview."""
