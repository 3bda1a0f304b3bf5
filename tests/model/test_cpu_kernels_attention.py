"""Attention over pages in C++, beside the definition over the same keys and values."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from bessemer.inference.execution.batch import padded_tables
from bessemer.inference.execution.kv_cache import mixing_matrix
from bessemer.model import cpu_kernels as builds
from bessemer.model.cpu_kernels.attention import PAGE_TYPES, PagedSequences, PageTensors, paged_attention, write_pages
from bessemer.model.layers.attention_backends import Scores, explicit
from bessemer.model.layers.attention_mask import attention_mask
from bessemer.model.quantisation.integers import unpack

# Shapes: N new tokens, P blocks, K key-value heads, M positions of a block, H query heads, C channels of a key, V of a value.


@pytest.fixture(scope="module", autouse=True)
def kernels():
    if builds.library() is None:
        assert "no C++ compiler" in builds.unavailable()
        pytest.skip(builds.unavailable())


EIGHTH = Scores(0.125)


@dataclass
class Case:
    """Sequences of some lengths, whose last `new` tokens ask; every key and value lies in a page."""

    lengths: tuple[int, ...] = (1, 37, 300)
    new: tuple[int, ...] = (1, 5, 200)
    heads: int = 6
    kv_heads: int = 2
    key_width: int = 64
    value_width: int = 64
    block_size: int = 16
    dtype: torch.dtype = torch.float32
    shared: bool = False
    window: int | None = None
    scores: Scores = EIGHTH

    def __post_init__(self):
        draw = torch.Generator().manual_seed(0)
        blocks = [-(-length // self.block_size) for length in self.lengths]
        order = torch.randperm(sum(blocks) + 3, generator=torch.Generator().manual_seed(1)).tolist()
        shape = (len(order), self.kv_heads, self.block_size)
        each = 2 if self.dtype == torch.uint8 else 1
        self.tables = [[order.pop() for _ in range(count)] for count in blocks]
        self.keys = torch.zeros(*shape, self.key_width // each, dtype=self.dtype)
        self.values = torch.zeros(*shape, self.value_width // each, dtype=self.dtype)
        if self.shared:
            self.values = self.keys[..., : self.value_width // each]
        self.key_scales = self.value_scales = None
        if self.dtype in (torch.int8, torch.uint8):
            self.key_scales = torch.zeros(shape)
            self.value_scales = self.key_scales if self.shared else torch.zeros(shape)
        self.pages = PageTensors(self.keys, self.values, self.key_scales, self.value_scales)
        self.all_keys, self.all_values, self.queries = [], [], []
        for length, table, new in zip(self.lengths, self.tables, self.new, strict=True):
            key_TKC = torch.randn(length, self.kv_heads, self.key_width, generator=draw)
            value_TKV = torch.randn(length, self.kv_heads, self.value_width, generator=draw)
            self.all_keys.append(key_TKC)
            self.all_values.append(key_TKC[..., : self.value_width] if self.shared else value_TKV)
            self.queries.append(2 * torch.randn(new, self.heads, self.key_width, generator=draw))
            whole = PagedSequences.of([0, length], range(length), *padded_tables([table]))
            write_pages(self.pages, whole, key_TKC, None if self.shared else value_TKV)

    def attended(self, *parts, threads=1) -> list[Tensor]:
        """Of (sequence, first, last of its new tokens) together; all when none is given."""
        parts = parts or tuple((sequence, 0, new) for sequence, new in enumerate(self.new))
        starts, positions = [0], []
        for sequence, first, last in parts:
            before = self.lengths[sequence] - self.new[sequence]
            positions += range(before + first, before + last)
            starts.append(len(positions))
        tables = []
        for sequence, first, _ in parts:
            table = list(self.tables[sequence])
            if self.window is not None:  # blocks that nobody sees any more are gone
                lowest = max(0, self.lengths[sequence] - self.new[sequence] + first - self.window + 1)
                table[: lowest // self.block_size] = [-1] * (lowest // self.block_size)
            tables.append(table)
        queries_NHC = torch.cat([self.queries[sequence][first:last] for sequence, first, last in parts])
        batch = PagedSequences.of(starts, positions, *padded_tables(tables))
        found_NHV = paged_attention(queries_NHC, self.pages, batch, self.scores, self.window, threads)
        return list(found_NHV.split([last - first for _, first, last in parts]))

    def expected(self) -> list[Tensor]:
        found = []
        for length, new, query_NHC, key_TKC, value_TKV in zip(
            self.lengths, self.new, self.queries, self.all_keys, self.all_values, strict=True
        ):
            slots_1T = torch.arange(length - new, length)[None]
            mask = attention_mask(
                new, length, torch.float64, torch.device("cpu"), slots_BT=slots_1T, window=self.window, aligned=False
            )
            heads = [part.double().transpose(0, 1)[None] for part in (query_NHC, key_TKC, value_TKV)]
            found.append(explicit(*heads, mask, self.scores)[0].transpose(0, 1))
        return found


def assert_near(case, tolerance):
    for found, expected in zip(case.attended(threads=2), case.expected(), strict=True):
        assert (found - expected).abs().max() < tolerance * expected.abs().max()


VARIANTS = {
    "groups": {},
    "one key head": {"kv_heads": 1},
    "as many key heads": {"kv_heads": 6},
    "more query heads than fit together": {"heads": 100, "kv_heads": 1},
    "narrow heads": {"key_width": 4, "value_width": 4, "scores": Scores(0.5)},
    "odd widths": {"key_width": 24, "value_width": 40},
    "wide heads": {"key_width": 256, "value_width": 256},
    "window": {"window": 20},
    "window over a segment": {"window": 150},
    "softcap": {"scores": Scores(0.125, softcap=3.0)},
    "sinks": {"scores": Scores(0.125, sinks_H=torch.linspace(-3, 6, 6))},
    "latent": {"heads": 6, "kv_heads": 1, "key_width": 72, "value_width": 64, "shared": True},
    "small blocks": {"block_size": 4},
    "large blocks": {"block_size": 64},
    "blocks that are no power of two": {"block_size": 24},
}


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
def test_attention_over_pages_is_the_definition(variant):
    assert_near(Case(**variant), 3e-6)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float16, 1e-3), (torch.bfloat16, 1e-2), (torch.int8, 2e-2), (torch.uint8, 0.4)]
)
def test_narrow_pages_are_read_as_what_they_hold(dtype, tolerance, shared):
    assert_near(Case(dtype=dtype, kv_heads=1, key_width=72, shared=shared), tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_keys_and_values_are_rounded_as_pytorch_rounds(dtype):
    case = Case(dtype=dtype, key_width=24)
    for sequence, length in enumerate(case.lengths):
        blocks, places = torch.tensor(case.tables[sequence]), torch.arange(length)
        where = blocks[places // case.block_size], slice(None), places % case.block_size
        assert torch.equal(case.keys[where], case.all_keys[sequence].to(dtype))
        assert torch.equal(case.values[where], case.all_values[sequence].to(dtype))


def test_int8_pages_hold_each_head_within_half_a_step():
    case = Case(dtype=torch.int8)
    blocks, places = torch.tensor(case.tables[2]), torch.arange(300)
    where = blocks[places // case.block_size], slice(None), places % case.block_size
    scales_TK = case.key_scales[where]
    assert torch.allclose(scales_TK, case.all_keys[2].abs().amax(-1) / 127)
    error_TKC = (case.keys[where] * scales_TK[..., None] - case.all_keys[2]).abs()
    assert (error_TKC <= scales_TK[..., None] * 0.501).all()


@pytest.mark.parametrize("name", ["groups", "odd widths", "latent", "narrow heads", "window", "sinks"])
def test_int4_pages_hold_mixed_channels_in_16_steps_and_attention_reads_what_they_hold(name):
    case = Case(dtype=torch.uint8, **VARIANTS[name])
    both = case.key_width | case.value_width
    matrix = mixing_matrix(both & -both)
    torch.testing.assert_close(matrix @ matrix, torch.eye(len(matrix)))

    def mixed(heads):
        return (heads.unflatten(-1, (-1, len(matrix))) @ matrix).flatten(-2)

    for sequence, length in enumerate(case.lengths):
        blocks, places = torch.tensor(case.tables[sequence]), torch.arange(length)
        where = blocks[places // case.block_size], slice(None), places % case.block_size
        for pages, scales, given in (
            (case.keys, case.key_scales, case.all_keys),
            (case.values, case.value_scales, case.all_values),
        ):
            scale = scales[where][..., None]
            held = (unpack(pages[where].contiguous()).float() - 8) * scale
            if not (case.shared and given is case.all_values):
                wide = mixed(given[sequence])
                torch.testing.assert_close(scale.abs()[..., 0], wide.abs().amax(-1) / 8)
                # the step beyond 7 is the one that is not there
                assert ((held - wide).abs() <= scale.abs() * 1.001).all()
                assert ((held - wide).abs() <= scale.abs() * 0.501).float().mean() > 0.9
            given[sequence] = mixed(held)
    assert_near(case, 1e-5)


@pytest.mark.parametrize("variant", ["groups", "window", "sinks", "latent", "softcap", "odd widths"])
def test_a_row_has_the_same_bits_alone_and_in_company(variant):
    case = Case(**VARIANTS[variant])
    together = case.attended()[2]
    chunks = [(0, 1), (1, 2), (2, 30), (30, 131), (131, 200)]
    alone = [case.attended((2, first, last))[0] for first, last in chunks]
    assert torch.equal(torch.cat(alone), together)
    mixed = case.attended((1, 0, 5), (2, 150, 151), (0, 0, 1))
    assert torch.equal(mixed[1], together[150:151])


@pytest.mark.parametrize("block_size", [4, 16, 24, 512])
def test_a_row_has_the_same_bits_in_blocks_of_any_size(block_size):
    first, other = Case(block_size=8), Case(block_size=block_size)
    assert all(torch.equal(one, two) for one, two in zip(first.attended(), other.attended(), strict=True))


@pytest.mark.parametrize("new", [(1, 1, 1), (1, 5, 200)])
def test_a_row_has_the_same_bits_with_any_number_of_threads(new):
    case = Case(lengths=(1, 37, 1000), new=new)
    alone, *others = (case.attended(threads=threads) for threads in (1, 2, 5))
    assert all(torch.equal(one, two) for other in others for one, two in zip(alone, other, strict=True))


@pytest.mark.parametrize("dtype", PAGE_TYPES, ids=str)
def test_another_arithmetic_gives_the_same_bits(dtype, compute_elsewhere):
    here = Case(dtype=dtype, scores=Scores(0.125, softcap=9.0)).attended()
    compute_elsewhere()
    there = Case(dtype=dtype, scores=Scores(0.125, softcap=9.0)).attended()
    assert all(torch.equal(one, two) for one, two in zip(here, there, strict=True))


def test_what_lies_beyond_a_sequence_is_never_read():
    case = Case()
    before = case.attended()
    for sequence, length in enumerate(case.lengths):
        case.keys[case.tables[sequence][-1], :, length % case.block_size or case.block_size :] = torch.nan
        case.values[case.tables[sequence][-1], :, length % case.block_size or case.block_size :] = torch.nan
    assert all(torch.equal(one, two) for one, two in zip(before, case.attended(), strict=True))


def test_a_position_or_a_page_that_is_not_there_is_an_error():
    case = Case(lengths=(20,), new=(20,))
    query, key, value = case.queries[0], case.all_keys[0], case.all_values[0]
    for positions, table, message in (
        (range(20, 40), [0, 1], "position 32 of row 12 is beyond the 2 pages of its table"),
        (range(20), [0, len(case.keys)], "is none of the"),
    ):
        batch = PagedSequences.of([0, 20], positions, *padded_tables([table]))
        with pytest.raises(ValueError, match=message):
            write_pages(case.pages, batch, key, value)
        with pytest.raises(ValueError, match=message):
            paged_attention(query, case.pages, batch, EIGHTH)
    with pytest.raises(ValueError, match="do not fit 20 rows"):
        paged_attention(query[:3], case.pages, batch, EIGHTH)
