"""The installed software and the GPUs: whether they are compatible, and otherwise the command that fixes it."""
