"""A batch: rows of tokens with their targets, and what else is known of tokens and sequences.

Shapes: B rows of a batch, T tokens of a row, S sequences of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NotRequired, Self, TypedDict

import numpy as np
import torch
from torch import Tensor

from bessemer.model.vision.trained import BatchPictures
from bessemer.training.data.pictures import PictureTable

#: Target of a token without a loss.
IGNORE_INDEX = -100


class Inputs(TypedDict):
    """Arguments of `Decoder.hidden`."""

    tokens_BT: Tensor
    positions_BT: Tensor | None
    document_ids_BT: Tensor | None
    visible_to_BT: Tensor | None
    pictures: NotRequired[BatchPictures]


@dataclass(frozen=True)
class Batch:
    """Input tokens of one step and their targets.

    targets_BT: the next token's id, or -100 for no loss. positions_BT: where rotary positions restart; None: 0 to T − 1.
    document_ids_BT: tokens attend only to those of an equal id; None: a row is one document. sources_BT: int16, the source of
    each input token's document, an index into `source_names`; None: not known.
    visible_to_BT: the last document of the row that sees a token, where documents share what they begin with; None: each sees
    its own.
    pictures: those of the run, of which `vector_of_token_BT` says what each token is, int64, as in `PictureTable`; −1 for text.
    rope_BT3: positions in time, rows and columns by which channels are turned, of a model that has such (B, T, 3).

    A *sequence* is what an objective judges as one: the tokens of a row with one document id, counted from 1 (0 is padding), or
    the whole row where there are no ids. per_token: values of tokens by name, (B, T), such as masks, log-probabilities,
    advantages. per_sequence: values of sequences by name, (B, S, …), that of document id s in column s − 1, such as rewards and
    labels; the columns behind a row's last sequence are not read. sequences: S, the most sequences of a row.
    together: number of neighbouring sequences, as the two answers of a pair, that stay in one micro-batch and on one rank.
    """

    tokens_BT: Tensor
    targets_BT: Tensor
    positions_BT: Tensor | None = None
    document_ids_BT: Tensor | None = None
    sources_BT: Tensor | None = None
    visible_to_BT: Tensor | None = None
    vector_of_token_BT: Tensor | None = None
    rope_BT3: Tensor | None = None
    pictures: PictureTable | None = None
    source_names: tuple[str, ...] = ()
    per_token: Mapping[str, Tensor] = field(default_factory=dict)
    per_sequence: Mapping[str, Tensor] = field(default_factory=dict)
    sequences: int = 1
    together: int = 1

    @property
    def inputs(self) -> Inputs:
        """Arguments of `Decoder.hidden`: `model.hidden(**batch.inputs)`."""
        inputs = Inputs(
            tokens_BT=self.tokens_BT,
            positions_BT=self.positions_BT,
            document_ids_BT=self.document_ids_BT,
            visible_to_BT=self.visible_to_BT,
        )
        if (shown := self.shown) is not None:
            inputs["pictures"] = shown
        return inputs

    @property
    def shown(self) -> BatchPictures | None:
        """The pictures that its tokens need, read and normalised; None without any."""
        if self.pictures is None or self.vector_of_token_BT is None:
            return None
        return self.pictures.of_batch(self.vector_of_token_BT, self.rope_BT3)

    @property
    def targets(self) -> int:
        """Number of targets. On a GPU this waits for the device."""
        return int((self.targets_BT != IGNORE_INDEX).sum())

    @property
    def rows_together(self) -> int:
        """Neighbouring rows that stay in one micro-batch: `together` where a row is one sequence. A packed row holds whole
        groups and stands by itself."""
        return self.together if self.document_ids_BT is None else 1

    @property
    def sequence_of_token_BT(self) -> Tensor:  # noqa: N802
        """The column of `per_sequence` of each token, (B, T) int64; of padding, that of the first sequence."""
        if self.document_ids_BT is None:
            return torch.zeros_like(self.tokens_BT)
        return (self.document_ids_BT - 1).clamp(min=0)

    def to(self, device: torch.device) -> Self:
        """The same batch on a device. From pinned memory the copy is asynchronous: the first use waits for it."""
        return self._changed(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> Self:
        """The same batch in pinned memory."""
        return self._changed(Tensor.pin_memory)

    def rows(self, chosen: slice | np.ndarray) -> Self:
        """The batch of some of its rows: a slice, or their indices (B,)."""
        places = chosen if isinstance(chosen, slice) else torch.from_numpy(chosen)
        return self._changed(lambda tensor: tensor[places])

    def columns(self, chosen: Sequence[slice]) -> Self:
        """The batch of some of its columns, concatenated; they keep their positions, and rows their values of sequences."""
        positions_BT = self.positions_BT
        if positions_BT is None:
            positions_BT = torch.arange(self.tokens_BT.shape[1], device=self.tokens_BT.device).expand(self.tokens_BT.shape)
        whole = replace(self, positions_BT=positions_BT)
        cut = whole._changed(lambda tensor: torch.cat([tensor[:, part] for part in chosen], dim=1), per_sequence=False)
        return replace(cut, per_sequence=self.per_sequence)

    def showing(self, pictures: PictureTable, vector_of_token_BT: Tensor) -> Self:
        """The batch with pictures; arguments as its members."""
        rope_BT3 = pictures.rope_positions(vector_of_token_BT, self.positions_BT, self.document_ids_BT)
        return replace(self, pictures=pictures, vector_of_token_BT=vector_of_token_BT, rope_BT3=rope_BT3)

    def with_values(
        self, *, per_token: Mapping[str, Tensor] | None = None, per_sequence: Mapping[str, Tensor] | None = None
    ) -> Self:
        """The batch with more values of tokens, (B, T), and of sequences, (B, S, …)."""
        return replace(
            self,
            per_token={**self.per_token, **(per_token or {})},
            per_sequence={**self.per_sequence, **(per_sequence or {})},
        )

    def sequence_sums(self, values_BT: Tensor) -> Tensor:
        """The sum over the tokens of each sequence that are here, (B, S), differentiable. Padding is left out."""
        if self.document_ids_BT is None:
            return values_BT.sum(1, keepdim=True)
        values_BT = values_BT * (self.document_ids_BT > 0)
        sums_BS = values_BT.new_zeros(values_BT.shape[0], self.sequences)
        return sums_BS.scatter_add(1, self.sequence_of_token_BT, values_BT)

    def of_tokens(self, values_BS: Tensor) -> Tensor:
        """The value of each token's sequence, (B, T), differentiable; padding gets that of the first one."""
        return values_BS.gather(1, self.sequence_of_token_BT)

    def _changed(self, change: Callable[[Tensor], Tensor], *, per_sequence: bool = True) -> Self:
        tensors: dict[str, Any] = {name: change(value) for name, value in vars(self).items() if isinstance(value, Tensor)}
        tensors["per_token"] = {name: change(value) for name, value in self.per_token.items()}
        if per_sequence:
            tensors["per_sequence"] = {name: change(value) for name, value in self.per_sequence.items()}
        return replace(self, **tensors)


def concatenated(batches: Sequence[Batch]) -> Batch:
    """The rows of batches of one kind, in order. Values of sequences are filled up to the most sequences with zeros."""
    first, *others = batches
    if not others:
        return first
    sequences = max(batch.sequences for batch in batches)

    def filled(values_BS: Tensor) -> Tensor:
        missing = sequences - values_BS.shape[1]
        return torch.cat([values_BS, values_BS.new_zeros(values_BS.shape[0], missing, *values_BS.shape[2:])], dim=1)

    names = [name for name, value in vars(first).items() if isinstance(value, Tensor)]
    tensors: dict[str, Any] = {name: torch.cat([getattr(batch, name) for batch in batches]) for name in names}
    return replace(
        first,
        **tensors,
        sequences=sequences,
        per_token={name: torch.cat([batch.per_token[name] for batch in batches]) for name in first.per_token},
        per_sequence={name: torch.cat([filled(batch.per_sequence[name]) for batch in batches]) for name in first.per_sequence},
    )
