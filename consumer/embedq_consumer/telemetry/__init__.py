"""What operators see: health pages, metrics and logs."""
