"""Settings of picture encoders, and of models that join one to a decoder, in Hugging Face's `config.json`. No PyTorch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from bessemer.core.errors import ConfigError
from bessemer.model.config import ModelConfig
from bessemer.model.families import FAMILIES, family_of, read_config, write_config

Values = Mapping[str, Any]

#: The kinds of encoders by `model_type`, and the architecture of each alone; None where no published folder holds it alone.
ENCODER_KINDS: dict[str, str | None] = {
    "siglip_vision_model": "SiglipVisionModel",
    "siglip2_vision_model": "Siglip2VisionModel",
    "clip_vision_model": "CLIPVisionModel",
    "idefics3_vision": None,
    "smolvlm_vision": None,
}
#: Whole models, whose encoder is one of them.
_WITH_TEXT = {"siglip": "siglip_vision_model", "siglip2": "siglip2_vision_model", "clip": "clip_vision_model"}
_NATIVE = "qwen2_5_vl"
ACTIVATIONS = ("gelu", "gelu_pytorch_tanh", "gelu_new", "quick_gelu", "relu", "silu")
#: The models that join an encoder to a decoder, and their architectures.
ARCHITECTURES = {
    "llava": "LlavaForConditionalGeneration",
    "idefics3": "Idefics3ForConditionalGeneration",
    "smolvlm": "SmolVLMForConditionalGeneration",
    "gemma3": "Gemma3ForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "siglip_vision_model": {"image_size": 224, "patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6},
    "siglip2_vision_model": {"num_patches": 256, "patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6},
    "clip_vision_model": {"image_size": 224, "patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
    "idefics3_vision": {"image_size": 224, "patch_size": 32, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6},
}
_DEFAULTS["smolvlm_vision"] = _DEFAULTS["idefics3_vision"]
_SIZES: dict[str, dict[str, int]] = {
    "siglip_vision_model": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
    },
    "idefics3_vision": {
        "hidden_size": 1152,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 16,
    },
}
#: Of a Llama within another model, what published files leave out (LLaVA 1.5).
_LLAMA = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
}
#: Of a Gemma 3 within another model, likewise.
_GEMMA3 = {
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "sliding_window": 4096,
}
_GEMMA3_BASES = {"rope_theta": 1_000_000.0, "rope_local_base_freq": 10_000.0}
_SIZES["siglip2_vision_model"] = _SIZES["clip_vision_model"] = _SIZES["siglip_vision_model"]
_SIZES["smolvlm_vision"] = _SIZES["idefics3_vision"]


@dataclass(frozen=True)
class VisionConfig:
    """Sizes of a picture encoder.

    image_size: side in pixels of the square that the learnt positions are of; the last pixels of a side that fill no patch are
    not read. grid: patches along a side of it. has_head: whether it pools its states into one
    vector (SigLIP's attention pooling). Of Qwen2.5-VL's, merge_size: patches along a side that become one token;
    temporal_patch_size: frames of a patch; window_size: pixels along a window, within which all but `full_layers` attend.
    """

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    patch_size: int
    image_size: int
    grid: int
    hidden_act: str
    layer_norm_eps: float
    num_channels: int = 3
    has_head: bool = False
    merge_size: int = 0
    temporal_patch_size: int = 1
    window_size: int = 0
    full_layers: tuple[int, ...] = ()

    @property
    def is_native(self) -> bool:
        """Whether it reads a picture in its own shape, square by square of patches that become one token (Qwen2.5-VL)."""
        return self.model_type == _NATIVE

    @property
    def has_class_token(self) -> bool:
        """Whether a learnt token stands before the patches."""
        return self.model_type == "clip_vision_model"

    @property
    def takes_patches(self) -> bool:
        """Whether it reads patches of a picture in its own shape, and not a square of pixels."""
        return self.model_type == "siglip2_vision_model"


@dataclass(frozen=True)
class VisionLanguageConfig:
    """A model that reads pictures: an encoder, a projector, a decoder.

    image_token_id: the token whose embedding a picture's vectors take the place of. scale_factor: patches along a side that
    pixel shuffle joins into one token; 0: none is (LLaVA, Gemma 3). pooled_side: tokens along a side, each the mean of a
    square of patches (Gemma 3); 0: none are. around: the tokens before and behind a picture's (Gemma 3), of which a template
    writes the first. feature_layers: of LLaVA, the encoder's layers whose states are projected, counted as Python counts, where
    0 are the embeddings. drops_class: whether the token before the patches is left out.
    """

    model_type: str
    vision: VisionConfig
    text: ModelConfig
    image_token_id: int
    scale_factor: int = 0
    pooled_side: int = 0
    around: tuple[int, int] | None = None
    feature_layers: tuple[int, ...] = ()
    feature_layer_is_list: bool = False
    drops_class: bool = False
    projector_act: str = "gelu"
    projector_bias: bool = True
    rope_sections: tuple[int, ...] = ()

    @property
    def tokens_per_tile(self) -> int:
        """Tokens of the decoder that one square of `image_size` pixels takes."""
        if self.pooled_side:
            return self.pooled_side**2
        patches = self.vision.grid**2
        if self.scale_factor:
            return patches // self.scale_factor**2
        return patches + (self.vision.has_class_token and not self.drops_class)

    @property
    def is_bidirectional(self) -> bool:
        """Whether a picture's tokens see each other, also those behind them, in the decoder (Gemma 3)."""
        return self.model_type == "gemma3"


def read_vision_config(values: Values) -> VisionConfig:
    """An encoder's settings from its `config.json`, or from that of a whole SigLIP. Raises ConfigError for what is not read."""
    kind = str(values.get("model_type", ""))
    if kind in _WITH_TEXT:
        kind, values = _WITH_TEXT[kind], values.get("vision_config") or {}
    if kind not in ENCODER_KINDS:
        raise ConfigError(f"picture encoders of the type {kind!r} are not read; known are {', '.join(ENCODER_KINDS)}")
    return _vision_config(kind, values)


def _vision_config(kind: str, values: Values) -> VisionConfig:
    given = {**_SIZES[kind], **_DEFAULTS[kind], **{name: value for name, value in values.items() if value is not None}}
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "patch_size")
    sizes = {name: _whole(given, name) for name in (*names, "num_patches" if kind == "siglip2_vision_model" else "image_size")}
    if sizes["hidden_size"] % sizes["num_attention_heads"]:
        raise ConfigError(f"hidden_size {sizes['hidden_size']} is not divided by {sizes['num_attention_heads']} heads")
    if given["hidden_act"] not in ACTIVATIONS:
        raise ConfigError(f"the activation {given['hidden_act']!r} is not known; known are {', '.join(ACTIVATIONS)}")
    if kind == "siglip2_vision_model":
        grid = math.isqrt(sizes["num_patches"])
        if grid**2 != sizes["num_patches"]:
            raise ConfigError(f"num_patches: {sizes['num_patches']} is not a square")
    else:
        grid = sizes["image_size"] // sizes["patch_size"]
    if grid < 1:
        raise ConfigError(f"a picture of {given['image_size']} pixels has no patch of {sizes['patch_size']}")
    return VisionConfig(
        model_type=kind,
        image_size=sizes.get("image_size", grid * sizes["patch_size"]),
        grid=grid,
        hidden_act=given["hidden_act"],
        layer_norm_eps=float(given["layer_norm_eps"]),
        num_channels=int(given.get("num_channels", 3)),
        has_head=kind.startswith("siglip") and bool(given.get("vision_use_head", True)),
        **cast(Any, {name: sizes[name] for name in names}),
    )


