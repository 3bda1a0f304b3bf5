"""Linear probes on a model's own activations: a property of a text read from its hidden states (Alain and Bengio 2016).

    score = σ( w · (mean over tokens of h⁽ˡ⁾ − μ) / s + b )

over all tokens of a text, or over its last ones, as an answer's first words behind its conversation,

fitted by Newton's method on a regularised logistic loss. A probe belongs to the very weights that it was fitted on: it keeps
the states of a reference text, and is refused where a model has others, as after tuning, with an adapter or in other number
formats. `drift` measures what the old probe and one fitted again are worth on the changed model.
"""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np

from bessemer.core.config import Config, setting
from bessemer.core.errors import ArtefactError, RequestError
from bessemer.inference.capture import Capture
from bessemer.inference.engine import Engine

FORMAT = 1
#: A text whose states tell one model from another.
_REFERENCE = "The quick brown fox jumps over the lazy dog, and 2 + 2 = 4."
#: Largest difference of the reference's states, relative to their length, within one model on several processors.
_TOLERANCE = 2e-3
_MOST_STEPS = 50
# Shapes: N texts, D hidden.

#: Texts, or their tokens.
Texts: TypeAlias = Sequence[str | Sequence[int]]


class ProbeConfig(Config):
    """How a probe is fitted."""

    layer: int = setting(..., "layer before which the hidden states are read; the number of layers: what leaves the last", ge=0)
    l2: float = setting(1.0, "pull of the standardised weights towards zero", gt=0)
    last: int | None = setting(None, "tokens at the end of a text whose states count; none: all", unit="tokens", ge=1)


@dataclass(frozen=True)
class Probe:
    """weights_D, mean_D, scale_D, reference_D: (D,) float64. last: as of `ProbeConfig`."""

    name: str
    layer: int
    weights_D: np.ndarray
    bias: float
    mean_D: np.ndarray
    scale_D: np.ndarray
    reference_D: np.ndarray
    last: int | None = None

    def scores(self, engine: Engine, texts: Texts, *, allow_stale: bool = False) -> np.ndarray:
        """Probability of the property for each text, (N,) float64. Raises ArtefactError for a model that it was not fitted on,
        unless `allow_stale`."""
        if not allow_stale:
            self.check(engine)
        return self.scores_of(mean_states(engine, texts, self.layer, self.last))

    def scores_of(self, states_ND: np.ndarray) -> np.ndarray:
        """The same, from the mean hidden states of the texts."""
        logits_N = (states_ND - self.mean_D) / self.scale_D @ self.weights_D + self.bias
        return 1 / (1 + np.exp(-logits_N.clip(-40, 40)))

    def check(self, engine: Engine) -> None:
        """Raises ArtefactError where the model's states are not those of the fit."""
        (reference_D,) = mean_states(engine, [_REFERENCE], self.layer)
        if reference_D.shape != self.reference_D.shape:
            raise ArtefactError(
                f"the probe {self.name!r} is of hidden states of {len(self.reference_D)} numbers, and the model's have "
                f"{len(reference_D)}; fit it on this model"
            )
        difference = np.linalg.norm(reference_D - self.reference_D) / np.linalg.norm(self.reference_D)
        if not difference <= _TOLERANCE:
            raise ArtefactError(
                f"the probe {self.name!r} is stale: the model's hidden states differ by {difference:.1%} from those of "
                "its fit; fit it again after tuning, with an adapter, and in other number formats"
            )

    def save(self, path: Path) -> None:
        """Write a `.npz`."""
        described = json.dumps({"format": FORMAT, "name": self.name, "layer": self.layer, "bias": self.bias, "last": self.last})
        arrays = {name: getattr(self, f"{name}_D") for name in _ARRAYS}
        np.savez(path, description=np.frombuffer(described.encode(), np.uint8), **arrays)


_ARRAYS = ("weights", "mean", "scale", "reference")


def load_probe(path: Path) -> Probe:
    """Open a probe's file. Raises ArtefactError where it is none, or has a newer format."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            described = json.loads(arrays["description"].tobytes())
            columns = {f"{name}_D": arrays[name].astype(np.float64) for name in _ARRAYS}
        if described["format"] != FORMAT:
            raise ArtefactError(f"{path}: this probe has format {described['format']}, and {FORMAT} is known here")
        if len({column.shape for column in columns.values()}) > 1 or columns["weights_D"].ndim != 1:
            raise ArtefactError(f"{path}: the arrays of this probe do not fit each other")
        last = None if described.get("last") is None else int(described["last"])
        return Probe(str(described["name"]), int(described["layer"]), bias=float(described["bias"]), last=last, **columns)
    except (OSError, ValueError, KeyError, TypeError, zlib.error, zipfile.BadZipFile) as error:
        raise ArtefactError(f"{path}: this is no probe, or a damaged one ({error})") from None


def fit_probe(engine: Engine, texts: Texts, labels: Sequence[bool], config: ProbeConfig, *, name: str = "probe") -> Probe:
    """A probe for the property that the labels state. Raises RequestError where all texts have it, or none has."""
    _check_labels(texts, labels)
    return fit_probe_to(engine, mean_states(engine, texts, config.layer, config.last), labels, config, name=name)


def _check_labels(texts: Sized, labels: Sequence[bool]) -> None:
    labels_N = np.array(labels, np.float64)
    if len(labels_N) != len(texts) or not 0 < labels_N.mean() < 1:
        raise RequestError(
            f"a probe needs texts with the property and without it; {int(labels_N.sum())} of {len(texts)} have it"
        )


def fit_probe_to(
    engine: Engine, states_ND: np.ndarray, labels: Sequence[bool], config: ProbeConfig, *, name: str = "probe"
) -> Probe:
    """As `fit_probe`, from mean states of the engine's model that are there already, as those kept while it generated."""
    _check_labels(states_ND, labels)
    mean_D, scale_D = states_ND.mean(0), states_ND.std(0) + 1e-6
    weights_D, bias = _logistic((states_ND - mean_D) / scale_D, np.array(labels, np.float64), config.l2)
    (reference_D,) = mean_states(engine, [_REFERENCE], config.layer)
    return Probe(name, config.layer, weights_D, bias, mean_D, scale_D, reference_D, config.last)


