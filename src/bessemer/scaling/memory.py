"""Memory of a rank by kind, and its peak within a step. Bytes.

Weights, gradients and optimizer states follow from the layout: FSDP shards them over data_shard × context, the tensor axis
shards matrices, the pipeline layers, the expert axis experts (Rajbhandari et al. 2020, section 3; Shoeybi et al. 2019).
`activations` counts the stored activations. The rest are buffers: weights gathered by FSDP, autocast's copies of weights, the
head's logits and gradients, masks.

They do not all exist at once: gradients appear while activations are freed. The peak is the largest of five moments.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from bessemer.model.activations import final_norm_activations, mtp_activations
from bessemer.model.attention.base import variant_of_type
from bessemer.model.parts import StoredActivations
from bessemer.scaling.job import NARROW_BYTES, WEIGHT_BYTES, Candidate, PlannedJob, Weights
from bessemer.training.optim.registry import find_optimizer

#: Bytes of state per weight assumed of an optimizer that does not say: two float32 numbers, as AdamW.
_UNKNOWN_STATE = 8.0


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank by kind, and the peak."""

    weights: float
    gradients: float
    optimizer_states: float
    activations: float
    buffers: dict[str, float] = field(default_factory=dict)
    peak: float = 0.0

    @property
    def kinds(self) -> dict[str, float]:
        """Bytes by the name of the kind, in display order."""
        first = {
            "weights": self.weights,
            "gradients": self.gradients,
            "optimizer states": self.optimizer_states,
            "activations": self.activations,
        }
        return first | self.buffers


def memory(job: PlannedJob, candidate: Candidate) -> Memory:
    """The memory of the rank that needs most: the first or the last of a pipeline."""
    stages = job.stage_layers(candidate.stages)
    ranks = {0: list(range(0, candidate.stages, candidate.layout.pipeline))}
    last = candidate.layout.pipeline - 1
    ranks[last] = list(range(last, candidate.stages, candidate.layout.pipeline))
    return max((_of_rank(job, candidate, [stages[stage] for stage in held], rank) for rank, held in ranks.items()), key=_peak)


def _peak(memory: Memory) -> float:
    return memory.peak


def state_bytes(job: PlannedJob, *, matrix: bool) -> float:
    """Bytes of optimizer state per weight, of a block's matrix or of another parameter, as the optimizer declares."""
    said = find_optimizer(job.settings.optimizer).state_bytes
    return _UNKNOWN_STATE if said is None else said(job.settings, matrix)


def assumed_states(job: PlannedJob) -> str | None:
    """The assumption about an optimizer that does not declare its state, for the plan; None where it does."""
    if find_optimizer(job.settings.optimizer).state_bytes is not None:
        return None
    return f"assumed: {_UNKNOWN_STATE:.0f} bytes a weight for the states of {job.settings.optimizer}, which does not say"


def average_bytes(job: PlannedJob) -> float:
    """Bytes of the moving average per weight."""
    return 0.0 if job.settings.ema is None else WEIGHT_BYTES


def _of_rank(job: PlannedJob, candidate: Candidate, layers: list[range], rank: int) -> Memory:
    layout = candidate.layout
    first, last = rank == 0, rank == layout.pipeline - 1
    held = [layer for stage in layers for layer in stage]
    blocks = job.blocks_of(held)
    outer = job.outer if layout.pipeline == 1 else _end(job, first=first, last=last)
    stored = (blocks + outer).stored(layout)
    states = blocks.stored(layout) * state_bytes(job, matrix=True) + outer.stored(layout) * state_bytes(job, matrix=False)
    weights, gradients = WEIGHT_BYTES * stored, WEIGHT_BYTES * stored
    offloaded = job.settings.offload

    tokens = job.tokens(candidate)
    in_flight = micro_batches_in_flight(candidate, job.micro_batches(candidate), rank)
    kept = job.activations_of(held, job.numerics(candidate), candidate.recompute) + _other_keys(job, candidate, held)
    passing = kept.per_token(layout.tensor) * tokens * in_flight
    ends = _end_activations(job, candidate, tokens) if last else 0.0
    activations = passing + ends

    copies = _autocast_copies(job, candidate, blocks)
    gathered, scattering = _fsdp_buffers(job, candidate, held, outer)
    masks = _mask_bytes(job, candidate)
    head_forward, head_backward, head_gradient = _head_bytes(job, candidate, tokens) if last else (0.0, 0.0, 0.0)
    largest, again, transient = _backward_bytes(job, candidate, held, tokens)

    accumulating = job.micro_batches(candidate) > 1
    average = 0.0 if offloaded else average_bytes(job) * stored
    standing = 0.0 if offloaded else weights + states + average
    always = masks + gathered + (gradients if accumulating and not offloaded else 0.0)
    # recomputation runs in its own autocast context, whose copies are freed with it
    late_copies = copies if candidate.recompute == "none" else copies / len(held)
    alone = candidate.layout.world_size == 1
    moments = {
        "forward": always + activations + copies + head_forward,
        "head": always + activations + (copies if candidate.recompute == "none" else 0.0) + head_backward,
        "backward": always + passing + late_copies + again + transient + scattering + (head_gradient if alone else 0.0),
        "first block": masks + gathered + gradients + late_copies / len(held) + transient + scattering + largest,
        "step": gradients + _step_bytes(job, candidate),
    }
    buffers = {
        "average of the weights": average,
        "gathered weights and gradients": gathered + scattering,
        "autocast copies": copies,
        "logits and their gradients": max(head_forward, head_backward),
        "backward pass": again + transient,
        "masks": masks,
    }
    return Memory(
        0.0 if offloaded else weights,
        gradients,
        0.0 if offloaded else states,
        activations,
        {name: size for name, size in buffers.items() if size},
        standing + max(moments.values()),
    )


