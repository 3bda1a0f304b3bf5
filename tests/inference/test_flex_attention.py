"""Attention over pages where they lie, beside pages that are gathered."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.nn.attention import flex_attention

from bessemer.core.errors import ConfigError
from bessemer.inference.engine import Engine, EngineConfig
from bessemer.inference.execution import build as execution_build
from bessemer.inference.execution.build import page_layout
from bessemer.inference.execution.flex_attention import compiled_page_attention, page_attention, page_mask
from bessemer.inference.execution.kv_cache import PagedMemory
from bessemer.model.layers.attention_backends import Scores
from bessemer.model.layers.attention_mask import alibi_slopes
from tests.cases import slow_but
from tests.inference.listed_attention import listed_attention
from tests.inference.models import ARCHITECTURES, small_decoder, small_tokenizer
from tests.inference.steps import BLOCK, Steps, by_modules, mixed_steps
from tests.inference.test_identity import WAYS, alone, assert_same_but_for_ties
from tests.model.randomised import random_tokens

#: Query heads, key-value heads, channels of keys and of values, and what is done to scores.
KINDS = {
    "grouped heads": (4, 2, 16, 16, {}),
    "one key head, values its first channels": (4, 1, 24, 16, {}),
    "a window": (4, 4, 16, 16, {"window": 11}),
    "a cap": (4, 2, 16, 16, {"softcap": 3.0}),
    "sinks": (4, 2, 16, 16, {"sinks": True}),
    "slopes and a window": (4, 2, 16, 16, {"slopes": True, "window": 11}),
}


def a_batch(kind, queries, dtype=torch.float32):
    """Arguments of a `PageAttention`: three tiles over pages in a mixed order, and one of padding."""
    heads, kv_heads, width, value_width, changes = KINDS[kind]
    generator = torch.Generator().manual_seed(1)
    pages, size, columns = 30, 8, 6
    keys_PKMC = torch.randn(kv_heads, pages, size, width, generator=generator).transpose(0, 1).to(dtype)
    values_PKMV = torch.randn(kv_heads, pages, size, value_width, generator=generator).transpose(0, 1).to(dtype)
    if value_width < width:
        values_PKMV = keys_PKMC[..., :value_width]
    tables_BW = torch.randperm(pages, generator=generator)[: 4 * columns].view(4, columns).int()
    ends_B1 = torch.tensor([[17], [27], [47], [0]])
    positions_BT = ends_B1 - torch.arange(queries).flip(0)
    positions_BT[-1] = -1
    mask = page_mask(tables_BW, positions_BT.clamp(min=-1), changes.get("window"), size, pages)
    scores = Scores(0.3, changes.get("softcap"), torch.linspace(-1, 1, heads) if changes.get("sinks") else None)
    slopes_H = alibi_slopes(heads) if changes.get("slopes") else None
    query_BHTC = torch.randn(4, heads, queries, width, generator=generator).to(dtype)
    return query_BHTC, keys_PKMC, values_PKMV, mask, scores, changes.get("window"), slopes_H


@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_flex_attention_reads_what_the_tables_say(kind, queries, monkeypatch):
    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)  # traced for each shape it takes seconds
    given = a_batch(kind, queries)
    assert torch.allclose(page_attention(*given)[:3], listed_attention(*given)[:3], atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "queries", "dtype"),
    [
        *((kind, queries, torch.float32) for kind in KINDS if kind != "sinks" for queries in (1, 16)),
        ("grouped heads", 1, torch.bfloat16),
        ("grouped heads", 1, torch.float16),
    ],
)
def test_compiled_flex_attention_reads_listed_pages_and_no_others(kind, queries, dtype):
    given = a_batch(kind, queries, dtype)
    with torch.inference_mode():
        expected = listed_attention(*given)[:3]
        listed = {page for tile in range(3) for page in given[3].pages_B11W[tile, 0, 0, : given[3].counts_B11[tile]].tolist()}
        for page in set(range(30)) - listed:
            given[1][page] = given[2][page] = torch.nan
        error = (compiled_page_attention()(*given)[:3] - expected).abs().max()
    assert error < (1e-5 if dtype == torch.float32 else 0.03)


def flex_runner(attention=listed_attention):
    return partial(by_modules, flex=attention)


@pytest.mark.parametrize("name", slow_but(["dense", "windows", "latent", "alibi"], ARCHITECTURES))
def test_pages_read_where_they_lie_equal_gathered_ones(name):
    decoder = small_decoder(name)
    rows = random_tokens(decoder.config, 3, 60)
    gathered = mixed_steps(Steps(decoder), rows)
    for text, logits in mixed_steps(Steps(decoder, flex_runner(), by_head=True), rows).items():
        assert (logits - gathered[text]).abs().max() < 2e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["windows", "latent"])
def test_compiled_steps_equal_those_over_gathered_pages(name):
    decoder = small_decoder(name)
    rows = random_tokens(decoder.config, 3, 60)
    gathered = mixed_steps(Steps(decoder), rows)
    for text, logits in mixed_steps(Steps(decoder, flex_runner(compiled_page_attention()), by_head=True), rows).items():
        assert (logits - gathered[text]).abs().max() < 2e-5


def test_a_piece_longer_than_a_tile_is_read_in_several():
    decoder = small_decoder("windows")
    rows = random_tokens(decoder.config, 2, 150)
    works = (0, rows[0], 0, 140), (1, rows[1], 0, 17)
    for one, other in zip(Steps(decoder, flex_runner(), by_head=True)(*works), Steps(decoder)(*works), strict=True):
        assert (one - other).abs().max() < 2e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_pages_give_nearly_what_wide_ones_do(dtype):
    decoder = small_decoder("dense")
    rows = random_tokens(decoder.config, 1, 40)
    steps = Steps(decoder, flex_runner(), dtype=dtype, by_head=True)
    logits = torch.cat([steps((0, rows[0], 0, 20))[0], steps((0, rows[0], 20, 40))[0]])
    with torch.no_grad():
        assert 0 < (logits - decoder(rows)[0]).abs().max() < 0.15


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_others_left_in_pages_never_shows_where_they_lie(name):
    decoder = small_decoder(name)
    rows = random_tokens(decoder.config, 2, 40)
    logits = []
    for left in (0.0, torch.nan):
        steps = Steps(decoder, flex_runner(), by_head=True)
        for pages in steps.memory.layers.values():
            pages.keys.fill_(left)
            pages.values.fill_(left)
        steps((0, rows[0], 0, 30), (1, rows[1], 0, 5))
        logits.append(torch.cat(steps((0, rows[0], 30, 33), (1, rows[1], 5, 6))))
    assert torch.equal(*logits)


@pytest.mark.parametrize("name", ["windows", "latent"])
def test_a_copied_block_is_read_as_the_first_where_it_lies(name):
    decoder = small_decoder(name)
    memory = PagedMemory(decoder.config, [4] * (2 if name == "windows" else 1), BLOCK, torch.float32, by_head=True)
    for pages in memory.layers.values():
        pages.keys[1], pages.values[1] = 3.0, 3.0
    memory.copy([(0, 1, 2)])
    copied = [memory.layers[layer].keys[2] for layer in memory.groups[0].layers]
    assert all((keys == 3).all() for keys in copied)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return small_tokenizer(tmp_path_factory.mktemp("flex"))


@pytest.mark.parametrize(
    ("name", "way"),
    [
        pytest.param(name, way, marks=[] if (name, way) == ("windows", "from cached pages") else pytest.mark.slow)
        for name in ARCHITECTURES
        for way in WAYS
    ],
)
def test_tokens_over_pages_where_they_lie_are_those_over_gathered_ones_but_for_ties(name, way, tokenizer, monkeypatch):
    monkeypatch.setattr(execution_build, "compiled_page_attention", lambda: listed_attention)
    monkeypatch.setattr(execution_build, "must_gather", lambda *_: None)  # sinks: only the compiler for processors has none
    model = small_decoder(name)
    found, expected = WAYS[way](model, tokenizer, paged_attention="flex"), alone(model, tokenizer)
    for one, other in zip(found, expected, strict=True):
        assert_same_but_for_ties(one, other)


def test_on_a_processor_pages_are_gathered_where_nothing_is_said():
    assert page_layout(small_decoder("dense"), EngineConfig(), torch.float32) == (False, False)


def test_pages_of_integers_are_refused_where_they_are_to_be_read_where_they_lie(tokenizer):
    with pytest.raises(ConfigError, match=r"paged_attention: flex: .* not in int8; use auto or gather"):
        Engine(small_decoder("dense"), tokenizer, config=EngineConfig(paged_attention="flex", kv_cache_dtype="int8"))


def test_sinks_are_refused_on_a_processor_where_pages_are_to_be_read_where_they_lie(tokenizer):
    with pytest.raises(ConfigError, match="attention sinks"):
        Engine(small_decoder("sinks and caps"), tokenizer, config=EngineConfig(paged_attention="flex"))
