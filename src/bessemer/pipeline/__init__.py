"""Recipes read and checked, the stage graph, the runner, the report. Wires every other room and computes nothing."""
