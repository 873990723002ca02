"""embedq for applications."""
