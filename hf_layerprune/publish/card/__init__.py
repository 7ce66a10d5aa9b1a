"""The model card, rendered from the records."""
