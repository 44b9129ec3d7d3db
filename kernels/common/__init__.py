"""What every kernel package shares: dispatch, tiling, numerics, timing."""
