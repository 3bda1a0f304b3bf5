"""The loss of each conversation held out, before and after."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from bessemer.core.progress import Progress
from bessemer.model.decoder import Decoder
from bessemer.posttraining.packing import Example
from bessemer.training.data.batches import IGNORE_INDEX, Batch
from bessemer.training.data.packing import pack_rows
from bessemer.training.objectives import token_losses

#: Conversations read at once.
_ROWS = 4


def conversation_losses(
    model: Decoder, examples: Sequence[Example], context_length: int, padding_id: int, progress: Progress, description: str
) -> np.ndarray:
    """Mean −log p of each example's targets, (N,) float64, in nats a token, one example a row."""
    losses: list[float] = []
    with progress.task(description, total=len(examples), unit="conversations") as task:
        for start in range(0, len(examples), _ROWS):
            chosen = examples[start : start + _ROWS]
            longest = max(len(example.tokens) for example in chosen)
            batch = pack_rows([[(one.tokens, one.targets)] for one in chosen], min(longest, context_length), padding_id)
            losses += _means(model, batch)
            task.advance(len(chosen))
    return np.array(losses)


@torch.no_grad()
def _means(model: Decoder, batch: Batch) -> list[float]:
    batch = batch.to(model.device)
    sums_B = token_losses(model, batch).double().sum(1)
    counts_B = (batch.targets_BT != IGNORE_INDEX).sum(1)
    return (sums_B / counts_B).tolist()
