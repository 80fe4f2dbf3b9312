"""Training of draft heads: alignment, packing, losses, metrics. Knows nothing of clusters."""
