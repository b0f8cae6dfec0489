"""Post-training of large language models on many responses per prompt, at Megatron scale."""

__version__ = "0.2.0"
