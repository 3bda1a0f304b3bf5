"""Whole steps of plain decoders in one call of C++: packed weights, fused parts, one team of threads."""

from __future__ import annotations

import ctypes
import time
import weakref
from array import array
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import accumulate
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

from bessemer.core.environment import usable_cores
from bessemer.inference.execution.backend import StepContext
from bessemer.inference.execution.batch import Batch, padded_tables
from bessemer.inference.execution.kv_cache import PagedMemory
from bessemer.model.cpu_kernels import kernels_arithmetic, library, raise_failure
from bessemer.model.cpu_kernels.attention import pages_fields
from bessemer.model.cpu_kernels.packed_matmuls import describe_codes
from bessemer.model.cpu_kernels.plain_decoder import LayerFields, ModelFields, PlainDecoder, unsupported
from bessemer.model.decoder import Decoder
from bessemer.model.quantisation.quantised_layers import PackedMatmuls, QuantisedLinear

# Shapes: R wanted rows, V vocabulary, K states that are kept, D hidden.

#: Seconds for which each number of threads is tried.
_TRIAL_SECONDS = 0.04


class BatchFields(ctypes.Structure):
    """`struct Batch` of step.h."""

    _fields_ = (
        ("rows", ctypes.c_int64),
        ("sequences", ctypes.c_int64),
        ("tokens", ctypes.c_void_p),
        ("positions", ctypes.c_void_p),
        ("starts", ctypes.c_void_p),
        ("tables", ctypes.c_void_p),
        ("table_widths", ctypes.c_void_p),
        ("wanted", ctypes.c_int64),
        ("wanted_rows", ctypes.c_void_p),
        ("logits", ctypes.c_void_p),
        ("kept_begins", ctypes.c_void_p),
        ("kept_rows", ctypes.c_void_p),
        ("kept_states", ctypes.c_void_p),
        ("given", ctypes.c_void_p),
    )


class GenerationFields(ctypes.Structure):
    """`struct Generation` of step.h."""

    _fields_ = (
        ("steps", ctypes.c_int64),
        ("temperatures", ctypes.c_void_p),
        ("uniforms", ctypes.c_void_p),
        ("tokens", ctypes.c_void_p),
        ("log_probs", ctypes.c_void_p),
    )


class _KernelBatch(NamedTuple):
    """A batch as the kernels read it. memory: keeps alive what the fields point to."""

    fields: BatchFields
    memory: tuple[object, ...]

    @classmethod
    def of(cls, batch: Batch, context: StepContext | None = None) -> _KernelBatch:
        """Its tokens and where their keys lie; nothing is wanted of it yet. context: of a batch with pending tokens."""
        tokens, positions_N, starts = array("i", batch.tokens), array("i", batch.positions), array("q", batch.starts)
        if batch.pending:
            assert context is not None
            for row, place in batch.pending.items():
                tokens[row] = max(0, int(context.sampled_R[place]))
        tables = [padded_tables(group) for group in batch.tables]
        table_addresses = array("Q", [numbers.buffer_info()[0] for numbers, _ in tables])
        widths = array("q", [width for _, width in tables])
        inputs = (tokens, positions_N, starts, table_addresses, widths)
        fields = BatchFields(len(tokens), batch.sequences, *[numbers.buffer_info()[0] for numbers in inputs])
        if not batch.given:
            return cls(fields, (*inputs, tables))
        vectors = [part.vectors_MD.float().contiguous() for part in batch.given]
        addresses = array("Q", bytes(8 * len(tokens)))
        for part, vectors_MD in zip(batch.given, vectors, strict=True):
            assert vectors_MD.device.type == "cpu", vectors_MD.device
            first, stride = vectors_MD.data_ptr(), vectors_MD.shape[1] * vectors_MD.itemsize
            for place, row in enumerate(part.rows):
                addresses[row] = first + place * stride
        fields.given = addresses.buffer_info()[0]
        return cls(fields, (*inputs, tables, vectors, addresses))


