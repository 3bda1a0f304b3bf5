"""Preprocessing beside `transformers`' processors on Pillow: equal bits; and pictures in prompts."""

import json

import numpy as np
import pytest
import torch
import transformers
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from bessemer.core.errors import ArtefactError, RequestError
from bessemer.model.vision.config import read_vision_language_config
from bessemer.model.vision.folder import initial_vision_language, load_vision_language
from bessemer.model.vision.pictures import Picture
from bessemer.model.vision.preprocessing import preprocessor_of, read_preprocessor
from bessemer.model.vision.prompts import PictureReader, open_picture_reader
from bessemer.tokenization.tokenizer import load_tokenizer
from tests.model.picture_files import drawn, write_gemma3_model, write_picture_tokenizer
from tests.model.vision_models import make

SIZES = [(40, 30), (30, 41), (16, 16), (7, 90), (130, 33), (1, 3)]
TILES = {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 16}}
CROPS = {"size": {"height": 16, "width": 16}, "do_pan_and_scan": True, "pan_and_scan_min_crop_size": 8}
CROPS |= {"pan_and_scan_max_num_crops": 3, "pan_and_scan_min_ratio_to_activate": 1.2}
PROCESSORS = {
    "siglip": (SiglipImageProcessorPil, {"size": {"height": 24, "width": 20}}),
    "clip": (CLIPImageProcessorPil, {"size": {"shortest_edge": 18}, "crop_size": {"height": 16, "width": 16}}),
    "clip, crop larger": (CLIPImageProcessorPil, {"size": {"shortest_edge": 15}, "crop_size": {"height": 21, "width": 20}}),
    "llava, padded": (LlavaImageProcessorPil, {"size": {"shortest_edge": 16}, "crop_size": 16, "do_pad": True}),
    "siglip2": (Siglip2ImageProcessorPil, {"patch_size": 4, "max_num_patches": 30}),
    "idefics3": (Idefics3ImageProcessorPil, TILES),
    "idefics3, one tile": (Idefics3ImageProcessorPil, {**TILES, "do_image_splitting": False}),
    "smolvlm": (SmolVLMImageProcessorPil, {**TILES, "resample": 2, "image_mean": [0.4, 0.5, 0.6]}),
    "gemma3": (Gemma3ImageProcessorPil, {"size": {"height": 16, "width": 16}}),
    "gemma3, crops": (Gemma3ImageProcessorPil, CROPS),
    "not normalised": (SiglipImageProcessorPil, {"size": {"height": 8, "width": 8}, "do_normalize": False}),
}


@pytest.mark.parametrize("case", sorted(PROCESSORS))
def test_pixels_are_those_of_transformers_to_the_last_bit(case, tmp_path):
    kind, settings = PROCESSORS[case]
    theirs = kind(**settings)
    theirs.save_pretrained(tmp_path)
    ours = read_preprocessor(tmp_path)
    for index, size in enumerate(SIZES):
        image = drawn(*size, seed=index)
        expected = (
            theirs(image, return_tensors="np", return_row_col_info=True)
            if "max_image_size" in settings
            else theirs(image, return_tensors="np")
        )
        prepared = ours.prepare(Picture.of(np.asarray(image)))
        pixels = ours.pixels(prepared)
        values = expected["pixel_values"]
        assert np.array_equal(pixels.values.numpy(), values[0] if values.ndim == 5 else values), (case, size)
        if "rows" in expected:
            assert (expected["rows"], expected["cols"]) == ([[prepared.rows]], [[prepared.columns]])
        if "spatial_shapes" in expected:
            assert pixels.shapes.tolist() == np.asarray(expected["spatial_shapes"]).tolist()
            assert np.array_equal(pixels.mask.numpy(), expected["pixel_attention_mask"] != 0)


def test_settings_within_those_of_a_whole_processor_are_read(tmp_path):
    values = {"image_processor": {"image_processor_type": "SiglipImageProcessorFast", "size": {"height": 8, "width": 8}}}
    (tmp_path / "processor_config.json").write_text(json.dumps(values), encoding="utf-8")
    assert read_preprocessor(tmp_path).size == (8, 8)


