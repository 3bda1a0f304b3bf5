"""Safety: the guard of a policy, and what measures a model's safety."""
