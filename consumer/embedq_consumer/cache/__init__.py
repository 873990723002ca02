"""Vectors that Redis remembers, for as long as Redis answers."""
