"""What every training stage shares: flags, devices and ranks, losses, optimizer, the loop, checkpoints, reports."""
