"""Paged attention in place by the kernels of FlashAttention (Dao 2023) and FlashInfer (Ye et al. 2025), where installed.

Both read a sequence's pages by a block table, for batches in which every sequence has its own number of new tokens. Their
causal mask is aligned to the last query and the last key, so of a layer with a window the pages before it are left out of the
table, and nothing else changes.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from bessemer.inference.execution.batch import Batch, StepInputs
from bessemer.inference.execution.kv_cache import PagedMemory, Pages, name_of_page_type
from bessemer.inference.execution.paged_attention import GatheredBatch, PagedBatch
from bessemer.model.config import ModelConfig
from bessemer.model.layers.attention_backends import Scores
from bessemer.model.layers.cache import AttentionInputs

# Shapes: S sequences, N new tokens, T new tokens of each sequence, H query heads, K key-value heads, C channels, P pages, M
# positions of a page, W pages of the longest sequence.

#: What reads pages in place besides FlexAttention.
PageLibrary = Literal["flash", "flashinfer"]

#: The Python packages.
_PACKAGES = {"flash": "flash_attn", "flashinfer": "flashinfer"}
#: Positions of a page that FlashAttention 2 reads: a multiple of these.
FLASH_BLOCK = 256
#: The widest head of FlashAttention 2, and what widths are multiples of; the widths that FlashInfer has kernels for.
_WIDEST_HEAD, _HEAD_STEP = 256, 8
_FLASHINFER_HEADS = (64, 128, 256)
#: Memory in which FlashInfer's kernels exchange partial sums, bytes.
_WORKSPACE = 128 << 20


def is_installed(library: PageLibrary) -> bool:
    """Whether the library's package can be imported."""
    return importlib.util.find_spec(_PACKAGES[library]) is not None


def cannot_read(
    library: PageLibrary, config: ModelConfig, block_size: int, dtype: torch.dtype, device: torch.device
) -> str | None:
    """Why a library's kernels cannot read a model's pages of a type; None where they can."""
    name = {"flash": "FlashAttention", "flashinfer": "FlashInfer"}[library]
    if device.type != "cuda":
        return f"{name} is for cuda, not for {device.type}"
    if not is_installed(library):
        return f"{name} is not installed: pip install {_PACKAGES[library].replace('_', '-')}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"{name} reads a KV cache in bfloat16 and float16, not in {name_of_page_type(dtype)}"
    if config.is_latent:
        return f"{name} reads keys and values of one width, and latent attention has two"
    if library == "flashinfer":
        if config.head_dim not in _FLASHINFER_HEADS:
            return f"{name} has kernels for heads of 64, 128 and 256 channels, not of {config.head_dim}"
        return f"{name} has no slopes of ALiBi of one's own" if config.position_type == "alibi" else None
    if config.head_dim > _WIDEST_HEAD or config.head_dim % _HEAD_STEP:
        return f"{name} reads heads of up to {_WIDEST_HEAD} channels, a multiple of {_HEAD_STEP}, not of {config.head_dim}"
    return f"{name} reads KV blocks of {FLASH_BLOCK}, 512, … tokens, not of {block_size}" if block_size % FLASH_BLOCK else None


class PageSpans(NamedTuple):
    """What the sequences of a batch attend to in one group of layers.

    starts: the first row of each sequence, and the end. lengths: the positions that each sees in its listed pages. pages: of
    each, in order. Tensors are int32 on the device: starts_S1, lengths_S, ends_S1 the cumulated lengths, tables_SW the pages,
    padded. each: new tokens of every sequence, where all have as many. longest: most positions that any sequence sees.
    """

    starts: Sequence[int]
    lengths: Sequence[int]
    pages: Sequence[Sequence[int]]
    starts_S1: Tensor
    lengths_S: Tensor
    ends_S1: Tensor
    tables_SW: Tensor
    each: int | None
    longest: int


#: Attention of one layer: queries (N, H, C) over a layer's pages, (N, H, C).
SpanAttention = Callable[[Tensor, Pages, Scores], Tensor]


class PageKernel(Protocol):
    """A library's kernels for one model's pages."""

    #: How it computes, in words.
    described: str
    #: Whether a CUDA graph can repeat it: it reads nothing on the host.
    static: bool

    def prepared(self, spans: PageSpans, window: int | None, slopes_H: Tensor | None) -> SpanAttention:
        """The attention of one group of layers for one step."""


