"""Heal: bring a model that lost layers back towards the dense one by training the few layers that need it.

What never changes is computed once: the frozen layers below the first trained one (`prefix`), and the dense model's
answers (`teacher`). Training then runs the tail alone, on TRL's trainer (`trainer`).
"""
