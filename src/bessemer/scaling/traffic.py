"""Communication of a rank in a step, by axis: number of collectives and bytes sent.

Sizes are those of ring algorithms (Thakur et al. 2005): of a tensor of S bytes over n ranks, a gather and a reduce-scatter
send S (n - 1) / n from each rank, an all-reduce twice as much, an all-to-all of S bytes a rank S (n - 1) / n. Whatever the
algorithm, no rank can send less.

Tests run the project's own step on fake process groups of up to 1,024 ranks and count its collectives.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from bessemer.scaling.job import NARROW_BYTES, WEIGHT_BYTES, Candidate, TrainingJob, Weights

#: Bytes of an index.
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


def traffic(job: TrainingJob, candidate: Candidate) -> list[Traffic]:
    """Every kind of collective of a step that sends tensors; the few that send single numbers are left out."""
    collectives = [*_data(job, candidate), *_tensor(job, candidate), *_context(job, candidate), *_expert(job, candidate)]
    return [*collectives, *_pipeline(job, candidate)]


def held_layers(job: TrainingJob, candidate: Candidate) -> list[int]:
    """The layers of the pipeline rank with most layers, the last among equals, since it also has the head."""
    stages, ranks = job.stage_layers(candidate.stages), candidate.layout.pipeline
    of_ranks = [[layer for stage in range(rank, candidate.stages, ranks) for layer in stages[stage]] for rank in range(ranks)]
    return max(reversed(of_ranks), key=len)


def _data(job: TrainingJob, candidate: Candidate) -> Iterator[Traffic]:
    """FSDP: an all-gather of each block's weights forward and backward, one of the rest; a reduce-scatter of gradients; an
    all-reduce over replicas. In every micro-batch; in a pipeline once a step. In bfloat16 only matrices are gathered with their
    block."""
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
        block_size, root_size = (weights.in_use(layout) for weights in (inside, outside))
        gathers, gathered = passes * units + root, passes * gathered_bytes * block_size + WEIGHT_BYTES * root_size
        scatters, scattered = units + root, WEIGHT_BYTES * (block_size + root_size)
        if ranks > 1:
            yield Traffic("data", "all-gather", ranks, gathers * micro_batches, gathered * micro_batches)
            yield Traffic("data", "reduce-scatter", ranks, scatters * micro_batches, scattered * micro_batches)
        copies = layout.data_replicate
        if copies > 1:
            yield Traffic("data", "all-reduce", copies, scatters * micro_batches, scattered * micro_batches / ranks)


def _tensor(job: TrainingJob, candidate: Candidate) -> Iterator[Traffic]:
    """An all-gather of tokens before attention and feed-forward, a reduce-scatter of outputs after them, and the reverse
    backward (Korthikanti et al. 2022, section 4.2); once more each, except the last, where a block is recomputed. Routings go
    with the tokens. Embedding and head do the same in float32. All-reduces: the head's gradient, gradients of replicated
    parameters, and three numbers a token for the loss."""
    ranks, model = candidate.layout.tensor, job.model
    if ranks == 1:
        return
    tokens, c, chosen = job.tokens(candidate), job.compute_bytes, model.num_experts_per_tok
    layers, micro_batches = held_layers(job, candidate), job.micro_batches(candidate)
    heads = 1
    if model.num_hidden_layers - 1 in layers:
        # multi-token prediction blocks are built as the last layer is
        layers = [*layers, *[model.num_hidden_layers - 1] * model.num_nextn_predict_layers]
        heads += model.num_nextn_predict_layers
    again = 1 if candidate.recompute != "none" else 0
    # embeddings are reduce-scattered, hidden states gathered after a last norm; counts and bytes per token
    gathers, gathered = 2 * heads, float(2 * heads * WEIGHT_BYTES * model.hidden_size)
    scatters, scattered = heads, float(heads * WEIGHT_BYTES * model.hidden_size)
    for layer in layers:
        # linear attention computes in the dtype of its input
        read = WEIGHT_BYTES if model.types[layer] == "linear_attention" else c
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


def _context(job: TrainingJob, candidate: Candidate) -> Iterator[Traffic]:
    """An all-gather of keys and values, forward and where attention is recomputed; a reduce-scatter of their gradients."""
    ranks, model = candidate.layout.context, job.model
    if ranks == 1:
        return
    layers = [layer for layer in held_layers(job, candidate) if model.types[layer] != "linear_attention"]
    heads = model.num_attention_heads if model.is_latent else model.num_key_value_heads
    keys = model.qk_nope_head_dim + model.qk_rope_head_dim if model.is_latent else model.head_dim
    values = model.v_head_dim if model.is_latent else model.head_dim
    micro_batches = job.micro_batches(candidate)
    rows = candidate.micro_batch_size * job.settings.context_length
    size = rows * heads * (keys + values) * job.compute_bytes / candidate.layout.tensor * len(layers) * micro_batches
    forward = 2 if candidate.recompute != "none" else 1
    yield Traffic("context", "all-gather", ranks, 2 * forward * len(layers) * micro_batches, forward * size)
    yield Traffic("context", "reduce-scatter", ranks, 2 * len(layers) * micro_batches, size)


def _expert(job: TrainingJob, candidate: Candidate) -> Iterator[Traffic]:
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


def _pipeline(job: TrainingJob, candidate: Candidate) -> Iterator[Traffic]:
    """Sends of hidden states to the next stage and of their gradients to the previous one, in float32; a middle rank does
    both."""
    ranks = candidate.layout.pipeline
    if ranks == 1:
        return
    micro_batches = job.micro_batches(candidate)
    sends = 2 * candidate.stages_per_rank * micro_batches
    size = job.tokens(candidate) * job.model.hidden_size * WEIGHT_BYTES / candidate.layout.tensor
    yield Traffic("pipeline", "send", ranks, sends, sends * size)
