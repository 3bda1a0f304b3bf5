"""Which sentences of an answer their sources bear out, judged by a small head over a language model's opinion.

The model is asked of each sentence whether its source says so; how much likelier its "Yes" is than its "No", in nats, is the
first feature. The others take a part of a millisecond: numbers and names that the source has not, and a negation or an opposite
in its nearest sentence. A logistic head over these gives a probability. It is fitted on pairs made from an index
(`entailment_pairs.py`), and calibrated on statements that were written by hand (Platt 1999): made ones that a passage bears out
are nearer to it than what people write, by which a limit would be far too high. Both are of one model, whose opinions have a
scale of their own. The share of common words is no feature, as made pairs share more of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import numpy as np

from bessemer.core.errors import ArtefactError
from bessemer.core.store import check_format, read_json, write_json
from bessemer.inference.engine import Engine
from bessemer.retrieval.citations import nearest_sentence
from bessemer.retrieval.entailment_pairs import OPPOSITES, SPELLED, Pair, make_pairs, written_pairs
from bessemer.retrieval.index import OpenIndex

# Shapes: N pairs, F features.

FEATURES = ("opinion", "numbers", "names", "negation", "opposite")
_FORMAT = 1
#: Most characters of a source that the model reads, around the sentence that is nearest.
_LONGEST_SOURCE = 2_000
#: Sentences and sources whose opinions tell one model from another, and how far apart those of one may be, in nats.
_PROBES = (("Iron rusts.", "Iron rusts in water."), ("Iron melts.", "Iron rusts in water."), ("It is red.", "It is blue."))
_TOLERANCE = 0.5
_ASKED = "Text:\n{source}\n\nStatement: {sentence}\n\nDoes the text say so? Answer Yes or No."
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
_NAME = re.compile(r"\b(?:[A-Za-z_]\w*[._]\w[\w.]*|[a-z]+[A-Z]\w*|(?<!^)(?<![.!?] )[A-Z][a-z]{2,})\b")
_NEGATION = re.compile(r"\b(?:not|no|never|none|nothing|neither|nor|cannot|without|unless)\b|n't\b", re.IGNORECASE)
_OPPOSITE: dict[str, set[str]] = {}
for _one, _other in OPPOSITES:
    _OPPOSITE.setdefault(_one, set()).add(_other)
    _OPPOSITE.setdefault(_other, set()).add(_one)
_SPELLED = {word: str(number) for number, word in enumerate(SPELLED, start=1)}
#: Weight decay of the fit, of standardised features.
_DECAY = 1e-2


class Opinions:
    """How much likelier a language model's "Yes" is than its "No", asked whether a text says what a sentence says."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._answers = [engine.tokenizer.encode(word, add_bos=False) for word in ("Yes", "No")]

    def of(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        """(N,) nats, of pairs of a sentence and its source. Raises RequestError for one that the context does not hold."""
        items = [(self._prompt(*pair), self._answers) for pair in pairs]
        return np.array([yes.total - no.total for yes, no in self._engine.score_items(items)], np.float64)

    def _prompt(self, sentence: str, source: str) -> list[int]:
        """The tokens of a question, with less of the source where the context holds no more."""
        tokenizer, most = self._engine.tokenizer, _LONGEST_SOURCE
        while True:
            asked = _ASKED.format(source=_around(sentence, source, most), sentence=sentence)
            prompt = (
                tokenizer.encode(f"{asked}\nAnswer: ")
                if tokenizer.chat_template is None
                else tokenizer.apply_chat_template([{"role": "user", "content": asked}], add_generation_prompt=True)
            )
            if len(prompt) + max(map(len, self._answers)) <= self._engine.longest or not most:
                return prompt
            most //= 2


def _around(sentence: str, source: str, most: int) -> str:
    """Up to `most` characters of a source, around the sentence of it that is nearest to another one."""
    if len(source) <= most:
        return source
    middle = sum(nearest_sentence(sentence, source)) // 2
    start = max(0, min(middle - most // 2, len(source) - most))
    return source[start : start + most]


def features(pairs: Sequence[tuple[str, str]], opinions_N: np.ndarray) -> np.ndarray:
    """(N, F): what a head reads of pairs of a sentence and its source (`FEATURES`)."""
    rows = [[opinion, *_surface(*pair)] for pair, opinion in zip(pairs, opinions_N.tolist(), strict=True)]
    return np.array(rows, np.float64).reshape(-1, len(FEATURES))


def _surface(sentence: str, source: str) -> list[float]:
    """Shares of the sentence's numbers and names that the source has not; whether its nearest sentence has one negation more or
    less, and the opposite of a word."""
    span = nearest_sentence(sentence, source)
    near = source[span.start : span.end]
    numbers, names = _numbers(sentence), set(_NAME.findall(sentence))
    lower, near_words = set(re.findall(r"\w+", sentence.lower())), set(re.findall(r"\w+", near.lower()))
    opposite = any(_OPPOSITE.get(word, set()) & (near_words - lower) for word in lower - near_words)
    return [
        len(numbers - _numbers(source)) / len(numbers) if numbers else 0.0,
        sum(name.lower() not in source.lower() for name in names) / len(names) if names else 0.0,
        float(len(_NEGATION.findall(sentence)) % 2 != len(_NEGATION.findall(near)) % 2),
        float(opposite),
    ]


def _numbers(text: str) -> set[str]:
    spelled = {_SPELLED[word] for word in re.findall(r"[a-z]+", text.lower()) if word in _SPELLED}
    return {number.replace(",", "") for number in _NUMBER.findall(text)} | spelled


class Fitted(NamedTuple):
    """A logistic model: mean and deviation of each feature, (F,), weights of the standardised ones, (F,), and a constant."""

    mean_F: np.ndarray
    deviation_F: np.ndarray
    weights_F: np.ndarray
    constant: float

    def logits(self, features_NF: np.ndarray) -> np.ndarray:
        """(N,)."""
        logits_N: np.ndarray = (features_NF - self.mean_F) / self.deviation_F @ self.weights_F + self.constant
        return logits_N


def fit(features_NF: np.ndarray, wanted_N: np.ndarray, decay: float = _DECAY, *, is_balanced: bool = True) -> Fitted:
    """Logistic regression by Newton's method. is_balanced: pairs of both kinds are weighted alike. Raises ValueError where one
    kind is missing."""
    if not len(wanted_N):
        raise ValueError("there are no pairs")
    shares = float(wanted_N.mean()), float(1 - wanted_N.mean())
    if not all(shares):
        raise ValueError("pairs are needed that are borne out and that are not")
    mean_F, deviation_F = features_NF.mean(0), features_NF.std(0)
    deviation_F = np.where(deviation_F > 0, deviation_F, 1.0)
    inputs = np.concatenate([(features_NF - mean_F) / deviation_F, np.ones((len(features_NF), 1))], 1)
    importance_N = np.where(wanted_N, 0.5 / shares[0], 0.5 / shares[1]) if is_balanced else np.ones(len(wanted_N))
    penalty = np.diag([decay] * features_NF.shape[1] + [0.0])
    weights = np.zeros(inputs.shape[1])
    for _ in range(50):
        probabilities_N = _sigmoid(inputs @ weights)
        gradient = inputs.T @ (importance_N * (probabilities_N - wanted_N)) / len(inputs) + penalty @ weights
        curvature = importance_N * probabilities_N * (1 - probabilities_N)
        hessian = (inputs * curvature[:, None]).T @ inputs / len(inputs) + penalty + 1e-9 * np.eye(len(weights))
        step = np.linalg.solve(hessian, gradient)
        weights -= step
        if np.abs(step).max() < 1e-9:
            break
    return Fitted(mean_F, deviation_F, weights[:-1], float(weights[-1]))


def _sigmoid(logits_N: np.ndarray) -> np.ndarray:
    probabilities_N: np.ndarray = 1 / (1 + np.exp(-np.clip(logits_N, -60, 60)))
    return probabilities_N


@dataclass(frozen=True)
class EntailmentHead:
    """The fitted head of one model. scale, shift: of its calibration. model: the name of the model whose opinions it reads;
    probes: its opinions of `_PROBES`. made: of which pairs."""

    fitted: Fitted
    scale: float
    shift: float
    model: str
    probes: tuple[float, ...]
    made: Mapping[str, Any]

    def probabilities(self, features_NF: np.ndarray) -> np.ndarray:
        """(N,): how likely each sentence is borne out."""
        return _sigmoid(self.scale * self.fitted.logits(features_NF) + self.shift)

    def save(self, path: Path) -> None:
        values = {name: np.asarray(value).tolist() for name, value in self.fitted._asdict().items()}
        about = {"scale": self.scale, "shift": self.shift, "model": self.model, "probes": self.probes, "made": self.made}
        write_json(path, {"format": _FORMAT, "features": FEATURES, **values, **about})


def load_head(path: Path) -> EntailmentHead:
    """The head of a file. Raises ArtefactError for what is none."""
    values = read_json(path, "entailment head")
    try:
        check_format(values["format"], _FORMAT, path, "entailment head")
        mean_F, deviation_F, weights_F = (np.array(values[name], np.float64) for name in ("mean_F", "deviation_F", "weights_F"))
        if tuple(values["features"]) != FEATURES or {mean_F.shape, deviation_F.shape, weights_F.shape} != {(len(FEATURES),)}:
            raise ValueError
        fitted = Fitted(mean_F, deviation_F, weights_F, float(values["constant"]))
        scale, shift, probes = float(values["scale"]), float(values["shift"]), tuple(map(float, values["probes"]))
        return EntailmentHead(fitted, scale, shift, str(values["model"]), probes, dict(values["made"]))
    except (KeyError, TypeError, ValueError):
        raise ArtefactError(f"{path}: this is no entailment head of this version, or a damaged one") from None


def train_head(index: OpenIndex, engine: Engine, name: str, *, passages: int = 100, seed: int = 0) -> EntailmentHead:
    """A head for a model, fitted on pairs of up to `passages` passages of an index. name: by which the model is opened again.
    Its `made` says how often the opinion of a written statement that is borne out is above that of one that is not
    (`told_apart`): 0.5 is chance. Raises ArtefactError for an index with too few sentences."""
    pairs, opinions = [pair for _, pair in make_pairs(index, passages, seed)], Opinions(engine)
    written = written_pairs()
    found_N = opinions.of([(pair.sentence, pair.source) for pair in (*pairs, *written)])
    written_N = found_N[len(pairs) :]
    wanted_N = np.array([pair.supported for pair in written], bool)
    above = written_N[wanted_N][:, None] > written_N[~wanted_N][None]
    head = head_of(pairs, found_N[: len(pairs)], written, written_N, {"seed": seed, "told_apart": float(above.mean())})
    return replace(head, model=name, probes=tuple(opinions.of(_PROBES).tolist()))


def head_of(
    pairs: Sequence[Pair], opinions_N: np.ndarray, written: Sequence[Pair], written_N: np.ndarray, made: Mapping[str, Any]
) -> EntailmentHead:
    """A head, of a model without a name, fitted on pairs and calibrated on others, each with the model's opinions. Raises as
    `train_head`."""
    try:
        fitted = fit(*_inputs(pairs, opinions_N))
        features_NF, wanted_N = _inputs(written, written_N)
        scale, shift = calibrated(fitted.logits(features_NF), wanted_N)
    except ValueError:
        raise ArtefactError("entailment: too few sentences are in this index to train on; more documents are needed") from None
    counts = {"pairs": len(pairs), "calibrated_on": len(written), **made}
    return EntailmentHead(fitted, scale, shift, "", (), counts)


def _inputs(pairs: Sequence[Pair], opinions_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Features, (N, F), and whether the source bears the sentence out, (N,)."""
    texts = [(pair.sentence, pair.source) for pair in pairs]
    return features(texts, opinions_N), np.array([pair.supported for pair in pairs], bool)


def calibrated(logits_N: np.ndarray, wanted_N: np.ndarray) -> tuple[float, float]:
    """Scale and shift by which logits become those of probabilities (Platt 1999). Raises ValueError as `fit`."""
    own = fit(logits_N[:, None], wanted_N, decay=1e-4, is_balanced=False)
    scale = float(own.weights_F[0] / own.deviation_F[0])
    return scale, own.constant - scale * float(own.mean_F[0])


class Entailment:
    """Judges sentences by a head and the opinions that it reads."""

    def __init__(self, engine: Engine, head: EntailmentHead) -> None:
        """Raises ArtefactError where the head reads the opinions of another model."""
        self._opinions = Opinions(engine)
        self._head = head
        # a server answers in several threads, and an engine computes in one at a time
        self._lock = Lock()
        own = self._opinions.of(_PROBES)
        if len(head.probes) != len(own) or np.abs(own - head.probes).max() > _TOLERANCE:
            raise ArtefactError(f"this entailment head is for the opinions of {head.model}, not of the model that is asked")

    def probabilities(self, pairs: Iterable[tuple[str, str]]) -> np.ndarray:
        """(N,): how likely each sentence is borne out by its source. Raises RequestError as `Opinions.of`."""
        given = list(pairs)
        if not given:
            return np.empty(0)
        with self._lock:
            opinions_N = self._opinions.of(given)
        return self._head.probabilities(features(given, opinions_N))
