"""Recipes read and checked, the stage graph, the runner, the report. Wires the other packages and computes nothing."""
