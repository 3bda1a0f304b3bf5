"""Safety: what a model has memorised, and what it must not say."""
