"""A name that readers use, and what it means."""
