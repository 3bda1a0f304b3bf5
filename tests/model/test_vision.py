"""Encoders, projectors and decoders with pictures, beside `transformers` on tiny random models."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from bessemer.core.errors import ArtefactError, RequestError
from bessemer.model.layers.cache import DecoderCache
from bessemer.model.vision.config import read_vision_language_config
from bessemer.model.vision.encoder import Pixels, spread_positions
from bessemer.model.vision.folder import (
    initial_vision_language,
    is_vision_folder,
    load_vision_encoder,
    load_vision_language,
    read_vision_language,
    save_vision_encoder,
    save_vision_language,
)
from bessemer.model.vision.model import Vision, ends_of_runs, pixel_shuffle
from tests.model.vision_models import ENCODERS, IMAGE, MODELS, TOKENS, make, pictures, row

TOLERANCE = 1e-4


@pytest.fixture(scope="module", params=sorted(MODELS))
def pair(request, tmp_path_factory):
    """A `transformers` model, ours loaded from its folder, and how many tokens a picture takes."""
    theirs = make(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(folder)
    return theirs, load_vision_language(folder), TOKENS[request.param]


def their_pixels(theirs, pixels):
    """Pixels as the model takes them: Idefics3's have a dimension of the pictures of each text."""
    return pixels[None] if theirs.config.model_type in ("idefics3", "smolvlm") else pixels


def their_logits(theirs, tokens_BT, pixels):
    """Logits with pictures; Gemma 3 is told which tokens are those of pictures."""
    types = {"token_type_ids": (tokens_BT == IMAGE).long()} if theirs.config.model_type == "gemma3" else {}
    return theirs(tokens_BT, pixel_values=their_pixels(theirs, pixels), **types).logits


@torch.no_grad()
def test_logits_equal_those_of_transformers(pair):
    theirs, ours, tokens = pair
    assert ours.config.tokens_per_tile == tokens
    pixels, tokens_BT = pictures(2), row(tokens, images=2)
    expected = their_logits(theirs, tokens_BT, pixels)
    assert expected.std() > 0.2
    assert (ours(tokens_BT, Pixels(pixels)) - expected).abs().max() < TOLERANCE
    blind = theirs(tokens_BT).logits
    assert (blind - expected).abs().max() > 0.05
    assert (ours(tokens_BT) - blind).abs().max() < TOLERANCE


@torch.no_grad()
def test_a_batch_equals_each_row_alone(pair):
    _, ours, tokens = pair
    pixels = pictures(2)
    rows = torch.cat([row(tokens, seed=seed) for seed in (3, 4)])
    together = ours(rows, Pixels(pixels))
    alone = torch.cat([ours(rows[index : index + 1], Pixels(pixels[index : index + 1])) for index in range(2)])
    assert (together - alone).abs().max() < TOLERANCE


