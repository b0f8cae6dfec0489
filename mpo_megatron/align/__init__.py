"""`mpo align`: from a Hugging Face model to an aligned one with one command.

align.py runs the stages, plan.py builds and checks their configurations, outcome.py reports what changed.
"""
