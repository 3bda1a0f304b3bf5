"""The figures of a load test, under the keys of `vllm bench serve`."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

from bessemer.serving.bench.client import Answer
from bessemer.serving.bench.config import LoadConfig

PERCENTILES = (50, 90, 95, 99)
#: Key → what it is.
MEASURES = {
    "ttft": "time to first token",
    "tpot": "time per token after the first",
    "itl": "time between parts of an answer",
    "e2el": "time of a whole answer",
}


def figures(answers: Sequence[Answer], seconds: float, config: LoadConfig) -> dict[str, Any]:
    """Counts, throughput, and means, medians, deviations and percentiles in milliseconds. seconds: of the whole measurement."""
    done = [answer for answer in answers if answer.error is None]
    values = {
        "ttft": [answer.time_to_first_token for answer in done],
        "tpot": [answer.time_per_token for answer in done if answer.tokens > 1],
        "itl": [gap for answer in done for gap in answer.gaps],
        "e2el": [answer.seconds for answer in done],
    }
    prompt, made = sum(answer.prompt_tokens for answer in done), sum(answer.tokens for answer in done)
    good = sum(_is_good(answer, config.goodput) for answer in done) if config.goodput else None
    found: dict[str, Any] = {
        "duration": seconds,
        "completed": len(done),
        "failed": len(answers) - len(done),
        "total_input_tokens": prompt,
        "total_output_tokens": made,
        "request_throughput": len(done) / seconds,
        "request_goodput": None if good is None else good / seconds,
        "output_throughput": made / seconds,
        "total_token_throughput": (prompt + made) / seconds,
    }
    for name, each in values.items():
        milliseconds = [1000 * value for value in each]
        found |= {
            f"mean_{name}_ms": statistics.fmean(milliseconds) if milliseconds else None,
            f"median_{name}_ms": statistics.median(milliseconds) if milliseconds else None,
            f"std_{name}_ms": statistics.pstdev(milliseconds) if milliseconds else None,
            **{
                f"p{percentile}_{name}_ms": float(np.percentile(milliseconds, percentile)) if milliseconds else None
                for percentile in PERCENTILES
            },
        }
    return found


def _is_good(answer: Answer, goals: dict[str, float]) -> bool:
    values = {"ttft": answer.time_to_first_token, "tpot": answer.time_per_token, "e2el": answer.seconds}
    return all(1000 * values[name] <= limit for name, limit in goals.items())
