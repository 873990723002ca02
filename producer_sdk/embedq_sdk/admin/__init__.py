"""What operators do from anywhere: reload models, read the status, create topics."""
