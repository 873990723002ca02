"""The requests that carry records, written and read at once; what they say is aiokafka's own."""
