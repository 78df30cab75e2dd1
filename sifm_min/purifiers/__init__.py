"""Purifiers: the transforms that a picture meets before an edit, as an attacker runs them and as a method differentiates."""
