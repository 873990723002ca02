"""Two models compared offline, before a reload: `embedq verify`."""
