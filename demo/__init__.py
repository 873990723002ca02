"""`python -m demo`: the main job on real input, from an empty broker to a reload under load."""
