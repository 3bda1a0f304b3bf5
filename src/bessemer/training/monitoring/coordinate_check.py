"""Coordinate check of muP: the change of activations by training, by width; flat where learning rates transfer.

As in Yang et al. 2022 (appendix D.1): the same few steps at the same learning rate at several widths.
"""

# Shapes: B batch, T time, D hidden, V vocabulary.

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from bessemer.model.config import ModelConfig
from bessemer.model.decoder import Decoder
from bessemer.model.initialisation import initial_decoder
from bessemer.training.config import LoopConfig
from bessemer.training.data.batch import Batch
from bessemer.training.objectives import build_objective
from bessemer.training.optim.mup import scale_initial_weights, width_ratio
from bessemer.training.optim.optimizers import build_optimizers
from bessemer.training.runtime import Runtime
from bessemer.training.trainer import Trainer

#: Settings of a model that grow with its width.
_WIDTHS = (
    *("hidden_size", "intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size"),
    *("num_attention_heads", "num_key_value_heads", "linear_num_key_heads", "linear_num_value_heads"),
    *("kv_lora_rank", "q_lora_rank"),
)


def widened(model: ModelConfig, width: int) -> ModelConfig:
    """The same architecture with another hidden width: more heads of the same size, wider feed-forwards and latents.

    Raises ValueError where a width or a number of heads would not be a whole number.
    """
    wider = {}
    for name in _WIDTHS:
        value = getattr(model, name)
        if value is None:
            continue
        if value * width % model.hidden_size:
            raise ValueError(f"{name} {value} cannot grow as hidden_size does from {model.hidden_size} to {width}")
        wider[name] = value * width // model.hidden_size
    return model.with_changes(**wider)


def coordinate_check(
    model: ModelConfig, config: LoopConfig, widths: Sequence[int], *, steps: int = 4, seeds: Sequence[int] = (0, 1, 2)
) -> dict[str, list[float]]:
    """How far `steps` steps at the peak learning rate change each activation, at every width.

    model: the architecture, which is widened. config: the training settings, `mup_base_width` included. Returns, by activation
    (`embedding`, `attention N` and `feed_forward N` of layer N, `residual`, `logits`), the root mean square of its entries'
    change on the training batch, the geometric mean over seeds, one number for each of `widths`.
    """
    runtime = Runtime.of(config, torch.device("cpu"))
    changes: dict[str, list[float]] = {}
    with runtime.running():
        for width in widths:
            logarithms: dict[str, float] = {}
            for seed in seeds:
                for name, size in _changes(widened(model, width), config, runtime, steps, seed).items():
                    logarithms[name] = logarithms.get(name, 0.0) + math.log(size) / len(seeds)
            for name, logarithm in logarithms.items():
                changes.setdefault(name, []).append(math.exp(logarithm))
    return changes


def growth(widths: Sequence[int], sizes: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The exponent a of size ∝ widthᵃ of each activation, by least squares on logarithms: 0 is flat."""
    places = torch.tensor([math.log(width) for width in widths])
    centred = places - places.mean()
    slopes = {name: centred @ torch.tensor(values).log() / centred.square().sum() for name, values in sizes.items()}
    return {name: float(slope) for name, slope in slopes.items()}


def _changes(model: ModelConfig, config: LoopConfig, runtime: Runtime, steps: int, seed: int) -> dict[str, float]:
    decoder = initial_decoder(model, seed)
    scale_initial_weights(decoder, width_ratio(config, model))
    generator = torch.Generator().manual_seed(seed)
    shape = (config.batch_size, config.context_length + 1)
    # the product of two uniform numbers gives tokens of very different frequencies, as in text
    uniform = torch.rand(2, *shape, generator=generator).prod(0)
    stream = (uniform * model.vocab_size).long()
    tokens_BT, targets_BT = stream[:, :-1], stream[:, 1:]
    before = _activations(decoder, tokens_BT)
    decoder.train()
    optimizers = build_optimizers(decoder, config, width=width_ratio(config, model))
    trainer = Trainer(decoder, optimizers, build_objective(config, decoder.config), runtime, gradient_clip=config.gradient_clip)
    for _ in range(steps):
        trainer.step(Batch(tokens_BT, targets_BT))
    after = _activations(decoder.eval(), tokens_BT)
    return {name: float((after[name] - value).square().mean().sqrt()) for name, value in before.items()}


@torch.no_grad()
def _activations(decoder: Decoder, tokens_BT: Tensor) -> dict[str, Tensor]:
    modules: dict[str, nn.Module] = {"embedding": decoder.embed_tokens}
    for layer, block in enumerate(decoder.blocks):
        modules[f"attention {layer}"] = block.attention
        modules[f"feed_forward {layer}"] = block.mlp
    modules["residual"] = decoder.blocks[-1]
    with _outputs(modules) as outputs:
        logits_BTV = decoder(tokens_BT)
    return outputs | {"logits": logits_BTV}


@contextmanager
def _outputs(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """While entered, records each module's output of its last call, by name."""
    outputs: dict[str, Tensor] = {}

    def recorder(name: str):  # type: ignore[no-untyped-def]
        return lambda module, inputs, output: outputs.__setitem__(name, output.detach())

    handles = [module.register_forward_hook(recorder(name)) for name, module in modules.items()]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()
