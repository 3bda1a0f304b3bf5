"""Predicted step time: matmuls, memory traffic, communication, pipeline bubble, optimizer.

An additive roofline: matmuls run at a fraction of the peak, everything else at a fraction of the memory bandwidth, a
collective at a fraction of its link's bandwidth. The fractions are stated here and in `hardware`; docs/planning.md compares
the predictions with published runs.

Communication is counted by axis: number of collectives and bytes sent, of ring algorithms (Thakur et al. 2005). Of a tensor
of S bytes over n ranks, a gather and a reduce-scatter send S (n - 1) / n from each rank, an all-reduce twice as much, an
all-to-all of S bytes a rank S (n - 1) / n; no algorithm sends less. Tests count the collectives of the project's own step on
fake process groups of up to 1,024 ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from bessemer.model.attention.base import variant_of
from bessemer.model.costs import layer_parts
from bessemer.scaling.job import NARROW_BYTES, WEIGHT_BYTES, Candidate, PlannedJob, Weights
from bessemer.scaling.memory import average_bytes, state_bytes
from bessemer.training.optim.registry import find_optimizer

#: Bytes of the int64 index of a chosen expert.
_INDEX_BYTES = 8

Axis = Literal["data", "tensor", "context", "pipeline", "expert"]
Operation = Literal["all-gather", "reduce-scatter", "all-reduce", "all-to-all", "send"]


@dataclass(frozen=True)
class Traffic:
    """Collectives of one kind in a step of the busiest rank. size: total bytes of the whole tensors."""

    axis: Axis
    operation: Operation
    ranks: int
    count: int
    size: float

    @property
    def sent(self) -> float:
        """Bytes that the rank sends."""
        if self.operation == "send":
            return self.size
        fraction = (self.ranks - 1) / self.ranks
        return self.size * fraction * (2 if self.operation == "all-reduce" else 1)


def traffic(job: PlannedJob, candidate: Candidate) -> list[Traffic]:
    """Every kind of collective of a step that sends tensors; the few that send single numbers are left out."""
    collectives = [*_data(job, candidate), *_tensor(job, candidate), *_context(job, candidate), *_expert(job, candidate)]
    return [*collectives, *_pipeline(job, candidate)]


def held_layers(job: PlannedJob, candidate: Candidate) -> list[int]:
    """The layers of the pipeline rank with most layers, the last among equals, since it also has the head."""
    stages, ranks = job.stage_layers(candidate.stages), candidate.layout.pipeline
    of_ranks = [[layer for stage in range(rank, candidate.stages, ranks) for layer in stages[stage]] for rank in range(ranks)]
    return max(reversed(of_ranks), key=len)


def _data(job: PlannedJob, candidate: Candidate) -> Iterator[Traffic]:
    """FSDP: an all-gather of each block's weights forward and backward, of the last one's once; of embedding and head, where
    they are not tied, and of the rest one each; a reduce-scatter of gradients; an all-reduce over replicas. In every
    micro-batch; in a pipeline, whose ranks gather the ends with the rest, once a step. In bfloat16 only matrices are gathered
    with their block."""
    layout, layers = candidate.layout, held_layers(job, candidate)
    if layout.world_size == 1:
        return
    micro_batches = job.micro_batches(candidate) if layout.pipeline == 1 else 1
    passes = 2 if layout.pipeline == 1 else 1
    blocks = job.blocks_of(layers)
    dense, experts = Weights(blocks.cut, blocks.whole), Weights(experts=blocks.experts)
    outer = job.outer
    groups = [(layout.shard_ranks, dense, outer, len(layers))]
    if experts.experts:
        if layout.expert > 1:
            sparse = sum(1 for layer in layers if job.blocks[layer].experts)
            groups.append((layout.shard_ranks // layout.expert, experts, Weights(), sparse))
        else:
            groups = [(layout.shard_ranks, dense + experts, outer, len(layers))]
    of_products = job.matrices_of(layers)
    for ranks, inside, outside, units in groups:
        gathered_bytes = WEIGHT_BYTES
        if job.gathers_narrow:
            dense = of_products if inside.cut else Weights()
            matrices = Weights(dense.cut, dense.whole, of_products.experts if inside.experts else 0)
            inside, outside, gathered_bytes = matrices, outside + (inside - matrices), NARROW_BYTES
        root = 1 if outside != Weights() else 0
        if outside.cut and passes == 2 and not job.model.tie_word_embeddings:
            root += 2
        # of the last block, what belongs to this group
        of_last = job.matrices_of(layers[-1:]) if job.gathers_narrow else job.blocks[layers[-1]]
        dense_too = inside.cut or inside.whole
        last = Weights(*(of_last.cut, of_last.whole) if dense_too else (), experts=of_last.experts if inside.experts else 0)
        block_size, root_size, last_size = (weights.in_use(layout) for weights in (inside, outside, last))
        again = passes - 1 if last_size else 0
        gathers = passes * units - again + root
        gathered = gathered_bytes * (passes * block_size - again * last_size) + WEIGHT_BYTES * root_size
        scatters, scattered = units + root, WEIGHT_BYTES * (block_size + root_size)
        if ranks > 1:
            yield Traffic("data", "all-gather", ranks, gathers * micro_batches, gathered * micro_batches)
            yield Traffic("data", "reduce-scatter", ranks, scatters * micro_batches, scattered * micro_batches)
        copies = layout.data_replicate
        if copies > 1:
            yield Traffic("data", "all-reduce", copies, scatters * micro_batches, scattered * micro_batches / ranks)


def _tensor(job: PlannedJob, candidate: Candidate) -> Iterator[Traffic]:
    """Traffic of tensor parallelism with sequence parallelism (Korthikanti et al. 2022, section 4.2).

    Forward, each attention and feed-forward has an all-gather of its input tokens and a reduce-scatter of its outputs; backward
    the reverse. A recomputed block repeats its forward traffic except the last reduce-scatter. Routing weights travel with the
    tokens. Embedding and head do the same in float32. All-reduces: the head's gradient, gradients of replicated parameters, and
    three numbers a token for the loss.
    """
    ranks, model = candidate.layout.tensor, job.model
    if ranks == 1:
        return
    tokens, c, chosen = job.tokens(candidate), job.compute_bytes, model.num_experts_per_tok
    layers, micro_batches = held_layers(job, candidate), job.micro_batches(candidate)
    heads = 1
    if model.num_hidden_layers - 1 in layers:
        # a multi-token prediction block contains a layer of the same kind as the last one
        layers = [*layers, *[model.num_hidden_layers - 1] * model.num_nextn_predict_layers]
        heads += model.num_nextn_predict_layers
    again = 1 if candidate.recompute != "none" else 0
    # embeddings are reduce-scattered, hidden states gathered after a last norm; counts and bytes per token
    gathers, gathered = 2 * heads, float(2 * heads * WEIGHT_BYTES * model.hidden_size)
    scatters, scattered = heads, float(heads * WEIGHT_BYTES * model.hidden_size)
    for layer in layers:
        read = c if variant_of(model, layer).casts_input else WEIGHT_BYTES
        gathers, scatters = gathers + 4 + 2 * again, scatters + 4 + again
        gathered += model.hidden_size * ((read + c) * (1 + again) + 2 * c)
        scattered += model.hidden_size * (2 * c + again * c + read + c)
        if model.is_sparse(layer) and candidate.layout.expert == 1:
            gathers, scatters = gathers + 2 * (1 + again), scatters + 1
            gathered += chosen * (_INDEX_BYTES + WEIGHT_BYTES) * (1 + again)
            scattered += chosen * WEIGHT_BYTES
        if model.is_sparse(layer):
            # routings of all tokens for the metrics, and logits for the losses
            in_losses = bool(model.router_aux_loss_coef or model.router_z_loss_coef)
            gathers += (1 + in_losses) * (1 + again)
            gathered += (chosen * _INDEX_BYTES + in_losses * model.num_experts * WEIGHT_BYTES) * (1 + again)
    count, whole = job.whole_tensors(held_layers(job, candidate))
    chunks = -(-tokens // job.chunk_size.tokens(model.vocab_size // ranks))
    reduced = heads * tokens * (model.hidden_size + 3) + whole
    yield Traffic("tensor", "all-gather", ranks, gathers * micro_batches, gathered * tokens * micro_batches)
    yield Traffic("tensor", "reduce-scatter", ranks, scatters * micro_batches, scattered * tokens * micro_batches)
    reductions = heads * (1 + 2 * chunks) + count
    yield Traffic("tensor", "all-reduce", ranks, reductions * micro_batches, WEIGHT_BYTES * reduced * micro_batches)


def _context(job: PlannedJob, candidate: Candidate) -> Iterator[Traffic]:
    """An all-gather of keys and values, forward and where attention is recomputed; a reduce-scatter of their gradients."""
    ranks = candidate.layout.context
    if ranks == 1:
        return
    counted = job.training_shapes(held_layers(job, candidate))
    micro_batches = job.micro_batches(candidate)
    rows, count = candidate.micro_batch_size * job.settings.context_length, sum(layers for _, layers in counted)
    bytes_of = [rows * heads.numbers * job.compute_bytes / candidate.layout.tensor * layers for heads, layers in counted]
    size = sum(bytes_of) * micro_batches
    forward = 2 if candidate.recompute != "none" else 1
    yield Traffic("context", "all-gather", ranks, 2 * forward * count * micro_batches, forward * size)
    yield Traffic("context", "reduce-scatter", ranks, 2 * count * micro_batches, size)


def _expert(job: PlannedJob, candidate: Candidate) -> Iterator[Traffic]:
    """All-to-alls of every token's visits to its experts and back, forward and backward."""
    ranks, model = candidate.layout.expert, job.model
    if ranks == 1:
        return
    layers = [layer for layer in held_layers(job, candidate) if model.is_sparse(layer)]
    micro_batches = job.micro_batches(candidate)
    passes = 6 if candidate.recompute != "none" else 4
    tokens = job.tokens(candidate) / candidate.layout.tensor
    each = tokens * model.num_experts_per_tok * model.hidden_size * job.compute_bytes
    yield Traffic(
        "expert", "all-to-all", ranks, passes * len(layers) * micro_batches, passes * each * len(layers) * micro_batches
    )


