"""A model that reads pictures: an encoder, a projector, and a decoder that takes the projected vectors in place of embeddings.

A picture takes a fixed number of tokens of the prompt, each the model's image token; their embeddings are replaced by the
picture's vectors, and everything behind is the decoder's own (LLaVA, Liu et al. 2023).
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from bessemer.core.errors import RequestError
from bessemer.model.decoder import Decoder
from bessemer.model.layers.cache import Cache
from bessemer.model.layers.embedding import EmbeddedRows
from bessemer.model.layers.norms import RMSNorm
from bessemer.model.vision.config import VisionLanguageConfig
from bessemer.model.vision.encoder import ACTIVATIONS, Pixels, VisionEncoder
from bessemer.model.vision.native import GridSpan, Merger, NativeEncoder, rope_positions

# Shapes: N pictures or tiles, L patches, M image tokens, B batch, T time, D hidden, V vocabulary.


def pixel_shuffle(hidden_NLD: Tensor, factor: int) -> Tensor:
    """Each square of factor · factor patches as one vector, row by row: (N, L / factor², D · factor²).

    (Shi et al. 2016, the inverse; Laurençon et al. 2024, section 2.2.2.) The patches are those of a square picture.
    """
    side = round(hidden_NLD.shape[1] ** 0.5)
    squares = hidden_NLD.unflatten(1, (side // factor, factor, side // factor, factor))
    return squares.transpose(2, 3).flatten(3).flatten(1, 2)


class ShuffleProjector(nn.Module):
    """Idefics3's: pixel shuffle, and one matrix without bias."""

    def __init__(self, config: VisionLanguageConfig) -> None:
        super().__init__()
        self.factor = config.scale_factor
        self.proj = nn.Linear(config.vision.hidden_size * self.factor**2, config.text.hidden_size, bias=False)

    def forward(self, hidden_NLD: Tensor) -> Tensor:
        return cast(Tensor, self.proj(pixel_shuffle(hidden_NLD, self.factor)))


class MlpProjector(nn.Module):
    """LLaVA's: two layers over each patch, of the states of one or more of the encoder's layers side by side."""

    def __init__(self, config: VisionLanguageConfig) -> None:
        super().__init__()
        size, inner = config.text.hidden_size, config.vision.hidden_size * len(config.feature_layers)
        self.linear_1 = nn.Linear(inner, size, bias=config.projector_bias)
        self.linear_2 = nn.Linear(size, size, bias=config.projector_bias)
        self._activation = ACTIVATIONS[config.projector_act]

    def forward(self, hidden_NLD: Tensor) -> Tensor:
        return cast(Tensor, self.linear_2(self._activation(self.linear_1(hidden_NLD))))


class PooledProjector(nn.Module):
    """Gemma 3's: the mean of each square of patches, a norm, and one matrix, stored input by output."""

    def __init__(self, config: VisionLanguageConfig) -> None:
        super().__init__()
        width = config.vision.hidden_size
        self.kernel = config.vision.grid // config.pooled_side
        self.grid = config.vision.grid
        self.mm_input_projection_weight = nn.Parameter(torch.empty(width, config.text.hidden_size))
        self.mm_soft_emb_norm = RMSNorm(width, config.vision.layer_norm_eps, offset=True)

    def forward(self, hidden_NLD: Tensor) -> Tensor:
        patches = hidden_NLD.transpose(1, 2).unflatten(2, (self.grid, self.grid))
        pooled_NLD = functional.avg_pool2d(patches, self.kernel).flatten(2).transpose(1, 2)
        return cast(Tensor, self.mm_soft_emb_norm(pooled_NLD)) @ self.mm_input_projection_weight


class Vision(nn.Module):
    """What a decoder sees pictures with: an encoder and a projector."""

    def __init__(self, config: VisionLanguageConfig) -> None:
        super().__init__()
        self.config = config
        if config.vision.is_native:
            self.encoder: nn.Module = NativeEncoder(config.vision)
            self.projector: nn.Module = Merger(config.vision, config.text.hidden_size)
            return
        self.encoder = VisionEncoder(config.vision)
        kind = ShuffleProjector if config.scale_factor else PooledProjector if config.pooled_side else MlpProjector
        self.projector = kind(config)

    def forward(self, pixels: Pixels) -> Tensor:
        """Vectors of the decoder's width for each picture or tile, (N, tokens, D); of pictures in shapes of their own, (1,
        tokens of all, D)."""
        config = self.config
        if config.vision.is_native:
            return cast(Tensor, self.projector(self.encoder(pixels)))[None]
        assert isinstance(self.encoder, VisionEncoder)
        if config.scale_factor or config.pooled_side:
            return cast(Tensor, self.projector(self.encoder(pixels)))
        states = self.encoder.states(pixels, config.feature_layers)
        if config.drops_class:
            states = [hidden_NLD[:, 1:] for hidden_NLD in states]
        return cast(Tensor, self.projector(torch.cat(states, dim=-1)))


