"""What operators see of a gateway."""
