"""Copy and write so that a file or folder appears whole or not at all."""
