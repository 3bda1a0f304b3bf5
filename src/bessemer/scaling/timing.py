"""How long a step takes: products, memory traffic, what of the communication is not hidden, the pipeline's bubble.

The model is a roofline in sums: products run at a share of the peak, everything else at a share of the memory's bandwidth,
and a collective at a share of its link's. The shares are few and stated here and in `hardware`; docs/planning.md sets the
outcome beside published runs.
"""

from __future__ import annotations

from dataclasses import dataclass

from bessemer.model.costs import layer_parts
from bessemer.scaling.memory import average_bytes, state_bytes
from bessemer.scaling.traffic import Traffic, held_layers, traffic
from bessemer.scaling.work import WEIGHT_BYTES, Choice, Work

#: Of the memory's bandwidth, what kernels that only move data reach; of a link's, what large collectives do.
MEMORY_SHARE, LINK_SHARE = 0.85, 0.75
#: Speed of attention's products beside the large ones: FlashAttention-2 reaches half of what cuBLAS does (Dao 2023, fig. 4-6).
ATTENTION_SHARE = 0.5
#: Of a float8 product's peak, beside a bfloat16 product's: scaling and casting take the rest.
FLOAT8_SHARE = 0.8
#: How often what the forward pass keeps crosses the memory's bus in a step, products apart. Eager: written, read, and with
#: intermediate values and gradients twice each way; compiled: fused into fewer passes.
EAGER_PASSES, COMPILED_PASSES = 6.0, 3.0
#: Seconds before a collective's first byte arrives, and by how much a rank more lengthens it.
LATENCY = 15e-6
#: Bytes moved for a weight in each micro-batch: read by three products, cast, its gradient added.
_BYTES_PER_WEIGHT = 20
#: Bytes moved for a weight in each step besides its states: its norm, clipping, and the move.
_BYTES_PER_MOVE = 28


@dataclass(frozen=True)
class Timing:
    """Seconds of a step, by what they go to."""

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
        """Seconds of the whole step; hidden communication is not in it."""
        return self.products + self.attention + self.recomputed + self.moved + self.exposed + self.bubble + self.optimizer


def timing(work: Work, choice: Choice) -> Timing:
    """The predicted seconds of a step."""
    card, settings, layout = work.card, work.settings, choice.layout
    micro_batches, tokens = work.micro_batches(choice), work.tokens(choice)
    layers = held_layers(work, choice)
    inside, head, scores = _flops(work, layers)
    each = tokens * micro_batches / layout.tensor
    achieved = card.flops * card.achievable * (0.25 if settings.dtype == "float32" and card.name != "cpu" else 1.0)
    fast = achieved
    if settings.float8 and card.float8_flops:
        fast = card.float8_flops * card.achievable * FLOAT8_SHARE
    products = each * (inside / fast + head / achieved)
    attention = each * scores / (achieved * ATTENTION_SHARE)
    again = {"none": 0.0, "selective": 0.0, "full": 1 / 3}[choice.recompute] * (each * inside / fast + attention)
    moved = _moved_bytes(work, choice, layers) * micro_batches / (card.bandwidth * MEMORY_SHARE)
    busy = products + attention + again + moved
    communication, exposed = _communication(work, choice, busy)
    bubble = (busy + exposed) * bubble_share(choice, micro_batches)
    return Timing(products, attention, again, moved, communication, exposed, bubble, _optimizer_seconds(work, choice, layers))


def _flops(work: Work, layers: list[int]) -> tuple[float, float, float]:
    """FLOPs of a token, forward and backward: products of the rank's blocks, of the head, and of attention's scores."""
    last = layers[-1] == work.model.num_hidden_layers - 1
    inside = sum(work.products[layer] for layer in layers) + (work.products_ahead if last else 0)
    head = work.model.vocab_size * work.model.hidden_size * (1 + work.model.num_nextn_predict_layers) if last else 0
    return 6.0 * inside, 6.0 * head, work.scores_flops * len(layers) / work.model.num_hidden_layers


def _moved_bytes(work: Work, choice: Choice, layers: list[int]) -> float:
    """Bytes that cross the memory's bus in a micro-batch, besides what products hide."""
    numerics, tokens, tensor = work.numerics(choice), work.tokens(choice), choice.layout.tensor
    kept = work.kept_by(layers, numerics).per_token(tensor)
    passes = COMPILED_PASSES if work.compiled else EAGER_PASSES
    passes *= {"none": 1.0, "selective": 4 / 3, "full": 4 / 3}[choice.recompute]
    logits = 6 * work.model.vocab_size / tensor * work.compute_bytes
    weights = work.blocks_of(layers).in_use(choice.layout)
    return tokens * (passes * kept + logits) + _BYTES_PER_WEIGHT * weights