def _whole(values: Values, name: str) -> int:
    value = values[name]
    if isinstance(value, list | tuple) and len(set(value)) == 1:
        value = value[0]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{name}: a whole number above 0 is needed, got {values[name]!r}")
    return value


def write_vision_config(config: VisionConfig) -> dict[str, Any]:
    """`config.json` of an encoder, or a part of another model's. Everything is explicit."""
    if config.is_native:
        return {
            "model_type": config.model_type,
            "depth": config.num_hidden_layers,
            "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size,
            "num_heads": config.num_attention_heads,
            "hidden_act": config.hidden_act,
            "in_channels": config.num_channels,
            "patch_size": config.patch_size,
            "spatial_merge_size": config.merge_size,
            "temporal_patch_size": config.temporal_patch_size,
            "window_size": config.window_size,
            "fullatt_block_indexes": list(config.full_layers),
        }
    size = {"num_patches": config.grid**2} if config.takes_patches else {"image_size": config.image_size}
    head = {"vision_use_head": config.has_head} if config.model_type.startswith("siglip") else {}
    return {
        "model_type": config.model_type,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_channels": config.num_channels,
        "patch_size": config.patch_size,
        **size,
        **head,
        "hidden_act": config.hidden_act,
        "layer_norm_eps": config.layer_norm_eps,
        "attention_dropout": 0.0,
    }


