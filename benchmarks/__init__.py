"""Ratios measured side by side in one run: `python -m benchmarks.<name> [--size small]`; see docs/experiments/benchmarks.md."""