def seconds_of(work: Work, choice: Choice, kind: Traffic) -> float:
    """Seconds of all collectives of a kind, one after the other: the slower of the node's links and the network between."""
    card, layout = work.card, choice.layout
    stride = {
        "tensor": 1,
        "context": layout.tensor,
        "expert": layout.tensor,
        "data": layout.tensor,
        "pipeline": layout.stage_ranks,
    }[kind.axis]
    if kind.axis == "data" and kind.operation == "all-reduce":
        stride = layout.tensor * layout.shard_ranks
    elif kind.axis == "data" and kind.ranks < layout.shard_ranks:  # experts' weights, between ranks that hold the same ones
        stride = layout.tensor * layout.expert
    near = max(1, min(kind.ranks, card.cards_per_node // stride))  # ranks of a group in one node
    latency = kind.count * LATENCY * (1 + 0.1 * max(0, kind.ranks.bit_length() - 1))
    inside = kind.sent / (card.node_link * LINK_SHARE) if near > 1 else 0.0
    if near == kind.ranks:
        return inside + latency
    between = kind.sent if kind.operation == "send" else kind.sent * (kind.ranks - near) / max(1, kind.ranks - 1) / near
    if kind.operation == "all-to-all":  # every rank sends to every other: nothing is shared on the way
        between = kind.sent * (kind.ranks - near) / max(1, kind.ranks - 1)
    return max(inside, between / (card.network_link * LINK_SHARE)) + latency


def _communication(work: Work, choice: Choice, busy: float) -> tuple[float, float]:
    """(seconds of all collectives, of those that computing does not hide).

    FSDP's run beside the block before, so that only what exceeds the computation shows, and the first gather and the last
    scatter; all others stand between two products.
    """
    hidden = shown = 0.0
    for kind in traffic(work, choice):
        seconds = seconds_of(work, choice, kind)
        if kind.axis == "data":
            hidden += seconds
            shown += seconds / max(1, kind.count)
        elif kind.axis == "context" and work.settings.parallel.context_method == "ring":
            hidden += seconds
        else:
            shown += seconds
    return hidden + shown, shown + max(0.0, hidden - busy)


def bubble_share(choice: Choice, micro_batches: int) -> float:
    """Idle time over busy time: (p - 1) / (v m) for p ranks, v stages a rank and m micro-batches (Narayanan et al. 2021,
    section 2.2); a third of it where the weights' gradients fill the gap (Qi et al. 2023, table 2). The V has no gap between
    its passes (Qi et al. 2024), but its last rank begins as much later as that, and all wait for each other before they move.
    """
    waiting = (choice.layout.pipeline - 1) / (choice.stages_per_rank * micro_batches)
    return waiting / 3 if choice.schedule in ("zero_bubble", "zbv") else waiting


def _optimizer_seconds(work: Work, choice: Choice, layers: list[int]) -> float:
    """Reading and writing weights, gradients and states; Muon's products, which every rank of a group repeats."""
    blocks = work.blocks_of(layers)
    layout, card = choice.layout, work.card
    moved = blocks.stored(layout) * (_BYTES_PER_MOVE + 2 * state_bytes(work, matrix=True))
    moved += work.outer.stored(layout) * (_BYTES_PER_MOVE + 2 * state_bytes(work, matrix=False))
    moved += (blocks + work.outer).stored(layout) * 3 * average_bytes(work)  # weight and average read, the average written
    seconds = moved / (card.bandwidth * MEMORY_SHARE)
    if work.settings.offload:
        seconds += 3 * WEIGHT_BYTES * (blocks + work.outer).stored(layout) / (32e9 * LINK_SHARE)  # over PCIe and back
    if work.settings.optimizer == "muon":
        flops = sum(_muon_flops(work, layer, layout.expert) for layer in layers) / layout.tensor
        gathered = Traffic("data", "all-gather", layout.shard_ranks, len(layers), WEIGHT_BYTES * blocks.in_use(layout))
        seconds += flops / (card.flops * card.achievable)
        seconds += seconds_of(work, choice, gathered) if layout.shard_ranks > 1 else 0.0
    return seconds


def _muon_flops(work: Work, layer: int, expert_ranks: int) -> float:
    """Five Newton–Schulz iterations of every matrix: each 4 m² n + 2 m³ for the shorter side m (Jordan et al. 2024)."""
    total = 0.0
    for part in layer_parts(work.model, layer):
        for shape in part.shapes:
            if len(shape) < 2:
                continue
            count = shape[0] / expert_ranks if len(shape) == 3 else 1
            short, long = sorted(shape[-2:])
            total += count * 5 * (4 * short**2 * long + 2 * short**3)
    return total
