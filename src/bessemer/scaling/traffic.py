"""What a rank sends in a step, by axis: how many collectives, and how many bytes leave it.

Sizes are those of ring algorithms (Thakur et al. 2005): of a tensor of S bytes over n ranks, a gather and a reduce-scatter
send S (n - 1) / n from each rank, an all-reduce twice as much, an all-to-all of S bytes a rank S (n - 1) / n. Whatever the
algorithm, no rank can send less.

Tests run the project's own step on fake process groups of up to 1,024 ranks and count its collectives.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from bessemer.scaling.work import CHUNK_ELEMENTS, WEIGHT_BYTES, Choice, Weights, Work

#: Bytes of an index.
_INDEX_BYTES = 8

Axis = Literal["data", "tensor", "context", "pipeline", "expert"]
#: How many times a tensor of a collective leaves a rank, as a function of the number of ranks.
Operation = Literal["all-gather", "reduce-scatter", "all-reduce", "all-to-all", "send"]


@dataclass(frozen=True)
class Traffic:
    """Collectives of one kind in a step of the busiest rank. size: bytes of the whole tensors, all together."""

    axis: Axis
    operation: Operation
    ranks: int
    count: int
    size: float

    @property
    def sent(self) -> float:
        """Bytes that leave the rank."""
        if self.operation == "send":
            return self.size
        share = (self.ranks - 1) / self.ranks
        return self.size * share * (2 if self.operation == "all-reduce" else 1)


def traffic(work: Work, choice: Choice) -> list[Traffic]:
    """Every kind of collective of a step that moves tensors; the few that move a number each are left out."""
    found = [*_data(work, choice), *_tensor(work, choice), *_context(work, choice), *_expert(work, choice)]
    return [*found, *_pipeline(work, choice)]


def held_layers(work: Work, choice: Choice) -> list[int]:
    """The layers of the pipeline rank that has most of them, the last one among equals: it also has the head."""
    stages, ranks = work.stage_layers(choice.stages), choice.layout.pipeline
    of_ranks = [[layer for stage in range(rank, choice.stages, ranks) for layer in stages[stage]] for rank in range(ranks)]
    return max(reversed(of_ranks), key=len)


def _data(work: Work, choice: Choice) -> Iterator[Traffic]:
    """FSDP: each block's weights are gathered forward and backward, what is outside the blocks once; gradients are summed and
    scattered; copies of the model add them up. Every micro-batch does so, but in a pipeline, where both happen once a step."""
    layout, layers = choice.layout, held_layers(work, choice)
    if layout.world_size == 1:
        return
    micro_batches = work.micro_batches(choice) if layout.pipeline == 1 else 1
    passes = 2 if layout.pipeline == 1 else 1
    blocks = work.blocks_of(layers)
    dense, experts = Weights(blocks.cut, blocks.whole), Weights(experts=blocks.experts)
    outer = work.outer
    groups = [(layout.shard_ranks, dense, outer, len(layers))]
    if experts.experts:
        if layout.expert > 1:
            sparse = sum(1 for layer in layers if work.blocks[layer].experts)
            groups.append((layout.shard_ranks // layout.expert, experts, Weights(), sparse))
        else:
            groups = [(layout.shard_ranks, dense + experts, outer, len(layers))]
    for ranks, inside, outside, units in groups:
        root = 1 if outside != Weights() else 0
        block_bytes, root_bytes = (WEIGHT_BYTES * weights.in_use(layout) for weights in (inside, outside))
        gathers, gathered = passes * units + root, passes * block_bytes + root_bytes
        scatters, scattered = units + root, block_bytes + root_bytes
        if ranks > 1:
            yield Traffic("data", "all-gather", ranks, gathers * micro_batches, gathered * micro_batches)
            yield Traffic("data", "reduce-scatter", ranks, scatters * micro_batches, scattered * micro_batches)
        copies = layout.data_replicate
        if copies > 1:
            yield Traffic("data", "all-reduce", copies, scatters * micro_batches, scattered * micro_batches / ranks)


def _tensor(work: Work, choice: Choice) -> Iterator[Traffic]:
    """Before each part of a block its tokens are gathered, after it the ranks' outputs are summed and scattered, and backward
    the other way round (Korthikanti et al. 2022, section 4.2); once more each, but for the last, where a block is computed
    again. Routings go with the tokens. Embedding and head do the same with float32, and the head's gradient is summed on
    every rank. So are those of what the axis does not cut, and three numbers a token for the loss."""
    ranks, model = choice.layout.tensor, work.model
    if ranks == 1:
        return
    tokens, c, chosen = work.tokens(choice), work.compute_bytes, model.num_experts_per_tok
    layers, micro_batches = held_layers(work, choice), work.micro_batches(choice)
    heads = 1
    if model.num_hidden_layers - 1 in layers:  # the blocks that predict further ahead are made as the last one is
        layers = [*layers, *[model.num_hidden_layers - 1] * model.num_nextn_predict_layers]
        heads += model.num_nextn_predict_layers
    again = 1 if choice.recompute != "none" else 0
    # embeddings are summed and scattered, states gathered after a last norm; numbers and bytes a token
    gathers, gathered = 2 * heads, float(2 * heads * WEIGHT_BYTES * model.hidden_size)
    scatters, scattered = heads, float(heads * WEIGHT_BYTES * model.hidden_size)
    for layer in layers:
        read = WEIGHT_BYTES if model.types[layer] == "linear_attention" else c  # which computes in the type that it is given
        gathers, scatters = gathers + 4 + 2 * again, scatters + 4 + again
        gathered += model.hidden_size * ((read + c) * (1 + again) + 2 * c)
        scattered += model.hidden_size * (2 * c + again * c + read + c)
        if model.is_sparse(layer) and choice.layout.expert == 1:
            gathers, scatters = gathers + 2 * (1 + again), scatters + 1
            gathered += chosen * (_INDEX_BYTES + WEIGHT_BYTES) * (1 + again)
            scattered += chosen * WEIGHT_BYTES
        if model.is_sparse(layer):  # choices of all tokens, for the figures; and logits, for the losses
            in_losses = bool(model.router_aux_loss_coef or model.router_z_loss_coef)
            gathers += (1 + in_losses) * (1 + again)
            gathered += (chosen * _INDEX_BYTES + in_losses * model.num_experts * WEIGHT_BYTES) * (1 + again)
    count, whole = work.whole_tensors(held_layers(work, choice))
    chunks = -(-tokens // max(1, CHUNK_ELEMENTS // (model.vocab_size // ranks)))
    reduced = heads * tokens * (model.hidden_size + 3) + whole
    yield Traffic("tensor", "all-gather", ranks, gathers * micro_batches, gathered * tokens * micro_batches)
    yield Traffic("tensor", "reduce-scatter", ranks, scatters * micro_batches, scattered * tokens * micro_batches)
    reductions = heads * (1 + 2 * chunks) + count
    yield Traffic("tensor", "all-reduce", ranks, reductions * micro_batches, WEIGHT_BYTES * reduced * micro_batches)


def _context(work: Work, choice: Choice) -> Iterator[Traffic]:
    """Keys and values of all the row's tokens come to every rank, forward and where attention is computed again; their
    gradients go back."""
    ranks, model = choice.layout.context, work.model
    if ranks == 1:
        return
    layers = [layer for layer in held_layers(work, choice) if model.types[layer] != "linear_attention"]
    heads = model.num_attention_heads if model.is_latent else model.num_key_value_heads
    keys = model.qk_nope_head_dim + model.qk_rope_head_dim if model.is_latent else model.head_dim
    values = model.v_head_dim if model.is_latent else model.head_dim
    micro_batches = work.micro_batches(choice)
    rows = choice.micro_batch_size * work.settings.context_length
    size = rows * heads * (keys + values) * work.compute_bytes / choice.layout.tensor * len(layers) * micro_batches
    forward = 2 if choice.recompute != "none" else 1
    yield Traffic("context", "all-gather", ranks, 2 * forward * len(layers) * micro_batches, forward * size)
    yield Traffic("context", "reduce-scatter", ranks, 2 * len(layers) * micro_batches, size)


def _expert(work: Work, choice: Choice) -> Iterator[Traffic]:
    """Every visit of a token goes to its expert and comes back, forward and backward."""
    ranks, model = choice.layout.expert, work.model
    if ranks == 1:
        return
    layers = [layer for layer in held_layers(work, choice) if model.is_sparse(layer)]
    micro_batches = work.micro_batches(choice)
    passes = 6 if choice.recompute != "none" else 4
    tokens = work.tokens(choice) / choice.layout.tensor
    each = tokens * model.num_experts_per_tok * model.hidden_size * work.compute_bytes
    yield Traffic(
        "expert", "all-to-all", ranks, passes * len(layers) * micro_batches, passes * each * len(layers) * micro_batches
    )


def _pipeline(work: Work, choice: Choice) -> Iterator[Traffic]:
    """Hidden states go to the next stage, their gradients to the one before, in float32; a rank between two does both."""
    ranks = choice.layout.pipeline
    if ranks == 1:
        return
    micro_batches = work.micro_batches(choice)
    sends = 2 * choice.stages_per_rank * micro_batches
    size = work.tokens(choice) * work.model.hidden_size * WEIGHT_BYTES / choice.layout.tensor
    yield Traffic("pipeline", "send", ranks, sends, sends * size)
