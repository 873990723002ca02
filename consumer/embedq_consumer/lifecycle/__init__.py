"""A model is loaded, checked, swapped in while nothing is in flight, and reported on the status topic."""
