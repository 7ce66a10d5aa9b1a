"""The PEFT method: its configuration, its model, what is tuned, and `prune_with`."""
