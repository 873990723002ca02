"""What operators do: reload a model, see the status, create the topics."""
