"""What a model must pass before it may serve: where it lies, what it needs, what it gives, and what it did to processes before."""