def _pipeline(job: PlannedJob, candidate: Candidate) -> Iterator[Traffic]:
    """Sends of hidden states to the next stage and of their gradients to the previous one, in float32; a middle rank does
    both."""
    ranks = candidate.layout.pipeline
    if ranks == 1:
        return
    micro_batches = job.micro_batches(candidate)
    sends = 2 * candidate.stages_per_rank * micro_batches
    size = job.tokens(candidate) * job.model.hidden_size * WEIGHT_BYTES / candidate.layout.tensor
    yield Traffic("pipeline", "send", ranks, sends, sends * size)


#: Fraction of the memory bandwidth that memory-bound kernels reach, and of a link's that large collectives reach.
MEMORY_SHARE, LINK_SHARE = 0.85, 0.75
#: FLOP/s of attention over those of large matmuls: FlashAttention-2 reaches half of cuBLAS (Dao 2023, fig. 4-6).
ATTENTION_SHARE = 0.5
#: Fraction of the peak of float8 matmuls over that of bfloat16 ones: scaling and casting take the rest.
FLOAT8_SHARE = 0.8
#: How often stored activations are read or written in a step, matmuls apart. Eager: written, read, and with intermediate values
#: and gradients twice each way; compiled: fused into fewer passes.
EAGER_PASSES, COMPILED_PASSES = 6.0, 3.0
#: Latency of a collective in seconds.
LATENCY = 15e-6
#: Bytes moved for a weight in each micro-batch: read by three matmuls, cast, its gradient added.
_BYTES_PER_WEIGHT = 20
#: Bytes moved for a weight in each step besides its optimizer states: gradient norm, clipping, update.
_BYTES_PER_UPDATE = 28


