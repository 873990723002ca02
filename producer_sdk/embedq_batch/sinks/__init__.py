"""Where vectors go. A new kind of store is one file here, and a line in `opening.py`."""
