"""The training loop: batches, losses, optimizers, schedules, checkpoints, monitoring; pretraining."""
