"""embedq over HTTP: OpenAI's embeddings interface, and others, in front of the queue. Loads nothing until it is used."""
