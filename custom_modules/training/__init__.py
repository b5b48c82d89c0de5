"""What the training configs name: batches, losses, handlers and the run on disk."""
