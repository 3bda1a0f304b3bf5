"""Aggregation: how the losses of tokens become one loss.

The loss of a step is Σ weight · loss / denominator over the tokens of all micro-batches and ranks. A method is thus a weight of
each token and a denominator of the whole step; nothing is divided by the number of micro-batches a second time.

Shapes: B rows, T tokens of a row, S sequences of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bessemer.posttraining.rl.sequences import Sequences
from bessemer.training.objectives import Count


@dataclass(frozen=True)
class Aggregation:
    """weights: of each token, (B, T), zero outside the mask. denominator: this rank's part, of whole rows.

    longest: the largest number of tokens of an answer, answers: of the whole step.
    """

    weights: Callable[[Sequences], Tensor]
    denominator: Callable[[Sequences, int, int], Count]


def _each_token(sequences: Sequences) -> Tensor:
    return sequences.mask_BT


def _over_length(sequences: Sequences) -> Tensor:
    return sequences.mask_BT / sequences.of_tokens(sequences.lengths)


def _over_group(sequences: Sequences) -> Tensor:
    """1 / tokens of all answers to the prompt: `group_tokens` of each sequence, which the source of the batch gives."""
    group_tokens_BS = sequences.batch.per_sequence["group_tokens"].to(sequences.mask_BT.dtype)
    return sequences.mask_BT / sequences.of_tokens(group_tokens_BS).clamp(min=1)


def _tokens(sequences: Sequences, longest: int, answers: int) -> Count:
    return Count(float(sequences.mask_BT.sum()), "token")


def _answers(sequences: Sequences, longest: int, answers: int) -> Count:
    """Answers that have a token: an answer that was dropped is in no mean."""
    return Count(float((sequences.sums(sequences.mask_BT) > 0).sum()), "sequence")


def _constant(sequences: Sequences, longest: int, answers: int) -> Count:
    return Count(float(longest * answers), "constant")


def _prompts(sequences: Sequences, longest: int, answers: int) -> Count:
    """Each answer is its share of its group's answers that have a token: the shares add up to the number of prompts."""
    has_tokens_BS = sequences.sums(sequences.mask_BT) > 0
    group_BS = sequences.batch.per_sequence["group_answers"].clamp(min=1)
    return Count(float(torch.where(has_tokens_BS, 1 / group_BS, 0.0).sum()), "sequence")


TOKEN_MEAN = Aggregation(_each_token, _tokens)
SEQUENCE_MEAN = Aggregation(_over_length, _answers)
CONSTANT = Aggregation(_each_token, _constant)
PROMPT_MEAN = Aggregation(_over_group, _prompts)