def _end(job: PlannedJob, *, first: bool, last: bool) -> Weights:
    """The weights outside the blocks of a pipeline's first rank, its last, or one between."""
    model = job.model
    table = model.vocab_size * model.hidden_size
    positions = model.max_position_embeddings * model.hidden_size if model.position_type == "learned" else 0
    return Weights(cut=(table + positions if first else 0) + (table if last else 0), whole=model.hidden_size if last else 0)


def micro_batches_in_flight(candidate: Candidate, micro_batches: int, rank: int) -> float:
    """Micro-batches whose activations a rank stores at once, in units of all its layers."""
    ranks = candidate.layout.pipeline
    if ranks == 1:
        return 1.0
    if candidate.schedule == "gpipe":
        return float(micro_batches)
    if candidate.schedule == "1f1b":
        return float(min(micro_batches, ranks - rank))
    if candidate.schedule in ("zero_bubble", "zbv"):
        # until the weight gradients are computed
        return float(min(micro_batches, ranks))
    # warm-up includes a round of the later stages (Narayanan et al. 2021; Korthikanti et al. 2022, section 4.2.3)
    stages = candidate.stages_per_rank
    warm_up = 2 * (ranks - rank - 1) + (stages - 1) * ranks + 1
    return min(float(micro_batches), warm_up / stages)


def _other_keys(job: PlannedJob, candidate: Candidate, held: list[int]) -> StoredActivations:
    """Gathered keys and values of the other ranks of the context axis."""
    if candidate.layout.context == 1 or candidate.recompute == "full":
        return StoredActivations()
    numbers = sum(heads.numbers * layers for heads, layers in job.training_shapes(held))
    return StoredActivations(heads=numbers * job.compute_bytes * (candidate.layout.context - 1))


def _end_activations(job: PlannedJob, candidate: Candidate, tokens: int) -> float:
    """Activations of the last norm, its output during the loss, and multi-token prediction blocks."""
    numerics, model = job.numerics(candidate), job.model
    own = final_norm_activations(model, numerics).per_token(candidate.layout.tensor)
    total = (own + model.hidden_size * 4) * tokens
    for _ in range(model.num_nextn_predict_layers):
        extra = mtp_activations(model, numerics) + final_norm_activations(model, numerics)
        total += (
            (extra + job.kept(model.num_hidden_layers - 1, numerics)).per_token(candidate.layout.tensor) + model.hidden_size * 4
        ) * tokens
    return total


def _autocast_copies(job: PlannedJob, candidate: Candidate, blocks: Weights) -> float:
    """Autocast's copies of cast matrices, kept until the forward pass ends and by matmuls until their backward."""
    if job.compute_bytes == WEIGHT_BYTES or (job.gathers_narrow and candidate.layout.stage_ranks > 1):
        return 0.0
    return job.compute_bytes * blocks.in_use(candidate.layout)


def _fsdp_buffers(job: PlannedJob, candidate: Candidate, held: list[int], outer: Weights) -> tuple[float, float]:
    """(gathered weights, unreduced gradients): weights of two blocks and a third in the receive buffer, and those outside the
    blocks throughout; whole gradients of a block, and once more in the send buffer. In a pipeline weights stay gathered, and
    gradients whole, until the last micro-batch of the step."""
    if candidate.layout.world_size == 1:
        return 0.0, 0.0
    layout, blocks, gathered_bytes = candidate.layout, job.blocks_of(held), WEIGHT_BYTES
    if job.gathers_narrow and layout.stage_ranks > 1:
        matrices, gathered_bytes = job.matrices_of(held), NARROW_BYTES
        blocks, outer = matrices, outer + (blocks - matrices)
        block = max(job.matrices_of([layer]).in_use(layout) for layer in held)
    else:
        block = max(job.blocks[layer].in_use(layout) for layer in held)
    root = WEIGHT_BYTES * outer.in_use(layout)
    if layout.pipeline > 1:
        whole = blocks.in_use(layout)
        return root + gathered_bytes * whole, root + WEIGHT_BYTES * (whole + block)
    return root + min(3, len(held) + 1) * gathered_bytes * block, root + (gathered_bytes + WEIGHT_BYTES) * block