def _logistic(inputs_ND: np.ndarray, labels_N: np.ndarray, l2: float) -> tuple[np.ndarray, float]:
    """Weights and bias that minimise Σ log loss + l2/2 |w|², by Newton's method with halved steps."""
    design = np.column_stack([inputs_ND, np.ones(len(inputs_ND))])
    ridge = np.full(design.shape[1], l2)
    # the bias is free but for what keeps the matrix invertible
    ridge[-1] = 1e-6

    def loss(parameters: np.ndarray) -> float:
        logits = design @ parameters
        return float(np.logaddexp(0, logits).sum() - labels_N @ logits + 0.5 * ridge @ parameters**2)

    parameters, best = np.zeros(design.shape[1]), loss(np.zeros(design.shape[1]))
    for _ in range(_MOST_STEPS):
        probabilities = 1 / (1 + np.exp(-(design @ parameters).clip(-40, 40)))
        gradient = design.T @ (probabilities - labels_N) + ridge * parameters
        curvature = (design * (probabilities * (1 - probabilities))[:, None]).T @ design + np.diag(ridge)
        step, size = np.linalg.solve(curvature, gradient), 1.0
        while (new := loss(parameters - size * step)) > best and size > 1e-6:
            size /= 2
        gained, parameters, best = best - new, parameters - size * step, min(new, best)
        if gained < 1e-12 * max(1.0, best):
            break
    return parameters[:-1], float(parameters[-1])


def mean_states(engine: Engine, texts: Texts, layer: int, last: int | None = None) -> np.ndarray:
    """Means over the tokens of each text, or over its last ones, of the hidden states before a layer, (N, D) float64.

    What texts begin with in common is computed once where only their last tokens count. Raises RequestError for a layer that
    the model does not have.
    """
    if last is None:
        captured = engine.capture(list(texts), Capture(states=(layer,)))
        return np.stack([one.states[layer].double().mean(0).numpy() for one in captured])
    ids = [engine.tokenizer.encode(text) if isinstance(text, str) else list(text) for text in texts]
    of_length: dict[int, list[int]] = {}
    for place, tokens in enumerate(ids):
        of_length.setdefault(len(tokens), []).append(place)
    means: dict[int, np.ndarray] = {}
    for length, places in of_length.items():
        capture = Capture(states=(layer,), positions=tuple(range(max(0, length - last), length)))
        for place, one in zip(places, engine.capture([ids[place] for place in places], capture), strict=True):
            means[place] = one.states[layer].double().mean(0).numpy()
    return np.stack([means[place] for place in range(len(ids))])


def area_under_curve(scores_N: np.ndarray, labels: Sequence[bool]) -> float:
    """The probability that a text with the property scores higher than one without; ties count half (Mann and Whitney 1947)."""
    labels_N = np.array(labels, bool)
    differences = scores_N[labels_N][:, None] - scores_N[~labels_N][None]
    return float((differences > 0).mean() + 0.5 * (differences == 0).mean())


@dataclass(frozen=True)
class Drift:
    """Areas under the curve on held-out texts of a changed model: of the old probe, and of one fitted again."""

    old: float
    refitted: float
    probe: Probe


def drift(
    probe: Probe,
    engine: Engine,
    texts: Texts,
    labels: Sequence[bool],
    held_out: Texts,
    held_out_labels: Sequence[bool],
    *,
    l2: float = 1.0,
) -> Drift:
    """What a probe is still worth on a changed model, beside one that is fitted again on `texts` there."""
    refitted = fit_probe(engine, texts, labels, ProbeConfig(layer=probe.layer, l2=l2, last=probe.last), name=probe.name)
    states_ND = mean_states(engine, held_out, probe.layer, probe.last)
    return Drift(
        area_under_curve(probe.scores_of(states_ND), held_out_labels),
        area_under_curve(refitted.scores_of(states_ND), held_out_labels),
        refitted,
    )
