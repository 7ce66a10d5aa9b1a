"""Presentation of measured numbers: labels of metrics, formatting of numbers, and tables of results.

The terminal, the card and the Space all use these files. They import only each other, since a published Space contains
a copy of them.
"""
