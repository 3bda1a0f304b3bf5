"""Every way of telling where a token stands, in a whole decoder."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from bessemer.model.architecture import RopeScaling
from bessemer.model.config import ModelConfig
from bessemer.model.layers.attention_mask import alibi_slopes, attention_mask, bias
from bessemer.model.layers.cache import DecoderCache
from bessemer.model.layers.positions import RotaryPositions, SinusoidalPositions, rotary_frequencies, rotate
from bessemer.model.storage.folder import load_model, save_model
from tests.model.randomised import random_decoder, random_tokens

SHAPE = ModelConfig(
    vocab_size=97,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=3,
    head_dim=8,
    intermediate_size=40,
    max_position_embeddings=48,
)
KINDS = {
    "alibi": {"position_type": "alibi"},
    "sinusoidal": {"position_type": "sinusoidal"},
    "learned": {"position_type": "learned"},
    "none": {"position_type": "none"},
    "partial rotary": {"partial_rotary_factor": 0.5},
    "interleaved rotary": {"rope_interleave": True},
    "layers without rotary": {"no_rope_layers": (1, 0, 1)},
    "alibi in windows": {"position_type": "alibi", "layer_types": ("sliding_attention",) * 3, "sliding_window": 6},
}
DOG, BITES, MAN, END = 11, 22, 33, 44


def decoder_with(kind, **changes):
    return random_decoder(SHAPE.with_changes(**KINDS[kind], **changes))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_cached_decoding_equals_the_whole_text_at_once(kind):
    decoder = decoder_with(kind)
    tokens_BT = random_tokens(SHAPE, 2, 30)
    cache, pieces, start = DecoderCache(decoder.config, 2, 30), [], 0
    for length in (9, 1, 1, 12, 7):
        pieces.append(decoder(tokens_BT[:, start : start + length], cache=cache))
        start += length
    expected = decoder(tokens_BT)
    assert (torch.cat(pieces, dim=1) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_rows_of_different_lengths_decode_as_each_alone(kind):
    decoder = decoder_with(kind)
    tokens_BT, lengths = random_tokens(SHAPE, 2, 20), [5, 12]
    cache = DecoderCache(decoder.config, 2, 20)
    decoder.hidden(tokens_BT[:, :12], cache=cache, real=lengths)
    cache.shorten(lengths)
    logits_BTV = decoder(torch.stack([tokens_BT[0, 5:6], tokens_BT[1, 12:13]]), cache=cache)
    for row, length in enumerate(lengths):
        assert (logits_BTV[row, 0] - decoder(tokens_BT[row : row + 1, : length + 1])[0, -1]).abs().max() < 1e-4


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_packed_documents_equal_each_alone(kind):
    decoder = decoder_with(kind)
    tokens_BT = random_tokens(SHAPE, 1, 20)
    ids_BT = torch.tensor([[0] * 8 + [1] * 12])
    positions_BT = torch.cat((torch.arange(8), torch.arange(12)))[None]
    packed = decoder(tokens_BT, document_ids_BT=ids_BT, positions_BT=positions_BT)
    assert (packed[:, 8:] - decoder(tokens_BT[:, 8:])).abs().max() < 1e-4


def difference_of_order(decoder):
    """How far the last logits of “dog bites man.” and “man bites dog.” lie apart."""
    with torch.no_grad():
        logits_BTV = decoder(torch.tensor([[DOG, BITES, MAN, END], [MAN, BITES, DOG, END]]))
    return (logits_BTV[0, -1] - logits_BTV[1, -1]).abs().max().item()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("none", "layers without rotary")])
def test_with_positions_one_layer_tells_dog_bites_man_from_man_bites_dog(kind):
    one = {"num_hidden_layers": 1} | ({"layer_types": ("sliding_attention",)} if "windows" in kind else {})
    assert difference_of_order(random_decoder(SHAPE.with_changes(**(KINDS[kind] | one)))) > 0.01


def test_without_positions_one_layer_sees_a_bag_of_tokens():
    assert difference_of_order(decoder_with("none", num_hidden_layers=1)) < 1e-5


def test_without_positions_two_layers_tell_the_order_from_what_each_token_could_see():
    """Haviv et al. 2022: the causal mask gives positions away."""
    assert difference_of_order(decoder_with("none", num_hidden_layers=2)) > 0.01


@torch.no_grad()
def test_rotary_positions_count_from_anywhere():
    decoder = decoder_with("partial rotary")
    tokens_BT = random_tokens(SHAPE, 1, 20)
    shifted = decoder(tokens_BT, positions_BT=torch.arange(17, 37)[None])
    assert (shifted - decoder(tokens_BT)).abs().max() < 1e-4


@torch.no_grad()
def test_layers_without_rotary_see_no_positions():
    decoder = decoder_with("layers without rotary")
    everywhere = random_decoder(SHAPE)
    nowhere = random_decoder(SHAPE.with_changes(no_rope_layers=(0, 0, 0)))
    tokens_BT = random_tokens(SHAPE, 1, 20)
    assert (decoder(tokens_BT) - everywhere(tokens_BT)).abs().max() > 0.01
    # as many layers without them as there are: the same as a decoder that has no positions at all
    none = random_decoder(SHAPE.with_changes(position_type="none"))
    assert torch.equal(nowhere(tokens_BT), none(tokens_BT))


# ------------------------------------------------------------------------------------------------------------- rotary

common = {
    "half": st.integers(2, 64),
    "theta": st.floats(100, 1e7),
    "factor": st.floats(1, 64),
    "context": st.integers(16, 4096),
}


@pytest.mark.parametrize("rope_type", ["default", "linear", "dynamic", "llama3", "yarn"])
def test_a_table_grows_with_the_texts_and_has_the_same_bits_at_any_length(rope_type):
    scaling = RopeScaling(rope_type=rope_type, factor=4.0, original_max_position_embeddings=1000)
    grown, whole = (RotaryPositions(24, 10_000.0, 30_000, scaling) for _ in range(2))
    assert len(grown.cosines) < 5000
    whole.reserve(100_000)
    assert len(whole.cosines) == 30_000
    with torch.inference_mode():
        for length in (3, 2049, 7777):
            for own, expected in zip(grown(None, length, torch.float32), whole(None, length, torch.float32), strict=True):
                assert torch.equal(own, expected)
    assert len(grown.cosines) < 20_000 and not grown.cosines.is_inference()


@torch.no_grad()
def test_positions_may_lie_anywhere_in_the_context():
    decoder = random_decoder(SHAPE.with_changes(max_position_embeddings=9000))
    tokens_BT = random_tokens(SHAPE, 1, 20)
    shifted = decoder(tokens_BT, positions_BT=torch.arange(8900, 8920)[None])
    assert (shifted - decoder(tokens_BT)).abs().max() < 1e-3


def check_against_transformers(rope_type, dim, theta, scaling, context, length=None):
    config = LlamaConfig(
        hidden_size=2 * dim,
        num_attention_heads=2,
        head_dim=dim,
        max_position_embeddings=context,
        rope_parameters={"rope_type": rope_type, "rope_theta": theta, **scaling},
    )
    expected, factor = ROPE_INIT_FUNCTIONS[rope_type](config, device="cpu", seq_len=length)
    ours, our_factor = rotary_frequencies(dim, theta, RopeScaling(rope_type=rope_type, **scaling), context, length)
    assert torch.allclose(ours, expected, rtol=1e-5, atol=0)
    assert our_factor == pytest.approx(factor)


@given(**common)
@settings(max_examples=40, deadline=None)
def test_linear_scaling_is_that_of_transformers(half, theta, factor, context):
    check_against_transformers("linear", 2 * half, theta, {"factor": factor}, context)


@given(**common, times=st.floats(0.1, 9))
@settings(max_examples=40, deadline=None)
def test_dynamic_scaling_is_that_of_transformers(half, theta, factor, context, times):
    check_against_transformers("dynamic", 2 * half, theta, {"factor": factor}, context, int(times * context) + 1)


# a narrow band between low and high multiplies the rounding of both; Llama's own is 1 to 4
@given(**common, low=st.floats(0.1, 2), over=st.floats(1, 60))
@settings(max_examples=60, deadline=None)
def test_llama3_scaling_is_that_of_transformers(half, theta, factor, context, low, over):
    scaling = {
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": low + over,
        "original_max_position_embeddings": context,
    }
    check_against_transformers("llama3", 2 * half, theta, scaling, 4 * context)


@given(
    **common,
    slow=st.floats(0.1, 4),
    over=st.floats(0.1, 60),
    truncate=st.booleans(),
    mscale=st.none() | st.tuples(st.floats(0.1, 2), st.floats(0.1, 2)),
    attention_factor=st.none() | st.floats(0.5, 2),
)
@settings(max_examples=120, deadline=None)
def test_yarn_is_that_of_transformers(half, theta, factor, context, slow, over, truncate, mscale, attention_factor):
    scaling = {
        "factor": factor,
        "beta_slow": slow,
        "beta_fast": slow + over,
        "truncate": truncate,
        "original_max_position_embeddings": context,
    }
    if mscale is not None:
        scaling |= {"mscale": mscale[0], "mscale_all_dim": mscale[1]}
    if attention_factor is not None:
        scaling |= {"attention_factor": attention_factor}
    check_against_transformers("yarn", 2 * half, theta, scaling, 4 * context)


@given(half=st.integers(1, 8), rest=st.integers(0, 8), interleave=st.booleans(), position=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_a_pair_of_channels_is_a_complex_number_that_is_turned(half, rest, interleave, position):
    heads_BHTC = torch.randn(1, 1, 1, 2 * half + rest, generator=torch.Generator().manual_seed(position))
    rotary = RotaryPositions(2 * half, 10_000.0, 100, None, interleave)
    turned = rotate(heads_BHTC, rotary(torch.tensor([[position]]), 100, torch.float32), interleave)[0, 0, 0].double()
    head = heads_BHTC[0, 0, 0].double()
    for channel in range(half):
        pair = (2 * channel, 2 * channel + 1) if interleave else (channel, channel + half)
        angle = position * 10_000.0 ** (-channel / half)
        expected = complex(*head[list(pair)].tolist()) * complex(math.cos(angle), math.sin(angle))
        assert turned[list(pair)].tolist() == pytest.approx([expected.real, expected.imag], abs=1e-4)
    assert torch.equal(turned[2 * half :], head[2 * half :])


# --------------------------------------------------------------------------------------------- ALiBi, sines and cosines


def test_alibi_takes_the_slope_off_for_every_step_of_distance():
    slopes = [1 / 4, 1 / 16, 1 / 64, 1 / 256, 1 / 2, 1 / 8]  # four heads' series, and every other of eight heads'
    assert alibi_slopes(6).tolist() == slopes
    assert alibi_slopes(8).tolist() == [2.0**-power for power in range(1, 9)]
    mask = attention_mask(5, 5, torch.float32, torch.device("cpu"), slopes_H=alibi_slopes(6))
    found = bias(mask, torch.arange(5), torch.arange(5))
    for head, slope in enumerate(slopes):
        for query in range(5):
            row = [-slope * (query - key) if key <= query else -math.inf for key in range(5)]
            assert found[0, head, query].tolist() == row


def test_sinusoidal_positions_are_sines_and_cosines_of_falling_frequencies():
    table = SinusoidalPositions(6)(torch.tensor([[0, 1, 7]]))[0]
    for row, position in enumerate((0, 1, 7)):
        waves = [position / 10_000 ** (2 * pair / 6) for pair in range(3)]
        expected = [wave(angle) for angle in waves for wave in (math.sin, math.cos)]
        assert table[row].tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("kind", ["alibi", "sinusoidal", "none"])
def test_a_model_that_no_family_holds_is_saved_in_our_own_form(kind, tmp_path):
    decoder = decoder_with(kind)
    save_model(decoder, tmp_path, tokenizer=None)
    again = load_model(tmp_path)
    assert again.config == decoder.config.with_changes(model_type="bessemer")
    tokens_BT = random_tokens(SHAPE, 1, 9)
    with torch.no_grad():
        assert torch.equal(again(tokens_BT), decoder(tokens_BT))
