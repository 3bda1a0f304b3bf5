"""What each token of a text costs a model, in windows that may overlap (Press et al. 2021, arXiv 2012.15832, section 2).

Without overlap a window's first tokens are predicted from little. With a stride shorter than the window every token has at
least `context_length − stride` tokens before it, for context_length / stride times the work.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bessemer.core.progress import Progress, Silent
from bessemer.model.cpu_kernels.cross_entropy import cross_entropy_
from bessemer.tokenization.shards import TokenShards
from bessemer.training.chunked_head import Head, Workspace
from bessemer.training.data.batches import IGNORE_INDEX
from bessemer.training.head import token_log_probs
from bessemer.training.validation import LanguageModel, Scored

# Shapes: W windows of a batch, T time, N tokens, D hidden, V vocabulary.


class _Window(NamedTuple):
    """A window of the stream: it reads from `start`, and is asked for the tokens behind `first` up to `end`."""

    start: int
    first: int
    end: int


@torch.no_grad()
def token_nats(
    model: LanguageModel,
    shards: TokenShards,
    scored: Scored,
    *,
    context_length: int,
    batch_size: int,
    stride: int | None = None,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> np.ndarray:
    """−log p of every token after the stream's first, up to those that are scored, in nats: (N,), float32.

    stride: tokens from a window to the next, at most `context_length`; None: that, so no token is read twice. Their sum is then
    that of `training.validation.bits_per_byte`.
    """
    windows = _windows(scored.tokens, context_length, min(stride or context_length, context_length))
    nats = np.empty(scored.tokens, np.float32)
    with (progress or Silent()).task("validate", total=scored.tokens, unit="tokens") as task:
        for place in range(0, len(windows), batch_size):
            batch = windows[place : place + batch_size]
            tokens_WT = np.zeros((batch_size, context_length), np.int64)
            targets_WT = np.full((batch_size, context_length), IGNORE_INDEX, np.int64)
            for row, window in enumerate(batch):
                stream = shards.read(window.start, window.end - window.start + 1).astype(np.int64)
                tokens_WT[row, : len(stream) - 1] = stream[:-1]
                targets_WT[row, window.first - window.start : len(stream) - 1] = stream[1 + window.first - window.start :]
            hidden_WTD = model.hidden(torch.from_numpy(tokens_WT).to(device))
            targets_N, hidden_ND = torch.from_numpy(targets_WT.ravel()).to(device), hidden_WTD.flatten(0, 1)
            asked_N = targets_N != IGNORE_INDEX
            # most batches are asked for all of their tokens, and need no copy
            if not asked_N.all():
                targets_N, hidden_ND = targets_N[asked_N], hidden_ND[asked_N]
            losses_N = token_losses(hidden_ND, model.head_weight, targets_N, model.logit_softcap)
            nats[batch[0].first : batch[-1].end] = losses_N.float().cpu().numpy()
            task.reach(batch[-1].end)
    return nats


def _windows(tokens: int, context_length: int, stride: int) -> list[_Window]:
    ends = [*range(context_length, tokens, stride), tokens]
    firsts = [0, *ends[:-1]]
    return [_Window(max(0, first + stride - context_length), first, end) for first, end in zip(firsts, ends, strict=True)]


def token_losses(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, softcap: float | None = None) -> Tensor:
    """−log softmax(hidden · weightᵀ)[target] of each token, in nats, (N,), without a gradient.

    What `linear_cross_entropy` sums, by the same kernels.
    """
    head, hidden_ND, weight_VD = Head.of(hidden_ND, weight_VD, softcap)
    if not head.is_compiled:
        log_probs_N, _ = token_log_probs(hidden_ND, weight_VD, targets_N, softcap=softcap)
        return -log_probs_N
    hidden, weight = hidden_ND.to(head.dtype), weight_VD.to(head.dtype)
    workspace = Workspace(head, weight, len(hidden))
    log_odds_N = torch.empty(len(hidden), dtype=head.float_dtype)
    for chunk in workspace.chunks():
        _, log_odds_N[chunk] = cross_entropy_(workspace.logits(hidden[chunk]), targets_N[chunk], wants_gradient=False)
    return -torch.nn.functional.logsigmoid(log_odds_N)
