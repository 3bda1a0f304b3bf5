"""Attention with a state in place of keys and values: which tokens of a batch go on from which states."""

from __future__ import annotations

import torch
from torch import Tensor

from bessemer.model.layers.attention import AttentionLayer
from bessemer.model.layers.attention_mask import AttentionMask
from bessemer.model.layers.cache import Cache, Rectangle
from bessemer.model.layers.positions import Rotation

# Shapes: B batch, T time, D hidden, O inputs of the last product.


class RecurrentLayer(AttentionLayer):
    """Products for each token alone (`project`), a recurrence over the tokens of a sequence (`mix`), and a last product.

    The products read their weights once for all rows, however those lie; the recurrence sees rows that are sequences.
    """

    layer: int

    def project(self, hidden_BTD: Tensor) -> tuple[Tensor, ...]:
        """What the recurrence reads, each (B, T, …)."""
        raise NotImplementedError

    def mix(
        self,
        projected: tuple[Tensor, ...],
        documents_BT: Tensor | None,
        real_BT: Tensor | None,
        state: tuple[Tensor, ...] | None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """What the last product reads, (B, T, O), and the state after these tokens, tensors with a row per sequence.

        documents_BT: of packed documents; the state starts from zero at each. real_BT: which tokens are no padding; padding
        leaves the state as it is. None: all. state: before these tokens; None at the beginning.
        """
        raise NotImplementedError

    def forward(self, hidden_BTD: Tensor, rotation: Rotation | None, mask: AttentionMask, cache: Cache | None) -> Tensor:
        projection, _ = self.output
        return projection(self._mixed(self.project(hidden_BTD), mask.documents_BT, cache))

    def _mixed(self, projected: tuple[Tensor, ...], documents_BT: Tensor | None, cache: Cache | None) -> Tensor:
        if cache is None:
            return self.mix(projected, documents_BT, None, None)[0]
        rectangles = cache.rectangles()
        if rectangles is None:
            mixed_BTO, state = self.mix(projected, documents_BT, cache.real_BT, cache.state(self.layer))
            cache.store_state(self.layer, *state)
            return mixed_BTO
        mixed = [self._mix_rectangle(projected, rectangle, cache) for rectangle in rectangles]
        mixed_BTO = mixed[0].new_empty(*projected[0].shape[:2], mixed[0].shape[-1])
        for rectangle, rows_BTO in zip(rectangles, mixed, strict=True):
            mixed_BTO[0, rectangle.rows_BT] = rows_BTO
        return mixed_BTO

    def _mix_rectangle(self, projected: tuple[Tensor, ...], rectangle: Rectangle, cache: Cache) -> Tensor:
        """Some sequences of a ragged batch, all with as many new tokens, (B, T, O)."""
        rows = tuple(part[0, rectangle.rows_BT] for part in projected)
        state = cache.state(self.layer, rectangle)
        if not rectangle.every_step:
            mixed_BTO, state = self.mix(rows, None, None, state)
            cache.store_state(self.layer, *state, rectangle=rectangle)
            return mixed_BTO
        mixed = []
        for step, token in enumerate(zip(*(part.split(1, dim=1) for part in rows), strict=True)):
            mixed_B1O, state = self.mix(token, None, None, state)
            cache.store_state(self.layer, *state, rectangle=rectangle, step=step)
            mixed.append(mixed_B1O)
        return torch.cat(mixed, dim=1)
