"""A decoder with what it sees pictures with, as one module: what training reads, updates and writes back.

The encoder and the projector lie in the decoder as `vision`, so that every method that trains a decoder trains them too: their
parameters are `vision.encoder.…` and `vision.projector.…`, and settings freeze them, or all others, by these names.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

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
    for a token that is no picture's.
    """

    pixels: Pixels
    vector_of_token_BT: Tensor


class VisionDecoder(Decoder):
    """A decoder, and the encoder and projector of the pictures that it reads."""

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
            vectors_MD = self.vision(pictures.pixels).flatten(0, 1)
            vector_of_token_N = pictures.vector_of_token_BT.flatten()
            rows_M = (vector_of_token_N >= 0).nonzero()[:, 0]
            others["embedded"] = EmbeddedRows(rows_M, vectors_MD[vector_of_token_N[rows_M]])
            if self.vision_config.is_bidirectional:
                is_first_BT = pictures.vector_of_token_BT % self.vision_config.tokens_per_tile == 0
                others["seen_until_BT"] = ends_of_runs(pictures.vector_of_token_BT >= 0, is_first_BT)
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
