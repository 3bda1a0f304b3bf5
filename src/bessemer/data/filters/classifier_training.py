"""Training of the text classifier: logistic regression by AdaGrad, calibrated and evaluated on texts that it did not train on.

Texts come from a folder of good and one of bad examples: text, JSONL and Parquet files, plain or `.gz` or `.zst`. A hash of
each text decides its part: most train, a tenth calibrates and chooses the number of passes, a tenth is kept for the figures in
`classifier.json`. Nothing depends on names or order of files, and the order of texts in each pass comes from the seed, so the
same texts and settings give the same bytes on every machine with the same NumPy.
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from bessemer.core.config import Config, setting
from bessemer.core.errors import SourceError
from bessemer.core.hashing import hash_bytes
from bessemer.core.metrics import size
from bessemer.core.progress import Progress, Silent
from bessemer.data.filters.classifier import Classifier, Features, features_of, sigmoid
from bessemer.data.sources.source import encodable
from bessemer.data.text.compiled import compiled_allocating
from bessemer.data.text.texts import Texts


class ClassifierConfig(Config):
    """How a classifier is trained."""

    retired: ClassVar[Mapping[str, str]] = {"shortest_piece": "min_subword", "longest_piece": "max_subword"}

    name: str = setting("quality", "what a good text is called; its column is `classifier_NAME`", min_length=1)
    word_order: int = setting(2, "longest sequence of words that is a feature", unit="words", ge=1, le=4)
    min_subword: int = setting(3, "shortest subword that is a feature", unit="bytes", ge=1, le=8)
    max_subword: int = setting(
        0, "longest subword that is a feature; 0 for none, which is three times as fast", unit="bytes", ge=0, le=8
    )
    bits: int = setting(18, "the weights are 2^bits numbers of four bytes", ge=8, le=26)
    passes: int = setting(12, "most passes over the examples; the best by held-out loss is kept", ge=1)
    learning_rate: float = setting(0.3, "AdaGrad's step size", gt=0)
    l2: float = setting(1e-6, "pull of every weight towards zero", ge=0)
    prior: float = setting(0.5, "share of good texts that probabilities are calibrated for", gt=0, lt=1)
    seed: int = setting(0, "decides the order of examples", ge=0)


_COMPRESSED = (".gz", ".zst")
_KNOWN = (".txt", ".md", ".jsonl", ".parquet")


def read_examples(folder: Path) -> list[str]:
    """Every text below a folder (or of one file), without blank ones and copies, in an order that no file's name decides.

    A text file is one text, a line of JSONL and a row of Parquet another, by their `text`. Raises SourceError for what is
    not there or cannot be read, naming file and line.
    """
    if not folder.exists():
        raise SourceError(f"{folder}: there is no such folder of examples")
    files = [folder] if folder.is_file() else sorted(file for file in folder.rglob("*") if file.is_file() and _kind(file))
    if not files or not all(map(_kind, files)):
        raise SourceError(f"{folder}: holds no examples ({', '.join(_KNOWN)}, also with {' or '.join(_COMPRESSED)})")
    texts = {text for file in files for text in _texts(file) if text.strip()}
    if not texts:
        raise SourceError(f"{folder}: holds no text at all")
    return sorted(texts)


def _texts(file: Path) -> Iterator[str]:
    try:
        if _kind(file) == ".parquet":
            for batch in pq.ParquetFile(file).iter_batches(columns=["text"]):
                yield from (text for text in batch.column(0).to_pylist() if text)
        elif _kind(file) == ".jsonl":
            for number, line in enumerate(_content(file).split("\n"), start=1):
                if line.strip():
                    record = json.loads(line)
                    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
                        raise SourceError(f"{file}:{number}: a record of examples is an object with a 'text'")
                    yield encodable(record["text"])
        else:
            yield _content(file)
    except (OSError, EOFError, zlib.error, zstandard.ZstdError, pa.ArrowInvalid, json.JSONDecodeError) as error:
        raise SourceError(f"{file}: these examples cannot be read ({error})") from None


def _content(file: Path) -> str:
    data = file.read_bytes()
    if file.suffix == ".gz":
        data = gzip.decompress(data)
    elif file.suffix == ".zst":
        data = zstandard.ZstdDecompressor().stream_reader(io.BytesIO(data), read_across_frames=True).read()
    return data.decode("utf-8-sig", errors="replace")


def _kind(file: Path) -> str | None:
    suffixes = [suffix for suffix in file.suffixes if suffix not in _COMPRESSED]
    return suffixes[-1] if suffixes and suffixes[-1] in _KNOWN else None


#: Of 20 parts by hash: which calibrate, which are kept for the figures.
_PARTS, _CALIBRATING, _HELD_OUT = 20, (0, 1), (2, 3)
#: Fewer examples of a kind than this cannot be split in three.
_FEWEST = 30
_CALIBRATION_BINS = 10


def train_classifier(
    good: Path, bad: Path, out: Path, config: ClassifierConfig | None = None, *, progress: Progress | None = None
) -> dict[str, Any]:
    """Train on the texts below two folders and write the classifier to `out`, which exists. Returns what was measured.

    Texts in both folders are left out and counted. Raises SourceError for a folder that cannot be read or has fewer than 30
    texts of its own.
    """
    config, progress = config or ClassifierConfig(), progress or Silent()
    good_texts, bad_texts = read_examples(good), read_examples(bad)
    both = set(good_texts) & set(bad_texts)
    examples = [(text, 1) for text in good_texts if text not in both] + [(text, 0) for text in bad_texts if text not in both]
    for folder, label in ((good, 1), (bad, 0)):
        count = sum(of == label for _, of in examples)
        if count < _FEWEST:
            raise SourceError(
                f"{folder}: {count} texts are too few to learn from; {_FEWEST} are the least, thousands are better"
            )
    examples.sort(key=lambda example: (hash_bytes(example[0].encode()), example[1]))
    progress.say(f"training on {len(examples):,} texts, {size(sum(len(text) for text, _ in examples))}")
    classifier = fit([text for text, _ in examples], np.array([label for _, label in examples]), config, progress=progress)
    classifier.measured["in_both_folders"] = len(both)
    classifier.save(out)
    return classifier.measured


def fit(texts: list[str], labels: np.ndarray, config: ClassifierConfig, *, progress: Progress | None = None) -> Classifier:
    """A classifier of texts with labels 1 and 0, with what was measured on the texts kept for that."""
    parts = np.array([int(hash_bytes(text.encode(), bits=64), 16) % _PARTS for text in texts])
    calibrating, held_out = (_with_both_labels(np.isin(parts, chosen), labels) for chosen in (_CALIBRATING, _HELD_OUT))
    training = ~(calibrating | held_out)
    features = Features(config.word_order, config.min_subword, config.max_subword, config.bits)
    split = {
        name: (Texts.of([texts[at] for at in np.flatnonzero(part)]), labels[part].astype(np.float64))
        for name, part in (("training", training), ("calibrating", calibrating), ("held_out", held_out))
    }
    weights, bias, passes = _trained(split, features, config, progress or Silent())
    raw = Classifier(config.name, features, weights, bias, 1.0, 0.0, {})
    slope, intercept = _calibrated(raw.logits(split["calibrating"][0]), split["calibrating"][1])
    # shifts the prior from one half, for which the slope was fitted (Bayes)
    intercept += float(np.log(config.prior / (1 - config.prior)))
    classifier = Classifier(config.name, features, weights, bias, slope, intercept, {})
    kept, kept_labels = split["held_out"]
    classifier.measured.update(
        {
            "trained_on": {"good": int(labels[training].sum()), "bad": int((labels[training] == 0).sum())},
            "passes": passes,
            "held_out": judged(kept_labels, classifier.probabilities(kept)),
        }
    )
    return classifier


def judged(labels: np.ndarray, probabilities: np.ndarray) -> dict[str, float]:
    """Precision and recall at one half, area under the ROC curve, log loss and calibration error, of labels 1 and 0.

    The calibration error is the mean distance between the probabilities of a tenth of the texts and their share of good ones,
    each label weighted to one half.
    """
    good, said = labels == 1, probabilities > 0.5
    weights = np.where(good, 0.5 / max(good.sum(), 1), 0.5 / max((~good).sum(), 1))
    order = np.argsort(probabilities, kind="stable")
    error = 0.0
    for chosen in np.array_split(order, _CALIBRATION_BINS):
        weight = weights[chosen].sum()
        if weight:
            gap = (weights[chosen] * probabilities[chosen]).sum() - (weights[chosen] * good[chosen]).sum()
            error += abs(float(gap))
    clipped = np.clip(probabilities, 1e-12, 1 - 1e-12)
    return {
        "good": int(good.sum()),
        "bad": int((~good).sum()),
        "precision": round(float((good & said).sum() / max(said.sum(), 1)), 4),
        "recall": round(float((good & said).sum() / max(good.sum(), 1)), 4),
        "auc": round(area_under_curve(good, probabilities), 4),
        "log_loss": round(float(-(weights * np.log(np.where(good, clipped, 1 - clipped))).sum()), 4),
        "calibration_error": round(error, 4),
    }


def area_under_curve(good: np.ndarray, scores: np.ndarray) -> float:
    """Share of pairs whose good one scores higher, ties counting half (Mann and Whitney); one half without pairs."""
    if good.all() or not good.any():
        return 0.5
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    positive = int(good.sum())
    return float((ranks[good].sum() - positive * (positive + 1) / 2) / (positive * (len(good) - positive)))


def _with_both_labels(part: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The part, with the first text of a label that it lacks: small sets may have none there by chance."""
    part = part.copy()
    for label in (0, 1):
        if not (part & (labels == label)).any():
            part[np.flatnonzero(labels == label)[label]] = True
    return part


