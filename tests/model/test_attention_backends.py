import resource
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bessemer.model.attention_backends import BACKENDS, Scores, explicit, tiled
from bessemer.model.attention_mask import AttentionMask, alibi_slopes, attention_mask

HEADS, KEY_VALUE_HEADS, CHANNELS = 4, 2, 8


def heads(count, length, seed, rows=2, channels=CHANNELS):
    return torch.randn(rows, count, length, channels, generator=torch.Generator().manual_seed(seed))


@st.composite
def situations(draw):
    """Lengths, and one of the ways in which queries and keys can stand to each other."""
    keys = draw(st.integers(1, 40))
    queries = draw(st.integers(1, keys))
    kind = draw(st.sampled_from(["causal", "ragged", "documents"]))
    slots_BT, documents_BT, aligned = None, None, True
    if kind == "causal":
        slots_BT = (torch.arange(queries) + keys - queries).expand(2, queries)
    elif kind == "ragged":
        starts = torch.tensor([draw(st.integers(0, keys - queries)), keys - queries])
        slots_BT, aligned = torch.arange(queries) + starts[:, None], False
    else:
        queries = keys
        documents_BT = torch.tensor([sorted(draw(st.lists(st.integers(0, 3), min_size=keys, max_size=keys))) for _ in "ab"])
    mask = attention_mask(
        queries,
        keys,
        torch.float32,
        torch.device("cpu"),
        slots_BT=slots_BT,
        documents_BT=documents_BT,
        window=draw(st.none() | st.integers(1, 12)),
        slopes_H=draw(st.sampled_from([None, alibi_slopes(HEADS)])),
        aligned=aligned,
    )
    sinks_H = draw(st.sampled_from([None, torch.linspace(-1, 2, HEADS)]))
    return queries, keys, mask, Scores(0.3, draw(st.sampled_from([None, 1.5])), sinks_H)


@settings(max_examples=120, deadline=None)
@given(situation=situations(), tile=st.integers(1, 9))
def test_every_backend_gives_what_the_definition_gives(situation, tile):
    queries, keys, mask, scores = situation
    query, key, value = heads(HEADS, queries, 1), heads(KEY_VALUE_HEADS, keys, 2), heads(KEY_VALUE_HEADS, keys, 3, channels=5)
    expected = explicit(query, key, value, mask, scores)
    assert (BACKENDS["sdpa"](query, key, value, mask, scores) - expected).abs().max() < 1e-5
    assert (tiled(query, key, value, mask._replace(dense=None), scores, tile) - expected).abs().max() < 1e-5


def test_the_definition_worked_by_hand():
    query, key = torch.tensor([[[[0.0], [1.0]]]]), torch.tensor([[[[0.0], [2.0]]]])
    value = torch.tensor([[[[10.0], [20.0]]]])
    attended = explicit(query, key, value, AttentionMask(), Scores(0.5))
    share = torch.tensor(1.0).sigmoid()  # of two scores that are 1 apart
    assert attended.flatten().tolist() == pytest.approx([10.0, (10 * (1 - share) + 20 * share).item()])
    sunk = explicit(query, key, value, AttentionMask(), Scores(0.5, sinks_H=torch.tensor([0.0])))
    assert sunk.flatten()[0].item() == pytest.approx(5.0)  # half of the attention goes to the sink


@settings(max_examples=60, deadline=None)
@given(situation=situations())
def test_blocks_of_queries_give_what_the_definition_gives_with_its_gradients(situation):
    queries, keys, mask, scores = situation
    results = []
    for run in (BACKENDS["blocked"], explicit):
        inputs = [heads(HEADS, queries, 1), heads(KEY_VALUE_HEADS, keys, 2), heads(KEY_VALUE_HEADS, keys, 3, channels=5)]
        attended = run(*(tensor.requires_grad_() for tensor in inputs), mask, scores)
        (attended * heads(HEADS, queries, 9, channels=5)).sum().backward()
        results.append([attended, *(tensor.grad for tensor in inputs)])
    for ours, expected in zip(*results, strict=True):
        assert (ours - expected).abs().max() < 1e-5


@pytest.mark.parametrize("window", [None, 6])
def test_tiles_have_the_gradients_of_the_definition(window):
    mask = attention_mask(20, 20, torch.float32, torch.device("cpu"), window=window)
    results = []
    for run in (lambda *inputs: explicit(*inputs), lambda *inputs: tiled(*inputs, 7)):
        inputs = [heads(count, 20, seed).requires_grad_() for count, seed in ((4, 1), (2, 2), (2, 3))]
        sinks_H = torch.linspace(-1, 1, 4, requires_grad=True)
        (run(*inputs, mask, Scores(0.3, 2.0, sinks_H)) * heads(4, 20, 9)).sum().backward()
        results.append([tensor.grad for tensor in (*inputs, sinks_H)])
    for ours, expected in zip(*reversed(results), strict=True):
        assert (ours - expected).abs().max() < 1e-4


def test_a_window_and_a_document_by_hand():
    mask = attention_mask(4, 4, torch.float32, torch.device("cpu"), documents_BT=torch.tensor([[5, 5, 5, 2]]), window=2)
    assert (mask.dense[0, 0] == 0).int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 1]]


def test_no_mask_is_built_where_plain_causal_attention_does():
    device = torch.device("cpu")
    assert attention_mask(9, 9, torch.float32, device).dense is None
    assert attention_mask(1, 9, torch.float32, device, slots_BT=torch.tensor([[8]])).dense is None
    assert attention_mask(9, 9, torch.float32, device, window=9).dense is None
    assert attention_mask(3, 9, torch.float32, device, slots_BT=torch.tensor([[6, 7, 8]])).dense is not None


def test_alibi_slopes_of_the_paper():
    assert alibi_slopes(8).tolist() == [2.0**-power for power in range(1, 9)]
    assert alibi_slopes(12).tolist()[8:] == pytest.approx([2.0 ** -(0.5 + step) for step in range(4)])


_LONG = """
import resource, sys, torch
from bessemer.model.attention_backends import Scores, tiled
from bessemer.model.attention_mask import AttentionMask
torch.set_num_threads(1)
for length in sys.argv[1:]:
    query = torch.randn(1, 1, int(length), 8)
    with torch.no_grad():
        tiled(query, query, query, AttentionMask(), Scores(0.3))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.parametrize("longest", [8192, pytest.param(32768, marks=pytest.mark.slow)])
def test_a_long_text_in_tiles_needs_no_more_memory_than_a_short_one(longest):
    """All scores of 32,768 tokens at once would be 4 GiB, of 8,192 256 MiB; the tiles are 1 MiB each."""
    finished = subprocess.run([sys.executable, "-c", _LONG, "1024", str(longest)], capture_output=True, text=True, check=True)
    short, long = (int(peak) * resource.getpagesize() // 4096 for peak in finished.stdout.split())
    assert long - short < 100_000  # KiB
