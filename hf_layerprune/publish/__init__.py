"""A model's way to the Hub: its card, the checks before a push and the upload, the proof of its weights, its Space."""
