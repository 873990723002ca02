"""Rows, and what they are read from: columns, documents, addresses."""
