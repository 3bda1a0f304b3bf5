"""Planning of training runs: memory, communication, step time, cost, and the best layout on a number of GPUs."""