@dataclass(frozen=True)
class Timing:
    """Seconds of a step, by kind."""

    products: float
    attention: float
    recomputed: float
    moved: float
    communication: float
    exposed: float
    bubble: float
    optimizer: float

    @property
    def step(self) -> float:
        """Seconds of the whole step, without hidden communication."""
        return self.products + self.attention + self.recomputed + self.moved + self.exposed + self.bubble + self.optimizer


def timing(job: PlannedJob, candidate: Candidate) -> Timing:
    """The predicted seconds of a step."""
    card, settings, layout = job.card, job.settings, candidate.layout
    micro_batches, tokens = job.micro_batches(candidate), job.tokens(candidate)
    layers = held_layers(job, candidate)
    inside, head, scores = _flops(job, layers)
    each = tokens * micro_batches / layout.tensor
    achieved = card.flops * card.achievable * (0.25 if settings.dtype == "float32" and card.name != "cpu" else 1.0)
    fast = achieved
    if settings.float8 and card.float8_flops:
        fast = card.float8_flops * card.achievable * FLOAT8_SHARE
    products = each * (inside / fast + head / achieved)
    attention = each * scores / (achieved * ATTENTION_SHARE)
    again = {"none": 0.0, "selective": 0.0, "full": 1 / 3}[candidate.recompute] * (each * inside / fast + attention)
    moved = _moved_bytes(job, candidate, layers) * micro_batches / (card.bandwidth * MEMORY_SHARE)
    busy = products + attention + again + moved
    communication, exposed = _communication(job, candidate, busy)
    bubble = (busy + exposed) * bubble_share(candidate, micro_batches)
    return Timing(products, attention, again, moved, communication, exposed, bubble, _optimizer_seconds(job, candidate, layers))


