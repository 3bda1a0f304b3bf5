from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen3Config, Qwen3ForCausalLM

from bessemer.model.config import ModelConfig
from bessemer.model.decoder import Decoder
from bessemer.model.families.base import prefixed
from bessemer.model.layers.attention_mask import attention_mask
from bessemer.model.layers.cache import DecoderCache
from bessemer.model.storage.model_config import huggingface_config
from tests.model.randomised import SHAPES, random_decoder, random_tokens

GROUPED = SHAPES["grouped"]


def huggingface_twin(decoder: Decoder, attention: str = "sdpa") -> Qwen3ForCausalLM:
    """The same model in `transformers`."""
    config = Qwen3Config(**huggingface_config(decoder.config, "float32"), attn_implementation=attention)
    twin = Qwen3ForCausalLM(config).eval()
    weights = {prefixed(name): tensor for name, tensor in decoder.state_dict().items()}
    missing, unexpected = twin.load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    twin.tie_weights()
    return twin


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
def test_logits_are_those_of_transformers(config, attention):
    decoder = random_decoder(config)
    tokens_BT = random_tokens(config, 3, 70)
    with torch.no_grad():
        expected = huggingface_twin(decoder, attention)(tokens_BT).logits
        logits_BTV = decoder(tokens_BT)
    assert 0.5 < logits_BTV.std() < 2
    assert (logits_BTV - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
def test_gradients_are_those_of_transformers(config):
    decoder = random_decoder(config)
    twin = huggingface_twin(decoder, "eager")
    tokens_BT = random_tokens(config, 2, 40)
    # a loss that weighs every logit differently, so that no gradient cancels
    weights_BTV = torch.randn(2, 40, config.vocab_size, generator=torch.Generator().manual_seed(1))
    (decoder(tokens_BT) * weights_BTV).mean().backward()
    (twin(tokens_BT).logits * weights_BTV).mean().backward()
    theirs = dict(twin.named_parameters())
    for name, parameter in decoder.named_parameters():
        difference = (parameter.grad - theirs[prefixed(name)].grad).norm() / parameter.grad.norm()
        assert difference <= 1e-4, name


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
def test_corrupting_any_tensor_changes_the_logits(config):
    decoder = random_decoder(config)
    tokens_BT = random_tokens(config, 2, 20)
    with torch.no_grad():
        before = decoder(tokens_BT)
        for name, parameter in decoder.named_parameters():
            kept = parameter.clone()
            parameter.copy_(parameter.roll(1, dims=0))
            assert (decoder(tokens_BT) - before).abs().max() > 1e-3, name
            parameter.copy_(kept)


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("lengths", [[40], [1, 39], [13, 7, 20], [10, 10, 10, 10]])
def test_packed_documents_equal_each_alone(config, lengths):
    decoder = random_decoder(config)
    documents = [random_tokens(config, 1, length, seed=length + at) for at, length in enumerate(lengths)]
    positions_BT = torch.cat([torch.arange(length) for length in lengths])[None]
    document_ids_BT = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
    with torch.no_grad():
        packed = decoder(torch.cat(documents, 1), positions_BT=positions_BT, document_ids_BT=document_ids_BT)
        alone = torch.cat([decoder(document) for document in documents], 1)
    assert (packed - alone).abs().max() <= 1e-5


def test_document_mask_by_hand():
    documents_BT = torch.tensor([[5, 5, 2, 5]])
    mask = attention_mask(4, 4, torch.float32, torch.device("cpu"), documents_BT=documents_BT).dense[0, 0]
    assert (mask == 0).int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [1, 1, 0, 1]]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.sampled_from(sorted(SHAPES)))
@settings(max_examples=25, deadline=None)
def test_cached_in_any_pieces_equals_uncached(pieces, shape):
    decoder = random_decoder(SHAPES[shape])
    tokens_BT = random_tokens(decoder.config, 2, sum(pieces))
    cache = DecoderCache(decoder.config, 2, sum(pieces))
    with torch.no_grad():
        cached = torch.cat([decoder(piece, cache=cache) for piece in tokens_BT.split(pieces, dim=1)], 1)
        assert (cached - decoder(tokens_BT)).abs().max() <= 1e-5
    assert cache.lengths == [sum(pieces)] * 2


@given(st.lists(st.integers(1, 12), min_size=2, max_size=4), st.integers(1, 4), st.sampled_from(sorted(SHAPES)))
@settings(max_examples=25, deadline=None)
def test_a_batch_of_different_lengths_equals_each_alone(lengths, more, shape):
    decoder = random_decoder(SHAPES[shape])
    config = decoder.config
    rows = [random_tokens(config, 1, length + 2 * more, seed=at) for at, length in enumerate(lengths)]
    padded = torch.zeros(len(rows), max(lengths), dtype=torch.long)
    for row, length, tokens in zip(padded, lengths, rows, strict=True):
        row[:length] = tokens[0, :length]
    cache = DecoderCache(config, len(rows), max(lengths) + 2 * more)
    with torch.no_grad():
        decoder(padded, cache=cache)
        cache.shorten(lengths)
        for start in (0, more):  # pieces of several tokens at positions that differ by row
            piece = torch.cat([tokens[:, n + start : n + start + more] for tokens, n in zip(rows, lengths, strict=True)])
            logits = decoder(piece, cache=cache)
            for row, (tokens, length) in enumerate(zip(rows, lengths, strict=True)):
                alone = decoder(tokens)[0, length + start : length + start + more]
                assert (logits[row] - alone).abs().max() <= 1e-5


