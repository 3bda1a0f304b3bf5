"""Grouped-query attention (Ainslie et al. 2023), full or sliding, as figures. No PyTorch."""

from __future__ import annotations

from bessemer.model.architecture import DecoderShape
from bessemer.model.attention import LayerType
from bessemer.model.attention.base import AttentionVariant, KeyValueShape
from bessemer.model.parts import FLOAT32_BYTES, ModelPart, Numerics, Shape, StoredActivations


class GroupedQuery(AttentionVariant):
    """Groups of query heads share keys and values; the default."""

    noun = "grouped-query attention"
    layer = "bessemer.model.layers.attention:Attention"
    in_compiled_step = True
    in_families = True
    not_in_onnx = None
    divided_by_tensor = ("num_attention_heads", "num_key_value_heads")

    def is_used(self, config: DecoderShape, layer_type: LayerType) -> bool:
        return layer_type in ("full_attention", "sliding_attention") and config.kv_lora_rank is None

    def description(self, config: DecoderShape, layer_type: LayerType) -> str:
        heads, shared, window = config.num_attention_heads, config.num_key_value_heads, config.window(layer_type)
        reach = "full attention" if window is None else f"sliding attention over {window:,} tokens"
        return f"{reach}, {heads} heads" + (f", {shared} of keys and values" if shared != heads else "")

    def parts(self, config: DecoderShape) -> list[ModelPart]:
        hidden, (query, key_value) = config.hidden_size, _widths(config)
        gated_query = query * (2 if config.attention_output_gate else 1)
        shapes: list[Shape] = [(gated_query, hidden), (key_value, hidden), (key_value, hidden), (hidden, query)]
        if config.attention_bias:
            shapes += [(gated_query,), (key_value,), (key_value,)]
        if config.attention_output_bias:
            shapes.append((hidden,))
        if config.attention_sinks:
            shapes.append((config.num_attention_heads,))
        parts = [ModelPart("attention", tuple(shapes))]
        if config.qk_norm in ("head", "full"):
            widths = (config.head_dim, config.head_dim) if config.qk_norm == "head" else (query, key_value)
            parts.append(ModelPart("query and key norm", tuple((width,) for width in widths), replicated=True))
        return parts

    def mixing_flops(self, config: DecoderShape, visible: int) -> int:
        return 6 * config.num_attention_heads * 2 * config.head_dim * visible

    def cache_shape(self, config: DecoderShape, ranks: int = 1) -> KeyValueShape:
        return KeyValueShape(config.num_key_value_heads // ranks, config.head_dim, config.head_dim)

    def training_shape(self, config: DecoderShape) -> KeyValueShape:
        return KeyValueShape(config.num_key_value_heads, config.head_dim, config.head_dim)

    def activations(self, config: DecoderShape, visible: int, numerics: Numerics, *, fused: bool) -> StoredActivations:
        query, key_value = _widths(config)
        stored = numerics.matmul_inputs(config, 3)
        if config.qk_norm in ("head", "unit"):
            heads = ((query, config.num_attention_heads), (key_value, config.num_key_value_heads))
            stored += StoredActivations(heads=sum(numerics.norm_bytes(config, width, rows=rows) for width, rows in heads))
        elif config.qk_norm == "full":
            stored += StoredActivations(heads=sum(numerics.norm_bytes(config, width) for width in (query, key_value)))
        stored += StoredActivations(heads=_score_bytes(config, visible, numerics))
        if config.attention_output_gate:
            # the gate's sigmoid and the product, which the projection reads
            stored += StoredActivations(heads=2 * query * numerics.compute)
        return stored

    def recomputed_from(self, config: DecoderShape, visible: int, numerics: Numerics, *, fused: bool) -> StoredActivations:
        compute, heads, (query, key_value) = numerics.compute, config.num_attention_heads, _widths(config)
        gate = query if config.attention_output_gate else 0
        scores = compute * heads * visible if _is_explicit(config) else FLOAT32_BYTES * heads
        return StoredActivations(
            inputs=config.hidden_size * compute, heads=compute * (2 * query + 2 * key_value + gate) + scores
        )


def _widths(config: DecoderShape) -> tuple[int, int]:
    """Channels of all query heads, and of all keys or values."""
    return config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim


def _is_explicit(config: DecoderShape) -> bool:
    """Whether attention is computed without a fused kernel, because PyTorch's kernels lack what the model needs."""
    return config.attention_sinks or config.attn_logit_softcapping is not None


def _score_bytes(config: DecoderShape, visible: int, numerics: Numerics) -> float:
    """Queries, keys, values and output; and a sum per head, or all scores."""
    compute, heads, (query, key_value) = numerics.compute, config.num_attention_heads, _widths(config)
    if not _is_explicit(config):
        return compute * (2 * query + 2 * key_value) + FLOAT32_BYTES * heads
    # keys and values once a query head
    stored: float = compute * 4 * query
    # the softmax, and a copy for the product
    stored += FLOAT32_BYTES * heads * visible + (compute * heads * visible if numerics.autocast else 0)
    if config.attn_logit_softcapping is not None:
        stored += compute * heads * visible
    return stored
