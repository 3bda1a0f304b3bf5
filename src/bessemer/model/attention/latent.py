"""Multi-head latent attention (DeepSeek-V2, section 2.1) as figures. No PyTorch."""

from __future__ import annotations

from bessemer.model.architecture import DecoderShape
from bessemer.model.attention import LayerType
from bessemer.model.attention.base import AttentionVariant, KeyValueShape
from bessemer.model.parts import FLOAT32_BYTES, ModelPart, Numerics, Shape, StoredActivations


class Latent(AttentionVariant):
    """Keys and values are made from one narrow vector per token, and only that vector is cached."""

    noun = "latent attention"
    layer = "bessemer.model.layers.attention:LatentAttention"
    in_families = True
    not_in_onnx = "latent attention: its cache is no key and value of each head, which the names of the inputs promise"
    settings = ("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    divided_by_tensor = ("num_attention_heads",)

    def is_used(self, config: DecoderShape, layer_type: LayerType) -> bool:
        return layer_type in ("full_attention", "sliding_attention") and config.kv_lora_rank is not None

    def description(self, config: DecoderShape, layer_type: LayerType) -> str:
        return f"latent attention, {config.num_attention_heads} heads over {config.kv_lora_rank} channels"

    def parts(self, config: DecoderShape) -> list[ModelPart]:
        hidden, heads, latent, rank = config.hidden_size, config.num_attention_heads, _rank(config), config.q_lora_rank
        latents: list[Shape] = [(latent + config.qk_rope_head_dim, hidden), (latent,)]
        if rank is not None:
            latents += [(rank, hidden), (rank,)]
        if config.attention_bias:
            latents += [(latent + config.qk_rope_head_dim,), *([] if rank is None else [(rank,)])]
        shapes: list[Shape] = [
            (heads * _key_width(config), hidden if rank is None else rank),
            (heads * (config.qk_nope_head_dim + config.v_head_dim), latent),
            (hidden, heads * config.v_head_dim),
        ]
        if config.attention_output_bias:
            shapes.append((hidden,))
        return [ModelPart("latents", tuple(latents), replicated=True), ModelPart("latent attention", tuple(shapes))]

    def mixing_flops(self, config: DecoderShape, visible: int) -> int:
        return 6 * config.num_attention_heads * (_key_width(config) + config.v_head_dim) * visible

    def cache_shape(self, config: DecoderShape, ranks: int = 1) -> KeyValueShape:
        # every process has the whole latent
        return KeyValueShape(1, _rank(config) + config.qk_rope_head_dim, _rank(config), shared=True)

    def training_shape(self, config: DecoderShape) -> KeyValueShape:
        return KeyValueShape(config.num_attention_heads, _key_width(config), config.v_head_dim)

    def activations(self, config: DecoderShape, visible: int, numerics: Numerics, *, fused: bool) -> StoredActivations:
        compute, heads, key, value = numerics.compute, config.num_attention_heads, _key_width(config), config.v_head_dim
        stored = numerics.matmul_inputs(config, 2)
        for rank in (config.q_lora_rank, config.kv_lora_rank):
            if rank is not None:
                # a norm, and the product that reads it
                read = rank * compute if numerics.autocast else rank * FLOAT32_BYTES
                stored += StoredActivations(inputs=numerics.norm_bytes(config, rank) + read)
        if fused:
            return stored + StoredActivations(heads=compute * heads * (2 * key + 2 * value) + FLOAT32_BYTES * heads)
        # queries, keys, values and the softmax in float32, and what the last projection reads
        wide = FLOAT32_BYTES * heads * (2 * key + value + visible)
        return stored + StoredActivations(heads=wide + compute * heads * value)

    def recomputed_from(self, config: DecoderShape, visible: int, numerics: Numerics, *, fused: bool) -> StoredActivations:
        compute, heads = numerics.compute, config.num_attention_heads
        narrow = (config.q_lora_rank or 0) + _rank(config) + config.qk_rope_head_dim
        wide = heads * (_key_width(config) + config.qk_nope_head_dim + 2 * config.v_head_dim)
        scores = FLOAT32_BYTES * heads
        if not fused:
            scores = FLOAT32_BYTES * heads * visible + heads * (FLOAT32_BYTES - compute) * config.v_head_dim
        return StoredActivations(inputs=config.hidden_size * compute + narrow * compute, heads=wide * compute + scores)


def _rank(config: DecoderShape) -> int:
    assert config.kv_lora_rank is not None
    return config.kv_lora_rank


def _key_width(config: DecoderShape) -> int:
    """Channels of a query or key of one head, with and without position."""
    return config.qk_nope_head_dim + config.qk_rope_head_dim
