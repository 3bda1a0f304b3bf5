"""Recipes, one YAML file per thing a user wants to make."""
