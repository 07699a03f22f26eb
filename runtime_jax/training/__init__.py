"""Training, whatever is trained: optimizers, checkpoints, the loop and what it writes."""
