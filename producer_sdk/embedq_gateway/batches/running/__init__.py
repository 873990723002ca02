"""Batches on their way: whose lease is over, lines run and written down, and which batches this process runs."""
