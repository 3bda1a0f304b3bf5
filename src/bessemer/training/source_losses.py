"""The loss of each source's tokens by themselves: what a mixture's parts cost, and which of them a model still learns.

Shapes: B rows of a batch, T tokens of a row, S sources.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from bessemer.model.decoder import Decoder
from bessemer.training.data.batches import IGNORED, Batch

#: Logits held at a time, as in `loss`.
_CHUNK_ELEMENTS = 1 << 22


@torch.no_grad()
def token_losses(model: Decoder, batch: Batch) -> Tensor:
    """−log p of each target, (B, T) float32, in nats; zero where there is none."""
    hidden_BTD = model.hidden(batch.tokens_BT, positions_BT=batch.positions_BT, document_ids_BT=batch.document_ids_BT)
    hidden_ND, targets_N = hidden_BTD.flatten(0, 1), batch.targets_BT.flatten()
    rows = max(1, _CHUNK_ELEMENTS // model.config.vocab_size)
    losses = [
        cross_entropy(model.logits(hidden_CD).float(), targets_C, reduction="none", ignore_index=IGNORED)
        for hidden_CD, targets_C in zip(hidden_ND.split(rows), targets_N.split(rows), strict=True)
    ]
    return torch.cat(losses).view_as(batch.targets_BT)


def sums_by_source(losses_BT: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Sum of the losses of each source's targets, and their number, (S,) float64, in the order of `batch.source_names`.

    Sums of ranks and of batches with the same names add up; `mean_by_source` names the outcome.
    """
    assert batch.sources_BT is not None
    learned_BT = batch.targets_BT != IGNORED
    sources_N, count = batch.sources_BT[learned_BT].long(), len(batch.source_names)
    sums_S = torch.zeros(count, dtype=torch.float64, device=losses_BT.device)
    sums_S.index_add_(0, sources_N, losses_BT[learned_BT].double())
    return sums_S, torch.bincount(sources_N, minlength=count).double()


def mean_by_source(sums_S: Tensor, counts_S: Tensor, names: tuple[str, ...]) -> dict[str, float]:
    """Mean loss, in nats per token, of each source that has any."""
    return {
        name: total / number for name, total, number in zip(names, sums_S.tolist(), counts_S.tolist(), strict=True) if number
    }
