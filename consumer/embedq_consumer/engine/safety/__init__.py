"""What keeps a model directory from harming the service: regular files only, sizes bounded, nobody's code, panics caught."""
