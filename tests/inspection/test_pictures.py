"""Which part of a picture a token comes from: a bright spot lies in the cell that the encoder's pixels say."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bessemer.inspection.pictures import tile_places
from bessemer.model.vision.folder import load_vision_language
from bessemer.model.vision.pictures import Picture
from bessemer.model.vision.preprocessing import preprocessor_of
from bessemer.model.vision.prompts import open_picture_reader
from bessemer.tokenization.tokenizer import load_tokenizer
from tests.model.picture_files import drawn, write_gemma3_model, write_qwen_model

SIDE, PATCH = 24, 4
SQUARE = {"height": SIDE, "width": SIDE}
KINDS = {
    "stretched": {"image_processor_type": "SiglipImageProcessor", "size": SQUARE},
    "cropped": {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": SIDE}, "crop_size": SQUARE},
    "padded": {"image_processor_type": "LlavaImageProcessor", "size": SQUARE, "do_center_crop": False, "do_pad": True},
    "tiles": {
        "image_processor_type": "Idefics3ImageProcessor",
        "size": {"longest_edge": 72},
        "max_image_size": {"longest_edge": SIDE},
    },
    "small": {
        "image_processor_type": "Idefics3ImageProcessor",
        "size": {"longest_edge": 24},
        "max_image_size": {"longest_edge": SIDE},
    },
}


def places_of(prepared, factor=2, class_token=False):
    grid = SIDE // PATCH
    vision = SimpleNamespace(grid=grid, patch_size=PATCH, image_size=SIDE, is_native=False)
    tokens = (grid // factor) ** 2 + class_token
    scale = 0 if factor == 1 else factor
    config = SimpleNamespace(vision=vision, scale_factor=scale, pooled_side=0, tokens_per_tile=tokens)
    # the tokens of a tile follow one another, with marks between tiles
    places = [5 + tile * (tokens + 3) + token for tile in range(len(prepared.tiles)) for token in range(tokens)]
    return tile_places(SimpleNamespace(prepared=prepared, places=places), config), tokens


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("width", "height"), [(96, 48), (50, 90)])
def test_a_bright_spot_lies_in_the_box_of_its_token(kind, width, height):
    x, y = round(0.42 * width), round(0.6 * height)
    rgb = np.zeros((height, width, 3), np.uint8)
    rgb[y - 4 : y + 4, x - 4 : x + 4] = 255
    prepared = preprocessor_of({"resample": 2, **KINDS[kind]}).prepare(Picture.of(rgb))
    tiles, _ = places_of(prepared)
    brightness = prepared.tiles.mean(-1)
    assert len(tiles) == len(brightness) and tiles[-1].row is None
    for number, tile in enumerate(tiles):
        if brightness[number].max() < 150 or (tile.row is not None and brightness[number].max() < brightness[:-1].max()):
            continue
        # the middle of the spot in the tile, and there in the picture
        rows, columns = np.nonzero(brightness[number] > 0.8 * brightness[number].max())
        left, top, right, bottom = tile.box
        across = left + (columns.mean() + 0.5) / SIDE * (right - left)
        down = top + (rows.mean() + 0.5) / SIDE * (bottom - top)
        cell = max((right - left), (bottom - top)) / tile.token_rows
        assert abs(across - x / width) < 0.5 * cell and abs(down - y / height) < 0.5 * cell


def test_tokens_are_counted_over_marks_and_a_token_before_the_patches():
    prepared = preprocessor_of(KINDS["tiles"]).prepare(Picture.of(np.zeros((48, 72, 3), np.uint8)))
    tiles, tokens = places_of(prepared)
    assert [(tile.row, tile.column) for tile in tiles] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (None, None)]
    assert [tile.first for tile in tiles] == [5 + number * (tokens + 3) for number in range(7)] and (
        tiles[0].token_rows,
        tiles[0].token_columns,
    ) == (3, 3)
    assert tiles[4].box == pytest.approx((1 / 3, 1 / 2, 2 / 3, 1))
    cropped = preprocessor_of(KINDS["cropped"]).prepare(Picture.of(np.zeros((48, 72, 3), np.uint8)))
    (only,), _ = places_of(cropped, 1, class_token=True)
    # the middle square of a picture of three to two
    assert only.first == 6 and only.token_columns == 6 and only.box == pytest.approx((1 / 6, 0, 5 / 6, 1), abs=0.02)


def test_gemma3s_whole_picture_is_first_and_its_squares_are_means(tmp_path):
    write_gemma3_model(tmp_path, do_pan_and_scan=True, pan_and_scan_min_crop_size=8)
    reader = open_picture_reader(load_vision_language(tmp_path).vision, tmp_path, load_tokenizer(tmp_path))
    (span,) = reader.expand([3, reader.placeholder_id], [Picture.of(np.asarray(drawn(60, 30)))]).spans
    tiles = tile_places(span, reader.config)
    assert [(tile.row, tile.column, tile.token_rows) for tile in tiles] == [(None, None, 4), (0, 0, 4), (0, 1, 4)]
    assert [tile.box for tile in tiles] == [(0, 0, 1, 1), (0, 0, 0.5, 1), (0.5, 0, 1, 1)]
    assert [tile.first for tile in tiles] == [span.places[index] for index in (0, 16, 32)]


def test_a_picture_in_its_own_shape_is_one_grid_of_that_shape(tmp_path):
    """Qwen2.5-VL's: without attention among patches, what changes is the vector of the cell that is lit."""
    vision = write_qwen_model(tmp_path).vision
    for block in vision.encoder.blocks:
        torch.nn.init.zeros_(block.attn.proj.weight)
    reader = open_picture_reader(vision, tmp_path, load_tokenizer(tmp_path))
    dark = np.zeros((40, 64, 3), np.uint8)
    (span,) = reader.expand([3, reader.placeholder_id], [Picture.of(dark)]).spans
    (whole,) = tile_places(span, reader.config)
    assert whole == (None, None, (0, 0, 1, 1), 5, 8, 1)
    before_MD = reader.vectors(span.prepared)
    for row, column in ((0, 0), (1, 6), (4, 3)):
        lit = dark.copy()
        lit[8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = (200, 30, 90)
        (span,) = reader.expand([3, reader.placeholder_id], [Picture.of(lit)]).spans
        changed_M = (reader.vectors(span.prepared) != before_MD).any(-1)
        assert changed_M.nonzero().flatten().tolist() == [row * whole.token_columns + column]
