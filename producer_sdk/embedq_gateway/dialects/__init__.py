"""The shapes in which others ask for embeddings, each thin over `Embedder`."""
