"""Linear classifier of texts: a weight for each bucket of features, and a calibration of their mean to a probability.

It is logistic regression on hashed n-grams, with x the number of times each occurs, divided by the root of their number. For
two classes fastText's averaged embeddings followed by a linear layer are the same family of functions: the layer's product
with each embedding is one number per n-gram. So that number is what we learn, which is a convex problem.

On disk: `classifier.json` (settings, calibration, what was measured) and `weights.npy` (float32). Opening them runs no code.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from bessemer.core.errors import ArtefactError
from bessemer.data.classifier.features import Features, summed
from bessemer.data.filters.measures import rounded
from bessemer.data.text.texts import Texts

FORMAT = 1


@dataclass(frozen=True)
class Classifier:
    """`weights` (2^bits,) float32; the probability that a text is good is σ(slope · logit + intercept)."""

    name: str
    features: Features
    weights: np.ndarray
    bias: float
    slope: float
    intercept: float
    measured: dict[str, Any]

    def logits(self, texts: Texts) -> np.ndarray:
        """Of each text (Σ weights) / √n + bias over its n features; the bias alone for a text without any."""
        sums, sizes = summed(texts, self.features, self.weights)
        return sums / np.sqrt(np.maximum(sizes, 1)) + self.bias

    def probabilities(self, texts: Texts) -> np.ndarray:
        """Of each text how probably it is good, float64 in [0, 1]."""
        return sigmoid(self.slope * self.logits(texts) + self.intercept)

    def save(self, folder: Path) -> None:
        """Write the two files into a folder that exists."""
        np.save(folder / "weights.npy", self.weights, allow_pickle=False)
        described = {
            "format": FORMAT,
            "name": self.name,
            "features": self.features._asdict(),
            "bias": self.bias,
            "slope": self.slope,
            "intercept": self.intercept,
            "measured": self.measured,
        }
        (folder / "classifier.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")


def load_classifier(folder: Path) -> Classifier:
    """Open a classifier's folder. Raises ArtefactError where it is not one, or is damaged or of a newer format."""
    try:
        described = json.loads((folder / "classifier.json").read_text(encoding="utf-8"))
        weights = np.load(folder / "weights.npy", allow_pickle=False)
        if described["format"] != FORMAT:
            raise ArtefactError(f"{folder}: this classifier has format {described['format']}, and {FORMAT} is known here")
        features = Features(**described["features"])
        numbers = {name: float(described[name]) for name in ("bias", "slope", "intercept")}
        if weights.shape != (1 << features.bits,) or weights.dtype != np.float32:
            raise ArtefactError(f"{folder}: the weights do not fit the classifier ({weights.dtype} {weights.shape})")
        return Classifier(described["name"], features, weights, measured=described["measured"], **numbers)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtefactError(f"{folder}: this is no classifier, or a damaged one ({error})") from None


def classifier_columns(classifier: Classifier) -> dict[str, pa.DataType]:
    """The column that a classifier writes: `classifier_NAME`."""
    return {f"classifier_{re.sub(r'[^a-z0-9]+', '_', classifier.name.lower()).strip('_') or 'score'}": pa.float64()}


def classifier_meaning(classifier: Classifier) -> dict[str, str]:
    """What that column says, in one line."""
    (column,) = classifier_columns(classifier)
    return {column: f"how probably the text is {classifier.name!r}, by the classifier trained on examples (0 to 1)"}


def classifier_scores(classifier: Classifier) -> Callable[[Texts], dict[str, pa.Array]]:
    """The scorer that applies a classifier."""
    (column,) = classifier_columns(classifier)
    return lambda texts: {column: rounded(classifier.probabilities(texts))}


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """1 / (1 + e^−x), without overflow."""
    return np.where(logits >= 0, 1 / (1 + np.exp(-np.abs(logits))), 1 - 1 / (1 + np.exp(-np.abs(logits))))
