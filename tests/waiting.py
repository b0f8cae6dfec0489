"""How long tests wait."""

TIMEOUT = 900.0
"""Seconds that a test waits for what must come. Only a hang takes this long, however busy the machine is."""
