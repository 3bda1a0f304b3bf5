"""The data stages: collect, clean, select, deduplicate, and what they share."""
