"""The parts of `benchmarks/heal_quality.py` and `benchmarks/heal_frontier.py`. None imports torch at first."""
