"""Training: batches, losses, handlers, checkpoints and the record of a run."""
