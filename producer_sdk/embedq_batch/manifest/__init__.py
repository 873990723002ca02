"""What a run remembers: which rows are done, under which model version, and which failed."""
