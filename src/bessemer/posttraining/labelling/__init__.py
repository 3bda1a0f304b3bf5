"""Rankings of answers by people, as pairs to learn from."""
