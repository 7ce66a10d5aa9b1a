"""Rows of tokens that criteria and repairs look at."""
