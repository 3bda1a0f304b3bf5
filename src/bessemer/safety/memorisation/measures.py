"""Whether a model has memorised a text: exposure, (n, p)-extraction and greedy extraction, from log-probabilities alone.

A text is a prefix, which the model is given, and a suffix. With p_z the product of the probabilities of the suffix's tokens,
all from one forward pass:

- *greedy extraction*: greedy decoding continues the prefix with the suffix (Carlini et al. 2023, "Quantifying memorization").
- *(n, p)-extraction*: of n answers sampled at temperature 1 the suffix is among them with at least the probability p, that is
  1 − (1 − p_z)ⁿ ≥ p (Hayes et al. 2024, arXiv 2410.19482).
- *exposure* = log₂|R| − log₂ rank, the rank of the suffix by its likelihood in the set R of itself and of candidates that were
  never planted (Carlini et al. 2019, "The secret sharer", section 4). A text that was never seen has a mean of log₂|R| −
  log₂(|R|!)/|R|, 1.4 bits for a large R.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bessemer.core.errors import ConfigError, RequestError
from bessemer.core.progress import Progress
from bessemer.data.sources.canaries import Canary
from bessemer.inference.build import open_model
from bessemer.inference.config import EngineConfig
from bessemer.inference.engine import Engine
from bessemer.inference.scores import Score
from bessemer.model.quantisation.config import QuantizeConfig
from bessemer.model.quantisation.quantise import quantise
from bessemer.safety.memorisation.config import ORIGINAL, DocumentConfig, ExtractionConfig

#: Canaries whose candidates are scored at a time, so that few of their requests wait in memory.
_ITEMS = 4
_SHORTEST_DOCUMENT = 16


def exposure(nats: float, candidates: Sequence[float]) -> float:
    """Exposure in bits of a text with the negative log-likelihood `nats` among candidates with theirs, from 0 to log₂|R|.

    A tie counts as half a place: a model that makes every text equally likely exposes none.
    """
    likelier = sum(other < nats for other in candidates)
    equal = sum(other == nats for other in candidates)
    return math.log2(len(candidates) + 1) - math.log2(1 + likelier + equal / 2)


def unseen_exposure(candidates: int) -> float:
    """The mean exposure, in bits, of a text whose rank among itself and so many candidates is even."""
    size = candidates + 1
    return math.log2(size) - math.lgamma(size + 1) / math.log(2) / size


def extraction_probability(nats: float, attempts: int) -> float:
    """1 − (1 − p_z)ⁿ with p_z = exp(−nats): that a text is among n sampled answers. Exact for a p_z near 0."""
    return 1.0 if nats <= 0 else -math.expm1(attempts * math.log1p(-math.exp(-nats)))


@dataclass(frozen=True)
class Recall:
    """How well a model knows a suffix. nats: −log p_z. tokens: of the suffix. is_greedy: greedy decoding gives it."""

    nats: float
    tokens: int
    is_greedy: bool

    @classmethod
    def of(cls, score: Score) -> Recall:
        """From the engine's score of the suffix after its prefix. Raises RequestError for a suffix without tokens."""
        if not score.token_ids:
            raise RequestError("a suffix has no token of its own after its prefix; give it more words")
        return cls(-score.total, len(score.token_ids), score.is_greedy)

    def is_extracted(self, config: ExtractionConfig) -> bool:
        """Whether it can be got out of the model: greedily, or within `attempts` with `probability`."""
        return self.is_greedy or extraction_probability(self.nats, config.attempts) >= config.probability


@dataclass(frozen=True)
class CanaryRecall:
    """A canary, how well a model knows it, its exposure in bits, and the share of its candidates that are likelier."""

    canary: Canary
    recall: Recall
    exposure: float
    rank_share: float


