"""Parameters and forward passes. Knows nothing of data, losses or optimisers."""
