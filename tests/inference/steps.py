"""Steps over pages, planned by hand."""

from __future__ import annotations

import torch

from bessemer.inference.execution.backend import Backend
from bessemer.inference.execution.batch import Batch
from bessemer.inference.execution.compiled_steps import CompiledSteps
from bessemer.inference.execution.flex_attention import FlexPagesAttention
from bessemer.inference.execution.kv_cache import PagedMemory, layer_groups
from bessemer.inference.execution.linear import DequantisedWeights, OwnWeights, PackedCodes, StepsCodes
from bessemer.inference.execution.paged_attention import CompiledAttention, GatheredAttention
from bessemer.inference.execution.runner import Runner
from bessemer.model.quantisation.quantised_layers import is_quantised

BLOCK = 8


def by_modules(
    decoder, memory, *, packed=None, bits=8, decoded=None, release=False, compiled=False, flex=None, static=None, **how
):
    """A runner through the model's modules. packed: threads that multiply packed codes, with activations of so many bits;
    decoded: the type of weights that are dequantised once. compiled, flex: the attention. static: steps on static tensors."""
    linear = OwnWeights()
    if packed and is_quantised(decoder):
        linear = PackedCodes(decoder, packed, activation_bits=bits, release=release)
    elif decoded:
        linear = DequantisedWeights(decoder, decoded)
    if flex is not None:
        attention = FlexPagesAttention(memory, flex, decoder.dtype)
    elif compiled:
        attention = CompiledAttention(memory, torch.get_num_threads(), decoder.dtype)
    else:
        attention = GatheredAttention(memory, decoder.dtype)
    return Runner(decoder, memory, Backend(linear, attention, static), **how)


def by_kernels(decoder, memory, *, threads=1, bits=8, release=False):
    """A runner whose steps are single calls of the compiled kernels, with activations of so many bits where they meet codes."""
    steps = CompiledSteps(decoder, memory, threads, activation_bits=bits, release=release)
    attention = CompiledAttention(memory, torch.get_num_threads(), decoder.dtype)
    return Runner(decoder, memory, Backend(StepsCodes(steps), attention, steps))


class Steps:
    """Texts that grow in pages handed out in a mixed order."""

    def __init__(self, decoder, make_runner=by_modules, dtype=torch.float32, kept_steps=0, slots=6, **layout):
        self.decoder = decoder
        groups = len(layer_groups(decoder.config))
        self.memory = PagedMemory(
            decoder.config, [160] * groups, BLOCK, dtype, state_slots=slots, kept_steps=kept_steps, **layout
        )
        self.runner = make_runner(decoder, self.memory)
        self.free = [[(block * 7) % 160 for block in range(160)] for _ in range(groups)]
        self.tables = {}
        self.wanted = None  # every row's logits

    def __call__(self, *works, drafts=None, prompt=1000):
        """Compute (text, row of tokens, from, to) of each; the logits of every token, or of the wanted rows in one."""
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
            list(range(len(tokens))) if self.wanted is None else self.wanted,
            drafts or [0] * len(works),
            [prompt] * len(works),
            [None] * len(works),
        )
        logits = self.runner.forward(batch)
        return [logits] if self.wanted is not None else logits.split([end - start for _, _, start, end in works])


def mixed_steps(steps, rows):
    """Three texts of 60 tokens in steps that mix whole prompts, chunks and single tokens; the logits of each text so far."""
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
    return {text: torch.cat(parts) for text, parts in seen.items()}


def short_texts(steps, rows_RT):
    """The logits of texts of 8 tokens, all texts side by side: 5 tokens at once, 3 one by one."""
    seen = [steps(*[(text, row, *span) for text, row in enumerate(rows_RT)]) for span in ((0, 5), (5, 6), (6, 7), (7, 8))]
    return torch.stack([torch.cat(parts) for parts in zip(*seen, strict=True)])
