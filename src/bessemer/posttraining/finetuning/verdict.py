"""What a fine-tuning was worth, in words: better or not, by how much, how sure; and what the model answers now."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bessemer.core.errors import ArtefactError
from bessemer.core.statistics import Estimate, paired_difference

#: Sizes of a difference, in words, each up to a share by which the lower of the two perplexities is below the other.
SIZES = ((0.05, "a little"), (0.3, "clearly"), (1.0, "much"))
#: Characters of a question or an answer that are shown on one line.
_SHOWN = 160


def verdict(before_N: np.ndarray, after_N: np.ndarray) -> dict[str, Any]:
    """Figures and words on the losses of the same conversations before and after, in nats a token.

    `better` is true where the whole 95 % interval of the paired differences is above 0. `size` is by how much at least, by
    the end of the interval that is nearer to 0; None where the interval holds 0.
    """
    estimate = paired_difference(before_N, after_N)
    low, high = estimate.interval()
    before, after = float(before_N.mean()), float(after_N.mean())
    size = size_word(estimate)
    if low > 0:
        answer = f"yes, {size} better"
    elif high < 0:
        answer = f"no, {size} worse"
    else:
        answer = "not to be told"
    words = (
        f"better than before on what was held out: {answer}. Loss {before:.3f} → {after:.3f} nats a token, "
        f"{abs(estimate.mean):.3f} {'lower' if estimate.mean > 0 else 'higher'} (95 % interval of the fall: {low:.3f} to "
        f"{high:.3f}; {estimate.items:,} conversations)"
    )
    return {
        "verdict": words,
        "size": size,
        "loss_before": before,
        "loss_after": after,
        "difference": estimate.mean,
        "interval": [low, high],
        "conversations": estimate.items,
        "better": low > 0,
    }


def size_word(estimate: Estimate) -> str | None:
    """How large a difference of losses is at least, in words; None where its interval holds 0."""
    low, high = estimate.interval()
    least = low if low > 0 else -high
    if least <= 0:
        return None
    share = 1 - math.exp(-least)
    return next(word for most, word in SIZES if share <= most)


def record_lines(result: Mapping[str, Any]) -> list[str]:
    """What a record tells of a fine-tuning: answers before and after, what was learnt, and the verdict."""
    return [*answer_lines(result.get("answers", ())), result["data"], result["verdict"]]


def compared_lines(results: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[str]:
    """Two fine-tunings on the conversations that both held out: how the losses of the second differ from those of the first.

    Raises ArtefactError where they held out none alike, or tokens differ, so that a loss per token is of another unit.
    """
    first, second = (result.get("losses", {}) for result in results)
    shared = [id for id in first if id in second]
    if len(shared) < 2:
        raise ArtefactError(
            f"{' and '.join(names)} held out {len(shared)} conversations alike, too few to compare them on; tune both on the "
            "same data with the same seed, or evaluate both on a task: bessemer evaluate"
        )
    if results[0]["tokenizer"] != results[1]["tokenizer"]:
        raise ArtefactError(
            f"{' and '.join(names)} have different tokenizers, so that losses per token cannot be compared; evaluate both on a "
            "task: bessemer evaluate"
        )
    after = [np.array([losses[id][1] for id in shared]) for losses in (first, second)]
    told = verdict(after[0], after[1])
    tables = (
        f"{name}: {result['method']}, loss {result['loss_before']:.3f} → {result['loss_after']:.3f} nats a token"
        for name, result in zip(names, results, strict=True)
    )
    return [*tables, told["verdict"].replace("better than before", f"{names[1]} better than {names[0]}", 1)]


def answer_lines(answers: Sequence[Mapping[str, str]]) -> list[str]:
    """Questions with the answers before and after, for a terminal."""
    lines = []
    for one in answers:
        lines.append(f"  {one_line(one['prompt'], _SHOWN)}")
        lines += [f"    {when}: {one_line(one[when], _SHOWN) or '(nothing)'}" for when in ("before", "after")]
    return lines


def one_line(text: str, most: int) -> str:
    """The beginning of a text, on one line."""
    words = " ".join(text.split())
    return words if len(words) <= most else f"{words[: most - 1]}…"