def _trained(
    split: dict[str, tuple[Texts, np.ndarray]], features: Features, config: ClassifierConfig, progress: Progress
) -> tuple[np.ndarray, float, int]:
    """Weights, bias and the number of passes with the lowest loss on the texts that calibrate."""
    texts, labels = split["training"]
    buckets, starts = features_of(texts, features)
    # weighs both labels as one half
    importance = np.where(labels == 1, 0.5 / labels.mean(), 0.5 / (1 - labels.mean()))
    weights, squares = np.zeros(1 << config.bits), np.zeros(1 << config.bits)
    bias = np.zeros(2)
    random = np.random.default_rng(config.seed)
    best_loss, best = np.inf, (weights.astype(np.float32), 0.0, 0)
    check, check_labels = split["calibrating"]
    with progress.task("training the classifier", config.passes, "passes") as task:
        for number in range(1, config.passes + 1):
            order = random.permutation(len(labels))
            _pass(buckets, starts, labels, importance, order, weights, squares, bias, config.learning_rate, config.l2)
            now = Classifier(config.name, features, weights.astype(np.float32), float(bias[0]), 1.0, 0.0, {})
            logits = now.logits(check)
            slope, intercept = _calibrated(logits, check_labels)
            loss = judged(check_labels, sigmoid(slope * logits + intercept))["log_loss"]
            if loss < best_loss:
                best_loss, best = loss, (now.weights, now.bias, number)
            task.advance(note=f"held-out loss {loss:.4f}")
    return best


