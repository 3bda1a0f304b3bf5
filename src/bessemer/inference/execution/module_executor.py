"""Executor by the decoder's own modules: every architecture, on any device, and where nothing compiles."""

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

#: Rows up to which one of PyTorch's threads is fastest, where the kernels' threads do the matmuls.
_FEW_ROWS = 64


class ModuleExecutor:
    """The weights are the model's own, so changes by a trainer take effect at once.

    invariant: each sequence is computed alone and in fixed chunks, so that its numbers are the same bits whatever else is in
    the batch. It costs what batching saves. compiled: paged attention by the compiled CPU kernels, where `can_compile`.
    packed: quantised layers use packed matmuls, with activations of 8 bits, on `threads` threads (PyTorch's number when None).
    release: the model gives up its own codes then. decoded: weights of quantised layers are dequantised once, in this type.
    flex: attention that reads pages in place; None: pages are gathered. static: steps in which every sequence has one new
    token run on static tensors, on a GPU as CUDA graphs (`cuda_graphs.py`); not with `invariant`.
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
        self.model = model
        self.memory = memory
        self.invariant = invariant
        #: Whether `pre_norm_ND` is kept.
        self.keeps_pre_norm = False
        #: States of every token of the last batch before the last norm.
        self.pre_norm_ND = torch.empty(0)
        assert not compiled or self.can_compile(model), "ask can_compile first"
        self.packed = packed and is_quantised(model)
        self.own_threads = self.packed
        assert not (packed and decoded), "one way to multiply by codes"
        self._threads = threads or torch.get_num_threads()
        self._releases = release
        self.decoded = decoded
        self._packed_matmuls = self._pack()
        self._compiled = {layer: pages_fields(*pages) for layer, pages in memory.layers.items()} if compiled else None
        assert not (invariant and static) and not (compiled and flex), "one way to compute a step"
        self._flex = flex
        self._static = static

    @staticmethod
    def can_compile(model: Decoder) -> bool:
        """Whether there are compiled CPU kernels that compute the attention of this model."""
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
            # chunks are few rows, and the number of threads may not depend on the batch
            return self.invariant or len(batch.tokens) <= _FEW_ROWS
        # one row meets weights in half precision on one thread anyhow
        return self.decoded == torch.float16 and not self.invariant and len(batch.tokens) == 1

    def _forward(self, batch: Batch) -> Tensor:
        if not self.invariant:
            return self._logits(self._hidden(batch))
        rows, pre_norm_hidden, last, step = [], [], -1, 0
        for sequence, chunk in batch.alone(self.memory.block_size):
            # the head too sees one row at a time
            rows += [self._logits(hidden_D[None]) for hidden_D in self._hidden(chunk)]
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
    def mtp_hidden(self, index: int, batch: Batch, hidden_ND: Tensor) -> Tensor:
        """States of an MTP module, (N, D), from those of the one before it (`Decoder.mtp_hidden`)."""
        tokens_1N = torch.tensor([batch.tokens], device=self.model.device)
        cache = self._cache(batch)
        with using_packed_matmuls(self._packed_matmuls):
            return self.model.mtp_hidden(index, tokens_1N, hidden_ND[None], cache)[0]

    @torch.inference_mode()
    def mtp_logits(self, index: int, hidden_RD: Tensor) -> Tensor:
        """Logits of an MTP module's states, (R, V) float32."""
        return self._logits(cast(MtpModule, self.model.mtp[index]).norm(hidden_RD))

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
        """Pack the codes again, and forget captured steps that read other memory."""
        self._packed_matmuls = self._pack()
        if self._static is not None:
            self._static.weights_changed()

    def _pack(self) -> PackedMatmuls:
        if self.packed:
            return packed_products(self.model, self._threads, release=self._releases)
        return PackedMatmuls({}) if self.decoded is None else decoded_products(self.model, self.decoded)
