"""Compensate for dropped layers in closed form, without training: `fit.fit_repair`.

Each repair has its own file and one entry in `registry.py`. `fit.py` runs the dense model for all of them.
"""
