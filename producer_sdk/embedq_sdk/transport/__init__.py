"""Sending jobs and reading replies: everything that a client does with Kafka."""
