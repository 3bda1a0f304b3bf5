"""Qwen2.5-VL's pictures (Bai et al. 2025): an encoder at any resolution, its merger, and positions of three numbers.

A picture keeps its shape. Its patches have rotary positions of two numbers, row and column; most layers attend within
windows of 8 × 8 patches, some within the whole picture; squares of 2 × 2 patches become one token. In the decoder a token of a
picture has three positions, of which each turns a part of a head's channels (M-RoPE, Wang et al. 2024, section 2.1): time, row
and column.

Modules are called as the tensors in Hugging Face's files.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from bessemer.model.layers.norms import RMSNorm
from bessemer.model.vision.config import VisionConfig
from bessemer.model.vision.encoder import ACTIVATIONS, Pixels

# Shapes: L patches of all pictures, D hidden, H heads, C channels of a head, M tokens.

#: Of all norms, whatever a file says.
_EPS = 1e-6
_THETA = 10_000.0


class GridSpan(NamedTuple):
    """A picture's tokens in a text: the place of the first, and how many rows and columns of them."""

    first: int
    rows: int
    columns: int


def rope_positions(spans: Sequence[GridSpan], start: int, count: int) -> Iterator[tuple[int, int, int]]:
    """Positions in time, rows and columns of the tokens from `start` on.

    Text counts on by one; a picture's tokens have the time of its first, and behind it the text goes on from the larger of its
    sides, so that later positions are behind their places.
    """
    end = start + count
    # the position of the text's token at `place`
    position = place = 0
    for span in spans:
        behind = span.first + span.rows * span.columns
        for token in range(max(start, place), min(end, span.first)):
            yield (position + token - place,) * 3
        begin = position + span.first - place
        for token in range(max(start, span.first), min(end, behind)):
            row, column = divmod(token - span.first, span.columns)
            yield begin, begin + row, begin + column
        position, place = begin + max(span.rows, span.columns), behind
    for token in range(max(start, place), end):
        yield (position + token - place,) * 3


