"""What goes to the Hub, and the checks before it goes."""
