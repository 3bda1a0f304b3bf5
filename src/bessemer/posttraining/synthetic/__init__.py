"""Training data that stages make for later ones.

`synthesize`: prompts and answers that a model writes. `revise` and `ai_preferences`: answers revised and compared by
principles (constitutional AI; Bai et al. 2022). `honesty`: pairs that prefer "I don't know" to an answer that the corpus
does not hold.
"""
