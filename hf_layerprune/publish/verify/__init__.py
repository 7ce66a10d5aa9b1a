"""Verify a model against its base and its records."""
