"""A page that shows the service, and lets a person try it."""
