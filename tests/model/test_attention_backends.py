import resource
import subprocess
import sys
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention.flex_attention import create_block_mask, create_mask

from bessemer.model import decoder_inputs
from bessemer.model.layers import attention_backends
from bessemer.model.layers.attention_backends import BACKENDS, Scores, block_mask, explicit, flex, tiled
from bessemer.model.layers.attention_mask import AttentionMask, alibi_slopes, attention_mask, bias
from tests.cases import slow
from tests.inference.models import ARCHITECTURES, BASE
from tests.model.randomised import random_decoder, random_tokens

HEADS, KEY_VALUE_HEADS, CHANNELS = 4, 2, 8


def heads(count, length, seed, rows=2, channels=CHANNELS):
    return torch.randn(rows, count, length, channels, generator=torch.Generator().manual_seed(seed))


@st.composite
def situations(draw):
    """Lengths, and one of the ways in which queries and keys can stand to each other."""
    keys = draw(st.integers(1, 40))
    queries = draw(st.integers(1, keys))
    kind = draw(st.sampled_from(["causal", "ragged", "documents", "shared"]))
    slots_BT, documents_BT, visible_to_BT, aligned = None, None, None, True
    if kind == "causal":
        slots_BT = (torch.arange(queries) + keys - queries).expand(2, queries)
    elif kind == "ragged":
        starts = torch.tensor([draw(st.integers(0, keys - queries)), keys - queries])
        slots_BT, aligned = torch.arange(queries) + starts[:, None], False
    else:
        queries = keys
        documents_BT = torch.tensor([sorted(draw(st.lists(st.integers(0, 3), min_size=keys, max_size=keys))) for _ in "ab"])
    if kind == "shared":
        visible_to_BT = documents_BT + torch.tensor(draw(st.lists(st.integers(0, 2), min_size=keys, max_size=keys)))
    mask = attention_mask(
        queries,
        keys,
        torch.float32,
        torch.device("cpu"),
        slots_BT=slots_BT,
        documents_BT=documents_BT,
        visible_to_BT=visible_to_BT,
        window=draw(st.none() | st.integers(1, 12)) if visible_to_BT is None else None,
        slopes_H=draw(st.sampled_from([None, alibi_slopes(HEADS)])) if visible_to_BT is None else None,
        aligned=aligned,
    )
    sinks_H = draw(st.sampled_from([None, torch.linspace(-1, 2, HEADS)]))
    return queries, keys, mask, Scores(0.3, draw(st.sampled_from([None, 1.5])), sinks_H)


@settings(max_examples=30, deadline=None)
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


@settings(max_examples=30, deadline=None)
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


CPU = torch.device("cpu")
UNFUSED = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


