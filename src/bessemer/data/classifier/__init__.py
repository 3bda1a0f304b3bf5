"""A text classifier that a user trains with two folders, good and bad, and that the refinery then applies to every document.

`train_classifier` makes a folder of JSON and one NumPy array, `load_classifier` opens it, `classifier_scores` applies it.
"""

from bessemer.data.classifier.model import Classifier, classifier_columns, classifier_scores, load_classifier
from bessemer.data.classifier.training import ClassifierConfig, train_classifier

__all__ = [
    "Classifier",
    "ClassifierConfig",
    "classifier_columns",
    "classifier_scores",
    "load_classifier",
    "train_classifier",
]
