"""A standing sink: a topic followed into a store, its offsets committed after the store's acknowledgement."""
