"""Tasks: items, how they are asked, verifiers."""
