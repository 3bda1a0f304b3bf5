"""What a fine-tuning takes of memory, by part, computed before a model is read.

Standing: the weights as they lie, an adapter, and for each trained number in float32 its gradient and AdamW's two means. Per
step: the activations that the backward pass needs (`model.activations`), autocast's copies, the head's logits and gradients,
masks of packed rows, and where weights are codes the largest matrix dequantised. They do not all exist at once: gradients
appear while activations are freed, so the peak is the largest of a few moments of a step, as in `scaling.memory`, which plans
layouts of many processes; this one knows frozen weights, adapters and codes.

Beside a frozen weight of a norm its unscaled output is not kept, since no gradient of the weight reads it.

On a processor these tensors lie in the process that a user sees: beside the interpreter, the libraries and the data, in a heap
that has holes between what lives, and after the model was read, asked questions, and asked general tasks. `process_memory` is
what the whole command takes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from math import prod

from bessemer.model.activations import Recompute, block_activations, final_norm_activations
from bessemer.model.adapters.folder import adaptable_layers
from bessemer.model.adapters.trained import matching_layers, modules_of
from bessemer.model.config import ModelConfig
from bessemer.model.cpu_kernels import library
from bessemer.model.decoder import Decoder
from bessemer.model.initialisation import empty_decoder
from bessemer.model.parts import Numerics
from bessemer.model.quantisation.config import SCHEMES, QuantizeConfig
from bessemer.model.quantisation.quantised_decoder import quantisable
from bessemer.model.vision.config import VisionLanguageConfig
from bessemer.model.vision.costs import PicturesOfStep, training_memory
from bessemer.posttraining.sft.config import Method
from bessemer.training.logit_chunks import chunk_size

#: Bytes of a number in float32; of AdamW's two means.
_FLOAT32, _MEANS = 4.0, 8.0
#: Bytes per number while a quantised matrix is dequantised: its code in a byte, and in float32 the number before and after
#: scaling.
_DEQUANTISING = 9.0


#: What training and the engine load and set up once the plan is made: modules, products' kernels, two more tokenizers.
_LATER = 140e6
#: Holes of the heap, beside what a step makes and frees.
_HOLES = 0.15
#: Pages of a file that are in memory while it is read: at most these, beside those of the largest tensor.
_READ_AT_ONCE = 1 << 26
#: Tokens of a step of the engine that answers questions and general tasks.
_ENGINE_TOKENS = 512
#: Tokens whose keys and values that engine still keeps at the end: the packaged tasks', with the answers that they offer.
_CACHED_TOKENS = 4000


@dataclass(frozen=True)
class TuningShape:
    """Sizes of a step. rows, length: of a micro-batch. dtype_bytes: of the operands of matmuls. frozen: scheme of the blocks'
    frozen weights under an adapter; None: not quantised. stored: bytes of a model that is stored quantised; None: it is not.
    patterns: names of the layers that an adapter changes; empty: all. whole: names of modules that are trained whole besides.
    micro_batches: number in a step; their gradients are summed. paged: whether AdamW's means lie outside the device's memory
    (`training.optim.paged`). wide_base: whether the frozen weights under an adapter lie in float32 whatever products read, as
    those of models that read pictures do."""

    rows: int
    length: int
    dtype_bytes: int = 4
    device: str = "cpu"
    rank: int = 16
    dora: bool = False
    dropout: bool = False
    frozen: QuantizeConfig | None = None
    stored: float | None = None
    patterns: tuple[str, ...] = ()
    whole: tuple[str, ...] = ()
    recompute: Recompute = "none"
    micro_batches: int = 1
    paged: bool = False
    wide_base: bool = False

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch."""
        return self.rows * self.length


@dataclass(frozen=True)
class TuningMemory:
    """Bytes of each part, and the largest sum that exists at once."""

    parts: Mapping[str, float]
    peak: float


@dataclass(frozen=True)
class _Numbers:
    """Counts of a model's parameters. matrices: the blocks' matrices that only matmuls read. trained: all parameters, or the
    adapter's and those of modules trained whole (`whole`). copied: those of `trained` that autocast copies. head: the head's
    matrix, if it is trained."""

    weights: int
    matrices: int
    largest: int
    trained: int
    copied: int
    head: int
    whole: int = 0


def with_vision(
    memory: TuningMemory, config: VisionLanguageConfig, method: Method, pictures: PicturesOfStep, shape: TuningShape
) -> TuningMemory:
    """The memory of tuning a decoder with its encoder of pictures and projector, which learn where all weights do."""
    learns = method == "full"
    seeing = training_memory(config, pictures, encoder=learns, projector=learns, dtype_bytes=shape.dtype_bytes)
    standing = sum(memory.parts.get(part, 0.0) for part in ("weights", "adapter", "gradients", "optimizer states"))
    program = sum(memory.parts.get(part, 0.0) for part in ("program, libraries and data", "holes of the heap"))
    peak = seeing.peak_with(memory.peak, program + standing, accumulates=shape.micro_batches > 1)
    return TuningMemory({**memory.parts, "encoder of pictures": peak - memory.peak}, peak)


