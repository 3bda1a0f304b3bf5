"""Text embedders from decoders, by contrastive learning.

`config.py` has the settings, `objective.py` InfoNCE over the passages of a row, `data.py` questions and passages as rows,
`stage.py` the stage `embedder`, `specs.py` its description for the pipeline.
"""
