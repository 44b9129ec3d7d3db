"""Configuration files: data only."""
