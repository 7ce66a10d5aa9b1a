"""The PEFT method: its configuration, its model, what is tuned, and `prune_with`."""

# First of all, so that PEFT is whole, and the method registered, before a module here is imported by name.
import peft  # noqa: F401
