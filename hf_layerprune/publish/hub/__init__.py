"""Publishing on the Hub, and the checks before it."""