def packed_rope_positions(
    positions_T: NDArray[np.int64], documents_T: NDArray[np.int64], spans: Sequence[GridSpan]
) -> NDArray[np.int64]:
    """Positions in time, rows and columns of the tokens of a packed row, (T, 3).

    positions_T, documents_T: as of a batch. spans: the row's pictures; of one that is cut off at its beginning, `first` is the
    place that its first token would have. A document whose positions begin behind 0 goes on from the one before it that does
    not, with which it shares as many tokens as its first position says.
    """
    length = len(positions_T)
    advance_T, behind_T2 = np.ones(length, np.int64), np.zeros((length, 2), np.int64)
    for first, rows, columns in spans:
        places = np.arange(max(first, 0), min(first + rows * columns, length))
        inside = places - first
        advance_T[places] = 0
        if len(places) and inside[-1] == rows * columns - 1:
            advance_T[places[-1]] = max(rows, columns)
        behind_T2[places] = np.stack([inside // columns, inside % columns], axis=-1)
    passed_T = np.concatenate([[0], np.cumsum(advance_T)])
    begins = np.flatnonzero(np.diff(documents_T, prepend=documents_T[:1] - 1))
    time_T = np.empty(length, np.int64)
    whole = 0
    for begin, end in zip(begins.tolist(), [*begins[1:].tolist(), length], strict=True):
        shared = int(positions_T[begin])
        if not shared:
            whole = begin
        before = passed_T[whole + shared] - passed_T[whole]
        time_T[begin:end] = passed_T[begin:end] - passed_T[begin] + before
    return np.concatenate([time_T[:, None], time_T[:, None] + behind_T2], axis=1)


class PatchEmbed(nn.Module):
    """Patches, each of several frames of a film, as vectors."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        size = (config.temporal_patch_size, config.patch_size, config.patch_size)
        self.proj = nn.Conv3d(config.num_channels, config.hidden_size, kernel_size=size, stride=size, bias=False)

    def forward(self, patches_LP: Tensor) -> Tensor:
        # one product: a convolution whose kernel is the whole patch
        return functional.linear(patches_LP.to(self.proj.weight.dtype), self.proj.weight.flatten(1))


class NativeAttention(nn.Module):
    """Attention within groups of patches that follow each other."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_LD: Tensor, turns: tuple[Tensor, Tensor], groups: Sequence[int]) -> Tensor:
        """groups: how many patches each has, in their order."""
        query, key, value = self.qkv(hidden_LD).unflatten(-1, (3, self.heads, -1)).permute(1, 2, 0, 3)
        cosine, sine = turns
        query, key = (_turned(heads_HLC, cosine, sine) for heads_HLC in (query, key))
        parts = zip(*(heads_HLC[None].split(list(groups), dim=2) for heads_HLC in (query, key, value)), strict=True)
        seen_HLC = torch.cat([functional.scaled_dot_product_attention(*part)[0] for part in parts], dim=1)
        return cast(Tensor, self.proj(seen_HLC.transpose(0, 1).flatten(1)))


def _turned(heads_HLC: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    # in float32 at least
    wide_HLC = heads_HLC.to(torch.promote_types(heads_HLC.dtype, torch.float32))
    first, second = wide_HLC.chunk(2, dim=-1)
    partner = torch.cat((-second, first), dim=-1)
    return (wide_HLC * cosine + partner * sine).to(heads_HLC.dtype)


class GatedMlp(nn.Module):
    """The feed-forward network of a layer."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)
        self._activation = ACTIVATIONS[config.hidden_act]

    def forward(self, hidden_LD: Tensor) -> Tensor:
        return cast(Tensor, self.down_proj(self._activation(self.gate_proj(hidden_LD)) * self.up_proj(hidden_LD)))


class NativeLayer(nn.Module):
    """Attention and a feed-forward network, each behind a norm and added to what it reads."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.norm1 = RMSNorm(config.hidden_size, _EPS)
        self.norm2 = RMSNorm(config.hidden_size, _EPS)
        self.attn = NativeAttention(config)
        self.mlp = GatedMlp(config)

    def forward(self, hidden_LD: Tensor, turns: tuple[Tensor, Tensor], groups: Sequence[int]) -> Tensor:
        hidden_LD = hidden_LD + self.attn(self.norm1(hidden_LD), turns, groups)
        return hidden_LD + cast(Tensor, self.mlp(self.norm2(hidden_LD)))


class NativeEncoder(nn.Module):
    """Patches of pictures in their own shapes in, a state of each out."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.blocks = nn.ModuleList(NativeLayer(config) for _ in range(config.num_hidden_layers))

    def forward(self, pixels: Pixels) -> Tensor:
        """(L, D), square by square of those that become one token. pixels: patches in this order, and each picture's rows and
        columns of them."""
        assert pixels.shapes is not None, "patches come with the shapes of their pictures"
        grids = pixels.shapes.tolist()
        order_L, windows = self._windows(grids)
        order_L = order_L.to(pixels.values.device)
        hidden_LD: Tensor = self.patch_embed(pixels.values)[order_L]
        places_L2 = torch.cat([self._places(*grid) for grid in grids]).to(order_L.device)[order_L]
        channels = self.config.hidden_size // self.config.num_attention_heads // 2
        frequencies = 1.0 / _THETA ** (torch.arange(0, channels, 2, dtype=torch.float32, device=order_L.device) / channels)
        angles_LC = (places_L2[:, :, None] * frequencies).flatten(1).repeat(1, 2)
        turns = (angles_LC.cos(), angles_LC.sin())
        whole = [rows * columns for rows, columns in grids]
        for number, block in enumerate(self.blocks):
            hidden_LD = block(hidden_LD, turns, whole if number in self.config.full_layers else windows)
        return hidden_LD[order_L.argsort()]

    def _places(self, rows: int, columns: int) -> Tensor:
        """The row and column of each patch of a picture, (L, 2), square by square."""
        merge = self.config.merge_size
        places = torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"), dim=-1)
        return places.unflatten(0, (-1, merge)).unflatten(2, (-1, merge)).transpose(1, 2).reshape(-1, 2)

    def _windows(self, grids: Sequence[Sequence[int]]) -> tuple[Tensor, list[int]]:
        """The patches window by window, and how many each window has; those at the right and the lower edge have fewer."""
        merge = self.config.merge_size
        side = self.config.window_size // merge // self.config.patch_size
        order, counts, first = [], [], 0
        for rows, columns in grids:
            squares = torch.arange(rows // merge * (columns // merge)).view(rows // merge, -1) + first
            first += squares.numel()
            for strip in squares.split(side, dim=0):
                for window in strip.split(side, dim=1):
                    order.append(window.flatten())
                    counts.append(window.numel() * merge**2)
        of_squares = torch.cat(order)
        return (of_squares[:, None] * merge**2 + torch.arange(merge**2)).flatten(), counts


class Merger(nn.Module):
    """A norm, and two layers over each square of patches as one vector."""

    def __init__(self, config: VisionConfig, width: int) -> None:
        super().__init__()
        inner = config.hidden_size * config.merge_size**2
        self.ln_q = RMSNorm(config.hidden_size, _EPS)
        self.mlp = nn.Sequential(nn.Linear(inner, inner), nn.GELU(), nn.Linear(inner, width))
        self._inner = inner

    def forward(self, hidden_LD: Tensor) -> Tensor:
        return cast(Tensor, self.mlp(self.ln_q(hidden_LD).view(-1, self._inner)))