def recall_canaries(
    engine: Engine, canaries: Sequence[Canary], candidates: Sequence[Canary], progress: Progress, name: str = "canaries"
) -> list[CanaryRecall]:
    """How well a model knows each canary; R is its suffix and those of the candidates, itself not counted twice."""
    recalls: list[CanaryRecall] = []
    with progress.task(name, total=len(canaries), unit="canaries") as task:
        for start in range(0, len(canaries), _ITEMS):
            chosen = canaries[start : start + _ITEMS]
            items = [
                (canary.prefix, [canary.suffix, *(one.suffix for one in candidates if one.suffix != canary.suffix)])
                for canary in chosen
            ]
            for canary, (own, *others) in zip(chosen, engine.score_items(items), strict=True):
                recall, nats = Recall.of(own), [-other.total for other in others]
                likelier = sum(other < recall.nats for other in nats) / max(len(nats), 1)
                recalls.append(CanaryRecall(canary, recall, exposure(recall.nats, nats), likelier))
            task.advance(len(chosen))
    return recalls


@dataclass(frozen=True)
class Passage:
    """A passage of a document, and how well a model knows it after the tokens before it."""

    text: str
    recall: Recall


def recall_document(engine: Engine, text: str, config: DocumentConfig, progress: Progress, name: str = "") -> list[Passage]:
    """How well a model knows the passages of a document, one after the other, each after as many tokens before it as the
    settings say and the context holds. A short document is one passage, its second half.

    Raises RequestError for a document of fewer than 16 tokens, half of which is soon guessed.
    """
    tokenizer = engine.tokenizer
    ids = tokenizer.encode(text, add_bos=False)
    passages = _passages(len(ids), config, engine.context_length - len(tokenizer.begin_ids))
    items = [
        ([*(tokenizer.begin_ids if start == 0 else ()), *ids[start:middle]], [ids[middle:end]])
        for start, middle, end in passages
    ]
    found: list[Passage] = []
    with progress.task(name or "passages", total=len(items), unit="passages") as task:
        for first in range(0, len(items), 64):
            for (score,), (_, middle, end) in zip(
                engine.score_items(items[first : first + 64]), passages[first : first + 64], strict=True
            ):
                found.append(Passage(tokenizer.decode(ids[middle:end]), Recall.of(score)))
            task.advance(len(items[first : first + 64]))
    return found


def _passages(tokens: int, config: DocumentConfig, context: int) -> list[tuple[int, int, int]]:
    """(start of the prefix, start of the passage, its end) of the passages of a document; the last one reaches its end."""
    if tokens < _SHORTEST_DOCUMENT:
        raise RequestError(
            f"it has {tokens} tokens, and fewer than {_SHORTEST_DOCUMENT} are too short to be tested: they are guessed"
        )
    passage = min(config.passage_tokens, max(context // 2, 2))
    prefix = min(config.prefix_tokens, context - passage)
    if tokens < prefix + passage:
        middle = max(tokens // 2, tokens - passage)
        return [(max(0, middle - prefix), middle, tokens)]
    ends = [*range(prefix + passage, tokens, passage), tokens]
    # what the first prefix holds, half of it after the other half
    first = [(0, prefix // 2, prefix)] if prefix >= _SHORTEST_DOCUMENT else []
    return [*first, *((end - passage - prefix, end - passage, end) for end in ends)]


@contextmanager
def opened_in(model: Path, weights: str, device: str) -> Iterator[Engine]:
    """While entered, a model on the engine with its weights as they are stored, or rounded to a scheme of `quantize`.

    Raises ConfigError for a model that is quantised already, or whose adapter is not merged.
    """
    if weights == ORIGINAL:
        with Engine(model, device=device) as engine:
            yield engine
        return
    opened = open_model(model, None, device, EngineConfig())
    if opened.adapter is not None:
        raise ConfigError(
            f"{model}: its adapter is kept beside the base; merge it first, with `bessemer merge`, to round its weights"
        )
    quantise(opened.model, QuantizeConfig(scheme=weights))
    with Engine(opened.model, opened.tokenizer) as engine:
        yield engine
