"""Qwen2.5-VL's pictures in their own shapes, beside `transformers` on a tiny random model."""

import json

import numpy as np
import pytest
import torch
import transformers
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from bessemer.core.errors import ArtefactError
from bessemer.model.layers.cache import DecoderCache
from bessemer.model.layers.embedding import EmbeddedRows
from bessemer.model.vision.encoder import Pixels
from bessemer.model.vision.folder import load_vision_language, read_vision_language, save_vision_language
from bessemer.model.vision.native import GridSpan, rope_positions
from bessemer.model.vision.pictures import Picture
from bessemer.model.vision.preprocessing import read_preprocessor
from bessemer.model.vision.prompts import open_picture_reader
from bessemer.tokenization.tokenizer import load_tokenizer
from tests.model.picture_files import NATIVE, drawn, write_qwen_model

TOLERANCE = 1e-4
#: Rows and columns of patches: more than a window along both sides, and less.
GRIDS = [(6, 10), (4, 2)]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Our model, and `transformers`' of the folder that we wrote."""
    folder = tmp_path_factory.mktemp("qwen")
    ours = write_qwen_model(folder)
    theirs, loading = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    return theirs.eval(), load_vision_language(folder), folder, ours


def pixels(grids=GRIDS, seed=1):
    count = sum(rows * columns for rows, columns in grids)
    values = torch.randn(count, 3 * 2 * 16, generator=torch.Generator().manual_seed(seed))
    return Pixels(values, shapes=torch.tensor(grids))


