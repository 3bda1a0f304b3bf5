"""Parameters, FLOPs and cache bytes of a decoder, from its shape alone: without torch and without weights."""

from __future__ import annotations

from dataclasses import dataclass

from bessemer.model.architecture import DecoderShape

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Part:
    """Tensors of one kind: where they stand in the network, their shapes, and the share of them that one token meets."""

    name: str
    shapes: tuple[Shape, ...]
    active_share: float = 1.0

    @property
    def parameters(self) -> int:
        """Stored numbers."""
        return sum(_size(shape) for shape in self.shapes)

    @property
    def multiplying(self) -> int:
        """Numbers that a token is multiplied with in matrices."""
        return round(self.active_share * sum(_size(shape) for shape in self.shapes if len(shape) > 1))


def _size(shape: Shape) -> int:
    size = 1
    for length in shape:
        size *= length
    return size


def layer_parts(config: DecoderShape, layer: int) -> list[Part]:
    """The parts of one block."""
    norm = ((config.hidden_size,),) * (2 if config.norm_type == "layer" else 1)
    norms = norm * (4 if config.norm_position == "both" else 2)
    if config.types[layer] == "linear_attention":
        attention = _delta_net(config)
    else:
        attention = _latent(config) if config.is_latent else _attention(config)
    return [*attention, *(_experts(config) if config.is_sparse(layer) else _feed_forward(config)), Part("block norms", norms)]


def outer_parts(config: DecoderShape) -> list[Part]:
    """The parts outside the blocks. The embedding is a look-up: nothing is multiplied with it unless it is the head."""
    vocabulary, hidden = (config.vocab_size, config.hidden_size), config.hidden_size
    is_head = config.tie_word_embeddings and not config.num_scores
    parts = [Part("embedding", (vocabulary,), 1.0 if is_head else 0.0)]
    if config.position_type == "learned":
        parts.append(Part("positions", ((config.max_position_embeddings, hidden),), 0.0))
    parts.append(Part("final norm", ((hidden,),) * (2 if config.norm_type == "layer" else 1)))
    if config.num_scores:
        parts.append(Part("head", ((config.num_scores, hidden),)))
    elif not config.tie_word_embeddings:
        parts.append(Part("head", (vocabulary,)))
    return parts


def _attention(config: DecoderShape) -> list[Part]:
    hidden, query = config.hidden_size, config.num_attention_heads * config.head_dim
    key_value = config.num_key_value_heads * config.head_dim
    gated_query = query * (2 if config.attention_output_gate else 1)
    shapes: list[Shape] = [(gated_query, hidden), (key_value, hidden), (key_value, hidden), (hidden, query)]
    if config.attention_bias:
        shapes += [(gated_query,), (key_value,), (key_value,)]
    if config.attention_output_bias:
        shapes.append((hidden,))
    if config.attention_sinks:
        shapes.append((config.num_attention_heads,))
    parts = [Part("attention", tuple(shapes))]
    if config.qk_norm != "none":
        widths = (config.head_dim, config.head_dim) if config.qk_norm == "head" else (query, key_value)
        parts.append(Part("query and key norm", tuple((width,) for width in widths)))
    return parts


def _latent(config: DecoderShape) -> list[Part]:
    assert config.kv_lora_rank is not None
    hidden, heads, latent = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
    query = heads * (config.qk_nope_head_dim + config.qk_rope_head_dim)
    rank = config.q_lora_rank
    latents: list[Shape] = [(latent + config.qk_rope_head_dim, hidden), (latent,)]
    if rank is not None:
        latents += [(rank, hidden), (rank,)]
    if config.attention_bias:
        latents += [(latent + config.qk_rope_head_dim,), *([] if rank is None else [(rank,)])]
    shapes: list[Shape] = [
        (query, hidden if rank is None else rank),
        (heads * (config.qk_nope_head_dim + config.v_head_dim), latent),
        (hidden, heads * config.v_head_dim),
    ]
    if config.attention_output_bias:
        shapes.append((hidden,))
    return [Part("latents", tuple(latents)), Part("latent attention", tuple(shapes))]


def _delta_net(config: DecoderShape) -> list[Part]:
    key = config.linear_num_key_heads * config.linear_key_head_dim
    value, heads = config.linear_num_value_heads * config.linear_value_head_dim, config.linear_num_value_heads
    hidden, kernel = config.hidden_size, config.linear_conv_kernel_dim
    shapes = [(2 * key + 2 * value, hidden), (2 * heads, hidden), (2 * key + value, 1, kernel), (heads,), (heads,)]
    return [Part("gated DeltaNet", (*shapes, (config.linear_value_head_dim,), (hidden, value)))]


