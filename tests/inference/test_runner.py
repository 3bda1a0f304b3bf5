"""Steps over pages, planned by hand, beside the decoder that reads each text at once."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from bessemer.inference.execution.kv_cache import PagedMemory, block_bytes, layer_groups
from bessemer.inference.execution.paged_attention import CompiledAttention
from bessemer.model.cpu_kernels import unavailable
from tests.cases import in_turn
from tests.inference.models import ARCHITECTURES, small_decoder
from tests.inference.steps import BLOCK, Steps, by_modules, mixed_steps
from tests.model.randomised import random_tokens

runners = {invariant: partial(by_modules, batch_invariant=invariant) for invariant in (False, True)}


@pytest.mark.parametrize(("name", "invariant"), in_turn(ARCHITECTURES, [False, True]))
def test_texts_in_pages_equal_each_read_at_once(name, invariant):
    decoder = small_decoder(name)
    rows = random_tokens(decoder.config, 3, 60)
    with torch.no_grad():
        for text, logits in mixed_steps(Steps(decoder, runners[invariant]), rows).items():
            assert (logits - decoder(rows[text : text + 1, : len(logits)])[0]).abs().max() < 2e-4


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_invariant_runner_gives_the_same_bits_in_any_company(name):
    decoder = small_decoder(name)
    rows = random_tokens(decoder.config, 2, 40)
    alone, together = Steps(decoder, runners[True]), Steps(decoder, runners[True])
    expected = torch.cat([alone((0, rows[0], 0, 40))[0]])
    found = [together((1, rows[1], 0, 24), (0, rows[0], 0, 16))[1]]
    found += [together((0, rows[0], 16, 32), (1, rows[1], 24, 40))[0]]
    found += [together((0, rows[0], 32, 40))[0]]
    assert torch.equal(torch.cat(found), expected)


@pytest.mark.parametrize("invariant", [False, True])
def test_states_go_back_to_the_last_token_that_stays(invariant):
    decoder = small_decoder("linear")
    rows = random_tokens(decoder.config, 2, 30)
    steps = Steps(decoder, runners[invariant], kept_steps=4)
    steps((0, rows[0], 0, 12))
    wrong = torch.cat((rows[0, :14], rows[1, 14:17]))
    steps((0, wrong, 12, 17), drafts=[4], prompt=12)  # of four guesses one was right
    steps.runner.keep_states([(0, 2)])
    logits = steps((0, rows[0], 14, 30))[0]
    with torch.no_grad():
        assert (logits - decoder(rows[:1])[0, 14:]).abs().max() < 2e-4


@pytest.mark.parametrize("name", ["dense", "latent"])
@pytest.mark.parametrize(
    ("dtype", "error"), [(torch.float16, 0.02), (torch.bfloat16, 0.15), (torch.int8, 0.15), (torch.uint8, 2.0)]
)
def test_narrow_pages_are_near_wide_ones(name, dtype, error):
    decoder = small_decoder(name)
    rows = random_tokens(decoder.config, 1, 40)
    steps = Steps(decoder, dtype=dtype)
    logits = torch.cat([steps((0, rows[0], 0, 20))[0], steps((0, rows[0], 20, 40))[0]])
    with torch.no_grad():
        assert 0 < (logits - decoder(rows)[0]).abs().max() < error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.uint8])
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
    steps.runner.copy_blocks(copies)
    first, second = steps((0, rows[0], 11, 12), (1, rows[0], 11, 12))
    assert torch.allclose(first, second, atol=1e-6)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "linear"])
def test_what_others_left_in_pages_never_shows(name, compiled):
    decoder = small_decoder(name)
    if compiled and not CompiledAttention.supports(decoder):
        pytest.skip(unavailable() or "not an attention that is compiled")
    rows = random_tokens(decoder.config, 2, 40)
    logits = []
    for left in (0.0, torch.nan):
        steps = Steps(decoder)
        steps.runner = by_modules(decoder, steps.memory, compiled=compiled)
        for pages in steps.memory.layers.values():
            pages.keys.fill_(left)
            pages.values.fill_(left)
        steps((0, rows[0], 0, 30), (1, rows[1], 0, 5))
        logits.append(torch.cat(steps((0, rows[0], 30, 31), (1, rows[1], 5, 6))))
    assert torch.equal(*logits)
