"""Models that run piece by piece: segments, the weights that come and go, what modules put out on the way."""
