"""Pictures in prompts: the tokens that stand for one, and the vectors that take their places.

A chat template writes one image token for each picture. Before the model reads the prompt, that token becomes as many as the
picture has vectors, with Idefics3's and SmolVLM's marks of tiles around them: `<row_1_col_1>` for each tile, and `<global-img>`
for the whole picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from bessemer.core.errors import ArtefactError, RequestError
from bessemer.model.vision.config import VisionLanguageConfig
from bessemer.model.vision.model import Vision
from bessemer.model.vision.pictures import Picture
from bessemer.model.vision.preprocessing import Prepared, Preprocessor, read_preprocessor
from bessemer.tokenization.tokenizer import Tokenizer

# Shapes: M tokens of a picture that have vectors, D hidden.

_FAKE, _GLOBAL = "<fake_token_around_image>", "<global-img>"


@dataclass(frozen=True, eq=False)
class ImageSpan:
    """A picture in a prompt: the tokens from `start` up to `end`, marks of tiles included.

    places: the tokens among them that have vectors, as places in the prompt, in rising order. digest: of the prepared pixels;
    with the tokens, all that the vectors depend on in one model.
    """

    start: int
    end: int
    places: Sequence[int] = field(repr=False)
    digest: bytes
    prepared: Prepared = field(repr=False)


class ImagePrompt(NamedTuple):
    """A prompt whose image tokens have become as many as its pictures have vectors."""

    ids: list[int]
    spans: tuple[ImageSpan, ...]


class PictureReader:
    """Prepares pictures for one model: their tokens, and their vectors. Any thread may use it."""

    def __init__(self, vision: Vision, preprocessor: Preprocessor, tokenizer: Tokenizer) -> None:
        """Raises ArtefactError where the preprocessing gives other pictures than the encoder takes, and for a tokenizer
        without the marks of tiles."""
        self.vision = vision
        self.preprocessor = preprocessor
        self._tokenizer = tokenizer
        config = vision.config
        side = config.vision.image_size
        given = preprocessor.max_image_size if preprocessor.method == "tiles" else preprocessor.crop_size or preprocessor.size
        if given not in (side, (side, side)) or (preprocessor.method == "tiles") != bool(config.scale_factor):
            raise ArtefactError(
                f"{tokenizer.folder}: pictures are prepared with {given} pixels a side, and the encoder takes squares of {side}"
            )
        if config.scale_factor and tokenizer.control_id(_FAKE) is None:
            raise ArtefactError(f"{tokenizer.folder}: the tokenizer lacks {_FAKE}, which stands around each picture")

    @property
    def config(self) -> VisionLanguageConfig:
        """The model's settings."""
        return self.vision.config

    @property
    def image_token_id(self) -> int:
        """The token that stands for a picture in a prompt."""
        return self.vision.config.image_token_id

    def expand(self, ids: Sequence[int], pictures: Sequence[Picture | Prepared]) -> ImagePrompt:
        """The prompt with a picture in place of each image token. Raises RequestError where there are more or fewer."""
        image, count = self.image_token_id, sum(id == self.image_token_id for id in ids)
        if count != len(pictures):
            raise RequestError(f"the prompt has places for {count} pictures, and {len(pictures)} are given")
        expanded: list[int] = []
        spans: list[ImageSpan] = []
        waiting = iter(pictures)
        for id in ids:
            if id != image:
                expanded.append(id)
                continue
            given = next(waiting)
            prepared = given if isinstance(given, Prepared) else self.preprocessor.prepare(given)
            tokens, start = self.tokens(prepared), len(expanded)
            expanded += tokens
            places = [start + place for place, token in enumerate(tokens) if token == image]
            spans.append(ImageSpan(start, len(expanded), places, prepared.digest, prepared))
        return ImagePrompt(expanded, tuple(spans))

    def tokens(self, prepared: Prepared) -> list[int]:
        """The tokens of a picture. Raises RequestError for more tiles than the model has marks for."""
        tile = [self.image_token_id] * self.config.tokens_per_tile
        if not self.config.scale_factor:
            return tile
        fake, whole = self._mark(_FAKE), self._mark(_GLOBAL)
        ids: list[int] = []
        for row in range(prepared.rows):
            for column in range(prepared.columns):
                ids += [*fake, *self._mark(f"<row_{row + 1}_col_{column + 1}>"), *tile]
            # the last line ends in an empty one, which tokenizers know as one token
            ids += self._new_lines[row == prepared.rows - 1]
        return [*ids, *fake, *whole, *tile, *fake]

    @torch.inference_mode()
    def vectors(self, prepared: Prepared) -> Tensor:
        """The vectors of a picture's image tokens, (M, D), in the type of the encoder's weights."""
        pixels = self.preprocessor.pixels(prepared)
        place = self.vision.encoder.post_layernorm.weight
        vectors_NMD: Tensor = self.vision(pixels._replace(values=pixels.values.to(place.device, place.dtype)))
        return vectors_NMD.flatten(0, 1)

    @cached_property
    def _new_lines(self) -> tuple[list[int], list[int]]:
        return self._tokenizer.encode("\n", add_bos=False), self._tokenizer.encode("\n\n", add_bos=False)

    def _mark(self, text: str) -> list[int]:
        """The ids of a mark: a token of its own, or pieces of text where the tokenizer has none."""
        id = self._tokenizer.control_id(text)
        return self._tokenizer.encode(text, add_bos=False) if id is None else [id]


def open_picture_reader(vision: Vision, folder: Path, tokenizer: Tokenizer) -> PictureReader:
    """The reader of a folder's model. Raises ArtefactError as `PictureReader` and `read_preprocessor`."""
    return PictureReader(vision, read_preprocessor(folder), tokenizer)
