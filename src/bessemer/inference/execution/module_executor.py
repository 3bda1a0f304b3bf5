"""Batches through the decoder's own modules: every architecture, on any device, and where nothing compiles."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import cast

import torch
from torch import Tensor

from bessemer.inference.execution.batch import Batch
from bessemer.inference.execution.cuda_graphs import StaticSteps
from bessemer.inference.execution.flex_attention import PageAttention, flex_pages
from bessemer.inference.execution.kv_cache import PagedMemory
from bessemer.inference.execution.paged_attention import PagedBatch
from bessemer.inference.execution.threads import one_thread
from bessemer.model.adapters import adapted
from bessemer.model.cpu_kernels.arithmetic import kernels_arithmetic
from bessemer.model.cpu_kernels.attention import pages_fields
from bessemer.model.cpu_kernels.build import library
from bessemer.model.cpu_kernels.packed_products import packed_products
from bessemer.model.decoded_products import decoded_products
from bessemer.model.decoder import Decoder
from bessemer.model.mtp import MtpModule
from bessemer.model.quantised_linear import PackedMatmuls, is_quantised, using_packed_matmuls

# Shapes: R wanted rows, V vocabulary, D hidden.

#: So few rows are soonest computed by one of PyTorch's threads where those of the kernels do the products.
_FEW_ROWS = 64


class ModuleExecutor:
    """The weights are the model's own, so what a trainer changes is what is sampled from.

    invariant: each sequence is computed alone and in fixed pieces, so that its numbers are the same bits in any company. It
    costs what batching saves. compiled: attention over pages by the compiled kernels, where `can_compile`. packed: quantised
    layers are multiplied by packed codes, with activations of 8 bits, by so many `threads` (PyTorch's number when None).
    release: the model gives up its own codes then. decoded: weights of quantised layers are read out of their codes once, in
    this type. flex: attention that reads pages where they lie; None: pages are gathered. static: steps in which every sequence
    has one new token run on static tensors, on a GPU as CUDA graphs (`static_step.py`); not with `invariant`.
    """

    def __init__(
        self,
        model: Decoder,
        memory: PagedMemory,
        invariant: bool = False,
        compiled: bool = False,
        packed: bool = False,
        threads: int | None = None,
        flex: PageAttention | None = None,
        static: StaticSteps | None = None,
        release: bool = False,
        decoded: torch.dtype | None = None,
    ) -> None:
        self.model, self.memory, self.invariant = model, memory, invariant
        #: Whether the trunk's states of every token of the last batch are wanted: (N, D), before the last norm.
        self.keeps_pre_norm, self.pre_norm_ND = False, torch.empty(0)
        assert not compiled or self.can_compile(model), "ask can_compile first"
        self.packed = self.own_threads = packed and is_quantised(model)
        assert not (packed and decoded), "one way to multiply by codes"
        self._threads, self._releases, self.decoded = threads or torch.get_num_threads(), release, decoded
        self._packed_matmuls = self._pack()
        self._compiled = {layer: pages_fields(*pages) for layer, pages in memory.layers.items()} if compiled else None
        assert not (invariant and static) and not (compiled and flex), "one way to compute a step"
        self._flex, self._static = flex, static

    @staticmethod
    def can_compile(model: Decoder) -> bool:
        """Whether the compiled kernels are there, and compute the attention of this model."""
        fits = model.device.type == "cpu" and model.dtype != torch.float64 and model.config.position_type != "alibi"
        return fits and library() is not None

    @property
    def arithmetic(self) -> str:
        """How it computes, in words."""
        parts = [f"the model's modules in PyTorch ({str(self.model.dtype).removeprefix('torch.')})"]
        if self.decoded is not None:
            parts.append(f"quantised weights read out of their codes once ({str(self.decoded).removeprefix('torch.')})")
        if self.packed:
            parts.append(f"products by compiled kernels ({kernels_arithmetic()}), activations of 8 bits")
        if self._compiled is not None:
            parts.append(f"attention by compiled kernels ({kernels_arithmetic()})")
        return ", ".join([*parts, f"keys and values in {self.memory.type_name}"])

    @torch.inference_mode()
    def forward(self, batch: Batch) -> Tensor:
        if self._static is not None and not self.keeps_pre_norm and self._static.takes(batch):
            return self._static(batch)
        with one_thread() if self._is_soon_done(batch) else nullcontext():
            return self._forward(batch)

    def _is_soon_done(self, batch: Batch) -> bool:
        """Whether PyTorch's part of a step is too little for several threads."""
        if self.packed:
            # pieces are few rows, and the number of threads may not depend on the company
            return self.invariant or len(batch.tokens) <= _FEW_ROWS
        # one row meets weights in half precision on one thread anyhow
        return self.decoded == torch.float16 and not self.invariant and len(batch.tokens) == 1

    def _forward(self, batch: Batch) -> Tensor:
        if not self.invariant:
            return self._logits(self._hidden(batch))
        rows, pre_norm_hidden, last, step = [], [], -1, 0
        for sequence, piece in batch.alone(self.memory.block_size):
            # the head too sees one row at a time
            rows += [self._logits(hidden_D[None]) for hidden_D in self._hidden(piece)]
            pre_norm_hidden.append(self.pre_norm_ND)
            step = step + 1 if sequence == last else 0
            last = sequence
            if batch.drafts[sequence]:
                self.memory.remember_states(batch.slots[sequence] if batch.slots else 0, step)
        if self.keeps_pre_norm:
            self.pre_norm_ND = torch.cat(pre_norm_hidden)
        return torch.cat(rows) if rows else torch.empty(0, self.model.config.vocab_size)

    def _hidden(self, batch: Batch) -> Tensor:
        """States of the wanted rows, (R, D)."""
        device = self.model.device
        tokens_1N = torch.tensor([batch.tokens], device=device)
        cache = self._cache(batch)
        wanted_R = torch.tensor(batch.wanted, dtype=torch.long, device=device)
        rows_of_adapters = [
            (adapter, None if rows is None else torch.tensor(rows, device=device)) for adapter, rows in batch.rows_of_adapters()
        ]
        with adapted(self.model, rows_of_adapters), using_packed_matmuls(self._packed_matmuls):
            pre_norm_ND = self.model.pre_norm_hidden(tokens_1N, cache=cache)[0]
        if self.keeps_pre_norm:
            self.pre_norm_ND = pre_norm_ND
        return self.model.norm(pre_norm_ND[wanted_R])

    @torch.inference_mode()
    def mtp_hidden(self, block: int, batch: Batch, hidden_ND: Tensor) -> Tensor:
        """States of an extra block, (N, D), from those of the one before it (`Decoder.ahead`)."""
        tokens_1N = torch.tensor([batch.tokens], device=self.model.device)
        cache = self._cache(batch)
        with using_packed_matmuls(self._packed_matmuls):
            return self.model.mtp_hidden(block, tokens_1N, hidden_ND[None], cache)[0]

    @torch.inference_mode()
    def mtp_logits(self, block: int, hidden_RD: Tensor) -> Tensor:
        """What an extra block's states score, (R, V) float32."""
        return self._logits(cast(MtpModule, self.model.mtp[block]).norm(hidden_RD))

    def _cache(self, batch: Batch) -> PagedBatch:
        flex = None if self._flex is None else flex_pages(self.memory, batch, self._flex)
        return PagedBatch(self.memory, batch, self.model.dtype, self._compiled, self._threads, flex)

    def _logits(self, hidden_RD: Tensor) -> Tensor:
        with using_packed_matmuls(self._packed_matmuls):
            return self.model.logits(hidden_RD).float()

    def copy_blocks(self, copies: Sequence[tuple[int, int, int]]) -> None:
        self.memory.copy(copies)

    @torch.inference_mode()
    def restore_states(self, restored: Sequence[tuple[int, int]]) -> None:
        self.memory.restore_states(restored)

    @torch.inference_mode()
    def keep_states(self, kept: Sequence[tuple[int, int]]) -> None:
        self.memory.keep_states(kept)

    def weights_changed(self) -> None:
        """Packed codes are those of the old ones, and what was captured reads weights where they lay."""
        self._packed_matmuls = self._pack()
        if self._static is not None:
            self._static.weights_changed()

    def _pack(self) -> PackedMatmuls:
        if self.packed:
            return packed_products(self.model, self._threads, release=self._releases)
        return PackedMatmuls({}) if self.decoded is None else decoded_products(self.model, self.decoded)
