"""What every package may need: config base, artefact store, errors, progress, metrics, seeds.

Imports nothing else of Bessemer and none of the heavy libraries.
"""
