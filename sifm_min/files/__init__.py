"""Files: atomic writes, journals, and the bytes of pictures."""
