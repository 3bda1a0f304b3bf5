"""Post-training: a pretrained model becomes an assistant.

A method is a folder: `config` (settings and the registry of what they may name), `stage` (its data, its run), `objective`,
`losses`, `specs` (the stage for the pipeline, and its section of the report). `data/` reads, encodes, packs and splits
examples for all methods; `sampling/` completes prompts with the weights that are trained, for `rl/` and `distillation/`.
"""