def read_vision_language_config(values: Values) -> VisionLanguageConfig:
    """The settings in the `config.json` of a model that reads pictures. Raises ConfigError for what is not read."""
    kind = str(values.get("model_type", ""))
    if kind not in ARCHITECTURES:
        raise ConfigError(f"models with pictures of the type {kind!r} are not read; known are {', '.join(ARCHITECTURES)}")
    if kind == _NATIVE and "text_config" not in values:
        # published files have the decoder's settings beside the others
        values = {**values, "text_config": {name: value for name, value in values.items() if name != "vision_config"}}
    if not all(isinstance(values.get(part), Mapping) for part in ("vision_config", "text_config")):
        raise ConfigError("a model with pictures needs a vision_config and a text_config")
    of_text = {"model_type": "gemma3_text" if kind == "gemma3" else "llama", **values["text_config"]}
    if kind == _NATIVE:
        of_text = _without_sections(of_text)
    given = [part["tie_word_embeddings"] for part in (values, of_text) if part.get("tie_word_embeddings") is not None]
    tied = any(given) if given else kind == "gemma3"
    return joined_config(values, _text_config(of_text | {"tie_word_embeddings": tied}))


def joined_config(values: Values, text: ModelConfig) -> VisionLanguageConfig:
    """The settings of a model whose decoder is known: what `config.json` says of the rest. Raises ConfigError."""
    kind = str(values["model_type"])
    if kind == _NATIVE:
        return _native(values, text)
    if kind == "gemma3":
        return _gemma3(values, text)
    if kind == "llava":
        return _llava(values, text)
    vision = _vision_config(f"{kind}_vision", values["vision_config"])
    scale, token = values.get("scale_factor", 2), values.get("image_token_id", 128257)
    if not isinstance(scale, int) or scale < 1 or vision.grid % scale:
        raise ConfigError(f"scale_factor: {scale!r} does not divide a side of {vision.grid} patches")
    return VisionLanguageConfig(kind, vision, text, _token(token, text), scale_factor=scale)


def _llava(values: Values, text: ModelConfig) -> VisionLanguageConfig:
    of_vision = values["vision_config"]
    # nothing reads what SigLIP pools
    vision = replace(_vision_config(_encoder_of_llava(of_vision), of_vision), has_head=False)
    layer = values.get("vision_feature_layer", -2)
    layers = tuple(layer) if isinstance(layer, list | tuple) else (layer,)
    count = vision.num_hidden_layers + 1
    if not layers or not all(isinstance(one, int) and -count <= one < count for one in layers):
        raise ConfigError(f"vision_feature_layer: {layer!r} is not among {vision.num_hidden_layers} layers")
    strategy = values.get("vision_feature_select_strategy", "default")
    if strategy not in ("default", "full"):
        raise ConfigError(f"vision_feature_select_strategy: one of default, full is needed, got {strategy!r}")
    if strategy == "default" and not vision.has_class_token:
        raise ConfigError("vision_feature_select_strategy: 'default' drops a class token; this encoder has none: set 'full'")
    act = values.get("projector_hidden_act", "gelu")
    if act not in ACTIVATIONS:
        raise ConfigError(f"projector_hidden_act: {act!r} is not known; known are {', '.join(ACTIVATIONS)}")
    return VisionLanguageConfig(
        "llava",
        vision,
        text,
        _token(values.get("image_token_index", values.get("image_token_id", 32000)), text),
        feature_layers=layers,
        feature_layer_is_list=isinstance(layer, list | tuple),
        drops_class=strategy == "default",
        projector_act=act,
        projector_bias=bool(values.get("multimodal_projector_bias", True)),
    )


