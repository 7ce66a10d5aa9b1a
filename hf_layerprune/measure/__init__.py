"""Measuring: zero-shot accuracy, perplexity, distance to the dense model, speed and memory. Writes `metrics.json`."""