class _Kept(NamedTuple):
    """States that a batch keeps, (K, D), ordered by layer and row. begins: the first of each layer. counts: (layer, states)."""

    begins: array[int]
    rows: array[int]
    states_KD: Tensor
    counts: list[tuple[int, int]]

    @classmethod
    def of(cls, states: Mapping[int, Sequence[int]], layers: int, width: int) -> _Kept:
        """Room for the rows of some layers, 0 … `layers`."""
        rows = array("q")
        counts, of_all = [(layer, len(states[layer])) for layer in sorted(states)], [0] * (layers + 1)
        for layer, count in counts:
            rows.extend(states[layer])
            of_all[layer] = count
        return cls(array("q", accumulate(of_all, initial=0)), rows, torch.empty(len(rows), width), counts)

    def by_layer(self) -> dict[int, Tensor]:
        """The states of each layer that has any."""
        ends = accumulate(count for _, count in self.counts)
        return {layer: self.states_KD[end - count : end] for (layer, count), end in zip(self.counts, ends, strict=True)}


class CompiledSteps:
    """A decoder whose weights are packed once. Hidden states, norms and sums are float32; quantised weights are multiplied
    with activations of 8 or 16 bits. A row has the same bits whatever else is in the batch, however its prompt is cut, and with
    any number of threads.

    Not for several threads at once: a step has memory of its own.
    """

    invariant = True
    own_threads = True

    def __init__(
        self,
        model: Decoder,
        memory: PagedMemory,
        threads: int | None = None,
        *,
        activation_bits: int = 8,
        release: bool = False,
    ) -> None:
        """threads: None: measured now. activation_bits: 8 or 16, of those that meet codes. release: the model gives up its own
        codes for the packed ones."""
        assert self.supports(model) is None, self.supports(model)
        self.model = model
        self.memory = memory
        self._pages = {layer: pages_fields(*pages) for layer, pages in memory.layers.items()}
        self._check_mirrors()
        model.reserve_positions(memory.longest)
        self._releases = release
        self._activation_bits = activation_bits
        #: As of `WholeSteps`.
        self.states: dict[int, Tensor] = {}
        self._decoder = self._packed()
        self._end: Callable[[], object] | None = None
        self._begin(threads or 1)
        if threads is None:
            self._begin(self._quickest())

    @staticmethod
    def supports(model: Decoder) -> str | None:
        """Why a model cannot be computed here, in one line; None where it can."""
        return unsupported(model)

    @property
    def arithmetic(self) -> Sequence[str]:
        """How it computes, in words."""
        return [f"compiled kernels ({kernels_arithmetic()})", *describe_codes(self.model, self._activation_bits)]

    def takes(self, batch: Batch) -> Sequence[int]:
        """The sequences without an adapter, and without tokens that the kernels do not know: of pictures whose tokens see each
        other, and such as are turned by positions of three numbers."""
        other = batch.seen_until().keys() | batch.rope.keys()
        return [
            sequence
            for sequence, adapter in enumerate(batch.adapters)
            if adapter is None and not (other and any(row in other for row in range(*batch.starts[sequence : sequence + 2])))
        ]

    @torch.inference_mode()
    def forward(self, batch: Batch, context: StepContext | None = None) -> Tensor:
        """As `Runner.forward`. Nothing is copied: the host's memory is the device's. context: of a batch with pending
        tokens. Raises ValueError for a token, a position or a page that is not there, before anything is
        computed."""
        logits_RV = torch.empty(len(batch.wanted), self.model.config.vocab_size)
        kernel_batch = _KernelBatch.of(batch, context)
        wanted = array("q", batch.wanted)
        fields = kernel_batch.fields
        fields.wanted, fields.wanted_rows, fields.logits = len(wanted), wanted.buffer_info()[0], logits_RV.data_ptr()
        kept = self._keep(batch, fields) if batch.states else None
        failure = self._kernels.bessemer_step_run(self._step, ctypes.byref(fields))
        if failure is not None:
            raise_failure(failure)
        self.states = {} if kept is None else kept.by_layer()
        return logits_RV

    @torch.inference_mode()
    def generate(self, batch: Batch, uniforms_RS: Tensor, temperatures_R: Tensor) -> tuple[Tensor, Tensor]:
        """S tokens of each row, drawn one after the other as `draw_tokens` draws them, int32 (R, S), and their
        log-probabilities, (R, S). Behind a -1 they mean nothing.

        batch: one token of each sequence, with pages for S. uniforms_RS: float64; temperatures_R: float32. Raises as `forward`.
        """
        kernel_batch = _KernelBatch.of(batch)
        tokens_RS, log_probs_RS = torch.empty(uniforms_RS.shape, dtype=torch.int32), torch.empty(uniforms_RS.shape)
        addresses = (tensor.data_ptr() for tensor in (temperatures_R, uniforms_RS, tokens_RS, log_probs_RS))
        generation = GenerationFields(uniforms_RS.shape[1], *addresses)
        raise_failure(
            self._kernels.bessemer_step_generate(self._step, ctypes.byref(kernel_batch.fields), ctypes.byref(generation))
        )
        return tokens_RS, log_probs_RS

    def _keep(self, batch: Batch, fields: BatchFields) -> _Kept:
        """Set the fields for the states that the kernels copy out."""
        config = self.model.config
        kept = _Kept.of(batch.states, config.num_hidden_layers, config.hidden_size)
        fields.kept_begins, fields.kept_rows = kept.begins.buffer_info()[0], kept.rows.buffer_info()[0]
        fields.kept_states = kept.states_KD.data_ptr()
        return kept

    def matmuls(self) -> PackedMatmuls:
        """The packed matmul of every quantised layer, for the same model's own modules."""
        return PackedMatmuls(
            {
                layer: partial(matrix.multiply, threads=self.threads, activation_bits=self._activation_bits)
                for layer, matrix in self._decoder.packed.items()
                if isinstance(layer, QuantisedLinear)
            }
        )

    def weights_changed(self) -> None:
        self._decoder = self._packed()
        self._begin(self.threads)

    def _packed(self) -> PlainDecoder:
        return PlainDecoder(
            self.model,
            self._pages,
            self.memory.group_of,
            activation_bits=self._activation_bits,
            release=self._releases,
        )

    def _begin(self, threads: int) -> None:
        """Compute with this number of threads from now on."""
        kernels = library()
        assert kernels is not None
        self._kernels = kernels
        self.threads = threads
        if self._end is not None:
            self._end()
        self._step = kernels.bessemer_step_new(ctypes.byref(self._decoder.fields), threads)
        self._end = weakref.finalize(self, kernels.bessemer_step_free, self._step)

    def _quickest(self) -> int:
        """The number of threads that decodes one token fastest: another process may use a core, and small models gain from few.

        It is measured with the first block, which no sequence holds yet.
        """
        groups = len(self.memory.groups)
        batch = Batch.empty(groups)
        batch.append_tokens([0], 0, [[0]] * groups, wanted=[0], prompt_length=1)
        threads, best, best_seconds = 1, 1, float("inf")
        while threads <= usable_cores():
            self._begin(threads)
            self.forward(batch)
            trials: list[float] = []
            until = time.perf_counter() + _TRIAL_SECONDS
            while (start := time.perf_counter()) < until or not trials:
                self.forward(batch)
                trials.append(time.perf_counter() - start)
            seconds = median(trials)
            if seconds < best_seconds:
                best, best_seconds = threads, seconds
            elif threads > 2 * best:
                break
            threads = usable_cores() if threads < usable_cores() < 2 * threads else 2 * threads
        for pages in self.memory.layers.values():
            for tensor in pages:
                if tensor is not None:
                    tensor[0] = 0
        return best

    def _check_mirrors(self) -> None:
        kernels = library()
        assert kernels is not None
        sizes = (ctypes.c_int64 * 4)()
        kernels.bessemer_step_sizes(ctypes.byref(sizes))
        mirrors = (ModelFields, LayerFields, BatchFields, GenerationFields)
        assert list(sizes) == [ctypes.sizeof(mirror) for mirror in mirrors], list(sizes)
