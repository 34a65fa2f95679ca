"""A run and its folder: its settings and versions, its claim on the folder, its processes."""
