"""The shared training loop and what it stands on."""
