"""A model directory becomes an encoder: checked, versioned, loaded and proved."""
