"""Where rows come from. A new kind of source is one file here, and a line in `opening.py`."""
