"""Training: one step, the loop around it, checkpoints, reference log-probs and metrics."""
