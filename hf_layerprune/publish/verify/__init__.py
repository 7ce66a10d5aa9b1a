"""Whether a model is what its records say it is."""