def tuning_memory(model: ModelConfig, method: Method, shape: TuningShape) -> TuningMemory:
    """The memory of a step with a method of tuning, in one process."""
    numbers = _numbers(model, method, shape)
    c, tokens, is_half = float(shape.dtype_bytes), shape.tokens, shape.dtype_bytes != 4
    weights = _weight_bytes(model, method, shape, numbers)
    trained = _FLOAT32 * numbers.trained
    own = 0.0 if method == "full" else trained - _FLOAT32 * numbers.whole
    # paged: the means of one tensor at a time are on a card; on a processor they are in a mapped file, which the system may
    # evict
    means = _MEANS * numbers.trained
    if shape.paged:
        means = 0.0 if shape.device == "cpu" else _MEANS * max(numbers.head, numbers.largest)
    kept, largest, whole = _activations(model, method, shape)
    passing, ends = kept * tokens, _end_bytes(model, method, shape)
    masks = float(shape.rows * shape.length**2) * c if shape.device == "cpu" else 0.0
    copied = numbers.copied + (numbers.matrices if method == "lora" and shape.wide_base else 0)
    copies = c * copied if is_half else 0.0
    late_copies = copies if shape.recompute == "none" else copies / model.num_hidden_layers
    head_forward, head_backward, head_gradient = _head_bytes(model, shape, numbers)
    # gradients of a block's widest tensors, less the tensors that they replace
    inner = model.intermediate_size * (2 if model.gated_mlp else 1)
    transient = tokens * max(inner * c, model.hidden_size * _FLOAT32)
    dequantised = 0.0
    if method == "qlora":
        dequantised = (_DEQUANTISING + (c if is_half else 0.0)) * numbers.largest
    summed = trained if shape.micro_batches > 1 else 0.0
    again = (whole - largest) * tokens
    moments = {
        "forward": summed + passing + ends + copies + max(head_forward, dequantised),
        "head": summed + passing + ends + (copies if shape.recompute == "none" else 0.0) + head_backward,
        "backward": summed + passing + late_copies + again + transient + dequantised + head_gradient,
        "first block": trained + whole * tokens + transient + late_copies / model.num_hidden_layers + dequantised,
        "step": trained,
    }
    parts = {
        "weights": weights,
        "adapter": own,
        "gradients": trained,
        "optimizer states": means,
        "activations": passing + ends,
        "copies for products": copies,
        "logits and their gradients": max(head_forward, head_backward),
        "a matrix dequantised": dequantised,
        "backward pass of a block": again + transient,
        "masks": masks,
    }
    peak = weights + own + means + masks + max(moments.values())
    return TuningMemory({name: size for name, size in parts.items() if size}, peak)


def process_memory(model: ModelConfig, method: Method, shape: TuningShape, held: float) -> TuningMemory:
    """Resident memory of the process that tunes a model on a processor, from the model's opening to its end.

    held: resident before, of the interpreter, the libraries and the data, in bytes.
    """
    step = tuning_memory(model, method, shape)
    c, is_half = float(shape.dtype_bytes), shape.dtype_bytes != 4
    table = float(model.vocab_size * model.hidden_size)
    standing = sum(step.parts.get(part, 0.0) for part in ("weights", "adapter", "optimizer states"))
    weights = step.parts["weights"] + step.parts.get("adapter", 0.0)
    holes = _HOLES * (step.peak - standing)
    # a model that is tuned whole is the file's own pages until the first update
    read = 0.0 if method == "full" else _FLOAT32 * table + min(_READ_AT_ONCE, _FLOAT32 * (model.parameters() - table))
    # logits of a step, in the type of products and in float32, autocast's copy of the head, and the cache
    asked = model.vocab_size * _ENGINE_TOKENS * (_FLOAT32 + (c if is_half else 0.0)) + (c * table if is_half else 0.0)
    asked += _CACHED_TOKENS * model.kv_bytes_per_token(4 if method == "qlora" else shape.dtype_bytes)
    asked *= 1 + _HOLES
    program = held + _LATER
    parts = {
        "program, libraries and data": program,
        **step.parts,
        "holes of the heap": holes,
        "the model's file while it is read": read,
        "answers and general tasks": asked,
    }
    peak = program + max(step.peak + holes, weights + read, weights + asked)
    return TuningMemory({name: size for name, size in parts.items() if size}, peak)


def _weight_bytes(model: ModelConfig, method: Method, shape: TuningShape, numbers: _Numbers) -> float:
    """Bytes of the model's own weights while it is tuned."""
    if method == "full" or (method == "lora" and shape.wide_base):
        return _FLOAT32 * numbers.weights
    if method == "lora":
        return shape.dtype_bytes * numbers.matrices + _FLOAT32 * (numbers.weights - numbers.matrices)
    if shape.stored is not None:
        return shape.stored
    assert shape.frozen is not None
    scheme, codes, quantised = SCHEMES.find(shape.frozen.scheme).load(), 0.0, 0
    for _, matrix in quantisable(_empty(model)):
        codes += scheme.choose(matrix[-1], shape.frozen)[0].nbytes(*matrix)
        quantised += prod(matrix)
    return codes + _FLOAT32 * (numbers.weights - quantised)