def _feed_forward(config: DecoderShape, width: int | None = None, name: str = "feed-forward") -> list[Part]:
    hidden, inner = config.hidden_size, width or config.intermediate_size
    into = 2 if config.gated_mlp else 1
    biases: tuple[Shape, ...] = ((inner,),) * into + ((hidden,),) if config.mlp_bias else ()
    return [Part(name, (*((inner, hidden),) * into, (hidden, inner), *biases))]


def _experts(config: DecoderShape) -> list[Part]:
    hidden, inner, experts = config.hidden_size, config.moe_intermediate_size, config.num_experts
    router: tuple[Shape, ...] = ((experts, hidden), *(((experts,),) if config.router_bias else ()))
    matrices: tuple[Shape, ...] = ((experts, 2 * inner, hidden), (experts, hidden, inner))
    biases: tuple[Shape, ...] = ((experts, 2 * inner), (experts, hidden)) if config.expert_bias else ()
    parts = [
        Part("router", router),
        Part("experts", (*matrices, *biases), config.num_experts_per_tok / experts),
    ]
    if config.shared_expert_intermediate_size:
        parts += _feed_forward(config, config.shared_expert_intermediate_size, "shared expert")
    if config.shared_expert_gate:
        parts.append(Part("shared expert's gate", ((1, hidden),)))
    return parts


def mtp_parts(config: DecoderShape) -> list[Part]:
    """The parts of one MTP module."""
    norm = ((config.hidden_size,),) * (2 if config.norm_type == "layer" else 1)
    own = Part("multi-token prediction", ((config.hidden_size, 2 * config.hidden_size), *norm * 3))
    return [own, *layer_parts(config, config.num_hidden_layers - 1)]


def block_parts(config: DecoderShape) -> list[Part]:
    """The parts of all blocks in order, MTP modules last."""
    blocks = [part for layer in range(config.num_hidden_layers) for part in layer_parts(config, layer)]
    return blocks + mtp_parts(config) * config.num_nextn_predict_layers


def all_parts(config: DecoderShape) -> list[Part]:
    """Every part of the network."""
    return [*outer_parts(config), *block_parts(config)]


def parameters(config: DecoderShape) -> int:
    """All weights, each stored number once."""
    return sum(part.parameters for part in all_parts(config))


def embedding_parameters(config: DecoderShape) -> int:
    """Weights of the embedding table, and of the language head when it has its own."""
    return config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings or config.num_scores else 2)


def active_parameters(config: DecoderShape) -> int:
    """Weights that one token meets: all but the experts that it does not visit."""
    skipped = sum(part.parameters * (1 - part.active_share) for part in all_parts(config) if part.name == "experts")
    return parameters(config) - round(skipped)


def flops_per_token(config: DecoderShape, context_length: int) -> int:
    """Floating-point operations of one training token, forward and backward, at a context of `context_length` tokens.

    6 N + 6 T Σ heads · (key channels + value channels) (Chowdhery et al. 2022, appendix B): N weights that multiply
    (the matrices that the token meets and the head, tied or not; the look-up and the norms are free), T context, the
    window in sliding layers. Each weight costs a multiplication and an addition forward, twice that backward. The
    causal half of the scores that is never needed is counted, recomputation is not. A DeltaNet layer costs
    6 · 3 · heads · key channels · value channels, whatever the context.
    """
    multiplying = sum(part.multiplying for part in all_parts(config))
    attention = 0
    for kind in config.types:
        if kind == "linear_attention":
            state = config.linear_num_value_heads * config.linear_key_head_dim * config.linear_value_head_dim
            attention += 6 * 3 * state
            continue
        seen = min(context_length, config.sliding_window or 0) if kind == "sliding_attention" else context_length
        if config.is_latent:
            widths = config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
        else:
            widths = 2 * config.head_dim
        attention += 6 * config.num_attention_heads * widths * seen
    return 6 * multiplying + attention


def kv_bytes_per_token(config: DecoderShape, bytes_per_value: int) -> int:
    """Bytes that one token of context occupies in the cache (DeltaNet's state does not grow, and is not counted)."""
    values = 0
    for kind in config.types:
        if kind == "linear_attention":
            continue
        if config.kv_lora_rank is not None:
            values += config.kv_lora_rank + config.qk_rope_head_dim
        else:
            values += 2 * config.num_key_value_heads * config.head_dim
    return values * bytes_per_value
