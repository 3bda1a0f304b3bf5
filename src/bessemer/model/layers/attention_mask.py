"""Masks of attention: causal, within a document, within a sliding window, with padding and ALiBi's penalties."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

from bessemer.model.layers.document_keys import DocumentKeys

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

# Shapes: B batch, T queries, S keys, H query heads.


class AttentionMask(NamedTuple):
    """Which keys a query attends to. Made once per batch and kind of layer, and shared by its layers.

    slots_BT: the place of each query among the keys; None where query t stands at place t.
    documents_BT: of packed documents, each key's document; a query attends to its own document only.
    visible_to_BT: the last document that sees each key, where a query attends to keys of earlier documents besides.
    window: most tokens attended to, the query included. slopes_H: ALiBi's, taken off the scores per step of distance.
    dense: all of this in one tensor that is added to the scores, (B, 1 or H, T, S); None where plain causal attention (or
    one new token that attends to every key) is right, and for backends that go by the other fields (`dense=False`).
    seen_until_BT: the last place that each query sees, its own or one behind it (pictures whose tokens see each other); None:
    its own.
    blocks: all but the slopes, for the backend `flex`, which else makes them in every layer. keys: where each document's keys
    lie, for batch-invariant kernels, likewise.
    """

    slots_BT: Tensor | None = None
    documents_BT: Tensor | None = None
    window: int | None = None
    slopes_H: Tensor | None = None
    dense: Tensor | None = None
    visible_to_BT: Tensor | None = None
    blocks: BlockMask | None = None
    keys: DocumentKeys | None = None
    seen_until_BT: Tensor | None = None


def attention_mask(
    queries: int,
    keys: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    slots_BT: Tensor | None = None,
    documents_BT: Tensor | None = None,
    visible_to_BT: Tensor | None = None,
    window: int | None = None,
    slopes_H: Tensor | None = None,
    aligned: bool = True,
    dense: bool = True,
    seen_until_BT: Tensor | None = None,
) -> AttentionMask:
    """The mask of `queries` queries over `keys` keys; `dense` is in the scores' type.

    aligned: the queries of every row stand at the same places, the last ones of the keys.
    dense: make the dense mask where one is needed. It is additive, because a boolean one is converted again by every layer.
    """
    if window is not None and window >= keys:
        window = None
    plain = documents_BT is None and window is None and slopes_H is None and aligned and (queries in (1, keys))
    plain = plain and seen_until_BT is None
    # with shared prefixes, places in the row are no distances between tokens
    assert visible_to_BT is None or (window is None and slopes_H is None)
    # a distance below 0 has no penalty
    assert seen_until_BT is None or slopes_H is None
    mask = AttentionMask(slots_BT, documents_BT, window, slopes_H, visible_to_BT=visible_to_BT, seen_until_BT=seen_until_BT)
    if plain or not dense:
        return mask
    scores_BHTS = bias(mask, torch.arange(queries, device=device), torch.arange(keys, device=device))
    return mask._replace(dense=scores_BHTS.to(dtype))


def bias(mask: AttentionMask, queries_T: Tensor, keys_S: Tensor) -> Tensor:
    """What is added to the scores of some queries and keys, (B or 1, H or 1, T, S) float32: 0, ALiBi's penalty, or -inf.

    queries_T, keys_S: which rows and columns of the whole, so that attention in tiles asks for a tile only.
    """
    places_BT = queries_T[None] if mask.slots_BT is None else mask.slots_BT[:, queries_T]
    distance_BTS = places_BT[:, :, None] - keys_S
    allowed_BTS = distance_BTS >= 0
    if mask.seen_until_BT is not None:
        allowed_BTS = keys_S <= mask.seen_until_BT[:, queries_T, None]
    if mask.window is not None:
        allowed_BTS = allowed_BTS & (distance_BTS < mask.window)
    if mask.documents_BT is not None:
        own_BT = mask.documents_BT.gather(1, places_BT.expand(len(mask.documents_BT), -1))
        own_BT1, of_keys_B1S = own_BT[:, :, None], mask.documents_BT[:, None, keys_S]
        if mask.visible_to_BT is None:
            allowed_BTS = allowed_BTS & (own_BT1 == of_keys_B1S)
        else:
            allowed_BTS = allowed_BTS & (of_keys_B1S <= own_BT1) & (own_BT1 <= mask.visible_to_BT[:, None, keys_S])
    penalty_BHTS = torch.zeros((), device=keys_S.device)
    if mask.slopes_H is not None:
        penalty_BHTS = -mask.slopes_H[:, None, None] * distance_BTS[:, None]
    return torch.where(allowed_BTS[:, None], penalty_BHTS, -torch.inf)


def alibi_slopes(heads: int) -> Tensor:
    """The penalty of each head per step of distance, (H,) (Press et al. 2022, section 3): a geometric series down to
    2⁻⁸; for a number of heads that is no power of two, filled up with every other slope of the next power."""
    power = 1 << (heads.bit_length() - 1)
    slopes = [2.0 ** (-8 * (head + 1) / power) for head in range(power)]
    slopes += [2.0 ** (-4 * (2 * head + 1) / power) for head in range(heads - power)]
    return torch.tensor(slopes)


class Rows(Protocol):
    """How the rows lie that a model reads: whole, or in parts on several processes (`distributed/context.py`)."""

    def attention_mask(
        self,
        queries: int,
        keys: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        slots_BT: Tensor | None = None,
        documents_BT: Tensor | None = None,
        visible_to_BT: Tensor | None = None,
        window: int | None = None,
        slopes_H: Tensor | None = None,
        aligned: bool = True,
        dense: bool = True,
    ) -> AttentionMask:
        """As the function `attention_mask`, of the queries that are here over the keys of the whole rows."""

    def total(self, counts: Tensor) -> Tensor:
        """What is counted here of every row, summed over the rows' parts; without a gradient."""


class WholeRows:
    """Rows that lie here from their first token to their last."""

    attention_mask = staticmethod(attention_mask)

    def total(self, counts: Tensor) -> Tensor:
        """The counts themselves."""
        return counts
