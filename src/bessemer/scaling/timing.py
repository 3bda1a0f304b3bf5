"""Predicted step time: matmuls, memory traffic, exposed communication, pipeline bubble, optimizer.

The model is an additive roofline: matmuls run at a fraction of the peak, everything else at a fraction of the memory bandwidth,
and a collective at a fraction of its link's bandwidth. The fractions are stated here and in `hardware`; docs/planning.md
compares the predictions with published runs.
"""

from __future__ import annotations

from dataclasses import dataclass

from bessemer.model.costs import layer_parts
from bessemer.scaling.job import NARROW_BYTES, WEIGHT_BYTES, Candidate, TrainingJob
from bessemer.scaling.memory import average_bytes, state_bytes
from bessemer.scaling.traffic import Traffic, held_layers, traffic

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


def timing(job: TrainingJob, candidate: Candidate) -> Timing:
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


def _flops(job: TrainingJob, layers: list[int]) -> tuple[float, float, float]:
    """FLOPs of a token, forward and backward: matmuls of the rank's blocks, of the head, and attention scores."""
    last = layers[-1] == job.model.num_hidden_layers - 1
    inside = sum(job.products[layer] for layer in layers) + (job.mtp_products if last else 0)
    head = job.model.vocab_size * job.model.hidden_size * (1 + job.model.num_nextn_predict_layers) if last else 0
    return 6.0 * inside, 6.0 * head, job.scores_flops * len(layers) / job.model.num_hidden_layers


def _moved_bytes(job: TrainingJob, candidate: Candidate, layers: list[int]) -> float:
    """Bytes read and written in a micro-batch outside matmuls."""
    numerics, tokens, tensor = job.numerics(candidate), job.tokens(candidate), candidate.layout.tensor
    kept = job.activations_of(layers, numerics).per_token(tensor)
    passes = COMPILED_PASSES if job.compiled else EAGER_PASSES
    passes *= {"none": 1.0, "selective": 4 / 3, "full": 4 / 3}[candidate.recompute]
    logits = 6 * job.model.vocab_size / tensor * job.compute_bytes
    weights = job.blocks_of(layers).in_use(candidate.layout)
    return tokens * (passes * kept + logits) + _BYTES_PER_WEIGHT * weights


def seconds_of(job: TrainingJob, candidate: Candidate, kind: Traffic) -> float:
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
        # weights of experts, between ranks with the same ones
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


def _communication(job: TrainingJob, candidate: Candidate, busy: float) -> tuple[float, float]:
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


def _optimizer_seconds(job: TrainingJob, candidate: Candidate, layers: list[int]) -> float:
    """Seconds to read and write weights, gradients and states, and of Muon's matmuls, which the ranks of a stage share: shards
    travel to the rank of a matrix and back in bfloat16 (`distributed.whole_matrices`)."""
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
    if job.settings.optimizer == "muon":
        ranks, matrices = layout.stage_ranks, sum(_matrices(job, layer) for layer in layers)
        flops = sum(_muon_flops(job, layer) for layer in layers) / ranks
        seconds += flops / (card.flops * card.achievable)
        if ranks > 1:
            rounds = -(-matrices // ranks)
            size = NARROW_BYTES * 2 * blocks.stored(layout)
            seconds += seconds_of(job, candidate, Traffic("data", "all-to-all", ranks, 2 * rounds, size))
    return seconds


def _matrices(job: TrainingJob, layer: int) -> int:
    """Tensors of a block that Muon updates."""
    return sum(1 for part in layer_parts(job.model, layer) for shape in part.shapes if len(shape) > 1)


def _muon_flops(job: TrainingJob, layer: int) -> float:
    """Five Newton–Schulz iterations of every matrix: each 4 m² n + 2 m³ for the shorter side m (Jordan et al. 2024)."""
    total = 0.0
    for part in layer_parts(job.model, layer):
        for shape in part.shapes:
            if len(shape) < 2:
                continue
            count = shape[0] if len(shape) == 3 else 1
            short, long = sorted(shape[-2:])
            total += count * 5 * (4 * short**2 * long + 2 * short**3)
    return total
