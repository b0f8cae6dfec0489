"""From a Hugging Face checkpoint to an aligned one in a few minutes on a laptop: see run.py."""