def _rope_of(of_text: Values) -> Values:
    return of_text.get("rope_parameters") or of_text.get("rope_scaling") or {}


def _without_sections(of_text: Values) -> dict[str, Any]:
    """A Qwen2's settings of a Qwen2.5-VL's decoder: positions of three numbers turn channels as those of one do."""
    rope = dict(_rope_of(of_text))
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    rope.pop("type", None)
    rope.pop("mrope_section", None)
    theta = rope.pop("rope_theta", None) or of_text.get("rope_theta") or 1_000_000.0
    rope |= {"rope_type": "default" if kind == "mrope" else kind, "rope_theta": theta}
    rest = {name: value for name, value in of_text.items() if name not in ("rope_scaling", "rope_parameters", "rope_theta")}
    return {**rest, "model_type": "qwen2", "rope_parameters": rope}


def _native(values: Values, text: ModelConfig) -> VisionLanguageConfig:
    of_vision = {"in_channels": 3, "hidden_act": "silu", "temporal_patch_size": 2, "window_size": 112} | dict(
        values["vision_config"]
    )
    of_vision = {"spatial_merge_size": 2, "patch_size": 14, "fullatt_block_indexes": [7, 15, 23, 31]} | of_vision
    # older files call it otherwise
    of_vision.setdefault("in_channels", of_vision.get("in_chans", 3))
    names = ("hidden_size", "intermediate_size", "depth", "num_heads", "patch_size", "spatial_merge_size")
    try:
        sizes = {name: _whole(of_vision, name) for name in (*names, "temporal_patch_size", "window_size")}
    except KeyError as error:
        raise ConfigError(f"vision_config: {error.args[0]!r} is missing") from None
    width, heads, merge = sizes["hidden_size"], sizes["num_heads"], sizes["spatial_merge_size"]
    if width % (4 * heads):
        raise ConfigError(f"hidden_size {width} is not divided by {heads} heads with channels of rows and of columns")
    if of_vision["hidden_act"] not in ACTIVATIONS:
        raise ConfigError(f"the activation {of_vision['hidden_act']!r} is not known; known are {', '.join(ACTIVATIONS)}")
    if sizes["window_size"] < merge * sizes["patch_size"]:
        raise ConfigError(f"window_size: {sizes['window_size']} pixels hold no square of {merge} patches")
    if of_vision.get("out_hidden_size", text.hidden_size) != text.hidden_size:
        raise ConfigError(f"out_hidden_size: {of_vision['out_hidden_size']} is not the decoder's width, {text.hidden_size}")
    vision = VisionConfig(
        _NATIVE,
        width,
        sizes["intermediate_size"],
        sizes["depth"],
        heads,
        sizes["patch_size"],
        image_size=merge * sizes["patch_size"],
        grid=merge,
        hidden_act=of_vision["hidden_act"],
        layer_norm_eps=1e-6,
        num_channels=_whole(of_vision, "in_channels"),
        merge_size=merge,
        temporal_patch_size=sizes["temporal_patch_size"],
        window_size=sizes["window_size"],
        full_layers=tuple(cast(Sequence[int], of_vision["fullatt_block_indexes"])),
    )
    sections = tuple(_rope_of(values["text_config"]).get("mrope_section", (16, 24, 24)))
    if len(sections) != 3 or 2 * sum(sections) != text.rotary_dim:
        raise ConfigError(
            f"mrope_section: three numbers of pairs are needed, {text.rotary_dim // 2} in all, got {list(sections)}"
        )
    token = _token(values.get("image_token_id", 151655), text)
    return VisionLanguageConfig(_NATIVE, vision, text, token, rope_sections=sections)


