"""A decoder with what it sees pictures with, as one module: what training reads, updates and writes back.

The encoder and the projector lie in the decoder as `vision`, so that every method that trains a decoder trains them too: their
parameters are `vision.encoder.…` and `vision.projector.…`, and settings freeze them, or all others, by these names.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from torch.nn import functional

from bessemer.model.decoder import Decoder
from bessemer.model.initialisation import empty_decoder
from bessemer.model.layers.embedding import EmbeddedRows
from bessemer.model.storage.folder import load_model, save_model
from bessemer.model.vision.config import VisionLanguageConfig
from bessemer.model.vision.encoder import Pixels
from bessemer.model.vision.folder import is_vision_folder, load_vision_language, save_vision_language
from bessemer.model.vision.model import Vision, VisionLanguageModel, ends_of_runs

# Shapes: B batch, T time, D hidden, M vectors of pictures.


class BatchPictures(NamedTuple):
    """The pictures of a batch, and which of their vectors each token is.

    pixels: of all tiles. vector_of_token_BT: int64, the place of a token's vector among those of all tiles, tile by tile; −1
    for a token that is no picture's. rope_3BT: as of `Decoder.hidden`.
    """

    pixels: Pixels
    vector_of_token_BT: Tensor
    rope_3BT: Tensor | None = None


def needed_pictures(vector_of_token_BT: Tensor, first_vector_N: Tensor) -> tuple[Tensor, Tensor]:
    """The numbers of the pictures or tiles that some tokens need, and these tokens' places among the vectors of them, −1 as it
    was. The first one, which then has no token, where they need none, so that the encoder's parameters always have a gradient.

    first_vector_N: the number of the first vector of each, and behind them how many there are of all, (N + 1), int64.
    """
    is_picture_BT = vector_of_token_BT >= 0
    picture_BT = torch.searchsorted(first_vector_N, vector_of_token_BT.clamp(min=0), right=True) - 1
    needed_M = torch.unique(picture_BT[is_picture_BT])
    if not len(needed_M):
        needed_M = torch.zeros(1, dtype=torch.int64, device=vector_of_token_BT.device)
    counts_M = first_vector_N[needed_M + 1] - first_vector_N[needed_M]
    place_BT = torch.searchsorted(needed_M, picture_BT).clamp(max=len(needed_M) - 1)
    before_BT = (counts_M.cumsum(0) - counts_M)[place_BT]
    inside_BT = vector_of_token_BT - first_vector_N[picture_BT]
    return needed_M, torch.where(is_picture_BT, before_BT + inside_BT, -1)


class SeenPictures(NamedTuple):
    """What a decoder's layers are given of pictures: arguments of `Decoder.hidden`. embedded: None without the encoder."""

    embedded: EmbeddedRows | None
    seen_until_BT: Tensor | None
    rope_3BT: Tensor | None


def seen_pictures(
    config: VisionLanguageConfig,
    vision: Vision | None,
    pictures: BatchPictures,
    own_tokens: Callable[[Tensor], Tensor] | None = None,
) -> SeenPictures:
    """The pictures of a batch as a decoder sees them.

    vision: None where its encoder lies in another process, and no pixels are read. own_tokens: of values of tokens, (B, T),
    those whose embeddings are computed here, and no other pictures are encoded; None: all.
    """
    whole_BT, ends_BT = pictures.vector_of_token_BT, None
    if config.is_bidirectional:
        is_first_BT = whole_BT % config.tokens_per_tile == 0
        ends_BT = ends_of_runs(whole_BT >= 0, is_first_BT)
    if vision is None:
        return SeenPictures(None, ends_BT, pictures.rope_3BT)
    pixels, own_BT = pictures.pixels, whole_BT
    if own_tokens is not None:
        needed_M, own_BT = needed_pictures(own_tokens(whole_BT), _first_vectors(config, pixels))
        pixels = pixels.chosen(needed_M)
    vectors_MD = vision(pixels).flatten(0, 1)
    own_N = own_BT.flatten()
    rows_M = (own_N >= 0).nonzero()[:, 0]
    return SeenPictures(EmbeddedRows(rows_M, vectors_MD[own_N[rows_M]]), ends_BT, pictures.rope_3BT)


def _first_vectors(config: VisionLanguageConfig, pixels: Pixels) -> Tensor:
    """As `needed_pictures` takes them."""
    if config.vision.is_native:
        assert pixels.shapes is not None
        counts_N = pixels.shapes.prod(1) // config.vision.merge_size**2
    else:
        counts_N = torch.full((len(pixels.values),), config.tokens_per_tile)
    return functional.pad(counts_N.cumsum(0), (1, 0)).to(pixels.values.device)


class VisionDecoder(Decoder):
    """A decoder, and the encoder and projector of the pictures that it reads."""

    #: Of values of tokens, (B, T), those whose embeddings this process computes; None: all. `distributed.tensor` changes it.
    own_tokens: Callable[[Tensor], Tensor] | None = None

    def __init__(self, config: VisionLanguageConfig) -> None:
        super().__init__(config.text)
        self.vision_config = config
        self.rope_sections = config.rope_sections
        self.vision = Vision(config)

    @classmethod
    def of(cls, model: VisionLanguageModel) -> Self:
        """The same model as one module; tensors are shared."""
        decoder = cls.empty(model.config)
        weights = model.decoder.state_dict() | {f"vision.{name}": tensor for name, tensor in model.vision.state_dict().items()}
        decoder.load_state_dict(weights, assign=True)
        return decoder.eval()

    @classmethod
    def empty(cls, config: VisionLanguageConfig) -> Self:
        """One that takes no memory yet."""
        with torch.device("meta"):
            return cls(config)

    def apart(self) -> VisionLanguageModel:
        """The same model as an encoder, a projector and a decoder; tensors are shared."""
        with torch.device("meta"):
            model = VisionLanguageModel(self.vision_config)
        weights = self.state_dict()
        own = {name if name.startswith("vision.") else f"decoder.{name}": tensor for name, tensor in weights.items()}
        model.load_state_dict(own, assign=True)
        return model.eval()

    def hidden(self, tokens_BT: Tensor, *, pictures: BatchPictures | None = None, **others: Any) -> Tensor:  # type: ignore[override]
        """As `Decoder.hidden`. pictures: whose vectors take the places of their tokens' embeddings."""
        if pictures is not None:
            others |= seen_pictures(self.vision_config, self.vision, pictures, self.own_tokens)._asdict()
        return super().hidden(tokens_BT, **others)


def empty_like(model: Decoder) -> Decoder:
    """A model of the same shape that takes no memory yet."""
    return VisionDecoder.empty(model.vision_config) if isinstance(model, VisionDecoder) else empty_decoder(model.config)


def load_trained_decoder(folder: Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Decoder:
    """The decoder of a folder; with its encoder and projector, where its model reads pictures. Raises as `load_model`."""
    if not is_vision_folder(folder):
        return load_model(folder, device, dtype)
    decoder = VisionDecoder.of(load_vision_language(folder, device, dtype))
    # moves the tables of rotary positions as well
    return decoder.to(device)


def save_trained_decoder(model: Decoder, folder: Path, *, tokenizer: Path) -> None:
    """Write a model's folder, with the tokenizer and, of a model that reads pictures, their preparation from another one."""
    if isinstance(model, VisionDecoder):
        save_vision_language(model.apart(), folder, processor=tokenizer)
    else:
        save_model(model, folder, tokenizer=tokenizer)
