"""CUDA graphs of decode steps: one new token of every sequence, on static tensors.

A step of a small model is hundreds of short kernels, which take longer to launch than to run. A CUDA graph launches all at
once, but repeats exactly what was captured: the same kernels, over the same memory, for as many sequences. So a step's
numbers always lie in the same place of its inputs, and the batch is padded to one of a few sizes with rows of no sequence:
they write into a spare page, and their logits are not read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from bessemer.inference.execution.backend import Linear, StatelessCache, StepContext
from bessemer.inference.execution.batch import Batch, StepInputs, fill_pending
from bessemer.inference.execution.kv_cache import PagedMemory
from bessemer.inference.execution.linear import OwnWeights, TritonCodes
from bessemer.model.attention.base import is_recurrent
from bessemer.model.decoder import Decoder
from bessemer.model.layers.cache import AttentionInputs
from bessemer.model.layers.feed_forward import SparseFeedForward
from bessemer.model.quantisation.quantised_layers import QuantisedExperts, using_packed_matmuls

# Shapes: B rows of a size, G groups of layers, W pages of the longest text, V vocabulary.


def sizes_up_to(rows: int) -> list[int]:
    """1, 2, 4, 8, … and the most rows that there can be."""
    return [*(1 << power for power in range((rows - 1).bit_length())), rows]


def cannot_be_static(model: Decoder) -> str | None:
    """Why no step of a model can run on static tensors; None where it can."""
    if is_recurrent(model.config):
        return "linear attention's states are found by numbers on the host"
    if model.config.rope_scaling.rope_type == "dynamic":
        return "with dynamic scaling the rotary angles hang on the longest text"
    if any(isinstance(module, QuantisedExperts) for module in model.modules()):
        if TritonCodes.supports(model):
            return None
        return "quantised experts are computed one by one, as many as are visited"
    # elsewhere the grouped product looks at the groups' sizes on the host
    grouped = model.device.type != "cuda" or (
        model.dtype == torch.bfloat16 and torch.cuda.get_device_capability(model.device) >= (9, 0)
    )
    if not grouped and any(isinstance(module, SparseFeedForward) for module in model.modules()):
        return "experts are computed in groups on the device in bfloat16 only, from compute capability 9 on"
    return None


class CapturedStep(Protocol):
    """A computation from static tensors to a static tensor, to be repeated."""

    def __call__(self) -> Tensor:
        """Compute it again."""


#: Captures a computation as a step; from then on the step is called in its place.
GraphCapture = Callable[[Callable[[], Tensor]], CapturedStep]


class CudaGraphs:
    """Captures steps as CUDA graphs. They share a memory pool, because only one runs at a time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, compute: Callable[[], Tensor]) -> CapturedStep:
        # run twice before the capture, on another stream: first use compiles kernels and allocates memory
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                compute()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # other threads may use the device meanwhile
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            out = compute()

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay


def uncaptured(compute: Callable[[], Tensor]) -> CapturedStep:
    """The computation itself: used where there are no CUDA graphs, and in tests."""
    return compute


class LayerPages(Protocol):
    """Attention of all layers for one step over pages."""

    def attend(self, layer: int, inputs: AttentionInputs) -> Tensor:
        """Write one layer's new keys and values, and attend, (1, H, N, V)."""


class StaticAttention(Protocol):
    """Attention over pages whose numbers are on the device only."""

    def static_pages(self, positions_B: Tensor, tables_GBW: Tensor, spare: Sequence[int]) -> LayerPages:
        """Of one new token of each of B sequences. spare: a page of each group that no sequence holds."""


class _StaticNumbers(NamedTuple):
    """Inputs of a step of B rows, int32: tokens, positions and block tables."""

    tokens_B: Tensor
    positions_B: Tensor
    tables_GBW: Tensor


