"""A text classifier that a user trains with two folders, good and bad, and that the refinery then applies to every document.

`training.train_classifier` makes a folder of JSON and one NumPy array, `model.load_classifier` opens it and
`model.classifier_scores` applies it. Nothing is imported here: settings (`config`) are read without compiling loops.
"""
