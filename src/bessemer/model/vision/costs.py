"""What an encoder of pictures and its projector take of memory, in training and where they only read.

Counted by hand from the modules, as numbers for each patch and each token of the decoder. A layer of SigLIP's or CLIP's keeps
for its backward pass what its two norms read (2 D) and give (2 D), queries, keys and values (3 D), what attention gives (D),
and its feed-forward network's inner states before and behind the activation (2 I). Qwen2.5-VL's keeps besides what its norms
give before their weights, turned queries and keys, and the parts of its gated network.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from bessemer.core.metrics import size
from bessemer.model.vision.config import VisionLanguageConfig
from bessemer.model.vision.model import Vision

#: Bytes of a number in float32; of AdamW's two means.
_FLOAT32, _MEANS = 4.0, 8.0


@dataclass(frozen=True)
class PicturesOfStep:
    """What a micro-batch shows: patches that the encoder reads, and vectors that the decoder gets."""

    patches: float = 0.0
    vectors: float = 0.0

    @classmethod
    def of_tiles(cls, config: VisionLanguageConfig, tiles: float) -> PicturesOfStep:
        """Of a number of tiles; of Qwen2.5-VL's of a number of vectors."""
        if config.vision.is_native:
            return cls(tiles * config.vision.merge_size**2, tiles)
        patches = config.vision.grid**2 + config.vision.has_class_token
        return cls(tiles * patches, tiles * config.tokens_per_tile)


@dataclass(frozen=True)
class VisionMemory:
    """Bytes. weights: of the encoder and the projector. gradients: of what is trained of them; means: AdamW's two. kept: what
    stays until their backward pass. passing: the pixels and the tensors of one layer, beside these."""

    weights: float
    gradients: float
    means: float
    kept: float
    passing: float

    @property
    def standing(self) -> float:
        """What is there between steps."""
        return self.weights + self.means

    def peak_with(self, decoder: float, decoder_standing: float, *, accumulates: bool) -> float:
        """The most of a step, for a decoder that takes `decoder` at most, and `decoder_standing` with its gradients once its
        own backward pass is over. accumulates: whether gradients of micro-batches are summed, and so lie there from the second
        on."""
        during = decoder + (self.gradients if accumulates else 0.0)
        behind = decoder_standing + self.gradients + self.passing
        return self.standing + self.kept + max(during, behind)

    def described(self, patches: float) -> str:
        """What an encoder that only reads takes, for a line. patches: of the picture that is meant."""
        return (
            f"pictures: their encoder takes {size(self.weights)}, and one of {patches:,.0f} patches "
            f"{size(self.kept + self.passing)} while it is read"
        )


@cache
def parameters(config: VisionLanguageConfig) -> tuple[int, int]:
    """Numbers of the encoder and of the projector."""
    with torch.device("meta"):
        vision = Vision(config)
    encoder, projector = (sum(one.numel() for one in part.parameters()) for part in (vision.encoder, vision.projector))
    return encoder, projector


def reading_memory(config: VisionLanguageConfig, pictures: PicturesOfStep, weight_bytes: float = _FLOAT32) -> VisionMemory:
    """Of an encoder that only reads. weight_bytes: of a weight, and of a number of the states. kept: the vectors."""
    c, vision = weight_bytes, config.vision
    width, inner = vision.hidden_size, vision.intermediate_size
    # a layer's feed-forward network, beside what it and its norm read
    layer = c * (4 * width + (3 if vision.is_native or vision.hidden_act == "quick_gelu" else 2) * inner)
    if vision.is_native and c < _FLOAT32:
        # queries are turned in float32
        layer = max(layer, c * 7 * width + _FLOAT32 * 5 * width)
    passing = pictures.patches * (_FLOAT32 * _pixels_of_patch(config) + layer)
    out = pictures.vectors * config.text.hidden_size * c
    return VisionMemory(sum(parameters(config)) * c, 0.0, 0.0, out, passing)


def training_memory(
    config: VisionLanguageConfig,
    pictures: PicturesOfStep,
    *,
    encoder: bool,
    projector: bool,
    dtype_bytes: int = 4,
) -> VisionMemory:
    """Of a step that trains the encoder, the projector, or neither. dtype_bytes: of the operands of products."""
    c, is_half = float(dtype_bytes), dtype_bytes != 4
    of_encoder, of_projector = parameters(config)
    trained = (of_encoder if encoder else 0) + (of_projector if projector else 0)
    of_patch = 0.0
    if encoder:
        of_patch += _pixels_of_patch(config) * _FLOAT32 + config.vision.num_hidden_layers * _kept_of_layer(config, c)
    if encoder or projector:
        of_patch += _kept_of_projector(config, c)
    copies = c * trained if is_half else 0.0
    # the vectors, those of the tokens, and the states with them in their places
    vectors = 3 * pictures.vectors * config.text.hidden_size * _FLOAT32
    kept = pictures.patches * of_patch + copies + vectors
    passing = _passing(config, pictures, _FLOAT32 if encoder else c)
    weights = _FLOAT32 * (of_encoder + of_projector)
    return VisionMemory(weights, _FLOAT32 * trained, _MEANS * trained, kept, passing)


def _pixels_of_patch(config: VisionLanguageConfig) -> int:
    vision = config.vision
    return vision.num_channels * vision.temporal_patch_size * vision.patch_size**2


def _passing(config: VisionLanguageConfig, pictures: PicturesOfStep, c: float) -> float:
    """Bytes of the pixels, and of the tensors of a layer that exist at once."""
    vision = config.vision
    layer = 3 * vision.hidden_size + 2 * vision.intermediate_size
    return pictures.patches * (_FLOAT32 * _pixels_of_patch(config) + c * layer)


def _kept_of_layer(config: VisionLanguageConfig, c: float) -> float:
    """Bytes for a patch that a layer keeps for its backward pass. c: of a number that products read or give."""
    vision = config.vision
    width, inner, heads = vision.hidden_size, vision.intermediate_size, vision.num_attention_heads
    if vision.is_native:
        return _FLOAT32 * 4 * width + c * (9 * width + 4 * inner) + _FLOAT32 * (heads + 2)
    # this activation is a product with a function of its factor
    inner *= 3 if vision.hidden_act == "quick_gelu" else 2
    return _FLOAT32 * 2 * width + c * (6 * width + inner) + _FLOAT32 * (heads + 4)


def _kept_of_projector(config: VisionLanguageConfig, c: float) -> float:
    """Bytes for a patch."""
    vision, text = config.vision, config.text.hidden_size
    width = vision.hidden_size
    if vision.is_native:
        # a norm's input and output, and two layers over a square
        return _FLOAT32 * 2 * width + c * 3 * width
    if config.scale_factor:
        # the last norm's input, and squares of what it gives
        return _FLOAT32 * width + c * width
    if config.pooled_side:
        return _FLOAT32 * 2 * width
    return c * (width * len(config.feature_layers) + 2 * text)
