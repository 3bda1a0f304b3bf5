"""Qwen2.5-VL's encoder and merger in llama.cpp's `mmproj` files: its keys, and which part of our tensors each of the file's is.

The file holds query, key and value apart, and a matrix of patches for each of the two frames of a film.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from types import EllipsisType
from typing import Any

from bessemer.core.errors import ConfigError
from bessemer.model.formats.gguf_base import GgufHead
from bessemer.model.vision.config import VisionConfig, VisionLanguageConfig
from bessemer.model.vision.preprocessing import Preprocessor

#: A part of a tensor.
Index = tuple[slice | int, ...] | EllipsisType

PROJECTOR = "qwen2.5vl_merger"
IMAGE = "<|image_pad|>"
#: Modules of a layer: ours, then the file's.
_LAYER = {
    "norm1": "ln1",
    "norm2": "ln2",
    "attn.proj": "attn_out",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_PROJECTOR = {"ln_q": "v.post_ln", "mlp.0": "mm.0", "mlp.2": "mm.2"}
#: What published models have, and llama.cpp where a file says nothing: pixels of a window's side, tokens of a picture, pairs of
#: channels that each position turns.
_WINDOW, _FEWEST, _MOST, _SECTIONS = 112, 8, 4096, (16, 24, 24)
#: Patches along the square that llama.cpp warms up with.
_WARM_UP = 40


def parts_of(vision: VisionConfig, ours: Iterable[str]) -> Iterator[tuple[str, str, Index]]:
    """Of each tensor of a file its name, the name of ours and the part of that."""
    width = vision.hidden_size
    for name in ours:
        part, _, rest = name.partition(".")
        module, _, ending = rest.rpartition(".")
        if part == "projector":
            yield f"{_PROJECTOR[module]}.{ending}", name, ...
        elif module == "patch_embed.proj":
            for frame in range(vision.temporal_patch_size):
                yield f"v.patch_embd.weight{f'.{frame}' if frame else ''}", name, (slice(None), slice(None), frame)
        else:
            _, layer, inner = module.split(".", 2)
            if inner == "attn.qkv":
                for place, one in enumerate("qkv"):
                    rows = slice(place * width, (place + 1) * width)
                    yield f"v.blk.{layer}.attn_{one}.{ending}", name, (rows,)
            else:
                yield f"v.blk.{layer}.{_LAYER[inner]}.{ending}", name, ...


def lacking(vision: VisionConfig) -> list[str]:
    """What a file has no place for."""
    return [] if vision.full_layers == _every(_pattern(vision), vision.num_hidden_layers) else ["layers of whole pictures"]


def notes_of(vision: VisionConfig) -> list[str]:
    """What llama.cpp does otherwise."""
    if vision.window_size == _WINDOW:
        return []
    return [
        f"llama.cpp's windows are {_WINDOW} pixels wide, whatever a file says, and here {vision.window_size}: it sees otherwise"
    ]


def _pattern(vision: VisionConfig) -> int:
    """The number n of which every n-th layer attends within the whole picture, and the others within windows."""
    return vision.full_layers[0] + 1 if vision.full_layers else vision.num_hidden_layers + 1


def _every(number: int, layers: int) -> tuple[int, ...]:
    return tuple(range(number - 1, layers, number))


def keys_of(config: VisionLanguageConfig, prepared: Preprocessor) -> dict[str, Any]:
    """The keys that other forms do not have."""
    vision = config.vision
    return {
        "clip.vision.image_size": _WARM_UP * vision.patch_size,
        "clip.vision.spatial_merge_size": vision.merge_size,
        "clip.vision.window_size": vision.window_size,
        "clip.vision.n_wa_pattern": _pattern(vision),
        "clip.vision.image_min_pixels": prepared.min_pixels,
        "clip.vision.image_max_pixels": prepared.max_pixels,
        "bessemer.rope_sections": list(config.rope_sections),
    }


def config_values(head: GgufHead, image_token_id: int) -> dict[str, Any]:
    """What `config.json` of the model would say, but for most of its decoder. Raises ConfigError."""
    layers, pattern = head.whole("vision.block_count"), head.whole("vision.n_wa_pattern", 8)
    if layers > len(head.shapes):
        raise ConfigError(f"{layers:,} layers, and {len(head.shapes):,} tensors")
    if not pattern:
        raise ConfigError("n_wa_pattern: every 0th layer sees whole pictures; a number from 1 is needed")
    vision = {
        "hidden_size": head.whole("vision.embedding_length"),
        "intermediate_size": head.whole("vision.feed_forward_length"),
        "depth": layers,
        "num_heads": head.whole("vision.attention.head_count"),
        "patch_size": head.whole("vision.patch_size"),
        "spatial_merge_size": head.whole("vision.spatial_merge_size", 2),
        "window_size": head.whole("vision.window_size", _WINDOW),
        "fullatt_block_indexes": list(_every(pattern, layers)),
        "hidden_act": "silu" if head.get("use_silu") else "gelu_pytorch_tanh" if head.get("use_gelu") else "quick_gelu",
    }
    sections = list(head.values.get("bessemer.rope_sections", _SECTIONS))
    rope = {"rope_scaling": {"type": "mrope", "mrope_section": sections}}
    return {"model_type": "qwen2_5_vl", "vision_config": vision, "text_config": rope, "image_token_id": image_token_id}


def preprocessor_values(head: GgufHead, vision: VisionConfig, normal: Mapping[str, Any]) -> dict[str, Any]:
    """How pictures are prepared where a file does not say it in our keys."""
    square = (vision.merge_size * vision.patch_size) ** 2
    return {
        "image_processor_type": "Qwen2VLImageProcessor",
        "patch_size": vision.patch_size,
        "merge_size": vision.merge_size,
        "temporal_patch_size": vision.temporal_patch_size,
        "min_pixels": head.whole("vision.image_min_pixels", _FEWEST * square),
        "max_pixels": head.whole("vision.image_max_pixels", _MOST * square),
        **normal,
    }