def masks(length, documents, window):
    """Two rows of packed documents that end at other places, as fields alone."""
    columns_T = torch.arange(length)
    documents_BT = torch.stack((columns_T // 70, columns_T // 111)) if documents else None
    return attention_mask(length, length, torch.float32, CPU, documents_BT=documents_BT, window=window, dense=False)


@settings(max_examples=30, deadline=None)
@given(situation=situations())
def test_a_block_mask_lets_through_what_the_dense_one_does(situation):
    queries, keys, mask, _ = situation
    blocks = block_mask(mask, queries, keys, CPU)
    allowed = create_mask(blocks.mask_mod, blocks.shape[0], 1, queries, keys, device="cpu")
    expected = bias(mask._replace(slopes_H=None), torch.arange(queries), torch.arange(keys)) == 0
    assert torch.equal(allowed, expected.expand_as(allowed))


@pytest.mark.parametrize("documents", [True, False])
@pytest.mark.parametrize("window", [None, 90])
@pytest.mark.parametrize("length", [512, 300])
def test_a_block_mask_lists_the_blocks_in_which_a_score_counts(length, window, documents):
    mask = masks(length, documents, window)
    blocks = block_mask(mask, length, length, CPU)
    allowed = bias(mask, torch.arange(length), torch.arange(length)) == 0
    padded = torch.nn.functional.pad(allowed, (0, -length % 128, 0, -length % 128))
    tiles = padded.unflatten(-1, (-1, 128)).unflatten(-3, (-1, 128)).any(-1).any(-2)
    assert torch.equal(blocks.to_dense().bool(), tiles)
    causal = tiles.shape[-1] * (tiles.shape[-1] + 1) // 2
    assert (tiles.sum((-1, -2)) < causal).all() == (documents or window is not None)


@UNFUSED
@pytest.mark.parametrize(
    "scores", [Scores(0.3), Scores(0.3, 1.5, torch.linspace(-1, 2, HEADS))], ids=["plain", "capped, with sinks"]
)
@pytest.mark.parametrize("slopes_H", [slow(None), alibi_slopes(HEADS)], ids=["", "alibi"])
def test_blocks_made_beforehand_give_what_the_definition_gives(scores, slopes_H):
    mask = masks(200, True, 90)._replace(slopes_H=slopes_H)
    query, key, value = heads(HEADS, 200, 1), heads(KEY_VALUE_HEADS, 200, 2), heads(KEY_VALUE_HEADS, 200, 3, channels=5)
    expected = explicit(query, key, value, mask, scores)
    found = flex(query, key, value, mask._replace(blocks=block_mask(mask, 200, 200, CPU)), scores)
    assert (found - expected).abs().max() < 1e-5


@UNFUSED
def test_queries_that_a_norm_left_in_float32_are_attended_in_the_dtype_of_the_values():
    mask = masks(40, True, None)
    query, key, value = heads(HEADS, 40, 1), heads(KEY_VALUE_HEADS, 40, 2), heads(KEY_VALUE_HEADS, 40, 3).bfloat16()
    found = flex(query, key, value, mask, Scores(0.3))
    assert found.dtype == torch.bfloat16
    assert (found - explicit(query, key, value, mask, Scores(0.3))).abs().max() < 0.05


#: What `graphs` puts another in the place of.
compiled_on_a_gpu = attention_backends._block_mask_maker


@pytest.fixture
def graphs(monkeypatch):
    """FlexAttention compiled as on a GPU, each graph computed as it stands; counts the graphs."""
    torch.compiler.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = cache(lambda: compiled_flex_attention(counter))
    compiled_flex_attention = attention_backends._compiled_flex_attention
    monkeypatch.setattr(attention_backends, "_needs_kernel", lambda device: True)
    monkeypatch.setattr(attention_backends, "_compiled_flex_attention", compiled)
    monkeypatch.setattr(attention_backends, "_block_mask_maker", lambda device: create_block_mask)
    return counter


def attended(rows, length, softcap=None, window=None):
    """By `flex` and by the definition: packed rows of this length."""
    documents_BT = (torch.arange(length) // 9).expand(rows, -1)
    mask = attention_mask(length, length, torch.float32, CPU, documents_BT=documents_BT, window=window, dense=False)
    counts = (HEADS, KEY_VALUE_HEADS, KEY_VALUE_HEADS)
    query, key, value = (heads(count, length, seed, rows) for seed, count in enumerate(counts))
    given = query, key, value, mask._replace(blocks=block_mask(mask, length, length, CPU)), Scores(0.3, softcap)
    return flex(*given), explicit(*given)


def test_twelve_lengths_and_numbers_of_rows_of_a_gpu_take_one_graph(graphs):
    for number in range(12):
        found, expected = attended(3 + number % 3, 130 + 40 * number)
        assert (found - expected).abs().max() < 1e-5
    assert graphs.frame_count == 1


def test_kernels_are_compiled_where_blocks_are_not_as_in_validation(graphs):
    with torch.compiler.set_stance("force_eager"):
        found, expected = attended(2, 40)
    assert graphs.frame_count == 1 and (found - expected).abs().max() < 1e-5


@pytest.mark.slow
def test_masks_are_compiled_where_kernels_are(graphs, monkeypatch):
    torch.compiler.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = attention_backends._compiled_block_mask.__wrapped__(counter)
    monkeypatch.setattr(attention_backends, "_compiled_block_mask", lambda: compiled)
    monkeypatch.setattr(attention_backends, "_block_mask_maker", compiled_on_a_gpu)
    for length in (300, 520):
        documents_BT = (torch.arange(length) // 150).expand(2, -1)
        mask = attention_mask(length, length, torch.float32, CPU, documents_BT=documents_BT, window=140, dense=False)
        found = block_mask(mask, length, length, CPU)
        with monkeypatch.context() as plain:
            plain.setattr(attention_backends, "_needs_kernel", lambda device: False)
            expected = block_mask(mask, length, length, CPU)
        assert torch.equal(found.to_dense(), expected.to_dense())
    assert 1 <= counter.frame_count <= 2


def test_more_kinds_of_attention_than_are_compiled_are_an_error_and_not_attention_without_a_kernel(graphs, monkeypatch):
    monkeypatch.setattr(attention_backends, "_FLEX_KERNELS", 1)
    attended(2, 130)
    with pytest.raises(FailOnRecompileLimitHit):
        attended(2, 130, window=20, softcap=1.5)


@UNFUSED
def test_blocks_are_made_once_for_all_layers_of_a_kind(monkeypatch):
    decoder = random_decoder(BASE.with_changes(**ARCHITECTURES["windows"]))
    tokens_BT = random_tokens(decoder.config, 2, 60)
    packed = {"positions_BT": torch.arange(60).expand(2, -1) % 25, "document_ids_BT": torch.arange(60).expand(2, -1) // 25}
    with torch.no_grad():
        expected = decoder(tokens_BT, **packed)
        made = []
        monkeypatch.setattr(decoder_inputs, "block_mask", lambda *given: made.append(given) or block_mask(*given))
        decoder.set_attention_backend("flex")
        found = decoder(tokens_BT, **packed)
    assert len(made) == 2 < decoder.config.num_hidden_layers
    assert (found - expected).abs().max() < 1e-4


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


def test_documents_that_share_a_beginning_by_hand():
    documents_BT, visible_to_BT = torch.tensor([[1, 1, 1, 2, 2, 3]]), torch.tensor([[2, 2, 1, 2, 2, 3]])
    mask = attention_mask(6, 6, torch.float32, CPU, documents_BT=documents_BT, visible_to_BT=visible_to_BT)
    seen = [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 0, 1, 0, 0],
        [1, 1, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]
    assert (mask.dense[0, 0] == 0).int().tolist() == seen


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
from bessemer.model.layers.attention_backends import Scores, tiled
from bessemer.model.layers.attention_backends import AttentionMask
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
    finished = subprocess.run(
        [sys.executable, "-c", _LONG, "1024", str(longest)], capture_output=True, encoding="utf-8", check=True
    )
    short, long = (int(peak) * resource.getpagesize() // 4096 for peak in finished.stdout.split())
    assert long - short < 100_000  # KiB


@pytest.mark.slow
def test_a_compiled_block_takes_the_blocks_of_every_batch_without_being_compiled_again():
    decoder = random_decoder(BASE.with_changes(**ARCHITECTURES["windows"]))
    tokens_BT = random_tokens(decoder.config, 2, 150)
    columns_BT = torch.arange(150).expand(2, -1)

    def logits(length):
        with torch.no_grad():
            return decoder(tokens_BT, positions_BT=columns_BT % length, document_ids_BT=columns_BT // length)

    expected = [logits(length) for length in (25, 31)]
    decoder.set_attention_backend("flex")
    torch.compiler.reset()
    for block in decoder.blocks:
        block.compile(dynamic=False, fullgraph=True)
    found = [logits(25)]
    with torch.compiler.set_stance("fail_on_recompile"):
        found.append(logits(31))
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() < 1e-4
