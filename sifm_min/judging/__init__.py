"""Judging edited pictures: by vision models, by people, and the statistics of their verdicts. README.md says how."""
