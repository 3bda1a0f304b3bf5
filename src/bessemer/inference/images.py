"""Pictures in requests: a prompt with pictures, and the vectors of a request's pictures, chunk by chunk.

A picture is encoded once, when the first chunk of the prompt is computed that holds a token of it; one that the prefix cache
holds is never encoded. Its vectors stay with the request, whose prompt may be computed again after a preemption.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from bessemer.core.errors import RequestError
from bessemer.inference.scheduling.sequence import ImageMark, ScheduledChunk
from bessemer.model.vision.native import rope_positions
from bessemer.model.vision.pictures import Picture, read_picture
from bessemer.model.vision.preprocessing import Prepared
from bessemer.model.vision.prompts import ImageSpan
from bessemer.tokenization.chat import Message, Tool
from bessemer.tokenization.tokenizer import Tokenizer

# Shapes: M rows with vectors, D hidden.


@dataclass(frozen=True, eq=False)
class PicturePrompt:
    """A text or token ids with an image token for each of the pictures, in their order."""

    prompt: str | Sequence[int]
    pictures: Sequence[Picture | Prepared]


def chat_prompt(
    tokenizer: Tokenizer, messages: Sequence[Message], tools: Sequence[Tool] | None = None
) -> list[int] | PicturePrompt:
    """A conversation up to where the assistant speaks, with the pictures in it.

    A content is a text, or parts: `{"type": "text", "text": …}` and `{"type": "image", "image": …}` with a `Picture`, a path or
    the bytes of a file. Raises RequestError for a malformed message, picture or tool.
    """
    pictures: list[Picture] = []
    # what is no list of messages is refused by the template
    is_list = isinstance(messages, list | tuple)
    plain = [_without_pictures(message, pictures) for message in messages] if is_list else messages
    ids = tokenizer.apply_chat_template(plain, add_generation_prompt=True, tools=tools)
    return PicturePrompt(ids, pictures) if pictures else ids


def _without_pictures(message: Message, pictures: list[Picture]) -> Message:
    """The message with its pictures taken out of their parts, and added to the others'."""
    content = message.get("content") if isinstance(message, Mapping) else None
    if not isinstance(content, list | tuple):
        return message
    parts = []
    for part in content:
        if isinstance(part, Mapping) and part.get("type") == "image":
            given, name = part.get("image"), f"picture {len(pictures) + 1}"
            if isinstance(given, str | Path):
                given = read_picture(Path(given), name)
            elif isinstance(given, bytes):
                given = read_picture(given, name)
            if not isinstance(given, Picture):
                raise RequestError(f"{name}: a path, the bytes of a file or a Picture is needed, got {type(given).__name__}")
            pictures.append(given)
            part = {"type": "image"}
        parts.append(part)
    return {**message, "content": parts}


class GivenRows(NamedTuple):
    """Rows of a batch that are vectors and not tokens: their places, in rising order, and the vectors, (M, D).

    is_bidirectional: whether rows that follow each other without a gap see each other.
    """

    rows: list[int]
    vectors_MD: Tensor
    is_bidirectional: bool = False

    def within(self, start: int, end: int, moved: int = 0) -> GivenRows:
        """Those of the rows start : end, moved by so many."""
        first, last = bisect_left(self.rows, start), bisect_left(self.rows, end)
        return GivenRows([row + moved for row in self.rows[first:last]], self.vectors_MD[first:last], self.is_bidirectional)

    def runs(self) -> Iterator[tuple[int, int]]:
        """The first and the last row of each run without a gap."""
        first = 0
        for index, row in enumerate(self.rows):
            if index + 1 == len(self.rows) or self.rows[index + 1] != row + 1:
                yield self.rows[first], row
                first = index + 1


class RequestImages:
    """The pictures of a request, and of its siblings."""

    def __init__(self, spans: Sequence[ImageSpan], encode: Callable[[Prepared], Tensor]) -> None:
        """encode: gives the vectors of a picture's tokens, (M, D)."""
        self._spans = spans
        self._encode = encode
        self._vectors: list[Tensor | None] = [None] * len(spans)
        self._grids = [span.grid for span in spans if span.grid is not None]

    @property
    def marks(self) -> tuple[ImageMark, ...]:
        """What the prefix cache distinguishes them by."""
        return tuple(ImageMark(span.start, span.end, span.digest, _runs(span)) for span in self._spans)

    @property
    def turns(self) -> bool:
        """Whether tokens are turned by positions of three numbers, behind the pictures too."""
        return bool(self._grids)

    def turn_of(self, place: int) -> tuple[int, int, int]:
        """The position by which the token at a place is turned."""
        return next(rope_positions(self._grids, place, 1))

    def rope_of_chunk(self, chunk: ScheduledChunk) -> dict[int, tuple[int, int, int]]:
        """The positions of a chunk's tokens by which they are turned, where these are not their places; tokens are counted from
        the chunk's first."""
        if not self._grids:
            return {}
        positions = rope_positions(self._grids, chunk.start, chunk.count)
        return {row: turn for row, turn in enumerate(positions) if turn != (chunk.start + row,) * 3}

    @property
    def encoded(self) -> int:
        """Pictures whose vectors were computed."""
        return sum(vectors is not None for vectors in self._vectors)

    def of_chunk(self, chunk: ScheduledChunk) -> list[GivenRows]:
        """The vectors of a chunk's tokens; places are counted from the chunk's first token."""
        start, end = chunk.start, chunk.start + chunk.count
        given = []
        for index, span in enumerate(self._spans):
            first, last = bisect_left(span.places, start), bisect_left(span.places, end)
            if first < last:
                vectors_MD = self._vectors[index]
                if vectors_MD is None:
                    vectors_MD = self._vectors[index] = self._encode(span.prepared)
                rows = [place - start for place in span.places[first:last]]
                given.append(GivenRows(rows, vectors_MD[first:last], span.is_bidirectional))
        return given


def _runs(span: ImageSpan) -> tuple[tuple[int, int], ...]:
    """The tokens first : end of a picture that no chunk may cut: those that see each other."""
    if not span.is_bidirectional:
        return ()
    runs = GivenRows(list(span.places), Tensor()).runs()
    return tuple((first, last + 1) for first, last in runs)
