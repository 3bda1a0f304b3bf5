"""Validation: bits per byte, a measure of prediction that does not depend on the tokenizer.

    bits per byte = Σ −log₂ p(token | tokens before it) / Σ UTF-8 bytes of the documents

Loss per token cannot compare two tokenizers, because longer tokens are fewer and harder to predict. Per byte of text, all
models can be compared, with n-gram models and file compressors too.
"""

# Shapes: B batch, T time, D hidden, V vocabulary.

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from bessemer.core.errors import ArtefactError
from bessemer.core.progress import Progress, Silent
from bessemer.tokenization.shards import TokenShards
from bessemer.training.data.batch import IGNORE_INDEX
from bessemer.training.head import linear_cross_entropy


class LanguageModel(Protocol):
    """A model to score: hidden states after the final norm, and the output matrix."""

    @property
    def head_weight(self) -> Tensor:
        """The output matrix (V, D)."""

    @property
    def logit_softcap(self) -> float | None:
        """The c of logits held within ±c by c·tanh(logits / c), if they are."""

    def hidden(self, tokens_BT: Tensor, *, positions_BT: Tensor | None = None) -> Tensor:
        """Causal hidden states (B, T, D); positions are 0, 1, 2, … when None."""


@dataclass(frozen=True)
class BitsPerByte:
    """A model's score on a text. `loss` is in nats per token."""

    bits_per_byte: float
    loss: float
    tokens: int
    bytes: int


@dataclass(frozen=True)
class Scored:
    """The scored part of a token stream: its first documents, the tokens to predict in them, and their UTF-8 bytes."""

    documents: int
    tokens: int
    bytes: int


@torch.no_grad()
def bits_per_byte(
    model: LanguageModel,
    shards: TokenShards,
    *,
    context_length: int,
    batch_size: int,
    max_tokens: int | None = None,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
    likelihood: Callable[[Tensor, Tensor], float] | None = None,
) -> BitsPerByte:
    """Score a model on a token stream, or on its first documents that fit in `max_tokens` (at least one).

    The stream is split into windows of `context_length` without overlap: a token is predicted from the 1 to `context_length`
    tokens before it. Every token after the stream's first counts, the end token of each document included; the bytes are
    those of the documents alone. All batches have one shape, and the batch size changes the result only by rounding.
    likelihood: the negative log-likelihood of a batch's targets, for a model on several processes.

    Raises ArtefactError when the stream holds no document.
    """
    scored = whole_documents(shards, max_tokens)
    windows = math.ceil(scored.tokens / context_length)
    total = 0.0
    with (progress or Silent()).task("validate", total=scored.tokens, unit="tokens") as task:
        for first in range(0, windows, batch_size):
            start, length = first * context_length, batch_size * context_length
            stream = shards.read(start, min(length, scored.tokens - start) + 1).astype(np.int64)
            tokens_BT = np.zeros((batch_size, context_length), np.int64)
            targets_BT = np.full((batch_size, context_length), IGNORE_INDEX, np.int64)
            tokens_BT.flat[: len(stream) - 1] = stream[:-1]
            targets_BT.flat[: len(stream) - 1] = stream[1:]
            batch = torch.from_numpy(tokens_BT).to(device), torch.from_numpy(targets_BT).to(device)
            total += summed_loss(model, *batch) if likelihood is None else likelihood(*batch)
            task.advance(len(stream) - 1)
    return BitsPerByte(
        bits_per_byte=total / math.log(2) / scored.bytes,
        loss=total / scored.tokens,
        tokens=scored.tokens,
        bytes=scored.bytes,
    )


def whole_documents(shards: TokenShards, max_tokens: int | None) -> Scored:
    """The first documents that give at most `max_tokens` tokens to predict, at least one; all when None.

    A document of n tokens, begin token included, has n tokens to predict: its own without the begin token, and the end token.
    Raises ArtefactError when the stream holds no text.
    """
    if not shards.bytes:
        raise ArtefactError(f"{shards.folder}: holds no text to measure a model on; raise the validation share at collection")
    if max_tokens is None:
        return Scored(shards.document_count, shards.tokens - 1, shards.bytes)
    index = shards.documents()
    ends = np.cumsum(index["length"].to_numpy())
    count = max(1, int(np.searchsorted(ends, max_tokens, side="right")))
    return Scored(count, int(ends[count - 1]), int(index["bytes"].to_numpy()[:count].sum()))


def summed_loss(model: LanguageModel, tokens_BT: Tensor, targets_BT: Tensor, positions_BT: Tensor | None = None) -> float:
    """−log p summed over the targets, in nats. positions_BT: where positions do not count from 0."""
    hidden_BTD = model.hidden(tokens_BT) if positions_BT is None else model.hidden(tokens_BT, positions_BT=positions_BT)
    return float(linear_cross_entropy(hidden_BTD.flatten(0, 1), model.head_weight, targets_BT.flatten(), model.logit_softcap))