def test_a_cache_keeps_chosen_rows():
    decoder = random_decoder(GROUPED)
    tokens_BT = random_tokens(GROUPED, 3, 8)
    cache = DecoderCache(GROUPED, 3, 9)
    with torch.no_grad():
        decoder(tokens_BT, cache=cache)
        cache.keep([2, 0])
        logits = decoder(tokens_BT[[2, 0], :1], cache=cache)
        expected = decoder(torch.cat([tokens_BT, tokens_BT[:, :1]], 1))[[2, 0], -1:]
    assert (logits - expected).abs().max() <= 1e-5


def test_a_token_never_sees_the_future():
    decoder = random_decoder(GROUPED)
    tokens_BT = random_tokens(GROUPED, 1, 30)
    changed = tokens_BT.clone()
    changed[:, 20:] = random_tokens(GROUPED, 1, 10, seed=9)
    with torch.no_grad():
        assert torch.equal(decoder(tokens_BT)[:, :20], decoder(changed)[:, :20])


def test_hidden_times_head_is_the_logits():
    for config in SHAPES.values():
        decoder = random_decoder(config)
        tokens_BT = random_tokens(config, 2, 9)
        assert torch.equal(decoder.hidden(tokens_BT) @ decoder.head_weight.T, decoder(tokens_BT))


def test_under_autocast_norms_and_positions_are_float32():
    decoder = random_decoder(GROUPED)
    attention = decoder.blocks[0].self_attn
    with torch.autocast("cpu", torch.bfloat16):
        query = attention.q_proj(torch.randn(1, 5, 128))
        assert query.dtype == torch.bfloat16
        assert attention.q_norm(query.view(1, 5, 4, 32)).dtype == torch.float32


def test_under_autocast_logits_are_near_those_of_transformers():
    decoder = random_decoder(GROUPED)
    twin = huggingface_twin(decoder)
    tokens_BT = random_tokens(GROUPED, 2, 60)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        ours, theirs = decoder(tokens_BT).float(), twin(tokens_BT).logits.float()
    with torch.no_grad():
        exact = decoder(tokens_BT)
    assert (ours - exact).norm() <= 1.1 * (theirs - exact).norm()


def test_documents_under_autocast_equal_plain_causal_attention():
    decoder = random_decoder(GROUPED)
    tokens_BT = random_tokens(GROUPED, 2, 60)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        packed = decoder(tokens_BT, document_ids_BT=torch.zeros(2, 60, dtype=torch.long))
        assert (packed - decoder(tokens_BT)).abs().max() <= 0.1


def test_positions_stay_exact_through_bfloat16():
    decoder = random_decoder(GROUPED)
    before = decoder.rotary.signed_sines.clone()
    decoder.to(torch.bfloat16).to(torch.float32)
    assert torch.equal(decoder.rotary.signed_sines, before)


ONE_BLOCK = GROUPED.with_changes(num_hidden_layers=1)


@pytest.fixture
def nothing_compiled():
    """Whatever shapes other tests of this process have compiled blocks for, and whose number has a limit."""
    torch.compiler.reset()


def test_a_block_compiles_without_a_graph_break_for_rows_of_any_length(nothing_compiled):
    decoder = random_decoder(ONE_BLOCK)
    rows = [random_tokens(ONE_BLOCK, 2, length) for length in (16, 12, 1)]
    expected = [decoder(tokens_BT) for tokens_BT in rows]
    for block in decoder.blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    for tokens_BT, expected_BTV in zip(rows, expected, strict=True):
        logits_BTV = decoder(tokens_BT)
        logits_BTV.sum().backward()
        assert (logits_BTV - expected_BTV).abs().max() <= 1e-5


def test_cached_decoding_leaves_compiled_blocks_alone(nothing_compiled):
    decoder = random_decoder(ONE_BLOCK)
    compiled = []
    for block in decoder.blocks:
        block.compile(backend=lambda graph, inputs: compiled.append(graph) or graph.forward)
    tokens_BT = random_tokens(ONE_BLOCK, 1, 4)
    with torch.no_grad():
        decoder(tokens_BT, cache=DecoderCache(ONE_BLOCK, 1, 4))
        assert not compiled
        decoder(tokens_BT)
        assert compiled


def test_more_tokens_than_the_context_are_refused_with_both_numbers():
    decoder = random_decoder(ModelConfig(vocab_size=20, max_position_embeddings=8))
    with pytest.raises(ValueError, match="9 tokens exceed the model's max_position_embeddings of 8"):
        decoder(torch.zeros(1, 9, dtype=torch.long))
