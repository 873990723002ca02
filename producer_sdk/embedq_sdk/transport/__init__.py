"""Jobs out, replies in: everything that a client does with Kafka."""
