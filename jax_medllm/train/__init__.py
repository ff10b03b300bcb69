"""Training: the loop, its data, losses, optimizer and checkpoints."""
