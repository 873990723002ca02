"""A run over a source: read, embed, write, and go on after whatever happened."""
