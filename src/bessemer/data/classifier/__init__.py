"""Text classifier of a user's own, trained on a folder of good and one of bad texts, as a score of the stage `clean`.

`training.train_classifier` makes a folder of JSON and one NumPy array, `model.load_classifier` opens it and
`model.classifier_scores` applies it. Nothing is imported here: settings (`config`) are read without compiling loops.
"""
