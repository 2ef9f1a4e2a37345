"""Floor 4: from rows to batches of a training loop."""
