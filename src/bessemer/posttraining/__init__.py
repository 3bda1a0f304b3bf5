"""Post-training: supervised fine-tuning on conversations."""