@torch.no_grad()
def test_cached_equals_fresh_wherever_the_picture_is_cut(pair):
    _, ours, tokens = pair
    pixels, tokens_BT = pictures(1), row(tokens)
    fresh, embedded = ours(tokens_BT, Pixels(pixels)), ours.embedded_rows(tokens_BT, Pixels(pixels))
    length, cache = tokens_BT.shape[1], DecoderCache(ours.config.text, 1, tokens_BT.shape[1])
    if ours.config.is_bidirectional:
        # such a picture is read whole, behind what is read already
        parts = [ours(tokens_BT[:, :2], cache=cache), ours(tokens_BT[:, 2 : 5 + tokens], Pixels(pixels), cache=cache)]
        parts += [ours(tokens_BT[:, place : place + 1], cache=cache) for place in range(5 + tokens, length)]
        assert (torch.cat(parts, dim=1) - fresh).abs().max() < TOLERANCE
        return
    start, cut = 0, []
    for size in (3 + tokens // 2, tokens - tokens // 2, length - 3 - tokens):
        within = (embedded.rows_M >= start) & (embedded.rows_M < start + size)
        part = embedded._replace(rows_M=embedded.rows_M[within] - start, vectors_MD=embedded.vectors_MD[within])
        cut.append(ours.decoder(tokens_BT[:, start : start + size], cache=cache, embedded=part))
        start += size
    assert (torch.cat(cut, dim=1) - fresh).abs().max() < TOLERANCE


@torch.no_grad()
def test_a_saved_model_is_opened_by_transformers_and_by_us(pair, tmp_path):
    theirs, ours, tokens = pair
    save_vision_language(ours, tmp_path, processor=None)
    again = load_vision_language(tmp_path)
    assert again.config == ours.config
    pixels, tokens_BT = pictures(1), row(tokens)
    expected = their_logits(theirs, tokens_BT, pixels)
    opened, loading = type(theirs).from_pretrained(tmp_path, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    logits = their_logits(opened, tokens_BT, pixels)
    assert (logits - expected).abs().max() < TOLERANCE / 10
    assert torch.equal(again(tokens_BT, Pixels(pixels)), ours(tokens_BT, Pixels(pixels)))


@torch.no_grad()
@pytest.mark.parametrize("backend", ["explicit", "tiled"])
def test_every_backend_lets_a_pictures_tokens_see_each_other(backend):
    theirs = make("gemma3")
    config = _config_of(theirs)
    ours = initial_vision_language(config, seed=1)
    rows = torch.cat([row(4, seed=seed, images=2) for seed in (3, 4)])
    expected = ours(rows, Pixels(pictures(4)))
    ours.decoder.set_attention_backend(backend)
    assert (ours(rows, Pixels(pictures(4))) - expected).abs().max() < TOLERANCE
    ours.decoder.set_attention_backend("sdpa")


def test_runs_of_tokens_end_where_another_picture_begins():
    inside = torch.tensor([[0, 1, 1, 1, 0, 1], [1, 1, 0, 0, 1, 1]]).bool()
    assert ends_of_runs(inside).tolist() == [[0, 3, 3, 3, 4, 5], [1, 1, 2, 3, 5, 5]]
    starts = torch.tensor([[0, 1, 0, 1, 0, 1], [1, 0, 0, 0, 1, 1]]).bool()
    assert ends_of_runs(inside, starts).tolist() == [[0, 2, 2, 3, 4, 5], [1, 1, 2, 3, 4, 5]]


def test_a_gemma3_has_the_sizes_that_its_file_leaves_out():
    """As google/gemma-3-4b-it's file is written."""
    text = {"hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34}
    text |= {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024}
    vision = {"model_type": "siglip_vision_model", "image_size": 896, "patch_size": 14, "hidden_size": 1152}
    vision |= {"num_attention_heads": 16, "num_hidden_layers": 27, "intermediate_size": 4304, "vision_use_head": False}
    config = read_vision_language_config(
        {"model_type": "gemma3", "mm_tokens_per_image": 256, "text_config": text, "vision_config": vision}
    )
    theirs = transformers.Gemma3TextConfig(**text)
    for name in ("vocab_size", "num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps", "sliding_window"):
        assert getattr(config.text, name) == getattr(theirs, name), name
    assert list(config.text.types) == theirs.layer_types and config.text.tie_word_embeddings
    rope = theirs.rope_parameters
    assert config.text.rope_theta == rope["full_attention"]["rope_theta"]
    assert config.text.rope_local_base_freq == rope["sliding_attention"]["rope_theta"]
    assert (config.tokens_per_tile, config.around, config.image_token_id) == (256, (255_999, 256_000), 262_144)


def test_gradients_of_a_projector_equal_those_of_transformers(pair):
    theirs, ours, tokens = pair
    pixels, tokens_BT = pictures(1), row(tokens)
    with torch.enable_grad():
        theirs.zero_grad()
        ours.requires_grad_(False)
        ours.vision.projector.requires_grad_(True).zero_grad()
        their_logits(theirs, tokens_BT, pixels).square().mean().backward()
        ours(tokens_BT, Pixels(pixels)).square().mean().backward()
    grads = {name: weight.grad for name, weight in theirs.named_parameters()}
    for name, weight in ours.vision.projector.named_parameters():
        expected = next(grad for key, grad in grads.items() if key.endswith(name) and "projec" in key)
        assert (weight.grad - expected).norm() <= 1e-4 * expected.norm(), name


@pytest.fixture(scope="module", params=sorted(ENCODERS))
def encoders(request, tmp_path_factory):
    """A `transformers` encoder, and ours loaded from its folder."""
    theirs = make(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(folder)
    return theirs, load_vision_encoder(folder)


def both(theirs, ours):
    """States and pooled vectors of both, of two pictures."""
    if not ours.config.takes_patches:
        values = pictures(2, ours.config.image_size)
        out, pixels = theirs(values), Pixels(values)
    else:
        values = torch.randn(2, 20, 48, generator=torch.Generator().manual_seed(5))
        shapes = torch.tensor([[2, 7], [6, 3]])
        mask = torch.arange(20) < shapes.prod(1, keepdim=True)
        out = theirs(values, pixel_attention_mask=mask.long(), spatial_shapes=shapes)
        pixels = Pixels(values, mask, shapes)
    return out.last_hidden_state, out.pooler_output, ours(pixels), ours.pooled(pixels)


@torch.no_grad()
def test_an_encoder_alone_equals_that_of_transformers(encoders, tmp_path):
    theirs, ours = encoders
    states, pooled, our_states, our_pooled = both(theirs, ours)
    assert (our_states - states).abs().max() < TOLERANCE
    assert (our_pooled - pooled).abs().max() < TOLERANCE
    save_vision_encoder(ours, tmp_path)
    opened, loading = type(theirs).from_pretrained(tmp_path, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    assert (both(opened, ours)[0] - states).abs().max() < TOLERANCE / 10


@torch.no_grad()
def test_the_encoder_of_a_whole_siglip_is_read(tmp_path):
    tiny = make("siglip").config.to_dict()
    text = {"vocab_size": 97, "hidden_size": 24, "intermediate_size": 36, "num_hidden_layers": 1, "num_attention_heads": 2}
    whole = transformers.SiglipModel(transformers.SiglipConfig(vision_config=tiny, text_config=text | {"projection_size": 24}))
    whole.eval().save_pretrained(tmp_path)
    expected = whole.vision_model(pictures(1, 18)).last_hidden_state
    assert (load_vision_encoder(tmp_path)(Pixels(pictures(1, 18))) - expected).abs().max() < TOLERANCE


@torch.no_grad()
def test_padded_pictures_of_idefics3_equal_those_of_transformers():
    theirs = make("idefics3")
    mask = torch.zeros(1, 2, 16, 16, dtype=torch.long)
    mask[0, 0, :8, :12] = 1
    mask[0, 1] = 1
    expected = theirs.model.get_image_features(pictures(2)[None], mask).pooler_output[0]
    config = _config_of(theirs)
    ours = Vision(config)
    weights = theirs.state_dict()
    ours.encoder.load_state_dict(_below(weights, "model.vision_model."))
    ours.projector.load_state_dict(_below(weights, "model.connector.modality_projection."))
    patches = mask[0].unfold(1, 4, 4).unfold(2, 4, 4).sum((-1, -2)) > 0
    assert (ours(Pixels(pictures(2), patches)).flatten(0, 1) - expected).abs().max() < TOLERANCE


def _config_of(theirs):
    return read_vision_language_config(theirs.config.to_dict())


def _below(weights, prefix):
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}


def test_pixel_shuffle_puts_each_square_of_patches_into_one_vector():
    patches = torch.arange(16.0).reshape(1, 16, 1)
    assert pixel_shuffle(patches, 2)[0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]


def test_positions_spread_over_fewer_patches_than_the_square_has():
    mask = torch.tensor([[[True, True], [True, True]]])
    assert spread_positions(mask, 4).tolist() == [[0, 2, 8, 10]]


def test_text_with_too_few_places_for_a_picture_is_refused(pair):
    _, ours, tokens = pair
    with pytest.raises(RequestError, match=f"take {2 * tokens} tokens, and the text has places for {tokens}"):
        ours(row(tokens), Pixels(pictures(2)))


def test_new_models_are_drawn_from_a_seed(pair):
    _, ours, tokens = pair
    first, same, other = (initial_vision_language(ours.config, seed) for seed in (1, 1, 2))
    assert all(torch.equal(one, two) for one, two in zip(first.parameters(), same.parameters(), strict=True))
    drawn, drawn_otherwise = (next(model.vision.projector.parameters()) for model in (first, other))
    assert not torch.equal(drawn, drawn_otherwise)
    assert torch.isfinite(first(row(tokens), Pixels(pictures(1)))).all()


def test_a_llama_within_llava_has_the_sizes_that_its_file_leaves_out():
    text = {"model_type": "llama", "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "vocab_size": 32064}
    vision = {"model_type": "clip_vision_model", "image_size": 336, "patch_size": 14, "hidden_size": 1024}
    vision |= {"num_attention_heads": 16, "num_hidden_layers": 24, "intermediate_size": 4096}
    config = read_vision_language_config(
        {"model_type": "llava", "image_token_index": 32000, "text_config": text, "vision_config": vision}
    )
    theirs = transformers.LlamaConfig(**text)
    for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_key_value_heads", "head_dim", "rms_norm_eps"):
        assert getattr(config.text, name) == getattr(theirs, name), name
    # as the published processor counts them
    assert config.tokens_per_tile == 576


BAD = {
    "sizes": ({"text_config": {"model_type": "qwen2", "vocab_size": 97}}, "text_config: hidden_size: a whole number is needed"),
    "scale": ({"scale_factor": 3}, "scale_factor: 3 does not divide a side of 4 patches"),
    "token": ({"image_token_id": 97}, "the image token 97 is not in the vocabulary of 97 tokens"),
    "text": ({"text_config": {"model_type": "mamba"}}, "text_config: unknown architecture 'mamba'"),
    "no text": ({"text_config": None}, "needs a vision_config and a text_config"),
    "heads": ({"vision_config": {"hidden_size": 24, "num_attention_heads": 5}}, "hidden_size 24 is not divided by 5 heads"),
    "act": ({"vision_config": {"hidden_act": "swoosh"}}, "the activation 'swoosh' is not known"),
}


BAD_GEMMA3 = {
    "tokens": ({"mm_tokens_per_image": 9}, "mm_tokens_per_image: a side of 4 patches is not made 9 tokens"),
    "no square": ({"mm_tokens_per_image": 8}, "is not made 8 tokens"),
    "begin": ({"boi_token_index": 255_999}, "the image token 255999 is not in the vocabulary of 97 tokens"),
    "encoder": ({"vision_config": {"model_type": "clip_vision_model"}}, "Gemma 3's encoder is SigLIP's"),
    "two ways": ({"text_config": {"use_bidirectional_attention": True, "vocab_size": 97}}, "use_bidirectional_attention"),
}


@pytest.mark.parametrize("case", sorted({**BAD, **BAD_GEMMA3}))
def test_settings_that_make_no_model_are_named(case, tmp_path):
    changes, message = (BAD | BAD_GEMMA3)[case]
    values = make("gemma3" if case in BAD_GEMMA3 else "idefics3").config.to_dict()
    values |= changes
    (tmp_path / "config.json").write_text(
        json.dumps({key: value for key, value in values.items() if value is not None}), encoding="utf-8"
    )
    assert is_vision_folder(tmp_path)
    with pytest.raises(ArtefactError, match=message):
        read_vision_language(tmp_path)


def test_a_missing_tensor_is_named(tmp_path):
    model = make("idefics3")
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.connector.modality_projection.proj.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ArtefactError, match=r"tensor 'model\.connector\.modality_projection\.proj\.weight' is missing"):
        load_vision_language(tmp_path)