def _gemma3(values: Values, text: ModelConfig) -> VisionLanguageConfig:
    of_vision = values["vision_config"]
    if values.get("text_config", {}).get("use_bidirectional_attention"):
        raise ConfigError("text_config: use_bidirectional_attention: a decoder whose texts see what follows is not read")
    kind = str(of_vision.get("model_type", "siglip_vision_model"))
    if kind != "siglip_vision_model":
        raise ConfigError(f"vision_config: Gemma 3's encoder is SigLIP's, one of the type {kind!r} is not read")
    vision = replace(_vision_config(kind, of_vision), has_head=False)
    tokens = values.get("mm_tokens_per_image", 256)
    side = math.isqrt(tokens) if isinstance(tokens, int) and tokens > 0 else 0
    if not side or side**2 != tokens or side > vision.grid or vision.grid // (vision.grid // side) != side:
        raise ConfigError(
            f"mm_tokens_per_image: a side of {vision.grid} patches is not made {tokens!r} tokens by means of squares"
        )
    names = {"boi_token_index": 255_999, "eoi_token_index": 256_000, "image_token_index": 262_144}
    begin, end, image = (
        _token(values.get(name, values.get(name.replace("index", "id"), usual)), text) for name, usual in names.items()
    )
    return VisionLanguageConfig("gemma3", vision, text, image, pooled_side=side, around=(begin, end))


def _encoder_of_llava(values: Values) -> str:
    kind = str(values.get("model_type", "clip_vision_model"))
    if kind not in ("clip_vision_model", "siglip_vision_model"):
        raise ConfigError(f"vision_config: LLaVA's encoder is CLIP's or SigLIP's, one of the type {kind!r} is not read")
    return kind


def _text_config(values: Values) -> ModelConfig:
    family = FAMILIES.get(str(values.get("model_type")))
    if family is None:
        raise ConfigError(f"text_config: unknown architecture {values.get('model_type')!r}; supported: {', '.join(FAMILIES)}")
    if family.model_type == "llama":
        values = _LLAMA | {name: value for name, value in values.items() if value is not None}
    if family.model_type == "gemma3_text":
        bases = {} if values.get("rope_parameters") else _GEMMA3_BASES
        values = _GEMMA3 | bases | {name: value for name, value in values.items() if value is not None}
    for name in family.required:
        if not isinstance(values.get(name), int):
            raise ConfigError(f"text_config: {name}: a whole number is needed, got {values.get(name)!r}")
    try:
        config = read_config(family, values)
    except KeyError as error:
        raise ConfigError(f"text_config: {error.args[0]!r} is missing") from None
    if config.embedding_multiplier != 1 and family.model_type == "granite":
        raise ConfigError("text_config: a decoder that multiplies its embeddings as Granite does is not joined to an encoder")
    return config


def _token(value: Any, text: ModelConfig) -> int:
    if not isinstance(value, int) or not 0 <= value < text.vocab_size:
        raise ConfigError(f"the image token {value!r} is not in the vocabulary of {text.vocab_size:,} tokens")
    return value


def write_vision_language_config(config: VisionLanguageConfig) -> dict[str, Any]:
    """`config.json` of a model that reads pictures, but for what is the same in all files."""
    family = family_of(config.text)
    text = {"model_type": family.model_type, **write_config(family, config.text), "use_cache": True}
    values: dict[str, Any] = {
        "model_type": config.model_type,
        "architectures": [ARCHITECTURES[config.model_type]],
        "text_config": text,
        "vision_config": write_vision_config(config.vision),
        "tie_word_embeddings": config.text.tie_word_embeddings,
    }
    if config.vision.is_native:
        rope = dict(text["rope_parameters"]) | {"mrope_section": list(config.rope_sections)}
        old = {"type": "mrope", "mrope_section": list(config.rope_sections)}
        values["text_config"] = text | {"model_type": "qwen2_5_vl_text", "rope_parameters": rope, "rope_scaling": old}
        values["vision_config"] |= {"out_hidden_size": config.text.hidden_size}
        return values | {"image_token_id": config.image_token_id}
    if config.around is not None:
        begin, end = config.around
        return values | {
            "mm_tokens_per_image": config.tokens_per_tile,
            "boi_token_index": begin,
            "eoi_token_index": end,
            "image_token_index": config.image_token_id,
        }
    if config.model_type != "llava":
        return values | {"image_token_id": config.image_token_id, "scale_factor": config.scale_factor}
    layers = config.feature_layers
    return values | {
        "image_token_index": config.image_token_id,
        "image_seq_length": config.tokens_per_tile,
        "vision_feature_layer": list(layers) if config.feature_layer_is_list else layers[0],
        "vision_feature_select_strategy": "default" if config.drops_class else "full",
        "projector_hidden_act": config.projector_act,
        "multimodal_projector_bias": config.projector_bias,
    }
