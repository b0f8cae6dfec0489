"""Ratios measured side by side in one process: `python -m benchmarks.<name> [--size small]`; see
docs/experiments/benchmarks.md."""
