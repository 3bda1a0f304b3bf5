"""Where a picture's tokens lie in it: which part of the picture each token of a prompt comes from."""

from __future__ import annotations

from typing import NamedTuple

from bessemer.model.vision.config import VisionLanguageConfig
from bessemer.model.vision.preprocessing import Box
from bessemer.model.vision.prompts import ImageSpan


class TilePlace(NamedTuple):
    """A part that the encoder read at once, and its tokens, which lie in it row by row.

    row, column: of a tile among those that the picture was cut into; None: the whole picture. box: what its tokens are of, in
    shares of the picture's width and height. token_rows, token_columns: how many tokens lie below and beside each other. first:
    place of its first token in the prompt.
    """

    row: int | None
    column: int | None
    box: Box
    token_rows: int
    token_columns: int
    first: int


def tile_places(span: ImageSpan, config: VisionLanguageConfig) -> list[TilePlace]:
    """The squares of a picture in a prompt, in the order of their tokens: the tiles row by row, then the whole picture; of
    Gemma 3 this first. A picture that is read in a shape of its own (Qwen2.5-VL) is one of that shape."""
    prepared, vision = span.prepared, config.vision
    if vision.is_native:
        # resized and never cut: the tokens are of the whole
        return [TilePlace(None, None, prepared.box, prepared.rows, prepared.columns, span.places[0])]
    grid = config.pooled_side or vision.grid // max(1, config.scale_factor)
    # the last pixels that fill no patch are not read
    covered = vision.grid * vision.patch_size / vision.image_size
    # of LLaVA with the token that stands before the patches
    before_patches = config.tokens_per_tile - grid**2
    cuts: list[tuple[int | None, int | None]] = [
        (row, column) for row in range(prepared.rows) for column in range(prepared.columns)
    ]
    places = []
    for number, (row, column) in enumerate([(None, None), *cuts] if config.pooled_side else [*cuts, (None, None)]):
        first = span.places[number * config.tokens_per_tile + before_patches]
        if row is None or column is None:
            left, top, right, bottom = prepared.box
        else:
            left, right = column / prepared.columns, (column + 1) / prepared.columns
            top, bottom = row / prepared.rows, (row + 1) / prepared.rows
        box = (left, top, left + covered * (right - left), top + covered * (bottom - top))
        places.append(TilePlace(row, column, box, grid, grid, first))
    return places
