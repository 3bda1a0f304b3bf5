"""Memory of a rank by kind, and its peak within a step. Bytes.

Weights, gradients and optimizer states follow from the layout: FSDP cuts them over data_shard × context, the tensor axis cuts
matrices, the pipeline layers, the expert axis experts (Rajbhandari et al. 2020, section 3; Shoeybi et al. 2019). What the
forward pass keeps is counted in `activations`. The rest are buffers: weights that FSDP has gathered, autocast's copies of
weights, the head's logits and gradients, masks.

They are not all there at once: gradients appear while activations go. The peak is the largest of five moments.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from bessemer.scaling.activations import Kept, ahead_kept, final_norm_kept
from bessemer.scaling.work import CHUNK_ELEMENTS, WEIGHT_BYTES, Choice, Weights, Work

#: Bytes of an optimizer's states for a weight that it moves.
_STATES = {"adamw": 8.0, "sgd": 4.0, "lion": 4.0, "adafactor": 0.02}
#: Of AdamW's in 8 bits: two bytes, and a float32 scale for every 256 of each.
_STATES_8_BIT = 2 * (1 + 4 / 256)


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank: the kinds, and the most that is there at one moment."""

    weights: float
    gradients: float
    optimizer_states: float
    activations: float
    buffers: dict[str, float] = field(default_factory=dict)
    peak: float = 0.0

    @property
    def kinds(self) -> dict[str, float]:
        """Every kind by its name, in the order in which it is shown."""
        first = {
            "weights": self.weights,
            "gradients": self.gradients,
            "optimizer states": self.optimizer_states,
            "activations": self.activations,
        }
        return first | self.buffers


def memory(work: Work, choice: Choice) -> Memory:
    """The memory of the rank that needs most: of a pipeline's first stage or its last."""
    stages = work.stage_layers(choice.stages)
    ranks = {0: list(range(0, choice.stages, choice.layout.pipeline))}
    last = choice.layout.pipeline - 1
    ranks[last] = list(range(last, choice.stages, choice.layout.pipeline))
    return max((_of_rank(work, choice, [stages[stage] for stage in held], rank) for rank, held in ranks.items()), key=_peak)


def _peak(found: Memory) -> float:
    return found.peak


def state_bytes(work: Work, *, matrix: bool) -> float:
    """Bytes of optimizer states for one weight, of a block's matrix or of anything else."""
    settings = work.settings
    if settings.optimizer == "muon" and matrix:
        return 4.0
    if settings.optimizer in ("muon", "adamw"):
        return _STATES_8_BIT if getattr(settings, "optimizer_bits", 32) == 8 else 8.0
    return _STATES.get(settings.optimizer, 8.0)  # a user's own: as AdamW


def average_bytes(work: Work) -> float:
    """Bytes of the moving average for one weight."""
    return 0.0 if work.settings.ema is None else WEIGHT_BYTES


