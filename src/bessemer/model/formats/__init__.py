"""Other tools' forms of a model."""