def _flops(job: PlannedJob, layers: list[int]) -> tuple[float, float, float]:
    """FLOPs of a token, forward and backward: matmuls of the rank's blocks, of the head, and attention scores."""
    last = layers[-1] == job.model.num_hidden_layers - 1
    inside = sum(job.products[layer] for layer in layers) + (job.mtp_products if last else 0)
    head = job.model.vocab_size * job.model.hidden_size * (1 + job.model.num_nextn_predict_layers) if last else 0
    return 6.0 * inside, 6.0 * head, job.scores_flops * len(layers) / job.model.num_hidden_layers


def _moved_bytes(job: PlannedJob, candidate: Candidate, layers: list[int]) -> float:
    """Bytes read and written in a micro-batch outside matmuls."""
    numerics, tokens, tensor = job.numerics(candidate), job.tokens(candidate), candidate.layout.tensor
    kept = job.activations_of(layers, numerics).per_token(tensor)
    passes = COMPILED_PASSES if job.compiled else EAGER_PASSES
    passes *= {"none": 1.0, "selective": 4 / 3, "full": 4 / 3}[candidate.recompute]
    logits = 6 * job.model.vocab_size / tensor * job.compute_bytes
    weights = job.blocks_of(layers).in_use(candidate.layout)
    return tokens * (passes * kept + logits) + _BYTES_PER_WEIGHT * weights


