"""The installed software and the GPUs: whether they fit each other, and the command that fixes it if not."""
