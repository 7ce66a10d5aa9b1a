"""What each command does, from folder to folder."""
