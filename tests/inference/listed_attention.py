"""Attention over the listed pages and no others, written out: what the compiled kernels read, and all that they read."""

from __future__ import annotations

import torch
from torch import Tensor

from bessemer.inference.execution.flex_attention import PageMask
from bessemer.model.layers.attention_backends import Scores, capped


def listed_attention(
    query_BHTC: Tensor,
    keys_PKMC: Tensor,
    values_PKMV: Tensor,
    mask: PageMask,
    scores: Scores,
    window: int | None,
    slopes_H: Tensor | None,
) -> Tensor:
    """As `page_attention`. A key that is not seen has weight 0, and its value is multiplied by it."""
    group = query_BHTC.shape[1] // keys_PKMC.shape[1]
    places_M = torch.arange(keys_PKMC.shape[2])
    attended = []
    for tile, query_HTC in enumerate(query_BHTC.to(keys_PKMC.dtype)):
        pages = mask.pages_B11W[tile, 0, 0, : mask.counts_B11[tile]].tolist()
        if not pages:  # a tile of padding
            attended.append(query_HTC.new_zeros((*query_HTC.shape[:2], values_PKMV.shape[-1])))
            continue
        key_HSC, value_HSV = (
            torch.cat(list(part[pages]), dim=1).repeat_interleave(group, 0) for part in (keys_PKMC, values_PKMV)
        )
        positions_S = torch.cat([mask.begins_BP[tile, page] + places_M for page in pages])
        distance_TS = mask.positions_BT[tile, :, None] - positions_S
        scores_HTS = capped((query_HTC @ key_HSC.transpose(1, 2)).float() * scores.scale, scores.softcap)
        if slopes_H is not None:
            scores_HTS = scores_HTS - slopes_H[:, None, None] * distance_TS
        hidden_TS = (distance_TS < 0) | (distance_TS >= (window or 1 << 30))
        scores_HTS = scores_HTS.masked_fill(hidden_TS, -torch.inf)
        if scores.sinks_H is not None:
            sinks_HT1 = scores.sinks_H[:, None, None].expand(*scores_HTS.shape[:2], 1)
            weights_HTS = torch.cat((scores_HTS, sinks_HT1), dim=-1).softmax(-1)[..., :-1]
        else:
            weights_HTS = scores_HTS.softmax(-1)
        attended.append(weights_HTS.to(value_HSV.dtype) @ value_HSV)
    return torch.stack(attended)
