"""The runner: computes steps of one model over its pages, by a backend, in one process or in several."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar, cast

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from bessemer.inference.execution.backend import Backend, Observed, ReadPages, StatesKeeper, StepContext, routings_kept
from bessemer.inference.execution.batch import Batch, StepInputs, TokensToHost, embedded_rows, fill_pending
from bessemer.inference.execution.kv_cache import PagedMemory
from bessemer.inference.execution.tensor_parallel.sharded_model import Command, Workers, decode, together
from bessemer.inference.execution.weights import (
    UpdateShape,
    WeightPiece,
    exchange_adapter,
    exchange_piece,
    gather_weight_samples,
    pieces_of,
    shapes_of,
)
from bessemer.inference.sampling.device_sampler import SampledRows
from bessemer.model.adapters import Adapter, adapted
from bessemer.model.adapters.fingerprints import WeightSample
from bessemer.model.batch_invariance import keeping_packed_weights
from bessemer.model.decoder import Decoder
from bessemer.model.device import with_threads
from bessemer.model.layers.attention_backends import capped
from bessemer.model.layers.block import MtpModule
from bessemer.model.quantisation.quantised_layers import QuantisedLinear, using_packed_matmuls

# Shapes: N new tokens, R wanted rows, V vocabulary, D hidden, H heads, T and S positions.


Result = TypeVar("Result")
Arguments = ParamSpec("Arguments")


def on_every_rank(method: Callable[Concatenate[Runner, Arguments], Result]) -> Callable[Concatenate[Runner, Arguments], Result]:
    """Let the workers, where there are some, call the same method of their runners. Arguments are given by position."""

    @wraps(method)
    def everywhere(runner: Runner, /, *arguments: Arguments.args, **named: Arguments.kwargs) -> Result:
        workers = runner.workers
        if workers is None:
            return method(runner, *arguments, **named)
        with together(workers):
            workers.tell(Command(method.__name__, arguments, runner.is_draft))
            return method(runner, *arguments, **named)

    return everywhere


class Runner:
    """Computes batches: by the backend's whole steps where they take a sequence, else by the model's modules.

    batch_invariant: each sequence goes through the modules alone and in fixed chunks, so that its numbers are the same bits
    whatever else is in the batch. It costs what batching saves. workers: the other processes that share the model, each with a
    runner of its shard: what this one does over its pages, all do over theirs. axis: those processes; None: all of the job.
    is_draft: whether the model is the draft model of another runner.
    """

    def __init__(
        self,
        model: Decoder,
        memory: PagedMemory,
        backend: Backend,
        *,
        batch_invariant: bool = False,
        workers: Workers | None = None,
        axis: DeviceMesh | None = None,
        is_draft: bool = False,
    ) -> None:
        self.model = model
        self.memory = memory
        self.backend = backend
        #: Whether a row's logits are the same bits whatever else is in the batch, and however a prompt is cut.
        self.invariant = batch_invariant or (backend.whole is not None and backend.whole.invariant)
        #: As of `Linear.own_threads`.
        self.own_threads = backend.linear.own_threads or (backend.whole is not None and backend.whole.own_threads)
        #: Hidden states and choices of experts that the last batch wanted to keep.
        self.observed = Observed()
        #: Whether steps keep `pre_norm_ND`, which MTP modules read.
        self.keeps_pre_norm = False
        #: States of every token of the last batch before the last norm.
        self.pre_norm_ND = torch.empty(0)
        #: Tokens of the last `sample`, on the device.
        self.sampled_R = torch.empty(0, dtype=torch.int64)
        self._inputs = StepInputs(memory.device)
        #: Of a model that is computed by batch-invariant kernels.
        self._packed_weights: dict[object, object] = {}
        self._batch_invariant = batch_invariant
        #: The other processes that share the model.
        self.workers = workers
        self._axis = axis
        self.is_draft = is_draft
        #: Of a worker: its shards of adapters, by the numbers by which rank 0 names them.
        self.adapters: dict[int, Adapter] = {}

    @property
    def arithmetic(self) -> str:
        """How it computes, in words: by what, in which types."""
        backend = self.backend
        parts = None if backend.whole is None else backend.whole.arithmetic
        if parts is None:
            modules = f"the model's modules in PyTorch ({str(self.model.dtype).removeprefix('torch.')})"
            parts = [modules, *backend.linear.arithmetic, *backend.attention.arithmetic]
        return ", ".join([*parts, f"keys and values in {self.memory.type_name}"])

    def limited_torch_threads(self) -> AbstractContextManager[None]:
        """Limits PyTorch to one thread where the kernels have their own: spinning threads would slow down the next step."""
        return with_threads(1) if self.own_threads else nullcontext()

    @on_every_rank
    @torch.inference_mode()
    def forward(self, batch: Batch) -> Tensor:
        """Logits of the wanted rows in their order, (R, V) float32. Writes keys and values."""
        return self._forward(batch, StepContext(self._inputs, self.sampled_R))

    @property
    def generates(self) -> bool:
        """Whether `generate` can compute its batches."""
        return self.backend.generator is not None and not self.keeps_pre_norm

    def generate(self, batch: Batch, uniforms_RS: Tensor, temperatures_R: Tensor) -> tuple[Tensor, Tensor]:
        """S tokens of each sequence, of which the batch has one new token each, int32 (R, S), and their log-probabilities at
        the temperatures, (R, S): those that `sample_rows` draws by the same numbers, one after the other. -1 where the logits
        are not finite; what follows it means nothing.

        The sequences have no adapters, and pages for S tokens. uniforms_RS: float64; temperatures_R: float32, 0 for the
        largest.
        """
        assert self.backend.generator is not None and self.workers is None
        return self.backend.generator.generate(batch, uniforms_RS, temperatures_R)

    @torch.inference_mode()
    def sample(self, batch: Batch, rows: SampledRows) -> TokensToHost:
        """Compute a batch and sample a token of each wanted row on the device. The host waits for none of it.

        The tokens stay on the device: those that the next batch has `pending` are read there.
        """
        assert self.workers is None, "tokens are sampled in one process"
        return self._draw(self._forward(batch, StepContext(self._inputs, self.sampled_R, rows)), rows)

    @torch.inference_mode()
    def sample_logits(self, logits_RV: Tensor, rows: SampledRows) -> TokensToHost:
        """Sample a token from each row of the logits of a step. None of the tokens can be `pending` in the next batch."""
        return self._draw(logits_RV, rows)

    def _draw(self, logits_RV: Tensor, rows: SampledRows) -> TokensToHost:
        if not rows.placed:
            self._inputs.begin()
            rows.place(self._inputs.put)
            self._inputs.copy()
        self.sampled_R = rows.draw(logits_RV, self.sampled_R)
        return TokensToHost(self.sampled_R)

    def _forward(self, batch: Batch, context: StepContext) -> Tensor:
        whole = self.backend.whole
        taken = [] if whole is None or self.keeps_pre_norm else whole.takes(batch)
        if whole is None or not taken:
            return self._by_modules(batch, context)
        if len(taken) == batch.sequences:
            logits_RV = whole.forward(batch, context)
            if batch.states:
                self.observed = Observed(whole.states)
            return logits_RV
        logits_RV = torch.empty(len(batch.wanted), self.model.config.vocab_size, device=self.model.device)
        own = set(taken)
        # the numbers of either part are forgotten with the other's
        context = context._replace(rows=None)
        part, places = batch.part(taken)
        logits_RV[places] = whole.forward(part, context)
        observed = Observed(whole.states)
        part, places = batch.part([sequence for sequence in range(batch.sequences) if sequence not in own])
        logits_RV[places] = self._by_modules(part, context)
        taken_rows = {row for sequence in taken for row in range(*batch.starts[sequence : sequence + 2])}
        self.observed = observed.interleaved(self.observed, batch.states, taken_rows)
        return logits_RV

    @on_every_rank
    @torch.inference_mode()
    def copy_blocks(self, copies: Sequence[tuple[int, int, int]]) -> None:
        """Copy blocks: (group, from, to)."""
        self.memory.copy(copies)

    @on_every_rank
    @torch.inference_mode()
    def restore_states(self, restored: Sequence[tuple[int, int]]) -> None:
        """Begin with saved states: (snapshot, slot)."""
        self.memory.restore_states(restored)

    @on_every_rank
    @torch.inference_mode()
    def keep_states(self, kept: Sequence[tuple[int, int]]) -> None:
        """Reset states of sequences with drafts, (slot, accepted tokens), to after the accepted tokens."""
        self.memory.keep_states(kept)

    @on_every_rank
    def weights_changed(self) -> None:
        """Take the model's changed weights again where the backend stores them in a form of its own."""
        if self.backend.whole is not None:
            self.backend.whole.weights_changed()
        self.backend.linear.weights_changed()
        self._packed_weights.clear()

    @on_every_rank
    def release_memory(self) -> None:
        """Free the memory of the pages, which no sequence holds."""
        self.memory.release()

    @on_every_rank
    def restore_memory(self) -> None:
        """Have it again."""
        self.memory.restore()
        if self.backend.whole is not None:
            # a captured step reads pages where they were
            self.backend.whole.weights_changed()

    def replace_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Give every process its shard of other weights, by the names and with the shapes of the unsharded model."""
        assert self.workers is not None, "a model in one process takes them itself"
        with together(self.workers):
            for piece, values in pieces_of(self.model, weights):
                # the numbers follow by a collective: a pipe would copy them for each worker
                self.workers.tell(Command("receive_piece", (piece,)))
                exchange_piece(self.model, piece, values)

    def receive_piece(self, piece: WeightPiece) -> None:
        """A worker's part of `replace_weights`."""
        exchange_piece(self.model, piece)

    def share_adapter(self, whole: Adapter) -> Adapter:
        """Shard an adapter over all ranks; rank 0's shard. whole: on the model's device and in its type.

        Every worker keeps its shard until rank 0's is gone.
        """
        assert self.workers is not None, "a model in one process takes it whole"
        with together(self.workers):
            shapes = shapes_of(whole)
            number = self.workers.numbers.next()
            self.workers.tell(Command("receive_adapter", (number, shapes)))
            shard = exchange_adapter(self.model, shapes, whole, axis=self._axis)
            self.workers.numbers.assign(number, shard)
            return shard

    def receive_adapter(self, number: int, shapes: Sequence[UpdateShape]) -> None:
        """A worker's part of `share_adapter`."""
        self.adapters[number] = exchange_adapter(self.model, shapes, axis=self._axis)

    @on_every_rank
    def weight_samples(self) -> dict[str, WeightSample]:
        """Samples of the unsharded model's weights, by which an adapter knows its base (`fingerprints`)."""
        return gather_weight_samples(self.model, self._axis)

    @torch.inference_mode()
    def mtp_hidden(self, index: int, batch: Batch, hidden_ND: Tensor) -> Tensor:
        """States of an MTP module, (N, D), from those of the one before it (`Decoder.mtp_hidden`)."""
        self._inputs.begin()
        tokens_1N = self._inputs.put([batch.tokens])
        cache = self.backend.attention.cache(batch, self._inputs)
        self._inputs.copy()
        with using_packed_matmuls(self.backend.linear.matmuls):
            return self.model.mtp_hidden(index, tokens_1N, hidden_ND[None], cache)[0]

    @torch.inference_mode()
    def mtp_logits(self, index: int, hidden_RD: Tensor) -> Tensor:
        """Logits of an MTP module's states, (R, V) float32."""
        return self._logits(cast(MtpModule, self.model.mtp[index]).norm(hidden_RD))

    @torch.inference_mode()
    def attention_weights(
        self,
        layer: int,
        states_TD: Tensor,
        positions: Sequence[int],
        tables: Sequence[Sequence[int]],
        adapter: Adapter | None = None,
        turns: Sequence[tuple[int, int, int]] | None = None,
    ) -> Tensor:
        """How much positions of a sequence attend to each up to the last of them, (H, T, S) float32, in a layer with attention.

        states_TD: before that layer. tables: the sequence's blocks, of each group of layers; the keys of the positions are in
        them. turns: the positions of three numbers by which these are turned; None: by their places.
        """
        rope_3BT = None if turns is None else torch.tensor([turns], device=self.model.device).permute(2, 0, 1)
        pages = ReadPages(self.memory, tables, positions)
        with (
            adapted(self.model, [] if adapter is None else [(adapter, None)]),
            using_packed_matmuls(self.backend.linear.matmuls),
        ):
            states_1TD = states_TD.to(self.model.device, self.model.dtype)[None]
            self.model.attend(layer, states_1TD, cache=pages, rope_3BT=rope_3BT)
        return pages.weights_HTS

    @torch.no_grad()
    def lens_logits(self, states_TD: Tensor) -> Tensor:
        """Logits that the last norm and the head make of states of the residual stream, (T, V) float32.

        By the packed product of the head where steps have one, with the rounding of activations that a step has: those of the
        last state are the ones that a token is sampled from. Any thread may ask, beside a step: no module is changed.
        """
        model = self.model
        normed_TD = model.normed(states_TD.to(model.device, model.dtype))
        product = self.backend.linear.matmuls.products.get(cast(QuantisedLinear, model.head))
        if product is None:
            return model.logits(normed_TD).float()
        return capped(product(normed_TD), model.logit_softcap).float()

    # -- by the model's modules

    def _by_modules(self, batch: Batch, context: StepContext) -> Tensor:
        few = self.backend.linear.is_soon_done(len(batch.tokens), invariant=self._batch_invariant)
        with with_threads(1) if few else nullcontext():
            if self._batch_invariant:
                return self._alone(batch, context._replace(rows=None))
            return self._logits(self._hidden(batch, context))

    def _alone(self, batch: Batch, context: StepContext) -> Tensor:
        """Each sequence by itself, in chunks that do not depend on the rest of the batch."""
        rows, pre_norm_hidden, observed, last, step = [], [], [], -1, 0
        for sequence, chunk in batch.alone(self.memory.block_size):
            # the head too sees one row at a time
            rows += [self._logits(hidden_D[None]) for hidden_D in self._hidden(chunk, context)]
            pre_norm_hidden.append(self.pre_norm_ND)
            observed.append(self.observed)
            step = step + 1 if sequence == last else 0
            last = sequence
            if batch.drafts[sequence]:
                self.memory.remember_states(batch.slots[sequence] if batch.slots else 0, step)
        self.observed = Observed.joined(observed)
        if self.keeps_pre_norm:
            self.pre_norm_ND = torch.cat(pre_norm_hidden)
        return torch.cat(rows) if rows else torch.empty(0, self.model.config.vocab_size)

    def _hidden(self, batch: Batch, context: StepContext) -> Tensor:
        """States of the wanted rows, (R, D)."""
        inputs = context.inputs
        inputs.begin()
        tokens_1N = inputs.put([batch.tokens])
        cache = self.backend.attention.cache(batch, inputs)
        wanted_R = inputs.put(batch.wanted)
        rows_of_adapters = [(adapter, None if own is None else inputs.put(own)) for adapter, own in batch.rows_of_adapters()]
        kept_states = {layer: inputs.put(own) for layer, own in batch.states.items() if own}
        kept_routings = {layer: inputs.put(own) for layer, own in batch.routings.items()}
        pending_2P = inputs.put([[*batch.pending], [*batch.pending.values()]]) if batch.pending else None
        embedded = embedded_rows(batch.given, inputs, self.model.device)
        turns = batch.turns()
        rope_3BT = None if turns is None else inputs.put(turns)
        if context.rows is not None:
            context.rows.place(inputs.put)
        inputs.copy()
        fill_pending(tokens_1N[0], pending_2P, context.sampled_R)
        self.observed = Observed()
        keep = StatesKeeper(kept_states, self.observed.states) if kept_states else None
        with (
            adapted(self.model, rows_of_adapters),
            using_packed_matmuls(self.backend.linear.matmuls),
            keeping_packed_weights(self._packed_weights),
            routings_kept(self.model, kept_routings, self.observed.routings),
        ):
            pre_norm_ND = self.model.pre_norm_hidden(tokens_1N, cache=cache, keep=keep, embedded=embedded, rope_3BT=rope_3BT)[0]
        if self.keeps_pre_norm:
            self.pre_norm_ND = pre_norm_ND
        return self.model.normed(pre_norm_ND[wanted_R])

    def _logits(self, hidden_RD: Tensor) -> Tensor:
        with using_packed_matmuls(self.backend.linear.matmuls), keeping_packed_weights(self._packed_weights):
            return self.model.logits(hidden_RD).float()


def run_worker(runner: Runner, messages: Iterable[bytes], draft: Runner | None = None) -> None:
    """A worker's loop: make each call, until the commands end. draft: the runner of the draft model that it has a shard of."""
    for message in messages:
        command = decode(message, runner.adapters)
        addressed = draft if command.to_draft else runner
        getattr(addressed, command.method)(*command.arguments)
