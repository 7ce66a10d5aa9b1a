"""Measured numbers as people read them: what a metric is called, how a number is written, which rows and columns.

The terminal, the card and the Space read the same. The files here import nothing but each other, since a published
Space carries a copy of them.
"""