def _of_rank(work: Work, choice: Choice, layers: list[range], rank: int) -> Memory:
    layout = choice.layout
    first, last = rank == 0, rank == layout.pipeline - 1
    held = [layer for stage in layers for layer in stage]
    blocks = work.blocks_of(held)
    outer = work.outer if layout.pipeline == 1 else _end(work, first=first, last=last)
    stored = (blocks + outer).stored(layout)
    states = blocks.stored(layout) * state_bytes(work, matrix=True) + outer.stored(layout) * state_bytes(work, matrix=False)
    weights, gradients = WEIGHT_BYTES * stored, WEIGHT_BYTES * stored
    offloaded = work.settings.offload

    tokens = work.tokens(choice)
    in_flight = micro_batches_in_flight(choice, work.micro_batches(choice), rank)
    kept = work.kept_by(held, work.numerics(choice), choice.recompute) + _other_keys(work, choice, held)
    passing = kept.per_token(layout.tensor) * tokens * in_flight
    ends = _ends_kept(work, choice, tokens) if last else 0.0
    activations = passing + ends

    copies = _autocast_copies(work, choice, blocks)
    gathered, scattering = _fsdp_buffers(work, choice, held, outer)
    masks = _mask_bytes(work, choice)
    head_forward, head_backward, head_gradient = _head_bytes(work, choice, tokens) if last else (0.0, 0.0, 0.0)
    largest, again, transient = _backward_bytes(work, choice, held, tokens)

    accumulating = work.micro_batches(choice) > 1
    average = 0.0 if offloaded else average_bytes(work) * stored
    standing = 0.0 if offloaded else weights + states + average
    always = masks + gathered + (gradients if accumulating and not offloaded else 0.0)
    # what is computed again runs under an autocast of its own, whose copies go with it
    late_copies = copies if choice.recompute == "none" else copies / len(held)
    alone = choice.layout.world_size == 1
    moments = {
        "forward": always + activations + copies + head_forward,
        "head": always + activations + (copies if choice.recompute == "none" else 0.0) + head_backward,
        "backward": always + passing + late_copies + again + transient + scattering + (head_gradient if alone else 0.0),
        "first block": masks + gathered + gradients + late_copies / len(held) + transient + scattering + largest,
        "step": gradients + _step_bytes(work, choice),
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


def _end(work: Work, *, first: bool, last: bool) -> Weights:
    """The weights outside the blocks of a pipeline's first rank, its last, or one between."""
    model = work.model
    table = model.vocab_size * model.hidden_size
    positions = model.max_position_embeddings * model.hidden_size if model.position_type == "learned" else 0
    return Weights(cut=(table + positions if first else 0) + (table if last else 0), whole=model.hidden_size if last else 0)


def micro_batches_in_flight(choice: Choice, micro_batches: int, rank: int) -> float:
    """Micro-batches whose activations a rank holds at once, in units of all its layers."""
    ranks = choice.layout.pipeline
    if ranks == 1:
        return 1.0
    if choice.schedule == "gpipe":
        return float(micro_batches)
    if choice.schedule == "1f1b":
        return float(min(micro_batches, ranks - rank))
    if choice.schedule in ("zero_bubble", "zbv"):  # until the weights' gradients are there
        return float(min(micro_batches, ranks))
    # a rank runs ahead by a whole round of its later stages (Narayanan et al. 2021; Korthikanti et al. 2022, section 4.2.3)
    stages = choice.stages_per_rank
    ahead = 2 * (ranks - rank - 1) + (stages - 1) * ranks + 1
    return min(float(micro_batches), ahead / stages)


def _other_keys(work: Work, choice: Choice, held: list[int]) -> Kept:
    """The keys and values of the tokens of the context axis's other ranks, gathered."""
    if choice.layout.context == 1 or choice.recompute == "full":
        return Kept()
    model, layers = work.model, sum(1 for layer in held if work.model.types[layer] != "linear_attention")
    heads = model.num_attention_heads if model.is_latent else model.num_key_value_heads
    width = (model.qk_nope_head_dim + model.qk_rope_head_dim + model.v_head_dim) if model.is_latent else 2 * model.head_dim
    return Kept(heads=layers * heads * width * work.compute_bytes * (choice.layout.context - 1))


def _ends_kept(work: Work, choice: Choice, tokens: int) -> float:
    """What the last norm keeps, its output while the loss is taken, and the blocks that predict further ahead."""
    numerics, model = work.numerics(choice), work.model
    own = final_norm_kept(model, numerics).per_token(choice.layout.tensor)
    total = (own + model.hidden_size * 4) * tokens
    for _ in range(model.num_nextn_predict_layers):
        extra = ahead_kept(model, numerics) + final_norm_kept(model, numerics)
        total += (
            (extra + work.kept(model.num_hidden_layers - 1, numerics)).per_token(choice.layout.tensor) + model.hidden_size * 4
        ) * tokens
    return total


def _autocast_copies(work: Work, choice: Choice, blocks: Weights) -> float:
    """Autocast keeps a copy of every matrix that it has cast until the forward pass ends, and products keep theirs longer."""
    if work.compute_bytes == WEIGHT_BYTES:
        return 0.0
    return work.compute_bytes * blocks.in_use(choice.layout)


def _fsdp_buffers(work: Work, choice: Choice, held: list[int], outer: Weights) -> tuple[float, float]:
    """(gathered weights, gradients on their way): two blocks' weights and one more in the buffer that they arrive in, what is
    outside the blocks all the time; a block's gradients whole, and once more in the buffer that they leave in. In a pipeline
    weights stay gathered, and gradients whole, until the step's last micro-batch."""
    if choice.layout.world_size == 1:
        return 0.0, 0.0
    layout = choice.layout
    block = WEIGHT_BYTES * max(work.blocks[layer].in_use(layout) for layer in held)
    root = WEIGHT_BYTES * outer.in_use(layout)
    if layout.pipeline > 1:
        whole = root + WEIGHT_BYTES * work.blocks_of(held).in_use(layout)
        return whole, whole + block
    return root + min(3, len(held) + 1) * block, root + 2 * block


def _mask_bytes(work: Work, choice: Choice) -> float:
    """The mask of every kind of layer that has one: where a window, packed documents or other ranks' tokens call for it."""
    model, length = work.model, work.settings.context_length
    rows = choice.micro_batch_size if work.settings.packed else 1
    kinds = {kind for kind in model.types if kind != "linear_attention"}
    needing = kinds if work.settings.packed or choice.layout.context > 1 else kinds - {"full_attention"}
    return float(len(needing) * rows * length**2 // choice.layout.context * work.compute_bytes)


def _head_bytes(work: Work, choice: Choice, tokens: int) -> tuple[float, float, float]:
    """Buffers of the head's loss: (while it is taken, when its backward pass begins, afterwards).

    Chunks of logits and of probabilities, copies for the products, the gradients of the states and of the head; then the
    latter once more, scaled.
    """
    model, c = work.model, work.compute_bytes
    vocabulary, width, heads = model.vocab_size / choice.layout.tensor, model.hidden_size, 1 + model.num_nextn_predict_layers
    table = vocabulary * width
    chunk = min(tokens * vocabulary, max(CHUNK_ELEMENTS, vocabulary))
    copies = c * (table + tokens * width) if c != WEIGHT_BYTES else 0.0
    kept = c * tokens * width + 4 * table
    forward = heads * kept + copies + c * (2 * chunk + table)
    backward = heads * kept + c * tokens * width + 4 * table
    return forward, backward, 4 * table


def _backward_bytes(work: Work, choice: Choice, held: list[int], tokens: int) -> tuple[float, float, float]:
    """In the backward pass of a block: (all that it kept or that is computed again, what of it is not kept, gradients of its
    widest tensors).

    Of the inner channels there are as many gradients at once, beyond the tensors that they replace, as were multiplied.
    """
    model, numerics, tensor = work.model, work.numerics(choice), choice.layout.tensor
    largest = again = widest = 0.0
    for layer in {(model.types[layer], model.is_sparse(layer)): layer for layer in held}.values():
        whole = work.kept(layer, numerics).per_token(tensor)
        largest, again = max(largest, whole), max(again, whole - work.kept(layer, numerics, choice.recompute).per_token(tensor))
        inner = model.intermediate_size * (2 if model.gated_mlp else 1)
        if model.is_sparse(layer):
            inner = 2 * model.num_experts_per_tok * model.moe_intermediate_size
        widest = max(widest, inner / tensor * numerics.compute, model.hidden_size * 4)
    return largest * tokens, again * tokens, widest * tokens


def _step_bytes(work: Work, choice: Choice) -> float:
    """While weights move: on many ranks a float64 copy of the largest gradient and its squares, for the norm."""
    if choice.layout.world_size == 1:
        return 0.0
    largest = max(work.model.vocab_size * work.model.hidden_size, max(block.experts for block in work.blocks) / 2)
    return 16 * largest / (choice.layout.shard_ranks * choice.layout.tensor)