@compiled_allocating
def _pass(
    buckets: np.ndarray,
    starts: np.ndarray,
    labels: np.ndarray,
    importance: np.ndarray,
    order: np.ndarray,
    weights: np.ndarray,
    squares: np.ndarray,
    bias: np.ndarray,
    rate: float,
    decay: float,
) -> None:
    """One pass of AdaGrad (Duchi et al. 2011) over the texts in this order; weights, squares and bias are changed in place.

    A text's gradient for a bucket is (p − y) · count / √n. A bucket that occurs twice in a text is stepped twice by the half.
    """
    for text in order:
        first, last = starts[text], starts[text + 1]
        if first == last:
            continue
        scale = 1 / np.sqrt(last - first)
        logit = 0.0
        for place in range(first, last):
            logit += weights[buckets[place]]
        logit = logit * scale + bias[0]
        error = (1 / (1 + np.exp(-logit)) - labels[text]) * importance[text]
        for place in range(first, last):
            bucket = buckets[place]
            gradient = error * scale + decay * weights[bucket]
            squares[bucket] += gradient * gradient
            weights[bucket] -= rate * gradient / (np.sqrt(squares[bucket]) + 1e-8)
        bias[1] += error * error
        bias[0] -= rate * error / (np.sqrt(bias[1]) + 1e-8)


def _calibrated(logits: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Slope and intercept of Platt's sigmoid (Platt 1999, with his softened targets), by Newton's method.

    Labels are weighted so that the good ones make up one half.
    """
    positive, negative = labels.sum(), (1 - labels).sum()
    targets = np.where(labels == 1, (positive + 1) / (positive + 2), 1 / (negative + 2))
    weights = np.where(labels == 1, 0.5 / positive, 0.5 / negative)
    spread = max(float(logits.std()), 1e-9)
    inputs = np.column_stack([logits / spread, np.ones_like(logits)])
    line = np.array([1.0, 0.0])
    for _ in range(50):
        probabilities = sigmoid(inputs @ line)
        gradient = inputs.T @ (weights * (probabilities - targets))
        curvature = (inputs * (weights * probabilities * (1 - probabilities))[:, None]).T @ inputs + 1e-6 * np.eye(2)
        step = np.linalg.solve(curvature, gradient)
        line = line - np.clip(step, -2, 2)
        if np.abs(step).max() < 1e-10:
            break
    return max(float(line[0] / spread), 0.0), float(line[1])
