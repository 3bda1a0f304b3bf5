"""Conversations with pictures as examples: each picture's tokens in its place, and its prepared pixels in the run's file.

In an example a token of a picture is written as −1 − n, for the n-th vector of all pictures, so that examples are cut and
packed as those of text; `placed` then writes the model's image token, and keeps n beside it.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from bessemer.core.errors import RequestError
from bessemer.model.vision.folder import is_vision_folder, read_vision_language
from bessemer.model.vision.model import Vision
from bessemer.model.vision.pictures import Picture, read_picture
from bessemer.model.vision.preprocessing import Prepared
from bessemer.model.vision.prompts import PictureReader, open_picture_reader
from bessemer.posttraining.data.encoding import Encoded, encode_answer
from bessemer.posttraining.data.formats import Answered, Message
from bessemer.posttraining.data.picture_rows import has_pictures, sources_in
from bessemer.posttraining.data.turns import RowError
from bessemer.tasks.picture_files import StoredPicture
from bessemer.tokenization.tokenizer import Tokenizer
from bessemer.training.data.batch import Batch
from bessemer.training.data.pictures import PictureFile

#: The pixels of a run's pictures, in its folder until it is finished.
PICTURES = "pictures.bin"
#: Why a row is left out that shows pictures to a model of texts.
READS_NONE = "has pictures, and this model reads none"


@dataclass(frozen=True, eq=False)
class PromptPictures:
    """A prompt with its pictures, as tokens: for an engine, and for batches of what the engine sampled.

    asked: as the chat template writes it, with one image token for each picture. ids: with as many as it has vectors. vectors:
    of each of `ids` the number of its vector, as in `PictureTable`; -1 for text. encoder: None in a copy from another process,
    whose pixels lie there.
    """

    asked: list[int]
    ids: list[int]
    vectors: np.ndarray
    encoder: PictureEncoder | None
    _shown: tuple[Prepared, ...]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "encoder": None}

    @property
    def pictures(self) -> list[Prepared]:
        """The prepared pictures, whose tiles lie in the run's file."""
        assert self.encoder is not None, "prompts are sampled where they were read"
        return [replace(one, tiles=self.encoder.file.tiles_of(one.digest)) for one in self._shown]


@dataclass(frozen=True, eq=False)
class PictureEncoder:
    """Writes pictures into examples. file: takes their pixels."""

    reader: PictureReader
    file: PictureFile

    def expanded(self, messages: Sequence[Message], folder: Path | None, examples: Sequence[Encoded]) -> list[Encoded]:
        """The examples of a conversation with its pictures' tokens in the places of their image tokens. folder: where the
        paths of pictures begin.

        An example begins as the conversation does, and so with its first pictures. Raises RowError for a picture that cannot be
        read.
        """
        return self._expanded(messages, folder, examples)[0]

    def of_prompt(self, messages: Sequence[Message], folder: Path | None, asked: list[int]) -> PromptPictures:
        """A prompt's pictures. folder: where their paths begin. asked: its tokens, as the chat template writes it. Raises
        RowError as `expanded`."""
        unlearnt = Encoded(np.array(asked, np.int64), np.zeros(len(asked), bool))
        (seen,), shown = self._expanded(messages, folder, [unlearnt])
        is_picture = seen.ids < 0
        ids = np.where(is_picture, self.reader.image_token_id, seen.ids)
        vectors = np.where(is_picture, -1 - seen.ids, -1)
        # the pixels are read from the file
        return PromptPictures(asked, ids.tolist(), vectors, self, tuple(replace(one, tiles=one.tiles[:0]) for one in shown))

    def _expanded(
        self, messages: Sequence[Message], folder: Path | None, examples: Sequence[Encoded]
    ) -> tuple[list[Encoded], list[Prepared]]:
        """As `expanded`, and the prepared pictures."""
        try:
            pictures = [prepared_picture(self.reader, source, folder) for source in sources_in(messages)]
            for prepared in pictures:
                self.file.add(prepared)
            return [self._one(example, pictures) for example in examples], pictures
        except (RequestError, ValueError) as error:
            raise RowError(str(error)) from None

    def _one(self, example: Encoded, pictures: Sequence[Prepared]) -> Encoded:
        count = int((example.ids == self.reader.placeholder_id).sum())
        if count > len(pictures):
            raise RowError(f"the chat template has places for {count} pictures, and {len(pictures)} are given")
        prompt, origins = self.reader.expand_traced(example.ids.tolist(), pictures[:count])
        ids, origin = np.array(prompt.ids, np.int64), np.array(origins, np.int64)
        for span in prompt.spans:
            places = np.array(span.places, np.int64)
            ids[places] = -1 - self.file.add(span.prepared) - np.arange(len(places))
        return Encoded(ids, np.where(origin < 0, False, example.is_learnt[origin]))

    def placed(self, batch: Batch) -> Batch:
        """A packed batch with image tokens in the places of pictures, and which vector each is; as it is where no picture was
        read."""
        if self.file.is_empty:
            return batch
        is_picture_BT, table = batch.tokens_BT < 0, self.file.table()
        readable = replace(batch, tokens_BT=batch.tokens_BT.masked_fill(is_picture_BT, self.reader.image_token_id))
        return readable.showing(table, torch.where(is_picture_BT, -1 - batch.tokens_BT, -1))


