"""Presentation of measured numbers, for the terminal and the card: labels of metrics, formats, tables of results."""
