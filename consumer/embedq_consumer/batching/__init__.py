"""Inputs become micro-batches: equal texts share one computation, and a token budget decides what runs together."""
