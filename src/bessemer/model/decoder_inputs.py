"""What a decoder's blocks are given beside the states: masks of attention and rotations of positions, by kind of layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bessemer.model.attention import LayerType
from bessemer.model.attention.base import variant_of_type
from bessemer.model.layers.attention_backends import DENSE_BACKENDS, block_mask
from bessemer.model.layers.attention_mask import AttentionMask, WholeRows, alibi_slopes
from bessemer.model.layers.document_keys import DocumentKeys
from bessemer.model.layers.positions import Rotation

# Shapes: B batch, T time, D hidden, H query heads.


def attention_masks(
    decoder: Any,
    queries: int,
    keys: int,
    hidden_BTD: Tensor,
    slots_BT: Tensor | None,
    documents_BT: Tensor | None,
    aligned: bool,
    visible_to_BT: Tensor | None = None,
    seen_until_BT: Tensor | None = None,
) -> dict[LayerType, AttentionMask]:
    """What each kind of layer of a `Decoder` may see; one mask a kind, whatever the number of layers."""
    config, device = decoder.config, hidden_BTD.device
    slopes_H = alibi_slopes(config.num_attention_heads).to(device) if config.position_type == "alibi" else None
    masks: dict[LayerType, AttentionMask] = {}
    for kind in set(config.types):
        has_scores = not variant_of_type(config, kind).recurrent
        masks[kind] = decoder.rows.attention_mask(
            queries,
            keys,
            _scores_dtype(hidden_BTD),
            device,
            slots_BT=slots_BT,
            documents_BT=documents_BT,
            visible_to_BT=visible_to_BT,
            window=config.window(kind),
            slopes_H=slopes_H,
            aligned=aligned,
            dense=has_scores and decoder.attention_backend in DENSE_BACKENDS,
            **({} if seen_until_BT is None else {"seen_until_BT": seen_until_BT}),
        )
        # block masks need whole rows: a cache and sharded rows have other keys
        whole = slots_BT is None and isinstance(decoder.rows, WholeRows)
        if decoder.attention_backend == "flex" and whole and has_scores:
            masks[kind] = masks[kind]._replace(blocks=block_mask(masks[kind], queries, keys, device))
        if decoder.is_batch_invariant:
            assert seen_until_BT is None, "pictures whose tokens see each other are computed otherwise"
            assert slots_BT is None and slopes_H is None, "rows without a cache, whose attention does not go by distance"
            documents = DocumentKeys(documents_BT, visible_to_BT, len(hidden_BTD), keys)
            masks[kind] = masks[kind]._replace(keys=documents)
    return masks


def rotations_of(
    decoder: Any, positions_BT: Tensor | None, length: int, dtype: torch.dtype
) -> dict[LayerType, Rotation | None]:
    """The rotations of each kind of layer of a `Decoder`; those of sliding layers may turn with a base of their own."""
    if decoder.config.position_type != "rotary":
        return dict.fromkeys(decoder.config.types)
    if positions_BT is not None and decoder.config.rope_scaling.rope_type == "dynamic":
        # positions restart at each document: the longest document counts, not the row
        length = int(positions_BT.max()) + 1
    if positions_BT is not None and positions_BT.dim() == 3:
        turned = [decoder.rotary(axis_BT, length, dtype) for axis_BT in positions_BT]
        rotation = Rotation(*(_of_sections(tables, decoder.rope_sections) for tables in zip(*turned, strict=True)))
    else:
        rotation = decoder.rotary(positions_BT, length, dtype)
    rotations: dict[LayerType, Rotation | None] = dict.fromkeys(decoder.config.types, rotation)
    if hasattr(decoder, "rotary_local"):
        rotations["sliding_attention"] = decoder.rotary_local(positions_BT, length, dtype)
    return rotations


def _of_sections(tables: Sequence[Tensor], sections: Sequence[int]) -> Tensor:
    """Cosines or sines of several positions, (…, R), as one: of each half of the channels, the first section's are the first
    table's, and so on (Wang et al. 2024, section 2.1)."""
    parts = [table.split([*sections, *sections], dim=-1) for table in tables]
    return torch.cat([parts[part % len(tables)][part] for part in range(2 * len(sections))], dim=-1)


def _scores_dtype(hidden_BTD: Tensor) -> torch.dtype:
    """Type in which attention will run: autocast's where it is on, else the hidden states'."""
    kind = hidden_BTD.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden_BTD.dtype
