"""Load a model and run it in parts."""