class VisionLanguageModel(nn.Module):
    """An encoder, a projector and a decoder."""

    def __init__(self, config: VisionLanguageConfig) -> None:
        super().__init__()
        self.config = config
        self.vision = Vision(config)
        self.decoder = Decoder(config.text)
        self.decoder.rope_sections = config.rope_sections

    def rope_positions(self, tokens_BT: Tensor, pixels: Pixels) -> Tensor:
        """Positions of three numbers of tokens with pictures, (3, B, T)."""
        assert pixels.shapes is not None
        merge, rows = self.config.vision.merge_size, []
        grids = iter((pixels.shapes // merge).tolist())
        for tokens in tokens_BT.tolist():
            spans: list[GridSpan] = []
            behind = 0
            for place, token in enumerate(tokens):
                if token == self.config.image_token_id and place >= behind:
                    spans.append(GridSpan(place, *next(grids)))
                    behind = place + spans[-1].rows * spans[-1].columns
            rows.append(list(rope_positions(spans, 0, len(tokens))))
        return torch.tensor(rows, device=tokens_BT.device).permute(2, 0, 1)

    def embedded_rows(self, tokens_BT: Tensor, pixels: Pixels) -> EmbeddedRows:
        """The vectors of pictures, and the places of the image tokens that they are for, in the order of the rows.

        Raises RequestError where there are more or fewer image tokens than vectors.
        """
        vectors_MD = self.vision(pixels).flatten(0, 1)
        rows_M = (tokens_BT.flatten() == self.config.image_token_id).nonzero()[:, 0]
        if len(rows_M) != len(vectors_MD):
            raise RequestError(f"the pictures take {len(vectors_MD):,} tokens, and the text has places for {len(rows_M):,}")
        return EmbeddedRows(rows_M, vectors_MD)

    def forward(
        self,
        tokens_BT: Tensor,
        pixels: Pixels | None = None,
        *,
        positions_BT: Tensor | None = None,
        document_ids_BT: Tensor | None = None,
        cache: Cache | None = None,
        rope_3BT: Tensor | None = None,
    ) -> Tensor:
        """Logits of the token after each, (B, T, V). pixels: of all pictures or tiles of the rows, in their order; the other
        arguments as for `Decoder.hidden`. A picture whose tokens see each other is whole in these. Raises as `embedded_rows`.
        """
        embedded = None if pixels is None else self.embedded_rows(tokens_BT, pixels)
        if embedded is not None and rope_3BT is None and self.config.rope_sections:
            assert pixels is not None and cache is None, "positions behind a cache depend on what it holds"
            rope_3BT = self.rope_positions(tokens_BT, pixels)
        seen_until_BT = None
        if embedded is not None and self.config.is_bidirectional:
            seen_until_BT = ends_of_runs(tokens_BT == self.config.image_token_id)
            if cache is not None:
                assert cache.aligned, "rows of one length"
                seen_until_BT = seen_until_BT + cache.live
        logits_BTV: Tensor = self.decoder(
            tokens_BT,
            positions_BT=positions_BT,
            document_ids_BT=document_ids_BT,
            cache=cache,
            embedded=embedded,
            seen_until_BT=seen_until_BT,
            rope_3BT=rope_3BT,
        )
        return logits_BTV


def ends_of_runs(is_inside_BT: Tensor, starts_BT: Tensor | None = None) -> Tensor:
    """Of each token within a run, the place of the run's last token in its row; of the others their own, (B, T) int64.

    starts_BT: where a run begins although the token before is within one, too.
    """
    length = is_inside_BT.shape[1]
    places_BT = torch.arange(length, device=is_inside_BT.device).expand_as(is_inside_BT)
    goes_on_BT = is_inside_BT[:, 1:] & is_inside_BT[:, :-1]
    if starts_BT is not None:
        goes_on_BT = goes_on_BT & ~starts_BT[:, 1:]
    # the nearest place, from each on, behind which no run goes on
    ends_BT = torch.where(functional.pad(goes_on_BT, (0, 1)), length, places_BT)
    return ends_BT.flip(1).cummin(1).values.flip(1)
