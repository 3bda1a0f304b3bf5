"""Serving with Ray Serve: one entrance, and as many engines as there are replicas, on one machine or many."""
