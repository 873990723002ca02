"""What surrounds each request: its headers and body within bounds, the answer or the error, and the log line."""