class StaticSteps:
    """Steps of one new token a sequence, for up to `rows` sequences. All sizes are captured at the first step."""

    arithmetic = None
    own_threads = False
    invariant = False

    def __init__(
        self,
        model: Decoder,
        memory: PagedMemory,
        rows: int,
        attention: StaticAttention,
        capture: GraphCapture = uncaptured,
        linear: Linear | None = None,
    ) -> None:
        """linear: the matmuls of the weights; None: the modules' own."""
        assert memory.has_spare and cannot_be_static(model) is None, "ask cannot_be_static first"
        self.model = model
        self.memory = memory
        self.sizes = sizes_up_to(rows)
        self._attention = attention
        self._capture = capture
        self._linear = linear or OwnWeights()
        #: Those that captured steps compute with.
        self._matmuls = self._linear.matmuls
        self._steps: dict[int, CapturedStep] = {}
        #: As of `WholeSteps`: never any.
        self.states: dict[int, Tensor] = {}
        self._captured_at: list[int] = []
        self._tokens_at = 0
        #: Tables of positions that captured steps read: the model may make longer ones, and these must stay.
        self._tables: list[Tensor] = []
        self._spare = [memory.pages_of(index) - 1 for index in range(len(memory.groups))]

    def takes(self, batch: Batch) -> Sequence[int]:
        """All sequences of such a step: one token each, all of them wanted, and the weights as they are; else none."""
        rows = batch.sequences
        fits = (
            rows == len(batch.tokens) == len(batch.wanted)
            and rows <= self.sizes[-1]
            and not any(batch.drafts)
            and not batch.states
            and not batch.routings
            and not batch.given
            and not batch.rope
            and all(adapter is None for adapter in batch.adapters)
        )
        return range(rows if fits else 0)

    def forward(self, batch: Batch, context: StepContext) -> Tensor:
        """Logits of every sequence, (B, V) float32."""
        inputs = context.inputs
        if not self._steps or self._matmuls is not self._linear.matmuls:
            self._steps.clear()
            self._capture_all(inputs)
        inputs.begin()
        size = next(size for size in self.sizes if size >= batch.sequences)
        numbers = self._put(inputs, size, batch.tokens, batch.positions, batch.tables)
        assert numbers.tokens_B.data_ptr() == self._tokens_at, "a captured step reads where its numbers were"
        pending_2P = inputs.put([[*batch.pending], [*batch.pending.values()]]) if batch.pending else None
        if context.rows is not None:
            context.rows.place(inputs.put)
        inputs.copy()
        fill_pending(numbers.tokens_B, pending_2P, context.sampled_R)
        # a copy, because the next step of this size writes into the same tensor
        return self._steps[size]()[: batch.sequences].to(torch.float32, copy=True)

    def weights_changed(self) -> None:
        """Drop captured steps that read memory which is no longer the weights' or the pages'; changes in place are fine."""
        if self._captured_at != self._addresses():
            self._steps.clear()

    def _addresses(self) -> list[int]:
        pages = [layer.keys.data_ptr() for layer in self.memory.layers.values()]
        return [*(tensor.data_ptr() for tensor in self.model.state_dict().values()), *pages]

    def _capture_all(self, inputs: StepInputs) -> None:
        """Capture all sizes, the largest first: the others reuse its memory."""
        self._matmuls = self._linear.matmuls
        self.model.reserve_positions(self.memory.longest)
        self._tables = [table for name, table in self.model.named_buffers() if name.startswith("rotary")]
        for size in reversed(self.sizes):
            inputs.begin()
            numbers = self._put(inputs, size, [], [], [[] for _ in self.memory.groups])
            inputs.copy()
            self._steps[size] = self._capture(self._computation(numbers))
            self._tokens_at = numbers.tokens_B.data_ptr()
        self._captured_at = self._addresses()

    def _put(
        self, inputs: StepInputs, size: int, tokens: list[int], positions: list[int], tables: Sequence[Sequence[Sequence[int]]]
    ) -> _StaticNumbers:
        """Put a step's numbers where the computation of a size reads them; rows beyond are padding."""
        rows, groups, width = len(tokens), len(tables), self.memory.table_width
        host, numbers = inputs.reserve(((2 + groups * width) * size,), torch.int32)
        host[: 2 * size] = 0
        host[:rows], host[size : size + rows] = tokens, positions
        for own, spare, given in zip(host[2 * size :].reshape(groups, size, width), self._spare, tables, strict=True):
            own[rows:, 0] = spare
            for row, table in zip(own, given, strict=False):
                # entries beyond the table's end are of an earlier step; no position reaches them
                row[: len(table)] = table[: len(row)]
        return _StaticNumbers(numbers[:size], numbers[size : 2 * size], numbers[2 * size :].view(groups, size, width))

    def _computation(self, numbers: _StaticNumbers) -> Callable[[], Tensor]:
        tokens_B, positions_B, tables_GBW = numbers

        def compute() -> Tensor:
            cache = _StaticCache(self.memory, positions_B, tables_GBW, self._spare, self._attention)
            with using_packed_matmuls(self._matmuls):
                hidden_BD = self.model.norm(self.model.pre_norm_hidden(tokens_B[None], cache=cache)[0])
                return self.model.logits(hidden_BD)

        return compute


class _StaticCache(StatelessCache):
    """A `Cache` for one new token of each of B sequences, whose numbers are on the device only."""

    def __init__(
        self, memory: PagedMemory, positions_B: Tensor, tables_GBW: Tensor, spare: Sequence[int], attention: StaticAttention
    ) -> None:
        #: Most tokens that any text can have. The length of the longest current text is only on the device, and the host would
        #: have to wait for it.
        self.live = memory.longest
        self._positions_B = positions_B
        self._pages = attention.static_pages(positions_B, tables_GBW, spare)

    def extend(self, count: int, real: Sequence[int] | None = None) -> Tensor:
        assert count == len(self._positions_B) and real is None
        return self._positions_B[None]

    def attend(self, layer: int, inputs: AttentionInputs) -> Tensor:
        return self._pages.attend(layer, inputs)
