"""Gated DeltaNet (Yang et al. 2024), the linear attention of Qwen3-Next, as figures. No PyTorch."""

from __future__ import annotations

from bessemer.model.architecture import DecoderShape
from bessemer.model.attention import LayerType
from bessemer.model.attention.base import AttentionVariant
from bessemer.model.parts import FLOAT32_BYTES, ModelPart, Numerics, StoredActivations

#: Tokens of a chunk of the delta rule (`model/layers/delta_net.py`).
CHUNK = 64


class DeltaNet(AttentionVariant):
    """A state that maps keys to values, corrected at every token, in place of a growing cache."""

    noun = "linear attention"
    layer = "bessemer.model.layers.delta_net:GatedDeltaNet"
    attribute = "linear_attn"
    recurrent = True
    casts_input = False
    in_families = True
    not_in_onnx = "layers of linear attention (gated DeltaNet): their state is no key and value"
    settings = (
        "linear_num_key_heads",
        "linear_num_value_heads",
        "linear_key_head_dim",
        "linear_value_head_dim",
        "linear_conv_kernel_dim",
    )
    divided_by_tensor = ("linear_num_key_heads",)

    def is_used(self, config: DecoderShape, layer_type: LayerType) -> bool:
        return layer_type == "linear_attention"

    def description(self, config: DecoderShape, layer_type: LayerType) -> str:
        return f"gated DeltaNet, {config.linear_num_value_heads} heads"

    def parts(self, config: DecoderShape) -> list[ModelPart]:
        heads, key, value = config.linear_num_value_heads, *_widths(config)
        hidden, kernel = config.hidden_size, config.linear_conv_kernel_dim
        shapes = [(2 * key + 2 * value, hidden), (2 * heads, hidden), (2 * key + value, 1, kernel), (heads,), (heads,)]
        return [ModelPart("gated DeltaNet", (*shapes, (config.linear_value_head_dim,), (hidden, value)))]

    def mixing_flops(self, config: DecoderShape, visible: int) -> int:
        return 6 * 3 * _state(config)

    def state_bytes(self, config: DecoderShape, itemsize: int) -> int:
        key, value = _widths(config)
        tail = (config.linear_conv_kernel_dim - 1) * (2 * key + value) * itemsize
        return tail + _state(config) * max(FLOAT32_BYTES, itemsize)

    def activations(self, config: DecoderShape, visible: int, numerics: Numerics, *, fused: bool) -> StoredActivations:
        """Of the chunked rule, float32 except for inputs of matmuls, in the order of `model/layers/delta_net.py`."""
        compute, heads, (all_keys, all_values) = numerics.compute, config.linear_num_value_heads, _widths(config)
        key, value, state = config.linear_key_head_dim, config.linear_value_head_dim, _state(config) / CHUNK
        convolved = 2 * (2 * all_keys + all_values) * compute
        units = FLOAT32_BYTES * (2 * all_keys + 2 * config.linear_num_key_heads + (0 if numerics.autocast else all_values))
        gates = FLOAT32_BYTES * 7 * heads
        inside = FLOAT32_BYTES * heads * (2 * CHUNK + 4 * key + 2 * value)
        products = heads * (4 * key + 2 * CHUNK) * compute
        through: float = heads * (3 * key + (2 if numerics.autocast else 1) * value + CHUNK) * compute
        through += state * (2 * compute + FLOAT32_BYTES if numerics.autocast else FLOAT32_BYTES)
        normed = FLOAT32_BYTES * ((4 if numerics.fused_norms else 5) * all_values + heads) + all_values * compute
        inner = StoredActivations(heads=convolved + units + gates + inside + products + through + normed)
        return numerics.matmul_inputs(config, 2) + inner

    def recomputed_from(self, config: DecoderShape, visible: int, numerics: Numerics, *, fused: bool) -> StoredActivations:
        compute, heads, (all_keys, all_values) = numerics.compute, config.linear_num_value_heads, _widths(config)
        projected = 2 * all_keys + 2 * all_values + 2 * heads
        inside = heads * (2 * CHUNK + 3 * config.linear_value_head_dim) + _state(config) / CHUNK
        return StoredActivations(heads=compute * (projected + inside), inputs=compute * config.hidden_size)


def _widths(config: DecoderShape) -> tuple[int, int]:
    """Channels of all keys, and of all values."""
    return (
        config.linear_num_key_heads * config.linear_key_head_dim,
        config.linear_num_value_heads * config.linear_value_head_dim,
    )


def _state(config: DecoderShape) -> int:
    """Numbers of the state of one sequence."""
    return config.linear_num_value_heads * config.linear_key_head_dim * config.linear_value_head_dim