def seconds_of(job: PlannedJob, candidate: Candidate, kind: Traffic) -> float:
    """Seconds of all collectives of a kind in sequence, at the slower of the links inside and between nodes."""
    card, layout = job.card, candidate.layout
    stride = {
        "tensor": 1,
        "context": layout.tensor,
        "expert": layout.tensor,
        "data": layout.tensor,
        "pipeline": layout.stage_ranks,
    }[kind.axis]
    if kind.axis == "data" and kind.operation == "all-reduce":
        stride = layout.tensor * layout.shard_ranks
    elif kind.axis == "data" and kind.ranks < layout.shard_ranks:
        # experts are reduced among ranks that hold the same ones
        stride = layout.tensor * layout.expert
    # ranks of a group in one node
    near = max(1, min(kind.ranks, card.cards_per_node // stride))
    latency = kind.count * LATENCY * (1 + 0.1 * max(0, kind.ranks.bit_length() - 1))
    inside = kind.sent / (card.node_link * LINK_SHARE) if near > 1 else 0.0
    if near == kind.ranks:
        return inside + latency
    between = kind.sent if kind.operation == "send" else kind.sent * (kind.ranks - near) / max(1, kind.ranks - 1) / near
    if kind.operation == "all-to-all":
        # every rank sends other bytes to every other
        between = kind.sent * (kind.ranks - near) / max(1, kind.ranks - 1)
    return max(inside, between / (card.network_link * LINK_SHARE)) + latency


def _communication(job: PlannedJob, candidate: Candidate, busy: float) -> tuple[float, float]:
    """(seconds of all collectives, seconds that computation does not hide).

    FSDP's collectives overlap with the computation of a neighbouring block: exposed are the excess over the computation, the
    first all-gather and the last reduce-scatter. All others lie between two matmuls.
    """
    hidden = shown = 0.0
    for kind in traffic(job, candidate):
        seconds = seconds_of(job, candidate, kind)
        if kind.axis == "data":
            hidden += seconds
            shown += seconds / max(1, kind.count)
        elif kind.axis == "context" and job.settings.parallel.context_method == "ring":
            hidden += seconds
        else:
            shown += seconds
    return hidden + shown, shown + max(0.0, hidden - busy)


def bubble_share(candidate: Candidate, micro_batches: int) -> float:
    """Idle time over busy time: (p - 1) / (v m) for p ranks, v stages a rank and m micro-batches (Narayanan et al. 2021,
    section 2.2); a third of it where weight gradients fill the bubble (Qi et al. 2023, table 2). zbv has no bubble between its
    passes (Qi et al. 2024), but its last rank starts that much later, and all synchronise before the optimizer step.
    """
    waiting = (candidate.layout.pipeline - 1) / (candidate.stages_per_rank * micro_batches)
    return waiting / 3 if candidate.schedule in ("zero_bubble", "zbv") else waiting


def _optimizer_seconds(job: PlannedJob, candidate: Candidate, layers: list[int]) -> float:
    """Seconds to read and write weights, gradients and states, and of updates of whole matrices, which the ranks of a stage
    share: shards travel to the rank of a matrix and back in bfloat16 (`distributed.whole_matrices`)."""
    blocks = job.blocks_of(layers)
    layout, card = candidate.layout, job.card
    moved = blocks.stored(layout) * (_BYTES_PER_UPDATE + 2 * state_bytes(job, matrix=True))
    moved += job.outer.stored(layout) * (_BYTES_PER_UPDATE + 2 * state_bytes(job, matrix=False))
    # weight and average read, the average written
    moved += (blocks + job.outer).stored(layout) * 3 * average_bytes(job)
    seconds = moved / (card.bandwidth * MEMORY_SHARE)
    if job.settings.offload:
        # over PCIe and back
        seconds += 3 * WEIGHT_BYTES * (blocks + job.outer).stored(layout) / (32e9 * LINK_SHARE)
    matrix_flops = find_optimizer(job.settings.optimizer).matrix_flops
    if matrix_flops is not None:
        ranks = layout.stage_ranks
        parts = [part for layer in layers for part in layer_parts(job.model, layer)]
        matrices = [shape for part in parts for shape in part.shapes if len(shape) > 1]
        seconds += sum(map(matrix_flops, matrices)) / ranks / (card.flops * card.achievable)
        if ranks > 1:
            rounds = -(-len(matrices) // ranks)
            size = NARROW_BYTES * 2 * blocks.stored(layout)
            seconds += seconds_of(job, candidate, Traffic("data", "all-to-all", ranks, 2 * rounds, size))
    return seconds
