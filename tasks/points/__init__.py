"""Point tracking: data, losses, training, evaluation, the track command."""
