"""What a run takes: memory, traffic, time, cost, and the best layout over a number of GPUs."""
