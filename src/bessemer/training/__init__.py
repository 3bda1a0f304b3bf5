"""Training: batches, objectives, optimizers, learning-rate schedules, checkpoints, the training loop, pretraining."""
