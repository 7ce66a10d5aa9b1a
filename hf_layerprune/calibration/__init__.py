"""Calibration: the rows of tokens that criteria and repairs use."""
