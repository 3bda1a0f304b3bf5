"""What happens inside a model while it reads: attention, predictions of each layer, what heads do, experts, embeddings."""
