"""Pictures in prompts: the tokens that stand for one, and the vectors that take their places.

A chat template writes one image token for each picture. Before the model reads the prompt, that token becomes as many as the
picture has vectors, with Idefics3's and SmolVLM's marks of tiles around them: `<row_1_col_1>` for each tile, and `<global-img>`
for the whole picture. Gemma 3's token is `<start_of_image>`, which stays before a picture's; line breaks around join those of
the text, as if the whole were encoded at once.
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
from bessemer.model.vision.costs import PicturesOfStep, VisionMemory, reading_memory
from bessemer.model.vision.model import Vision
from bessemer.model.vision.native import GridSpan
from bessemer.model.vision.pictures import Picture
from bessemer.model.vision.preprocessing import Prepared, Preprocessor, read_preprocessor
from bessemer.tokenization.tokenizer import Tokenizer

# Shapes: M tokens of a picture that have vectors, D hidden.

#: What Gemma 3 writes before and behind each of its pictures.
_BREAKS = "\n\n"
_FAKE, _GLOBAL = "<fake_token_around_image>", "<global-img>"


@dataclass(frozen=True, eq=False)
class ImageSpan:
    """A picture in a prompt: the tokens from `start` up to `end`, marks of tiles included.

    places: the tokens among them that have vectors, as places in the prompt, in rising order. digest: of the prepared pixels;
    with the tokens, all that the vectors depend on in one model. is_bidirectional: whether the tokens of `places` that follow
    each other without a gap see each other. grid: where the tokens have positions of three numbers.
    """

    start: int
    end: int
    places: Sequence[int] = field(repr=False)
    digest: bytes
    prepared: Prepared = field(repr=False)
    is_bidirectional: bool = False
    grid: GridSpan | None = None


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
        if config.vision.is_native:
            cut = (preprocessor.patch_size, preprocessor.merge_size, preprocessor.temporal_patch_size)
            taken = (config.vision.patch_size, config.vision.merge_size, config.vision.temporal_patch_size)
            if preprocessor.method != "native" or cut != taken:
                raise ArtefactError(f"{tokenizer.folder}: pictures are prepared as {cut}, and the encoder takes {taken}")
            return
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
        """The token whose embedding a vector takes the place of."""
        return self.vision.config.image_token_id

    @property
    def placeholder_id(self) -> int:
        """The token that a chat template writes for a picture."""
        around = self.config.around
        return self.image_token_id if around is None else around[0]

    @property
    def memory(self) -> VisionMemory:
        """What the encoder takes, and the largest picture while it is read."""
        return reading_memory(self.config, self.largest, next(self.vision.parameters()).dtype.itemsize)

    @property
    def largest(self) -> PicturesOfStep:
        """The most patches and vectors of a picture; those of one that is 16 tiles wide, where tiles are not limited."""
        config, preprocessor = self.config, self.preprocessor
        if config.vision.is_native:
            pixels = (config.vision.patch_size * config.vision.merge_size) ** 2
            return PicturesOfStep.of_tiles(config, preprocessor.max_pixels // pixels)
        tiles = 1
        if preprocessor.pan_and_scan is not None:
            tiles += preprocessor.pan_and_scan.most_crops
        elif preprocessor.method == "tiles" and preprocessor.splits:
            side = preprocessor.max_image_size
            longest = preprocessor.size if isinstance(preprocessor.size, int) else 16 * side
            across = -(-longest // side)
            # as many as across, and the whole, made small
            tiles = across**2 + 1 if across > 1 else 1
        return PicturesOfStep.of_tiles(config, tiles)

    @property
    def least_chunk(self) -> int:
        """Most tokens of a prompt that are computed together, because they see each other; 1 in most models."""
        return self.config.tokens_per_tile if self.config.is_bidirectional else 1

    def expand(self, ids: Sequence[int], pictures: Sequence[Picture | Prepared]) -> ImagePrompt:
        """The prompt with a picture in place of each image token. Raises RequestError where there are more or fewer."""
        return self.expand_traced(ids, pictures)[0]

    def expand_traced(self, ids: Sequence[int], pictures: Sequence[Picture | Prepared]) -> tuple[ImagePrompt, list[int]]:
        """As `expand`, and of each token its place among `ids`; -1 for those of pictures, and of texts encoded anew."""
        image, placeholder = self.image_token_id, self.placeholder_id
        count = sum(id == placeholder for id in ids)
        if count != len(pictures):
            raise RequestError(f"the prompt has places for {count} pictures, and {len(pictures)} are given")
        prepared = [one if isinstance(one, Prepared) else self.preprocessor.prepare(one) for one in pictures]
        if self.config.around is not None:
            return self._with_texts(ids, prepared)
        expanded: list[int] = []
        origins: list[int] = []
        spans: list[ImageSpan] = []
        waiting = iter(prepared)
        for origin, id in enumerate(ids):
            if id != placeholder:
                expanded.append(id)
                origins.append(origin)
                continue
            one = next(waiting)
            tokens, start = self.tokens(one), len(expanded)
            expanded += tokens
            origins += [-1] * len(tokens)
            places = [start + place for place, token in enumerate(tokens) if token == image]
            grid = GridSpan(start, one.rows, one.columns) if self.config.vision.is_native else None
            spans.append(ImageSpan(start, len(expanded), places, one.digest, one, grid=grid))
        return ImagePrompt(expanded, tuple(spans)), origins

    def tokens(self, prepared: Prepared) -> list[int]:
        """The tokens of a picture. Raises RequestError for more tiles than the model has marks for."""
        if self.config.vision.is_native:
            return [self.image_token_id] * (prepared.rows * prepared.columns)
        tile = [self.image_token_id] * self.config.tokens_per_tile
        if self.config.around is not None:
            first, *_, last = (self._tokenizer.encode(text, add_bos=False) for text in self._texts(prepared))
            return [*first, *self._marked(prepared), *last]
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
        place = next(self.vision.parameters())
        vectors_NMD: Tensor = self.vision(pixels._replace(values=pixels.values.to(place.device, place.dtype)))
        return vectors_NMD.flatten(0, 1)

    def _texts(self, prepared: Prepared) -> list[str]:
        """What Gemma 3's processor writes before, between and behind the whole picture and its crops."""
        crops = len(prepared.tiles) - 1
        if not crops:
            return [_BREAKS, _BREAKS]
        first = [f"Here is the original image {_BREAKS}", f"{_BREAKS} and here are some crops to help you see better {_BREAKS}"]
        return [*first, *[f"{_BREAKS} {_BREAKS}"] * (crops - 1), _BREAKS]

    def _marked(self, prepared: Prepared) -> list[int]:
        """The tokens of Gemma 3's pictures, from the first mark to the last."""
        assert self.config.around is not None
        begin, end = self.config.around
        marked = [begin, *[self.image_token_id] * self.config.tokens_per_tile, end]
        ids = [*marked]
        for text in self._texts(prepared)[1:-1]:
            ids += [*self._tokenizer.encode(text, add_bos=False), *marked]
        return ids

    def _with_texts(self, ids: Sequence[int], pictures: Sequence[Prepared]) -> tuple[ImagePrompt, list[int]]:
        """A prompt of Gemma 3's form: the text around a picture is encoded as one with what its processor writes there."""
        expanded: list[int] = []
        origins: list[int] = []
        spans: list[ImageSpan] = []
        waiting = iter(pictures)
        # the text that is not ended yet, and what the picture before it has written
        text: list[int] = []
        lead = ""
        # an end closes the last text
        for origin, id in enumerate([*ids, None]):
            if id is not None and id != self.placeholder_id and not self._tokenizer.is_special(id):
                text.append(id)
                continue
            prepared = next(waiting) if id == self.placeholder_id else None
            texts = ["", ""] if prepared is None else self._texts(prepared)
            joined = self._joined(lead, text, texts[0])
            expanded += joined
            origins += range(origin - len(text), origin) if joined == text else [-1] * len(joined)
            lead, text, start = texts[-1], [], len(expanded)
            if prepared is not None:
                expanded += self._marked(prepared)
                places = [place for place in range(start, len(expanded)) if expanded[place] == self.image_token_id]
                spans.append(ImageSpan(start, len(expanded), places, prepared.digest, prepared, self.config.is_bidirectional))
                origins += [-1] * (len(expanded) - start)
            elif id is not None:
                expanded.append(id)
                origins.append(origin)
        return ImagePrompt(expanded, tuple(spans)), origins

    def _joined(self, before: str, ids: list[int], behind: str) -> list[int]:
        """A text between two others, encoded as one; each by itself where its ids are not those of its encoding."""
        if not before and not behind:
            return ids
        text = self._tokenizer.decode(ids)
        if self._tokenizer.encode(text, add_bos=False) == ids:
            return self._tokenizer.encode(before + text + behind, add_bos=False)
        return [*self._tokenizer.encode(before, add_bos=False), *ids, *self._tokenizer.encode(behind, add_bos=False)]

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
