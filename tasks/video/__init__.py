"""Video classification: data, training, evaluation, frame-by-frame use."""
