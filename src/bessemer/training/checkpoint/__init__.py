"""Training checkpoints: written, read, resumed from, exported to model folders."""
