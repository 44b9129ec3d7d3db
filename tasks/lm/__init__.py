"""Language modelling: data, training, evaluation, generation."""