def test_missing_and_unknown_settings_are_named(tmp_path):
    with pytest.raises(ArtefactError, match=r"preprocessor_config\.json is missing"):
        read_preprocessor(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "DonutImageProcessor"}), encoding="utf-8"
    )
    with pytest.raises(ArtefactError, match="prepared by 'DonutImageProcessor' are not read"):
        read_preprocessor(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "SiglipImageProcessor", "size": "large"}), encoding="utf-8"
    )
    with pytest.raises(ArtefactError, match=r"preprocessor_config\.json: "):
        read_preprocessor(tmp_path)


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    """A reader of a tiny Idefics3 with pictures in tiles of 16 pixels, each 4 tokens, and its tokenizer's folder."""
    folder = write_picture_tokenizer(tmp_path_factory.mktemp("reader"))
    tokenizer = load_tokenizer(folder)
    values = make("idefics3").config.to_dict()
    values["text_config"]["vocab_size"] = tokenizer.vocab_size
    values["image_token_id"] = tokenizer.control_id("<image>")
    vision = initial_vision_language(read_vision_language_config(values), seed=1).vision
    preprocessor = preprocessor_of({"image_processor_type": "Idefics3ImageProcessor", **TILES})
    return PictureReader(vision, preprocessor, tokenizer), folder


def test_tokens_of_pictures_are_those_of_transformers(reader):
    ours, folder = reader
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    processor = transformers.Idefics3Processor(Idefics3ImageProcessorPil(**TILES), tokenizer, image_seq_len=4)
    for sizes in ([(40, 30)], [(16, 16), (7, 60)], [(64, 64)]):
        images = [drawn(*size, seed=index) for index, size in enumerate(sizes)]
        text = "the <image> in" * len(images) + " a the"
        expected = processor(images=[images], text=text, return_tensors="np")
        image = ours.image_token_id
        short = tokenizer(text)["input_ids"]
        prompt = ours.expand(short, [Picture.of(np.asarray(one)) for one in images])
        assert prompt.ids == expected["input_ids"][0].tolist()
        assert len(prompt.spans) == len(images)
        assert [place for span in prompt.spans for place in span.places] == [
            place for place, id in enumerate(prompt.ids) if id == image
        ]
        for span in prompt.spans:
            assert ours.vectors(span.prepared).shape == (len(span.places), 32)


def gemma3_reader(folder, **settings):
    write_gemma3_model(folder, **settings)
    tokenizer = load_tokenizer(folder)
    return open_picture_reader(load_vision_language(folder).vision, folder, tokenizer)


@pytest.mark.parametrize("settings", [{}, CROPS | {"size": {"height": 32, "width": 32}}], ids=["whole", "crops"])
def test_tokens_of_gemma3s_pictures_are_those_of_transformers(settings, tmp_path):
    ours = gemma3_reader(tmp_path, **settings)
    names = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"), extra_special_tokens=names
    )
    image_processor = Gemma3ImageProcessorPil(**{"size": {"height": 32, "width": 32}} | settings)
    processor = transformers.Gemma3Processor(image_processor, tokenizer, image_seq_length=16)
    texts = ["the<start_of_image> in", "\n<start_of_image><start_of_image>\n\na the", "<start_of_turn>user\n<start_of_image>"]
    for text in texts:
        images = [drawn(*size, seed=index) for index, size in enumerate([(40, 30), (16, 60)][: text.count("_image")])]
        # the processor's own defaults come before what its image processor is set to
        expected = processor(images=[images], text=text, return_tensors="np", **settings)
        prompt = ours.expand(tokenizer(text)["input_ids"], [Picture.of(np.asarray(one)) for one in images])
        assert prompt.ids == expected["input_ids"][0].tolist()
        places = [place for span in prompt.spans for place in span.places]
        assert places == np.flatnonzero(expected["token_type_ids"][0]).tolist()
        for span in prompt.spans:
            assert span.is_bidirectional and ours.vectors(span.prepared).shape == (len(span.places), 48)
            assert [prompt.ids[span.start], prompt.ids[span.end - 1]] == list(ours.config.around)


def test_vectors_are_those_of_the_model(reader):
    ours, _ = reader
    prepared = ours.preprocessor.prepare(Picture.of(np.asarray(drawn(40, 30))))
    with torch.no_grad():
        expected = ours.vision(ours.preprocessor.pixels(prepared)).flatten(0, 1)
    assert torch.equal(ours.vectors(prepared), expected)


def test_more_or_fewer_pictures_than_places_are_refused(reader):
    ours, _ = reader
    with pytest.raises(RequestError, match="the prompt has places for 1 pictures, and 0 are given"):
        ours.expand([3, ours.image_token_id], [])


def test_pixels_of_another_size_than_the_encoder_takes_are_refused(reader):
    ours, _ = reader
    other = preprocessor_of({"image_processor_type": "Idefics3ImageProcessor", "max_image_size": {"longest_edge": 20}})
    with pytest.raises(ArtefactError, match="prepared with 20 pixels a side, and the encoder takes squares of 16"):
        PictureReader(ours.vision, other, ours._tokenizer)
