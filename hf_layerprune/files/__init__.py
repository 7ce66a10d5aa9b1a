"""Copy and write files and folders atomically; read files from disk and from the Hub."""
