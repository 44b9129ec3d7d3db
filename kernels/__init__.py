"""Pure functions of arrays: no Flax, no config objects from above."""
