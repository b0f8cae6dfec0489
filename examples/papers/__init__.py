"""The papers' claims on a pretrained model: see run.py."""
