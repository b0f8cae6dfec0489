"""Disturbances of every stage; see `python -m tools.trials --help`."""
