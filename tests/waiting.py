"""How long tests wait."""

TIMEOUT = 900.0
"""Seconds that a test waits for an event. Only a hang takes this long, even on a busy machine."""
