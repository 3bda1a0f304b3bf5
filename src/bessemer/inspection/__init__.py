"""Interpretability: attention weights, the logit lens, roles and ablation of heads, experts, embeddings."""
