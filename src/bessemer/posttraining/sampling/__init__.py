"""Samples of the policy, for `rl` and `distillation`: prompts, the sampler on the engine, batches of samples."""
