"""A pretrained model learns to follow instructions that a program checks: see run.py."""
