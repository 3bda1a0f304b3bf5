"""Safety: the guard of a policy, what a model has memorised, and what measures its safety."""