def encode_seen(answered: Answered, tokenizer: Tokenizer, folder: Path | None, pictures: PictureEncoder | None) -> Encoded:
    """`encode_answer` of a prompt and an answer, with the tokens of their pictures. folder, pictures: as in `PictureEncoder`;
    None: the model reads none, and RowError is raised where there are some."""
    prompt, answer = answered.prompt, answered.answer
    encoded = encode_answer(prompt, answer, tokenizer, answered.tools, pictures=True)
    if isinstance(prompt, str) or isinstance(answer, str) or not has_pictures(messages := (*prompt, *answer)):
        return encoded
    if pictures is None:
        raise RowError(READS_NONE)
    (seen,) = pictures.expanded(messages, folder, [encoded])
    return seen


def prepared_picture(reader: PictureReader, source: str, folder: Path | None) -> Prepared:
    """A picture of a row, prepared for a model. folder: where relative paths begin. Raises RequestError."""
    return reader.preprocessor.prepare(picture_of(source, folder))


def picture_of(source: str, folder: Path | None) -> Picture:
    """The picture of a path, a `data:` URI or a `StoredPicture`. folder: where relative paths begin. Raises RequestError."""
    if isinstance(source, StoredPicture):
        return read_picture(source.read(), f"{source.place}: its picture")
    if not source.startswith("data:"):
        return read_picture((folder or Path()) / source, "its picture")
    head, _, data = source.partition(",")
    if not head.endswith(";base64"):
        raise RequestError("its picture: a data: URI is needed that holds base64")
    try:
        return read_picture(base64.b64decode(data, validate=True), "its picture")
    except (binascii.Error, ValueError):
        raise RequestError("its picture: the data is not base64") from None


def open_picture_encoder(model: Path, tokenizer: Tokenizer, file: Path) -> PictureEncoder | None:
    """What writes pictures into the examples of a folder's model; None where it reads none. file: for their pixels. Raises
    ArtefactError as `open_picture_reader`."""
    if not is_vision_folder(model):
        return None
    config = read_vision_language(model)
    # the settings alone are read, not the weights
    with torch.device("meta"):
        vision = Vision(config)
    reader = open_picture_reader(vision, model, tokenizer)
    count = 0 if config.vision.is_native else config.tokens_per_tile
    return PictureEncoder(reader, PictureFile(own_file(file), reader.preprocessor, count))


def own_file(file: Path) -> Path:
    """The file, or of several processes one for each: each maps what it has written itself."""
    rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
    return file if rank == 0 else file.with_name(f"{file.stem}-{rank}{file.suffix}")
