"""Metrics of training: throughput, diagnostics, profiles, trackers."""
