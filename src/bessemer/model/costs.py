"""The parts of a decoder and their sizes, from its shape alone: without PyTorch and without weights."""

from __future__ import annotations

from bessemer.model.architecture import DecoderShape
from bessemer.model.attention.base import variant_of
from bessemer.model.parts import ModelPart, Shape


def layer_parts(config: DecoderShape, layer: int) -> list[ModelPart]:
    """The parts of one block."""
    norm = ((config.hidden_size,),) * (2 if config.norm_type == "layer" else 1)
    norms = norm * (4 if config.norm_position == "both" else 2)
    feed_forward = _experts(config) if config.is_sparse(layer) else _feed_forward(config)
    return [*variant_of(config, layer).parts(config), *feed_forward, ModelPart("block norms", norms, replicated=True)]


def outer_parts(config: DecoderShape) -> list[ModelPart]:
    """The parts outside the blocks. The embedding is a look-up: nothing is multiplied with it unless it is the head."""
    vocabulary, hidden = (config.vocab_size, config.hidden_size), config.hidden_size
    is_head = config.tie_word_embeddings and not config.num_scores
    parts = [ModelPart("embedding", (vocabulary,), 1.0 if is_head else 0.0)]
    if config.position_type == "learned":
        parts.append(ModelPart("positions", ((config.max_position_embeddings, hidden),), 0.0, replicated=True))
    parts.append(ModelPart("final norm", ((hidden,),) * (2 if config.norm_type == "layer" else 1), replicated=True))
    if config.num_scores:
        parts.append(ModelPart("head", ((config.num_scores, hidden),)))
    elif not config.tie_word_embeddings:
        parts.append(ModelPart("head", (vocabulary,)))
    return parts


def _feed_forward(config: DecoderShape, width: int | None = None, name: str = "feed-forward") -> list[ModelPart]:
    hidden, inner = config.hidden_size, width or config.intermediate_size
    into = 2 if config.gated_mlp else 1
    biases: tuple[Shape, ...] = ((inner,),) * into + ((hidden,),) if config.mlp_bias else ()
    return [ModelPart(name, (*((inner, hidden),) * into, (hidden, inner), *biases))]


def _experts(config: DecoderShape) -> list[ModelPart]:
    hidden, inner, experts = config.hidden_size, config.moe_intermediate_size, config.num_experts
    router: tuple[Shape, ...] = ((experts, hidden), *(((experts,),) if config.router_bias else ()))
    matrices: tuple[Shape, ...] = ((experts, 2 * inner, hidden), (experts, hidden, inner))
    biases: tuple[Shape, ...] = ((experts, 2 * inner), (experts, hidden)) if config.expert_bias else ()
    parts = [
        ModelPart("router", router, replicated=True),
        ModelPart("experts", (*matrices, *biases), config.num_experts_per_tok / experts),
    ]
    if config.shared_expert_intermediate_size:
        parts += _feed_forward(config, config.shared_expert_intermediate_size, "shared expert")
    if config.shared_expert_gate:
        parts.append(ModelPart("shared expert's gate", ((1, hidden),), replicated=True))
    return parts


def mtp_parts(config: DecoderShape) -> list[ModelPart]:
    """The parts of one MTP module."""
    norm = ((config.hidden_size,),) * (2 if config.norm_type == "layer" else 1)
    own = ModelPart("multi-token prediction", ((config.hidden_size, 2 * config.hidden_size), *norm * 3), replicated=True)
    return [own, *layer_parts(config, config.num_hidden_layers - 1)]


def block_parts(config: DecoderShape) -> list[ModelPart]:
    """The parts of all blocks in order, MTP modules last."""
    blocks = [part for layer in range(config.num_hidden_layers) for part in layer_parts(config, layer)]
    return blocks + mtp_parts(config) * config.num_nextn_predict_layers


def all_parts(config: DecoderShape) -> list[ModelPart]:
    """Every part of the network."""
    return [*outer_parts(config), *block_parts(config)]