def _mask_bytes(job: PlannedJob, candidate: Candidate) -> float:
    """Masks of the kinds of layers that have one: for a window, packed documents or context parallelism. None where training
    lists blocks of scores instead (`training.model_setup`)."""
    model, length, layout = job.model, job.settings.context_length, candidate.layout
    on_gpu, whole = job.card.name != "cpu", layout.context == layout.pipeline == 1
    if job.settings.packed and on_gpu and whole and candidate.recompute != "selective":
        return 0.0
    rows = candidate.micro_batch_size if job.settings.packed else 1
    masked = {kind for kind in model.types if not variant_of_type(model, kind).recurrent}
    needing = masked if job.settings.packed or candidate.layout.context > 1 else {kind for kind in masked if model.window(kind)}
    return float(len(needing) * rows * length**2 // candidate.layout.context * job.compute_bytes)


def _head_bytes(job: PlannedJob, candidate: Candidate, tokens: int) -> tuple[float, float, float]:
    """Buffers of the head's loss: (forward pass, start of the backward pass, afterwards).

    A chunk of logits, blocks of it in float32, copies for the matmuls, the gradients of the hidden states and of the head, in
    half precision first of a chunk; then both once more, scaled. On a GPU also hidden states without those of masked tokens.
    """
    model, c, half = job.model, job.compute_bytes, job.compute_bytes != WEIGHT_BYTES
    vocabulary, width = model.vocab_size // candidate.layout.tensor, model.hidden_size
    heads, table, size = 1 + model.num_nextn_predict_layers, vocabulary * width, job.chunk_size
    chunk = vocabulary * min(tokens, size.tokens(vocabulary))
    block = vocabulary * min(tokens, size.block_tokens(vocabulary, sharded=candidate.layout.tensor > 1))
    # logits unless they are float32 already, probabilities, and the tanh of a softcap
    blocks = 4 * block * (half + 1 + (model.final_logit_softcapping is not None))
    if job.on_cpu and half and model.final_logit_softcapping is None and candidate.layout.tensor == 1:
        # compiled kernels turn the logits into their gradient in place
        blocks = 0
    copies = c * (table + tokens * width) if half else 0.0
    unmasked = 0 if job.on_cpu else 4 * tokens * width
    kept = c * tokens * width + 4 * table
    forward = heads * kept + copies + unmasked + c * chunk + blocks + (c * table if half else 0.0)
    backward = heads * kept + c * tokens * width + 4 * table
    return forward, backward, 4 * table


def _backward_bytes(job: PlannedJob, candidate: Candidate, held: list[int], tokens: int) -> tuple[float, float, float]:
    """Backward pass of a block: (all its activations, the recomputed part of them, gradients of its widest tensors).

    Gradients of inner channels exist at once, beyond the tensors that they replace, for as many tensors as were multiplied.
    """
    model, numerics, tensor = job.model, job.numerics(candidate), candidate.layout.tensor
    largest = again = widest = 0.0
    for layer in {(model.types[layer], model.is_sparse(layer)): layer for layer in held}.values():
        whole = job.kept(layer, numerics).per_token(tensor)
        largest, again = (
            max(largest, whole),
            max(again, whole - job.kept(layer, numerics, candidate.recompute).per_token(tensor)),
        )
        inner = model.intermediate_size * (2 if model.gated_mlp else 1)
        if model.is_sparse(layer):
            inner = 2 * model.num_experts_per_tok * model.moe_intermediate_size
        widest = max(widest, inner / tensor * numerics.compute, model.hidden_size * 4)
    return largest * tokens, again * tokens, widest * tokens


def _step_bytes(job: PlannedJob, candidate: Candidate) -> float:
    """Buffers of the optimizer step: on many ranks a float64 copy of the largest gradient and its squares, for the norm."""
    if candidate.layout.world_size == 1:
        return 0.0
    largest = max(job.model.vocab_size * job.model.hidden_size, max(block.experts for block in job.blocks) / 2)
    return 16 * largest / (candidate.layout.shard_ranks * candidate.layout.tensor)
