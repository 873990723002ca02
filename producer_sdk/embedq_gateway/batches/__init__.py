"""OpenAI's batch interface over the bulk lane: files that callers upload, and batches that survive whoever runs them."""
