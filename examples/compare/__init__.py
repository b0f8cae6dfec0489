"""The main methods side by side on the quickstart's task: see run.py."""
