"""What programs of embedq are told by their environment. Reading it loads no Kafka client."""
