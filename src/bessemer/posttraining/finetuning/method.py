"""Whether all weights are tuned, or an adapter: by the memory that each takes.

Of a weight in float32, full tuning with AdamW takes 16 bytes: 4 for itself, 4 for its gradient, 8 for two means. Beside a
frozen weight only an adapter has gradients and means; a weight of 4 bits takes 5/8 of a byte with its scale.
"""

from __future__ import annotations

import torch

from bessemer.core.environment import free_memory_bytes
from bessemer.core.errors import ConfigError
from bessemer.core.figures import size
from bessemer.model.config import ModelConfig
from bessemer.posttraining.finetuning.config import Method

#: Share of the free memory that is counted on.
_USABLE = 0.8
#: Bytes of a trained, a frozen, and a frozen weight of 4 bits in groups of 32.
_TRAINED, _FROZEN, _CODES = 16.0, 4.0, 0.625


def free_bytes(device: torch.device) -> float:
    """Memory that tensors may take on a device; infinite where nothing tells."""
    if device.type == "cuda":
        return _USABLE * torch.cuda.mem_get_info(device)[0]
    free = free_memory_bytes()
    return float("inf") if free is None else _USABLE * free


def needed_bytes(model: ModelConfig, method: Method, rank: int, tokens: int, quantised: float | None = None) -> float:
    """Estimated peak of a step on `tokens` tokens at once. quantised: bytes of the model as it is, where it is quantised."""
    weights, ends = model.parameters(), model.vocab_size * model.hidden_size * (1 if model.tie_word_embeddings else 2)
    # what a block keeps for its backward pass: about 16 states of the model's width and 4 of the feed-forward's, in float32
    kept = 4.0 * tokens * model.num_hidden_layers * (16 * model.hidden_size + 4 * model.intermediate_size)
    if method == "full":
        return _TRAINED * weights + kept
    # each layer's matrices have about as many outputs and inputs as seven of the model's width and three of the feed-forward's
    adapter = rank * model.num_hidden_layers * (11 * model.hidden_size + 3 * model.intermediate_size)
    frozen = _FROZEN * weights if method == "lora" else _CODES * (weights - ends) + _FROZEN * ends
    return (frozen if quantised is None else quantised) + _TRAINED * adapter + kept


def choose_method(model: ModelConfig, rank: int, tokens: int, free: float, quantised: float | None) -> tuple[Method, str]:
    """The first way to tune that memory holds, and why. Raises ConfigError when it holds none."""
    methods: tuple[Method, ...] = ("qlora",) if quantised is not None else ("full", "lora", "qlora")
    needs = {method: needed_bytes(model, method, rank, tokens, quantised) for method in methods}
    for method, needed in needs.items():
        if needed <= free:
            larger = list(needs)[: list(needs).index(method)]
            more = "".join(f", {one} {size(needs[one])}" for one in larger)
            of = "memory" if free == float("inf") else f"of {size(free)} that can be used"
            reason = "the model is quantised" if quantised is not None else f"it takes about {size(needed)}{more}, {of}"
            return method, reason
    least = methods[-1]
    raise ConfigError(
        f"--method: even {least} takes about {size(needs[least])}, and {size(free)} can be used; take a smaller model, a "
        f"shorter --context-length, or try with --method {least}"
    )
