"""Steps over pages, planned by hand, beside the decoder that reads each text at once."""

from __future__ import annotations

import pytest
import torch

from bessemer.inference.batch import Batch
from bessemer.inference.module_executor import ModuleExecutor
from bessemer.inference.paged_cache import PagedMemory, block_bytes, layer_groups
from tests.inference.models import ARCHITECTURES, small_decoder
from tests.model.randomised import random_tokens

BLOCK = 8


class Steps:
    """Texts that grow in pages handed out in a mixed order."""

    def __init__(self, decoder, invariant=False, dtype=torch.float32, kept_steps=0):
        self.decoder = decoder
        groups = len(layer_groups(decoder.config))
        self.memory = PagedMemory(decoder.config, [60] * groups, BLOCK, dtype, state_slots=6, kept_steps=kept_steps)
        self.executor = ModuleExecutor(decoder, self.memory, invariant)
        self.free = [[(block * 7) % 60 for block in range(60)] for _ in range(groups)]
        self.tables, self.read = {}, {}

    def __call__(self, *works, drafts=None, prompt=1000):
        """Compute (text, row of tokens, from, to) of each; the logits of every token."""
        tokens, positions, starts = [], [], [0]
        for name, row, start, end in works:
            tables = self.tables.setdefault(name, [[] for _ in self.free])
            for table, free in zip(tables, self.free, strict=True):
                while len(table) * BLOCK < end:
                    table.append(free.pop())
            tokens += row[start:end].tolist()
            positions += range(start, end)
            starts.append(len(tokens))
        tables = [[self.tables[name][group] for name, *_ in works] for group in range(len(self.free))]
        slots = [name for name, *_ in works] if "linear_attention" in self.decoder.config.types else []
        batch = Batch(
            tokens,
            positions,
            starts,
            tables,
            slots,
            list(range(len(tokens))),
            drafts or [0] * len(works),
            [prompt] * len(works),
            [None] * len(works),
        )
        return self.executor.forward(batch).split([end - start for _, _, start, end in works])


@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_texts_in_pages_equal_each_read_at_once(name, invariant):
    decoder = small_decoder(name)
    rows = random_tokens(decoder.config, 3, 60)
    steps = Steps(decoder, invariant)
    seen = {0: [], 1: [], 2: []}
    plan = [
        [(0, 0, 19)],
        [(1, 0, 8), (0, 19, 20)],
        [(0, 20, 21), (2, 0, 33), (1, 8, 24)],
        *[[(0, 21 + step, 22 + step), (1, 24 + step, 25 + step), (2, 33 + step, 34 + step)] for step in range(25)],
    ]
    for works in plan:
        found = steps(*[(text, rows[text], start, end) for text, start, end in works])
        for (text, *_), logits in zip(works, found, strict=True):
            seen[text].append(logits)
    with torch.no_grad():
        for text, parts in seen.items():
            logits = torch.cat(parts)
            assert (logits - decoder(rows[text : text + 1, : len(logits)])[0]).abs().max() < 2e-4


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_invariant_executor_gives_the_same_bits_in_any_company(name):
    decoder = small_decoder(name)
    rows = random_tokens(decoder.config, 2, 40)
    alone, together = Steps(decoder, invariant=True), Steps(decoder, invariant=True)
    expected = torch.cat([alone((0, rows[0], 0, 40))[0]])
    found = [together((1, rows[1], 0, 24), (0, rows[0], 0, 16))[1]]
    found += [together((0, rows[0], 16, 32), (1, rows[1], 24, 40))[0]]
    found += [together((0, rows[0], 32, 40))[0]]
    assert torch.equal(torch.cat(found), expected)


@pytest.mark.parametrize("invariant", [False, True])
def test_states_go_back_to_the_last_token_that_stays(invariant):
    decoder = small_decoder("linear")
    rows = random_tokens(decoder.config, 2, 30)
    steps = Steps(decoder, invariant, kept_steps=4)
    steps((0, rows[0], 0, 12))
    wrong = torch.cat((rows[0, :14], rows[1, 14:17]))
    steps((0, wrong, 12, 17), drafts=[4], prompt=12)  # of four guesses one was right
    steps.executor.keep_states([(0, 2)])
    logits = steps((0, rows[0], 14, 30))[0]
    with torch.no_grad():
        assert (logits - decoder(rows[:1])[0, 14:]).abs().max() < 2e-4


@pytest.mark.parametrize("name", ["dense", "latent"])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float16, 0.02), (torch.bfloat16, 0.15), (torch.int8, 0.15)])
def test_narrow_pages_are_near_wide_ones(name, dtype, error):
    decoder = small_decoder(name)
    rows = random_tokens(decoder.config, 1, 40)
    steps = Steps(decoder, dtype=dtype)
    logits = torch.cat([steps((0, rows[0], 0, 20))[0], steps((0, rows[0], 20, 40))[0]])
    with torch.no_grad():
        assert 0 < (logits - decoder(rows)[0]).abs().max() < error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("name", ["dense", "windows", "latent"])
def test_a_block_takes_the_memory_that_is_counted(name, dtype):
    config = small_decoder(name).config
    groups = layer_groups(config)
    memory = PagedMemory(config, list(range(3, 3 + len(groups))), BLOCK, dtype)
    assert memory.nbytes == sum((3 + index) * block_bytes(config, group, BLOCK, dtype) for index, group in enumerate(groups))


def test_a_copied_block_is_read_as_the_first():
    decoder = small_decoder("windows")
    rows = random_tokens(decoder.config, 1, 12)
    steps = Steps(decoder)
    steps((0, rows[0], 0, 12))
    copies = []
    for group, tables in enumerate(zip(steps.tables[0], steps.free, strict=True)):
        table, free = tables
        steps.tables.setdefault(1, []).append([free.pop() for _ in table])
        copies += [(group, source, target) for source, target in zip(table, steps.tables[1][group], strict=True)]
    steps.executor.copy_blocks(copies)
    first, second = steps((0, rows[0], 11, 12), (1, rows[0], 11, 12))
    assert torch.allclose(first, second, atol=1e-6)
