"""The memorisation ledger: of each model and each format of its weights, what was extracted, and exposure by repetitions.

The ledger is a JSON value, which travels as `ledger.json` and in a manifest:

    {"format": 1, "attempts": n, "probability": p, "candidates": |R| − 1,
     "models": {MODEL: {FORMAT: {
        "extraction": {"succeeds": …, "extracted": …, "greedy": …, "planted": …, "unseen_extracted": …},
        "exposure": {"planted": ESTIMATE, "unseen": ESTIMATE, "most_planted": ESTIMATE, "excess": ESTIMATE},
        "least_likely_share": …,
       "by": [{"kind": …, "repetitions": …, "canaries": …, "exposure": ESTIMATE, "nats": …, "greedy": …, "extracted": …}, …]}}}}

with ESTIMATE = [mean, low, high], the interval of 95 % over draws of canaries. `excess` is the mean exposure of planted
canaries above that of unseen ones. `least_likely_share` is the share of planted canaries among the least likely eighth of their
candidates, one eighth where nothing is known of them: unlearning that goes too far marks what it has unlearnt.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from statistics import fmean
from typing import Any

from bessemer.core.progress import Progress
from bessemer.core.statistics import Estimate, mean_estimate
from bessemer.data.sources.canaries import Canary
from bessemer.inference.engine import Engine
from bessemer.safety.memorisation.config import MemorisationConfig
from bessemer.safety.memorisation.measures import CanaryRecall, opened_in, recall_canaries

LEDGER, LEDGER_FORMAT = "ledger.json", 1
#: Canaries of the ledger, as `bessemer memorisation` reads them.
CANARIES = "canaries.jsonl"
#: Share of the least likely candidates, among which a planted canary is marked by its absence.
_LEAST_LIKELY = 1 / 8
#: Ends of an interval about which too little is known.
_MOST_BITS = 64.0
OpenIn = Callable[[Path, str, str], AbstractContextManager[Engine]]


def ledger_of(
    models: Mapping[str, Path],
    planted: Sequence[Canary],
    unseen: Sequence[Canary],
    config: MemorisationConfig,
    *,
    device: str,
    progress: Progress,
    open_in: OpenIn = opened_in,
) -> dict[str, Any]:
    """The ledger of models by name. unseen: canaries that were never planted, all of them candidates; the first `config.unseen`
    are measured as planted ones are.

    Raises ConfigError for a model that cannot be rounded to a format, and what opening it raises.
    """
    entries: dict[str, dict[str, Any]] = {}
    for name, model in models.items():
        entries[name] = {}
        for weights in config.formats:
            with open_in(model, weights, device) as engine:
                recalls = recall_canaries(engine, [*planted, *unseen[: config.unseen]], unseen, progress, f"{name}, {weights}")
            entries[name][weights] = entry_of(recalls, config)
    return {
        "format": LEDGER_FORMAT,
        "attempts": config.attempts,
        "probability": config.probability,
        "candidates": len(unseen),
        "models": entries,
    }


def entry_of(recalls: Sequence[CanaryRecall], config: MemorisationConfig) -> dict[str, Any]:
    """What is known of one model in one format."""
    planted = [one for one in recalls if one.canary.repetitions]
    unseen = [one for one in recalls if not one.canary.repetitions]
    cells: dict[tuple[str, int], list[CanaryRecall]] = {}
    for one in planted:
        cells.setdefault((one.canary.kind, one.canary.repetitions), []).append(one)
    most = max(one.canary.repetitions for one in planted)
    extracted = [one.recall.is_extracted(config) for one in planted]
    return {
        "extraction": {
            "succeeds": any(extracted),
            "extracted": sum(extracted),
            "greedy": sum(one.recall.is_greedy for one in planted),
            "planted": len(planted),
            "unseen_extracted": sum(one.recall.is_extracted(config) for one in unseen),
        },
        "exposure": {
            "planted": _estimate(planted),
            "unseen": _estimate(unseen),
            "most_planted": _estimate([one for one in planted if one.canary.repetitions == most]),
            "excess": _excess(planted, unseen),
        },
        "least_likely_share": fmean(one.rank_share >= 1 - _LEAST_LIKELY for one in planted),
        "by": [
            {
                "kind": kind,
                "repetitions": repetitions,
                "canaries": len(cell),
                "exposure": _estimate(cell),
                "nats": fmean(one.recall.nats for one in cell),
                "greedy": sum(one.recall.is_greedy for one in cell),
                "extracted": sum(one.recall.is_extracted(config) for one in cell),
            }
            for (kind, repetitions), cell in sorted(cells.items())
        ],
    }


def _mean(recalls: Sequence[CanaryRecall]) -> Estimate:
    """Mean exposure, by draws of canaries where there are several."""
    clusters = [one.canary.cluster for one in recalls]
    return mean_estimate([one.exposure for one in recalls], clusters if len(set(clusters)) > 1 else None)


def _estimate(recalls: Sequence[CanaryRecall]) -> list[float]:
    """Mean exposure and its interval."""
    estimate = _mean(recalls)
    return [estimate.mean, *estimate.interval(bounds=(0.0, _MOST_BITS))]


def _excess(planted: Sequence[CanaryRecall], unseen: Sequence[CanaryRecall]) -> list[float]:
    """Difference of the means of two independent samples, with an interval of 95 % by the normal distribution."""
    means = [_mean(planted), _mean(unseen)]
    difference = means[0].mean - means[1].mean
    half = min(1.96 * math.hypot(*(one.standard_error for one in means)), _MOST_BITS)
    return [difference, difference - half, difference + half]
