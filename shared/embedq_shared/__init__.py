"""The wire contract: messages, codecs, topic and header names."""