class FlashKernel:
    """FlashAttention 2: `flash_attn_with_kvcache` where every sequence has as many new tokens, which splits long texts among
    processors, and `flash_attn_varlen_func` elsewhere."""

    described = "attention over KV blocks by FlashAttention"
    static = True

    def __init__(self) -> None:
        from flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache

        self._of_any = flash_attn_varlen_func
        self._of_as_many = flash_attn_with_kvcache

    def prepared(self, spans: PageSpans, window: int | None, slopes_H: Tensor | None) -> SpanAttention:
        """As of `PageKernel`."""
        common: dict[str, Any] = {"causal": True, "alibi_slopes": slopes_H}
        if window is not None:
            common["window_size"] = (window - 1, 0)

        def attend(query_NHC: Tensor, pages: Pages, scores: Scores) -> Tensor:
            # (P, M, K, C): views, since only the channels must lie side by side
            keys_PMKC, values_PMKC = pages.keys.transpose(1, 2), pages.values.transpose(1, 2)
            options = common | {"softmax_scale": scores.scale, "softcap": scores.softcap or 0.0}
            has_sinks = scores.sinks_H is not None
            if spans.each is not None:
                found = self._of_as_many(
                    query_NHC.unflatten(0, (-1, spans.each)),
                    keys_PMKC,
                    values_PMKC,
                    cache_seqlens=spans.lengths_S,
                    block_table=spans.tables_SW,
                    return_softmax_lse=has_sinks,
                    **options,
                )
                attended_STHC, *rest = found if has_sinks else (found,)
                # (S, H, T) to (N, H)
                logs = rest[0].transpose(1, 2).flatten(0, 1) if has_sinks else None
                return with_sinks(attended_STHC.flatten(0, 1), logs, scores.sinks_H)
            found = self._of_any(
                query_NHC,
                keys_PMKC,
                values_PMKC,
                cu_seqlens_q=spans.starts_S1,
                cu_seqlens_k=spans.ends_S1,
                max_seqlen_q=max(end - start for start, end in zip(spans.starts, spans.starts[1:], strict=False)),
                max_seqlen_k=spans.longest,
                block_table=spans.tables_SW,
                return_attn_probs=has_sinks,
                **options,
            )
            attended_NHC, *rest = found if has_sinks else (found,)
            return with_sinks(attended_NHC, rest[0].T if has_sinks else None, scores.sinks_H)

        return attend


def with_sinks(attended_NHC: Tensor, logs_NH: Tensor | None, sinks_H: Tensor | None) -> Tensor:
    """Attention in which a sink of each head takes part: with the log ℓ of the softmax's sum, weights shrink by σ(ℓ − sink).

    logs_NH: natural logarithms; None where there are no sinks.
    """
    if logs_NH is None or sinks_H is None:
        return attended_NHC
    return attended_NHC * torch.sigmoid(logs_NH - sinks_H).to(attended_NHC.dtype)[..., None]


class FlashInferKernel:
    """FlashInfer's prefill kernels over pages, for new tokens of any number; a step is planned once for all layers of a group
    that scale alike."""

    described = "attention over KV blocks by FlashInfer"
    # its plan is made on the host, of the step's own lengths
    static = False

    def __init__(self, memory: PagedMemory) -> None:
        from flashinfer import BatchPrefillWithPagedKVCacheWrapper

        self._memory = memory
        self._new_wrapper = BatchPrefillWithPagedKVCacheWrapper
        self._workspace = torch.empty(_WORKSPACE, dtype=torch.uint8, device=memory.device)
        #: By window, scale and cap: a plan lies in its wrapper until the next step's.
        self._wrappers: dict[tuple[int | None, float, float | None], Any] = {}

    def prepared(self, spans: PageSpans, window: int | None, slopes_H: Tensor | None) -> SpanAttention:
        """As of `PageKernel`."""
        assert slopes_H is None, "ask cannot_read first"
        planned: dict[tuple[int | None, float, float | None], Any] = {}

        def attend(query_NHC: Tensor, pages: Pages, scores: Scores) -> Tensor:
            key = (window, scores.scale, scores.softcap)
            if key not in planned:
                planned[key] = self._planned(key, spans, query_NHC)
            has_sinks = scores.sinks_H is not None
            found = planned[key].run(query_NHC.contiguous(), (pages.keys, pages.values), return_lse=has_sinks)
            attended_NHC, *rest = found if has_sinks else (found,)
            # its logarithms are of base 2
            return with_sinks(attended_NHC, rest[0] * math.log(2) if has_sinks else None, scores.sinks_H)

        return attend

    def _planned(self, key: tuple[int | None, float, float | None], spans: PageSpans, query_NHC: Tensor) -> Any:
        window, scale, softcap = key
        if key not in self._wrappers:
            self._wrappers[key] = self._new_wrapper(self._workspace, "HND")
        wrapper, size = self._wrappers[key], self._memory.block_size
        wrapper.plan(
            torch.tensor(spans.starts, dtype=torch.int32),
            torch.tensor([0, *accumulate(map(len, spans.pages))], dtype=torch.int32),
            torch.tensor([page for row in spans.pages for page in row], dtype=torch.int32),
            torch.tensor([(length - 1) % size + 1 for length in spans.lengths], dtype=torch.int32),
            query_NHC.shape[1],
            self._memory.shape.heads,
            query_NHC.shape[2],
            size,
            causal=True,
            sm_scale=scale,
            window_left=-1 if window is None else window - 1,
            logits_soft_cap=softcap,
            q_data_type=query_NHC.dtype,
            kv_data_type=self._memory.dtype,
        )
        return wrapper


