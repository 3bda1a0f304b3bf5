"""Safety of a model and of what is served with it."""
