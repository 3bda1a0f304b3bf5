"""The posttraining room."""
