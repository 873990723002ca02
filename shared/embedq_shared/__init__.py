"""The wire contract (messages, codec, headers, topics, `spec/`), and `kafka`, the one room that knows aiokafka's traps."""