@cache
def _empty(model: ModelConfig) -> Decoder:
    return empty_decoder(model)


def _numbers(model: ModelConfig, method: Method, shape: TuningShape) -> _Numbers:
    decoder = _empty(model)
    matrices = [matrix for _, matrix in quantisable(decoder)]
    weights, largest = model.parameters(), max((prod(matrix[-2:]) for matrix in matrices), default=0)
    in_matrices, table = sum(map(prod, matrices)), model.vocab_size * model.hidden_size
    if method == "full":
        return _Numbers(weights, in_matrices, largest, weights, in_matrices, table)
    layers = adaptable_layers(decoder)
    chosen = matching_layers(layers, shape.patterns)
    adapter = sum(
        (outputs + inputs) * shape.rank + (outputs if shape.dora else 0)
        for outputs, inputs in (layers[name] for name in chosen)
    )
    beside = modules_of(decoder, shape.whole)
    trained = sum(parameter.numel() for module in beside.values() for parameter in module.parameters(recurse=False))
    ends = ("embed_tokens", "lm_head") if model.tie_word_embeddings else ("lm_head",)
    head = table if any(name in beside for name in ends) else 0
    return _Numbers(weights, in_matrices, largest, adapter + trained, adapter, head, trained)


def _activations(model: ModelConfig, method: Method, shape: TuningShape) -> tuple[float, float, float]:
    """Bytes per token: kept by all blocks; kept by the block that keeps most; and all activations of that block, which
    recomputation computes again."""
    numerics = Numerics(shape.dtype_bytes, fused_norms=method != "full" or shape.device != "cpu")
    fused = shape.device != "cpu"
    kept = largest = whole = 0.0
    # selective recomputation keeps the outputs of matmuls, also those of the adapter's
    beside = _products_beside(model, shape) if method != "full" and shape.recompute == "selective" else 0.0
    for layer in range(model.num_hidden_layers):
        own = beside + _of_block(model, layer, shape.length, numerics, shape.recompute, fused)
        kept, largest = kept + own, max(largest, own)
        whole = max(whole, _of_block(model, layer, shape.length, numerics, "none", fused))
    if shape.dropout and method != "full":
        # dropout of a layer's inputs keeps the reduced inputs and the mask: about the inputs' size once more
        width = sum(inputs for _, inputs in adaptable_layers(_empty(model)).values()) / model.num_hidden_layers
        more = width * (shape.dtype_bytes + 1)
        whole += more
        if shape.recompute == "none":
            kept, largest = kept + more * model.num_hidden_layers, largest + more
    return kept, largest, whole


def _products_beside(model: ModelConfig, shape: TuningShape) -> float:
    """Bytes per token of the outputs of an adapter's matmuls in one block."""
    layers = adaptable_layers(_empty(model))
    outputs = sum(layers[name][0] + shape.rank for name in matching_layers(layers, shape.patterns))
    return shape.dtype_bytes * outputs / model.num_hidden_layers


@cache
def _of_block(model: ModelConfig, layer: int, length: int, numerics: Numerics, recompute: Recompute, fused: bool) -> float:
    return block_activations(model, layer, length, numerics, recompute, fused=fused).per_token(1)


def _end_bytes(model: ModelConfig, method: Method, shape: TuningShape) -> float:
    """Activations of the last norm, and its output during the loss."""
    numerics = Numerics(shape.dtype_bytes, fused_norms=method != "full" or shape.device != "cpu")
    return (final_norm_activations(model, numerics).per_token(1) + _FLOAT32 * model.hidden_size) * shape.tokens


def _head_bytes(model: ModelConfig, shape: TuningShape, numbers: _Numbers) -> tuple[float, float, float]:
    """Buffers of the head's loss: in the forward pass, at the start of the backward pass, and afterwards."""
    c, tokens, width, is_half = float(shape.dtype_bytes), shape.tokens, model.hidden_size, shape.dtype_bytes != 4
    table, size = model.vocab_size * width, chunk_size(shape.device)
    chunk = model.vocab_size * min(tokens, size.tokens(model.vocab_size))
    block = model.vocab_size * min(tokens, size.block_tokens(model.vocab_size))
    blocks = _FLOAT32 * block * (is_half + 1 + (model.final_logit_softcapping is not None))
    if shape.device == "cpu" and is_half and model.final_logit_softcapping is None and library() is not None:
        # compiled kernels compute the gradient of the logits in place
        blocks = 0.0
    gradient = _FLOAT32 * numbers.head
    kept = c * tokens * width + gradient
    copies = c * (table + tokens * width) if is_half else 0.0
    unmasked = 0.0 if shape.device == "cpu" else _FLOAT32 * tokens * width
    forward = kept + copies + unmasked + c * chunk + blocks + (c * numbers.head if is_half else 0.0)
    return forward, kept + c * tokens * width + gradient, gradient
