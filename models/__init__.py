"""The networks, one self-contained file each, and what loads them; imported as `sifm_min.models`.

This folder is code. Weights live elsewhere: in the Hugging Face cache, in a folder in the published layout, or, for the
shipped miniature editors, in `miniature/`. Nothing here knows what an attack is, and nothing is imported eagerly: torch
is loaded by the file that needs it.
"""
