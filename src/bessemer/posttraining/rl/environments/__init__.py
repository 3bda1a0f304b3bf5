"""Environments of episodes: a user's own, and those that packages share, `verifiers` and OpenEnv, by adapters."""
