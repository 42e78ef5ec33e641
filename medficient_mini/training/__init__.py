"""Both training stages: samples, losses, optimiser, loop."""
