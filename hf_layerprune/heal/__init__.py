"""Heal: recover a pruned model's quality by training a few of its layers.

The outputs that training does not change are computed once: those of the frozen layers below the first trained one
(`runtime.prefix`), and those of the dense model (`teacher`). TRL's trainer then runs the tail alone (`trainer`).
"""
