"""Whether all weights are tuned, or an adapter: by the memory that each takes.

Of a weight in float32, full tuning with AdamW takes 16 bytes: 4 for itself, 4 for its gradient, 8 for two means; where products
are computed in half precision, 2 more for the copy that they read. Beside a frozen weight only an adapter has gradients and
means: a matrix of the blocks takes the bytes of the dtype in which products read it; one of 4 bits 5/8 of a byte, with its
scale. Embedding and head lie in float32.
"""

from __future__ import annotations

import torch

from bessemer.core.environment import free_memory_bytes
from bessemer.core.errors import ConfigError
from bessemer.core.figures import size
from bessemer.model.config import ModelConfig
from bessemer.posttraining.finetuning.config import Method
from bessemer.training.logit_chunks import chunk_size

#: Share of the free memory that is counted on.
_USABLE = 0.8
#: Bytes of a trained weight and of a frozen one in float32, and of one of 4 bits in groups of 32.
_TRAINED, _FLOAT32, _CODES = 16.0, 4.0, 0.625
#: Of what a block keeps for its backward pass in float32, the share that it keeps in half precision: residual states and norms
#: stay in float32.
_HALF_KEPT = 0.7


def free_bytes(device: torch.device) -> float:
    """Memory that tensors may take on a device; infinite where nothing tells."""
    if device.type == "cuda":
        return _USABLE * torch.cuda.mem_get_info(device)[0]
    free = free_memory_bytes()
    return float("inf") if free is None else _USABLE * free


def needed_bytes(
    model: ModelConfig,
    method: Method,
    rank: int,
    tokens: int,
    quantised: float | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> float:
    """Estimated peak of a step on `tokens` tokens at once. quantised: bytes of the model as it is, where it is quantised.
    dtype: of products. device: its kind, as PyTorch names it."""
    weights, ends = model.parameters(), model.vocab_size * model.hidden_size * (1 if model.tie_word_embeddings else 2)
    # what products read: float32 as it lies, or a copy
    width, is_half = float(dtype.itemsize), dtype != torch.float32
    # what a block keeps for its backward pass: about 16 states of the model's width and 4 of the feed-forward's, in float32
    kept = 4.0 * tokens * model.num_hidden_layers * (16 * model.hidden_size + 4 * model.intermediate_size)
    kept *= _HALF_KEPT if is_half else 1.0
    # logits of a chunk of tokens, and those of a block of it in float32
    chunk = chunk_size(device)
    logits = model.vocab_size * min(tokens, chunk.tokens(model.vocab_size))
    kept += width * logits + 4.0 * min(logits, chunk.max_block_logits)
    copied = width if is_half else 0.0
    if method == "full":
        return (_TRAINED + copied) * weights + kept
    # each layer's matrices have about as many outputs and inputs as seven of the model's width and three of the feed-forward's
    adapter = rank * model.num_hidden_layers * (11 * model.hidden_size + 3 * model.intermediate_size)
    trained = (_TRAINED + copied) * adapter + kept + copied * model.vocab_size * model.hidden_size
    if method == "lora":
        return width * (weights - ends) + _FLOAT32 * ends + trained
    frozen = _CODES * (weights - ends) + _FLOAT32 * ends if quantised is None else quantised
    # the largest matrix, dequantised for its product
    return frozen + trained + (_FLOAT32 + copied) * model.hidden_size * model.intermediate_size


def memory_needs(
    model: ModelConfig,
    rank: int,
    tokens: int,
    quantised: float | None,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> dict[Method, float]:
    """`needed_bytes` of each way in which a model can be tuned, the one that takes most first."""
    methods: tuple[Method, ...] = ("qlora",) if quantised is not None else ("full", "lora", "qlora")
    return {method: needed_bytes(model, method, rank, tokens, quantised, dtype=dtype, device=device) for method in methods}


def choose_method(
    model: ModelConfig,
    rank: int,
    tokens: int,
    free: float,
    quantised: float | None,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> tuple[Method, str]:
    """The first way to tune that memory holds, and why. dtype, device: as of `needed_bytes`. Raises ConfigError when it holds
    none."""
    needs = memory_needs(model, rank, tokens, quantised, dtype=dtype, device=device)
    for method, needed in needs.items():
        if needed <= free:
            larger = list(needs)[: list(needs).index(method)]
            more = "".join(f", {one} {size(needs[one])}" for one in larger)
            of = "memory" if free == float("inf") else f"of {size(free)} that can be used"
            reason = "the model is quantised" if quantised is not None else f"it takes about {size(needed)}{more}, {of}"
            return method, reason
    least = list(needs)[-1]
    raise ConfigError(
        f"--method: even {least} takes about {size(needs[least])}, and {size(free)} can be used; take a smaller model, a "
        f"shorter --context-length, or try with --method {least}"
    )