def page_kernel(library: PageLibrary, memory: PagedMemory) -> PageKernel:
    """A library's kernels for a model's pages; ask `cannot_read` first."""
    return FlashKernel() if library == "flash" else FlashInferKernel(memory)


class KernelPages:
    """Attention of all layers for one step, by a library's kernels."""

    def __init__(
        self, memory: PagedMemory, attentions: Sequence[SpanAttention], writes: Sequence[tuple[Tensor, Tensor]]
    ) -> None:
        """attentions and writes (blocks and places of the new tokens): of each group of layers."""
        self._memory, self._attentions, self._writes = memory, attentions, writes

    def attend(self, layer: int, inputs: AttentionInputs) -> Tensor:
        """Write one layer's new keys and values, and attend, (1, H, N, C)."""
        query_BHTC, key_BKTC, value_BKTC, _, scores, _ = inputs
        index, memory = self._memory.group_of[layer], self._memory
        memory.write(layer, *self._writes[index], key_BKTC[0].transpose(0, 1), value_BKTC[0].transpose(0, 1))
        query_NHC = query_BHTC[0].transpose(0, 1).to(memory.dtype)
        attended_NHC = self._attentions[index](query_NHC, memory.layers[layer], scores)
        return attended_NHC.transpose(0, 1)[None].to(query_BHTC.dtype)


class KernelPagesAttention:
    """A library's kernels read pages where they lie."""

    def __init__(self, memory: PagedMemory, kernel: PageKernel, dtype: torch.dtype) -> None:
        """dtype: the model's."""
        self._memory, self._kernel, self._dtype = memory, kernel, dtype

    @property
    def arithmetic(self) -> Sequence[str]:
        """As of `Attention`."""
        return [self._kernel.described]

    def cache(self, batch: Batch, inputs: StepInputs) -> PagedBatch:
        """As of `Attention`."""
        if batch.seen_until():
            # its kernels are causal
            return GatheredBatch(self._memory, batch, inputs, self._dtype)
        return KernelBatch(self._memory, batch, inputs, self._kernel)

    def static_pages(self, positions_B: Tensor, tables_GBW: Tensor, spare: Sequence[int]) -> KernelPages:
        """As of `StaticAttention`: one new token of each of B sequences."""
        assert self._kernel.static
        memory, size = self._memory, self._memory.block_size
        lengths_B, columns_B1 = (positions_B + 1).to(torch.int32), (positions_B // size)[:, None].long()
        attentions, writes = [], []
        for group, tables_BW in zip(memory.groups, tables_GBW, strict=True):
            # blocks that a window has freed are never read
            tables_BW = tables_BW.clamp(min=0).to(torch.int32)
            spans = PageSpans((), (), (), lengths_B, lengths_B, lengths_B, tables_BW, each=1, longest=memory.longest)
            attentions.append(self._kernel.prepared(spans, group.window, memory.slopes_H))
            writes.append((tables_BW.gather(1, columns_B1)[:, 0].long(), (positions_B % size).long()))
        return KernelPages(memory, attentions, writes)


class KernelBatch(PagedBatch):
    """A batch of any kind, without padding."""

    def __init__(self, memory: PagedMemory, batch: Batch, inputs: StepInputs, kernel: PageKernel) -> None:
        super().__init__(memory, batch, inputs)
        attentions, writes = [], []
        for index, group in enumerate(memory.groups):
            blocks, places = batch.written(index, memory.block_size)
            writes.append((inputs.put(blocks), inputs.put(places)))
            attentions.append(kernel.prepared(_spans(memory, batch, inputs, index), group.window, memory.slopes_H))
        self._pages = KernelPages(memory, attentions, writes)

    def attend(self, layer: int, inputs: AttentionInputs) -> Tensor:
        """As of `Cache`."""
        return self._pages.attend(layer, inputs)


def _spans(memory: PagedMemory, batch: Batch, inputs: StepInputs, index: int) -> PageSpans:
    size, window = memory.block_size, memory.groups[index].window
    lengths, pages = [], []
    for sequence in range(batch.sequences):
        start, end = batch.starts[sequence : sequence + 2]
        first = 0 if window is None else max(0, batch.positions[start] - window + 1) // size
        last = batch.positions[end - 1]
        pages.append(batch.tables[index][sequence][first : last // size + 1])
        lengths.append(last + 1 - first * size)
    width, counts = max(map(len, pages)), {end - start for start, end in zip(batch.starts, batch.starts[1:], strict=False)}

    def put(numbers: Any) -> Tensor:
        return inputs.put(numbers, torch.int32)

    return PageSpans(
        batch.starts,
        lengths,
        pages,
        put(batch.starts),
        put(lengths),
        put([0, *accumulate(lengths)]),
        put([[*row, *[0] * (width - len(row))] for row in pages]),
        each=counts.pop() if len(counts) == 1 else None,
        longest=max(lengths),
    )