def text(image, grids=GRIDS):
    row = [7, 8]
    for rows, columns in grids:
        row += [9, *[image] * (rows * columns // 4), 10, 11]
    return torch.tensor([[*row, 12, 13]])


def their_logits(theirs, tokens, given):
    grid = torch.tensor([[1, *shape] for shape in given.shapes.tolist()])
    types = (tokens == theirs.config.image_token_id).int()
    return theirs(tokens, pixel_values=given.values, image_grid_thw=grid, mm_token_type_ids=types).logits


@torch.no_grad()
def test_logits_and_positions_equal_those_of_transformers(pair):
    theirs, ours, _, _ = pair
    tokens, given = text(ours.config.image_token_id), pixels()
    expected = their_logits(theirs, tokens, given)
    assert expected.std() > 0.2
    assert (ours(tokens, given) - expected).abs().max() < TOLERANCE
    grid = torch.tensor([[1, *shape] for shape in GRIDS])
    types = (tokens == ours.config.image_token_id).int()
    positions, _ = theirs.model.get_rope_index(tokens, mm_token_type_ids=types, image_grid_thw=grid)
    assert torch.equal(ours.rope_positions(tokens, given), positions)
    # places as positions give something else, and text alone is a Qwen2's
    places = torch.arange(tokens.shape[1]).expand(3, 1, -1)
    assert (ours(tokens, given, rope_3BT=places) - expected).abs().max() > 0.05
    assert (ours(tokens) - theirs(tokens).logits).abs().max() < TOLERANCE


@torch.no_grad()
def test_a_batch_equals_each_row_alone_and_cached_equals_fresh(pair):
    _, ours, _, _ = pair
    image = ours.config.image_token_id
    both, given = text(image, GRIDS[:1]).repeat(2, 1), [pixels(GRIDS[:1], seed) for seed in (1, 2)]
    whole = Pixels(torch.cat([one.values for one in given]), shapes=torch.cat([one.shapes for one in given]))
    alone = torch.cat([ours(both[:1], one) for one in given])
    assert (ours(both, whole) - alone).abs().max() < TOLERANCE
    tokens, length = both[:1], both.shape[1]
    turns, vectors = ours.rope_positions(tokens, given[0]), ours.embedded_rows(tokens, given[0])
    cache, start, cut = DecoderCache(ours.config.text, 1, length), 0, []
    for size in (9, 5, length - 14):
        within = (vectors.rows_M >= start) & (vectors.rows_M < start + size)
        part = EmbeddedRows(vectors.rows_M[within] - start, vectors.vectors_MD[within])
        rows = slice(start, start + size)
        cut.append(ours.decoder(tokens[:, rows], cache=cache, embedded=part, rope_3BT=turns[:, :, rows]))
        start += size
    assert (torch.cat(cut, dim=1) - alone[:1]).abs().max() < TOLERANCE


@torch.no_grad()
def test_a_folder_of_transformers_is_read_and_written_again(pair, tmp_path):
    theirs, ours, _, _ = pair
    theirs.save_pretrained(tmp_path / "theirs")
    read = load_vision_language(tmp_path / "theirs")
    assert read.config == ours.config
    save_vision_language(read, tmp_path / "again", processor=None)
    tokens, given = text(ours.config.image_token_id), pixels()
    assert torch.equal(load_vision_language(tmp_path / "again")(tokens, given), ours(tokens, given))


def test_settings_of_a_published_file_are_read(tmp_path):
    """As Qwen/Qwen2.5-VL-3B-Instruct's file is written, with the decoder's settings beside the others."""
    values = {"model_type": "qwen2_5_vl", "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36}
    values |= {"num_attention_heads": 16, "num_key_value_heads": 2, "vocab_size": 151936, "max_position_embeddings": 128000}
    values |= {"rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "tie_word_embeddings": True, "image_token_id": 151655}
    values |= {"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "use_sliding_window": False}
    values["vision_config"] = {"depth": 32, "hidden_act": "silu", "hidden_size": 1280, "intermediate_size": 3420}
    values["vision_config"] |= {"num_heads": 16, "in_chans": 3, "out_hidden_size": 2048, "patch_size": 14, "window_size": 112}
    values["vision_config"] |= {"spatial_merge_size": 2, "spatial_patch_size": 14, "fullatt_block_indexes": [7, 15, 23, 31]}
    (tmp_path / "config.json").write_text(json.dumps(values), encoding="utf-8")
    config = read_vision_language(tmp_path)
    assert config.rope_sections == (16, 24, 24) and config.text.head_dim == 128 and config.text.tie_word_embeddings
    assert config.text.rope_theta == 1000000.0 and config.text.attention_bias and config.vision.full_layers == (7, 15, 23, 31)
    for changes, message in (
        (
            {"rope_scaling": {"type": "mrope", "mrope_section": [16, 16, 16]}},
            "mrope_section: three numbers of pairs are needed",
        ),
        ({"vision_config": {"depth": 2}}, "vision_config: 'hidden_size' is missing"),
        ({"image_token_id": 151936}, "the image token 151936 is not in the vocabulary"),
        ({"vision_config": values["vision_config"] | {"out_hidden_size": 9}}, "out_hidden_size: 9 is not the decoder's width"),
        ({"vision_config": values["vision_config"] | {"window_size": 14}}, "window_size: 14 pixels hold no square"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(values | changes), encoding="utf-8")
        with pytest.raises(ArtefactError, match=message):
            read_vision_language(tmp_path)


def test_pixels_are_those_of_transformers_to_the_last_bit(pair):
    theirs = Qwen2VLImageProcessorPil(**NATIVE)
    ours = read_preprocessor(pair[2])
    for index, size in enumerate([(40, 30), (30, 41), (16, 16), (7, 90), (130, 33), (1, 3), (200, 200)]):
        image = drawn(*size, seed=index)
        expected = theirs(image, return_tensors="np")
        made = ours.pixels(ours.prepare(Picture.of(np.asarray(image))))
        assert np.array_equal(made.values.numpy(), expected["pixel_values"]), size
        assert [[1, *made.shapes[0].tolist()]] == np.asarray(expected["image_grid_thw"]).tolist()


def test_tokens_of_pictures_are_those_of_transformers(pair):
    folder = pair[2]
    reader = open_picture_reader(pair[1].vision, folder, load_tokenizer(folder))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    theirs = Qwen2VLImageProcessorPil(**NATIVE)
    images = [drawn(40, 30), drawn(16, 60, seed=1)]
    ids = tokenizer("the <|vision_start|><|image_pad|><|vision_end|> in <|image_pad|> a")["input_ids"]
    prompt = reader.expand(ids, [Picture.of(np.asarray(one)) for one in images])
    grids = [theirs(one, return_tensors="np")["image_grid_thw"][0] for one in images]
    assert [len(span.places) for span in prompt.spans] == [int(grid[1] * grid[2]) // 4 for grid in grids]
    for span in prompt.spans:
        assert reader.vectors(span.prepared).shape == (len(span.places), 48)
        assert (span.grid.first, span.grid.rows * span.grid.columns) == (span.start, len(span.places))


def test_positions_by_hand():
    """A picture of 2 × 3 tokens behind two of text: the text goes on from its larger side."""
    whole = list(rope_positions([GridSpan(2, 2, 3)], 0, 10))
    assert whole[:2] == [(0, 0, 0), (1, 1, 1)] and whole[8:] == [(5, 5, 5), (6, 6, 6)]
    assert whole[2:8] == [(2, 2, 2), (2, 2, 3), (2, 2, 4), (2, 3, 2), (2, 3, 3), (2, 3, 4)]
    assert all(list(rope_positions([GridSpan(2, 2, 3)], start, 3)) == whole[start : start + 3] for start in range(8))


def test_a_preparation_that_is_another_encoders_is_refused(pair, tmp_path):
    write_qwen_model(tmp_path, patch_size=2)
    with pytest.raises(ArtefactError, match=r"pictures are prepared as \(2, 2, 2\), and the encoder takes \(4, 2, 2\)"):
        open_picture_reader(pair[1].vision, tmp_path, load_tokenizer(tmp_path))


@torch.no_grad()
def test_a_new_models_answers_depend_on_its_pictures(tmp_path):
    ours = write_qwen_model(tmp_path)
    first, second = (ours(text(ours.config.image_token_id), pixels(seed=seed)) for seed in (1, 2))
    assert (first[:, -1] - second[:, -1]).abs().max() > 0.1
